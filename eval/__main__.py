"""
python -m soul_eval SUITE --model DIR --output DIR [--reference ROWS.jsonl]     tofu, muse, wmdp, copyright, detox
python -m soul_eval own --forget ROWS --model DIR --output DIR                  rows of your own, in any format
python -m soul_eval attack --model DIR --target DIR --output DIR                does it stay forgotten?
python -m soul_eval summarise ROWS.jsonl [--reference ROWS.jsonl] [--json]      figures of rows, without a model
python -m soul_eval compare ROWS.jsonl ROWS.jsonl                               two models, by a paired test
python -m soul_eval report NAME=ROWS.jsonl ... --output DIR                     a page with tables, figures and answers
python -m soul_eval chat --run DIR                                              models before and after, side by side
python -m soul_eval reapply --model DIR --difference FILE --forget ROWS --output DIR    a later version forgets again
python -m soul_eval verify RUN.record.json [--model DIR] [--public_key FILE]    what a run has put on record
python -m soul_eval record RUN.record.json [--attacks FILE] [--signing_key FILE]        completes or signs it

Under `accelerate launch -m soul_eval SUITE ...`, processes share the rows. `SUITE --help` lists all settings.
"""

import sys
from functools import partial
from importlib import import_module
from pathlib import Path

from soul_eval.console import HELP, help_text, refuse_unknown, run, show


PROGRAM = "python -m soul_eval"
HELP_TEXTS = Path(__file__).parent / "help"
# What is imported, and only once it is asked for: the libraries of evaluation take seconds.
SUITES = ("tofu", "muse", "wmdp", "copyright", "detox", "own")
COMMANDS = {
    "attack": ("soul_eval.attacks.command", "main"),
    "summarise": ("soul_eval.commands", "summarise"),
    "compare": ("soul_eval.commands", "compare"),
    "report": ("soul_eval.commands", "report"),
    "chat": ("soul_eval.chat", "run"),
    "reapply": ("soul_eval.reapply", "main"),
    "verify": ("soul_eval.evidence.command", "main"),
    "record": ("soul_eval.evidence.command", "complete"),
}


def main(arguments: list[str] | None = None, program: str = PROGRAM) -> int:
    """
    Runs the command line.

    Args:
        arguments (`list[str]`, *optional*): By default those of the process.
        program (`str`, *optional*): What messages call it.

    Returns:
        `int`: The exit status.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in HELP:
        show(__doc__.strip().replace(PROGRAM, program))
        return 0
    name, *rest = arguments
    if name not in (*SUITES, *COMMANDS):
        return refuse_unknown(name, (*SUITES, *COMMANDS), program)
    command = f"{program} {name}"
    if set(rest) & set(HELP) and (text := help_text(HELP_TEXTS, name, command)):
        show(text)
        return 0
    return run(command, partial(call, name), rest)


def call(name: str, arguments: list[str]) -> object:
    """Imports a command and runs it."""
    if name in SUITES:
        return import_module("soul_eval.commands").suite(name, arguments)
    module, function = COMMANDS[name]
    return getattr(import_module(module), function)(arguments)


if __name__ == "__main__":
    sys.exit(main())
