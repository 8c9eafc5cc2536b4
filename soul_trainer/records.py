"""What a run leaves behind besides weights: its settings, its end, its model card. Files are written whole."""

import json
import os
import shutil
from dataclasses import fields
from enum import Enum
from pathlib import Path

from transformers import TrainingArguments

from .config import SOPHIA_NAMES, SophiaArguments, UnlearnConfig
from .objectives import Objectives
from .settings import ObjectiveArguments


RUN_FILE = "unlearning.json"
# An evaluation leaves it for every card that the Trainer writes; pushes to the hub skip names that begin so.
EVALUATION_FILE = "_evaluation.md"

# The settings of TrainingArguments that decide what a run learns; the others say how it is run.
_TRAINING_SETTINGS = (
    *("optim", "optim_args", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "bf16", "fp16", "seed", "data_seed"),
)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file under another name and renames it, so that no reader meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def training_settings(args: TrainingArguments) -> dict:
    """The settings of any training that another must repeat to get the same model."""
    return _plain({name: getattr(args, name) for name in _TRAINING_SETTINGS})


def run_settings(args: UnlearnConfig) -> dict:
    """The settings that another run must repeat to get the same model."""
    inherited = {setting.name for setting in fields(TrainingArguments)}
    objectives = Objectives.named(args.forget_loss, args.retain_loss)
    idle = {setting.name for setting in fields(ObjectiveArguments)}
    idle -= {name for objective in objectives if objective for name in objective.settings}
    if args.optim not in SOPHIA_NAMES:
        idle |= {setting.name for setting in fields(SophiaArguments)}
    own = [setting.name for setting in fields(args) if setting.name not in inherited | idle | {"overwrite"}]
    return _plain({name: getattr(args, name) for name in own}) | training_settings(args)


def _plain(values: dict) -> dict:
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


def make_way(args: UnlearnConfig, is_main_process: bool) -> None:
    """
    Makes way for a new run in `output_dir`: with `overwrite`, removes a finished run's mark and its checkpoints, which
    a later resume would take for those of the new run.

    Raises:
        ValueError: If a finished run is there and `overwrite` is not set.
    """
    folder = Path(args.output_dir)
    if not args.overwrite and (folder / RUN_FILE).exists():
        raise ValueError(
            f"`output_dir`={args.output_dir!r} holds a finished run: set `overwrite=True` (--overwrite) to replace "
            "it, or choose another folder."
        )
    if args.overwrite and is_main_process:
        (folder / RUN_FILE).unlink(missing_ok=True)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def record_run(args: UnlearnConfig, metrics: dict[str, float]) -> None:
    """Marks the run in `output_dir` as finished, with its settings and the Trainer's metrics."""
    record = {"settings": run_settings(args), "metrics": metrics}
    write_whole(Path(args.output_dir) / RUN_FILE, json.dumps(record, indent=2) + "\n")


def add_to_model_card(args: UnlearnConfig) -> None:
    """Adds the method, its settings and an evaluation's section to the card that the Trainer wrote to `output_dir`."""
    path = Path(args.output_dir) / "README.md"
    rows = "\n".join(f"| `{name}` | `{value}` |" for name, value in run_settings(args).items())
    section = f"\n## Unlearning\n\nMade to forget with soul-trainer.\n\n| setting | value |\n|---|---|\n{rows}\n"
    evaluation = path.with_name(EVALUATION_FILE)
    if evaluation.exists():
        section += "\n" + evaluation.read_text(encoding="utf-8")
    write_whole(path, path.read_text(encoding="utf-8") + section)
