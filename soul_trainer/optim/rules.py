"""
What becomes of a momentum before it is a step: one table of rules. Here m is the momentum and h the diagonal of the
Hessian, averaged over refreshes.

| rule | direction | source |
|---|---|---|
| `sophia` | clip(m / (rho max(h, 0) + eps), -1, 1) | Sophia (Liu et al., 2023, arXiv 2305.14342) |
| `none` | m | |
| `diagonal` | m / (h / mean(h) + damping) | |
| `kronecker` | (H / mean(H) + damping)^-1 m, H in K-FAC's eigenbasis | George et al., 2018, arXiv 1806.03884 |

`kronecker` has matrices alone for which factors were measured; the others go by `diagonal`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .partition import Partition, Section, local, numel


# Below any mean that is not zero, as that of a tensor that no row reaches.
LEAST = 1e-30
# Elements of a bucket, whose temporaries a step holds at a time: about four of its size. On a CPU, memory beyond a few
# MiB comes from the system and goes back to it, and each page of it costs a fault. On a GPU, a kernel that takes 256
# MiB is as fast as one that takes the whole model.
LARGEST_BUCKET = {"cpu": 2**20, "others": 2**26}


class MatrixCurvature(Protocol):
    """The curvature of one matrix, such as [`~curvature.kronecker.KroneckerCurvature`]."""

    mean: float

    def precondition(self, matrix: Tensor, damping: float, mean: float | Tensor) -> Tensor:
        """`(H / mean + damping)^-1 matrix`, of the matrix's shape; a mean on the device need not be read."""


@dataclass
class Bucket:
    """
    Parameters that one multi-tensor kernel can take, with their state.

    Args:
        group (`dict`): The parameter group that they are in.
        params (`list[torch.Tensor]`): The parameters.
        states (`list[dict[str, torch.Tensor]]`): This process's parts of their states.
        partition ([`~partition.Partition`]): Says whose sections they hold.
        matrices (`Mapping[str, MatrixCurvature]`): By name of the tensor.
    """

    group: dict
    params: list[Tensor]
    states: list[dict[str, Tensor]]
    partition: Partition
    matrices: Mapping[str, MatrixCurvature] = field(default_factory=dict)

    def __post_init__(self):
        self.owners = [(param, section) for param in self.params for section in self.partition.sections(param)]
        self.places = [place for place, param in enumerate(self.params) for _ in self.partition.sections(param)]

    @property
    def sections(self) -> list[Section]:
        """Those of all parameters, in their order."""
        return [section for _, section in self.owners]

    def state(self, name: str) -> list[Tensor]:
        """A state of each section: views."""
        return [section.of(self.states[place][name]) for place, section in zip(self.places, self.sections)]

    def hessian_means(self) -> list[Tensor]:
        """The mean over the whole tensor of `h`, or of the curvature of a matrix that has one; of each section."""
        sums = self.sum([part.clamp_min(0).sum() for part in floats(self.state("hessian"))])
        means = (sums / numel(self.sections, sums).clamp_min(1)).clamp_min(LEAST).to(self.device)
        matrices = [self.matrices.get(section.name) for section in self.sections]
        return [mean if matrix is None else mean.new_tensor(matrix.mean) for mean, matrix in zip(means, matrices)]

    def hessian_weights(self) -> list[float]:
        """What those means are to be divided by: the weight of the average, if its bias is corrected."""
        weights = []
        for place, section in zip(self.places, self.sections):
            is_average = "hessian_weight" in self.states[place] and section.name not in self.matrices
            corrected = is_average and self.group["bias_correction"]
            weights.append((float(self.states[place]["hessian_weight"]) if corrected else 1.0) or 1.0)
        return weights

    def ones(self) -> list[Tensor]:
        """The means where there is no curvature."""
        return [torch.ones((), device=self.device)] * len(self.sections)

    @property
    def device(self) -> torch.device:
        """Of this process's parts."""
        return self.states[0]["exp_avg"].device

    def weights(self) -> list[Tensor]:
        """The weights of each section: views."""
        return [section.of(local(param)) for param, section in self.owners]

    def sum(self, numbers: list[Tensor]) -> Tensor:
        """A number of each section, summed over the processes that share its tensor: a vector."""
        return self.partition.sum(self.params, torch.stack([number.float() for number in numbers]))


