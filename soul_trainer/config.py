"""Settings. Each field is documented once, in its `help`, which the command line shows."""

import math
from copy import copy
from dataclasses import dataclass, fields
from typing import Annotated

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from .machine import fit_to_machine
from .objectives import FORGET_LOSSES, RETAIN_LOSSES
from .precision import needs_use_cpu
from .settings import (
    WEIGHT_MASKS,
    Count,
    CountFromZero,
    Decay,
    NotNegative,
    ObjectiveArguments,
    Positive,
    Range,
    Seed,
    StepArguments,
    check_choice,
    check_ranges,
    setting,
)
from .soul_settings import RULE_DEFAULTS, SOUL_NAMES, SoulArguments, parse_optim_args
from .weighting import RETAIN_WEIGHT_SCHEDULES


# Settings of TrainingArguments, which takes any number.
INHERITED = {
    "weight_decay": NotNegative,
    "max_grad_norm": NotNegative,
    "adam_beta1": Decay,
    "adam_beta2": Decay,
    "adam_epsilon": NotNegative,
    "per_device_train_batch_size": Count,
    "per_device_eval_batch_size": Count,
    "gradient_accumulation_steps": Count,
    "max_steps": Annotated[int, Range(least=-1)],
    "warmup_steps": NotNegative,
    "logging_steps": Positive,
    "save_steps": Positive,
    "eval_steps": Positive | None,
    "eval_delay": NotNegative | None,
    "eval_accumulation_steps": Count | None,
    "save_total_limit": Count | None,
    "neftune_noise_alpha": NotNegative | None,
    "dataloader_num_workers": CountFromZero,
    "seed": Seed,
    "data_seed": Seed | None,
}
# The retain loss that is none: what is to be kept is kept by its curvature.
CURVATURE = "curvature"
REFERENCES = ("auto", "cached_topk")
PUBLISHED_LEARNING_RATE = 1e-5
# An update in inverse proportion to the width changes as much of what a layer says at any width, and one in inverse
# proportion to the root of the number of layers as much of what the model says at any depth (Yang et al., 2023, arXiv
# 2310.02244). Curvature holds back the directions in which a step goes furthest, so that steps are longer with it.
STEP_BY_WIDTH = {"none": 0.067, "diagonal": 0.12, "kronecker": 0.12, "sophia": 0.067}
LAYERS_OF_STEP = 2  # of the models on which they were found
TRUST_REGION_STEP = 3e-4
# Adapters begin at nothing, and are of low rank. AdamW is as fast with ten times the rate, as is common practice; in
# two directions, adapters on queries and values get below 0.2 in 60 steps with twelve times, for which a model of 30
# layers needs no smaller steps than one of two: docs/methods.md.
LORA_LEARNING_RATE, LORA_STEPS = 1e-4, 12
# With Kronecker curvature, a whole step of the retain direction costs more of what is held out than it keeps. With the
# others, less than a whole step keeps less: docs/study.md.
RETAIN_STEP = {"none": 1.0, "diagonal": 1.0, "kronecker": 0.7, "sophia": 1.0}
# Kronecker curvature keeps about five numbers a weight of a linear layer, and far more of an adapter's. Beyond these,
# 0.4 GB, finding the bases takes minutes on a CPU, and a step of few rows spends more on them than on the model.
KRONECKER_NUMBERS = 100_000_000


