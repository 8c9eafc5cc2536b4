"""What a run leaves behind besides weights: its settings, its end, its model card. Files are written whole."""

import json
import os
import shutil
from dataclasses import asdict, fields
from enum import Enum
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import TrainingArguments

from .config import UnlearnConfig
from .objectives import Objectives
from .settings import ObjectiveArguments
from .soul_settings import SOUL_NAMES, SoulArguments


RUN_FILE = "unlearning.json"
_TAGS = ("machine-unlearning", "soul-trainer")
# In a model card, what follows was written after training, and stays.
_SECTION_END = "<!-- soul-trainer: end -->"

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
    if not objectives.any("needs_reference"):
        idle |= {"reference", "reference_topk"}
    if args.optim not in SOUL_NAMES:
        idle |= {setting.name for setting in fields(SoulArguments)}
    own = [setting.name for setting in fields(args) if setting.name not in inherited | idle | {"overwrite"}]
    values = {name: getattr(args, name) for name in own}
    if args.optim in SOUL_NAMES:
        values |= asdict(args.resolved())
    return _plain(values) | training_settings(args)


def _plain(values: dict) -> dict:
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


def make_way(folder: str, overwrite: bool, is_main_process: bool) -> None:
    """
    Makes way for a new run in its folder: with `overwrite`, removes a finished run's mark and its checkpoints, which a
    later resume would take for those of the new run.

    Raises:
        ValueError: If a finished run is there and `overwrite` is not set.
    """
    folder = Path(folder)
    if not overwrite and (folder / RUN_FILE).exists():
        raise ValueError(
            f"`output_dir`={str(folder)!r} holds a finished run: set `overwrite=True` (--overwrite) to replace it, or "
            "choose another folder."
        )
    if overwrite and is_main_process:
        (folder / RUN_FILE).unlink(missing_ok=True)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def record_run(folder: str, args: UnlearnConfig, metrics: dict[str, float]) -> None:
    """Marks the run in a folder as finished, with its settings and the Trainer's metrics."""
    record = {"settings": run_settings(args), "metrics": metrics}
    write_whole(Path(folder) / RUN_FILE, json.dumps(record, indent=2) + "\n")


def read_model_card(folder: str) -> ModelCard | None:
    """The model card in a folder, before the Trainer writes its own in its place."""
    path = Path(folder) / "README.md"
    return ModelCard.load(path) if path.exists() else None


def complete_model_card(args: UnlearnConfig, before: ModelCard | None) -> None:
    """
    Adds to the model card that the Trainer wrote to `output_dir` the method, its settings and tags, and what the card
    before had and the Trainer does not know: metadata, such as base model and datasets, and what comes after the
    settings, such as the figures of an evaluation.
    """
    path = Path(args.output_dir) / "README.md"
    card = ModelCard.load(path)
    known = before.data.to_dict() if before else {}
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *_TAGS, *(known.get("tags") or [])]))
    for name, value in known.items():
        if card.data.get(name) is None:
            card.data[name] = value
    rows = "\n".join(f"| `{name}` | `{value}` |" for name, value in run_settings(args).items())
    section = f"## Unlearning\n\nMade to forget with soul-trainer.\n\n| setting | value |\n|---|---|\n{rows}\n"
    after = before.text.partition(_SECTION_END)[2].strip() if before else ""
    card.text = f"{card.text.rstrip()}\n\n{section}\n{_SECTION_END}\n" + (f"\n{after}\n" if after else "")
    write_whole(path, str(card))
