"""
The gradient of the loss, its Gauss-Newton matrix G (of the mean per answer token), as a diagonal and as products with
vectors, what stands for it to be inverted, and the solution of (G + damping I) x = b.

A vector is a list of tensors of the parameters' shapes, at least float32. Models are without dropout, in one process.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import logging

from ..batch import IGNORE_INDEX, ForgetRetainBatch
from ..log_probs import shift_labels, token_log_probs
from ..optim import Sophia
from .estimators import estimate_hessian, logits_of
from .file import Curvature
from .layers import LayerStatistics, linear_layers
from .measure import measure_matrices


logger = logging.get_logger(__name__)


def loss_gradient(
    model: torch.nn.Module, parameters: list[Tensor], batches: Sequence[ForgetRetainBatch]
) -> list[Tensor]:
    """
    The gradient of the summed loss of all answer tokens.

    Args:
        model (`torch.nn.Module`): Without dropout.
        parameters (`list[torch.Tensor]`): Those of its parameters that have gradients.
        batches (`Sequence[ForgetRetainBatch]`): Rows, however split.

    Returns:
        `list[torch.Tensor]`: Of the parameters' shapes, at least float32, in nats over the unit of a weight.

    Raises:
        FloatingPointError: If the loss of a row is not finite; it is named.
    """
    sums = wide_zeros(parameters)
    for batch in logging.tqdm(batches, desc="Gradient", unit="batch", leave=False):
        losses = _row_losses(model, batch).sum()
        _accumulate(sums, torch.autograd.grad(losses, parameters, materialize_grads=True))
    return sums


@torch.no_grad()
def mean_answer_loss(model: torch.nn.Module, batches: Sequence[ForgetRetainBatch]) -> float:
    """The mean loss per answer token, in nats; see [`loss_gradient`]."""
    return sum(float(_row_losses(model, batch).double().sum()) for batch in batches) / count_tokens(batches)


def gauss_newton_diagonal(
    model: torch.nn.Module,
    parameters: list[Tensor],
    batches: Sequence[ForgetRetainBatch],
    num_draws: int = 1,
    seed: int = 0,
    first_draw: int = 0,
    statistics: LayerStatistics | None = None,
) -> list[Tensor]:
    """
    The Gauss-Newton-Bartlett estimate of the diagonal, the mean of estimates of single rows, weighted by their answer
    tokens: the mean of many squares scatters less than the square of their sum, and knows nothing of batches.

    Args:
        model (`torch.nn.Module`): Without dropout.
        parameters (`list[torch.Tensor]`): Those of its parameters that have gradients.
        batches (`Sequence[ForgetRetainBatch]`): Rows, however split.
        num_draws (`int`, *optional*, defaults to 1): Labels that are sampled for each token.
        seed (`int`, *optional*, defaults to 0): Of the sampled labels.
        first_draw (`int`, *optional*, defaults to 0): Draws of other numbers sample other labels.
        statistics ([`~layers.LayerStatistics`], *optional*): Entered: the same backwards add to its sums.

    Returns:
        `list[torch.Tensor]`: Of the parameters' shapes, at least float32, >= 0.

    Raises:
        FloatingPointError: If the loss of a row is not finite; it is named.
    """
    optimizer, means = Sophia(parameters), wide_zeros(parameters)
    num_tokens = num_draws * count_tokens(batches)
    rows = [row for row in _rows(batches) if count_tokens([row])]
    for draw in range(first_draw, first_draw + num_draws):
        for row in logging.tqdm(rows, desc="Curvature", unit="row", leave=False):
            estimate_hessian(model, optimizer, [row], seed=seed, draw=draw, decay=0.0, statistics=statistics)
            for parameter, mean in zip(parameters, means):
                if state := optimizer.state[parameter]:
                    mean.add_(state["hessian"], alpha=count_tokens([row]) / num_tokens)
                    state["hessian"].zero_()  # or a row that does not use the weight would count it again
    return means


def measure_curvature(
    model: torch.nn.Module,
    weights: Mapping[str, Tensor],
    batches: Sequence[ForgetRetainBatch],
    has_matrices: bool = True,
    num_draws: int = 1,
    rank: int | None = None,
    seed: int = 0,
) -> Curvature:
    """
    What stands for G where it is to be inverted: the curvature of linear layers, and the diagonal.

    Args:
        model (`torch.nn.Module`): Without dropout; only `weights` have gradients.
        weights (`Mapping[str, torch.Tensor]`): The parameters that train, by name.
        batches (`Sequence[ForgetRetainBatch]`): Rows, however split.
        has_matrices (`bool`, *optional*, defaults to `True`): Whether linear layers have one, which takes two passes.
        num_draws (`int`, *optional*, defaults to 1): Labels that are sampled for each token in a pass.
        rank (`int`, *optional*): Eigenvectors that are kept of each factor, >= 1; by default all.
        seed (`int`, *optional*, defaults to 0): Of the sampled labels.

    Returns:
        [`Curvature`]: Of all `weights`; its metadata says `num_tokens`.
    """
    parameters, passes = list(weights.values()), []

    def estimate(statistics: LayerStatistics | None = None) -> None:
        # Other labels in the second pass: in a basis of the same ones the leading directions would look too steep.
        first = num_draws * len(passes)
        passes.append(gauss_newton_diagonal(model, parameters, batches, num_draws, seed, first, statistics))

    layers = linear_layers(model) if has_matrices else {}
    matrices = measure_matrices(layers, estimate, rank=rank) if layers else {}
    if not layers:
        estimate()
    diagonal = passes[0]
    for other in passes[1:]:
        _accumulate(diagonal, other)
    torch._foreach_div_(diagonal, len(passes))
    return Curvature(dict(zip(weights, diagonal)), matrices, {"num_tokens": count_tokens(batches)})


def gauss_newton_product(
    model: torch.nn.Module,
    parameters: list[Tensor],
    batches: Sequence[ForgetRetainBatch],
    vectors: list[Tensor],
) -> list[Tensor]:
    """
    G v = (1 / n) sum_t J_t' (diag(p_t) - p_t p_t') J_t v over answer tokens, with J_t the derivative of a token's
    logits. J v is the derivative of J' u in u, so that the same reverse mode gives both and G is symmetric; forward
    mode would not know of `padding_idx`.

    Args:
        model (`torch.nn.Module`): Without dropout.
        parameters (`list[torch.Tensor]`): Those of its parameters that have gradients.
        batches (`Sequence[ForgetRetainBatch]`): Rows, however split.
        vectors (`list[torch.Tensor]`): Of the parameters' shapes.

    Returns:
        `list[torch.Tensor]`: Of the parameters' shapes, at least float32.
    """
    num_tokens, products = count_tokens(batches), wide_zeros(parameters)
    for batch in logging.tqdm(batches, desc="Conjugate gradients", unit="batch", leave=False):
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
            scores = logits_of(model, batch)[shift_labels(batch["labels"]) != IGNORE_INDEX]
            weights = torch.zeros_like(scores, requires_grad=True)
            pulled = torch.autograd.grad(scores, parameters, weights, create_graph=True, materialize_grads=True)
            slope = sum((gradient * vector).sum() for gradient, vector in zip(pulled, vectors))
            (pushed,) = torch.autograd.grad(slope, weights, retain_graph=True)
            pushed = pushed.to(products[0].dtype)
            probs = scores.detach().to(products[0].dtype).softmax(1)
            curved = probs * (pushed - (probs * pushed).sum(1, keepdim=True)) / num_tokens
            _accumulate(
                products, torch.autograd.grad(scores, parameters, curved.to(scores.dtype), materialize_grads=True)
            )
    return products


def conjugate_gradient(
    product: Callable[[list[Tensor]], list[Tensor]],
    target: list[Tensor],
    damping: float,
    max_iterations: int = 50,
    tolerance: float = 1e-3,
) -> tuple[list[Tensor], list[float]]:
    """
    Solves (G + damping I) x = target.

    Args:
        product (`Callable`): Multiplies G, symmetric and positive semidefinite, with a vector.
        target (`list[torch.Tensor]`): The right side.
        damping (`float`): > 0.
        max_iterations (`int`, *optional*, defaults to 50): After which it ends with a warning.
        tolerance (`float`, *optional*, defaults to 1e-3): It ends at this residual, as a share of the target's norm.

    Returns:
        `tuple[list[torch.Tensor], list[float]]`: x, and the share after each iteration.

    Raises:
        FloatingPointError: If a product is not finite, or says that G is not positive semidefinite.
    """
    solution = [torch.zeros_like(part) for part in target]
    residual, direction = [part.clone() for part in target], [part.clone() for part in target]
    squared_target = squared = dot(target, target)
    if not squared < float("inf"):
        raise FloatingPointError("The right side of the linear system is not finite: load the model in float32.")
    residuals: list[float] = []
    while squared > tolerance**2 * squared_target:
        if len(residuals) == max_iterations:
            logger.warning(
                f"Conjugate gradients stop after `max_iterations`={max_iterations} at a residual of "
                f"{residuals[-1]:.2g}, not `tolerance`={tolerance}: allow more of them, or raise `damping`={damping}."
            )
            break
        image = product(direction)
        torch._foreach_add_(image, direction, alpha=damping)
        curvature = dot(direction, image)
        if not 0 < curvature < float("inf"):
            raise FloatingPointError(
                f"Conjugate gradients met a curvature of {curvature} in iteration {len(residuals) + 1}: raise "
                f"`damping`={damping}, or load the model in float32."
            )
        torch._foreach_add_(solution, direction, alpha=squared / curvature)
        torch._foreach_sub_(residual, image, alpha=squared / curvature)
        before, squared = squared, dot(residual, residual)
        torch._foreach_mul_(direction, squared / before)
        torch._foreach_add_(direction, residual)
        residuals.append((squared / squared_target) ** 0.5)
    return solution, residuals


def count_tokens(batches: Sequence[ForgetRetainBatch]) -> int:
    """The answer tokens of batches."""
    return sum(int((shift_labels(batch["labels"]) != IGNORE_INDEX).sum()) for batch in batches)


def dot(first: list[Tensor], second: list[Tensor]) -> float:
    """The inner product of two vectors, summed in float64."""
    return float(sum((left * right).sum(dtype=torch.float64) for left, right in zip(first, second)))


def _row_losses(model: torch.nn.Module, batch: ForgetRetainBatch) -> Tensor:
    losses = -token_log_probs(logits_of(model, batch), shift_labels(batch["labels"])).sum(1)
    if bad_rows := batch["row"][~losses.isfinite()].tolist():
        raise FloatingPointError(f"The loss is not finite at the rows {bad_rows}.")
    return losses


def wide_zeros(parameters: list[Tensor]) -> list[Tensor]:
    """A vector of zeros."""
    return [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]


def _accumulate(sums: list[Tensor], parts: Sequence[Tensor]) -> None:
    for total, part in zip(sums, parts):
        total += part


def _rows(batches: Sequence[ForgetRetainBatch]) -> Iterator[ForgetRetainBatch]:
    """Each row as a batch, without its padding."""
    for batch in batches:
        for place, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            yield {
                key: value[place : place + 1, :length] if value.dim() == 2 else value[place : place + 1]
                for key, value in batch.items()
            }