def shares(params: list[Tensor], foreach: bool | None) -> Iterator[list[Tensor]]:
    """
    Splits parameters into the lists that become buckets, the same on every process.

    Args:
        params (`list[torch.Tensor]`): Parameters of one group, device and dtype, in their order.
        foreach (`bool`, *optional*): Whether a list may hold several; see [`Soul`].
    """
    share, size = [], 0
    for param in params:
        largest = LARGEST_BUCKET.get(param.device.type, LARGEST_BUCKET["others"])
        if share and (foreach is False or size + param.numel() > largest):
            yield share
            share, size = [], 0
        share.append(param)
        size += param.numel()
    if share:
        yield share


@dataclass(frozen=True)
class Rule:
    """
    Args:
        directions (`Callable`):
            `(Bucket, momentum, means) -> list[Tensor]`: a new tensor for each section, from the momentum of this name.
        has_hessian (`bool`): Whether it keeps a diagonal, which refreshes are folded into.
        clips (`bool`, *optional*, defaults to `False`): Whether its directions need no scaling.
    """

    directions: Callable[[Bucket, str, list[Tensor]], list[Tensor]]
    has_hessian: bool
    clips: bool = False


def sophia_directions(bucket: Bucket, momentum: str, means: list[Tensor]) -> list[Tensor]:
    """`clip(m / (rho max(h, 0) + eps), -1, 1)`."""
    # rho max(h, 0) + eps
    denominators = torch._foreach_clamp_min(floats(bucket.state("hessian")), 0)
    scales = [curvature_scale(bucket.group, state) for state in bucket.states]
    torch._foreach_mul_(denominators, [scales[place] for place in bucket.places])
    torch._foreach_add_(denominators, bucket.group["eps"])
    # clip(m / denominator, -1, 1)
    directions = torch._foreach_div(floats(bucket.state(momentum)), denominators)
    torch._foreach_clamp_max_(directions, 1)
    torch._foreach_clamp_min_(directions, -1)
    return directions


def plain_directions(bucket: Bucket, momentum: str, means: list[Tensor]) -> list[Tensor]:
    """The momentum itself."""
    return [part.clone() for part in floats(bucket.state(momentum))]


def diagonal_directions(bucket: Bucket, momentum: str, means: list[Tensor]) -> list[Tensor]:
    """`m / (max(h, 0) / mean + damping)`."""
    denominators = torch._foreach_clamp_min(floats(bucket.state("hessian")), 0)
    torch._foreach_div_(denominators, means)
    torch._foreach_add_(denominators, bucket.group["damping"])
    return torch._foreach_div(floats(bucket.state(momentum)), denominators)


def kronecker_directions(bucket: Bucket, momentum: str, means: list[Tensor]) -> list[Tensor]:
    """`(H / mean + damping)^-1 m` of the matrices with factors; the others as [`diagonal_directions`]."""
    directions = list(diagonal_directions(bucket, momentum, means))
    momenta, damping = floats(bucket.state(momentum)), bucket.group["damping"]
    for place, (param, section) in enumerate(bucket.owners):
        matrix = bucket.matrices.get(section.name)
        if matrix is not None:
            precondition = partial(matrix.precondition, damping=damping, mean=means[place])
            directions[place] = bucket.partition.apply(param, section, momenta[place], precondition)
    return directions


RULES: dict[str, Rule] = {
    "sophia": Rule(sophia_directions, has_hessian=True, clips=True),
    "diagonal": Rule(diagonal_directions, has_hessian=True),
    "kronecker": Rule(kronecker_directions, has_hessian=True),
    "none": Rule(plain_directions, has_hessian=False),
}


def curvature_scale(group: dict, state: dict[str, Tensor]) -> float:
    """What `h` is multiplied by: rho, over the weight of the average if its bias is corrected."""
    weight = float(state["hessian_weight"]) if group["bias_correction"] else 1.0
    return group["rho"] / (weight or 1.0)


def floats(parts: list[Tensor]) -> list[Tensor]:
    """In at least float32, whatever they are kept in."""
    return [part if part.dtype in (torch.float32, torch.float64) else part.float() for part in parts]
