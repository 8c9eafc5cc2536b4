"""The commands of `python -m soul_eval` that evaluate a model on a suite, and those that need only its rows."""

import argparse
import inspect
import json
from pathlib import Path

from .console import Parser
from .report import Run, table, write_report
from .rows import read_rows
from .statistics import Figure
from .suites import SUITES


def suite(name: str, arguments: list[str]) -> None:
    """Evaluates a model, writes `rows.jsonl` and `summary.json`, and prints the figures."""
    from soul_trainer.command_line import CommandParser

    from . import running
    from .input_methods import InputArguments

    suite = SUITES[name]
    description = inspect.getmodule(suite.arguments).__doc__.strip().split("\n\n")[0]
    parser = CommandParser((running.EvalArguments, suite.arguments, InputArguments), description)
    args, own, inputs = parser.parse_args_into_dataclasses(arguments)
    found = running.run_suite(suite, args, own, inputs)
    if found is None:
        return
    reference = read_rows(args.reference) if args.reference else None
    figures = _figures(*found, reference[1] if reference else None)
    running.write_summary(Path(args.output), figures)
    print(_table(args.model, figures, reference))


def summarise(arguments: list[str]) -> None:
    """Prints the figures of rows, and writes nothing."""
    parser = Parser(description="Prints the figures of rows that are there already. It needs no model.")
    parser.add_argument("rows", help="rows.jsonl")
    parser.add_argument("--reference", metavar="ROWS", help="rows.jsonl of the gold model")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(arguments)
    header, rows = read_rows(args.rows)
    reference = read_rows(args.reference) if args.reference else None
    figures = _figures(header, rows, reference[1] if reference else None)
    if args.json:
        print(json.dumps({name: figure.to_json() for name, figure in figures.items()}, indent=2, allow_nan=False))
    else:
        print(_table(str(header.get("model", args.rows)), figures, reference))


def compare(arguments: list[str]) -> None:
    """Prints how the second model differs from the first, field by field, with p-values."""
    from .paired import compare_rows, comparison_table

    parser = Parser(description="Tests whether two models differ on the same rows, field by field.")
    parser.add_argument("first", help="rows.jsonl of one model")
    parser.add_argument("second", help="rows.jsonl of the other")
    args = parser.parse_args(arguments)
    (_, first), (_, second) = read_rows(args.first), read_rows(args.second)
    print(comparison_table(compare_rows(first, second)))


def report(arguments: list[str]) -> None:
    """Writes a report of finished rows."""
    from soul_trainer.held_folder import hold_folder

    parser = Parser(description="Writes a page about finished rows, with tables, figures and answers side by side.")
    parser.add_argument("rows", nargs="+", metavar="NAME=ROWS", help="rows.jsonl of an unlearned model, and its name")
    parser.add_argument("--target", metavar="ROWS", help="rows.jsonl of the model before unlearning")
    parser.add_argument("--gold", metavar="ROWS", help="rows.jsonl of the model that never saw the rows to forget")
    parser.add_argument("--output", required=True, help="folder of the report")
    parser.add_argument("--title", default="Unlearning", help="its title (%(default)s)")
    args = parser.parse_args(arguments)
    with hold_folder(args.output):
        _report(args)


def _report(args: argparse.Namespace) -> None:
    gold = read_rows(args.gold) if args.gold else None
    named = [(role, role, path) for role, path in (("target", args.target), ("gold", args.gold)) if path]
    named += [(name, "unlearned", path) for name, _, path in (entry.rpartition("=") for entry in args.rows)]
    runs = []
    for name, role, path in named:
        header, rows = read_rows(path)
        figures = _figures(header, rows, gold[1] if gold else None)
        runs.append(Run(name or Path(path).parent.name, figures, rows, settings=header.get("settings"), role=role))
    print(table(runs))
    print(f"\n{write_report(args.output, args.title, runs)}")


def _figures(header: dict, rows: list[dict], reference: list[dict] | None) -> dict[str, Figure]:
    name = header.get("suite", "tofu")
    if name not in SUITES:
        raise ValueError(f"The rows are of the suite {name!r}; known are {', '.join(SUITES)}.")
    general = {key: Figure.from_json(entry) for key, entry in header.get("general", {}).items()}
    return SUITES[name].summarise(rows, reference) | general


def _table(name: str, figures: dict[str, Figure], reference: tuple[dict, list[dict]] | None) -> str:
    runs = [Run(Path(name).name or name, figures)]
    if reference:
        runs.append(Run("reference", _figures(*reference, reference[1]), role="gold"))
    return table(runs)
