"""The record of a run that a recipe makes."""

import logging
import platform
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from soul_trainer import UnlearnTrainer
from soul_trainer.records import run_settings

from ..attacks.command import Found
from ..statistics import Figure
from .record import Evidence, complete_record, read_record, record_file_of, write_record


if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

logger = logging.getLogger(__name__)


class RecordCallback(TrainerCallback):
    """
    Keeps what a record needs and a trainer does not know.

    Args:
        target (`str`): Folder or hub id of the model before unlearning.
        rows (`Mapping[str, Iterable[Mapping]]`): `forget` and `retain`: rows as their owner has them.
        settings (`Mapping`, *optional*): What the run depends on besides its [`~soul_trainer.UnlearnConfig`].

    Attributes:
        started (`datetime`): When training began or, after a resume, went on.
    """

    def __init__(self, target: str, rows: Mapping[str, Iterable[Mapping]], settings: Mapping | None = None):
        self.target, self.rows, self.settings = target, rows, settings or {}
        self.started = datetime.now(timezone.utc)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Notes the time."""
        self.started = datetime.now(timezone.utc)


def write_run_record(
    trainer: UnlearnTrainer,
    suite: str,
    figures: Mapping[str, tuple[str | None, Mapping[str, Figure]]],
    target_weights: str | None = None,
    signing_key: "Ed25519PrivateKey | None" = None,
) -> Path | None:
    """
    Writes the record of a run whose model is saved, beside its folder.

    Args:
        trainer ([`~soul_trainer.UnlearnTrainer`]): After training. Without a [`RecordCallback`] nothing is written.
        suite (`str`): Name of the suite that made the figures.
        figures (`Mapping[str, tuple]`): As in [`~record.Evidence`].
        target_weights (`str`, *optional*): Hash of the weights before unlearning.
        signing_key (`Ed25519PrivateKey`, *optional*): Of [`~envelope.load_signing_key`].

    Returns:
        `Path`: The record.
    """
    callback = next((each for each in trainer.callback_handler.callbacks if isinstance(each, RecordCallback)), None)
    if callback is None:
        return None
    args = trainer.args
    is_cuda = args.device.type == "cuda"
    evidence = Evidence(
        model=Path(args.output_dir),
        target=callback.target,
        rows=callback.rows,
        figures=figures,
        started=callback.started,
        ended=datetime.now(timezone.utc),
        suite=suite,
        settings=run_settings(args) | dict(callback.settings),
        seeds={"seed": args.seed, "data_seed": args.data_seed},
        weights=figures["after"][0],
        target_weights=target_weights,
        target_revision=callback.settings.get("revision"),
        device={
            "type": args.device.type,
            "name": torch.cuda.get_device_name() if is_cuda else platform.processor() or platform.machine(),
            "processes": args.world_size,
            "engine": type(trainer.engine).__name__,
        },
    )
    return write_record(record_file_of(args.output_dir), evidence, signing_key)


def add_attacks(folder: Path, found: Found, signing_key: "Ed25519PrivateKey | None" = None) -> None:
    """
    Adds what attacks brought back to the record of a run, if it has one.

    Args:
        folder (`Path`): The run's.
        found (`dict`): Of [`~attacks.after.attack_run`].
        signing_key (`Ed25519PrivateKey`, *optional*): Without it, a record that is signed stays as it is.
    """
    path = record_file_of(folder)
    if not path.exists():
        return
    if signing_key is None and read_record(path).envelope is not None:
        logger.warning(f"{path} is signed, and gets no figures of attacks without --signing_key.")
        return
    attacks = {
        attack: {role: {name: each.to_json() for name, each in figures.items()} for role, figures in roles.items()}
        for attack, roles in found.items()
    }
    complete_record(path, attacks, signing_key)
