"""
Influence unlearning: one Newton step towards the model that was never trained on the rows to forget.

    theta + strength * (G + damping I)^-1 * (1 / n) sum_t grad(-log p(y_t))        t: answer tokens of the forget rows

G is the Gauss-Newton matrix of the mean loss per answer token of the retain rows, and n their number of answer tokens.
At a minimum of the loss on all rows the forget gradients are minus the retain gradients, so that this is the Newton
step of the loss on the retain rows alone (Koh and Liang, 2017, arXiv 1703.04730; Izzo et al., 2021, arXiv 2002.10077).
It is the static, one-shot update that SOUL (Jia et al., 2024, arXiv 2404.18239) makes iterative.

    python -m soul_trainer.influence --model DIR --forget forget.jsonl --retain retain.jsonl --output DIR

| `solver` | G | float32 numbers for each weight that moves, besides the weight |
|---|---|---|
| `diagonal` | its diagonal, by Gauss-Newton-Bartlett | 7 |
| `conjugate_gradient` | itself, by products with vectors; by default the diagonal too, for the damping | 8 |
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset, load_dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedModel
from transformers.utils import logging

from .batch import IGNORE_INDEX, ForgetRetainBatch
from .collator import UnlearnCollator
from .formats import longest_row, prepare
from .freezing import freeze_parameters
from .gauss_newton import (
    conjugate_gradient,
    count_tokens,
    dot,
    gauss_newton_diagonal,
    gauss_newton_product,
    loss_gradient,
)
from .records import RUN_FILE, write_whole
from .reference import eval_mode
from .settings import check_at_least, check_choice


logger = logging.get_logger(__name__)

SOLVERS = ("diagonal", "conjugate_gradient")
# Grosse et al. (2023, arXiv 2308.03296) damp by a tenth of the mean eigenvalue.
DAMPING_SHARE = 0.1
# What a step may lose without a warning when it is rounded to the weights' dtype.
LOST_SHARE = 0.1


@dataclass
class InfluenceArguments:
    """
    The settings of the step.

    Raises:
        ValueError: If the solver is unknown or a number is out of its range.
    """

    solver: str = field(default="conjugate_gradient", metadata={"help": f"How G is inverted: {', '.join(SOLVERS)}."})
    strength: float = field(default=1.0, metadata={"help": "Factor of the step, > 0; 1 is the Newton step."})
    damping: float | None = field(
        default=None,
        metadata={
            "help": "Added to G's diagonal, > 0, in its unit: nats per answer token over the square of a weight. By "
            f"default {DAMPING_SHARE} of the diagonal's mean."
        },
    )
    max_iterations: int = field(default=50, metadata={"help": "Most iterations of conjugate gradients, >= 1."})
    tolerance: float = field(
        default=1e-3, metadata={"help": "They end at this residual, as a share of the right side's norm, in (0, 1)."}
    )
    num_draws: int = field(default=1, metadata={"help": "Labels that are sampled for each token's diagonal, >= 1."})
    trainable_parameters: list[str] | None = field(
        default=None, metadata={"help": "Regular expressions: weights in whose names one is found move; default all."}
    )
    frozen_parameters: list[str] | None = field(
        default=None, metadata={"help": "Regular expressions: weights in whose names one is found stay."}
    )
    seed: int = field(default=0, metadata={"help": "Of the sampled labels, and of the sample of retain rows."})

    def __post_init__(self):
        check_choice("solver", self.solver, SOLVERS)
        for name in ("strength", "damping"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"`{name}` must be a finite number > 0, but it is {value}.")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"`tolerance` must be in (0, 1), but it is {self.tolerance}.")
        check_at_least(1, max_iterations=self.max_iterations, num_draws=self.num_draws)


@dataclass
class InfluenceReport:
    """
    What a step was.

    Attributes:
        num_parameters (`int`): Weights that could move.
        forget_tokens (`int`): Answer tokens of the forget rows.
        retain_tokens (`int`): n.
        damping (`float`): As it was used.
        residuals (`list[float]`):
            After each iteration of conjugate gradients, the residual's norm over that of the right side.
        step_norm (`float`): Euclidean norm of the step.
        applied_norm (`float`): Of what was left of it in the weights' dtype.
    """

    num_parameters: int
    forget_tokens: int
    retain_tokens: int
    damping: float
    residuals: list[float]
    step_norm: float
    applied_norm: float


def influence_update(
    model: torch.nn.Module,
    forget_batches: Sequence[ForgetRetainBatch],
    retain_batches: Sequence[ForgetRetainBatch],
    args: InfluenceArguments | None = None,
    num_tokens: int | None = None,
) -> InfluenceReport:
    """
    Moves a model's weights by the influence step, or leaves them as they were and raises.

    Args:
        model (`torch.nn.Module`): A causal language model, best in float32, in one process. Frozen weights stay.
        forget_batches (`Sequence[ForgetRetainBatch]`): All rows to forget, on the model's device.
        retain_batches (`Sequence[ForgetRetainBatch]`): Rows to retain, on the model's device: all, or a sample.
        args ([`InfluenceArguments`], *optional*): The settings.
        num_tokens (`int`, *optional*):
            n, the answer tokens of *all* data that the model is to keep; by default those of `retain_batches`.

    Returns:
        [`InfluenceReport`]

    Raises:
        ValueError: If there are several processes, no answer tokens, or no weights that may move.
        FloatingPointError: If a loss, a product or the step is not finite; rows are named where they are known.
    """
    args = args or InfluenceArguments()
    _check_one_process()
    forget_tokens, sample_tokens = count_tokens(forget_batches), count_tokens(retain_batches)
    for name, count in (("forget_batches", forget_tokens), ("retain_batches", sample_tokens)):
        if count == 0:
            raise ValueError(f"`{name}` hold no answer token: give rows whose `labels` are not all {IGNORE_INDEX}.")
    retain_tokens = sample_tokens if num_tokens is None else num_tokens
    if retain_tokens < sample_tokens:
        raise ValueError(f"`num_tokens`={num_tokens} is less than the {sample_tokens} of `retain_batches`, a part.")
    with eval_mode(model), _movable(model, args) as parameters:
        target = torch._foreach_div(loss_gradient(model, parameters, forget_batches), retain_tokens)
        step, damping, residuals = _solve(model, parameters, retain_batches, target, args)
        torch._foreach_mul_(step, args.strength)
        step_norm = dot(step, step) ** 0.5
        if not step_norm < float("inf"):
            raise FloatingPointError("The influence step is not finite, and no weight has moved: raise `damping`.")
        applied_norm = _apply(parameters, step)
    if applied_norm < (1 - LOST_SHARE) * step_norm:
        logger.warning(
            f"Rounded to {parameters[0].dtype}, the step has lost its small entries: its norm is {applied_norm:.3g} "
            f"instead of {step_norm:.3g}. Load the model in float32."
        )
    count = sum(parameter.numel() for parameter in parameters)
    return InfluenceReport(count, forget_tokens, retain_tokens, damping, residuals, step_norm, applied_norm)


def _solve(
    model: torch.nn.Module,
    parameters: list[Tensor],
    batches: Sequence[ForgetRetainBatch],
    target: list[Tensor],
    args: InfluenceArguments,
) -> tuple[list[Tensor], float, list[float]]:
    """(G + damping I)^-1 target, the damping, and the residuals on the way."""
    damping = args.damping
    if args.solver == "diagonal" or damping is None:
        diagonal = gauss_newton_diagonal(model, parameters, batches, args.num_draws, args.seed)
        if damping is None:
            total = float(sum(part.sum(dtype=torch.float64) for part in diagonal))
            damping = DAMPING_SHARE * total / sum(part.numel() for part in diagonal)
        if not 0 < damping < float("inf"):
            raise FloatingPointError(f"A tenth of the mean of G's diagonal is {damping}: set `damping` by hand.")
        if args.solver == "diagonal":
            return torch._foreach_div(target, torch._foreach_add(diagonal, damping)), damping, []
        del diagonal  # before there are the vectors of conjugate gradients

    def product(vector: list[Tensor]) -> list[Tensor]:
        return gauss_newton_product(model, parameters, batches, vector)

    step, residuals = conjugate_gradient(product, target, damping, args.max_iterations, args.tolerance)
    return step, damping, residuals


@contextmanager
def _movable(model: torch.nn.Module, args: InfluenceArguments) -> Iterator[list[torch.nn.Parameter]]:
    """A context in which the weights that stay have no gradients; it gives the others."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        freeze_parameters(model, args.trainable_parameters, args.frozen_parameters)
        yield [parameter for parameter in trainable if parameter.requires_grad]
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@torch.no_grad()
def _apply(parameters: list[Tensor], step: list[Tensor]) -> float:
    """Moves the parameters; the norm of what was left of the step in their dtype."""
    squared = 0.0
    for parameter, part in zip(parameters, step):
        before = parameter.clone()
        parameter += part.to(parameter.dtype)
        squared += float((parameter - before).square().sum(dtype=torch.float64))
    return squared**0.5


