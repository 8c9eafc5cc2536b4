"""Sophia against a scalar loop, the released rule and closed forms."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from soul_trainer import Sophia


# Odd sizes leave tails behind the CPU's vector kernels; one tensor is empty, one has no dimension.
SHAPES = ((5, 7), (33,), (1,), (), (2, 3, 5), (0, 4), (17, 1))
f32 = np.float32


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


def make_params(seed=0, shapes=SHAPES, spread=1.0):
    random = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(spread * torch.randn(shape, generator=random)) for shape in shapes]


def set_gradients(params, seed):
    """Gradients whose size differs from coordinate to coordinate: some will be at the clip and some will not."""
    random, size_random = torch.Generator().manual_seed(1000 + seed), torch.Generator().manual_seed(0)
    for param in params:
        sizes = 10.0 ** torch.randint(-3, 2, param.shape, generator=size_random)
        param.grad = (sizes * torch.randn(param.shape, generator=random)).to(param.dtype)


def numbers(tensor):
    return tensor.detach().flatten().numpy()


def train(params, optimizer, steps, refresh_every=3):
    for step in steps:
        if step % refresh_every == 0:
            set_gradients(params, 5000 + step)
            optimizer.update_hessian(scale=12.0)
        set_gradients(params, step)
        optimizer.step()


def snapshot(params, optimizer):
    """Weights and state, to be compared with [`assert_same`]."""
    states = [{name: value.clone() for name, value in optimizer.state[p].items()} for p in params]
    return [p.detach().clone() for p in params], states


def assert_same(left, right):
    """The same bits."""
    torch.testing.assert_close(left, right, rtol=0, atol=0)


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
                num_clipped += int((optimizer.direction(param, optimizer.param_groups[0]).abs() == 1).sum())
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


@pytest.mark.parametrize("foreach", [True, False])
def test_a_saved_and_resumed_run_ends_with_the_same_bits(foreach):
    """Catches state that is lost, cast or not allowed in a checkpoint (also the phase of `hessian_interval`)."""
    settings = {"lr": 0.03, "rho": 0.5, "weight_decay": 0.1, "hessian_interval": 4, "foreach": foreach}
    params = make_params()
    optimizer = Sophia(params, **settings)
    train(params, optimizer, range(13))
    file = io.BytesIO()
    torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    train(params, optimizer, range(13, 30))

    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = [torch.nn.Parameter(p) for p in saved["params"]]
    resumed_optimizer = Sophia(resumed, lr=1.0)
    resumed_optimizer.load_state_dict(saved["optimizer"])
    train(resumed, resumed_optimizer, range(13, 30))
    assert_same(snapshot(resumed, resumed_optimizer), snapshot(params, optimizer))


@pytest.mark.parametrize("saved_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_parameters_keep_full_precision_state(saved_dtype):
    """Catches averages in bfloat16, made so at the start or by PyTorch's cast at loading: they swallow updates."""
    params = [torch.nn.Parameter(p.detach().bfloat16()) for p in make_params()]
    saved_params = [torch.nn.Parameter(p.detach().to(saved_dtype)) for p in params]
    optimizer = Sophia(saved_params, lr=0.03, rho=0.5)
    train(saved_params, optimizer, range(5))
    loaded = Sophia(params, lr=0.03, rho=0.5)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param, saved_param in zip(params, saved_params):
        for name, dtype in (("exp_avg", torch.float32), ("hessian", torch.float32), ("hessian_weight", torch.float64)):
            assert optimizer.state[saved_param][name].dtype == loaded.state[param][name].dtype == dtype
            assert_same(loaded.state[param][name], optimizer.state[saved_param][name])


def test_bfloat16_parameters_step_as_float32_ones_do():
    """Catches momentum or Hessian arithmetic in the parameter's precision."""
    params = [torch.nn.Parameter(p.detach().bfloat16()) for p in make_params()]
    twins = [torch.nn.Parameter(p.detach().float()) for p in params]
    optimizer, twin = Sophia(params, lr=0.03, rho=0.5), Sophia(twins, lr=0.03, rho=0.5)
    for step in range(10):
        set_gradients(params, step)
        for param, other in zip(params, twins):
            other.grad = param.grad.float()
        for each in (optimizer, twin):
            each.update_hessian(scale=5.0)
            each.step()
        assert_same(snapshot(params, optimizer)[1], snapshot(twins, twin)[1])
        for param, other in zip(params, twins):
            other.data.copy_(param)  # the weights' own rounding is not at issue
    set_gradients(params, 99)
    before = [p.detach().float() for p in params]
    optimizer.step()
    for param, old in zip(params, before):
        expected = old - 0.03 * optimizer.direction(param, optimizer.param_groups[0])
        assert_same(param.detach(), expected.bfloat16())


