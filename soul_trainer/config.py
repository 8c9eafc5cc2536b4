"""Settings. Each field is documented once, in its `help`, which the command line shows."""

from dataclasses import dataclass, field, fields

from transformers import TrainingArguments

from .objectives import FORGET_LOSSES, RETAIN_LOSSES, RETAIN_WEIGHT_SCHEDULES


SOPHIA_NAMES = ("soul", "sophia")
HESSIAN_ESTIMATORS = ("gauss_newton_bartlett", "empirical_fisher", "hutchinson")
HESSIAN_DATA = ("retain", "forget", "both", "training")


def _setting(default, help: str):
    return field(default=default, metadata={"help": help})


def check_choice(name: str, value: str, known: tuple[str, ...] | dict) -> None:
    """Raises a `ValueError` that lists the known values unless `value` is one of them."""
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(known)}, but it is {value!r}.")


@dataclass
class SophiaArguments:
    """
    Settings of [`Sophia`] and of its Hessian. They are fields of [`UnlearnConfig`] and, for any `TrainingArguments`,
    the keys of `optim_args="rho=0.04,hessian_interval=10"`, where the prefix `hessian_` may be left out.
    """

    rho: float = _setting(0.04, "Sophia's curvature scale (rho), > 0; it must fit the scale of the Hessian.")
    beta1: float = _setting(0.9, "Sophia's decay of the momentum (beta1), in [0, 1). `adam_beta1` is AdamW's.")
    beta2: float = _setting(0.95, "Sophia's decay of the Hessian per refresh (beta2), in [0, 1).")
    eps: float = _setting(1e-15, "Sophia's epsilon in the denominator, > 0.")
    bias_correction: bool = _setting(True, "Whether the Hessian's start-up bias is corrected (SophiaG does not).")
    hessian_interval: int = _setting(
        10, "Optimizer steps between two refreshes of the Hessian; 0 refreshes once, before the first step."
    )
    hessian_estimator: str = _setting(
        "gauss_newton_bartlett", f"Estimator of the Hessian's diagonal: {', '.join(HESSIAN_ESTIMATORS)}."
    )
    hessian_data: str = _setting(
        "retain",
        "Rows whose Hessian is estimated: retain, forget, both, or training: the training gradient itself is squared, "
        "at no cost, as the released SOUL code does (with the estimator empirical_fisher).",
    )
    hessian_batch_size: int = _setting(32, "Rows of one estimate, over all processes.")
    hessian_rows: int | None = _setting(
        None,
        "With hessian_interval=0: rows that are visited, averaging estimates of hessian_batch_size; all if unset.",
    )
    hessian_label_smoothing: float = _setting(0.0, "Label smoothing of the estimator empirical_fisher, in [0, 1).")

    def check(self) -> None:
        """Raises a `ValueError` that names the first setting that is out of its range."""
        check_choice("hessian_estimator", self.hessian_estimator, HESSIAN_ESTIMATORS)
        check_choice("hessian_data", self.hessian_data, HESSIAN_DATA)
        for name, least in (("hessian_interval", 0), ("hessian_batch_size", 1), ("hessian_rows", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, but it is {getattr(self, name)}.")
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
class UnlearnConfig(SophiaArguments, TrainingArguments):
    """
    `TrainingArguments` with what unlearning adds. Defaults that differ from `TrainingArguments`: `optim="soul"`,
    `learning_rate=1e-5`, `num_train_epochs=5`, `remove_unused_columns=False`.

    Raises:
        ValueError: If a loss, a schedule or an estimator is unknown (the known ones are listed), or a number is out of
            its range.
    """

    optim: str = _setting("soul", "The optimizer: soul (alias sophia), or any that transformers knows.")
    learning_rate: float = _setting(1e-5, "Peak learning rate.")
    num_train_epochs: float = _setting(5, "Passes over the forget rows.")
    remove_unused_columns: bool = _setting(False, "Kept False: rows carry more than the model's arguments.")

    forget_loss: str = _setting("npo", f"Loss on the rows to forget: {', '.join(FORGET_LOSSES)}.")
    retain_loss: str = _setting("nll", f"Loss on the rows to retain: {', '.join(RETAIN_LOSSES)}.")
    forget_weight: float = _setting(1.0, "Weight of the forget loss, >= 0.")
    retain_weight: float = _setting(1.0, "Weight of the retain loss, >= 0 (gamma in SOUL's code).")
    retain_weight_schedule: str = _setting(
        "constant", f"How the retain weight grows to its value: {', '.join(RETAIN_WEIGHT_SCHEDULES)}."
    )
    npo_beta: float = _setting(0.1, "Inverse temperature of NPO (beta), > 0; gradient ascent is its limit at 0.")
    l1_weight: float = _setting(0.0, "Weight of the sum of absolute weights, >= 0 (alpha of l1-sparse).")
    max_length: int | None = _setting(None, "Longest row in tokens; by default as long as the model takes.")
    prompt_template: str | None = _setting(
        None, "Template of question/answer rows, with {question} and, at its end, {answer}; by default the chat's."
    )
    refusal_answers: str | None = _setting(None, "Text file with one refusal a line, for forget_loss=refusal.")
    overwrite: bool = _setting(False, "Whether to overwrite a finished run in output_dir.")

    def __post_init__(self):
        if self.optim in SOPHIA_NAMES:
            for name, value in parse_optim_args(self.optim_args).items():
                setattr(self, name, value)
        super().__post_init__()
        self.check()
        check_choice("forget_loss", self.forget_loss, FORGET_LOSSES)
        check_choice("retain_loss", self.retain_loss, RETAIN_LOSSES)
        check_choice("retain_weight_schedule", self.retain_weight_schedule, RETAIN_WEIGHT_SCHEDULES)
        for name in ("forget_weight", "retain_weight", "l1_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be >= 0, but it is {getattr(self, name)}.")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, but it is {self.max_length}.")
        if self.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` has no meaning for unlearning objectives: leave it at 0.")
        if self.npo_beta <= 0:
            raise ValueError(f"`npo_beta` must be > 0, but it is {self.npo_beta}.")
        if self.forget_loss == "none" and self.retain_loss == "none":
            raise ValueError("`forget_loss` and `retain_loss` are both 'none': there is nothing to train on.")
        self.remove_unused_columns = False

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments) -> "UnlearnConfig":
        """An [`UnlearnConfig`] with the values of `args`, and the defaults for what unlearning adds."""
        if isinstance(args, cls):
            return args
        known = [setting.name for setting in fields(TrainingArguments) if setting.init]
        return cls(**{name: getattr(args, name) for name in known})