def _check_one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("Influence unlearning runs in one process: start it without `accelerate launch` or torchrun.")


@dataclass
class CommandArguments:
    """The model, the rows, and where the result goes."""

    model: str = field(metadata={"help": "Folder or hub id of a causal language model or an adapter."})
    forget: str = field(metadata={"help": "Rows to forget: JSON lines, a folder, or a hub id."})
    retain: str = field(metadata={"help": "Rows to retain: JSON lines, a folder, or a hub id."})
    output: str = field(metadata={"help": "Folder of the new model, its tokenizer and a record of the settings."})
    forget_config: str | None = field(default=None, metadata={"help": "Configuration of --forget: forget10, ..."})
    retain_config: str | None = field(default=None, metadata={"help": "Configuration of --retain: retain90, ..."})
    split: str = field(default="train", metadata={"help": "Split of both, but of files."})
    retain_rows: int | None = field(
        default=None, metadata={"help": "So many retain rows, drawn at random, stand for all in G."}
    )
    batch_size: int = field(default=8, metadata={"help": "Rows in a forward, >= 1."})
    max_length: int | None = field(default=None, metadata={"help": "Longest row in tokens; by default the model's."})
    prompt_template: str | None = field(default=None, metadata={"help": "As in training, with {question}, {answer}."})
    dtype: str = field(
        default="float32", metadata={"help": "Of the weights, in the result too; bfloat16 rounds small steps away."}
    )
    device: str | None = field(default=None, metadata={"help": "cpu, cuda:1, ...; by default a GPU if there is one."})
    overwrite: bool = field(default=False, metadata={"help": "Whether to replace another run's result."})

    def __post_init__(self):
        check_at_least(1, batch_size=self.batch_size, retain_rows=self.retain_rows)
        if not getattr(getattr(torch, self.dtype, None), "is_floating_point", False):
            raise ValueError(f"`dtype`={self.dtype!r} is unknown: use float32, bfloat16 or float16.")


