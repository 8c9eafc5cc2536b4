"""
The command `soul`: recipes, evaluation and tools by name. Nothing is imported before it is needed, so that help is
there at once.
"""

import os
import sys
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from soul_eval.console import DEBUG, HELP, MISUSED, help_text, misuse, refuse_unknown, run, show
from soul_recipes.launching import launch_files, split_launch, start_processes


PROGRAM = "soul"
HELP_TEXTS = Path(__file__).parent / "help"
EVALUATION = "soul_eval.__main__"


class Command(NamedTuple):
    """
    A command.

    Attributes:
        module (`str`): What is imported. The commands of [`EVALUATION`] have their help there.
        function (`str`): Takes the list of arguments; an integer that it returns is the exit status.
        summary (`str`): What it does, on one line.
        is_shared (`bool`): Whether several processes may share its work.
        parts (`tuple[str, ...]`): What comes first among its arguments, each with a help of its own.
    """

    module: str
    function: str
    summary: str
    is_shared: bool = False
    parts: tuple[str, ...] = ()


DIFFERENCE = "Save what unlearning changed, or apply it to another version."
COMMANDS = {
    "unlearn": Command("soul_recipes.unlearn", "main", "Make a model forget rows of your own.", True),
    "finetune": Command("soul_recipes.finetune", "command", "Train a target or a gold model on rows.", True),
    "tofu": Command("soul_recipes.tofu", "main", "Unlearn fictitious authors (TOFU).", True),
    "muse": Command("soul_recipes.muse", "main", "Unlearn news or books (MUSE).", True),
    "wmdp": Command("soul_recipes.wmdp", "main", "Unlearn hazardous knowledge (WMDP).", True),
    "copyright": Command("soul_recipes.copyright", "main", "Unlearn a copyrighted text.", True),
    "detox": Command("soul_recipes.detox", "main", "Unlearn toxic answers.", True),
    "search": Command("soul_recipes.search", "main", "Search settings on TOFU with Optuna.", True),
    "study": Command("soul_recipes.study", "main", "Compare optimizers over many runs (docs/study.md)."),
    "eval": Command(EVALUATION, "main", "Evaluate a model on a suite.", True),
    "attack": Command(EVALUATION, "main", "Try to recover what a model has forgotten."),
    "summarise": Command(EVALUATION, "main", "Print the figures of evaluated rows."),
    "compare": Command(EVALUATION, "main", "Test whether two models differ on the same rows."),
    "report": Command(EVALUATION, "main", "Write a page about evaluated rows."),
    "chat": Command(EVALUATION, "main", "Talk to models before and after, side by side."),
    "verify": Command(EVALUATION, "main", "Check the record of a run."),
    "record": Command(EVALUATION, "main", "Complete or sign the record of a run."),
    "reapply": Command(EVALUATION, "main", "Make a later version of a model forget again."),
    "curvature": Command("soul_trainer.curvature.command", "command", "Measure curvature, for later requests.", True),
    "influence": Command("soul_trainer.influence_command", "command", "Unlearn without training, by curvature."),
    "difference": Command("soul_trainer.difference", "command", DIFFERENCE, parts=("save", "apply")),
    "consolidate": Command("soul_trainer.consolidate", "command", "Merge a sharded checkpoint into one."),
    "clean": Command("soul_trainer.clean", "command", "List or delete what killed runs left behind."),
}
GROUPS = {
    "Unlearn": ("unlearn", "tofu", "muse", "wmdp", "copyright", "detox", "influence"),
    "Evaluate": ("eval", "attack", "summarise", "compare", "report", "chat"),
    "Prepare and search": ("finetune", "curvature", "search", "study"),
    "Afterwards": ("verify", "record", "difference", "reapply", "consolidate", "clean"),
}


def main(arguments: list[str] | None = None) -> int:
    """
    Runs the command line.

    Args:
        arguments (`list[str]`, *optional*): By default those of the process.

    Returns:
        `int`: The exit status.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in HELP:
        show(overview())
        return 0
    if arguments[0] == "--version":
        show(f"soul-trainer {version('soul-trainer')}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return refuse_unknown(name, COMMANDS, PROGRAM)
    called, wants_help = f"{PROGRAM} {name}", bool(set(rest) & set(HELP))
    topic = f"{name} {rest[0]}" if rest and rest[0] in COMMANDS[name].parts else name
    if wants_help and (text := help_text(HELP_TEXTS, topic, called)):
        show(text + own_flags(name))
        return 0
    try:
        launch, rest = split_launch(rest, COMMANDS[name].is_shared)
    except ValueError as error:
        print(misuse(called, str(error)), file=sys.stderr)
        return MISUSED
    # Under a launcher, this is one of its processes.
    if launch and not wants_help and "RANK" not in os.environ:
        return run(called, lambda _: start_processes(launch, [name, *rest]), [])
    command = COMMANDS[name]
    if command.module == EVALUATION:
        evaluate = import_module(EVALUATION).main
        status = evaluate(rest, called) if name == "eval" else evaluate([name, *rest], PROGRAM)
        if wants_help and not status:
            show(own_flags(name))
        return status
    return run(called, partial(_call, command), rest)


def _call(command: Command, arguments: list[str]) -> object:
    return getattr(import_module(command.module), command.function)(arguments)


def overview() -> str:
    """The text of `soul --help`."""
    lines = [
        f"usage: {PROGRAM} COMMAND [--flag VALUE ...]",
        "",
        "Makes language models forget, and reports what is left.",
    ]
    for title, names in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<13}{COMMANDS[name].summary}" for name in names)]
    return "\n".join([*lines, "", f"{PROGRAM} COMMAND --help lists the flags of a command; {PROGRAM} --version."])


def own_flags(name: str) -> str:
    """What follows the flags of a command in its help: those that each command has."""
    lines = ["", "Of each command:", f"  {DEBUG:<26}After an error, print the traceback too."]
    if COMMANDS[name].is_shared:
        lines += [
            f"  {'--num_processes INT':<26}Share the work among so many processes, by accelerate's launcher.",
            f"  {'--accelerate_config FILE':<26}Launch with a configuration of accelerate: a file, or one of",
            f"  {'':<26}{', '.join(launch_files())}.",
        ]
    return "\n".join([*lines, ""])
