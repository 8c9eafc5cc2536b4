"""`Soul`'s state: dtypes, checkpoints, copies, curvature from elsewhere, and what it says of its last step."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from slow_soul import advance, gradients, make_soul, scene, settings_of
from sophia_scenes import SHAPES, assert_same, make_params, set_gradients, snapshot

from soul_trainer.optim import Soul


# bfloat16 rounds to 2^-9. A momentum remembers ten roundings, of which most cancel, and the Hessian fewer: 2^-7 of the
# way that the weights went in all.
BFLOAT16 = 0.01
ROUNDING = 1e-5  # of float32, as a share of a sum of squares
RULES = ("none", "diagonal", "kronecker")


def run(params, optimizer, steps):
    """Both halves, and refreshes where there is a Hessian."""
    for step in steps:
        if step % 3 == 0 and optimizer.defaults["rule"] != "none":
            set_gradients(params, 5000 + step)
            optimizer.update_hessian(12.0)
        set_gradients(params, 700 + step)
        with optimizer.forget_gradient():
            optimizer.step()
        set_gradients(params, step)
        optimizer.step()


@pytest.mark.parametrize("rule", RULES)
def test_states_in_bfloat16_follow_those_in_float32(rule):
    """Catches a state that is not kept in the asked type, and averages that a product in 8 bits swallows."""
    moved, states = [], []
    names = {"exp_avg", "exp_avg_forget"} | ({"hessian"} if rule != "none" else set())
    for dtype in (torch.float32, torch.bfloat16):
        params, optimizer, _ = scene(settings_of(rule, "tensor", state_dtype=dtype))
        before = [param.detach().clone() for param in params]
        run(params, optimizer, range(8))
        moved.append(torch.cat([(param - old).detach().flatten() for param, old in zip(params, before)]))
        states.append([optimizer.state[param] for param in params])
        assert all(state[name].dtype == dtype for state in states[-1] for name in names - {"hessian"})
        assert all(state["hessian"].dtype == torch.float32 for state in states[-1] if "hessian" in state)
        assert all(state["step"].dtype == torch.float32 for state in states[-1])
    assert 0 < float((moved[1] - moved[0]).norm() / moved[0].norm()) < BFLOAT16
    for wide, narrow in zip(*states):
        for name in names:
            assert float((narrow[name].float() - wide[name]).norm()) <= BFLOAT16 * float(wide[name].norm())


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_a_saved_and_resumed_run_ends_with_the_same_bits(state_dtype, weight_dtype):
    """Catches a forget momentum that a checkpoint lacks, states cast to the weights' type, figures of another past."""
    settings = settings_of("diagonal", "tensor", state_dtype=state_dtype)
    params = [torch.nn.Parameter(param.detach().to(weight_dtype)) for param in make_params()]
    optimizer = make_soul(params, {**settings, "lr": 0.03, "weight_decay": 0.1})
    optimizer.param_groups[0]["forget_weight"] = 0.7
    run(params, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"params": [param.detach() for param in params], "optimizer": optimizer.state_dict()}, file)
    run(params, optimizer, range(5, 11))
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert {"exp_avg", "exp_avg_forget", "hessian"} < set(saved["optimizer"]["state"][0])
    # Into an optimizer that has been used: nothing of its own past may be left.
    others = [torch.nn.Parameter(torch.randn_like(param)) for param in saved["params"]]
    other = make_soul(others, {**settings, "lr": 1.0})
    run(others, other, range(20, 22))
    other.load_state_dict(saved["optimizer"])
    for param, value in zip(others, saved["params"]):
        param.data.copy_(value)
        assert other.state[param]["exp_avg_forget"].dtype == state_dtype
    run(others, other, range(5, 11))
    assert_same(snapshot(others, other), snapshot(params, optimizer))


def deep_copied(optimizer):
    return copy.deepcopy(optimizer)


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("copied", [deep_copied, pickled])
@pytest.mark.parametrize("scaling", ["tensor", "trust_region"])
def test_copies_of_the_optimizer_go_on_as_it_does(copied, scaling):
    """Catches an attribute that a copy lacks, and a copy made inside a forget gradient that never leaves it."""
    params = make_params()
    optimizer = make_soul(params, {**settings_of("diagonal", scaling), "lr": 0.03})
    run(params, optimizer, range(4))
    with optimizer.forget_gradient():
        twin = copied(optimizer)
    twins = twin.param_groups[0]["params"]
    run(params, optimizer, range(4, 9))
    run(twins, twin, range(4, 9))
    assert_same(snapshot(twins, twin), snapshot(params, optimizer))


