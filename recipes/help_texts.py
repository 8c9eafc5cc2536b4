"""
Writes what `--help` prints into files, because to make it takes seconds: parsers import transformers.

    python -m soul_recipes.help_texts      # after a change of a flag; a test fails until then

Texts of recipes and of the trainer's commands go to recipes/help, those of `python -m soul_eval` to eval/help.
"""

import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from io import StringIO
from pathlib import Path

import soul_eval.__main__ as evaluation
from soul_eval.console import COMMAND
from soul_recipes.command import COMMANDS, EVALUATION, HELP_TEXTS
from soul_trainer.records import write_whole


# How docstrings call the command.
_SCRIPT = r"(accelerate launch|python) recipes/{name}\.py"
_MODULE = r"python -m soul_(eval[ .]{name}|trainer\.{name})\b"


def help_texts() -> dict[Path, str]:
    """
    The texts of all commands, as their parsers print them now.

    Returns:
        `dict[Path, str]`: By file.
    """
    texts = {}
    for name, command in COMMANDS.items():
        if command.module != EVALUATION:
            function = getattr(import_module(command.module), command.function)
            texts[HELP_TEXTS / f"{name}.txt"] = _printed(name, function)
            for part in command.parts:
                texts[HELP_TEXTS / f"{name}_{part}.txt"] = _printed(name, function, part)
    for name in (*evaluation.SUITES, *evaluation.COMMANDS):
        texts[evaluation.HELP_TEXTS / f"{name}.txt"] = _printed(name, partial(evaluation.call, name))
    return texts


def _printed(name: str, function: Callable[[list[str]], object], *before: str) -> str:
    former, sys.argv = sys.argv, [COMMAND]
    try:
        with redirect_stdout(StringIO()) as printed:
            function([*before, "--help"])
    except SystemExit:
        pass
    finally:
        sys.argv = former
    text = printed.getvalue()
    for pattern in (_SCRIPT, _MODULE):
        text = re.sub(pattern.format(name=name), COMMAND, text)
    return text


def main() -> None:
    """Writes the files that differ, and says which."""
    texts = help_texts()
    for folder in {path.parent for path in texts}:
        for path in set(folder.glob("*.txt")) - set(texts):
            path.unlink()
    for path, text in texts.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_whole(path, text)
            print(path)


if __name__ == "__main__":
    main()
