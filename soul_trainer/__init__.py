"""Machine unlearning with second-order optimization, as a Hugging Face Trainer plugin."""

from .registration import register


# First: the configurations below name the optimizer by the string that this makes valid.
register()

from .callbacks import HessianCallback, UnlearningStoppingCallback, UntilForgottenCallback, gold_forget_loss  # noqa: E402
from .config import UnlearnConfig  # noqa: E402
from .curvature import estimate_hessian  # noqa: E402
from .optim import Sophia, Soul  # noqa: E402
from .soul_settings import SoulArguments  # noqa: E402
from .trainer import UnlearnTrainer  # noqa: E402


__all__ = [
    "HessianCallback",
    "Sophia",
    "Soul",
    "SoulArguments",
    "UnlearnConfig",
    "UnlearnTrainer",
    "UnlearningStoppingCallback",
    "UntilForgottenCallback",
    "estimate_hessian",
    "gold_forget_loss",
    "register",
    "unlearn",
]


def __getattr__(name: str):
    # It trains, evaluates and reports, with packages that are built on this one: they are imported when it is used.
    if name == "unlearn":
        from importlib import import_module

        return import_module("soul_recipes.request").unlearn
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
