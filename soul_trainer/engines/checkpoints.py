"""Checkpoints to resume from: which are whole, and those of a model that transformers sharded while loading it."""

import json
import zipfile
from collections.abc import Callable, Iterator
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
# What a resume needs, by the files of which one engine or another writes one. DeepSpeed has a scheduler of its own.
_ENGINE_STATE = ("global_step*", _SHARDED)
_NEEDED = {
    "the state of the optimizer (optimizer.pt)": ("optimizer.pt", "optimizer.bin", "optimizer_*", *_ENGINE_STATE),
    "the state of the scheduler (scheduler.pt)": ("scheduler.pt", "global_step*"),
    "the random state (rng_state.pth)": ("rng_state*.pth",),
}


def whole_checkpoint(
    resume_from_checkpoint: str | bool, args: TrainingArguments, other_run: Callable[[str], str | None] | None = None
) -> str:
    """
    The checkpoint to resume from.

    Args:
        resume_from_checkpoint (`str` or `bool`):
            A folder; or True, for the newest in `output_dir` that is whole and of this run. A warning names those
            that are skipped.
        args ([`~transformers.TrainingArguments`]): Of the run.
        other_run (`Callable`, *optional*): Says of a checkpoint what shows that it is of another run, or `None`.

    Raises:
        ValueError: If the folder is not whole or of another run, or there is none to resume.
    """

    def reason_against(folder: str) -> str | None:
        if obstacle := damage_of(folder):
            return f"it was not written to its end: {obstacle}"
        if obstacle := missing_from(folder):
            return obstacle
        obstacle = other_run(folder) if other_run else None
        return f"it is of another run: {obstacle}" if obstacle else None

    if resume_from_checkpoint is not True:
        if reason := reason_against(resume_from_checkpoint):
            raise ValueError(
                f"`resume_from_checkpoint`={str(resume_from_checkpoint)!r} cannot be resumed, because {reason}. Name "
                "an earlier one, or True for the newest of this run that is whole; or train anew, in another "
                "`output_dir`. A checkpoint of another run is resumed with `allow_other_run=True`."
            )
        return str(resume_from_checkpoint)
    reasons = []
    newest = newest_checkpoint(args.output_dir, lambda folder: reasons.append(reason_against(folder)) or reasons[-1])
    if newest is None:
        why = f": the newest cannot be resumed, because {reasons[0]}" if reasons else ""
        raise ValueError(
            f"`resume_from_checkpoint=True` found no whole checkpoint of this run in {args.output_dir!r}{why}. Name "
            "another `output_dir` to train anew, or set `allow_other_run=True` to go on from another run's."
        )
    return newest


def newest_checkpoint(output_dir: str, reason_against: Callable[[str], str | None] | None = None) -> str | None:
    """
    The newest checkpoint in a folder that nothing speaks against; a warning names those that are skipped.

    Args:
        output_dir (`str`): The folder.
        reason_against (`Callable`, *optional*): By default, that it was not written to its end.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.partition("-")[2]), reverse=True):
        damage = None if reason_against else damage_of(folder)
        reason = (
            reason_against(str(folder)) if reason_against else damage and f"it was not written to its end: {damage}"
        )
        if reason is None:
            return str(folder)
        logger.warning(f"{folder} is skipped, because {reason}.")
    return None


def missing_from(folder: str | Path) -> str | None:
    """
    What a checkpoint lacks that a resume needs beside the weights.

    Args:
        folder (`str` or `Path`): The checkpoint.

    Returns:
        `str`: For a message, or `None` if all is there.
    """
    folder = Path(folder)
    missing = [what for what, patterns in _NEEDED.items() if not any(any(folder.glob(name)) for name in patterns)]
    if len(missing) == len(_NEEDED):
        return "it holds weights alone, as those of `save_only_model=True`"
    return f"it lacks {' and '.join(missing)}" if missing else None


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
