"""What buckets of parameters are moved by: what a step does, and what a log says of it, in the same functions."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .rules import LEAST, RULES, Bucket
from .scaling import scale_to_tensors, scale_to_trust_region


class Updates:
    """From the state of an optimizer to its updates. It keeps the means of the Hessian until `forget` is called."""

    def __init__(self):
        self._means: dict[tuple[int, ...], list[Tensor]] = {}
        self._model_means: dict[tuple[int, ...], Tensor] = {}

    def forget(self) -> None:
        """To be called when a Hessian has changed."""
        self._means, self._model_means = {}, {}

    def halves(self, buckets: list[Bucket]) -> Iterator[tuple[Bucket, list[list[Tensor]]]]:
        """Each bucket with the scaled directions of its halves, forget first if there are two."""
        if not buckets:
            return
        scaling = buckets[0].group["scaling"]
        names = ("exp_avg_forget", "exp_avg") if buckets[0].group["two_directions"] else ("exp_avg",)
        if scaling != "trust_region":
            for bucket in buckets:
                means = self._tensor_means(bucket)
                halves = [RULES[bucket.group["rule"]].directions(bucket, name, means) for name in names]
                yield bucket, [scale_to_tensors(bucket, half) for half in halves] if scaling == "tensor" else halves
                del halves  # or else two buckets' are there at a time
            return
        if not buckets[0].partition.is_whole({param for bucket in buckets for param in bucket.params}):
            raise ValueError(
                "A trust region is one length over all weights, and the engine steps them in parts. Under DeepSpeed, "
                "set `weight_decay=0`, which makes one parameter group, and `sub_group_size` over their number."
            )
        whole = None if buckets[0].group["damping_scope"] == "tensor" else self._model_mean(buckets)
        halves = []
        for name in names:
            parts = []
            for bucket in buckets:
                means, units = self._tensor_means(bucket), bucket.hessian_weights()
                if whole is not None:
                    means = [whole * unit for unit in units]
                directions = RULES[bucket.group["rule"]].directions(bucket, name, means)
                # The rule divides by H / mean + damping, and here lengths of tensors are compared.
                torch._foreach_div_(directions, [mean / unit for mean, unit in zip(means, units)])
                parts.append(directions)
            halves.append(scale_to_trust_region(buckets, parts, name))
        for bucket, *parts in zip(buckets, *halves):
            yield bucket, parts

    def _tensor_means(self, bucket: Bucket) -> list[Tensor]:
        """The mean of `h`, or of a matrix's curvature, over the whole tensor of each section, as the rule reads it."""
        key = tuple(map(id, bucket.params))
        if key not in self._means:
            self._means[key] = bucket.hessian_means() if RULES[bucket.group["rule"]].has_hessian else bucket.ones()
        return self._means[key]

    def _model_mean(self, buckets: list[Bucket]) -> Tensor:
        """The mean of H over all tensors, which is read from the device once for each Hessian."""
        key = tuple(id(param) for bucket in buckets for param in bucket.params)
        if key in self._model_means:
            return self._model_means[key]
        total = count = 0.0
        for bucket in buckets:
            sizes = [float(section.shape.numel()) for section in bucket.sections]
            means = zip(self._tensor_means(bucket), bucket.hessian_weights(), sizes)
            total += sum(float(mean) / unit * size for mean, unit, size in means)
            count += sum(sizes)
        self._model_means[key] = torch.tensor(max(total / count, LEAST))
        return self._model_means[key]

    @staticmethod
    def joined(bucket: Bucket, halves: list[list[Tensor]]) -> list[Tensor]:
        """The update of each section in the learning rate's unit: the weighted sum of the halves, which is used up."""
        if len(halves) == 1:
            return halves[0]
        forget, retain = halves
        for half, weight in ((forget, bucket.group["forget_weight"]), (retain, bucket.group["retain_weight"])):
            if weight != 1.0:
                torch._foreach_mul_(half, weight)
        torch._foreach_add_(forget, retain)
        return forget

    @torch.no_grad()
    def describe(self, buckets: list[Bucket], rates: list[float]) -> dict[str, dict[str, float]]:
        """
        What the last step did, from the state that it left and by the functions that it went by.

        Args:
            buckets (`list[Bucket]`): Those of the step.
            rates (`list[float]`): The learning rate of each in that step.

        Returns:
            `dict[str, dict[str, float]]`: Of each tensor that moved, by name: `count` of coordinates, how many were
            `clipped` (as a mean over halves), the sum of the `hessian`, and the `squared` update. The same on every
            process.
        """
        figures = {}
        for (bucket, halves), rate in zip(self.halves(buckets), rates):
            limit = float("inf") if bucket.group["scaling"] == "trust_region" else 1.0  # where nothing is clipped
            clipped = [
                torch.stack([(part.abs() >= limit).sum() for part in parts]).float().mean() for parts in zip(*halves)
            ]
            squares = [part.square().sum() for part in self.joined(bucket, halves)]
            hessians = bucket.state("hessian") if RULES[bucket.group["rule"]].has_hessian else None
            sums = {
                "clipped": bucket.sum(clipped),
                "hessian": bucket.sum([part.sum() for part in hessians]) if hessians else torch.zeros(len(clipped)),
                "squared": bucket.sum(squares) * rate**2,
            }
            for place, section in enumerate(bucket.sections):
                figures[section.name] = {
                    "count": float(section.shape.numel()),
                    **{name: float(values[place]) for name, values in sums.items()},
                }
        return figures