def test_a_group_added_mid_run_starts_afresh_and_disturbs_none():
    """Catches shared step counts or Hessian weights, and settings of one group used for another."""
    params, twins = make_params(), make_params()
    late, late_twins = make_params(1), make_params(1)
    optimizer, twin = Sophia(params, lr=0.03, rho=0.5), Sophia(twins, lr=0.03, rho=0.5)
    late_twin = Sophia(late_twins, lr=0.01, rho=2.0, betas=(0.5, 0.6), weight_decay=0.1)
    train(params, optimizer, range(5))
    optimizer.add_param_group(
        {"params": late, "lr": 0.01, "rho": 2.0, "betas": (0.5, 0.6), "weight_decay": 0.1, "foreach": False}
    )
    for step in range(5, 12):
        set_gradients(params, step)
        set_gradients(late, 100 + step)
        optimizer.update_hessian(scale=2.0)
        optimizer.step()
    train(twins, twin, range(5))
    for step in range(5, 12):
        for each, own, seed in ((twin, twins, step), (late_twin, late_twins, 100 + step)):
            set_gradients(own, seed)
            each.update_hessian(scale=2.0)
            each.step()
    assert_same(snapshot(params + late, optimizer)[0], snapshot(twins + late_twins, twin)[0])
    assert_same(snapshot(params, optimizer), snapshot(twins, twin))
    assert_same(snapshot(late, optimizer), snapshot(late_twins, late_twin))


def test_parameters_without_a_gradient_are_inert():
    """Catches weight decay, momentum or state on a parameter that took no part; state that resumes incomplete."""
    moved, still = make_params(shapes=[(4,), (3,)])
    optimizer = Sophia([moved, still], lr=0.1, weight_decay=0.5, hessian_interval=1)
    before = still.detach().clone()
    moved.grad = torch.ones_like(moved)
    optimizer.update_hessian(1.0)
    optimizer.step()
    assert_same(still.detach(), before)
    assert not optimizer.state[still]
    assert optimizer.direction(still, optimizer.param_groups[0]) is None
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    still.grad = torch.ones_like(still)
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in (moved, still)] == [2, 1]


def test_sparse_gradients_and_complex_parameters_are_refused():
    """Catches a wrong step, or PyTorch's own obscure error, on tensors that Sophia has no rule for."""
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    optimizer = Sophia(embedding.parameters())
    for act in (optimizer.step, lambda: optimizer.update_hessian(1.0)):
        with pytest.raises(TypeError, match="sparse=False"):
            act()
    wave = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="complex64"):
        Sophia([wave])
    with pytest.raises(TypeError, match="complex64"):
        optimizer.add_param_group({"params": [wave]})


def test_a_refused_group_is_not_added():
    """Catches an optimizer that keeps the complex group that it has just refused, and fails at the next step."""
    optimizer = Sophia(make_params())
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -1e-3),
        ("lr", math.nan),
        ("betas", (1.0, 0.9)),
        ("betas", (0.9, -0.1)),
        ("betas", (0.9,)),
        ("rho", 0.0),
        ("rho", math.nan),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("hessian_interval", 0),
    ],
)
def test_a_bad_setting_is_named(name, value):
    """Catches a setting out of its range that trains on silently, or an error that does not say which it is."""
    with pytest.raises(ValueError, match=f"`{name}`"):
        Sophia(make_params(), **{name: value})


@pytest.mark.parametrize("arguments", [{"scale": 0.0}, {"scale": -1.0}, {"scale": 1.0, "decay": 1.0}])
@pytest.mark.parametrize("is_context", [True, False])
def test_a_bad_refresh_is_named(arguments, is_context):
    """Catches a refresh that makes the Hessian negative or drops the estimate, in either of its two forms."""
    params = make_params()
    optimizer = Sophia(params)
    set_gradients(params, 0)
    name = "decay" if "decay" in arguments else "scale"
    with pytest.raises(ValueError, match=f"`{name}`"):
        if is_context:
            with optimizer.hessian_refresh(**arguments):
                optimizer.step()
        else:
            optimizer.update_hessian(**arguments)


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


def test_a_closure_gets_gradients_and_its_loss_comes_back():
    """Catches a closure that runs without autograd, or is not run in a refresh."""
    (param,) = params = make_params(shapes=[(3,)])
    optimizer = Sophia(params, lr=0.1, rho=1.0)

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    start = param.detach().clone()
    with optimizer.hessian_refresh(2.0, decay=0.0):
        torch.testing.assert_close(optimizer.step(closure).detach(), (start**2).sum())
    assert_same(param.detach(), start)
    torch.testing.assert_close(optimizer.state[param]["hessian"], 2.0 * (2 * start) ** 2)
    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]


