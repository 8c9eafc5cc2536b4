"""
Every branch on the engine that runs the model, and every sum over processes. No other room asks which engine runs.

| file | engine |
|---|---|
| `base.py` | one process, DistributedDataParallel |
| `fsdp.py` | FSDP2, whether accelerate sharded the model or transformers did while loading it |
| `deepspeed.py` | DeepSpeed ZeRO 1 to 3, with or without CPU offload |
| `choice.py` | which of them runs a model |
| `checks.py` | what is refused, with the reason |
| `checkpoints.py` | which checkpoints can be resumed, and those of sharded models |
| `saving.py` | the dtype that a model is saved in |
| `hooks.py` | what unlearning does to a [`~transformers.Trainer`] from outside its schedule |
| `trials.py` | when a run of a trainer begins, and where it goes |
"""

from .base import MOST_OVERFLOWS, Engine, GradientError, find_soul, trained_parameters
from .checkpoints import KeptWithCheckpoint, ShardedCheckpointMixin, damage_of, newest_checkpoint, whole_checkpoint
from .checks import check_engine, check_estimator, check_trainer, prepare_deepspeed
from .choice import make_engine
from .hooks import check_weights, rows_per_forward, save_checkpoint, stop_at_gradient, stop_at_loss
from .saving import SavedDtypeMixin, keeper_of_weights, set_bf16
from .trials import TrialMixin


__all__ = [
    "MOST_OVERFLOWS",
    "Engine",
    "GradientError",
    "KeptWithCheckpoint",
    "SavedDtypeMixin",
    "ShardedCheckpointMixin",
    "TrialMixin",
    "check_engine",
    "check_estimator",
    "check_trainer",
    "check_weights",
    "damage_of",
    "find_soul",
    "keeper_of_weights",
    "make_engine",
    "newest_checkpoint",
    "prepare_deepspeed",
    "rows_per_forward",
    "save_checkpoint",
    "set_bf16",
    "stop_at_gradient",
    "stop_at_loss",
    "trained_parameters",
    "whole_checkpoint",
]
