"""Sophia against a scalar loop, the released rule and closed forms."""

import numpy as np
import pytest
import torch
from sophia_scenes import SHAPES, assert_same, f32, make_params, numbers, set_gradients, snapshot, train

from soul_trainer import Sophia


class ScalarSophia:
    """One coordinate of Sophia in float32, an operation a line: what the tensors must give to the last bit."""

    def __init__(self, theta, lr, betas, rho, eps, weight_decay, bias_correction=True):
        self.theta, self.lr, self.rho, self.eps = f32(theta), lr, rho, eps
        self.beta1, self.beta2 = betas
        self.weight_decay, self.bias_correction = weight_decay, bias_correction
        self.m, self.h = f32(0), f32(0)
        self.hessian_weight = 0.0

    def refresh(self, g, scale):
        fresh = f32(g) * f32(g)
        fresh = fresh * f32(scale * (1 - self.beta2))
        self.h = self.h * f32(self.beta2)
        self.h = self.h + fresh
        self.hessian_weight = self.hessian_weight * self.beta2 + (1 - self.beta2)

    def step(self, g):
        momentum = f32(g) * f32(1 - self.beta1)
        self.m = self.m * f32(self.beta1)
        self.m = self.m + momentum
        has_weight = self.bias_correction and self.hessian_weight > 0
        denominator = max(self.h, f32(0)) * f32(self.rho / self.hessian_weight if has_weight else self.rho)
        denominator = denominator + f32(self.eps)
        direction = self.m / denominator
        direction = min(max(direction, f32(-1)), f32(1))
        direction = direction * f32(-self.lr)
        self.theta = self.theta * f32(1 - self.lr * self.weight_decay)
        self.theta = self.theta + direction


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_every_coordinate_follows_the_scalar_loop_to_the_last_bit(foreach, bias_correction):
    """Catches any other order of operations, a mixed-up list of tensors, a vector tail that is left out."""
    settings = {"lr": 3e-2, "betas": (0.9, 0.95), "rho": 0.3, "eps": 1e-12, "weight_decay": 0.1}
    params = make_params()
    optimizer = Sophia(params, **settings, bias_correction=bias_correction, foreach=foreach)
    scalars = [[ScalarSophia(x, **settings, bias_correction=bias_correction) for x in numbers(p)] for p in params]
    num_clipped = 0
    for step in range(36):
        if step % 5 == 1:  # the first step sees an empty Hessian
            set_gradients(params, 5000 + step)
            with optimizer.hessian_refresh(scale=7.0):
                optimizer.step()
            for param, coordinates in zip(params, scalars):
                for g, scalar in zip(numbers(param.grad), coordinates):
                    scalar.refresh(g, scale=7.0)
        set_gradients(params, step)
        optimizer.step()
        for param, coordinates in zip(params, scalars):
            for g, scalar in zip(numbers(param.grad), coordinates):
                scalar.step(g)
            state = optimizer.state[param]
            for tensor, name in ((param, "theta"), (state["exp_avg"], "m"), (state["hessian"], "h")):
                expected = np.array([getattr(scalar, name) for scalar in coordinates], dtype=f32)
                np.testing.assert_array_equal(numbers(tensor), expected, f"{name} at step {step}")
            if coordinates:
                assert float(state["hessian_weight"]) == coordinates[0].hessian_weight
                num_clipped += int(
                    (Sophia.direction(optimizer.state[param], optimizer.param_groups[0]).abs() == 1).sum()
                )
            assert float(state["step"]) == step + 1
    num_coordinates = 36 * sum(p.numel() for p in params)
    assert 0.1 < num_clipped / num_coordinates < 0.9, "the comparison must see both sides of the clip"


# Weights of about 0.1 have a unit in the last place of 7e-9: a hundred roundings stay below 1e-7 in float32.
RELEASED_TOLERANCE = 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_released_sophiag_is_followed_without_bias_correction(dtype):
    """Catches a wrong place of rho, eps, the batch size or the weight decay, and a bias correction that stays on."""
    lr, (beta1, beta2), rho, eps, weight_decay, bs = 1e-3, (0.965, 0.99), 0.04, 1e-15, 0.2, 480
    params = [torch.nn.Parameter(p.detach().to(dtype)) for p in make_params(spread=0.1)]
    optimizer = Sophia(params, lr, (beta1, beta2), rho, eps, weight_decay, bias_correction=False)
    thetas = [p.detach().clone() for p in params]
    momenta, hessians = [torch.zeros_like(t) for t in thetas], [torch.zeros_like(t) for t in thetas]
    ratios = []
    for step in range(100):
        if step % 10 == 0:
            set_gradients(params, 5000 + step)
            optimizer.update_hessian(scale=bs)
            hessians = [beta2 * h + (1 - beta2) * p.grad * p.grad for h, p in zip(hessians, params)]
        set_gradients(params, step)
        optimizer.step()
        for index, param in enumerate(params):
            momenta[index] = m = beta1 * momenta[index] + (1 - beta1) * param.grad
            ratio = (m.abs() / (rho * bs * hessians[index] + eps)).clamp(max=1)
            thetas[index] = thetas[index] * (1 - lr * weight_decay) - lr * m.sign() * ratio
            ratios.append(ratio.flatten())
    assert 0.05 < float((torch.cat(ratios) == 1).float().mean()) < 0.95
    torch.testing.assert_close([p.detach() for p in params], thetas, rtol=0, atol=RELEASED_TOLERANCE)


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("decay", [None, 0.0, 0.7])
def test_a_refresh_moves_nothing_and_equals_update_hessian(decay, square):
    """Catches a refresh that steps too, decays weights, counts as a step, or ignores an argument."""
    settings = {"lr": 0.1, "weight_decay": 0.5, "hessian_interval": 2}
    params, twins = make_params(), make_params()
    optimizer, twin = Sophia(params, **settings), Sophia(twins, **settings)
    train(params, optimizer, range(4))
    train(twins, twin, range(4))
    before = snapshot(params, optimizer)
    set_gradients(params, 77)
    set_gradients(twins, 77)
    with optimizer.hessian_refresh(3.0, decay, square):
        optimizer.step()
    twin.update_hessian(3.0, decay, square)
    after = snapshot(params, optimizer)
    assert_same(after, snapshot(twins, twin))
    assert_same(after[0], before[0])
    beta2 = 0.95 if decay is None else decay
    for param, old, new in zip(params, before[1], after[1]):
        assert_same(new["exp_avg"], old["exp_avg"])
        assert_same(new["step"], old["step"])
        estimate = 3.0 * (param.grad**2 if square else param.grad)
        torch.testing.assert_close(new["hessian"], beta2 * old["hessian"] + (1 - beta2) * estimate)


