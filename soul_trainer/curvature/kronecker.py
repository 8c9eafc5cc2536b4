"""
Curvature of one weight in the eigenbasis of K-FAC's factors, with EK-FAC's second moments (George et al., 2018, arXiv
1806.03884), whole or of the leading eigenvectors only.

The basis is that of A = sum a a^T over a layer's inputs and G = sum g g^T over its output gradients ([`Factors`]); the
curvature of the pair of directions (output i, input j) is the mean over tokens of the squared gradient along it
([`Moments`]). Of all matrices that are diagonal in the basis, this one is the nearest to the Gauss-Newton matrix.

Where the basis keeps only some eigenvectors, pairs fall into four blocks, and all pairs of a block's direction that is
not kept share their mean, so that the trace is right whatever the rank:

|  | input kept | other inputs |
|---|---|---|
| **output kept** | `values` | `output_rest`, one an output |
| **other outputs** | `input_rest`, one an input | `rest_rest`, one number |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .layers import Moments


# Up to this size the CPU decomposes sooner than a GPU; beyond it the CPU takes minutes.
CPU_SIZE = 2048


def eigenbasis(factor_sum: Tensor, count: Tensor | int, rank: int | None = None) -> Tensor:
    """
    The leading eigenvectors `(size, rank)` of a factor `(size, size)`, as columns, the largest eigenvalue first. The
    entry of largest magnitude of each is positive, so that the same factor gives the same basis.

    It is decomposed in the factor's own precision: the error is then that of the sums themselves, rounding as a share
    of the largest eigenvalue. Directions whose eigenvalues are closer than that are found up to a rotation among them,
    and second moments are measured in whichever basis it is.

    Args:
        factor_sum (`torch.FloatTensor` of shape `(size, size)`): A sum of outer products.
        count (`torch.LongTensor` or `int`): How many, so that it is their mean that is decomposed.
        rank (`int`, *optional*): By default all.

    Returns:
        `torch.FloatTensor` of shape `(size, min(rank, size))`: Of the factor's dtype, on its device.

    Raises:
        FloatingPointError: If the factor is not finite.
    """
    mean = factor_sum if len(factor_sum) > CPU_SIZE else factor_sum.cpu()
    mean = mean / max(int(count), 1)
    if not mean.isfinite().all():
        raise FloatingPointError("A factor of the Kronecker curvature is not finite.")
    mean = (mean + mean.T) / 2
    try:
        vectors = torch.linalg.eigh(mean).eigenvectors
    except torch.linalg.LinAlgError:  # it did not converge
        vectors = torch.linalg.eigh(mean.double().cpu()).eigenvectors
    vectors = vectors.flip(1)[:, :rank]
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return (vectors * signs).to(factor_sum).contiguous()


@torch.no_grad()
def truncation_error(input_sum: Tensor, output_sum: Tensor, input_vectors: Tensor, output_vectors: Tensor) -> float:
    """
    What dropping eigenvectors costs, judged by K-FAC's eigenvalues, the products of those of the two factors: the
    Frobenius norm of what changes when all products of a block get its mean, as a share of the norm of all products.
    0 where all eigenvectors are kept. It says nothing of how well K-FAC fits the Gauss-Newton matrix.

    Args:
        input_sum (`torch.FloatTensor` of shape `(in, in)`): [`Factors`]' `inputs`; the scale does not matter.
        output_sum (`torch.FloatTensor` of shape `(out, out)`): [`Factors`]' `outputs`.
        input_vectors (`torch.FloatTensor` of shape `(in, inputs kept)`): Of [`eigenbasis`].
        output_vectors (`torch.FloatTensor` of shape `(out, outputs kept)`): Of [`eigenbasis`].

    Returns:
        `float`: From 0 to 1.
    """
    (top_a, rest_a, spread_a, mean_a), (top_g, rest_g, spread_g, mean_g) = (
        _spectrum(factor, vectors) for factor, vectors in ((input_sum, input_vectors), (output_sum, output_vectors))
    )
    whole = (top_a + rest_a) * (top_g + rest_g)
    # Sums of squared deviations from the mean, block by block; of the last one both factors of a product vary.
    error = top_g * spread_a + top_a * spread_g + rest_a * rest_g - mean_a * mean_g
    return (max(error, 0.0) / whole) ** 0.5 if whole > 0 else 0.0


def _spectrum(factor: Tensor, vectors: Tensor) -> tuple[float, float, float, float]:
    """
    Of a factor's eigenvalues: the sum of squares of those kept, of the others, of the others' deviations from their
    mean, and of that mean in the place of each. The trace and the norm know the sums over all of them.
    """
    factor, vectors = factor.double(), vectors.double()
    kept = (vectors * (factor @ vectors)).sum(0)
    top, num_others = float(kept.square().sum()), len(vectors) - vectors.shape[1]
    if num_others == 0:
        return top, 0.0, 0.0, 0.0
    rest = max(float(factor.square().sum()) - top, 0.0)
    mean = float(factor.trace() - kept.sum()) ** 2 / num_others
    return top, rest, max(rest - mean, 0.0), mean


@dataclass(eq=False)
class KroneckerCurvature:
    """
    The curvature H of the mean loss per token in one weight, a symmetric map of matrices `(out, in)`, >= 0.

    Matrices are taken and given in their own layout, dtype and device.

    Args:
        input_vectors (`torch.FloatTensor` of shape `(in, inputs kept)`): Orthonormal columns.
        output_vectors (`torch.FloatTensor` of shape `(out, outputs kept)`): Orthonormal columns.
        values (`torch.FloatTensor` of shape `(outputs kept, inputs kept)`): Second moments, in squared nats over the
            square of the weight's unit, >= 0.
        output_rest (`torch.FloatTensor` of shape `(outputs kept,)`): Their means over inputs that are not kept.
        input_rest (`torch.FloatTensor` of shape `(inputs kept,)`): Their means over outputs that are not kept.
        rest_rest (`torch.FloatTensor` of shape `()`): Their mean over pairs of which neither is kept.
        transposed (`bool`, *optional*, defaults to `False`): Whether the weight is stored `(in, out)`.
    """

    input_vectors: Tensor
    output_vectors: Tensor
    values: Tensor
    output_rest: Tensor
    input_rest: Tensor
    rest_rest: Tensor
    transposed: bool = False

    def __post_init__(self):
        # A file keeps contiguous tensors, and another layout would round differently before a restart and after it.
        self.input_vectors, self.output_vectors = self.input_vectors.contiguous(), self.output_vectors.contiguous()

    @classmethod
    def from_moments(cls, moments: Moments, num_tokens: int) -> "KroneckerCurvature":
        """
        The curvature from sums over rows.

        Args:
            moments ([`Moments`]): Summed over all rows and processes; its eigenvectors are not copied.
            num_tokens (`int`): The tokens whose losses the gradients were of, over all draws of labels.
        """
        if num_tokens < 1:
            raise ValueError("The rows of the Kronecker curvature hold no answer token.")
        others_a, others_g = (len(v) - v.shape[1] for v in (moments.input_vectors, moments.output_vectors))
        # Differences of sums, which rounding can leave a little below zero; without others there is nothing to share.
        output_rest = moments.output_totals - moments.values.sum(1)
        input_rest = moments.input_totals - moments.values.sum(0)
        rest_rest = moments.total - moments.values.sum() - output_rest.sum() - input_rest.sum()
        output_rest, input_rest, rest_rest = (
            rest.clamp_min(0.0) / (others * num_tokens) if others else torch.zeros_like(rest)
            for rest, others in ((output_rest, others_a), (input_rest, others_g), (rest_rest, others_a * others_g))
        )
        return cls(
            moments.input_vectors,
            moments.output_vectors,
            moments.values / num_tokens,
            output_rest,
            input_rest,
            rest_rest,
            moments.transposed,
        )

    def to(self, device: torch.device | str) -> "KroneckerCurvature":
        """The same on a device."""
        parts = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return self.from_tensors(parts, self.transposed)

    def truncated(self, rank: int | None) -> "KroneckerCurvature":
        """The same with the leading eigenvectors alone; what the others had becomes part of the means."""
        inputs, outputs = self.input_vectors[:, :rank], self.output_vectors[:, :rank]
        before, (kept_g, kept_a) = self._num_others(), (outputs.shape[1], inputs.shape[1])
        others = [len(vectors) - vectors.shape[1] for vectors in (inputs, outputs)]
        if rank is None or others == list(before):
            return self
        dropped_a = self.values[:kept_g, kept_a:].sum(1) + self.output_rest[:kept_g] * before[0]
        dropped_g = self.values[kept_g:, :kept_a].sum(0) + self.input_rest[:kept_a] * before[1]
        values = self.values[:kept_g, :kept_a]
        rest = self.trace - values.sum() - dropped_a.sum() - dropped_g.sum()
        shares = [part / max(number, 1) for part, number in ((dropped_a, others[0]), (dropped_g, others[1]))]
        rest_rest = (rest / max(others[0] * others[1], 1)).clamp_min(0.0)
        return type(self)(inputs, outputs, values, *shares, rest_rest, self.transposed)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for a safetensors file."""
        names = ("input_vectors", "output_vectors", "values", "output_rest", "input_rest", "rest_rest")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], transposed: bool = False) -> "KroneckerCurvature":
        """What [`~KroneckerCurvature.tensors`] gave; the file does not know the layout of the weight."""
        return cls(**tensors, transposed=transposed)

    @property
    def trace(self) -> float:
        """The sum of the second moments of all pairs of directions."""
        others_a, others_g = self._num_others()
        return float(
            self.values.sum()
            + self.output_rest.sum() * others_a
            + self.input_rest.sum() * others_g
            + self.rest_rest * (others_a * others_g)
        )

    @property
    def mean(self) -> float:
        """The mean second moment, which is also the mean of the diagonal in the weight's own basis."""
        return self.trace / (len(self.input_vectors) * len(self.output_vectors))

    @property
    def kept_share(self) -> float:
        """The share of the trace that lies on pairs of kept directions, from 0 to 1; 1 without truncation."""
        trace = self.trace
        return float(self.values.sum()) / trace if trace > 0 else 1.0

    @torch.no_grad()
    def precondition(self, matrix: Tensor, damping: float, mean: float | Tensor | None = None) -> Tensor:
        """
        (H / mean + damping)^-1 applied to a matrix, the weight's gradient or a momentum of it: linear, symmetric and
        positive.

        Args:
            matrix (`torch.FloatTensor` of the weight's shape): What to precondition.
            damping (`float`): > 0, in units of `mean`.
            mean (`float` or `torch.Tensor` of shape `()`, *optional*):
                The curvature that counts as 1, >= 0. By default this weight's own mean, which takes away the
                differences between weights; another one, common to many, keeps them. At 0, that of a weight that no
                gradient has ever reached, the curvature counts as 0. A tensor is not read, so that the host need not
                wait for the device.

        Returns:
            `torch.FloatTensor` of the weight's shape.
        """
        mean = self.mean if mean is None else mean
        if isinstance(mean, Tensor):
            place = None if mean.device.type == "cpu" else self.values.device  # kernels take a number of the host's
            mean = mean.to(place, self.values.dtype)
            scale = torch.where(mean > 0, mean.reciprocal(), 0.0)
        else:
            scale = 1.0 / mean if mean > 0 else 0.0
        return self._apply(matrix, lambda values: 1.0 / (values * scale + damping))

    @torch.no_grad()
    def product(self, matrix: Tensor) -> Tensor:
        """H applied to a matrix of the weight's shape."""
        return self._apply(matrix, lambda values: values)

    def quadratic(self, matrix: Tensor) -> float:
        """<matrix, H matrix>: twice the second-order change of the mean loss per token by a step `matrix`, in nats."""
        matrix = matrix.to(self.values)
        return float((matrix * self.product(matrix)).sum())

    @torch.no_grad()
    def diagonal(self) -> Tensor:
        """The diagonal of H in the weight's own basis, of the weight's shape: what a diagonal estimator estimates."""
        squares_a, squares_g = self.input_vectors.square(), self.output_vectors.square()
        # How much of each coordinate lies in the directions that are not kept.
        rest_a, rest_g = ((1.0 - squares.sum(1)).clamp_min(0.0) for squares in (squares_a, squares_g))
        kept = self.values @ squares_a.T + torch.outer(self.output_rest, rest_a)
        others = squares_a @ self.input_rest + self.rest_rest * rest_a
        dense = squares_g @ kept + torch.outer(rest_g, others)
        return dense.T if self.transposed else dense

    def _num_others(self) -> tuple[int, int]:
        """Input and output directions that are not kept."""
        return tuple(len(vectors) - vectors.shape[1] for vectors in (self.input_vectors, self.output_vectors))

    def _apply(self, matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The map whose eigenvalues are `function` of this one's, applied to a matrix of the weight's shape."""
        whole = (matrix.T if self.transposed else matrix).to(self.values)
        inputs, outputs = self.input_vectors, self.output_vectors
        others_a, others_g = self._num_others()
        right = whole @ inputs
        kept = outputs.T @ right
        result = outputs @ (kept * function(self.values)) @ inputs.T
        if not others_a and not others_g:
            return (result.T if self.transposed else result).to(matrix)
        # A block without directions is left out, or its rounding would be divided by the bare damping.
        output_rest = outputs.T @ whole - kept @ inputs.T
        input_rest = right - outputs @ kept
        if others_a:
            result += outputs @ (output_rest * function(self.output_rest)[:, None])
        if others_g:
            result += (input_rest * function(self.input_rest)) @ inputs.T
        if others_a and others_g:
            rest = whole - outputs @ (kept @ inputs.T + output_rest) - input_rest @ inputs.T
            result += rest * function(self.rest_rest)
        return (result.T if self.transposed else result).to(matrix)
