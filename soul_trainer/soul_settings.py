"""Settings of the optimizer and its Hessian, for any `TrainingArguments`. Each is documented once, in its `help`."""

from dataclasses import dataclass, fields
from typing import get_args, get_type_hints

import torch

from .optim import SCALINGS, Soul
from .settings import Count, CountFromZero, Decay, Positive, check_choice, check_ranges, setting


SOUL_NAMES = ("soul", "sophia")
HESSIAN_ESTIMATORS = ("gauss_newton_bartlett", "empirical_fisher", "hutchinson")
HESSIAN_DATA = ("retain", "forget", "both", "training")


# What settings are where they are left open, by rule. Once, true labels and a little smoothing give the steadiest
# Hessian at a fixed small cost; Sophia's are the published ones.
_PUBLISHED = {
    "two_directions": False,
    "scaling": "none",
    "hessian_interval": 10,
    "hessian_estimator": "gauss_newton_bartlett",
    "hessian_label_smoothing": 0.0,
    "rho": 0.04,
    "eps": 1e-15,
}
_ONCE = {
    "two_directions": True,
    "scaling": "tensor",
    "hessian_interval": 0,
    "hessian_estimator": "empirical_fisher",
    "hessian_label_smoothing": 0.1,
}
RULE_DEFAULTS = {"sophia": _PUBLISHED, "none": _ONCE, "diagonal": _ONCE, "kronecker": _ONCE}


@dataclass
class SoulArguments:
    """
    Settings of [`Soul`] and of its Hessian. They are fields of [`UnlearnConfig`] and, for any `TrainingArguments`, the
    keys of `optim_args="rho=0.04,hessian_interval=10"`, where the prefix `hessian_` may be left out. Those that are
    `None` depend on the rule: see [`SoulArguments.resolved`].
    """

    rule: str | None = setting(
        None,
        "How curvature shapes a step: diagonal, kronecker or none (two directions, of the forget and of the retain "
        "gradient), or sophia, the published rule. By default kronecker for small models, up to some 20 million "
        "weights, and diagonal for others; where optim or rho says so, sophia.",
    )
    two_directions: bool | None = setting(
        None,
        "Whether the forget and the retain gradient have a momentum each, brought to one size; by default yes, but "
        "with the rule sophia.",
    )
    scaling: str | None = setting(
        None,
        f"How long a step is: {', '.join(SCALINGS)}; by default tensor, or trust_region with retain_loss=curvature.",
    )
    damping: Positive = setting(0.1, "Added to the Hessian, as a share of its mean, > 0; not in the rule sophia.")
    rho: Positive | None = setting(
        None, "Sophia's curvature scale (rho), > 0, by default 0.04; it must fit the scale of the Hessian."
    )
    beta1: Decay = setting(0.9, "Decay of the momenta (beta1), in [0, 1). `adam_beta1` is AdamW's.")
    beta2: Decay = setting(0.95, "Decay of the Hessian per refresh (beta2), in [0, 1).")
    eps: Positive | None = setting(None, "Sophia's epsilon in the denominator, > 0, by default 1e-15.")
    bias_correction: bool = setting(True, "Whether the Hessian's start-up bias is corrected (SophiaG does not).")
    state_dtype: str = setting("float32", "Of the momenta: float32 or, for half the memory, bfloat16.")
    hessian_interval: CountFromZero | None = setting(
        None,
        "Optimizer steps between two refreshes of the Hessian; 0 refreshes once, before the first step. By default 0, "
        "with the rule sophia 10.",
    )
    hessian_estimator: str | None = setting(
        None,
        f"Estimator of the Hessian's diagonal: {', '.join(HESSIAN_ESTIMATORS)}. By default empirical_fisher with "
        "label smoothing 0.1, and with the rule sophia gauss_newton_bartlett.",
    )
    hessian_data: str = setting(
        "retain",
        "Rows whose Hessian is estimated: retain, forget, both, or training: the training gradient itself is squared, "
        "at no cost, as the released SOUL code does (with the estimator empirical_fisher).",
    )
    hessian_batch_size: Count = setting(32, "Rows of one estimate, over all processes.")
    hessian_rows: Count | None = setting(
        None,
        "With hessian_interval=0, or the rule kronecker: rows that are visited, in estimates of hessian_batch_size; "
        "all if unset.",
    )
    hessian_label_smoothing: Decay | None = setting(
        None, "Label smoothing of the estimator empirical_fisher, in [0, 1)."
    )
    curvature: str | None = setting(
        None, "File of curvature that `python -m soul_trainer.curvature` measured once, in the place of an estimate."
    )
    curvature_rank: Count | None = setting(
        None, "With the rule kronecker: eigenvectors that are kept of each factor, >= 1; all if unset."
    )

    def resolved(self) -> "SoulArguments":
        """The settings with nothing left open."""
        values = {setting.name: getattr(self, setting.name) for setting in fields(SoulArguments)}
        values["rule"] = self.rule or self.default_rule
        check_choice("rule", values["rule"], RULE_DEFAULTS)
        defaults = self.rule_defaults(values["rule"])
        if values["hessian_estimator"] not in (None, defaults["hessian_estimator"]):
            defaults["hessian_label_smoothing"] = 0.0
        for name, value in defaults.items():
            values[name] = value if values[name] is None else values[name]
        return SoulArguments(**values)

    @property
    def default_rule(self) -> str:
        """The rule where none is named."""
        return "sophia"

    def rule_defaults(self, rule: str) -> dict:
        """Settings that are left open, for a rule; a plain Trainer has one gradient, of no halves."""
        return {**RULE_DEFAULTS[rule], "two_directions": False}

    def check(self) -> None:
        """Raises a `ValueError` that names the first setting that is out of its range."""
        settings = self.resolved()
        check_ranges(settings)
        check_choice("scaling", settings.scaling, SCALINGS)
        check_choice("state_dtype", settings.state_dtype, ("float32", "bfloat16"))
        check_choice("hessian_estimator", settings.hessian_estimator, HESSIAN_ESTIMATORS)
        check_choice("hessian_data", settings.hessian_data, HESSIAN_DATA)
        smoothing = settings.hessian_label_smoothing
        if smoothing and settings.hessian_estimator != "empirical_fisher":
            raise ValueError("`hessian_label_smoothing` needs `hessian_estimator='empirical_fisher'` (true labels).")
        if settings.hessian_data == "training" and (
            settings.hessian_estimator != "empirical_fisher" or not settings.hessian_interval or smoothing
        ):
            raise ValueError(
                "`hessian_data='training'` squares the training gradient: it needs "
                "`hessian_estimator='empirical_fisher'`, `hessian_interval` >= 1 and no label smoothing."
            )
        for name in ("rho", "eps"):
            if settings.rule != "sophia" and getattr(self, name) is not None:
                raise ValueError(f"`{name}` is Sophia's, and `rule` is {settings.rule!r}: set `rule='sophia'`.")
        if settings.rule == "kronecker" and (
            settings.hessian_estimator == "hutchinson" or settings.hessian_data == "training"
        ):
            raise ValueError(
                "`rule='kronecker'` squares gradients of layers in passes of its own: set `hessian_estimator` to "
                "empirical_fisher or gauss_newton_bartlett and `hessian_data` to retain, forget or both, or `rule`."
            )
        if settings.curvature and settings.rule not in ("diagonal", "kronecker"):
            raise ValueError(
                f"`curvature` names a file for the rules diagonal and kronecker, and `rule` is {settings.rule!r}."
            )
        Soul([torch.zeros(())], **settings.optimizer_kwargs())

    def optimizer_kwargs(self) -> dict:
        """The arguments of [`Soul`] but the learning rate; it refreshes itself if no callback is to do it."""
        settings = self.resolved()
        own = {
            "betas": (settings.beta1, settings.beta2),
            "bias_correction": settings.bias_correction,
            "hessian_interval": settings.hessian_interval or None,
            "state_dtype": getattr(torch, settings.state_dtype),
        }
        if settings.rule == "sophia":
            own |= {"rho": settings.rho, "eps": settings.eps}
            if settings.scaling == "none" and not settings.two_directions:
                return own  # of Sophia
        names = ("rule", "scaling", "two_directions", "damping")
        return own | {name: getattr(settings, name) for name in names}


