"""
Trains a small Llama from scratch until it has learnt its rows by heart: the target, or the gold standard that never
saw what must be forgotten.

    python recipes/finetune.py --dataset DIR --configs retain,held_out --tokenizer DIR --model_dir gold

`--dataset` is a folder or hub dataset in TOFU's layout. A model that is there already, made from the same rows with
the same settings, is used again.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import concatenate_datasets
from small_llama import SmallModelArguments
from small_models import train_small_model
from transformers import AutoTokenizer, HfArgumentParser

from soul_eval.suites.sources import load_split


@dataclass
class FinetuneArguments:
    """What to train on."""

    dataset: str = field(metadata={"help": "Folder or hub dataset in TOFU's layout."})
    configs: str = field(metadata={"help": "Its configurations, separated by commas."})
    tokenizer: str = field(metadata={"help": "Folder or hub id of the tokenizer."})
    model_dir: str = field(metadata={"help": "Where the model goes."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights and of the order of rows."})


if __name__ == "__main__":
    run, small = HfArgumentParser((FinetuneArguments, SmallModelArguments)).parse_args_into_dataclasses()
    parts = [load_split(run.dataset, config) for config in run.configs.split(",")]
    dataset = concatenate_datasets([part.select_columns(["question", "answer"]) for part in parts])
    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
    print(train_small_model(dataset, tokenizer, Path(run.model_dir), small.fitted(len(dataset)), run.seed))
