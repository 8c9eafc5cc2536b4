"""
Sharpness-aware unlearning (SAM; Fan et al., 2025, arXiv 2502.05374): what is forgotten is forgotten in a neighbourhood
of the weights, so that a few steps of relearning do not bring it back,

    min_theta  max_{|epsilon| <= radius} L_forget(theta + epsilon) + w L_retain(theta).

The maximum is SAM's first-order one (Foret et al., 2021, arXiv 2010.01412): epsilon = radius * g / |g|, where g is the
gradient of the forget loss of a whole step, over all its micro-batches and processes, so that neither changes the
trajectory. The forget gradient is then taken at theta + epsilon, the retain gradient at theta.

A step costs two forwards and backwards of its forget rows and one of its retain rows, in two calls of the model,
where plain unlearning costs one of each in one call; and one more copy of the weights that train.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import Trainer

from .batch import ForgetRetainBatch, select_rows
from .engines import Engine, GradientError, save_checkpoint
from .random_state import forked_rng


class Perturbation:
    """
    The weights at theta + epsilon, beside theta.

    Args:
        model (`torch.nn.Module`): The unwrapped model.
        radius (`float`): The length of epsilon over all weights that train, > 0 (rho in the papers).
        engine ([`~engines.Engine`], *optional*): That runs the model; by default one plain process.
    """

    def __init__(self, model: torch.nn.Module, radius: float, engine: Engine | None = None):
        self.model, self.radius, self.engine = model, radius, engine or Engine()
        self.moved: list[Tensor] = []
        self.uses_left = 0

    @torch.no_grad()
    def find(self, gradients: list[Tensor], num_uses: int = 1) -> None:
        """
        Moves from the weights as they are along a gradient. Where it is zero, the weights stay.

        Args:
            gradients (`list[torch.Tensor]`): Of the forget loss, from [`~engines.Engine.gradients`]. They are used up.
            num_uses (`int`, *optional*, defaults to 1):
                How often the weights will be [`applied`], a step's number of micro-batches; then they are dropped.

        Raises:
            GradientError: If the gradient is not finite.
        """
        squares = [torch.linalg.vector_norm(gradient, dtype=torch.float32).square() for gradient in gradients]
        norm = float(self.engine.sum_over_parts(self.model, squares)) ** 0.5
        if not norm < float("inf"):
            raise GradientError("The gradient of the forget loss is not finite, and `sam_radius` moves along it.")
        self.engine.forget_gathered(self.model)
        self.moved, self.uses_left = [], num_uses
        for weight in self.engine.local_weights(self.model):
            gradient = gradients.pop(0)
            # In float32 also where weights are bfloat16, which would round the step before it is added.
            step = gradient.float() * (self.radius / norm if norm else 0.0)
            self.moved.append((weight.float() + step).to(weight.dtype))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context for forwards and backwards at theta + epsilon. Theta comes back bit for bit."""
        self.engine.swap_weights(self.model, self.moved)
        try:
            yield
        finally:
            self.engine.swap_weights(self.model, self.moved)
            self.uses_left -= 1
            if not self.uses_left:
                self.moved = []


class SharpnessAwareMixin(Trainer):
    """
    The steps of an [`UnlearnTrainer`] with `sam_radius`: of its `get_batch_samples`, which calls `find_perturbation`,
    of the gradients of every micro-batch, and of its losses, whose sums for the log are of the perturbed weights.
    """

    perturbation: Perturbation | None = None

    def find_perturbation(self, batches: list[ForgetRetainBatch], counts: Tensor) -> None:
        """
        Finds where this step's forget gradients are to be taken. It comes before the Trainer's contexts that keep
        gradients of micro-batches on their process.

        Args:
            batches (`list[ForgetRetainBatch]`): This process's micro-batches of the step.
            counts (`torch.LongTensor` of shape `(2, 2)`): That their losses are divided by.

        Raises:
            FloatingPointError: If a loss or the gradient is not finite; the state before the step is saved.
        """
        if not self.args.sam_radius or not batches:
            return
        self.model_wrapped.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers have weights for either mode
            self.optimizer.train()
        if self.perturbation is None:
            self.perturbation = Perturbation(self.model, self.args.sam_radius, self.engine)
        logged = self.step_losses, self._component_sums
        self.step_losses, self._component_sums = defaultdict(float), defaultdict(float)
        parts = [select_rows(batch, ("forget", "preferred")) for batch in batches]

        def backward() -> None:
            for index, part in enumerate(parts):
                is_last = index == len(parts) - 1
                with self.engine.accumulate(self.model_wrapped, is_last), self.compute_loss_context_manager():
                    loss = self.compute_loss(self.model_wrapped, part, num_items_in_batch=counts)
                    self.engine.backward(loss / self.engine.loss_factor, is_last)

        # The random state of a resumed run is loaded later; dropout is a function of the step and the process.
        seed = hash((self.args.seed, self.state.global_step, self.engine.process_index))
        try:
            with forked_rng(seed), self.engine.gradients_set_aside(self.optimizer):
                gradients = self.engine.gradients(self.model, backward)
            self.perturbation.find(gradients, num_uses=len(batches))
        except GradientError as error:
            raise GradientError(f"{error} {save_checkpoint(self)} holds the state before it.") from None
        finally:
            self.step_losses, self._component_sums = logged

    def training_step(
        self, model: torch.nn.Module, inputs: ForgetRetainBatch, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """As [`~transformers.Trainer`]'s, forget rows at the perturbed weights and retain rows at the weights."""
        if not self.args.sam_radius:
            return super().training_step(model, inputs, num_items_in_batch)
        forget, retain = select_rows(inputs, ("forget", "preferred")), select_rows(inputs, ("retain",))
        with self.perturbation.applied(), self.engine.accumulate(model, is_last=retain is None):
            loss = super().training_step(model, forget, num_items_in_batch)
        return loss if retain is None else loss + super().training_step(model, retain, num_items_in_batch)