def test_refreshes_cannot_be_nested_and_end_with_their_block():
    """Catches a refresh that stays active, so that training would stand still, also after an error inside."""
    (param,) = params = make_params(shapes=[(3,)])
    optimizer = Sophia(params, lr=0.1)
    with optimizer.hessian_refresh(1.0):
        with pytest.raises(ValueError, match="nested"), optimizer.hessian_refresh(2.0):
            pass
        set_gradients(params, 0)
        optimizer.step()
    with pytest.raises(RuntimeError, match="out of memory"), optimizer.hessian_refresh(1.0):
        raise RuntimeError("out of memory")
    before = param.detach().clone()
    optimizer.step()
    assert (param != before).all()


def test_maximize_is_descent_on_the_negated_gradient():
    """Catches a sign that is turned in the momentum but not in the Hessian of `square=False`, or twice."""
    params, twins = make_params(), make_params()
    optimizer, twin = Sophia(params, lr=0.03, rho=0.5, maximize=True), Sophia(twins, lr=0.03, rho=0.5)
    for step in range(8):
        set_gradients(params, step)
        for param, other in zip(params, twins):
            other.grad = -param.grad
        for each in (optimizer, twin):
            each.update_hessian(2.0, square=step % 2 == 0)
            each.step()
    assert_same(snapshot(params, optimizer), snapshot(twins, twin))


@pytest.mark.parametrize("interval", [1, 3])
def test_self_refresh_equals_a_manual_one_before_every_interval_th_step(interval):
    """Catches a refresh that is late, early, or first used only at a later step."""
    params, twins = make_params(), make_params()
    optimizer = Sophia(params, lr=0.03, rho=0.5, hessian_interval=interval)
    twin = Sophia(twins, lr=0.03, rho=0.5)
    for step in range(10):
        set_gradients(params, step)
        set_gradients(twins, step)
        optimizer.step()
        if step % interval == 0:
            twin.update_hessian(scale=1.0)
        twin.step()
        assert_same(snapshot(params, optimizer), snapshot(twins, twin))


@pytest.mark.parametrize("bias_correction", [True, False])
def test_bias_correction_makes_the_first_estimate_count_in_full(bias_correction):
    """Catches a first Hessian that is too small by 1 - beta2 (so that all is clipped), or corrected twice."""
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = Sophia([param], lr=1.0, betas=(0.0, 0.95), rho=0.5, bias_correction=bias_correction)
    param.grad = torch.tensor([1.0, -2.0, 3.0, -4.0])
    optimizer.update_hessian(scale=100.0)
    optimizer.step()
    weight = 1.0 if bias_correction else 0.05
    # m / (rho h) with m = g and h = weight * scale * g^2
    torch.testing.assert_close(param.detach(), -1 / (0.5 * weight * 100.0 * param.grad), rtol=1e-6, atol=0)


def test_decay_of_j_over_j_plus_one_gives_the_plain_mean():
    """Catches a bias correction that counts refreshes instead of the weights of the average."""
    params = make_params(shapes=[(9,)])
    optimizer = Sophia(params)
    squares = []
    for draw in range(12):
        set_gradients(params, draw)
        squares.append(4.0 * params[0].grad.double() ** 2)
        optimizer.update_hessian(4.0, decay=draw / (draw + 1))
    state = optimizer.state[params[0]]
    torch.testing.assert_close(state["hessian"].double(), torch.stack(squares).mean(0), rtol=1e-6, atol=0)
    assert float(state["hessian_weight"]) == pytest.approx(1.0, abs=1e-15)


def test_direction_is_what_the_step_subtracted():
    """Catches logged shares of the update that are not those of the update: no correction, no clip, another eps."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = Sophia(params, lr=0.25, rho=0.5, eps=1e-3)
    train(params, optimizer, range(4))
    for param in params:
        param.data.zero_()
    set_gradients(params, 50)
    optimizer.step()
    for param in params:
        direction = Sophia.direction(optimizer.state[param], optimizer.param_groups[0])
        assert_same(param.detach(), -0.25 * direction)


def test_negative_curvature_counts_as_flat():
    """Catches a step uphill, or against its gradient, where an estimate of the diagonal is below zero."""
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = Sophia([param], lr=0.1, rho=1.0)
    param.grad = torch.tensor([-50.0, 4.0])
    optimizer.update_hessian(1.0, decay=0.0, square=False)
    param.grad = torch.tensor([10.0, 10.0])
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([-0.1, -0.1 * (0.1 * 10 / 4)]))
