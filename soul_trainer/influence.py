"""
Influence unlearning: one Newton step, or a few, towards the model that was never trained on the rows to forget.

    theta <- theta + (strength / num_steps) (H + damping I)^-1 (1 / n) sum_t grad(-log p_theta(y_t))

for `num_steps` times. t are the answer tokens of the forget rows, whose gradient each step takes at its own weights. n
is the number of answer tokens of the retain rows. H stands for G, the Gauss-Newton matrix of the mean loss per answer
token of the retain rows, at the first weights, or at each step's with `remeasure`.

At a minimum of the loss on all rows the forget gradients are minus the retain gradients, so that one step is Newton's
for the loss on the retain rows alone (Koh and Liang, 2017, arXiv 1703.04730; Izzo et al., 2021, arXiv 2002.10077). It
is the static, one-shot update that SOUL (Jia et al., 2024, arXiv 2404.18239) makes iterative. That a few uphill steps
on the forget rows go far with K-FAC's curvature of the retain rows is the idea of K-FADE (McKinney et al., 2026, arXiv
2602.10568).

    python -m soul_trainer.influence --model DIR --forget forget.jsonl --retain retain.jsonl --output DIR

| `solver` | H |
|---|---|
| `kronecker` | of a linear layer's weight EK-FAC's, in the eigenbasis of K-FAC's factors; else the diagonal |
| `diagonal` | G's diagonal, by Gauss-Newton-Bartlett |
| `conjugate_gradient` | G itself, at each step's weights, by products with vectors |
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor
from transformers.utils import logging

from .batch import IGNORE_INDEX, ForgetRetainBatch
from .curvature import Curvature, check_model
from .curvature.kronecker import KroneckerCurvature
from .curvature.products import (
    conjugate_gradient,
    count_tokens,
    dot,
    gauss_newton_product,
    loss_gradient,
    mean_answer_loss,
    measure_curvature,
    wide_zeros,
)
from .freezing import freeze_parameters
from .reference import eval_mode
from .settings import Count, CountFromZero, Positive, Range, check_choice, check_ranges
from .weights import weights_digest


logger = logging.get_logger(__name__)

SOLVERS = ("kronecker", "diagonal", "conjugate_gradient")
# Grosse et al. (2023, arXiv 2308.03296) damp by a tenth of the mean eigenvalue.
DAMPING_SHARE = 0.1
# What a step may lose without a warning when it is rounded to the weights' dtype.
LOST_SHARE = 0.1
_NO_TOKENS = f"give rows whose `labels` are not all {IGNORE_INDEX}"


@dataclass
class InfluenceArguments:
    """
    The settings of the steps.

    Raises:
        ValueError: If the solver is unknown or a number is out of its range.
    """

    solver: str = field(default="conjugate_gradient", metadata={"help": f"What stands for G: {', '.join(SOLVERS)}."})
    strength: Positive = field(default=1.0, metadata={"help": "Factor of all steps together, > 0; 1 is Newton's."})
    num_steps: Count = field(default=1, metadata={"help": "Steps that share the strength, >= 1."})
    remeasure: bool = field(default=False, metadata={"help": "Whether H is measured again before each step."})
    damping: Positive | None = field(
        default=None,
        metadata={
            "help": "Added to H's diagonal, > 0, in its unit: nats per answer token over the square of a weight. By "
            f"default {DAMPING_SHARE} of the mean of G's diagonal at the first weights."
        },
    )
    max_iterations: Count = field(default=50, metadata={"help": "Most iterations of conjugate gradients, >= 1."})
    tolerance: Annotated[float, Range(above=0, below=1)] = field(
        default=1e-3, metadata={"help": "They end at this residual, as a share of the right side's norm, in (0, 1)."}
    )
    num_draws: Count = field(
        default=1, metadata={"help": "Labels that are sampled for each token in a pass that measures H, >= 1."}
    )
    curvature_rank: Count | None = field(
        default=None, metadata={"help": "With kronecker: eigenvectors kept of each factor, >= 1; default all."}
    )
    trainable_parameters: list[str] | None = field(
        default=None, metadata={"help": "Regular expressions: weights in whose names one is found move; default all."}
    )
    frozen_parameters: list[str] | None = field(
        default=None, metadata={"help": "Regular expressions: weights in whose names one is found stay."}
    )
    seed: CountFromZero = field(
        default=0, metadata={"help": "Of the sampled labels, and of the sample of retain rows."}
    )

    def __post_init__(self):
        check_choice("solver", self.solver, SOLVERS)
        check_ranges(self)


@dataclass
class InfluenceReport:
    """
    What the steps were.

    Attributes:
        num_parameters (`int`): Weights that could move.
        forget_tokens (`int`): Answer tokens of the forget rows.
        retain_tokens (`int`): n.
        num_steps (`int`): Steps that were taken.
        damping (`float`): As it was used.
        kept_share (`float`): The share of the trace of H on the kept eigenvectors of linear layers, in [0, 1].
        residuals (`list[float]`):
            After each iteration of conjugate gradients, the residual's norm over that of the right side; step by step.
        forget_losses (`list[float]`): Nats per answer token before the first step and after each.
        retain_losses (`list[float]`): The same of `retain_batches`; empty without.
        step_norm (`float`): Euclidean norm of the sum of the steps.
        applied_norm (`float`): Of what was left of it in the weights' dtype.
    """

    num_parameters: int
    forget_tokens: int
    retain_tokens: int
    num_steps: int
    damping: float
    kept_share: float
    residuals: list[float]
    forget_losses: list[float]
    retain_losses: list[float]
    step_norm: float
    applied_norm: float


def influence_update(
    model: torch.nn.Module,
    forget_batches: Sequence[ForgetRetainBatch],
    retain_batches: Sequence[ForgetRetainBatch],
    args: InfluenceArguments | None = None,
    num_tokens: int | None = None,
    curvature: Curvature | None = None,
) -> InfluenceReport:
    """
    Moves a model's weights by the influence steps, or leaves them as they were and raises.

    Args:
        model (`torch.nn.Module`): A causal language model, best in float32, in one process. Frozen weights stay.
        forget_batches (`Sequence[ForgetRetainBatch]`): All rows to forget, on the model's device.
        retain_batches (`Sequence[ForgetRetainBatch]`):
            Rows to retain, on the model's device: all, or a sample. With `curvature` it may be empty.
        args ([`InfluenceArguments`], *optional*): The settings.
        num_tokens (`int`, *optional*):
            n, the answer tokens of *all* data that the model is to keep; by default those of `retain_batches` or,
            without, the `num_tokens` of the curvature's metadata.
        curvature ([`~curvature.Curvature`], *optional*):
            H, from [`~curvature.products.measure_curvature`] or a file; by default it is measured of `retain_batches`.

    Returns:
        [`InfluenceReport`]

    Raises:
        ValueError:
            If there are several processes, no answer tokens, no weights that may move, or the curvature is not of
            this model or cannot serve the solver.
        FloatingPointError: If a loss, a product or a step is not finite; rows are named where they are known.
    """
    args = args or InfluenceArguments()
    check_one_process()
    forget_tokens = count_tokens(forget_batches)
    if forget_tokens == 0:
        raise ValueError(f"`forget_batches` hold no answer token: {_NO_TOKENS}.")
    n = _retain_tokens(retain_batches, num_tokens, curvature)
    with eval_mode(model), _movable(model, args) as weights:
        if curvature is not None:
            check_model(curvature, weights_digest(model))
            curvature = _checked(curvature, weights, args)
        elif args.solver != "conjugate_gradient" or args.damping is None:
            curvature = _measured(model, weights, retain_batches, args)
        damping, kept_share = args.damping or _default_damping(curvature), _kept_share(curvature)
        if args.solver == "conjugate_gradient":
            curvature = None  # before there are the vectors of conjugate gradients
        parameters, residuals = list(weights.values()), []
        total, losses = wide_zeros(parameters), [_losses(model, forget_batches, retain_batches)]
        with _put_back_on_error(parameters) as before:
            for number in range(args.num_steps):
                if number and args.remeasure and args.solver != "conjugate_gradient":
                    curvature = None  # the old one need not be there beside the new one
                    curvature = _measured(model, weights, retain_batches, args)
                target = torch._foreach_div(loss_gradient(model, parameters, forget_batches), n)
                step, found = _solve(model, weights, retain_batches, curvature, target, damping, args)
                torch._foreach_add_(total, step, alpha=args.strength / args.num_steps)
                _place(parameters, before, total)
                residuals += found
                try:
                    losses.append(_losses(model, forget_batches, retain_batches))
                except FloatingPointError as error:
                    raise FloatingPointError(f"After step {number + 1}: {error} Lower `strength`.") from None
            step_norm, applied_norm = dot(total, total) ** 0.5, _distance(parameters, before)
    if applied_norm < (1 - LOST_SHARE) * step_norm:
        logger.warning(
            f"Rounded to {parameters[0].dtype}, the step has lost its small entries: its norm is {applied_norm:.3g} "
            f"instead of {step_norm:.3g}. Load the model in float32."
        )
    forget_losses, *others = map(list, zip(*losses))
    return InfluenceReport(
        num_parameters=sum(parameter.numel() for parameter in parameters),
        forget_tokens=forget_tokens,
        retain_tokens=n,
        num_steps=args.num_steps,
        damping=damping,
        kept_share=kept_share,
        residuals=residuals,
        forget_losses=forget_losses,
        retain_losses=others[0] if others else [],
        step_norm=step_norm,
        applied_norm=applied_norm,
    )


def _measured(
    model: torch.nn.Module,
    weights: Mapping[str, Tensor],
    batches: Sequence[ForgetRetainBatch],
    args: InfluenceArguments,
) -> Curvature:
    """H, or of conjugate gradients the diagonal alone."""
    has_matrices = args.solver == "kronecker"
    return measure_curvature(model, weights, batches, has_matrices, args.num_draws, args.curvature_rank, args.seed)


def _solve(
    model: torch.nn.Module,
    weights: Mapping[str, Tensor],
    batches: Sequence[ForgetRetainBatch],
    curvature: Curvature | None,
    target: list[Tensor],
    damping: float,
    args: InfluenceArguments,
) -> tuple[list[Tensor], list[float]]:
    """(H + damping I)^-1 target, and the residuals on the way."""
    if args.solver == "conjugate_gradient":

        def product(vector: list[Tensor]) -> list[Tensor]:
            return gauss_newton_product(model, list(weights.values()), batches, vector)

        step, residuals = conjugate_gradient(product, target, damping, args.max_iterations, args.tolerance)
    else:
        step, residuals = [_precondition(curvature, *item, damping) for item in zip(weights, target)], []
    if not dot(step, step) < float("inf"):
        raise FloatingPointError("The influence step is not finite, and no weight has moved: raise `damping`.")
    return step, residuals


def _precondition(curvature: Curvature, name: str, part: Tensor, damping: float) -> Tensor:
    """(H + damping I)^-1 of one weight, in H's own unit and not, as an optimizer has it, in that of its mean."""
    if name in curvature.matrices:
        return curvature.matrices[name].precondition(part, damping, mean=1.0)
    return part / (curvature.diagonals[name].clamp_min(0.0) + damping)