def run(command: CommandArguments, args: InfluenceArguments) -> InfluenceReport:
    """
    Loads model and rows, moves the weights, and writes the result, whole or not at all.

    Args:
        command ([`CommandArguments`]): What to work on.
        args ([`InfluenceArguments`]): The settings of the step.

    Returns:
        [`InfluenceReport`]

    Raises:
        ValueError: If `output` holds something, rows are bad (they are named), or there are several processes.
        FloatingPointError: If something is not finite; nothing is written.
    """
    _check_one_process()
    output = Path(command.output)
    _check_output(output, command)
    model = _load_model(command)
    tokenizer = AutoTokenizer.from_pretrained(command.model)
    longest = longest_row(command.max_length, model, tokenizer)
    datasets = [
        prepare(_load_rows(source, config, command.split), tokenizer, longest, command.prompt_template, name)
        for name, source, config in (
            ("forget", command.forget, command.forget_config),
            ("retain", command.retain, command.retain_config),
        )
    ]
    collate = UnlearnCollator.for_tokenizer(tokenizer)
    num_tokens = sum(label != IGNORE_INDEX for labels in datasets[1]["labels"] for label in labels[1:])
    if command.retain_rows is not None:
        chosen = min(command.retain_rows, len(datasets[1]))
        datasets[1] = datasets[1].shuffle(seed=args.seed).select(range(chosen))

    def batches(half: str, rows: Dataset) -> list[ForgetRetainBatch]:
        found = []
        for start in range(0, len(rows), command.batch_size):
            items = [{half: rows[place]} for place in range(start, min(start + command.batch_size, len(rows)))]
            found.append({key: value.to(model.device) for key, value in collate(items).items()})
        return found

    report = influence_update(model, batches("forget", datasets[0]), batches("retain", datasets[1]), args, num_tokens)
    temporary = output.with_name(output.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    settings = {"method": "influence", **asdict(command), **asdict(args)}
    write_whole(temporary / RUN_FILE, json.dumps({"settings": settings, "metrics": asdict(report)}, indent=2) + "\n")
    if output.exists():
        shutil.rmtree(output)
    os.replace(temporary, output)
    return report


def _check_output(output: Path, command: CommandArguments) -> None:
    if not output.exists() or not any(output.iterdir()):
        return
    where = f"`output`={command.output!r}"
    if not (output / RUN_FILE).exists() or output.resolve() == Path(command.model).resolve():
        raise ValueError(f"{where} holds what is no result of another run: choose another folder.")
    if not command.overwrite:
        raise ValueError(f"{where} holds a finished run: add --overwrite to replace it, or choose another folder.")


def _load_model(command: CommandArguments) -> PreTrainedModel:
    loader, options = AutoModelForCausalLM, {}
    if (Path(command.model) / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM as loader

        options = {"is_trainable": True}
    model = loader.from_pretrained(command.model, dtype=command.dtype, **options)
    return model.to(command.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _load_rows(source: str, config: str | None, split: str) -> Dataset:
    path = Path(source)
    if path.suffix in (".json", ".jsonl"):
        if not path.is_file():
            raise ValueError(f"{source}: no such file.")
        arguments, split = {"path": "json", "data_files": source}, "train"
    else:
        arguments = {"path": source, "name": config}
    if not path.exists():
        return load_dataset(**arguments, split=split)
    # The library's cache tells folders apart by their names alone: it would give the rows of another folder.
    with TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        return load_dataset(**arguments, split=split, cache_dir=cache, keep_in_memory=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = HfArgumentParser((CommandArguments, InfluenceArguments), prog="python -m soul_trainer.influence")
    try:
        report = run(*parser.parse_args_into_dataclasses(arguments))
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for number, residual in enumerate(report.residuals, start=1):
        print(f"iteration {number}: residual {residual:.3g}")
    print(
        f"{report.forget_tokens} answer tokens to forget, {report.retain_tokens} to retain, damping "
        f"{report.damping:.3g}: {report.num_parameters} weights moved by a norm of {report.applied_norm:.4g}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