@dataclass
class UnlearnConfig(ObjectiveArguments, StepArguments, SoulArguments, TrainingArguments):
    """
    `TrainingArguments` with what unlearning adds. Defaults that differ from `TrainingArguments`: `optim="soul"`,
    `learning_rate=None`, which [`UnlearnTrainer`] fills in as it does `retain_weight`, `num_train_epochs=5`,
    `hub_strategy="end"`, `remove_unused_columns=False`.

    Raises:
        ValueError: If a loss, a schedule or an estimator is unknown (the known ones are listed), or a number is out of
            its range.
    """

    optim: str = setting(
        "soul", "The optimizer: soul, sophia (soul with rule=sophia), or any that transformers knows."
    )
    learning_rate: NotNegative | None = setting(
        None,
        f"Peak learning rate. By default {STEP_BY_WIDTH['diagonal']} over the model's width "
        f"({STEP_BY_WIDTH['none']} without curvature) times the root of {LAYERS_OF_STEP} over its number of layers in "
        f"two directions, {TRUST_REGION_STEP} in a trust region, and "
        f"{PUBLISHED_LEARNING_RATE} for any other optimizer or rule. With LoRA, {LORA_STEPS} times as much in two "
        "directions, whatever the number of layers (for q_proj and v_proj with lora_alpha=32; less for more adapters "
        f"and for a larger alpha), and {LORA_LEARNING_RATE} for any other optimizer or rule.",
    )
    num_train_epochs: NotNegative = setting(5, "Passes over the forget rows.")
    remove_unused_columns: bool = setting(False, "Kept False: rows carry more than the model's arguments.")
    # No `bool | None`, of which transformers' parser would not take a bare `--bf16`.
    bf16: bool = setting(
        None,
        "Whether to train under bfloat16 autocast. By default yes for a model in 16 bits on a device that multiplies "
        "in bfloat16 (a GPU, or a CPU with AMX), else no. A true in a settings file holds on such devices alone.",
    )
    float32_weights: bool | None = setting(
        None,
        "Whether weights in 16 bits are kept in float32 while they are trained, so that small steps are not lost; the "
        "model is saved in 16 bits. By default yes, but under DeepSpeed, which keeps float32 weights of its own, and "
        "for models that are quantized, or sharded while they are loaded.",
    )

    hub_strategy: str = setting("end", "Kept end: what is pushed earlier still knows what is to be forgotten.")

    forget_loss: str = setting("npo", f"Loss on the rows to forget: {', '.join(FORGET_LOSSES)}.")
    retain_loss: str = setting("nll", f"Loss on the rows to retain: {', '.join(RETAIN_LOSSES)}.")
    forget_weight: NotNegative = setting(1.0, "Weight of the forget loss, >= 0.")
    retain_weight: NotNegative | None = setting(
        None,
        "Weight of the retain loss or, in two directions, of its step, >= 0 (gamma in SOUL's code). By default "
        f"{RETAIN_STEP['kronecker']} in two directions with Kronecker curvature, else 1.",
    )
    retain_weight_schedule: str = setting(
        "constant", f"How the retain weight grows to its value: {', '.join(RETAIN_WEIGHT_SCHEDULES)}."
    )
    retain_loss_limit: NotNegative = setting(
        0.0, "With primal_dual: the retain loss that is allowed, in nats a token (epsilon of PDU), >= 0."
    )
    dual_step_size: NotNegative = setting(1.0, "With primal_dual: step of the weight per optimizer step, >= 0.")
    dual_warmup_epochs: NotNegative = setting(0.0, "With primal_dual: epochs before the weight moves, >= 0.")
    l1_weight: NotNegative = setting(0.0, "Weight of the sum of absolute weights, >= 0 (alpha of l1-sparse).")
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
    reference_topk: Count = setting(64, "With cached_topk: tokens that are kept at each position, >= 1.")
    max_length: Count | None = setting(None, "Longest row in tokens; by default as long as the model takes.")
    prompt_template: str | None = setting(
        None, "Template of question/answer rows, with {question} and, at its end, {answer}; by default the chat's."
    )
    refusal_answers: str | None = setting(None, "Text file with one refusal a line, for forget_loss=refusal or dpo.")
    overwrite: bool = setting(False, "Whether to overwrite a finished run in output_dir.")
    allow_other_run: bool = setting(
        False, "Whether a checkpoint of a run with other settings, rows or another model may be resumed."
    )

    @property
    def default_rule(self) -> str:
        """
        The rule where none is named: by the evidence of docs/study.md or, where its name or one of its settings is,
        the published one. [`UnlearnConfig.fill_rule`] may find that it does not fit the model.
        """
        names_sophia = self.optim == "sophia" or self.rho is not None or self.eps is not None
        if names_sophia or self.hessian_data == "training":
            return "sophia"
        # Two passes over all retain rows are for once, and not for every few steps.
        needs_diagonal = self.hessian_estimator == "hutchinson" or bool(self.hessian_interval)
        return "diagonal" if needs_diagonal else "kronecker"

    def rule_defaults(self, rule: str) -> dict:
        """Settings that are left open, for a rule: one direction where one half alone has a gradient."""
        defaults = dict(RULE_DEFAULTS[rule])
        if self.forget_loss == "none" or self.retain_loss in ("none", CURVATURE):
            defaults["two_directions"] = False
        if self.retain_loss == CURVATURE and rule != "sophia":
            defaults["scaling"] = "trust_region"
        return defaults

    def fill_rule(self, num_numbers: int, shards: bool, has_lora: bool = False) -> None:
        """
        Sets `rule`, if it is open, where Kronecker curvature would not do.

        Args:
            num_numbers (`int`): That it would keep; see [`~curvature.num_kronecker_numbers`].
            shards (`bool`): Whether the engine shards the model, and so each process would keep them whole.
            has_lora (`bool`, *optional*, defaults to `False`):
                Whether LoRA adapters train. Before the first step, one of their two matrices has no gradient, and so
                no curvature. In two directions, a diagonal keeps more there.
        """
        fits = not shards and not self.fp16 and num_numbers <= KRONECKER_NUMBERS
        fits = fits and not (has_lora and self.resolved().two_directions)
        if self.rule is None and self.default_rule == "kronecker" and not fits:
            self.rule = "diagonal"

    def fill_retain_weight(self) -> None:
        """Sets `retain_weight`, if it is open."""
        if self.retain_weight is None:
            settings = self.resolved()
            has_directions = self.optim in SOUL_NAMES and settings.two_directions
            self.retain_weight = RETAIN_STEP[settings.rule] if has_directions else 1.0

    def fill_learning_rate(
        self, width: int | None, num_layers: int | None, adapter_reach: float | None = None
    ) -> None:
        """
        Sets `learning_rate`, if it is open.

        Args:
            width (`int`, *optional*): The model's `hidden_size`, which may be unknown where it is not needed.
            num_layers (`int`, *optional*): Its `num_hidden_layers`, likewise.
            adapter_reach (`float`, *optional*): With LoRA: see [`~lora.adapter_reach`].
        """
        if self.learning_rate is not None:
            return
        settings = self.resolved()
        scaling = settings.scaling if self.optim in SOUL_NAMES else "none"
        if scaling == "tensor" and not (width and num_layers):
            raise ValueError(
                "`learning_rate` is open, and the model's configuration has no `hidden_size` or no "
                "`num_hidden_layers`, on which it depends: set it."
            )
        if adapter_reach:
            length = LORA_STEPS / adapter_reach
        else:
            length = (LAYERS_OF_STEP / (num_layers or LAYERS_OF_STEP)) ** 0.5
        self.learning_rate = {
            "tensor": length * STEP_BY_WIDTH[settings.rule] / (width or 1),
            "trust_region": TRUST_REGION_STEP,
            "none": LORA_LEARNING_RATE if adapter_reach else PUBLISHED_LEARNING_RATE,
        }[scaling]

    def __post_init__(self):
        if self.optim in SOUL_NAMES:
            for name, value in parse_optim_args(self.optim_args).items():
                setattr(self, name, value)
        # Before TrainingArguments computes with them.
        check_ranges(self, INHERITED)
        self.use_cpu = self.use_cpu or needs_use_cpu(self.bf16, self.use_cpu)
        super().__post_init__()
        deepspeed = getattr(getattr(self, "hf_deepspeed_config", None), "config", {})
        if self.learning_rate is None and "scheduler" in deepspeed:
            raise ValueError("A scheduler in DeepSpeed's configuration needs a `learning_rate` of your own: set it.")
        self.check()
        self.remove_unused_columns = False
        fit_to_machine(self)

    def check(self) -> None:
        """Raises a `ValueError` that names the first setting of unlearning that is out of its range."""
        check_ranges(self, INHERITED)
        super().check()
        check_choice("forget_loss", self.forget_loss, FORGET_LOSSES)
        check_choice("retain_loss", self.retain_loss, RETAIN_LOSSES)
        check_choice("retain_weight_schedule", self.retain_weight_schedule, RETAIN_WEIGHT_SCHEDULES)
        check_choice("reference", self.reference, REFERENCES)
        check_choice("weight_mask", self.weight_mask, WEIGHT_MASKS)
        if self.max_steps == 0:
            raise ValueError("`max_steps` must be >= 1, or -1, with which `num_train_epochs` counts, but it is 0.")
        for name, value in (self.lr_scheduler_kwargs or {}).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"`lr_scheduler_kwargs` has {name}={value}, which must be a finite number.")
        if self.max_steps <= 0 and not self.num_train_epochs:
            raise ValueError("`num_train_epochs` must be > 0, or `max_steps` say how many steps there are.")
        if self.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` has no meaning for unlearning objectives: leave it at 0.")
        if self.forget_loss == "none" and self.retain_loss == "none":
            raise ValueError("`forget_loss` and `retain_loss` are both 'none': there is nothing to train on.")
        if self.forget_loss == "task_vector" and self.retain_loss == "nll":
            raise ValueError(
                "`forget_loss='task_vector'` takes back all that is learnt, and `retain_loss='nll'` would learn the "
                "rows to retain: choose none, or kl or activations, which hold them where they are."
            )
        if self.push_to_hub and self.hub_strategy != HubStrategy.END:
            raise ValueError(
                f"`hub_strategy={self.hub_strategy.value!r}` would publish checkpoints, which still know what is to "
                "be forgotten, and the repository's history keeps them: set it to 'end'."
            )
        is_idle = (self.retain_loss == "none" or self.retain_weight == 0) and self.retain_weight_schedule == "constant"
        if self.forget_weight == 0 and is_idle and not self.l1_weight:
            raise ValueError("`forget_weight` and `retain_weight` leave nothing to train on: raise one of them.")
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
        weighs = self.retain_weight not in (None, 1.0) or self.retain_weight_schedule != "constant"
        if self.retain_loss == CURVATURE and weighs:
            raise ValueError(
                f"`retain_weight`={self.retain_weight} and `retain_weight_schedule`={self.retain_weight_schedule!r} "
                "weigh a retain loss, and `retain_loss='curvature'` has none: change `learning_rate`."
            )
        if self.retain_loss == CURVATURE and self.forget_loss == "none":
            raise ValueError("`forget_loss='none'` and `retain_loss='curvature'` leave nothing to train on.")
        if is_soul and settings.two_directions and settings.hessian_data == "training":
            raise ValueError(
                "`hessian_data='training'` squares one training gradient, and in two directions there are two: set it "
                "to retain, or `two_directions` to False."
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
        if not isinstance(args, TrainingArguments):
            raise ValueError(f"`args` is {args!r:.60}: give an `UnlearnConfig`, as `UnlearnConfig(output_dir=...)`.")
        if isinstance(args, cls):
            return copy(args)  # which a trainer fills in for its model
        known = [setting.name for setting in fields(TrainingArguments) if setting.init]
        values = {name: getattr(args, name) for name in known}
        # False is the default there, which says nothing of the model's own precision.
        return cls(**{**values, "bf16": args.bf16 or None})
