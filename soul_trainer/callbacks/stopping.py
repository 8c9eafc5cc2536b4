"""Stops unlearning once it has gone far enough: when a logged figure reaches a level, such as a gold model's."""

import math

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from ..engines import Engine
from ..reference import eval_mode


logger = logging.get_logger(__name__)


class UnlearningStoppingCallback(TrainerCallback, ExportableState):
    """
    Stops training when a logged figure reaches a level. Without it, most forget losses go on: gradient ascent has no
    minimum, and a model that gives the rows to forget a far higher loss than one that never saw them is as easy to
    tell apart from it as before.

    The default figure is `eval_forget_loss`, the loss of the true answers of the rows to forget, in nats a token,
    which [`UnlearnTrainer`] evaluates. It grows as the model forgets; [`gold_forget_loss`] gives the level.

    Every process stops at the same step. A checkpoint keeps how often the level was reached in a row.

    Args:
        level (`float`): What the figure must reach.
        metric (`str`, *optional*, defaults to `"eval_forget_loss"`):
            Any figure of the log: the Trainer's, or one of an evaluation that runs meanwhile, such as
            `eval_tofu_forget_probability`. Every process must log it.
        greater_is_better (`bool`, *optional*, defaults to `True`):
            Whether the figure grows as the model forgets: the level is reached at or above it, else at or below.
        patience (`int`, *optional*, defaults to 1): How many times in a row the level must be reached.

    Raises:
        ValueError: If `level` is not finite or `patience` under 1; in training, if the figure is not logged (those
            that are get listed).
    """

    def __init__(
        self,
        level: float,
        metric: str = "eval_forget_loss",
        greater_is_better: bool = True,
        patience: int = 1,
    ):
        if not math.isfinite(level):
            raise ValueError(f"`level` must be a finite number, but it is {level}.")
        if patience < 1:
            raise ValueError(f"`patience` must be at least 1, but it is {patience}.")
        self.level, self.metric = float(level), metric
        self.greater_is_better, self.patience = greater_is_better, patience
        self.num_reached = 0
        self._engine = Engine()
        self._logged: set[str] = set()

    def state(self) -> dict:
        """What a checkpoint keeps."""
        arguments = ("level", "metric", "greater_is_better", "patience")
        return {
            "args": {name: getattr(self, name) for name in arguments},
            "attributes": {"num_reached": self.num_reached},
        }

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Starts to count or, after a resume, goes on."""
        if self.metric.startswith("eval_") and args.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                f"`metric`={self.metric!r} is a figure of evaluations, and there are none: set `eval_strategy`, and "
                "`eval_steps` for how often the callback can stop."
            )
        self._engine, self._logged = Engine(PartialState()), set()
        own = self.state()
        # Several callbacks of a class are kept in one list, to which the Trainer adds at every checkpoint. It fails
        # at a callback that the checkpoint did not know.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, own)
        saved = [each for each in (saved if isinstance(saved, list) else [saved]) if each["args"] == own["args"]]
        # At step 0 the state is this callback's own, as a former training left it.
        self.num_reached = saved[-1]["attributes"]["num_reached"] if saved and state.global_step else 0

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs
    ) -> None:
        """Compares the figure, and stops if it has been at the level for long enough."""
        self._logged |= logs.keys()
        if self.metric not in logs:
            return
        value = logs[self.metric]
        is_reached = value >= self.level if self.greater_is_better else value <= self.level
        # Sums in another order may differ between processes in the last digit; a stop must not.
        is_reached = bool(self._engine.gather([True] if is_reached else []))
        self.num_reached = self.num_reached + 1 if is_reached else 0
        if self.num_reached >= self.patience:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning(
                    f"`{self.metric}` is {value:.4g} at step {state.global_step} and has reached {self.level:.4g}: "
                    "training stops."
                )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Says that the figure does not exist, once all figures of its kind have been logged."""
        kind = "eval_" if self.metric.startswith("eval_") else "loss"
        if self.metric not in self._logged and any(name.startswith(kind) for name in self._logged):
            raise ValueError(f"`metric`={self.metric!r} is not logged. What is: {', '.join(sorted(self._logged))}.")


@torch.no_grad()
def gold_forget_loss(
    model: PreTrainedModel, trainer: Trainer, dataset: str | Dataset | list[dict] = "forget"
) -> float:
    """
    The level at which [`UnlearningStoppingCallback`] should stop: what the Trainer would log as `eval_forget_loss` if
    the gold model, which never saw the rows to forget, were its own. Rows, batches, precision and mean are the
    Trainer's, so the two can be compared.

    Args:
        model ([`~transformers.PreTrainedModel`]): The gold model, which each process holds whole.
        trainer ([`UnlearnTrainer`]): That will unlearn.
        dataset (`str`, [`~datasets.Dataset`] or `list[dict]`, *optional*, defaults to `"forget"`):
            Rows, or the name of those that the Trainer evaluates.

    Returns:
        `float`: In nats a token, on every process.

    Raises:
        ValueError: If the Trainer evaluates no rows of that name.
    """
    known = trainer.eval_dataset
    if isinstance(dataset, str) and not (isinstance(known, dict) and dataset in known):
        names = ", ".join(known) if isinstance(known, dict) else "rows without a name"
        raise ValueError(f"`dataset`={dataset!r} is not among what the Trainer evaluates: {names}.")
    device, trainer.evaluated_rows = model.device, []
    model.to(trainer.args.device)
    with eval_mode(model):
        for batch in trainer.get_eval_dataloader(dataset):
            trainer.prediction_step(model, batch, prediction_loss_only=True)
    model.to(device)
    return trainer.mean_evaluated_loss()
