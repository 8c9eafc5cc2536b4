"""
Two passes over the same rows that give Kronecker curvature: first the bases, then the second moments in them. A large
model's matrices go in several groups, two passes each, so that the sums of one group at a time are in memory.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..engines import Engine
from .kronecker import KroneckerCurvature, eigenbasis, truncation_error
from .layers import Factors, Layer, LayerStatistics, Moments


class MatrixPasses:
    """
    The passes that give the Kronecker curvature of linear layers, one after the other, which can stop anywhere and go
    on elsewhere.

    Args:
        groups (`list[dict[str, Layer]]`): Of [`~layers.linear_layers`], whole or split. Without any, there is one
            pass that sums nothing.
        engine ([`~engines.Engine`], *optional*): From [`~engines.make_engine`]; by default one plain process.
        rank (`int`, *optional*): Eigenvectors that are kept of each factor, >= 1; by default all.
        device (`torch.device`, *optional*): Where sums and bases are; by default beside each weight.

    Attributes:
        number (`int`): The passes that are done.
        matrices (`dict[str, KroneckerCurvature]`): Of the groups whose passes are done; the same on every process.
        errors (`dict[str, float]`): By matrix, see [`truncation_error`].

    Example:

        >>> passes = MatrixPasses([linear_layers(model)])
        >>> while not passes.are_done:
        ...     with passes.statistics as statistics:
        ...         ...  # estimates over all rows
        ...     passes.finish_pass()
        >>> passes.matrices
    """

    def __init__(
        self,
        groups: list[dict[str, Layer]],
        engine: Engine | None = None,
        rank: int | None = None,
        device: torch.device | None = None,
    ):
        self.groups, self.engine, self.rank, self.device = groups, engine or Engine(), rank, device
        self.matrices: dict[str, KroneckerCurvature] = {}
        self.errors: dict[str, float] = {}
        self.number = 0
        self.statistics = LayerStatistics(self.group, self._factors())

    @property
    def num_passes(self) -> int:
        """How many there are."""
        return 2 * len(self.groups) or 1

    @property
    def are_done(self) -> bool:
        """Whether all matrices are there."""
        return self.number == self.num_passes

    @property
    def group(self) -> dict[str, Layer]:
        """The layers of the pass at hand."""
        return self.groups[self.number // 2] if self.groups and not self.are_done else {}

    def finish_pass(self) -> None:
        """Adds up over processes, makes bases or matrices of the sums, and gets ready for the next pass."""
        for tensor in self.statistics.tensors():
            tensor.copy_(self.engine.sum(tensor))
        sums, next_sums = self.statistics.accumulators, {}
        if self.number % 2:
            for name, moments in sums.items():
                self.matrices[name] = KroneckerCurvature.from_moments(moments, self.statistics.num_tokens)
        elif self.groups:
            for name in list(sums):
                next_sums[name] = self._moments(name, sums.pop(name))  # the factors' memory is free then
        self.number += 1
        self.statistics = LayerStatistics(self.group, next_sums or self._factors())

    def _factors(self) -> dict[str, Factors]:
        return {name: Factors(layer, self.device) for name, layer in self.group.items()}

    def _moments(self, name: str, factors: Factors) -> Moments:
        bases = [eigenbasis(factor, factors.count, self.rank) for factor in (factors.inputs, factors.outputs)]
        is_cut = any(vectors.shape[0] > vectors.shape[1] for vectors in bases)
        self.errors[name] = truncation_error(factors.inputs, factors.outputs, *bases) if is_cut else 0.0
        return Moments(self.group[name], *bases)

    def state_tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The sums of the pass at hand over all processes, which all must call it, and their bases."""
        bases = {
            f"{name}.{side}": getattr(moments, side)
            for name, moments in self.statistics.accumulators.items()
            if isinstance(moments, Moments)
            for side in ("input_vectors", "output_vectors")
        }
        sums = {name: self.engine.sum(tensor).cpu() for name, tensor in self.statistics.state_tensors().items()}
        return sums, bases

    def load_state(
        self,
        number: int,
        num_tokens: int,
        sums: Mapping[str, Tensor],
        bases: Mapping[str, Tensor],
        matrices: dict[str, KroneckerCurvature],
        errors: dict[str, float],
    ) -> None:
        """
        Takes up where another measurement was.

        Args:
            number (`int`): Its passes that were done.
            num_tokens (`int`): The statistics' in the pass that was not.
            sums (`Mapping[str, torch.Tensor]`): Of [`~MatrixPasses.state_tensors`]; one process goes on with them.
            bases (`Mapping[str, torch.Tensor]`): Likewise.
            matrices (`dict[str, KroneckerCurvature]`): Those that were done.
            errors (`dict[str, float]`): Likewise.
        """
        self.number, self.matrices, self.errors = number, dict(matrices), dict(errors)
        accumulators: dict = {} if number % 2 else self._factors()
        if number % 2:
            for name, layer in self.group.items():
                place = self.device or layer.device
                sides = (bases[f"{name}.{side}"].to(place) for side in ("input_vectors", "output_vectors"))
                accumulators[name] = Moments(layer, *sides)
        self.statistics = LayerStatistics(self.group, accumulators)
        self.statistics.num_tokens = num_tokens
        if self.engine.process_index == 0:  # or they would be added as often as there are processes
            self.statistics.load_state_tensors(sums)


def measure_matrices(
    layers: dict[str, Layer],
    estimate: Callable[[LayerStatistics], None],
    engine: Engine | None = None,
    rank: int | None = None,
    device: torch.device | None = None,
) -> dict[str, KroneckerCurvature]:
    """
    The Kronecker curvature of linear layers, without a stop.

    Args:
        layers (`dict[str, Layer]`): From [`~layers.linear_layers`].
        estimate (`Callable`):
            Makes one or more estimates over all rows with the statistics it is given (see [`estimate_hessian`]). It is
            called twice, and has to draw the same labels or others, as it likes.
        engine ([`~engines.Engine`], *optional*): From [`~engines.make_engine`]; by default one plain process.
        rank (`int`, *optional*): Eigenvectors that are kept of each factor, >= 1; by default all.
        device (`torch.device`, *optional*): Where sums and bases are; by default beside each weight.

    Returns:
        `dict[str, KroneckerCurvature]`: The same on every process.
    """
    passes = MatrixPasses([layers], engine, rank, device)
    while not passes.are_done:
        with passes.statistics as statistics:
            estimate(statistics)
        passes.finish_pass()
    return passes.matrices
