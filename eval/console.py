"""What commands share: help that is there at once, errors as sentences, and the exit status. Imports nothing heavy."""

import argparse
import difflib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path


# Settings, files, missing libraries and runs that diverge raise these, with a message that says what to do.
EXPECTED = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
# Libraries raise these at what a user gave: damaged weights, a template, too little memory. By name, because to import
# the libraries takes seconds.
FOREIGN = ("SafetensorError", "DatasetsError", "TemplateError", "YAMLError", "BadZipFile", "UnpicklingError")
FOREIGN += ("EOFError", "OutOfMemoryError")
FAILED, MISUSED, INTERRUPTED = 1, 2, 130
HELP = ("-h", "--help")
DEBUG = "--debug"
# The Trainer has a flag of this name too, which takes one of these values.
TRAINER_DEBUG = ("underflow_overflow", "tpu_metrics_debug")
# Stands for the command in texts of help: `soul tofu` and `python -m soul_recipes tofu` are one.
COMMAND = "{command}"


class Parser(argparse.ArgumentParser):
    """
    A light [`~argparse.ArgumentParser`] whose errors are one sentence, without the usage. Flags must be written out.

    Args:
        **settings: Those of [`~argparse.ArgumentParser`]; `prog` is by default the command that [`run`] runs.
    """

    def __init__(self, **settings):
        # Texts of help are files too, which a terminal's width must not change.
        formatter = partial(argparse.RawDescriptionHelpFormatter, width=100)
        super().__init__(allow_abbrev=False, **{"prog": program(), "formatter_class": formatter, **settings})

    def parse_known_args(self, args=None, namespace=None):
        """As in the base class, but what is unknown is an error."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown argument {unknown[0]!r}, {nearest(unknown[0], known)}")
        return found, unknown

    def format_help(self) -> str:
        """The text of `--help`, which is the same in all versions of Python."""
        needed = [action for action in self._actions if action.required or not action.option_strings]
        named = [(*action.option_strings[:1], action.metavar or action.dest.upper()) for action in needed]
        self.usage = " ".join([self.prog, *(" ".join(each) for each in named), "[--flag VALUE ...]"])
        return super().format_help()

    def error(self, message: str) -> None:
        """Prints the message and ends the process with status 2."""
        self.exit(MISUSED, misuse(self.prog, message) + "\n")


def program() -> str:
    """The command that runs, as its user typed it: `soul tofu`, `tofu.py`."""
    return os.path.basename(sys.argv[0])


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names nearest to one that is not known, as the end of a message."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"


def misuse(command: str, message: str) -> str:
    """What a command says of arguments that it cannot take."""
    end = "" if message.endswith(("?", ".")) else "."
    return f"{command}: error: {message}{end} See {command} --help."


def show(text: str) -> None:
    """Prints a text that its reader, as `head`, may not want to the end."""
    try:
        print(text.rstrip("\n"), flush=True)
    except BrokenPipeError:
        _end_output()


def run(command: str, function: Callable[[list[str]], object], arguments: Sequence[str]) -> int:
    """
    Runs a command. What goes wrong with its settings, its files or its run is printed as a sentence; `--debug` among
    the arguments prints the traceback too.

    Args:
        command (`str`): What messages call it: `soul tofu`.
        function (`Callable`): Takes the arguments. What it imports may be missing.
        arguments (`Sequence[str]`): Of the command line.

    Returns:
        `int`: The exit status: the function's own if it returns one, else 0; 1 after an error, 130 after Ctrl-C.
    """
    arguments, shows_traceback = _without_debug(arguments)
    # Or else the first library that sets up logging, in the midst of a run, decides how warnings look from there on.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_demote_missing_kernel)
    former, sys.argv = sys.argv, [command, *arguments]
    try:
        status = function(arguments)
    except BrokenPipeError:
        _end_output()
        return FAILED
    except KeyboardInterrupt:
        if shows_traceback:
            traceback.print_exc()
        print(f"\n{command}: interrupted", file=sys.stderr)  # below a progress bar, or the terminal's ^C
        return INTERRUPTED
    except Exception as error:
        if not isinstance(error, EXPECTED) and not is_foreign(error):
            raise  # a bug of ours
        if shows_traceback:
            traceback.print_exc()
        print(f"{command}: error: {sentence(error)}", file=sys.stderr)
        return FAILED
    finally:
        sys.argv = former
    return status if isinstance(status, int) else 0


def is_foreign(error: BaseException) -> bool:
    """Whether an error is one that libraries raise at what a user gave."""
    return any(kind.__name__ in FOREIGN for kind in type(error).__mro__)


def sentence(error: BaseException) -> str:
    """What is said of an error: a library's own with its name, and what it came of, if that says more."""
    if not is_foreign(error):
        return str(error) or type(error).__name__
    causes = [error, error.__cause__] if error.__cause__ else [error]
    told = ", by ".join(f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}" for cause in causes)
    return f"{told}. {DEBUG} shows where."


def run_script(main: Callable[[], object]) -> int:
    """
    Runs a script's `main` on the arguments of the process; see [`run`].

    Args:
        main (`Callable`): Takes the list of arguments.

    Returns:
        `int`: The exit status.
    """
    return run(program(), main, sys.argv[1:])


def help_text(folder: Path, name: str, command: str) -> str | None:
    """
    Reads the help of a command from a file, which takes no time, as its parser would print it.

    Args:
        folder (`Path`): Of `<name>.txt` files.
        name (`str`): Of the file, with spaces for underscores.
        command (`str`): What the text is to call the command.

    Returns:
        `str`: `None` if there is no such file.
    """
    path = folder / f"{name.replace(' ', '_')}.txt"
    return path.read_text(encoding="utf-8").replace(COMMAND, command) if path.is_file() else None


def refuse_unknown(name: str, known: Iterable[str], command: str) -> int:
    """Says that there is no such command, and which are nearest; returns the exit status."""
    print(misuse(command, f"unknown command {name!r}, {nearest(name, known)}"), file=sys.stderr)
    return MISUSED


def _without_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    following = [*arguments[1:], ""]
    is_ours = [
        argument == DEBUG and not after.startswith(TRAINER_DEBUG) for argument, after in zip(arguments, following)
    ]
    return [argument for argument, ours in zip(arguments, is_ours) if not ours], any(is_ours)


def _end_output() -> None:
    """Whoever read the output has enough of it, and Python would complain once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _demote_missing_kernel(record: logging.LogRecord) -> bool:
    """
    peft imports bitsandbytes wherever it is installed, and that warns at its import that a faster kernel for 4-bit
    weights on a CPU is missing. Without such weights, that is no warning.
    """
    if not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward"):
        return True
    record.levelno, record.levelname = logging.INFO, "INFO"
    return logging.getLogger(record.name).isEnabledFor(logging.INFO)