def test_grad_scaler_steps_and_refreshes_as_if_it_were_not_there():
    """Catches a refresh of scaled gradients (h too large by the square of the scale), or one from infinities."""
    params, twins = make_params(), make_params()
    optimizer, twin = Sophia(params, lr=0.03, rho=0.5), Sophia(twins, lr=0.03, rho=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)  # a power of two: scaling and back keeps the bits
    for step in range(8):
        set_gradients(twins, step)
        for is_refresh in (True, False):
            for param, other in zip(params, twins):
                param.grad = scaler.scale(other.grad)
            if is_refresh:
                twin.update_hessian(6.0)
                with optimizer.hessian_refresh(6.0):
                    scaler.step(optimizer)
            else:
                twin.step()
                scaler.step(optimizer)
            scaler.update()
    before = snapshot(params, optimizer)
    assert_same(before, snapshot(twins, twin))
    params[0].grad = torch.full_like(params[0], math.inf)
    with optimizer.hessian_refresh(6.0):
        scaler.step(optimizer)
    scaler.update()
    assert_same(snapshot(params, optimizer), before)
    assert scaler.get_scale() == 2.0**11


@pytest.fixture
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("foreach", [True, False])
def test_sharded_parameters_follow_plain_ones(mesh, foreach):
    """Catches an operation that DTensor does not know, and kernels that mix sharded and plain tensors."""
    shapes, placements = ((6, 3), (9,), (4, 2)), (Shard(0), Replicate(), None)
    twins, params = make_params(shapes=shapes), []
    for param, placement in zip(make_params(shapes=shapes), placements):
        tensor = param.detach() if placement is None else distribute_tensor(param.detach(), mesh, [placement])
        params.append(torch.nn.Parameter(tensor))
    settings = {"lr": 0.03, "rho": 0.5, "weight_decay": 0.1, "hessian_interval": 3, "foreach": foreach}
    optimizer, twin = Sophia(params, **settings), Sophia(twins, **settings)
    for step in range(9):
        set_gradients(twins, step)
        for param, other, placement in zip(params, twins, placements):
            param.grad = other.grad if placement is None else distribute_tensor(other.grad, mesh, [placement])
        for each in (optimizer, twin):
            each.update_hessian(2.0)
            each.step()
        if step == 4:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param, other, placement in zip(params, twins, placements):
        assert isinstance(optimizer.state[param]["hessian"], DTensor) == (placement is not None)
        for ours, theirs in (
            (param.detach(), other.detach()),
            (optimizer.state[param]["exp_avg"], twin.state[other]["exp_avg"]),
            (optimizer.state[param]["hessian"], twin.state[other]["hessian"]),
            (optimizer.direction(param, optimizer.param_groups[0]), twin.direction(other, twin.param_groups[0])),
        ):
            assert_same(ours.full_tensor() if isinstance(ours, DTensor) else ours, theirs)


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
        direction = optimizer.direction(param, optimizer.param_groups[0])
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


def test_learning_rate_schedulers_drive_the_step():
    """Catches a learning rate that is read once, or a refresh that a scheduler takes for a step."""
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = Sophia([param], lr=1.0)  # no refresh: sign descent, of the length lr
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    lengths = []
    for _ in range(4):
        param.grad = torch.ones_like(param)
        before = param.detach().clone()
        optimizer.step()
        lengths.append(float((before - param.detach())[0]))
        scheduler.step()
    assert lengths == [1.0, 0.5, 0.25, 0.125]
    with optimizer.hessian_refresh(1.0):
        optimizer.step()
    assert scheduler.get_last_lr() == [0.0625]


def deep_copied(optimizer):
    return copy.deepcopy(optimizer)


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("copied", [deep_copied, pickled])
def test_copies_of_the_optimizer_go_on_as_it_does(copied):
    """Catches an attribute that a copy lacks, and a copy made inside a refresh that never leaves it."""
    params = make_params()
    optimizer = Sophia(params, lr=0.03, rho=0.5, hessian_interval=2)
    train(params, optimizer, range(5))
    with optimizer.hessian_refresh(1.0):
        twin = copied(optimizer)
    twins = twin.param_groups[0]["params"]
    train(params, optimizer, range(5, 10))
    train(twins, twin, range(5, 10))
    assert_same(snapshot(twins, twin), snapshot(params, optimizer))
