"""Two passes over the same rows that give Kronecker curvature: first the bases, then the second moments in them."""

from collections.abc import Callable

import torch

from ..engines import Engine
from .kronecker import KroneckerCurvature, eigenbasis
from .layers import Factors, Layer, LayerStatistics, Moments


def measure_matrices(
    layers: dict[str, Layer],
    estimate: Callable[[LayerStatistics], None],
    engine: Engine | None = None,
    rank: int | None = None,
    device: torch.device | None = None,
) -> dict[str, KroneckerCurvature]:
    """
    The Kronecker curvature of linear layers.

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
    engine = engine or Engine()
    factors = {name: Factors(layer, device) for name, layer in layers.items()}
    _pass(layers, factors, estimate, engine)
    moments = {}
    for name, layer in layers.items():
        sums = factors.pop(name)  # whose memory is free once its bases are there
        bases = (eigenbasis(sums.inputs, sums.count, rank), eigenbasis(sums.outputs, sums.count, rank))
        moments[name] = Moments(layer, *bases)
    num_tokens = _pass(layers, moments, estimate, engine)
    return {name: KroneckerCurvature.from_moments(found, num_tokens) for name, found in moments.items()}


def _pass(
    layers: dict[str, Layer],
    sums: dict[str, Factors] | dict[str, Moments],
    estimate: Callable[[LayerStatistics], None],
    engine: Engine,
) -> int:
    """Adds up over rows and processes; the tokens whose losses that took."""
    with LayerStatistics(layers, sums) as statistics:
        estimate(statistics)
    for tensor in statistics.tensors():
        tensor.copy_(engine.sum(tensor))
    return statistics.num_tokens
