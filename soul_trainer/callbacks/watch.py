"""Says while a run goes on that it does nothing, or destroys what it should keep, and which setting to change."""

from collections import deque

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..soul_settings import SOUL_NAMES
from .hessian import HessianCallback


logger = logging.get_logger(__name__)

# A run of fewer steps is over before a learning rate has shown what it does.
FEW_STEPS = 50
# Losses are means of so many steps, because those of one batch differ from those of the next.
WINDOW = 4
# The run is looked at so many times, first when this share of its steps is done: a warm-up moves nothing before.
NUM_LOOKS, FIRST_LOOK = 8, 0.25
# A forget loss that has changed by less than this share of itself stands still.
STANDSTILL = 0.02
# Nats a token: the rows to keep are then less than 0.37 times as probable as they were.
RUNAWAY = 1.0
MOSTLY_CLIPPED = 0.95


class WatchCallback(TrainerCallback):
    """
    Warns once for each of these, on the main process:

    - The run has fewer than 50 steps, or is over before its learning rate has risen.
    - The forget loss stands still. If more than 0.95 of the coordinates are clipped, the warning says so.
    - The retain loss has grown by more than 1 nat a token, with a retain loss that is in nats (`nll` or `kl`).

    Args:
        trainer ([`UnlearnTrainer`]): The trainer that the callback is added to.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._first: dict[str, list[Tensor]] = {}
        self._last: dict[str, deque[Tensor]] = {}
        self._said: set[str] = set()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Counts the steps."""
        self._first, self._last, self._said = {}, {}, set()
        if state.max_steps < FEW_STEPS:
            self._say(
                f"This run has only {state.max_steps} steps. Raise `num_train_epochs` (now {args.num_train_epochs:g}) "
                f"or lower `per_device_train_batch_size` (now {args.per_device_train_batch_size})."
            )

        if (warmup := args.get_warmup_steps(state.max_steps)) >= state.max_steps:
            self._say(
                f"The learning rate rises for {warmup} steps, and this run has {state.max_steps}: it never gets to "
                f"`learning_rate` (now {args.learning_rate:.3g}). Lower `warmup_steps` (now {args.warmup_steps:g})."
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Keeps the step's losses and, a few times a run, compares them with the first ones."""
        for name, value in self.trainer.step_losses.items():
            first = self._first.setdefault(name, [])
            if len(first) < WINDOW:
                first.append(value)
            self._last.setdefault(name, deque(maxlen=WINDOW)).append(value)
        start = max(2 * WINDOW, round(FIRST_LOOK * state.max_steps))
        if state.global_step < start or (state.global_step - start) % max(1, state.max_steps // NUM_LOOKS):
            return
        losses = {name: (self._mean(self._first[name]), self._mean(self._last[name])) for name in self._first}
        if "forget_loss" in losses:
            self._check_forgetting(*losses["forget_loss"], args, state)
        if "retain_loss" in losses and args.retain_loss in ("nll", "kl"):
            self._check_keeping(*losses["retain_loss"], args, state)

    def _check_forgetting(self, before: float, now: float, args: TrainingArguments, state: TrainerState) -> None:
        if "forget" in self._said or abs(now - before) >= STANDSTILL * max(abs(before), 0.1):
            return
        self._said.add("forget")
        advice = f"raise `learning_rate` (now {args.learning_rate:.3g})"
        clipped = self._clipped() if args.optim in SOUL_NAMES and args.resolved().rule == "sophia" else 0.0
        if clipped > MOSTLY_CLIPPED:
            advice += (
                f", or `rho` (now {args.resolved().rho:.3g}), because {clipped:.1%} of the coordinates are clipped "
                "and move by the learning rate alone"
            )
        self._say(
            f"The forget loss stands still: it was {before:.4g} at first and is {now:.4g} after {state.global_step} "
            f"of {state.max_steps} steps. To forget more, {advice}."
        )

    def _check_keeping(self, before: float, now: float, args: TrainingArguments, state: TrainerState) -> None:
        if "retain" in self._said or now - before <= RUNAWAY:
            return
        self._said.add("retain")
        self._say(
            f"The retain loss runs away: it was {before:.4g} at first and is {now:.4g} nats a token after "
            f"{state.global_step} of {state.max_steps} steps. Lower `learning_rate` (now {args.learning_rate:.3g}) or "
            f"raise `retain_weight` (now {args.retain_weight:g})."
        )

    def _clipped(self) -> float:
        callbacks = self.trainer.callback_handler.callbacks
        hessian = next(callback for callback in callbacks if isinstance(callback, HessianCallback))
        return hessian.curvature()["curvature/clipped"]

    def _mean(self, values: "list[Tensor] | deque[Tensor]") -> float:
        return float(self.trainer.engine.sum(sum(values))) / len(values)

    def _say(self, text: str) -> None:
        if self.trainer.is_world_process_zero():
            logger.warning(text)
