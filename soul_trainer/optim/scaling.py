"""
How long a step is: one table of scalings of a half's directions d, before the learning rate. Both make the length of a
gradient irrelevant, so that a forget and a retain half can be added.

| scaling | update | its unit |
|---|---|---|
| `none` | d | the rule's own, which clips |
| `tensor` | clip(0.3 d / rms(d), -1, 1), rms over each tensor | a weight |
| `trust_region` | d / sqrt(sum of d (H + damping) d over all tensors) | the square root of nats a token |

In a trust region no step is predicted to cost more than lr^2 / 2 nats a token of the loss whose curvature H is. Where
there is no curvature, as in a fresh adapter's first matrices, the damping alone holds a step back.
"""

import torch
from torch import Tensor

from .partition import numel
from .rules import LEAST, Bucket


SCALINGS = ("none", "tensor", "trust_region")
# Of the coordinates before the clip, so that one in a thousand of a normal distribution is clipped.
UPDATE_RMS = 0.3


def scale_to_tensors(bucket: Bucket, directions: list[Tensor]) -> list[Tensor]:
    """`clip(0.3 d / rms(d), -1, 1)`, in place; the root mean square is that of the whole tensor, wherever it lies."""
    if not directions:
        return directions
    squares = bucket.sum([norm.square() for norm in torch._foreach_norm(directions)])
    rms = (squares / numel(bucket.sections, squares)).sqrt().clamp_min(LEAST)
    torch._foreach_mul_(directions, list((UPDATE_RMS / rms).to(directions[0].device).unbind()))
    torch._foreach_clamp_max_(directions, 1)
    torch._foreach_clamp_min_(directions, -1)
    return directions


def scale_to_trust_region(buckets: list[Bucket], directions: list[list[Tensor]], momentum: str) -> list[list[Tensor]]:
    """
    `d / sqrt(sum d (H + damping) d)`, in place. As `(H + damping) d` is the momentum m, the sum is that of `m d`, and
    no product with H is needed.

    Args:
        buckets (`list[Bucket]`): All of the optimizer's.
        directions (`list[list[torch.Tensor]]`): Of their sections.
        momentum (`str`): Name of the state that the directions came from.
    """
    totals = []
    for bucket, parts in zip(buckets, directions):
        products = [(part * other).sum() for part, other in zip(parts, bucket.state(momentum))]
        totals += [bucket.sum(products).sum(dtype=torch.float64)] if products else []
    if totals:
        # It stays on the device: to read it, the host would wait for every kernel before it.
        length = sum(total.to(totals[0].device) for total in totals).sqrt().clamp_min(LEAST)
        for parts in filter(None, directions):
            torch._foreach_mul_(parts, length.reciprocal().to(parts[0]))
    return directions
