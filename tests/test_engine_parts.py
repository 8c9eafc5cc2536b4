"""Who counts which weights, and which part of a tensor a process holds, in a world of four that is only pretended."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from soul_trainer.engines import Engine
from soul_trainer.engines.fsdp import FSDP2Engine


@pytest.fixture(params=range(4))
def rank(request):
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=4)
    yield request.param
    torch.distributed.destroy_process_group()


class Process:
    """What an engine asks an accelerator for."""

    num_processes, device = 4, torch.device("cpu")

    def __init__(self, rank: int):
        self.process_index = rank


def dtensor(local, mesh, placements, **layout):
    """Not made an `nn.Parameter`, for which torch would find the mesh of an earlier rank in its cache."""
    return DTensor.from_local(local, mesh, placements, run_check=False, **layout)


def test_a_weight_is_counted_once_whoever_holds_it(rank):
    """Would catch replicas of a hybrid sharding, or adapters beside it, that weigh more in a mask or a norm."""
    engine = FSDP2Engine(Process(rank))
    hybrid = dtensor(torch.ones(2, 3), init_device_mesh("cpu", (2, 2)), [Replicate(), Shard(0)])
    assert engine.owns(hybrid) == (rank < 2)  # ranks 2 and 3 hold the same as 0 and 1
    assert engine.owns(dtensor(torch.ones(1, 3), init_device_mesh("cpu", (4,)), [Shard(0)]))
    adapter = torch.nn.Parameter(torch.ones(2))
    assert engine.owns(adapter) == Engine(Process(rank)).owns(adapter) == (rank == 0)


def test_a_process_cuts_out_its_part_of_a_mask(rank):
    """Would catch rows of another process at an uneven end, and a process beyond it that has none."""
    engine, whole = FSDP2Engine(Process(rank)), torch.arange(15).view(5, 3)
    num_rows = max(0, min(2, 5 - 2 * rank))
    layout = {"shape": torch.Size((5, 3)), "stride": (3, 1)}
    parameter = dtensor(torch.zeros(num_rows, 3), init_device_mesh("cpu", (4,)), [Shard(0)], **layout)
    part = engine.part(parameter, whole)
    assert len(part) == num_rows and part.equal(whole[2 * rank : 2 * rank + 2])
    assert engine.part(torch.nn.Parameter(torch.zeros(5, 3)), whole) is whole
