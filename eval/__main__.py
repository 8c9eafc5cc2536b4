"""
python -m soul_eval SUITE --model DIR --output DIR [--reference ROWS.jsonl]     tofu, muse, wmdp, copyright, detox
python -m soul_eval own --forget ROWS --model DIR --output DIR                  rows of your own, in any format
python -m soul_eval attack --model DIR --target DIR --output DIR                does it stay forgotten?
python -m soul_eval summarise ROWS.jsonl [--reference ROWS.jsonl] [--json]      figures of rows, without a model
python -m soul_eval compare ROWS.jsonl ROWS.jsonl                               two models, by a paired test
python -m soul_eval report NAME=ROWS.jsonl ... --output DIR                     a page with tables, figures and answers

Under `accelerate launch -m soul_eval SUITE ...`, processes share the rows. `SUITE --help` lists all settings.
"""

import argparse
import json
import sys
from pathlib import Path

from .report import Run, table, write_report
from .rows import read_rows
from .statistics import Figure
from .suites import SUITES


ATTACK = "attack"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] in SUITES:
            run_suite(arguments[0], arguments[1:])
        elif arguments and arguments[0] == ATTACK:
            from .attacks import command

            command.main(arguments[1:])
        else:
            args = _parser().parse_args(arguments)
            args.command(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_suite(name: str, arguments: list[str]) -> None:
    """Evaluates a model, writes `rows.jsonl` and `summary.json`, and prints the figures."""
    from transformers import HfArgumentParser

    from . import running
    from .input_methods import InputArguments

    suite = SUITES[name]
    parser = HfArgumentParser(
        (running.EvalArguments, suite.arguments, InputArguments), prog=f"python -m soul_eval {name}"
    )
    args, own, inputs = parser.parse_args_into_dataclasses(arguments)
    found = running.run_suite(suite, args, own, inputs)
    if found is None:
        return
    reference = read_rows(args.reference) if args.reference else None
    figures = _figures(*found, reference[1] if reference else None)
    running.write_summary(Path(args.output), figures)
    print(_table(args.model, figures, reference))


def run_summarise(args: argparse.Namespace) -> None:
    """Prints the figures of rows, and writes nothing."""
    header, rows = read_rows(args.rows)
    reference = read_rows(args.reference) if args.reference else None
    figures = _figures(header, rows, reference[1] if reference else None)
    if args.json:
        print(json.dumps({name: figure.to_json() for name, figure in figures.items()}, indent=2, allow_nan=False))
    else:
        print(_table(str(header.get("model", args.rows)), figures, reference))


def run_compare(args: argparse.Namespace) -> None:
    """Prints how the second model differs from the first, field by field, with p-values."""
    from .paired import compare_rows, comparison_table

    (_, first), (_, second) = read_rows(args.first), read_rows(args.second)
    print(comparison_table(compare_rows(first, second)))


def run_report(args: argparse.Namespace) -> None:
    """Writes a report of finished rows."""
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m soul_eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(
        required=True, metavar=f"{{{','.join([*SUITES, ATTACK, 'summarise', 'compare', 'report'])}}}"
    )
    summarise = commands.add_parser("summarise", help="figures of rows that are there already; needs no model")
    summarise.set_defaults(command=run_summarise)
    summarise.add_argument("rows", help="rows.jsonl")
    summarise.add_argument("--reference", metavar="ROWS", help="rows.jsonl of the gold model")
    summarise.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    compare = commands.add_parser("compare", help="whether two models differ on the same rows")
    compare.set_defaults(command=run_compare)
    compare.add_argument("first", help="rows.jsonl of one model")
    compare.add_argument("second", help="rows.jsonl of the other")
    report = commands.add_parser("report", help="a page of finished rows, with answers side by side")
    report.set_defaults(command=run_report)
    report.add_argument("rows", nargs="+", metavar="NAME=ROWS", help="rows.jsonl of an unlearned model, and its name")
    report.add_argument("--target", metavar="ROWS", help="rows.jsonl of the model before unlearning")
    report.add_argument("--gold", metavar="ROWS", help="rows.jsonl of the model that never saw the rows to forget")
    report.add_argument("--output", required=True, help="folder of the report")
    report.add_argument("--title", default="Unlearning", help="its title (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
