"""Small Llamas that learn rows by heart: the target, and the gold standard that never saw what must be forgotten."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from neutral_tokenizer import train_tokenizer, training_text
from small_llama import SmallModelArguments, new_model
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from soul_trainer.collator import UnlearnCollator
from soul_trainer.formats import prepare


def train_small_model(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    settings: SmallModelArguments,
    seed: int = 0,
    prompt_template: str | None = None,
    use_cpu: bool = False,
) -> Path:
    """
    Trains a model on rows, or finds it trained.

    Args:
        rows ([`~datasets.Dataset`]): Question/answer rows.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Saved with the model.
        folder (`Path`): Where the model goes; a hash of the rows and settings is added to its name.
        settings ([`SmallModelArguments`]): Size and training, fitted.
        seed (`int`, *optional*, defaults to 0): Seed of the weights and of the order of rows.
        prompt_template (`str`, *optional*): See [`~formats.render`].
        use_cpu (`bool`, *optional*, defaults to `False`): See [`~transformers.TrainingArguments`].

    Returns:
        `Path`: The model's folder.
    """
    identity = [rows.to_list(), tokenizer.backend_tokenizer.to_str(), asdict(settings), seed, prompt_template]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    folder = folder.with_name(f"{folder.name}-{digest}")
    if (folder / "model.safetensors").exists():
        return folder
    set_seed(seed)
    part = folder.with_name(folder.name + ".part")
    args = TrainingArguments(
        output_dir=str(part),
        num_train_epochs=settings.finetune_epochs,
        per_device_train_batch_size=settings.finetune_batch_size,
        use_cpu=use_cpu,
        learning_rate=settings.finetune_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.0,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    args.per_device_train_batch_size, rest = divmod(settings.finetune_batch_size, args.world_size)
    if rest:
        raise ValueError(
            f"`finetune_batch_size`={settings.finetune_batch_size} must be a multiple of the number of processes, "
            f"{args.world_size}."
        )
    model = new_model(tokenizer, settings)
    trainer = Trainer(
        model,
        args,
        data_collator=UnlearnCollator(tokenizer.pad_token_id),
        train_dataset=prepare(rows, tokenizer, tokenizer.model_max_length, prompt_template).select_columns(
            ["input_ids", "labels"]
        ),
        processing_class=tokenizer,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        trainer.save_model()
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    trainer.accelerator.wait_for_everyone()
    return folder


def small_models(
    learnt: dict[str, Dataset],
    folder: Path,
    settings: SmallModelArguments,
    seed: int,
    prompt_template: str | None = None,
    use_cpu: bool = False,
) -> tuple[str, str]:
    """
    Trains the target on everything and the gold standard on everything but the rows to forget.

    Args:
        learnt (`dict[str, Dataset]`): `forget`, `retain` and others, question/answer rows each.
        folder (`Path`): Where both models go.
        settings ([`SmallModelArguments`]): Size and training.
        seed (`int`): Seed of both.
        prompt_template (`str`, *optional*): See [`~formats.render`].
        use_cpu (`bool`, *optional*, defaults to `False`): See [`~transformers.TrainingArguments`].

    Returns:
        `tuple[str, str]`: The folders of target and gold.
    """
    learnt = dict(sorted(learnt.items()))
    others = concatenate_datasets([rows for split, rows in learnt.items() if split != "forget"])
    texts = {split: [training_text(row, prompt_template) for row in rows] for split, rows in learnt.items()}
    general = [text for split in texts if split != "forget" for text in texts[split]]
    tokenizer = train_tokenizer(general, settings.vocab_size, texts["retain"], texts["forget"], allow_strange=True)
    everything = concatenate_datasets([learnt["forget"], others])
    settings = settings.fitted(len(everything))
    return tuple(
        str(train_small_model(rows, tokenizer, folder / name, settings, seed, prompt_template, use_cpu))
        for name, rows in (("target", everything), ("gold", others))
    )
