"""Settings. Each field is documented once, in its `help`, which the command line shows."""

from dataclasses import dataclass, fields
from typing import get_args

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from .objectives import FORGET_LOSSES, RETAIN_LOSSES
from .optim import SCALINGS, Soul
from .settings import ObjectiveArguments, StepArguments, check_at_least, check_choice, setting
from .weighting import RETAIN_WEIGHT_SCHEDULES


SOUL_NAMES = ("soul", "sophia")
# The retain loss that is none: what is to be kept is kept by its curvature.
CURVATURE = "curvature"
HESSIAN_ESTIMATORS = ("gauss_newton_bartlett", "empirical_fisher", "hutchinson")
HESSIAN_DATA = ("retain", "forget", "both", "training")
REFERENCES = ("auto", "cached_topk")

PUBLISHED_LEARNING_RATE = 1e-5
# What a layer says changes as much at any width by an update in inverse proportion to it. Curvature holds back the
# directions in which a step goes furthest, so that steps are longer with it.
STEP_BY_WIDTH = {"none": 0.067, "diagonal": 0.12, "kronecker": 0.12, "sophia": 0.067}
TRUST_REGION_STEP = 3e-4

# What settings are where they are left open, by rule. Once, true labels and a little smoothing give the steadiest
# Hessian at a fixed small cost; Sophia's are the published ones.
_PUBLISHED = {
    "two_directions": False,
    "scaling": "none",
    "hessian_interval": 10,
    "hessian_estimator": "gauss_newton_bartlett",
    "hessian_label_smoothing": 0.0,
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
        "gradient), or sophia, the published rule. By default diagonal; where optim or rho says so, sophia.",
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
    damping: float = setting(0.1, "Added to the Hessian, as a share of its mean, > 0; not in the rule sophia.")
    rho: float = setting(0.04, "Sophia's curvature scale (rho), > 0; it must fit the scale of the Hessian.")
    beta1: float = setting(0.9, "Decay of the momenta (beta1), in [0, 1). `adam_beta1` is AdamW's.")
    beta2: float = setting(0.95, "Decay of the Hessian per refresh (beta2), in [0, 1).")
    eps: float = setting(1e-15, "Sophia's epsilon in the denominator, > 0.")
    bias_correction: bool = setting(True, "Whether the Hessian's start-up bias is corrected (SophiaG does not).")
    state_dtype: str = setting("float32", "Of momenta and Hessian: float32 or, for half the memory, bfloat16.")
    hessian_interval: int | None = setting(
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
    hessian_batch_size: int = setting(32, "Rows of one estimate, over all processes.")
    hessian_rows: int | None = setting(
        None,
        "With hessian_interval=0: rows that are visited, averaging estimates of hessian_batch_size; all if unset.",
    )
    hessian_label_smoothing: float | None = setting(
        None, "Label smoothing of the estimator empirical_fisher, in [0, 1)."
    )
    curvature: str | None = setting(
        None, "File of curvature that `python -m soul_trainer.curvature` measured once, in the place of an estimate."
    )
    curvature_rank: int | None = setting(
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
        check_choice("scaling", settings.scaling, SCALINGS)
        check_choice("state_dtype", settings.state_dtype, ("float32", "bfloat16"))
        check_choice("hessian_estimator", settings.hessian_estimator, HESSIAN_ESTIMATORS)
        check_choice("hessian_data", settings.hessian_data, HESSIAN_DATA)
        check_at_least(0, hessian_interval=settings.hessian_interval)
        check_at_least(
            1,
            hessian_batch_size=settings.hessian_batch_size,
            hessian_rows=settings.hessian_rows,
            curvature_rank=settings.curvature_rank,
        )
        smoothing = settings.hessian_label_smoothing
        if not 0 <= smoothing < 1:
            raise ValueError(f"`hessian_label_smoothing` must be in [0, 1), but it is {smoothing}.")
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
            if settings.rule != "sophia" and getattr(settings, name) != getattr(SoulArguments, name):
                raise ValueError(f"`{name}` is Sophia's, and `rule` is {settings.rule!r}: set `rule='sophia'`.")
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
            "rho": settings.rho,
            "eps": settings.eps,
            "bias_correction": settings.bias_correction,
            "hessian_interval": settings.hessian_interval or None,
            "state_dtype": getattr(torch, settings.state_dtype),
        }
        if settings.rule == "sophia" and settings.scaling == "none" and not settings.two_directions:
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
    known = {setting.name: (get_args(setting.type) or (setting.type,))[0] for setting in fields(SoulArguments)}
    if not isinstance(optim_args, dict):
        pairs = [pair for pair in (optim_args or "").replace(" ", "").split(",") if pair]
        optim_args = dict(pair.partition("=")[::2] for pair in pairs)
    parsed = {}
    for key, value in optim_args.items():
        name = key if key in known else f"hessian_{key}"
        if name not in known:
            raise ValueError(f"Unknown key {key!r} in `optim_args`; SOUL knows {', '.join(known)}.")
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


@dataclass
class UnlearnConfig(ObjectiveArguments, StepArguments, SoulArguments, TrainingArguments):
    """
    `TrainingArguments` with what unlearning adds. Defaults that differ from `TrainingArguments`: `optim="soul"`,
    `learning_rate=None`, which [`UnlearnTrainer`] fills in, `num_train_epochs=5`, `remove_unused_columns=False`.

    Raises:
        ValueError: If a loss, a schedule or an estimator is unknown (the known ones are listed), or a number is out of
            its range.
    """

    optim: str = setting(
        "soul", "The optimizer: soul, sophia (soul with rule=sophia), or any that transformers knows."
    )
    learning_rate: float | None = setting(
        None,
        f"Peak learning rate. By default {STEP_BY_WIDTH['diagonal']} over the model's width in two directions "
        f"({STEP_BY_WIDTH['none']} without curvature), {TRUST_REGION_STEP} in a trust region, and "
        f"{PUBLISHED_LEARNING_RATE} for any other optimizer or rule.",
    )
    num_train_epochs: float = setting(5, "Passes over the forget rows.")
    remove_unused_columns: bool = setting(False, "Kept False: rows carry more than the model's arguments.")

    forget_loss: str = setting("npo", f"Loss on the rows to forget: {', '.join(FORGET_LOSSES)}.")
    retain_loss: str = setting("nll", f"Loss on the rows to retain: {', '.join(RETAIN_LOSSES)}.")
    forget_weight: float = setting(1.0, "Weight of the forget loss, >= 0.")
    retain_weight: float = setting(1.0, "Weight of the retain loss, >= 0 (gamma in SOUL's code).")
    retain_weight_schedule: str = setting(
        "constant", f"How the retain weight grows to its value: {', '.join(RETAIN_WEIGHT_SCHEDULES)}."
    )
    retain_loss_limit: float = setting(
        0.0, "With primal_dual: the retain loss that is allowed, in nats a token (epsilon of PDU), >= 0."
    )
    dual_step_size: float = setting(1.0, "With primal_dual: step of the weight per optimizer step, >= 0.")
    dual_warmup_epochs: float = setting(0.0, "With primal_dual: epochs before the weight moves, >= 0.")
    l1_weight: float = setting(0.0, "Weight of the sum of absolute weights, >= 0 (alpha of l1-sparse).")
    trainable_parameters: str | None = setting(
        None,
        "Regular expression that is searched in parameters' names: the others are frozen. By default all are trained; "
        "with forget_loss=rmu, the down projections of rmu_layer and the two before it.",
    )
    frozen_parameters: str | None = setting(None, "Regular expression: parameters whose names have it are frozen.")
    reference: str = setting(
        "auto",
        "The model before unlearning, for losses that need its distributions: auto (the adapter switched off, else a "
        "copy of the weights that are trained) or cached_topk (its most probable tokens, kept on disk).",
    )
    reference_topk: int = setting(64, "With cached_topk: tokens that are kept at each position, >= 1.")
    max_length: int | None = setting(None, "Longest row in tokens; by default as long as the model takes.")
    prompt_template: str | None = setting(
        None, "Template of question/answer rows, with {question} and, at its end, {answer}; by default the chat's."
    )
    refusal_answers: str | None = setting(None, "Text file with one refusal a line, for forget_loss=refusal or dpo.")
    overwrite: bool = setting(False, "Whether to overwrite a finished run in output_dir.")

    @property
    def default_rule(self) -> str:
        """
        The rule where none is named: the best by the evidence of docs/study.md, or the published one, where its name
        or one of its settings is.
        """
        names_sophia = self.optim == "sophia" or any(
            getattr(self, name) != getattr(SoulArguments, name) for name in ("rho", "eps")
        )
        return "sophia" if names_sophia else "diagonal"

    def rule_defaults(self, rule: str) -> dict:
        """Settings that are left open, for a rule: one direction where one half alone has a gradient."""
        defaults = dict(RULE_DEFAULTS[rule])
        if self.forget_loss == "none" or self.retain_loss in ("none", CURVATURE):
            defaults["two_directions"] = False
        if self.retain_loss == CURVATURE and rule != "sophia":
            defaults["scaling"] = "trust_region"
        return defaults

    def fill_learning_rate(self, width: int) -> None:
        """Sets `learning_rate`, if it is open, for a model of a width."""
        if self.learning_rate is not None:
            return
        settings = self.resolved()
        scaling = settings.scaling if self.optim in SOUL_NAMES else "none"
        rates = {"tensor": STEP_BY_WIDTH[settings.rule] / width, "trust_region": TRUST_REGION_STEP}
        self.learning_rate = rates.get(scaling, PUBLISHED_LEARNING_RATE)

    def __post_init__(self):
        if self.optim in SOUL_NAMES:
            for name, value in parse_optim_args(self.optim_args).items():
                setattr(self, name, value)
        super().__post_init__()
        self.check()
        self.remove_unused_columns = False

    def check(self) -> None:
        """Raises a `ValueError` that names the first setting of unlearning that is out of its range."""
        super().check()
        check_choice("forget_loss", self.forget_loss, FORGET_LOSSES)
        check_choice("retain_loss", self.retain_loss, RETAIN_LOSSES)
        check_choice("retain_weight_schedule", self.retain_weight_schedule, RETAIN_WEIGHT_SCHEDULES)
        check_choice("reference", self.reference, REFERENCES)
        self.check_objectives()
        self.check_steps()
        for name in (
            *("forget_weight", "retain_weight", "l1_weight"),
            *("retain_loss_limit", "dual_step_size", "dual_warmup_epochs"),
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be >= 0, but it is {getattr(self, name)}.")
        check_at_least(1, max_length=self.max_length, reference_topk=self.reference_topk)
        if self.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` has no meaning for unlearning objectives: leave it at 0.")
        if self.forget_loss == "none" and self.retain_loss == "none":
            raise ValueError("`forget_loss` and `retain_loss` are both 'none': there is nothing to train on.")
        if self.forget_loss == "task_vector" and self.retain_loss == "nll":
            raise ValueError(
                "`forget_loss='task_vector'` takes back all that is learnt, and `retain_loss='nll'` would learn the "
                "rows to retain: choose none, or kl or activations, which hold them where they are."
            )
        if self.forget_loss == "task_vector" and self.push_to_hub and self.hub_strategy != HubStrategy.END:
            raise ValueError(
                f"`hub_strategy={self.hub_strategy.value!r}` would publish checkpoints, which have learnt what is to "
                "be forgotten until `forget_loss='task_vector'` takes it back: set it to 'end'."
            )
        self._check_halves()
        if self.retain_weight_schedule == "primal_dual" and self.retain_loss == "none":
            raise ValueError(
                "`retain_weight_schedule='primal_dual'` weighs a retain loss, and `retain_loss` is 'none'."
            )
        if self.sam_radius and (self.forget_loss == "none" or self.l1_weight):
            raise ValueError(
                "`sam_radius` takes the gradient of a forget loss beside the weights, and that of a retain loss at "
                "them: it needs a `forget_loss`, and no `l1_weight`, which is neither."
            )

    def _check_halves(self) -> None:
        is_soul = self.optim in SOUL_NAMES
        settings = self.resolved()
        is_forget_only = self.retain_loss in ("none", CURVATURE)
        if self.optim == "sophia" and settings.rule != "sophia":
            raise ValueError(f"`optim='sophia'` is the rule sophia, and `rule` is {self.rule!r}: set `optim='soul'`.")
        if self.retain_loss == CURVATURE and not (is_soul and settings.scaling == "trust_region"):
            raise ValueError(
                "`retain_loss='curvature'` keeps what is to be kept by a trust region of the optimizer: it needs "
                "`optim='soul'` with a rule other than sophia, and `scaling='trust_region'`."
            )
        if not is_soul and self.two_directions:
            raise ValueError(f"`two_directions` is of `optim='soul'`, and `optim` is {self.optim!r}.")
        if self.retain_loss == CURVATURE and self.retain_weight != 1.0:
            raise ValueError(
                f"`retain_weight`={self.retain_weight} weighs a retain loss, and `retain_loss='curvature'` has none: "
                "change `learning_rate`."
            )
        if is_soul and settings.two_directions and (is_forget_only or self.forget_loss == "none"):
            raise ValueError(
                f"`two_directions` needs rows of both halves in each step: `forget_loss` is {self.forget_loss!r} and "
                f"`retain_loss` is {self.retain_loss!r}."
            )
        if is_soul and settings.scaling != "none" and not settings.two_directions and is_forget_only:
            if self.forget_weight != 1.0:
                raise ValueError(
                    f"`forget_weight`={self.forget_weight} has no effect where the one gradient is brought to a fixed "
                    "size: change `learning_rate`."
                )

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments) -> "UnlearnConfig":
        """An [`UnlearnConfig`] with the values of `args`, and the defaults for what unlearning adds."""
        if isinstance(args, cls):
            return args
        known = [setting.name for setting in fields(TrainingArguments) if setting.init]
        return cls(**{name: getattr(args, name) for name in known})
