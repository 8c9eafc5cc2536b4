"""
Trains a model on rows: the target that must forget them, or the gold standard that never saw them.

    python recipes/finetune.py --dataset locuslab/TOFU --configs full --model HUB_ID --model_dir target \\
        --config recipes/configs/finetune/tofu.yaml
    python recipes/finetune.py --dataset book.txt other.txt --model HUB_ID --model_dir target --lora_rank 8
    python recipes/finetune.py --dataset all.jsonl --exclude forget.jsonl --model HUB_ID --model_dir gold
    python recipes/finetune.py --dataset muse-bench/MUSE-News --configs raw --splits forget,retain2 --model HUB_ID ...
    python recipes/finetune.py --dataset DIR --configs retain,held_out --tokenizer DIR --model_dir gold

Rows are texts, which are cut into chunks, or have a question, a prompt or messages, and then the answer alone has a
loss. Without `--model`, a small Llama is trained from scratch until it has learnt its rows by heart. Every flag of
`TrainingArguments` works. A model that is there, made from the same rows with the same settings, is used again.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from soul_eval.adapters import LoraArguments
from soul_eval.console import run_script
from soul_eval.models import ModelArguments, weight_files
from soul_eval.settings_files import SettingsParser
from soul_recipes.learnt_rows import ChunkArguments, load_learnt, tokenized, without
from soul_recipes.small_llama import SmallModelArguments
from soul_recipes.small_models import small_training, train_small_model
from soul_recipes.training import train_once
from soul_trainer.formats import longest_row


@dataclass
class FinetuneArguments(ModelArguments):
    """What to train on."""

    dataset: list[str] = field(
        metadata={"help": "Text files, folders of them, JSON files, folders in the hub's layout, hub datasets: any."}
    )
    model_dir: str = field(metadata={"help": "Where the model goes; a hash of rows and settings is added."})
    config: str | None = field(default=None, metadata={"help": "YAML file of settings, as in recipes/configs."})
    configs: str | None = field(default=None, metadata={"help": "Configurations of the datasets, by commas."})
    splits: str = field(default="train", metadata={"help": "Splits of the datasets, by commas."})
    exclude: list[str] = field(
        default_factory=list, metadata={"help": "Files, folders or hub datasets whose rows are left out: the gold."}
    )
    model: str | None = field(default=None, metadata={"help": "Hub id or folder; by default a small Llama."})
    prompt_template: str | None = field(
        default=None, metadata={"help": "Of question/answer rows; see UnlearnConfig. It must be unlearning's, too."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest row in tokens; by default what the model takes."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.model is None and self.tokenizer is None:
            raise ValueError("`tokenizer` (--tokenizer) is needed where there is no `model` (--model).")


def load_parts(run: FinetuneArguments) -> list[Dataset]:
    """The rows, a part for each source, configuration and split."""
    parts = []
    for source in run.dataset:
        # A file has no configurations.
        configs = [None] if Path(source).is_file() or not run.configs else run.configs.split(",")
        splits = ["train"] if Path(source).is_file() else run.splits.split(",")
        parts += [load_learnt(source, config, split) for config in configs for split in splits]
    return without(parts, [load_learnt(source, name="exclude") for source in run.exclude])


def main(command_line: Sequence[str] | None = None) -> Path:
    """Trains, and returns the model's folder."""
    kinds = (FinetuneArguments, ChunkArguments, SmallModelArguments, LoraArguments, TrainingArguments)
    parser = SettingsParser(kinds)
    named = given = parser.named(command_line)
    if "config" in named:
        given = parser.read(named["config"]) | named
    values = {"seed": 0, "save_strategy": "no", "report_to": "none", **given}
    run, chunks, small, lora, args = parser.build(values, named)
    folder, parts = Path(run.model_dir), load_parts(run)
    tokenizer = run.load_tokenizer(run.model)
    longest = run.max_length or tokenizer.model_max_length
    if run.model:
        with torch.device("meta"):  # without the weights, which a model that is there already does not need
            config = AutoConfig.from_pretrained(run.model, **run.pretrained_options(run.model))
            shape = AutoModelForCausalLM.from_config(config, trust_remote_code=run.trust_remote_code)
        longest = longest_row(run.max_length, shape, tokenizer)
    rows = [tokenized(part, tokenizer, chunks, longest, run.prompt_template) for part in parts]
    rows = concatenate_datasets(rows)
    if run.model:
        make_model = partial(run.load_model, run.model)
        identity = [run.model, run.dtype, weight_files(run.model)]
        # Those that are open add nothing, so that models are found that were trained before there were any.
        identity += [settings] if (settings := run.loading_settings()) else []
        return train_once(make_model, rows, tokenizer, folder, args, identity, lora)
    small = small.fitted(len(rows))
    values = {**small_training(small, folder, args.seed, args.use_cpu), **given}
    *_, args = parser.build(values, named)
    return train_small_model(rows, tokenizer, folder, small, args.seed, args=args)


def command(command_line: Sequence[str] | None = None) -> None:
    """Trains, and prints where the model is."""
    PartialState().print(main(command_line))


if __name__ == "__main__":
    sys.exit(run_script(command))
