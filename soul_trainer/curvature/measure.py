"""
Two passes over the same rows that give Kronecker curvature: first the bases, then the second moments in them. A large
model's matrices go in several groups, two passes each, so that the sums of one group at a time are in memory.

A pass over rows is a forward and a backward of the model. What the first one of a group saw of its layers can be kept
for the second, which then needs no model: [`can_keep`] says of which labels.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from ..engines import Engine
from .kronecker import KroneckerCurvature, eigenbasis, truncation_error
from .layers import Factors, Layer, LayerStatistics, Moments
from .positions import KEPT_BYTES, KeptPositions


# A matrix and the factor of its inputs or of its outputs.
Side = tuple[str, str]


def can_keep(estimator: str) -> bool:
    """
    Whether the second moments may be of the gradients that the bases are of, or need gradients of other labels.

    With true labels, gradients under other signs look alike, and the second moments have the same error. Sampled
    labels are rarely surprising: the few that are would be leading directions, in which their own squares are more
    than twice the expectation.
    """
    return estimator == "empirical_fisher"


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
        keeps (`bool`, *optional*, defaults to `False`):
            Whether the second pass of a group is over the same gradients as the first, see [`can_keep`]. What the
            first one saw is then kept for it, as far as it fits, and the model need not run again.
        limit (`int`, *optional*): Bytes that it may take on each process, >= 0; by default 1 GiB.

    Attributes:
        number (`int`): The passes that are done.
        matrices (`dict[str, KroneckerCurvature]`): Of the groups whose passes are done; the same on every process.
        errors (`dict[str, float]`): By matrix, see [`truncation_error`].

    Example:

        >>> passes = MatrixPasses([linear_layers(model)])
        >>> while not passes.are_done:
        ...     passes.estimate(0, lambda statistics: ...)  # backwards over all rows, in one estimate or several
        ...     passes.finish_pass()
        >>> passes.matrices
    """

    def __init__(
        self,
        groups: list[dict[str, Layer]],
        engine: Engine | None = None,
        rank: int | None = None,
        device: torch.device | None = None,
        keeps: bool = False,
        limit: int | None = None,
    ):
        self.groups, self.engine, self.rank, self.device = groups, engine or Engine(), rank, device
        self.keeps, self.limit = keeps, KEPT_BYTES if limit is None else limit
        self._kept: dict[int, KeptPositions] = {}
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

    def estimate(self, number: int, run: Callable[[LayerStatistics], None]) -> None:
        """
        Adds an estimate to the pass at hand. Every process must call it.

        Args:
            number (`int`): Of the estimate, the same for the same rows in both passes of a group.
            run (`Callable`):
                Makes the estimate with the statistics it is given (see [`estimate_hessian`]). In the second pass it
                is called for what was not kept alone; with `keeps`, it must draw the same labels again.
        """
        kept = self._kept.pop(number, None)
        if kept is not None:
            self.statistics.add_kept(kept)
            return
        is_kept = self.keeps and self.groups and self.number % 2 == 0
        left = self.limit - sum(other.num_bytes for other in self._kept.values())
        with self.statistics as statistics, statistics.keeping(left) if is_kept else nullcontext() as kept:
            run(statistics)
        # A process that lacks it cannot run the model alone: others may have a part of the model, or wait in a sum.
        if is_kept and not self.engine.gather([] if kept.fits else [number]):
            self._kept[number] = kept

    def finish_pass(self) -> None:
        """Adds up over processes, makes bases or matrices of the sums, and gets ready for the next pass."""
        for tensor in self.statistics.tensors():
            tensor.copy_(self.engine.sum(tensor))
        sums, next_sums = self.statistics.accumulators, {}
        if self.number % 2:
            for name, moments in sums.items():
                self.matrices[name] = KroneckerCurvature.from_moments(moments, self.statistics.num_tokens)
        elif self.groups:
            next_sums = self._moments(sums)
        self.number += 1
        self.statistics = LayerStatistics(self.group, next_sums or self._factors())

    def _factors(self) -> dict[str, Factors]:
        return {name: Factors(layer, self.device) for name, layer in self.group.items()}

    def _moments(self, sums: dict[str, Factors]) -> dict[str, Moments]:
        """The next pass's sums in the factors' bases. A factor goes as soon as no basis needs it."""
        moments, errors = {}, {}
        for name, bases in self._bases(sums):
            factors = sums.pop(name)
            moments[name] = Moments(self.group[name], *bases)
            is_cut = any(vectors.shape[0] > vectors.shape[1] for vectors in bases)
            # The same everywhere but for the rounding of different machines.
            errors[name] = truncation_error(factors.inputs, factors.outputs, *bases) if is_cut else 0.0
        self.errors |= errors
        return {name: moments[name] for name in self.group}

    def _bases(self, sums: dict[str, Factors]) -> Iterator[tuple[str, list[Tensor]]]:
        """
        Matrices and the bases of their factors, which are the same on every process: of factors of about one size,
        each process decomposes one.
        """
        sides: dict[str, list[Side]] = {}  # whose factors a matrix has: those of layers that read one tensor are alike
        last = None
        for name, factors in sums.items():
            is_alike = last is not None and factors.has_inputs_of(sums[last])
            sides[name] = [sides[last][0] if is_alike else (name, "inputs"), (name, "outputs")]
            last = name
        todo, bases = list(dict.fromkeys(side for pair in sides.values() for side in pair)), {}
        if self.engine.num_processes > 1:
            todo.sort(key=lambda side: len(getattr(sums[side[0]], side[1])), reverse=True)
        for start in range(0, len(todo), self.engine.num_processes):
            bases |= self._decomposed(todo[start : start + self.engine.num_processes], sums)
            for name in [name for name, pair in sides.items() if all(side in bases for side in pair)]:
                yield name, [bases[side] for side in sides.pop(name)]

    def _decomposed(self, sides: list[Side], sums: dict[str, Factors]) -> dict[Side, Tensor]:
        """The basis of each of at most as many factors as there are processes."""
        own, failures = None, []
        if self.engine.process_index < len(sides):
            name, side = sides[self.engine.process_index]
            try:
                own = eigenbasis(getattr(sums[name], side), sums[name].count, self.rank)
            except FloatingPointError as error:  # while the others wait for the basis
                failures.append(f"{error} It is that of the {side} of {name}.")
        if failures := self.engine.gather(failures):
            raise FloatingPointError(failures[0])
        found = {}
        for place, (name, side) in enumerate(sides):
            factor = getattr(sums[name], side)
            shape = len(factor), min(len(factor), self.rank or len(factor))
            vectors = own if place == self.engine.process_index else factor.new_zeros(shape)
            found[name, side] = self.engine.sum(vectors)  # of one basis and zeros, which changes no bit
        return found

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
        self.number, self.matrices, self.errors, self._kept = number, dict(matrices), dict(errors), {}
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
    keeps: bool = False,
) -> dict[str, KroneckerCurvature]:
    """
    The Kronecker curvature of linear layers, without a stop.

    Args:
        layers (`dict[str, Layer]`): From [`~layers.linear_layers`].
        estimate (`Callable`):
            Makes one or more estimates over all rows with the statistics it is given (see [`estimate_hessian`]). It is
            called twice or, with `keeps`, as often as it must be: it has to draw the same labels then, else others.
        engine ([`~engines.Engine`], *optional*): From [`~engines.make_engine`]; by default one plain process.
        rank (`int`, *optional*): Eigenvectors that are kept of each factor, >= 1; by default all.
        device (`torch.device`, *optional*): Where sums and bases are; by default beside each weight.
        keeps (`bool`, *optional*, defaults to `False`): See [`MatrixPasses`].

    Returns:
        `dict[str, KroneckerCurvature]`: The same on every process.
    """
    passes = MatrixPasses([layers], engine, rank, device, keeps)
    while not passes.are_done:
        passes.estimate(0, estimate)
        passes.finish_pass()
    return passes.matrices
