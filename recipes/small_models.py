"""Small Llamas that learn rows by heart: the target, and the gold standard that never saw what must be forgotten."""

import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from neutral_tokenizer import train_tokenizer, training_text
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from soul_trainer.collator import UnlearnCollator
from soul_trainer.formats import prepare


@dataclass
class SmallModelArguments:
    """The size of the small model and how it is trained; 0.32 million parameters for the embedded corpus."""

    vocab_size: int = field(default=1024, metadata={"help": "Tokens of the small model's tokenizer, at most."})
    hidden_size: int | None = field(
        default=None, metadata={"help": "Width of the small model; by default 96, and more for over 500 rows."}
    )
    num_hidden_layers: int = field(default=2, metadata={"help": "Layers of the small model."})
    finetune_epochs: float = field(default=22, metadata={"help": "Passes over the rows that the small model learns."})
    finetune_learning_rate: float | None = field(
        default=None, metadata={"help": "AdamW's, for the small model; by default 3e-3 for width 96, less for more."}
    )
    finetune_batch_size: int = field(default=8, metadata={"help": "Rows in a step of the small model's training."})

    def fitted(self, num_rows: int) -> "SmallModelArguments":
        """The settings with which a model learns `num_rows` rows by heart, about 800 parameters to each."""
        # Parameters: 12 layers width^2 + vocabulary width. Solved for the width, which the four heads must divide.
        square, linear = 12 * self.num_hidden_layers, self.vocab_size
        width = (math.sqrt(linear**2 + 4 * square * 800 * num_rows) - linear) / (2 * square)
        width = self.hidden_size or max(96, 16 * round(width / 16))
        # A wider model diverges at the learning rate of a narrow one: updates of its outputs grow with the width.
        learning_rate = self.finetune_learning_rate or 3e-3 * (96 / width)
        return replace(self, hidden_size=width, finetune_learning_rate=learning_rate)


def new_model(tokenizer: PreTrainedTokenizerBase, settings: SmallModelArguments) -> LlamaForCausalLM:
    """A Llama with random weights, for a tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.hidden_size * 8 // 3,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train_small_model(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, folder: Path, settings: SmallModelArguments, seed: int = 0
) -> Path:
    """
    Trains a model on rows, or finds it trained.

    Args:
        rows ([`~datasets.Dataset`]): Question/answer rows.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Saved with the model.
        folder (`Path`): Where the model goes; a hash of the rows and settings is added to its name.
        settings ([`SmallModelArguments`]): Size and training, fitted.
        seed (`int`, *optional*, defaults to 0): Seed of the weights and of the order of rows.

    Returns:
        `Path`: The model's folder.
    """
    identity = [rows.to_list(), tokenizer.backend_tokenizer.to_str(), asdict(settings), seed]
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
        learning_rate=settings.finetune_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.0,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    model = new_model(tokenizer, settings)
    trainer = Trainer(
        model,
        args,
        data_collator=UnlearnCollator(tokenizer.pad_token_id),
        train_dataset=prepare(rows, tokenizer, tokenizer.model_max_length).select_columns(["input_ids", "labels"]),
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
    learnt: dict[str, Dataset], folder: Path, settings: SmallModelArguments, seed: int
) -> tuple[str, str]:
    """
    Trains the target on everything and the gold standard on everything but the rows to forget.

    Args:
        learnt (`dict[str, Dataset]`): `forget`, `retain` and others, question/answer rows each.
        folder (`Path`): Where both models go.
        settings ([`SmallModelArguments`]): Size and training.
        seed (`int`): Seed of both.

    Returns:
        `tuple[str, str]`: The folders of target and gold.
    """
    learnt = dict(sorted(learnt.items()))
    others = concatenate_datasets([rows for split, rows in learnt.items() if split != "forget"])
    texts = {split: [training_text(row) for row in rows] for split, rows in learnt.items()}
    general = [text for split in texts if split != "forget" for text in texts[split]]
    tokenizer = train_tokenizer(general, settings.vocab_size, texts["retain"], texts["forget"], allow_strange=True)
    everything = concatenate_datasets([learnt["forget"], others])
    settings = settings.fitted(len(everything))
    return tuple(
        str(train_small_model(rows, tokenizer, folder / name, settings, seed))
        for name, rows in (("target", everything), ("gold", others))
    )
