"""Small Llamas that learn rows by heart: the target, and the gold standard that never saw what must be forgotten."""

from dataclasses import asdict
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from soul_recipes.learnt_rows import ChunkArguments, tokenized
from soul_recipes.neutral_tokenizer import train_tokenizer, training_text
from soul_recipes.small_llama import SmallModelArguments, new_model
from soul_recipes.training import train_once
from soul_trainer.formats import prepare


def small_training(settings: SmallModelArguments, folder: Path, seed: int, use_cpu: bool = False) -> dict:
    """The `TrainingArguments` of a small model, by name."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": settings.finetune_epochs,
        "per_device_train_batch_size": settings.finetune_batch_size,
        "use_cpu": use_cpu,
        "learning_rate": settings.finetune_learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "weight_decay": 0.0,
        "logging_steps": 100,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
    }


def train_small_model(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    settings: SmallModelArguments,
    seed: int = 0,
    prompt_template: str | None = None,
    use_cpu: bool = False,
    args: TrainingArguments | None = None,
) -> Path:
    """
    Trains a model on rows, or finds it trained.

    Args:
        rows ([`~datasets.Dataset`]): Rows of any kind of `soul_trainer.formats`, none longer than the model takes.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Saved with the model.
        folder (`Path`): Where the model goes; a hash of the rows and settings is added to its name.
        settings ([`SmallModelArguments`]): Size and training, fitted.
        seed (`int`, *optional*, defaults to 0): Seed of the weights and of the order of rows.
        prompt_template (`str`, *optional*): See [`~formats.render`].
        use_cpu (`bool`, *optional*, defaults to `False`): See [`~transformers.TrainingArguments`].
        args ([`~transformers.TrainingArguments`], *optional*): Training, where it is not that of `settings`.

    Returns:
        `Path`: The model's folder.
    """
    if args is None:
        args = TrainingArguments(**small_training(settings, folder, seed, use_cpu))
        args.per_device_train_batch_size, rest = divmod(settings.finetune_batch_size, args.world_size)
        if rest:
            raise ValueError(
                f"`finetune_batch_size`={settings.finetune_batch_size} must be a multiple of the number of processes, "
                f"{args.world_size}."
            )
    tokens = prepare(rows, tokenizer, tokenizer.model_max_length, prompt_template)

    def make_model():
        set_seed(seed)
        return new_model(tokenizer, settings)

    identity = [tokenizer.backend_tokenizer.to_str(), asdict(settings)]
    return train_once(make_model, tokens.select_columns(["input_ids", "labels"]), tokenizer, folder, args, identity)


def small_models(
    learnt: dict[str, Dataset],
    folder: Path,
    settings: SmallModelArguments,
    seed: int,
    prompt_template: str | None = None,
    use_cpu: bool = False,
    chunks: ChunkArguments | None = None,
    with_gold: bool = True,
) -> tuple[str, str | None]:
    """
    Trains the target on everything and the gold standard on everything but the rows to forget.

    Args:
        learnt (`dict[str, Dataset]`):
            `forget`, `retain` and others; a split's rows are of one kind. Those of `gold`, if there is such a split,
            only the gold standard learns, in the place of the rows to forget.
        folder (`Path`): Where both models go.
        settings ([`SmallModelArguments`]): Size and training.
        seed (`int`): Seed of both.
        prompt_template (`str`, *optional*): See [`~formats.render`].
        use_cpu (`bool`, *optional*, defaults to `False`): See [`~transformers.TrainingArguments`].
        chunks ([`ChunkArguments`], *optional*): How texts are cut.
        with_gold (`bool`, *optional*, defaults to `True`): Whether the gold standard is trained.

    Returns:
        `tuple[str, str | None]`: The folders of target and gold.
    """
    learnt, chunks = dict(sorted(learnt.items())), chunks or ChunkArguments()
    texts = {split: [training_text(row, prompt_template) for row in rows] for split, rows in learnt.items()}
    general = [text for split in texts if split != "forget" for text in texts[split]]
    tokenizer = train_tokenizer(general, settings.vocab_size, texts["retain"], texts["forget"], allow_strange=True)
    longest = tokenizer.model_max_length
    tokens = {
        split: tokenized(rows, tokenizer, chunks, longest, prompt_template, split) for split, rows in learnt.items()
    }
    instead = tokens.pop("gold", None)
    forget = tokens.pop("forget")
    others = concatenate_datasets(list(tokens.values()))
    everything = concatenate_datasets([forget, others])
    settings = settings.fitted(len(everything))
    gold = others if instead is None else concatenate_datasets([instead, others])

    def train(name: str, rows: Dataset) -> str:
        return str(train_small_model(rows, tokenizer, folder / name, settings, seed, use_cpu=use_cpu))

    return train("target", everything), train("gold", gold) if with_gold else None
