"""`Soul` on parameters that are no tensors of the model: flat ones that hold parts of several, and DTensors."""

import copy
import threading

import pytest
import torch
from slow_soul import dense_curvature, make_soul, settings_of
from sophia_scenes import assert_same, make_params, set_gradients
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from soul_trainer.engines.deepspeed import FlatPartition
from soul_trainer.optim import Section, Soul


# The same float32 numbers, summed in another order where a tensor is split.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
PADDING = 3  # elements of a flat parameter that belong to no tensor
WHOLE = [("first", (5, 7)), ("second", (6,))]
CASES = [
    (rule, scaling, scope)
    for rule in ("none", "diagonal", "kronecker")
    for scaling, scope in (("tensor", "tensor"), ("trust_region", "tensor"), ("trust_region", "model"))
] + [("sophia", "none", "tensor")]


def flatten(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def cut(flat, bounds):
    """One process's flat parameter: elements `bounds` of all tensors in a row, and padding."""
    return torch.cat([flat[slice(*bounds)], torch.zeros(PADDING)])


def sections_of(bounds):
    """The sections of that parameter: where the tensors overlap it."""
    sections, start = [], 0
    for name, shape in WHOLE:
        size = torch.Size(shape).numel()
        low, high = max(start, bounds[0]), min(start + size, bounds[1])
        count = max(0, high - low)
        place = (low - bounds[0], count) if count else (0, 0)
        sections.append(Section(name, torch.Size(shape), place, low - start if count else 0))
        start += size
    return sections


class Sums:
    """Sums of tensors over processes that are threads, in the order in which each asks."""

    def __init__(self, num_processes):
        self.num_processes, self.barrier = num_processes, threading.Barrier(num_processes, timeout=60)
        self.tensors = [None] * num_processes

    def of(self, process):
        def total(tensor):
            self.tensors[process] = tensor
            self.barrier.wait()
            result = sum(self.tensors[1:], self.tensors[0].clone())
            self.barrier.wait()
            return result

        return total


def train(params, optimizer, gradients_of):
    for step in range(4):
        passes = [(700 + step, optimizer.update_forget_momentum), (step, optimizer.step)]
        if step % 2 == 0 and optimizer.defaults["rule"] != "none":
            passes.insert(0, (5000 + step, lambda: optimizer.update_hessian(12.0)))
        for seed, act in passes:
            for param, gradient in zip(params, gradients_of(seed)):
                param.grad = gradient
            act()


def whole_gradients(seed):
    tensors = make_params(shapes=[shape for _, shape in WHOLE])
    set_gradients(tensors, seed)
    return [tensor.grad for tensor in tensors]


def curvature():
    return {"first": dense_curvature(35, seed=1)}


def separate(settings):
    """The tensors by themselves: weights and the description of the last step."""
    params = make_params(shapes=[shape for _, shape in WHOLE])
    optimizer = make_soul(params, settings)
    optimizer.partition.names = {param: name for param, (name, _) in zip(params, WHOLE)}
    optimizer.matrices = curvature() if settings["rule"] == "kronecker" else {}
    weigh(optimizer)
    train(params, optimizer, whole_gradients)
    return params, optimizer.describe([settings["lr"]])


def weigh(optimizer):
    optimizer.param_groups[0] |= {"forget_weight": 1.5, "retain_weight": 0.5}


def flat_process(settings, bounds, total, found):
    """One process's share of the same."""
    start = flatten(make_params(shapes=[shape for _, shape in WHOLE]))
    param = torch.nn.Parameter(cut(start, bounds))
    optimizer = Soul([param], **settings)
    optimizer.partition = FlatPartition({param: sections_of(bounds)}, total, torch.device("cpu"))
    optimizer.matrices = curvature() if settings["rule"] == "kronecker" else {}
    weigh(optimizer)
    train([param], optimizer, lambda seed: [cut(flatten(whole_gradients(seed)), bounds)])
    found[bounds] = param.detach(), optimizer.describe([settings["lr"]])


def assert_like_separate(settings, found):
    params, figures = separate(settings)
    parts = [found[bounds][0] for bounds in sorted(found)]
    for part in parts:
        assert not part[-PADDING:].any()
    torch.testing.assert_close(torch.cat([part[:-PADDING] for part in parts]), flatten(params), **ROUNDING)
    for _, described in found.values():
        assert set(described) == set(figures)
        for name, row in figures.items():
            assert described[name] == pytest.approx(row, rel=ROUNDING["rtol"])


def case(rule, scaling, scope):
    return {**settings_of(rule, scaling, scope), "lr": 0.03, "weight_decay": 0.1}


@pytest.mark.parametrize(("rule", "scaling", "scope"), CASES)
def test_two_tensors_in_one_flat_parameter_step_as_by_themselves(rule, scaling, scope):
    """Catches a mean or a size over the flat parameter, or over its padding, and a matrix that is not put together."""
    settings, found = case(rule, scaling, scope), {}
    flat_process(settings, (0, 41), lambda tensor: tensor, found)
    assert_like_separate(settings, found)


@pytest.mark.parametrize("middle", [20, 35, 38])
@pytest.mark.parametrize(("rule", "scaling", "scope"), CASES)
def test_two_processes_that_hold_parts_step_as_one(rule, scaling, scope, middle):
    """Catches a mean over the part that is here, sums in another order on another process, a missing last element."""
    settings, found, sums = case(rule, scaling, scope), {}, Sums(2)
    threads = [
        threading.Thread(target=flat_process, args=(settings, bounds, sums.of(process), found))
        for process, bounds in enumerate([(0, middle), (middle, 41)])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert_like_separate(settings, found)


@pytest.mark.parametrize("middle", [20, 35])
def test_a_hessian_from_elsewhere_reaches_the_parts(middle):
    """Catches elements of another process's part, and curvature in the padding."""
    diagonals = {name: torch.rand(shape) for name, shape in WHOLE}
    for bounds in ((0, middle), (middle, 41)):
        param = torch.nn.Parameter(torch.zeros(bounds[1] - bounds[0] + PADDING))
        optimizer = Soul([param], rule="diagonal")
        optimizer.partition = FlatPartition({param: sections_of(bounds)}, lambda tensor: tensor, torch.device("cpu"))
        optimizer.set_hessian(diagonals)
        assert_same(optimizer.state[param]["hessian"], cut(flatten(diagonals.values()), bounds))


@pytest.fixture
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def sharded(tensor, mesh, placement):
    return distribute_tensor(tensor.detach(), mesh, [placement])


@pytest.mark.parametrize(("rule", "scaling", "scope"), CASES)
def test_sharded_tensors_step_as_whole_ones(mesh, rule, scaling, scope):
    """Catches a sum that DTensor takes over the wrong dimension, a replica counted twice, a state of no shard."""
    settings, placements = case(rule, scaling, scope), (Shard(0), Replicate())
    expected, figures = separate(settings)
    start = make_params(shapes=[shape for _, shape in WHOLE])
    params = [torch.nn.Parameter(sharded(tensor, mesh, to)) for tensor, to in zip(start, placements)]
    optimizer = make_soul(params, settings)
    optimizer.partition.names = {param: name for param, (name, _) in zip(params, WHOLE)}
    optimizer.matrices = curvature() if rule == "kronecker" else {}
    weigh(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.partition.names = {param: name for param, (name, _) in zip(params, WHOLE)}
    optimizer.matrices = curvature() if rule == "kronecker" else {}
    train(params, optimizer, lambda seed: [sharded(g, mesh, to) for g, to in zip(whole_gradients(seed), placements)])
    torch.testing.assert_close([p.detach().full_tensor() for p in params], [p.detach() for p in expected], **ROUNDING)
    for name, row in optimizer.describe([settings["lr"]]).items():
        assert row == pytest.approx(figures[name], rel=ROUNDING["rtol"])


def test_a_sharded_tensor_without_gradient_stays_put(mesh):
    """Catches an engine under which weights decay that no loss reaches, as they do not elsewhere."""
    params = [torch.nn.Parameter(sharded(torch.ones(4, 2), mesh, Shard(0))) for _ in range(2)]
    optimizer = Soul(params, rule="none", two_directions=True, lr=0.1, weight_decay=0.5)
    params[0].grad = sharded(torch.ones(4, 2), mesh, Shard(0))
    optimizer.update_forget_momentum()
    optimizer.step()
    assert_same(params[1].detach().full_tensor(), torch.ones(4, 2))
