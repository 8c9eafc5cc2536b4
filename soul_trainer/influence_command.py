"""
Removes rows from a model without training: one or a few Newton steps of influence unlearning.

    python -m soul_trainer.influence --model DIR --forget forget.jsonl --retain retain.jsonl --output DIR
    python -m soul_trainer.influence --model DIR --forget forget.jsonl --curvature FILE --output DIR
"""

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from datasets import Dataset

from .batch import IGNORE_INDEX, ForgetRetainBatch
from .collator import UnlearnCollator
from .command_line import CommandParser
from .curvature import load_curvature
from .formats import longest_row, prepare
from .held_folder import hold_output
from .influence import InfluenceArguments, InfluenceReport, check_one_process, influence_update
from .loading import DTYPES, ModelArguments, default_device
from .records import RUN_FILE, make_tokenizer_portable, write_whole
from .settings import Count, check_ranges
from .sources import load_split


@dataclass
class CommandArguments(ModelArguments):
    """The model, the rows, and where the result goes."""

    model: str = field(metadata={"help": "Folder or hub id of a causal language model or an adapter."})
    forget: str = field(metadata={"help": "Rows to forget: JSON lines, a folder, or a hub id."})
    output: str = field(metadata={"help": "Folder of the new model, its tokenizer and a record of the settings."})
    retain: str | None = field(default=None, metadata={"help": "Rows to retain: JSON lines, a folder, or a hub id."})
    curvature: str | None = field(
        default=None, metadata={"help": "File of the retain rows' curvature; without, it is measured."}
    )
    num_tokens: Count | None = field(
        default=None,
        metadata={"help": "Answer tokens of all that is to be kept; default those of --retain, or the file's."},
    )
    forget_config: str | None = field(default=None, metadata={"help": "Configuration of --forget: forget10, ..."})
    retain_config: str | None = field(default=None, metadata={"help": "Configuration of --retain: retain90, ..."})
    split: str = field(default="train", metadata={"help": "Split of both, but of files."})
    retain_rows: Count | None = field(
        default=None, metadata={"help": "So many retain rows, drawn at random, stand for all in G."}
    )
    batch_size: Count = field(default=8, metadata={"help": "Rows in a forward, >= 1."})
    max_length: Count | None = field(default=None, metadata={"help": "Longest row in tokens; by default the model's."})
    prompt_template: str | None = field(default=None, metadata={"help": "As in training, with {question}, {answer}."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": f"Of the weights, in the result too: {', '.join(DTYPES)}. With auto, the dtype that they are "
            "saved in; bfloat16 rounds small steps away."
        },
        kw_only=True,
    )
    device: str | None = field(default=None, metadata={"help": "cpu, cuda:1, ...; by default a GPU if there is one."})
    overwrite: bool = field(default=False, metadata={"help": "Whether to replace another run's result."})

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self)
        if self.retain is None and self.curvature is None:
            raise ValueError("Set `retain`, rows to retain, or `curvature`, a file that was measured of them.")


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
    check_one_process()
    with hold_output(command.output):
        return _run(command, args)


def _run(command: CommandArguments, args: InfluenceArguments) -> InfluenceReport:
    output = Path(command.output)
    _check_output(output, command)
    curvature = None if command.curvature is None else load_curvature(command.curvature)
    model = command.load_model(command.model, command.device or default_device())
    tokenizer = command.load_tokenizer(command.model)
    longest = longest_row(command.max_length, model, tokenizer)
    collate = UnlearnCollator.for_tokenizer(tokenizer)

    def read(half: str, source: str, config: str | None) -> Dataset:
        rows = load_split(source, config, command.split, name=half)
        return prepare(rows, tokenizer, longest, command.prompt_template, half)

    def batches(half: str, rows: Dataset) -> list[ForgetRetainBatch]:
        found = []
        for start in range(0, len(rows), command.batch_size):
            items = [{half: rows[place]} for place in range(start, min(start + command.batch_size, len(rows)))]
            found.append({key: value.to(model.device) for key, value in collate(items).items()})
        return found

    forget, retain, num_tokens = read("forget", command.forget, command.forget_config), [], command.num_tokens
    if command.retain is not None:
        retain = read("retain", command.retain, command.retain_config)
        if num_tokens is None:
            num_tokens = sum(label != IGNORE_INDEX for labels in retain["labels"] for label in labels[1:])
        if command.retain_rows is not None:
            retain = retain.shuffle(seed=args.seed).select(range(min(command.retain_rows, len(retain))))
    report = influence_update(model, batches("forget", forget), batches("retain", retain), args, num_tokens, curvature)
    temporary = output.with_name(output.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    make_tokenizer_portable(temporary)
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


def command(arguments: list[str] | None = None) -> None:
    """Does what the command line asks for, and prints what came of it; errors are those of [`run`]."""
    parser = CommandParser((CommandArguments, InfluenceArguments), __doc__)
    report = run(*parser.parse_args_into_dataclasses(arguments))
    for number, residual in enumerate(report.residuals, start=1):
        print(f"iteration {number}: residual {residual:.3g}")
    for half, losses in (("forget", report.forget_losses), ("retain", report.retain_losses)):
        for number, (before, after) in enumerate(zip(losses, losses[1:]), start=1):
            print(f"step {number}: {half} loss {before:.4g} before, {after:.4g} after")
    if report.kept_share:
        print(f"{report.kept_share:.1%} of the curvature is on eigenvectors, the rest on diagonals and means")
    print(
        f"{report.forget_tokens} answer tokens to forget, {report.retain_tokens} to retain, damping "
        f"{report.damping:.3g}: {report.num_parameters} weights moved by a norm of {report.applied_norm:.4g}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        command(arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
