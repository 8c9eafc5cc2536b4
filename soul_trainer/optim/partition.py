"""
Which part of which tensor of the model each parameter of an optimizer holds here: what a figure of a whole tensor, or
a product with a whole matrix, must know. The parts of a DTensor say it themselves; an engine that flattens parameters
gives a [`Partition`] of its own.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor


@dataclass(frozen=True)
class Section:
    """
    The part of one tensor of the model that a parameter of the optimizer holds here.

    Args:
        name (`str`): The tensor's name in the model.
        shape (`torch.Size`): Of the whole tensor.
        bounds (`tuple[int, int]`, *optional*):
            First element and number of elements in the flattened parameter, which may be none; by default the
            parameter is the tensor, or the local part of it.
        offset (`int`, *optional*, defaults to 0): With `bounds`, the first element in the flattened tensor.
    """

    name: str
    shape: torch.Size
    bounds: tuple[int, int] | None = None
    offset: int = 0

    def of(self, state: Tensor) -> Tensor:
        """The section of a local tensor that has the parameter's shape: a view."""
        return state if self.bounds is None else state.flatten().narrow(0, *self.bounds)


class Partition:
    """
    Each parameter is one tensor of the model, whole or as a DTensor.

    Args:
        names (`dict[torch.Tensor, str]`, *optional*): Of parameters; those without one are numbered as they are met.
    """

    def __init__(self, names: dict[Tensor, str] | None = None):
        self.names = names or {}

    def sections(self, param: Tensor) -> list[Section]:
        """The sections of a parameter, the same tensors in the same order on every process."""
        name = self.names.setdefault(param, str(len(self.names)))
        return [Section(name, param.shape)]

    def layout(self, param: Tensor) -> tuple | None:
        """What parameters must share to be summed in one call: how they are spread over processes."""
        return (param.device_mesh, param.placements) if isinstance(param, DTensor) else None

    def is_whole(self, params: set[Tensor]) -> bool:
        """Whether a step of these parameters is one of the whole model, as far as it has a gradient."""
        return True

    def sum(self, params: list[Tensor], numbers: Tensor) -> Tensor:
        """
        Sums what each process says of its sections.

        Args:
            params (`list[torch.Tensor]`): Parameters of one layout.
            numbers (`torch.Tensor`): The same shape on every process.

        Returns:
            `torch.Tensor` of the shape of `numbers`, the same on every process.
        """
        layout = self.layout(params[0])
        if layout is None:
            return numbers
        mesh, placements = layout
        parts = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
        return DTensor.from_local(numbers, mesh, parts, run_check=False).full_tensor()

    def part(self, param: Tensor, section: Section, whole: Tensor) -> Tensor:
        """This process's part of a tensor of the section's shape, which every process has whole."""
        if isinstance(param, DTensor):
            return distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None).to_local()
        return whole

    def params(self, groups: list[dict]) -> list[Tensor]:
        """The parameters of the optimizer's groups, in their order."""
        return [param for group in groups for param in group["params"]]

    def apply(self, param: Tensor, section: Section, part: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """
        A function of the whole tensor, of which each process gets its own part. Every process must call it.

        Args:
            param (`torch.Tensor`): That holds the section.
            section ([`Section`]): Of the tensor.
            part (`torch.Tensor`): What is here of it.
            function (`Callable`): `(whole) -> whole`, of the tensor's shape.

        Returns:
            `torch.Tensor` of the shape of `part`.
        """
        if not isinstance(param, DTensor):
            return function(part.view(section.shape)).view_as(part)
        layout = {"shape": param.shape, "stride": param.stride(), "run_check": False}
        whole = DTensor.from_local(part, param.device_mesh, param.placements, **layout).full_tensor()
        return self.part(param, section, function(whole))


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def numel(sections: Iterable[Section], like: Tensor) -> Tensor:
    """How many elements the whole tensors have: a vector beside `like`."""
    return torch.tensor([float(section.shape.numel()) for section in sections], device=like.device)
