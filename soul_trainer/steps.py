"""
The passes of a step that come before the Trainer's own, over the forget rows of all its micro-batches.

| setting | the pass | then the Trainer's own is of |
|---|---|---|
| `sam_radius` | finds where the forget gradient is to be taken | forget rows there, retain rows here |
| `two_directions` | folds the forget gradient into a momentum of its own, and moves nothing | retain rows |

With both, the forget gradient that is folded is the one that was taken there.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .batch import ForgetRetainBatch, select_rows
from .engines import MOST_OVERFLOWS, GradientError, find_soul, save_checkpoint, stop_at_gradient
from .optim import Soul
from .perturbation import Perturbation
from .random_state import forked_rng


class FoldCallback(TrainerCallback, ExportableState):
    """
    Remembers in a checkpoint whether a step's forget gradient is in its momentum already: a run that is resumed from a
    checkpoint between the two halves of a step, because the other half failed, must not fold it again.
    """

    def __init__(self):
        self.last_fold: int | None = None

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"last_fold": self.last_fold}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Starts anew or, after a resume, goes on."""
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        self.last_fold = saved.get("attributes", {}).get("last_fold")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Forgets it, or another training would take it for a step of its own."""
        self.last_fold = None


class StepMixin(Trainer):
    """
    The steps of an [`UnlearnTrainer`]: of its `get_batch_samples`, which calls `begin_step`, of the gradients of every
    micro-batch, and of its losses for the log.
    """

    perturbation: Perturbation | None = None
    folds: FoldCallback

    @property
    def has_two_directions(self) -> bool:
        """Whether the forget gradient has a momentum of its own."""
        soul = find_soul(self.optimizer)
        return soul is not None and soul.defaults["two_directions"]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As [`~transformers.Trainer`]'s; a trust region has all weights in one group, if one will do for them."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        soul = find_soul(optimizer)
        if is_new and soul is not None and soul.defaults["scaling"] == "trust_region" and not self.args.weight_decay:
            soul.merge_groups()
        return optimizer

    def begin_step(self, batches: list[ForgetRetainBatch], counts: Tensor) -> None:
        """
        The passes over a step's forget rows. They come before the Trainer's contexts that keep gradients of
        micro-batches on their process.

        Args:
            batches (`list[ForgetRetainBatch]`): This process's micro-batches of the step.
            counts (`torch.LongTensor` of shape `(2, 2)`): That their losses are divided by.

        Raises:
            FloatingPointError: If a loss or the gradient is not finite; the state before the step is saved.
        """
        self._forget_loss = 0.0
        if not batches or not (self.args.sam_radius or self.has_two_directions):
            return
        self.model_wrapped.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers have weights for either mode
            self.optimizer.train()
        parts = [select_rows(batch, ("forget", "preferred")) for batch in batches]
        if self.args.sam_radius:
            self._find_perturbation(parts, counts)
        if self.has_two_directions and self.folds.last_fold != self.state.global_step:
            self._fold_forget_gradient(parts, counts)
            self.folds.last_fold = self.state.global_step

    def _forget_passes(self, parts: list[ForgetRetainBatch], counts: Tensor, around: Callable) -> Iterator[Tensor]:
        """Forward and backward of each micro-batch's forget rows; the losses."""
        # The random state of a resumed run is loaded later; dropout is a function of the step and the process.
        seed = hash((self.args.seed, self.state.global_step, self.engine.process_index))
        with forked_rng(seed):
            for index, part in enumerate(parts):
                is_last = index == len(parts) - 1
                with (
                    around(),
                    self.engine.accumulate(self.model_wrapped, is_last),
                    self.compute_loss_context_manager(),
                ):
                    loss = self.compute_loss(self.model_wrapped, part, num_items_in_batch=counts)
                    self.engine.backward(loss / self.engine.loss_factor, is_last)
                yield loss.detach()

    def _find_perturbation(self, parts: list[ForgetRetainBatch], counts: Tensor) -> None:
        if self.perturbation is None:
            self.perturbation = Perturbation(self.model, self.args.sam_radius, self.engine)

        def backward() -> None:
            for _ in self._forget_passes(parts, counts, nullcontext):
                pass

        try:
            with self._losses_not_logged(), self.engine.gradients_set_aside(self.optimizer):
                gradients = self.engine.gradients(self.model, backward)
            self.perturbation.find(gradients, num_uses=len(parts))
        except GradientError as error:
            raise GradientError(f"{error} {save_checkpoint(self)} holds the state before it.") from None

    def _fold_forget_gradient(self, parts: list[ForgetRetainBatch], counts: Tensor) -> None:
        soul = find_soul(self.optimizer)
        for group in soul.param_groups:
            group["forget_weight"], group["retain_weight"] = self.forget_weight, self.current_retain_weight()
        for attempt in range(MOST_OVERFLOWS):
            # What overflowed is logged once.
            with nullcontext() if attempt == 0 else self._losses_not_logged():
                self._forget_loss = sum(self._forget_passes(parts, counts, self._perturbed))
            if not self.engine.has_finite_gradients(self.optimizer):
                stop_at_gradient(self)
            is_done = self.engine.fold(
                self.optimizer, Soul.forget_gradient, self.args.max_grad_norm, self.model_wrapped
            )
            self.model_wrapped.zero_grad()
            if is_done:
                return
            if self.engine.step_was_lost():
                stop_at_gradient(self)
        raise GradientError(
            "The gradient of the forget loss overflows float16 at every loss scale. "
            f"{save_checkpoint(self)} holds the state before it."
        )

    def _perturbed(self) -> AbstractContextManager:
        return self.perturbation.applied() if self.args.sam_radius else nullcontext()

    @contextmanager
    def _losses_not_logged(self) -> Iterator[None]:
        logged = self.step_losses, self._component_sums
        self.step_losses, self._component_sums = defaultdict(float), defaultdict(float)
        try:
            yield
        finally:
            self.step_losses, self._component_sums = logged

    def training_step(
        self, model: torch.nn.Module, inputs: ForgetRetainBatch, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """As [`~transformers.Trainer`]'s, of the rows that `begin_step` has left."""
        if not self.args.sam_radius and not self.has_two_directions:
            return super().training_step(model, inputs, num_items_in_batch)
        retain = select_rows(inputs, ("retain",))
        if self.has_two_directions:
            # The loss that is logged is that of both halves, of which one has been.
            loss, self._forget_loss = self._forget_loss, 0.0
        else:
            forget = select_rows(inputs, ("forget", "preferred"))
            with self._perturbed(), self.engine.accumulate(model, is_last=retain is None):
                loss = super().training_step(model, forget, num_items_in_batch)
        return loss if retain is None else loss + super().training_step(model, retain, num_items_in_batch)
