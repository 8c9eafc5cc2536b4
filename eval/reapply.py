"""
Applies what a former run unlearned to a later version of its model, and asks the model before and after.

    python -m soul_eval reapply --model LATER --difference difference.safetensors --forget forget.jsonl --output DIR

The new model is in DIR/model, its rows and figures are in DIR/after, and those of the later version in DIR/before.
"""

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from soul_trainer.command_line import CommandParser
from soul_trainer.difference import apply_difference, planned_difference
from soul_trainer.held_folder import hold_folder
from soul_trainer.records import RUN_FILE

from . import running
from .report import Run, table
from .suites import SUITES
from .suites.own import OwnArguments


@dataclass
class ReapplyArguments(running.EvalArguments):
    """The later version, and what a former run changed."""

    difference: str = field(kw_only=True, metadata={"help": "File written by `soul_trainer.difference save`."})
    scale: float = field(default=1.0, metadata={"help": "Factor of the difference, finite and not 0."})

    def __post_init__(self):
        super().__post_init__()
        if self.revision:
            raise ValueError("`revision` is no flag here: download that revision, and name its folder as --model.")


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, applies the difference, and prints the table."""
    parser = CommandParser((ReapplyArguments, OwnArguments), __doc__)
    args, own = parser.parse_args_into_dataclasses(arguments)
    print(table(run(args, own)))
    print(f"\n{Path(args.output) / 'model'} is the model after.")


def run(args: ReapplyArguments, own: OwnArguments) -> list[Run]:
    """
    Applies a difference, or finds that done, and evaluates both models on rows of one's own.

    Args:
        args ([`ReapplyArguments`]): Model and difference.
        own ([`~suites.own.OwnArguments`]): The rows.

    Returns:
        `list[Run]`: Before and after.

    Raises:
        ValueError: If several processes run it, the difference does not fit the model, or the output folder holds
            other results and `overwrite` is not set.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("`reapply` runs in one process: start it without `accelerate launch`.")
    with hold_folder(args.output):
        return _run(args, own, Path(args.output))


def _run(args: ReapplyArguments, own: OwnArguments, output: Path) -> list[Run]:
    model = output / "model"
    if args.overwrite or not _is_there(args, model):
        apply_difference(args.model, args.difference, args.scale, model, args.overwrite)
    runs = []
    for name, asked, role in (("before", args.model, "target"), ("after", str(model), "unlearned")):
        # The same tokenizer for both, as the flag says or as it lies in both folders.
        header, rows = running.run_suite(SUITES["own"], replace(args, model=asked, output=str(output / name)), own)
        figures = SUITES["own"].summarise(rows)
        running.write_summary(output / name, figures)
        runs.append(Run(name, figures, rows, settings=header["settings"], role=role))
    return runs


def _is_there(args: ReapplyArguments, model: Path) -> bool:
    """Whether the very model was made by a run that was stopped later."""
    if not (model / RUN_FILE).exists():
        return False
    found = json.loads((model / RUN_FILE).read_text(encoding="utf-8"))["settings"]
    return found == planned_difference(args.model, args.difference, args.scale)
