"""Parsers of the command line: errors in a sentence, and help that begins with the flags that matter."""

import argparse
import difflib
import inspect
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import partial

from transformers import HfArgumentParser, TrainingArguments


# Texts of help are files too, which a terminal's width must not change.
WIDTH, MISUSED = 100, 2
# Of the 100 and more settings of TrainingArguments, those that a run is likely to need.
COMMON = (
    *("output_dir", "optim", "learning_rate", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
    *("lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "bf16", "fp16", "use_cpu", "seed"),
    *("logging_steps", "save_strategy", "save_steps", "resume_from_checkpoint", "report_to", "run_name"),
    *("push_to_hub", "hub_model_id", "disable_tqdm"),
)
TRAINING, REST = "Training", "Other settings of transformers.TrainingArguments"


class _Sentences(argparse.ArgumentParser):
    """Errors in one sentence, without the usage, that name the flags nearest to an unknown one."""

    def __init__(self, *args, prog: str | None = None, **settings):
        # Required, but not until all that is unknown is found; `--help` is answered meanwhile.
        self._waived: list[argparse.Action] = []
        super().__init__(*args, prog=prog or _program(), allow_abbrev=False, **settings)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """As in the base class, but what is unknown is an error, and found before what is missing."""
        required = self._waived = [action for action in self._actions if action.required]
        for action in required:
            action.required = False
        try:
            found, unknown = super().parse_known_args(args, namespace)
        finally:
            self._waived = []
            for action in required:
                action.required = True
        if unknown:
            self.error(_unknown(unknown, [option for action in self._actions for option in action.option_strings]))
        return super().parse_known_args(args, namespace) if required else (found, unknown)

    def _needed(self) -> list[argparse.Action]:
        return [each for each in self._actions if each.required or each in self._waived or not each.option_strings]

    def error(self, message: str) -> None:
        """Prints the message and ends the process with status 2."""
        end = "" if message.endswith(("?", ".")) else "."
        self.exit(MISUSED, f"{self.prog}: error: {message}{end} See {self.prog} --help.\n")


class PlainParser(_Sentences):
    """
    An [`~argparse.ArgumentParser`] whose errors are one sentence.

    Args:
        description (`str`, *optional*): What `--help` prints first, as it is.
        prog (`str`, *optional*): Name of the command; by default that of the process.
    """

    def __init__(self, description: str = "", prog: str | None = None):
        formatter = partial(argparse.RawDescriptionHelpFormatter, width=WIDTH)
        super().__init__(prog=prog, description=description.strip(), formatter_class=formatter)

    def format_help(self) -> str:
        """The text of `--help`, which is the same in all versions of Python."""
        self.usage = " ".join([self.prog, *map(_named, self._needed()), "[--flag VALUE ...]"])
        return super().format_help()


class CommandParser(_Sentences, HfArgumentParser):
    """
    A [`~transformers.HfArgumentParser`] for people: an unknown flag is an error of one sentence, and `--help` prints a
    section for each class of settings, a class before those that it inherits from, each flag under one name, and at
    the end what is seldom needed of `TrainingArguments`. Flags must be written out.

    Args:
        dataclass_types (`type` or `Sequence[type]`): Dataclasses, whose fields are the flags.
        description (`str`, *optional*): What `--help` prints first, as it is.
        prog (`str`, *optional*): Name of the command; by default that of the process.
    """

    def __init__(self, dataclass_types, description: str | None = None, prog: str | None = None):
        super().__init__(dataclass_types, prog=prog, description=description, formatter_class=_Formatter)

    def format_help(self) -> str:
        """The text of `--help`."""
        formatter = self._get_formatter()
        needed = [f"{action.option_strings[0]} {_value_of(action)}" for action in self._needed()]
        formatter.add_usage(" ".join([self.prog, *needed, "[--flag VALUE ...]"]), [], [])
        formatter.add_text((self.description or "").strip())
        for title, actions in self._sections():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()

    def _sections(self) -> Iterable[tuple[str, list[argparse.Action]]]:
        by_name = {action.dest: action for action in reversed(self._actions) if action.dest != "help"}
        trains = any(issubclass(kind, TrainingArguments) for kind in self.dataclass_types)
        inherited = [setting.name for setting in fields(TrainingArguments) if trains and setting.name in by_name]
        for kind in self.dataclass_types:
            for base in kind.__mro__[:-1]:
                if base is TrainingArguments:
                    continue
                own = [name for name in inspect.get_annotations(base) if name in by_name and name not in inherited]
                if own:
                    yield _title(base), [by_name.pop(name) for name in own]
        if trains:
            yield TRAINING, [by_name[name] for name in COMMON if name in inherited]
            yield REST, [by_name[name] for name in inherited if name not in COMMON]


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Each flag under one name, with its kind of value and with its default, if it has one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=WIDTH)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flag = action.option_strings[0]
        if action.nargs == "?" and action.default is True:
            flag = f"--[no_]{flag.removeprefix('--')}"
        return f"{flag} {_value_of(action)}".rstrip()

    def _expand_help(self, action: argparse.Action) -> str:
        text = (action.help or "") % {**vars(action), "prog": self._prog}
        text = " ".join(text.split())
        if action.choices is not None and len(action.choices) > 1:
            text += f" One of {', '.join(map(str, action.choices))}."
        default = getattr(action.default, "value", action.default)
        if default is False or default in (None, argparse.SUPPRESS, "", []) or action.required:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        return f"{text} (default: {shown})"


def _named(action: argparse.Action) -> str:
    """An argument of a plain parser in its usage."""
    value = action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else action.dest.upper())
    return " ".join([*action.option_strings[:1], value])


def _program() -> str:
    """What the user typed: `soul tofu`, `tofu.py`, `python -m soul_trainer.influence`."""
    name, spec = os.path.basename(sys.argv[0]), getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec and name.endswith(".py") else name


def _value_of(action: argparse.Action) -> str:
    """What stands for the value of a flag."""
    if action.nargs == 0:
        return ""
    names = {int: "INT", float: "FLOAT", str: "TEXT", dict: "JSON"}
    value = names.get(action.type, "VALUE")
    if action.choices is not None:
        value = "CHOICE"
    elif action.nargs == "?":
        return "[BOOL]"
    return f"{value} ..." if action.nargs in ("+", "*") else value


def _title(kind: type) -> str:
    """The first sentence of a class's docstring, or its name."""
    text = " ".join((inspect.getdoc(kind) or kind.__name__).split("\n\n")[0].split())
    return text.split(". ")[0].rstrip(".:").replace("`", "")


def _unknown(unknown: list[str], known: list[str]) -> str:
    flags = [each.partition("=")[0] for each in unknown if each.startswith("--")]
    if not flags:
        return f"unexpected argument {unknown[0]!r}"
    written = [option for option in known if "-" not in option.removeprefix("--")]
    hints = []
    for flag in flags:
        wanted = flag.replace("-", "_").replace("__", "--", 1)
        begun = [option for option in written if option.startswith(wanted)]
        near = list(dict.fromkeys([*begun, *difflib.get_close_matches(wanted, written, n=3)]))[:3]
        hints.append(f"unknown flag {flag}" + (f", did you mean {' or '.join(near)}?" if near else ""))
    return ", ".join(hints)
