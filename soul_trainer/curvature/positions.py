"""
What one backward says of one linear layer: its inputs and output gradients, at the positions that have a gradient. All
sums are made of it, at once or later: kept, it takes the place of a second run of the model over the same rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


# What positions that are kept may take on a process, in bytes.
KEPT_BYTES = 2**30
# A symmetric product is made in so many blocks of columns, each down to the diagonal: under two thirds of the work.
GRAM_BLOCKS, LEAST_BLOCK = 4, 64
# Of the largest gradient: what is smaller is none, but the rounding of a zero. A row's first token has such a gradient
# in its query, as it attends to nothing but itself, and whether it is exactly zero depends on the batch.
NO_GRADIENT = 1e-6


class Inputs:
    """
    The inputs of one or more layers that read the same tensor at the same positions, as gate and up projections do.

    What several layers need of them is made once, and dropped by [`~Inputs.forget`].

    Args:
        numbers (`torch.FloatTensor` of shape `(positions, in)`): In the model's own dtype.
        places (`torch.LongTensor` of shape `(positions,)`): Of each in its micro-batch, row by row.
        num_rows (`int`): Rows of the micro-batch.
        row_size (`int`): Positions of a row, used or not.
    """

    def __init__(self, numbers: Tensor, places: Tensor, num_rows: int, row_size: int):
        self.numbers, self.places, self.num_rows, self.row_size = numbers, places, num_rows, row_size
        self._gram: Tensor | None = None
        self._projected: tuple[Tensor, Tensor] | None = None
        self._ends: list[int] | None = None

    def gram(self, dtype: torch.dtype) -> Tensor:
        """The sum of a a^T, `(in, in)`."""
        found = self._gram
        if found is None or found.dtype != dtype:
            size = self.numbers.shape[1]
            found = self._gram = add_gram(self.numbers.new_zeros(size, size, dtype=dtype), self.numbers.to(dtype))
        return found

    def projected(self, vectors: Tensor) -> Tensor:
        """The inputs in a basis `(in, kept)`, `(positions, kept)`."""
        found = self._projected
        if found is None or found[0] is not vectors:
            found = self._projected = vectors, self.numbers.to(vectors.dtype) @ vectors
        return found[1]

    def row_ends(self) -> list[int]:
        """Where the positions of each row end."""
        if self._ends is None:
            rows = self.places.div(self.row_size, rounding_mode="floor")
            self._ends = torch.bincount(rows, minlength=self.num_rows).cumsum(0).tolist()
        return self._ends

    def forget(self) -> None:
        """Drops what was made of the inputs."""
        self._gram = self._projected = None


@dataclass
class Positions:
    """
    Args:
        inputs ([`Inputs`]): Of the layer.
        gradients (`torch.FloatTensor` of shape `(positions, out)`):
            In the layer's outputs, in the model's own dtype; those of 16 bits are yet to be scaled.
        sizes (`torch.FloatTensor` of shape `(positions,)`): The largest entry of each gradient.
        scale (`float`, *optional*, defaults to 1.0): What makes them gradients of the sum of the tokens' losses.
    """

    inputs: Inputs
    gradients: Tensor
    sizes: Tensor
    scale: float = 1.0

    @classmethod
    def used(cls, inputs: Tensor, gradients: Tensor, scale: float = 1.0, others: Inputs | None = None) -> "Positions":
        """
        Leaves out the positions without a gradient: padding, and what no loss reaches.

        Args:
            inputs (`torch.FloatTensor` of shape `(rows, ..., in)`):
                With two dimensions, as an expert gets them from a router, each position is a row.
            gradients (`torch.FloatTensor` of shape `(rows, ..., out)`): In the outputs.
            scale (`float`, *optional*, defaults to 1.0): Of the gradients.
            others ([`Inputs`], *optional*):
                Of another layer that reads the same tensor, which are taken if the positions are the same.
        """
        num_rows, flat_inputs, flat_gradients = len(inputs), inputs.flatten(0, -2), gradients.flatten(0, -2)
        if not flat_gradients.numel():
            places, sizes = torch.arange(0, device=gradients.device), flat_gradients.new_zeros(0)
        else:
            sizes = torch.maximum(flat_gradients.amax(1), -flat_gradients.amin(1))
            places = sizes.nonzero().squeeze(1)  # what is not a number stays, and shows in the sums
        if others is None or not torch.equal(others.places, places):
            others = Inputs(
                flat_inputs.index_select(0, places), places, num_rows, len(flat_inputs) // max(num_rows, 1)
            )
        own = flat_gradients.index_select(0, places)
        if own.element_size() >= 4:  # or rounding would tell
            own, scale = own.mul_(scale), 1.0
        return cls(others, own, sizes.index_select(0, places), scale)

    def scaled_gradients(self, dtype: torch.dtype) -> Tensor:
        """The gradients of the summed loss."""
        gradients = self.gradients.to(dtype)
        return gradients if self.scale == 1.0 else gradients * self.scale

    def is_reached(self) -> Tensor:
        """Which gradients, `(positions,)`, are more than the rounding of a zero; what is not a number is."""
        return ~(self.sizes <= NO_GRADIENT * self.sizes.max())

    def row_groups(self, size: int) -> Iterator["RowGroup"]:
        """All rows, `size` of them at a time."""
        ends = self.inputs.row_ends()
        starts = [0, *ends[:-1]]
        for first in range(0, self.inputs.num_rows, size):
            last = min(first + size, self.inputs.num_rows)
            if starts[first] < ends[last - 1]:
                yield RowGroup(slice(starts[first], ends[last - 1]), self.inputs, first, last - first)


@dataclass
class RowGroup:
    """Consecutive rows, whose positions are `positions` among those of the inputs."""

    positions: slice
    inputs: Inputs
    first: int
    num_rows: int

    def padded(self, numbers: Tensor) -> Tensor:
        """What there is of each position `(positions, size)`, row by row `(rows, longest, size)`; zero elsewhere."""
        own = numbers[self.positions]
        if self.num_rows == 1:
            return own.unsqueeze(0)
        size = self.inputs.row_size
        places = self.inputs.places[self.positions] - self.first * size
        whole = own.new_zeros(self.num_rows * size, own.shape[1]).index_copy_(0, places, own)
        return whole.view(self.num_rows, size, -1)


def add_gram(total: Tensor, numbers: Tensor) -> Tensor:
    """Adds `numbers.T @ numbers` to a symmetric matrix, in place."""
    size = numbers.shape[1]
    num_blocks = max(1, min(GRAM_BLOCKS, size // LEAST_BLOCK))
    bounds = [size * place // num_blocks for place in range(num_blocks + 1)]
    for start, end in zip(bounds, bounds[1:]):
        total[:end, start:end].addmm_(numbers[:, :end].T, numbers[:, start:end])
        total[start:end, :start].copy_(total[:start, start:end].T)
    return total


class KeptPositions:
    """
    Positions of several micro-batches, in the order in which they came, as long as they fit into memory.

    Args:
        limit (`int`): Bytes, >= 0. Beyond them nothing is kept, and what was is dropped.

    Attributes:
        num_bytes (`int`): Of what is kept; inputs that layers share count once.
        fits (`bool`): Whether everything is there.
        num_tokens (`int`): Whose losses the gradients are of.
    """

    def __init__(self, limit: int):
        self.limit, self.num_bytes, self.fits, self.num_tokens = limit, 0, True, 0
        self.positions: list[tuple[str, Positions]] = []

    def add(self, name: str, positions: Positions) -> None:
        """Keeps the positions of a layer."""
        if not self.fits:
            return
        is_new = not self.positions or self.positions[-1][1].inputs is not positions.inputs
        tensors = [positions.gradients, positions.sizes]
        if is_new:
            tensors += [positions.inputs.numbers, positions.inputs.places]
        self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.positions.append((name, positions))
        if self.num_bytes > self.limit:
            self.drop()

    def drop(self) -> None:
        """Frees everything."""
        self.fits, self.positions, self.num_bytes = False, [], 0
