"""`Soul` against a slow reference: every rule with every scaling, and what a step must be whatever the rule."""

import math

import numpy as np
import pytest
import torch
from slow_soul import SECOND_GROUP, advance, gradients, make_soul, scene, settings_of
from sophia_scenes import SHAPES, assert_same, make_params, numbers
from torch.utils._python_dispatch import TorchDispatchMode

from soul_trainer.curvature import KroneckerCurvature
from soul_trainer.optim import Soul


# Eight steps of float32, each of a few roundings of numbers of about 1: 1e-6 of an update, of which directions that
# cancel in a momentum, or are solved for, have some more.
ROUNDING = {"rtol": 1e-5, "atol": 3e-6}

COMBINATIONS = [
    (rule, scaling, scope, two)
    for rule in ("none", "diagonal", "kronecker", "sophia")
    for scaling, scope in (
        ("none", "tensor"),
        ("tensor", "tensor"),
        ("trust_region", "tensor"),
        ("trust_region", "model"),
    )
    for two in (False, True)
    if (scaling == "none") <= (rule == "sophia") and not (rule == "sophia" and scaling == "trust_region")
]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("rule", "scaling", "scope", "two"), COMBINATIONS)
def test_every_setting_follows_the_slow_reference(rule, scaling, scope, two, maximize):
    """
    Catches a mean, a damping or a length over the wrong tensors, settings of another group, weights of halves that
    are swapped or outside the learning rate, a half that is skipped where it has no gradient.
    """
    params, optimizer, slow = scene(settings_of(rule, scaling, scope, two, maximize=maximize))
    for step in range(8):
        advance(params, optimizer, slow, step, two)
        for param, tensor in zip(params, slow.tensors):
            np.testing.assert_allclose(numbers(param), tensor.theta, **ROUNDING)
    start = make_params()
    assert all((param != old).any() for param, old in zip(params, start) if param.numel()), "all tensors must move"


@pytest.mark.parametrize(("rule", "scaling", "scope", "two"), COMBINATIONS)
def test_single_tensor_kernels_give_the_same_bits(rule, scaling, scope, two):
    """Catches a sum over the tensors of one kernel in the place of all, and another order of operations."""
    found = []
    for foreach in (None, False):
        params, optimizer, slow = scene(settings_of(rule, scaling, scope, two, foreach=foreach))
        for step in range(6):
            advance(params, optimizer, slow, step, two)
        found.append([param.detach() for param in params])
    assert_same(*found)


@pytest.mark.parametrize("scaling", ["tensor", "trust_region"])
@pytest.mark.parametrize("rule", ["none", "diagonal", "kronecker"])
def test_tensors_without_gradient_or_with_none_but_zeros_stay_put(rule, scaling):
    """Catches 0 / 0, and a step of rounding that is brought to full size."""
    params, optimizer, slow = scene(settings_of(rule, scaling), second={"weight_decay": 0.7})
    before = [param.detach().clone() for param in params]
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for step in range(3):
        for seed, context in ((step, optimizer.forget_gradient()), (50 + step, optimizer.hessian_refresh(3.0))):
            gradients(params, seed, without=4)
            params[1].grad = torch.zeros_like(params[1])
            if rule != "none" or seed < 50:
                with context:
                    optimizer.step()
        optimizer.step()
    assert_same(params[1].detach(), before[1])
    assert_same(params[4].detach(), before[4])
    assert params[4] not in optimizer.state
    assert all((params[place] != before[place]).any() for place in (0, 2, 3, 6))
    assert all(param.isfinite().all() for param in params)


@pytest.mark.parametrize("scaling", ["tensor", "trust_region"])
def test_a_half_without_any_gradient_leaves_the_step_to_the_other(scaling):
    """Catches rows that are forgotten, whose gradient of zero makes weights that are no numbers."""
    params, twins = make_params(), make_params()
    optimizer = make_soul(params, settings_of("none", scaling, lr=0.03))
    twin = make_soul(twins, settings_of("none", scaling, two=False, lr=0.03))
    for step in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.update_forget_momentum()
        gradients(params, step)
        gradients(twins, step)
        optimizer.step()
        twin.step()
    assert_same([p.detach() for p in params], [p.detach() for p in twins])


