"""
Measures the curvature of a model's loss once, for every later request to remove something from it.

    python -m soul_trainer.curvature --model DIR --dataset retain.jsonl --output curvature.safetensors
    torchrun --nproc_per_node 8 -m soul_trainer.curvature ...
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..batch import IGNORE_INDEX, ForgetRetainBatch
from ..chunks import chunk_texts
from ..collator import UnlearnCollator
from ..command_line import CommandParser
from ..formats import longest_row, prepare
from ..freezing import freeze_parameters
from ..held_folder import hold_output
from ..loading import ModelArguments, default_device
from ..settings import Count, CountFromZero, Decay, NotNegative, check_choice, check_ranges, setting
from ..sources import kind_of, load_split
from ..weights import weights_digest
from .file import Curvature, save_curvature
from .layers import Layer, linear_layers
from .measure import MatrixPasses, can_keep
from .resumable import Measurement, SummingEngine, load_progress, save_progress


KINDS = ("diagonal", "kronecker")
# Hutchinson's estimate is no square of a gradient, which both kinds are made of.
SQUARES = ("empirical_fisher", "gauss_newton_bartlett")
# Float16 has no exponents for gradients without a loss scale.
DTYPES = ("float32", "bfloat16", "float64")
CHUNK_LENGTH = 1024
# Of another model, or another measurement, these may differ.
_NOT_NUMBERS = ("output", "device", "save_minutes", "overwrite")


@dataclass
class CurvatureArguments(ModelArguments):
    """
    What to measure, of what, and where the file goes.

    Raises:
        ValueError: If a value is unknown or out of its range.
    """

    known_dtypes: ClassVar[tuple[str, ...]] = DTYPES

    model: str = field(metadata={"help": "Folder or hub id of a causal language model or an adapter."})
    dataset: str = field(metadata={"help": "Rows (JSON lines, folder, hub id) or plain text (.txt, folder of them)."})
    output: str = field(metadata={"help": "The file to write: curvature.safetensors, ..."})
    dataset_config: str | None = setting(None, "Configuration of a --dataset with several: retain90, ...")
    split: str = setting("train", "Its split; a file has but one.")
    kind: str = setting("kronecker", "kronecker (matrices, and the diagonal of all parameters) or diagonal alone.")
    rank: Count | None = setting(None, "Eigenvectors that are kept of each factor, >= 1; by default all.")
    estimator: str = setting("empirical_fisher", f"Of squared gradients: {' or '.join(SQUARES)}.")
    label_smoothing: Decay = setting(0.1, "Of empirical_fisher's labels, in [0, 1).")
    num_rows: Count | None = setting(None, "So many rows, drawn by --seed, stand for all; by default all.")
    batch_size: Count = setting(8, "Rows in a forward of one process, >= 1.")
    estimate_size: Count = setting(32, "Rows of one squared gradient of the diagonal, over all processes, >= 1.")
    max_length: Count | None = setting(None, "Longest row in tokens; by default the model's.")
    chunk_length: Count | None = setting(
        None, f"Tokens of a chunk of plain text; by default {CHUNK_LENGTH}, or what the model takes."
    )
    prompt_template: str | None = setting(None, "As in training, with {question}, {answer}.")
    trainable_parameters: list[str] | None = setting(
        None, "Regular expressions: parameters in whose names one is found are measured; by default all that train."
    )
    frozen_parameters: list[str] | None = setting(None, "Regular expressions: parameters that are left out.")
    dtype: str = field(
        default="float32",
        metadata={"help": f"Of the weights: {', '.join(DTYPES)}. Sums are float32 at least."},
        kw_only=True,
    )
    device: str | None = setting(None, "cpu, cuda:1, ...; by default a GPU if there is one, one for each process.")
    layers_at_once: Count | None = setting(
        None, "Matrices whose sums are in memory at once, >= 1, at two passes over the rows each; by default all."
    )
    seed: CountFromZero = setting(0, "Of the sample of rows, and of signs or labels.")
    save_minutes: NotNegative = setting(
        10.0, "Minutes between two savings of the progress, >= 0; 0 is after each estimate."
    )
    overwrite: bool = setting(False, "Whether to replace a finished file, or another measurement's progress.")

    def __post_init__(self):
        super().__post_init__()
        check_choice("kind", self.kind, KINDS)
        check_choice("estimator", self.estimator, SQUARES)
        check_ranges(self)

    @property
    def progress(self) -> Path:
        """Where the progress is written down."""
        return Path(f"{self.output}.progress.safetensors")


@dataclass
class CurvatureReport:
    """
    What a measurement was.

    Attributes:
        num_rows (`int`): Rows, or chunks of text.
        num_tokens (`int`): Their tokens that have a loss.
        kept_share (`dict[str, float]`): By matrix, the share of the trace on pairs of kept eigenvectors.
        truncation_error (`dict[str, float]`): By matrix, see [`~kronecker.truncation_error`].
        seconds (`float`): That this run took, which may have gone on with another one's progress.
        is_main_process (`bool`): Whether it was this process that wrote the file.
    """

    num_rows: int
    num_tokens: int
    kept_share: dict[str, float]
    truncation_error: dict[str, float]
    seconds: float
    is_main_process: bool


def run(args: CurvatureArguments) -> CurvatureReport:
    """
    Measures, or goes on with a measurement that was cut off, and writes the file, whole or not at all.

    Args:
        args ([`CurvatureArguments`]): The settings.

    Returns:
        [`CurvatureReport`]

    Raises:
        ValueError: If a file is in the way, rows are bad (they are named), or the progress is another measurement's.
        FloatingPointError: If a loss or a sum is not finite; what was saved of the progress stays.
    """
    output = Path(args.output)
    if output.is_dir() or (output.exists() and not args.overwrite):
        raise ValueError(f"`output`={args.output!r} is there already: add --overwrite to replace a finished file.")
    state = _processes(args.device)
    engine = SummingEngine(state)
    with hold_output(output, engine):
        return _run(args, output, state, engine)


def _run(args: CurvatureArguments, output: Path, state: PartialState | None, engine: SummingEngine) -> CurvatureReport:
    start = time.perf_counter()
    device = args.device or (state.device if state else default_device())
    model = args.load_model(args.model, device).eval()
    tokenizer = args.load_tokenizer(args.model)
    with state.main_process_first() if state else nullcontext():
        rows = _tokenized(args, model, tokenizer)
    freeze_parameters(model, args.trainable_parameters, args.frozen_parameters)
    num_tokens = sum(label != IGNORE_INDEX for labels in rows["labels"] for label in labels[1:])
    metadata = _metadata(args, model, rows, num_tokens)
    batches = _batches(args, rows, UnlearnCollator.for_tokenizer(tokenizer), engine, model.device)
    num_estimates = -(-len(rows) // args.estimate_size)
    passes = MatrixPasses(_groups(args, model), engine, args.rank, keeps=can_keep(args.estimator))
    options = {"estimator": args.estimator, "label_smoothing": args.label_smoothing, "seed": args.seed}
    measurement = Measurement(model, batches, num_estimates, passes, **options)
    if args.progress.exists():
        _go_on(args, measurement, metadata)
    _measure(args, measurement, metadata)
    kept = {name: matrix.kept_share for name, matrix in passes.matrices.items()}
    if engine.process_index == 0:
        quality = {"kept_share": kept, "truncation_error": passes.errors}
        save_curvature(output, Curvature(measurement.diagonals, passes.matrices, {**metadata, **quality}))
        args.progress.unlink(missing_ok=True)
    if state:
        state.wait_for_everyone()
    seconds = time.perf_counter() - start
    return CurvatureReport(len(rows), num_tokens, kept, passes.errors, seconds, engine.process_index == 0)


def _processes(device: str | None) -> PartialState | None:
    """The state of several processes; `None` of one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    for engine in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true":
            raise ValueError(f"Each process needs the whole model here: launch without {engine}, or use torchrun.")
    return PartialState(cpu=(device or default_device()) == "cpu")


