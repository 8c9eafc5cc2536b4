"""
FSDP2: each process holds a part of every parameter, as a DTensor. Two roads lead there: accelerate shards the model
when the Trainer prepares it, or transformers does while loading it, `from_pretrained(..., distributed_config=...)`.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..optim import Partition
from .base import Engine, trained_parameters


class FSDP2Engine(Engine):
    """
    FSDP2. A backward reduces and scatters the gradients, and a step is local, so that a refresh needs nothing more.

    Args:
        accelerator ([`~accelerate.Accelerator`]): The Trainer's.
    """

    shards = True

    def accumulate(self, model: torch.nn.Module, is_last: bool) -> AbstractContextManager:
        """Gradients are reduced with every micro-batch: whole ones would take the memory that sharding saves."""
        return nullcontext()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Says which micro-batch is the last: an adapter beside a sharded model is averaged by a hook that asks."""
        state = self.accelerator.gradient_state
        sync_gradients = state.sync_gradients
        state._set_sync_gradients(is_last)
        super().backward(loss, is_last)
        state._set_sync_gradients(sync_gradients)

    def local(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The local tensors of a state of DTensors."""
        return {key: _local(value) for key, value in state.items()}

    def local_weights(self, model: torch.nn.Module) -> Iterable[Tensor]:
        """The local tensors of the parameters."""
        return [_local(parameter.data) for parameter in trained_parameters(model)]

    def owns(self, parameter: torch.nn.Parameter) -> bool:
        """The first of replicas, where there are some; an adapter beside a sharded model is one on each process."""
        if not isinstance(parameter, DTensor):
            return super().owns(parameter)
        places = zip(parameter.device_mesh.get_coordinate(), parameter.placements)
        return all(coordinate == 0 for coordinate, placement in places if placement.is_replicate())

    def whole(self, parameter: torch.nn.Parameter, part: Tensor) -> Tensor:
        """Gathers the parts, of one parameter."""
        if not isinstance(parameter, DTensor):
            return part
        layout = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
        return DTensor.from_local(part, parameter.device_mesh, parameter.placements, **layout).full_tensor()

    def part(self, parameter: torch.nn.Parameter, whole: Tensor) -> Tensor:
        """Cuts it out, without a word to the other processes, which have the same whole."""
        if not isinstance(parameter, DTensor):
            return whole
        sharded = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return sharded.to_local()

    def holds_whole(self, model: torch.nn.Module) -> bool:
        """Before the Trainer has prepared it, and unless transformers sharded it."""
        return not is_sharded(model)

    def partition(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Partition:
        """As one process's: the sharded parameters, which are those of the optimizer, say how they are spread."""
        reshard(model)
        return super().partition(model, optimizer)

    def forget_gathered(self, model: torch.nn.Module) -> None:
        """Frees the parameters that a forward left gathered, as those of the last module."""
        reshard(model)


def reshard(model: torch.nn.Module) -> None:
    """Puts the sharded parameters back where a forward without a backward left whole ones, as evaluation does."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether a model has sharded parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