def _checked(curvature: Curvature, weights: Mapping[str, Tensor], args: InfluenceArguments) -> Curvature:
    """What of a given curvature is of the weights that move, beside them."""
    if args.solver == "conjugate_gradient" or args.remeasure:
        raise ValueError("`curvature` is there already: it serves kronecker and diagonal, without `remeasure`.")
    if args.solver == "kronecker" and not curvature.matrices:
        raise ValueError("`curvature` holds diagonals alone: measure that of matrices, or use the solver diagonal.")
    diagonals, matrices = {}, {}
    for name, weight in weights.items():
        diagonal, matrix = curvature.diagonals.get(name), curvature.matrices.get(name)
        shapes = [None if diagonal is None else tuple(diagonal.shape)]
        if matrix is not None:
            sizes = (len(matrix.output_vectors), len(matrix.input_vectors))
            shapes.append(sizes[::-1] if matrix.transposed else sizes)
        if wrong := [shape for shape in shapes if shape != tuple(weight.shape)]:
            place = "not there" if wrong[0] is None else f"of shape {wrong[0]}"
            raise ValueError(f"The curvature of {name}, of shape {tuple(weight.shape)}, is {place}.")
        diagonals[name] = diagonal.to(weight.device)
        if matrix is not None and args.solver == "kronecker":
            tensors = {key: tensor.to(weight.device) for key, tensor in matrix.tensors().items()}
            there = KroneckerCurvature.from_tensors(tensors, matrix.transposed)
            matrices[name] = there.truncated(args.curvature_rank)
    return Curvature(diagonals, matrices, curvature.metadata)


