"""Sharpness-aware unlearning against its formula."""

import pytest
import torch
from toys import ToyLM

from soul_trainer.perturbation import Perturbation


# Float32's rounding of a sum of a few dozen terms.
ROUNDING = 1e-6


def gradients_of(model, scale=1.0):
    random = torch.Generator().manual_seed(3)
    return [scale * torch.randn(parameter.shape, generator=random) for parameter in model.parameters()]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e12])
def test_weights_move_by_the_radius_along_the_gradient(scale):
    """Would catch a norm of each tensor instead of all, a step that grows with the gradient, or goes down."""
    model, gradients = ToyLM(), gradients_of(ToyLM(), scale)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    perturbation = Perturbation(model, radius=0.5)
    perturbation.find([gradient.clone() for gradient in gradients])
    with perturbation.applied():
        steps = [now.detach() - then for now, then in zip(model.parameters(), before)]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    for step, gradient in zip(steps, gradients, strict=True):
        torch.testing.assert_close(step, 0.5 * gradient / norm, rtol=0, atol=ROUNDING)
    assert float(torch.cat([step.flatten() for step in steps]).norm()) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit(dtype):
    """Would catch theta + epsilon - epsilon, which rounds, and weights that stay away after an error."""
    model = ToyLM().to(dtype)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    perturbation = Perturbation(model, radius=0.37)
    perturbation.find(gradients_of(model))
    for _ in range(2):  # of a step's micro-batches
        with perturbation.applied():
            moved = [parameter.detach().clone() for parameter in model.parameters()]
        assert not any(now.equal(then) for now, then in zip(moved, before))
        assert all(now.equal(then) for now, then in zip(model.parameters(), before))
    with pytest.raises(RuntimeError, match="backward"), perturbation.applied():
        raise RuntimeError("an error in a backward")
    assert all(now.equal(then) for now, then in zip(model.parameters(), before))


def test_a_gradient_of_zero_moves_nothing():
    """Would catch 0 / 0: weights that are no numbers where a step's forget rows are forgotten."""
    model = ToyLM()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    perturbation = Perturbation(model, radius=0.5)
    perturbation.find([torch.zeros_like(parameter) for parameter in model.parameters()])
    with perturbation.applied():
        assert all(now.equal(then) for now, then in zip(model.parameters(), before))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused(bad):
    """Would catch weights that are no numbers, which no later error could name."""
    model = ToyLM()
    gradients = gradients_of(model)
    gradients[1][0, 0] = bad
    with pytest.raises(FloatingPointError, match="forget loss is not finite"):
        Perturbation(model, radius=0.5).find(gradients)