def test_a_tensor_that_the_forget_half_alone_reaches_moves():
    """Catches a step that passes over parameters because the retain half gave them no gradient."""
    params, optimizer, slow = scene(settings_of("diagonal", "tensor"))
    before = params[0].detach().clone()
    for step in range(2):
        slow.forget(gradients(params, step))
        optimizer.update_forget_momentum()
        slow.step(gradients(params, 9 + step, without=0))
        optimizer.step()
    assert not optimizer.state[params[0]]["exp_avg"].any() and (params[0] != before).all()
    np.testing.assert_allclose(numbers(params[0]), slow.tensors[0].theta, **ROUNDING)


def test_the_forget_gradient_moves_nothing_and_cannot_be_nested():
    """Catches a fold that steps, decays or counts, one that stays on after an error, a gradient in two places."""
    params = make_params()
    optimizer = make_soul(params, settings_of("diagonal", "tensor", lr=0.1, weight_decay=0.5))
    gradients(params, 0)
    optimizer.update_hessian(2.0)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    states = [{name: value.clone() for name, value in optimizer.state[param].items()} for param in params]
    gradients(params, 1)
    with optimizer.forget_gradient():
        optimizer.step()
        for nested in (optimizer.forget_gradient, lambda: optimizer.hessian_refresh(1.0)):
            with pytest.raises(ValueError, match="nested"), nested():
                pass
    with pytest.raises(ValueError, match="nested"), optimizer.hessian_refresh(1.0), optimizer.forget_gradient():
        pass
    assert_same([param.detach() for param in params], before)
    for param, old in zip(params, states):
        new = optimizer.state[param]
        torch.testing.assert_close(new["exp_avg_forget"], 0.1 * param.grad)
        assert_same({**new, "exp_avg_forget": 0}, {**old, "exp_avg_forget": 0})
    with pytest.raises(RuntimeError, match="out of memory"), optimizer.forget_gradient():
        raise RuntimeError("out of memory")
    optimizer.step()
    assert all((param != old).all() for param, old in zip(params, before))


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("rule", ["none", "diagonal", "kronecker"])
@pytest.mark.parametrize("half", ["forget", "retain", "only"])
def test_in_the_trust_region_each_half_costs_one(rule, scope, half):
    """Catches a length over each tensor, without the damping, or of curvature in another unit than the momentum."""
    weights = {"forget": (1.0, 0.0), "retain": (0.0, 1.0), "only": (1.0, 1.0)}[half]
    params, optimizer, slow = scene(settings_of(rule, "trust_region", scope, half != "only"), weights=weights)
    rates = [0.03] * SECOND_GROUP + [0.01] * (len(params) - SECOND_GROUP)
    for step in (0, 1, 3):  # in step 2 the retain half misses a tensor
        for param in params:
            param.data.zero_()  # so that weights are the update, to the last bit
        advance(params, optimizer, slow, step, half != "only")
        tensors = [tensor for tensor in slow.tensors if len(tensor.theta)]
        means = [np.diag(tensor.curvature()).mean() for tensor in tensors]
        if scope == "model":
            means = [np.average(means, weights=[len(tensor.theta) for tensor in tensors])] * len(means)
        updates = [numbers(param).astype(float) / rate for param, rate in zip(params, rates) if param.numel()]
        cost = sum(update @ tensor.damped(mean) @ update for update, tensor, mean in zip(updates, tensors, means))
        assert cost == pytest.approx(1.0, rel=ROUNDING["rtol"])


@pytest.mark.parametrize("rule", ["none", "diagonal", "kronecker"])
def test_under_the_scaling_tensor_every_tensor_moves_by_a_fixed_root_mean_square(rule):
    """Catches a size over all tensors, or one that depends on the curvature; 0.3 before a clip at 1."""
    params, optimizer, _ = scene(settings_of(rule, "tensor", two=False))
    for group in optimizer.param_groups:
        group |= {"lr": 0.5, "weight_decay": 0.0}
    gradients(params, 5000)
    for param in params:
        param.data.zero_()
        param.grad = param.grad.sign()
    if rule != "none":
        optimizer.update_hessian(2.0)
    optimizer.step()
    for param in params:
        update = param.detach() / 0.5
        assert param.numel() == 0 or float(update.square().mean().sqrt()) == pytest.approx(0.3, rel=1e-5)
        assert (update.abs() < 1).all()
    params[0].grad = torch.zeros(SHAPES[0])
    params[0].grad[0, 0] = 1.0
    optimizer, before = make_soul(params, settings_of("none", "tensor", two=False, lr=0.5)), params[0].detach().clone()
    optimizer.step()  # one coordinate of 35 has all: 0.3 sqrt(35) is over the clip
    assert float((params[0].detach() - before)[0, 0]) == pytest.approx(-0.5, rel=1e-6)