def _default_damping(curvature: Curvature) -> float:
    diagonals = curvature.diagonals.values()
    total = float(sum(part.sum(dtype=torch.float64) for part in diagonals))
    damping = DAMPING_SHARE * total / sum(part.numel() for part in diagonals)
    if not 0 < damping < float("inf"):
        raise FloatingPointError(f"A tenth of the mean of G's diagonal is {damping}: set `damping` by hand.")
    return damping


def _kept_share(curvature: Curvature | None) -> float:
    if curvature is None or not curvature.matrices:
        return 0.0
    others = [part for name, part in curvature.diagonals.items() if name not in curvature.matrices]
    total = sum(matrix.trace for matrix in curvature.matrices.values()) + float(sum(part.sum() for part in others))
    return sum(float(matrix.values.sum()) for matrix in curvature.matrices.values()) / total if total > 0 else 0.0


def _retain_tokens(batches: Sequence[ForgetRetainBatch], num_tokens: int | None, curvature: Curvature | None) -> int:
    """n."""
    sample_tokens = count_tokens(batches)
    if sample_tokens == 0 and (batches or curvature is None):
        raise ValueError(f"`retain_batches` hold no answer token: {_NO_TOKENS}.")
    if num_tokens is None:
        num_tokens = sample_tokens or curvature.metadata.get("num_tokens")
    if num_tokens is None:
        raise ValueError("The curvature does not say of how many answer tokens it is: set `num_tokens`.")
    if num_tokens < max(sample_tokens, 1):
        raise ValueError(f"`num_tokens`={num_tokens} is less than the {sample_tokens} of `retain_batches`, a part.")
    return num_tokens


