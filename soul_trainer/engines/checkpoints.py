"""Checkpoints to resume from: which are whole, and those of a model that transformers sharded while loading it."""

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from .fsdp import is_sharded, reshard


logger = logging.get_logger(__name__)

# The Trainer's first process writes this file last.
_LAST_FILE = "trainer_state.json"
# Written by torch.save, as zip archives, whose directory is at the end.
_ARCHIVES = (
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin"),
    *("pytorch_model*.bin", "*_states.pt"),
)
_SHARDED = "sharded"


def whole_checkpoint(resume_from_checkpoint: str | bool, args: TrainingArguments) -> str:
    """
    The checkpoint to resume from.

    Args:
        resume_from_checkpoint (`str` or `bool`):
            A folder; or True, for the newest in `output_dir` that was written to its end. A warning names those that
            are skipped.
        args ([`~transformers.TrainingArguments`]): Of the run.

    Raises:
        ValueError: If the folder was not written to its end, or there is none.
    """
    if resume_from_checkpoint is not True:
        damage = damage_of(resume_from_checkpoint)
        if damage:
            raise ValueError(
                f"`resume_from_checkpoint`={resume_from_checkpoint!r} was not written to its end: {damage}. Name an "
                "earlier one, or True for the newest that is whole."
            )
        return str(resume_from_checkpoint)
    newest = newest_checkpoint(args.output_dir)
    if newest is None:
        raise ValueError(f"`resume_from_checkpoint=True` found no whole checkpoint in {args.output_dir!r}.")
    return newest


def newest_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint that was written to its end, if there is one; a warning names those that are skipped."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.partition("-")[2]), reverse=True):
        damage = damage_of(folder)
        if damage is None:
            return str(folder)
        logger.warning(f"{folder} is skipped, because it was not written to its end: {damage}.")
    return None


def damage_of(folder: str | Path) -> str | None:
    """
    What shows that a checkpoint was not written to its end.

    Args:
        folder (`str` or `Path`): The checkpoint.

    Returns:
        `str`: For a message, or `None` if it is whole.
    """
    try:
        json.loads((Path(folder) / _LAST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"it has no {_LAST_FILE} that can be read"
    safetensors = [path for path in Path(folder).rglob("*.safetensors") if not _is_whole_safetensors(path)]
    archives = [path for pattern in _ARCHIVES for path in Path(folder).rglob(pattern) if not zipfile.is_zipfile(path)]
    return next((f"{path.name} is cut off" for path in (*safetensors, *archives)), None)


def _is_whole_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError:
        return False


class KeptWithCheckpoint(TrainerCallback):
    """
    A callback that keeps files of its own with a checkpoint, before the file that says that it is whole.

    [`ShardedCheckpointMixin`] calls `save_to(folder)`, on every process, and `load_from(folder)`, once the weights of
    the checkpoint are there and before training begins.
    """

    def save_to(self, folder: str | Path) -> None:
        """Adds files to a checkpoint."""
        raise NotImplementedError

    def load_from(self, folder: str | Path) -> None:
        """Takes them up."""
        raise NotImplementedError


class ShardedCheckpointMixin(Trainer):
    """
    Exact resume for models that transformers sharded while loading them. The Trainer saves their weights, whole, and
    refuses to save what else a resume needs; this adds it, each process writing its own part. Under every engine, the
    file that is written last comes after those of all processes.
    """

    @property
    def _is_sharded_at_load(self) -> bool:
        return is_sharded(self.model) and not self.is_fsdp_enabled

    @contextmanager
    def resume_allowed(self, model: PreTrainedModel, args: TrainingArguments) -> Iterator[None]:
        """A context for the Trainer's construction, which would raise at settings that save more than weights."""
        save_only_model = args.save_only_model
        args.save_only_model = save_only_model or is_sharded(model)
        try:
            yield
        finally:
            args.save_only_model = save_only_model

    @property
    def _kept_with_checkpoint(self) -> list[KeptWithCheckpoint]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, KeptWithCheckpoint)]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        reshard(self.model)
        for callback in self._kept_with_checkpoint:
            callback.save_to(output_dir)
        if not self._is_sharded_at_load:
            return super()._save_optimizer_and_scheduler(output_dir)
        weights, state = get_state_dict(self.model, self.optimizer.optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=Path(output_dir) / _SHARDED)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # So that the first process's last file says that all processes have written theirs.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not self._is_sharded_at_load:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        # Else the weights come with the optimizer's state: each process reads its own part of both.

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._is_sharded_at_load:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            self._load_shards(Path(checkpoint))
        if checkpoint is not None:
            for callback in self._kept_with_checkpoint:
                callback.load_from(checkpoint)

    def _load_shards(self, checkpoint: Path) -> None:
        sophia = self.optimizer.optimizer
        weights, state = get_state_dict(self.model, sophia)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=checkpoint / _SHARDED)
        set_state_dict(self.model, sophia, model_state_dict=weights, optim_state_dict=state)
        self.lr_scheduler.load_state_dict(torch.load(checkpoint / "scheduler.pt", weights_only=True))
