"""Settings. Each field is documented once, in its `help`, which the command line shows."""

from dataclasses import dataclass, fields

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from .objectives import FORGET_LOSSES, RETAIN_LOSSES
from .settings import ObjectiveArguments, StepArguments, check_at_least, check_choice, setting
from .weighting import RETAIN_WEIGHT_SCHEDULES


SOPHIA_NAMES = ("soul", "sophia")
HESSIAN_ESTIMATORS = ("gauss_newton_bartlett", "empirical_fisher", "hutchinson")
HESSIAN_DATA = ("retain", "forget", "both", "training")
REFERENCES = ("auto", "cached_topk")


@dataclass
class SophiaArguments:
    """
    Settings of [`Sophia`] and of its Hessian. They are fields of [`UnlearnConfig`] and, for any `TrainingArguments`,
    the keys of `optim_args="rho=0.04,hessian_interval=10"`, where the prefix `hessian_` may be left out.
    """

    rho: float = setting(0.04, "Sophia's curvature scale (rho), > 0; it must fit the scale of the Hessian.")
    beta1: float = setting(0.9, "Sophia's decay of the momentum (beta1), in [0, 1). `adam_beta1` is AdamW's.")
    beta2: float = setting(0.95, "Sophia's decay of the Hessian per refresh (beta2), in [0, 1).")
    eps: float = setting(1e-15, "Sophia's epsilon in the denominator, > 0.")
    bias_correction: bool = setting(True, "Whether the Hessian's start-up bias is corrected (SophiaG does not).")
    hessian_interval: int = setting(
        10, "Optimizer steps between two refreshes of the Hessian; 0 refreshes once, before the first step."
    )
    hessian_estimator: str = setting(
        "gauss_newton_bartlett", f"Estimator of the Hessian's diagonal: {', '.join(HESSIAN_ESTIMATORS)}."
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
    hessian_label_smoothing: float = setting(0.0, "Label smoothing of the estimator empirical_fisher, in [0, 1).")

    def check(self) -> None:
        """Raises a `ValueError` that names the first setting that is out of its range."""
        check_choice("hessian_estimator", self.hessian_estimator, HESSIAN_ESTIMATORS)
        check_choice("hessian_data", self.hessian_data, HESSIAN_DATA)
        check_at_least(0, hessian_interval=self.hessian_interval)
        check_at_least(1, hessian_batch_size=self.hessian_batch_size, hessian_rows=self.hessian_rows)
        if not 0 <= self.hessian_label_smoothing < 1:
            raise ValueError(f"`hessian_label_smoothing` must be in [0, 1), but it is {self.hessian_label_smoothing}.")
        if self.hessian_label_smoothing and self.hessian_estimator != "empirical_fisher":
            raise ValueError("`hessian_label_smoothing` needs `hessian_estimator='empirical_fisher'` (true labels).")
        if self.hessian_data == "training" and (
            self.hessian_estimator != "empirical_fisher" or not self.hessian_interval or self.hessian_label_smoothing
        ):
            raise ValueError(
                "`hessian_data='training'` squares the training gradient: it needs "
                "`hessian_estimator='empirical_fisher'`, `hessian_interval` >= 1 and no label smoothing."
            )

    def optimizer_kwargs(self) -> dict:
        """The arguments of [`Sophia`] but the learning rate; it refreshes itself if no callback is to do it."""
        return {
            "betas": (self.beta1, self.beta2),
            "rho": self.rho,
            "eps": self.eps,
            "bias_correction": self.bias_correction,
            "hessian_interval": self.hessian_interval or None,
        }


def parse_optim_args(optim_args: str | dict | None) -> dict:
    """
    Reads `optim_args` as settings of [`SophiaArguments`].

    Args:
        optim_args (`str` or `dict`, *optional*): `"key=value,key=value"`, or the pairs.

    Returns:
        `dict`: Field names to values of the fields' types.

    Raises:
        ValueError: If a key is unknown or a value malformed; the known keys are listed.
    """
    known = {setting.name: type(setting.default) for setting in fields(SophiaArguments)} | {"hessian_rows": int}
    if not isinstance(optim_args, dict):
        pairs = [pair for pair in (optim_args or "").replace(" ", "").split(",") if pair]
        optim_args = dict(pair.partition("=")[::2] for pair in pairs)
    parsed = {}
    for key, value in optim_args.items():
        name = key if key in known else f"hessian_{key}"
        if name not in known:
            raise ValueError(f"Unknown key {key!r} in `optim_args`; Sophia knows {', '.join(known)}.")
        try:
            parsed[name] = (
                {"true": True, "false": False}[str(value).lower()] if known[name] is bool else known[name](value)
            )
        except (KeyError, ValueError):
            raise ValueError(
                f"`optim_args` has {key}={value!r}, which is no {known[name].__name__}; Sophia's keys are "
                f"{', '.join(known)}."
            ) from None
    return parsed


@dataclass
class UnlearnConfig(ObjectiveArguments, StepArguments, SophiaArguments, TrainingArguments):
    """
    `TrainingArguments` with what unlearning adds. Defaults that differ from `TrainingArguments`: `optim="soul"`,
    `learning_rate=1e-5`, `num_train_epochs=5`, `remove_unused_columns=False`.

    Raises:
        ValueError: If a loss, a schedule or an estimator is unknown (the known ones are listed), or a number is out of
            its range.
    """

    optim: str = setting("soul", "The optimizer: soul (alias sophia), or any that transformers knows.")
    learning_rate: float = setting(1e-5, "Peak learning rate.")
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

    def __post_init__(self):
        if self.optim in SOPHIA_NAMES:
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
        if self.retain_weight_schedule == "primal_dual" and self.retain_loss == "none":
            raise ValueError(
                "`retain_weight_schedule='primal_dual'` weighs a retain loss, and `retain_loss` is 'none'."
            )
        if self.sam_radius and (self.forget_loss == "none" or self.l1_weight):
            raise ValueError(
                "`sam_radius` takes the gradient of a forget loss beside the weights, and that of a retain loss at "
                "them: it needs a `forget_loss`, and no `l1_weight`, which is neither."
            )

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments) -> "UnlearnConfig":
        """An [`UnlearnConfig`] with the values of `args`, and the defaults for what unlearning adds."""
        if isinstance(args, cls):
            return args
        known = [setting.name for setting in fields(TrainingArguments) if setting.init]
        return cls(**{name: getattr(args, name) for name in known})