def _losses(model: torch.nn.Module, *halves: Sequence[ForgetRetainBatch]) -> list[float]:
    """Of each half that is there, nats per answer token."""
    return [mean_answer_loss(model, half) for half in halves if half]


@contextmanager
def _movable(model: torch.nn.Module, args: InfluenceArguments) -> Iterator[dict[str, torch.nn.Parameter]]:
    """A context in which the weights that stay have no gradients; it gives the others, by name."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        freeze_parameters(model, args.trainable_parameters, args.frozen_parameters)
        yield {name: parameter for name, parameter in trainable.items() if parameter.requires_grad}
    finally:
        for parameter in trainable.values():
            parameter.requires_grad_(True)


@contextmanager
def _put_back_on_error(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """A context that gives copies of the parameters, and puts them back if something goes wrong."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield before
    except BaseException:
        _place(parameters, before)
        raise


@torch.no_grad()
def _place(parameters: list[Tensor], before: list[Tensor], total: Sequence[Tensor | float] | None = None) -> None:
    """Moves the parameters to a sum that was added up in the total's dtype: each of many small steps counts."""
    for parameter, start, part in zip(parameters, before, total or [0.0] * len(before)):
        parameter.copy_(start + part)


@torch.no_grad()
def _distance(parameters: list[Tensor], before: list[Tensor]) -> float:
    return sum(float((new - old).square().sum(dtype=torch.float64)) for new, old in zip(parameters, before)) ** 0.5


def check_one_process() -> None:
    """Raises a `ValueError` under a launcher of several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("Influence unlearning runs in one process: start it without `accelerate launch` or torchrun.")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    from .influence_command import main as command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
