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

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .engines import Engine, GradientError


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