def parse_optim_args(optim_args: str | dict | None) -> dict:
    """
    Reads `optim_args` as settings of [`SoulArguments`].

    Args:
        optim_args (`str` or `dict`, *optional*): `"key=value,key=value"`, or the pairs.

    Returns:
        `dict`: Field names to values of the fields' types.

    Raises:
        ValueError: If a key is unknown or a value malformed; the known keys are listed.
    """
    # A setting that may be left open has another type beside None.
    known = {name: (get_args(kind) or (kind,))[0] for name, kind in get_type_hints(SoulArguments).items()}
    if not isinstance(optim_args, dict):
        pairs = [pair for pair in (optim_args or "").replace(" ", "").split(",") if pair]
        optim_args = [pair.partition("=")[::2] for pair in pairs]
    else:
        optim_args = list(optim_args.items())
    parsed = {}
    for key, value in optim_args:
        name = key if key in known else f"hessian_{key}"
        if name not in known:
            raise ValueError(f"Unknown key {key!r} in `optim_args`; SOUL knows {', '.join(known)}.")
        if name in parsed:
            raise ValueError(f"`optim_args` names {name!r} twice: {optim_args}.")
        try:
            parsed[name] = (
                {"true": True, "false": False}[str(value).lower()] if known[name] is bool else known[name](value)
            )
        except (KeyError, ValueError):
            raise ValueError(
                f"`optim_args` has {key}={value!r}, which is no {known[name].__name__}; SOUL's keys are "
                f"{', '.join(known)}."
            ) from None
    return parsed