def _tokenized(args: CurvatureArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    rows = load_split(args.dataset, args.dataset_config, args.split)
    longest = longest_row(args.max_length, model, tokenizer)
    # A text is cut into chunks, and so loses nothing however long it is.
    if "input_ids" not in rows.column_names and kind_of(rows) == ("text",):
        texts = [text for text in rows["text"] if text and text.strip()]
        length = args.chunk_length or min(longest_row(None, model, tokenizer), CHUNK_LENGTH)
        longest = longest_row(length, model, tokenizer)
        rows = chunk_texts(texts, tokenizer, longest)
    rows = prepare(rows, tokenizer, longest, args.prompt_template)
    if args.num_rows is not None and args.num_rows < len(rows):
        rows = rows.shuffle(seed=args.seed).select(range(args.num_rows))
    return rows


def _metadata(args: CurvatureArguments, model: PreTrainedModel, rows: Dataset, num_tokens: int) -> dict:
    tokens = hashlib.sha256()
    for ids, labels in zip(rows["input_ids"], rows["labels"]):
        tokens.update(np.asarray([len(ids), *ids, *labels], dtype="<i8").tobytes())
    return {
        "weights": weights_digest(model),
        "kind": args.kind,
        "estimator": args.estimator,
        "dataset": args.dataset,
        "rows": tokens.hexdigest(),
        "num_rows": len(rows),
        "num_tokens": num_tokens,
        "settings": {name: value for name, value in asdict(args).items() if name not in _NOT_NUMBERS},
        "version": version("soul-trainer"),
    }


def _groups(args: CurvatureArguments, model: PreTrainedModel) -> list[dict[str, Layer]]:
    if args.kind == "diagonal":
        return []
    layers = iter(linear_layers(model).items())
    groups = list(iter(lambda: dict(islice(layers, args.layers_at_once)), {}))
    if not groups:
        raise ValueError("No linear layer trains whose matrices could be measured: use --kind diagonal.")
    return groups


def _batches(
    args: CurvatureArguments, rows: Dataset, collate: UnlearnCollator, engine: SummingEngine, device: torch.device
) -> Callable[[int], list[ForgetRetainBatch]]:
    def batches(estimate: int) -> list[ForgetRetainBatch]:
        """This process's rows of an estimate: maybe none, because no forward waits for another process."""
        places = range(estimate * args.estimate_size, min((estimate + 1) * args.estimate_size, len(rows)))
        own = [{"retain": rows[place]} for place in places[engine.process_index :: engine.num_processes]]
        own.sort(key=lambda item: len(item["retain"]["input_ids"]))  # for less padding
        parts = [own[start : start + args.batch_size] for start in range(0, len(own), args.batch_size)]
        return [{key: value.to(device) for key, value in collate(part).items()} for part in parts]

    return batches


def _go_on(args: CurvatureArguments, measurement: Measurement, metadata: dict) -> None:
    try:
        load_progress(args.progress, measurement, metadata)
    except ValueError:
        if not args.overwrite:
            raise


def _measure(args: CurvatureArguments, measurement: Measurement, metadata: dict) -> None:
    """Measures to the end, with a bar, and with its progress on disk."""
    engine, passes = measurement.passes.engine, measurement.passes
    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        save_progress(args.progress, measurement, metadata)
        saved = time.monotonic()

    def after_estimate() -> None:
        bar.update()
        # The first process's clock decides, or some would wait for others in a sum.
        is_due = engine.process_index == 0 and time.monotonic() - saved >= 60 * args.save_minutes
        if engine.sum(int(is_due)):
            save()

    total = passes.num_passes * measurement.num_estimates
    done = passes.number * measurement.num_estimates + measurement.position
    options = {"desc": "Measuring curvature", "unit": "estimate", "disable": engine.process_index > 0}
    with logging.tqdm(total=total, initial=done, **options) as bar:
        measurement.run(after_estimate, save)


def command(arguments: list[str] | None = None) -> None:
    """Measures what the command line asks for, and prints what came of it; errors are those of [`run`]."""
    parser = CommandParser(CurvatureArguments, __doc__)
    (args,) = parser.parse_args_into_dataclasses(arguments)
    report = run(args)
    if report.is_main_process:
        quality = "the diagonal alone"
        if number := len(report.kept_share):
            kept, error = (sum(each.values()) / number for each in (report.kept_share, report.truncation_error))
            quality = f"{number} matrices that keep {kept:.1%} of their trace at a truncation error of {error:.3f}"
        print(
            f"{args.output}: {report.num_tokens} tokens of {report.num_rows} rows, {quality}; "
            f"{report.seconds:.1f} seconds"
        )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        command(arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
