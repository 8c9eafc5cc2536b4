"""When weights are masked. Which ones are is in `attribution.py`."""

from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..attribution import WeightMask, count, select_top_share, weight_scores
from ..engines import KeptWithCheckpoint
from ..random_state import forked_rng
from .rows import micro_batches


logger = logging.get_logger(__name__)


class MaskCallback(KeptWithCheckpoint):
    """
    Selects the weights that train, by WAGLE's scores before the first step, and puts the others back after each. The
    gradients are of all forget rows and of as many retain rows, drawn once. A checkpoint keeps the mask.

    Args:
        trainer ([`UnlearnTrainer`]): The trainer that it is added to.
        retain ([`~datasets.Dataset`]): Tokenized rows, from [`~formats.prepare`].
        forget ([`~datasets.Dataset`]): Likewise.
    """

    def __init__(self, trainer: Trainer, retain: Dataset, forget: Dataset):
        self.trainer, self.retain, self.forget = trainer, retain, forget
        self.mask: WeightMask | None = None

    @property
    def settings(self) -> dict[str, str]:
        """What the mask comes from, as a checkpoint keeps it."""
        names = ("weight_mask", "weight_mask_share", "wagle_curvature")
        return {name: str(getattr(self.trainer.args, name)) for name in names}

    def save_to(self, folder: str | Path) -> None:
        """Adds the mask to a checkpoint."""
        self.mask.save(folder, self.settings)

    def load_from(self, folder: str | Path) -> None:
        """Takes the mask of a checkpoint: gradients on a GPU would not be the same to the last bit."""
        self.mask = WeightMask.load(folder, self.settings, self.trainer.model, self.trainer.engine)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Selects the weights, unless a checkpoint, or an earlier call of `train`, has."""
        if self.mask is None:
            self.mask = self._select(args)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        """Puts back what the optimizer moved, before anyone sees it."""
        self.mask.apply()

    def _select(self, args: TrainingArguments) -> WeightMask:
        trainer, engine = self.trainer, self.trainer.engine
        num_retain = min(len(self.forget), len(self.retain))
        drawn = np.random.default_rng(args.seed).choice(len(self.retain), num_retain, replace=False)
        forget = micro_batches(trainer, engine, [{"forget": row} for row in self.forget])
        retain = micro_batches(trainer, engine, [{"retain": self.retain[int(row)]} for row in drawn])
        trainer.model_wrapped.train()
        with forked_rng():
            model, optimizer = trainer.model_wrapped, trainer.optimizer
            scores = weight_scores(model, optimizer, forget, retain, args.wagle_curvature, engine)
        trains = select_top_share(scores, args.weight_mask_share, model, engine)
        num_weights, num_trained = (
            count(model, parts, engine) for parts in ([score >= 0 for score in scores], trains)
        )
        share = num_trained / num_weights
        if trainer.is_world_process_zero():
            is_short = share < args.weight_mask_share - 1 / num_weights
            logger.warning(
                f"WAGLE: {num_trained:,} of {num_weights:,} weights train, {share:.2%}"
                + (": nothing of the forget rows reaches the others." if is_short else ".")
            )
        return WeightMask(trainer.model, trains, engine)