@pytest.mark.parametrize("scaling", ["tensor", "trust_region"])
@pytest.mark.parametrize("rule", ["none", "diagonal", "kronecker"])
def test_the_length_of_the_forget_gradient_does_not_matter(rule, scaling):
    """Catches a half that takes the step for itself as its loss grows, which two directions are there to prevent."""
    found = []
    for factor in (1.0, 1000.0):
        params, optimizer, _ = scene(settings_of(rule, scaling))
        for step in range(6):
            if rule != "none" and step in (0, 3):
                gradients(params, 5000 + step)
                optimizer.update_hessian(12.0)
            for param, gradient in zip(params, gradients(params, 700 + step)):
                param.grad = factor * gradient
            optimizer.update_forget_momentum()
            gradients(params, step)
            optimizer.step()
        found.append([param.detach() for param in params])
    torch.testing.assert_close(*found, **ROUNDING)


class HostReads(TorchDispatchMode):
    """Counts the numbers that the host reads out of tensors, for each of which it would wait for a GPU."""

    def __init__(self, optimizer):
        super().__init__()
        # These are kept on the host, whatever the device.
        names = ("step", "hessian_weight")
        self.known = {state[name].data_ptr() for state in optimizer.state.values() for name in names if name in state}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += args[0].data_ptr() not in self.known
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize(
    ("scaling", "scope"), [("tensor", "tensor"), ("trust_region", "tensor"), ("trust_region", "model")]
)
@pytest.mark.parametrize("rule", ["none", "diagonal", "kronecker"])
def test_a_step_reads_nothing_from_the_device(rule, scaling, scope, foreach):
    """Catches a host that waits for the device at every tensor or kernel, where a length, a mean or a size is read."""
    params = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(8)]
    optimizer = make_soul(params, settings_of(rule, scaling, scope, foreach=foreach))
    basis = torch.eye(3), torch.eye(2)
    values = torch.ones(3, 2), torch.zeros(3), torch.zeros(2), torch.zeros(())
    if rule == "kronecker":
        optimizer.matrices = {str(place): KroneckerCurvature(basis[1], basis[0], *values) for place in range(4)}
    for step in range(3):
        gradients(params, step)
        if rule != "none" and step == 0:
            optimizer.update_hessian(2.0)
        optimizer.update_forget_momentum()
        with HostReads(optimizer) as reads:
            optimizer.step()
        # The means of a new Hessian are read once.
        assert reads.count == 0 or step == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rule", "newton"),
        ("scaling", "layer"),
        ("damping_scope", "group"),
        ("scaling", "none"),  # with the rule diagonal, nothing would bound a step
        ("damping", 0.0),
        ("damping", math.nan),
        ("lr", -1.0),
        ("betas", (0.9, 1.0)),
        ("rho", 0.0),
        ("eps", -1.0),
        ("weight_decay", math.nan),
        ("hessian_interval", 0),
        ("state_dtype", torch.float16),
    ],
)
def test_a_bad_setting_is_named(name, value):
    """Catches a setting out of its range that trains on silently, or an error that does not say which it is."""
    with pytest.raises(ValueError, match=f"`{name}`"):
        Soul(make_params(), **{name: value})


def test_what_a_rule_has_no_use_for_is_refused():
    """Catches a forget gradient that is dropped, and a refresh that has nothing to go to."""
    params = make_params()
    gradients(params, 0)
    with pytest.raises(ValueError, match="`two_directions`"), Soul(params).forget_gradient():
        pass
    with pytest.raises(ValueError, match="`rule`='none'"):
        Soul(params, rule="none").update_hessian(1.0)
    with pytest.raises(ValueError, match="`scale`"), Soul(params).hessian_refresh(0.0):
        pass
