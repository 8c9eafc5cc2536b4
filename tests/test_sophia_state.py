"""Sophia as an optimizer of torch: its state, its groups, its precision, and what it refuses."""

import copy
import io
import math
import pickle

import pytest
import torch
from sophia_scenes import assert_same, make_params, set_gradients, snapshot, train
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from soul_trainer import Sophia


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
        expected = old - 0.03 * Sophia.direction(optimizer.state[param], optimizer.param_groups[0])
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
    assert not optimizer.state.get(still)
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
            (
                Sophia.direction(optimizer.state[param], optimizer.param_groups[0]),
                Sophia.direction(twin.state[other], twin.param_groups[0]),
            ),
        ):
            assert_same(ours.full_tensor() if isinstance(ours, DTensor) else ours, theirs)


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


def test_groups_without_parameters_need_no_match():
    """Would catch a checkpoint that one process cannot load because DeepSpeed, which saved it, drops empty groups."""
    weight = torch.nn.Parameter(torch.ones(3))
    saving = Sophia([{"params": [weight], "weight_decay": 0.1}])
    weight.grad = torch.ones(3)
    saving.step()
    loading = Sophia([{"params": []}, {"params": [torch.nn.Parameter(torch.ones(3))], "weight_decay": 0.3}])
    loading.load_state_dict(saving.state_dict())
    assert [group["weight_decay"] for group in loading.param_groups] == [0.0, 0.1]
    (state,) = loading.state.values()
    assert torch.equal(state["exp_avg"], saving.state[weight]["exp_avg"])
    with pytest.raises(ValueError, match="parameter group"):
        Sophia([torch.nn.Parameter(torch.ones(3))]).load_state_dict(loading.state_dict() | {"param_groups": []})
