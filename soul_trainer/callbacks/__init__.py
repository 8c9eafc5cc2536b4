"""When things happen. What happens is elsewhere."""

from datasets import Dataset
from transformers import Trainer, TrainerCallback

from ..soul_settings import SOUL_NAMES
from .fingerprint import FingerprintCallback
from .forgotten import UntilForgottenCallback
from .hessian import HessianCallback
from .mask import MaskCallback
from .primal_dual import PrimalDualCallback
from .running import FiniteCallback, InterruptCallback, PairingCallback
from .stopping import UnlearningStoppingCallback, gold_forget_loss
from .watch import WatchCallback


__all__ = [
    "FingerprintCallback",
    "FiniteCallback",
    "HessianCallback",
    "InterruptCallback",
    "MaskCallback",
    "PairingCallback",
    "PrimalDualCallback",
    "UnlearningStoppingCallback",
    "UntilForgottenCallback",
    "WatchCallback",
    "callbacks_for",
    "gold_forget_loss",
]


def callbacks_for(trainer: Trainer, retain: Dataset, forget: Dataset) -> list[TrainerCallback]:
    """
    The callbacks that the settings of a trainer ask for.

    Args:
        trainer ([`UnlearnTrainer`]): The trainer that they are to be added to.
        retain ([`~datasets.Dataset`]): Tokenized rows, from [`~formats.prepare`].
        forget ([`~datasets.Dataset`]): Likewise.
    """
    args = trainer.args
    callbacks = [PairingCallback(trainer.train_dataset), FiniteCallback(trainer)]
    callbacks.append(FingerprintCallback(trainer, retain, forget))
    if args.retain_weight_schedule == "primal_dual":
        callbacks.append(PrimalDualCallback(trainer))
    if args.weight_mask != "none":
        callbacks.append(MaskCallback(trainer, retain, forget))
    if args.optim in SOUL_NAMES:
        callbacks.append(HessianCallback(trainer, retain, forget))
    callbacks.append(WatchCallback(trainer))
    return callbacks
