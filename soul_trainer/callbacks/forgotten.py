"""Trains until the rows to forget are as improbable as they should be, and within a limit on what that may cost."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..batch import IGNORE_INDEX
from ..config import CURVATURE
from ..engines import KeptWithCheckpoint, rows_per_forward
from ..log_probs import token_log_probs
from ..random_state import forked_rng
from ..reference_rows import RowForward


logger = logging.get_logger(__name__)

# Rows that are asked at each look. More would make the looks cost more than the steps.
MOST_ROWS = 200
_KEPT_WEIGHTS = "until_forgotten-{}.safetensors"


@dataclass(frozen=True)
class ForgettingPoint:
    """
    How far a run is.

    Attributes:
        step (`int`): Optimizer steps so far.
        forget_probability (`float`): Mean probability of the answers to forget, in [0, 1].
        kept_probability (`float`, *optional*): Mean probability of the answers to keep, in [0, 1].
    """

    step: int
    forget_probability: float
    kept_probability: float | None = None


class UntilForgottenCallback(KeptWithCheckpoint, ExportableState):
    """
    Stops training at the first look at which the rows to forget are as improbable as `level` and the rows to keep
    have lost at most `max_utility_loss`. While the rows to forget are at the level and the others have lost more, only
    the retain loss trains, which wins some of it back. If the run ends without such a look, the callback puts the
    weights of the best look back: of those within the limit, the one that has forgotten most.

    A probability here is the mean over rows of the geometric mean of the answer tokens' probabilities, which is the
    `answer_probability` of the evaluation. The looks are logged as `until/forget_probability` and
    `until/kept_probability`.

    Args:
        trainer ([`UnlearnTrainer`]): The trainer that the callback is added to.
        forget (`Sequence[dict]`): Tokenized rows to forget, from [`~formats.prepare`].
        level (`float`, *optional*): Probability in (0, 1) at which the rows count as forgotten.
        like (`Sequence[dict]`, *optional*): Tokenized rows of the same kind that the model never learnt. Their
            probability before training is the level where `level` is not given.
        kept (`Sequence[dict]`, *optional*): Tokenized rows to keep. Rows that training does not see measure the cost
            best. Without any, there is no limit.
        max_utility_loss (`float`, *optional*, defaults to 0.1): The largest share of the kept rows' probability before
            training that a run may lose, in [0, 1].
        every (`int`, *optional*, defaults to 1): Optimizer steps between two looks.

    Raises:
        ValueError: If a number is out of its range, or there are no rows to forget.
    """

    def __init__(
        self,
        trainer: Trainer,
        forget: Sequence[dict],
        level: float | None = None,
        like: Sequence[dict] | None = None,
        kept: Sequence[dict] | None = None,
        max_utility_loss: float = 0.1,
        every: int = 1,
    ):
        if (level is None) == (like is None):
            raise ValueError("Give either `level`, or in `like` rows that the model never learnt.")
        if level is not None and not 0 < level < 1:
            raise ValueError(f"`level` must be a probability between 0 and 1, but it is {level}.")
        if not 0 <= max_utility_loss <= 1:
            raise ValueError(f"`max_utility_loss` must be a share between 0 and 1, but it is {max_utility_loss}.")
        if every < 1:
            raise ValueError(f"`every` must be at least 1 step, but it is {every}.")
        if not len(forget):
            raise ValueError("`forget` has no rows: there is nothing to look at.")
        self.trainer, self.level = trainer, level
        self.forget, self.kept, self.like = spread(forget), spread(kept or ()), spread(like or ())
        self.max_utility_loss, self.every = max_utility_loss, every
        self.start: ForgettingPoint | None = None
        self.best: ForgettingPoint | None = None
        self.last: ForgettingPoint | None = None
        self._weights: list[Tensor] | None = None

    def state(self) -> dict:
        """What a checkpoint keeps besides the weights of the best look."""
        points = {name: None if (point := getattr(self, name)) is None else asdict(point) for name in _POINTS}
        return {
            "args": {"level": self.level, "max_utility_loss": self.max_utility_loss, "every": self.every},
            "attributes": {"points": points},
        }

    @property
    def is_within_limit(self) -> bool:
        """Whether the kept rows have lost no more than they may at the last look."""
        return self._is_within_limit(self.last)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Looks at the model before training or, after a resume, takes the earlier looks up."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved and saved["attributes"].get("points"):
            self.level = saved["args"]["level"]
            for name, point in saved["attributes"]["points"].items():
                setattr(self, name, None if point is None else ForgettingPoint(**point))
        else:
            self._weights = None
            if self.like:
                # A model that knows every such row by heart leaves no level to reach.
                self.level = min(max(self._probability(self.like), 1e-6), 1 - 1e-6)
                self._say(f"The level is a probability of {self.level:.3g}.")
            self.start = self.best = self.last = self._look(state.global_step)
            self._keep_weights()
        self._hold(control)
        state.stateful_callbacks[type(self).__name__] = self.state()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Looks at the model, and stops if it has forgotten within the limit."""
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        self.last = self._look(state.global_step)
        is_done = self.last.forget_probability <= self.level and self.is_within_limit
        if self._rank(self.last) > self._rank(self.best):
            self.best = self.last
            if not is_done:
                self._keep_weights()
        self._hold(control)
        if is_done:
            self._weights = None
            control.should_training_stop = True
            self._say(
                f"The rows to forget have a probability of {self.last.forget_probability:.3g} at step "
                f"{state.global_step}, at most the level of {self.level:.3g}: training stops."
            )
        state.stateful_callbacks[type(self).__name__] = self.state()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Puts the weights of the best look back."""
        if self.best.forget_probability > self.level:
            self._say(
                f"The rows to forget still have a probability of {self.best.forget_probability:.3g}, above the level "
                f"of {self.level:.3g}, at the best step within `max_utility_loss`={self.max_utility_loss}: they are "
                "not forgotten. Train longer with `num_train_epochs`, raise `learning_rate` or allow more with "
                "`max_utility_loss`."
            )
        if self.best.step == state.global_step or self._weights is None:
            return
        self._say(f"The model keeps the weights of step {self.best.step}, the best within the limit.")
        engine = self.trainer.engine
        weights = [kept.to(weight) for weight, kept in zip(engine.local_weights(self.trainer.model), self._weights)]
        engine.swap_weights(self.trainer.model, weights)
        state.best_global_step, self._weights = self.best.step, None

    def save_to(self, folder: str | Path) -> None:
        """Adds this process's part of the best weights to a checkpoint."""
        if self._weights is not None:
            path = Path(folder, _KEPT_WEIGHTS.format(self.trainer.engine.process_index))
            save_file({str(place): weight.contiguous() for place, weight in enumerate(self._weights)}, path)

    def load_from(self, folder: str | Path) -> None:
        """Takes this process's part of the best weights up."""
        path = Path(folder, _KEPT_WEIGHTS.format(self.trainer.engine.process_index))
        if path.exists():
            weights = load_file(path)
            self._weights = [weights[str(place)] for place in range(len(weights))]

    def _hold(self, control: TrainerControl) -> None:
        """Forgets no more than there is to forget."""
        args, is_reached = self.trainer.args, self.last.forget_probability <= self.level
        if args.retain_loss in ("none", CURVATURE):
            # Nothing would win back what is lost.
            control.should_training_stop |= is_reached
        else:
            self.trainer.forget_weight = 0.0 if is_reached else args.forget_weight

    def _look(self, step: int) -> ForgettingPoint:
        forget = self._probability(self.forget)
        kept = self._probability(self.kept) if self.kept else None
        figures = {"until/forget_probability": forget}
        self.trainer.log(figures if kept is None else {**figures, "until/kept_probability": kept})
        return ForgettingPoint(step, forget, kept)

    def _probability(self, rows: list[dict]) -> float:
        trainer = self.trainer
        size = 2 * rows_per_forward(trainer)
        forward = RowForward(trainer.model, trainer.data_collator, size, trainer.engine, show_progress=False)
        with forked_rng():
            found = answer_probabilities(rows, forward)
        return float(torch.tensor(found, dtype=torch.float64).mean())

    def _keep_weights(self) -> None:
        engine = self.trainer.engine
        engine.forget_gathered(self.trainer.model)
        self._weights = [weight.detach().to("cpu", copy=True) for weight in engine.local_weights(self.trainer.model)]

    def _is_within_limit(self, point: ForgettingPoint) -> bool:
        if point.kept_probability is None:
            return True
        return point.kept_probability >= (1 - self.max_utility_loss) * self.start.kept_probability

    def _rank(self, point: ForgettingPoint) -> tuple[bool, float, float]:
        """Higher is better: within the limit, then forgotten up to the level, then the most kept."""
        return (
            self._is_within_limit(point),
            -max(point.forget_probability, self.level),
            point.kept_probability or 0.0,
        )

    def _say(self, text: str) -> None:
        if self.trainer.is_world_process_zero():
            logger.warning(text)


_POINTS = ("start", "best", "last")


def answer_probabilities(rows: Sequence[dict], forward: RowForward) -> list[float]:
    """
    The geometric mean of the answer tokens' probabilities of each row.

    Args:
        rows (`Sequence[dict]`): Tokenized rows, from [`~formats.prepare`].
        forward ([`RowForward`]): Forwards of the model that is asked.

    Returns:
        `list[float]`: One in [0, 1] for each row, on every process.
    """

    def read(logits: Tensor, targets: Tensor) -> list[float]:
        log_probs = token_log_probs(logits, targets)
        counts = (targets != IGNORE_INDEX).sum(1).clamp_min(1)
        return (log_probs.sum(1) / counts).exp().tolist()

    return forward(rows, read)


def spread(rows: Sequence[dict], most: int = MOST_ROWS) -> list[dict]:
    """At most so many rows, spread evenly over all of them."""
    number = min(len(rows), most)
    return [rows[place * len(rows) // number] for place in range(number)]