@pytest.mark.parametrize("scaling", ["tensor", "trust_region"])
@pytest.mark.parametrize("used", [False, True])
def test_a_hessian_from_elsewhere_is_stepped_by_as_one_of_its_own(scaling, used):
    """Catches a mean of the former Hessian that stays, a bias correction of what has no bias, names mixed up."""
    params, twins = make_params(), make_params()
    settings = {**settings_of("diagonal", scaling, two=False), "lr": 0.03}
    optimizer, twin = make_soul(params, settings), make_soul(twins, settings)
    if used:
        for each, own in ((optimizer, params), (twin, twins)):
            gradients(own, 4000)
            each.update_hessian(3.0)
            each.step()
    for param, gradient in zip(twins, gradients(twins, 5000)):
        param.grad = gradient.square()
    twin.update_hessian(1.0, decay=0.0, square=False)
    optimizer.set_hessian({str(place): param.grad.clone() for place, param in enumerate(twins)})
    for step in range(3):
        gradients(params, step)
        gradients(twins, step)
        optimizer.step()
        twin.step()
    assert_same(snapshot(params, optimizer), snapshot(twins, twin))


def test_a_hessian_that_lacks_a_tensor_or_has_another_shape_is_refused():
    """Catches a tensor that is stepped without curvature because a file is of another model."""
    params = make_params(shapes=[(3, 2), (4,)])
    optimizer = make_soul(params, settings_of("diagonal", "tensor"))
    with pytest.raises(ValueError, match="curvature of 1, of shape .4,., is not there"):
        optimizer.set_hessian({"0": torch.ones(3, 2)})
    with pytest.raises(ValueError, match="curvature of 0, of shape .3, 2., is of shape .2, 3."):
        optimizer.set_hessian({"0": torch.ones(2, 3), "1": torch.ones(4)})


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize(
    ("rule", "scaling"),
    [(rule, scaling) for rule in RULES for scaling in ("tensor", "trust_region")] + [("sophia", "none")],
)
def test_describe_says_what_the_step_did(rule, scaling, two):
    """Catches shares of an update that was not made: of one half, without weights, rate, length or damping."""
    params, optimizer, slow = scene(settings_of(rule, scaling, two=two))
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for step in (0, 1, 3):
        for param in params:
            param.data.zero_()  # so that weights are the update, to the last bit
        halves = advance(params, optimizer, slow, step, two)
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 7.0  # as a scheduler does before the step is logged
        before = snapshot(params, optimizer)
        figures = optimizer.describe(rates)
        assert_same(snapshot(params, optimizer), before)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
        assert set(figures) == {str(place) for place in range(len(SHAPES))}
        for place, param in enumerate(params):
            row = figures[str(place)]
            clipped = np.mean([(np.abs(half[place]) >= 1).sum() for half in halves.values()])
            hessian = optimizer.state[param]["hessian"].sum() if rule != "none" else 0.0
            assert row["count"] == param.numel() and row["clipped"] == clipped
            assert row["hessian"] == pytest.approx(float(hessian), rel=ROUNDING)
            assert row["squared"] == pytest.approx(float(param.detach().square().sum()), rel=ROUNDING)


def test_describe_leaves_out_what_the_last_step_left_out():
    """Catches a tensor that is said to have moved again, and that takes from the others' share of a trust region."""
    params = make_params(shapes=[(3,), (4,)])
    optimizer = make_soul(params, {**settings_of("none", "trust_region", two=False), "lr": 1.0})
    gradients(params, 0)
    optimizer.step()
    gradients(params, 1, without=1)
    params[0].data.zero_()
    optimizer.step()
    figures = optimizer.describe([1.0])
    assert set(figures) == {"0"}
    assert figures["0"]["squared"] == pytest.approx(float(params[0].detach().square().sum()), rel=ROUNDING)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_states_are_those_that_the_rule_needs(state_dtype):
    """Catches memory for a Hessian or a second momentum that nothing reads."""
    for rule, two, names in (
        ("none", False, {"step", "exp_avg"}),
        ("none", True, {"step", "exp_avg", "exp_avg_forget"}),
        ("diagonal", True, {"step", "exp_avg", "exp_avg_forget", "hessian", "hessian_weight"}),
        ("sophia", False, {"step", "exp_avg", "hessian", "hessian_weight"}),
    ):
        (param,) = params = make_params(shapes=[(3,)])
        optimizer = Soul(params, rule=rule, two_directions=two, state_dtype=state_dtype)
        gradients(params, 0)
        optimizer.step()
        assert set(optimizer.state[param]) == names


def test_the_state_of_another_optimizer_is_refused():
    """Would catch AdamW's checkpoint under `optim="soul"` in a plain Trainer, which ended in `KeyError: 'hessian'`."""
    params = [torch.nn.Parameter(torch.ones(2, 3))]
    params[0].grad = torch.ones(2, 3)
    adamw = torch.optim.AdamW(params)
    adamw.step()
    optimizer = make_soul(params, settings_of("diagonal", "tensor"))
    with pytest.raises(ValueError, match="state is of another optimizer or `rule`.*'exp_avg_sq'.*no.*'hessian'"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": adamw.state_dict()["state"]})
