"""Settings of a recipe: from the command line, over a YAML file, over the task's defaults."""

import argparse
import difflib
import inspect
from collections.abc import Container, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging

from soul_trainer.command_line import CommandParser
from soul_trainer.precision import bf16_support, needs_use_cpu


logger = logging.get_logger(__name__)

DEFAULTS_FILE = "defaults.yaml"


class SettingsParser(CommandParser):
    """
    A [`~soul_trainer.command_line.CommandParser`] that tells what the command line names from what it leaves open, so
    that a file can come between the two.

    Args:
        dataclass_types (`Sequence[type]`):
            Dataclasses; their fields are the flags and the keys of files. The docstring of the first one's module is
            what `--help` begins with.
    """

    def __init__(self, dataclass_types: Sequence[type]):
        super().__init__(dataclass_types, description=inspect.getmodule(dataclass_types[0]).__doc__)
        self._flags = {action.dest: action for action in reversed(self._actions) if action.dest != "help"}
        # A file may give what has no default: `build` says what is missing then.
        for action in self._flags.values():
            action.required = False

    def named(self, arguments: Sequence[str] | None = None) -> dict[str, Any]:
        """
        Args:
            arguments (`Sequence[str]`, *optional*): By default those of the process.

        Returns:
            `dict[str, Any]`: The values that the command line names, by field, and no default.
        """
        unset = object()
        found = self.parse_args(arguments, argparse.Namespace(**dict.fromkeys(self._flags, unset)))
        return {name: value for name, value in vars(found).items() if value is not unset}

    def read(self, path: str | Path) -> dict[str, Any]:
        """
        Reads a settings file. Values are those of the command line, so that `5e-6` is a number here, though YAML takes
        it for a text.

        Args:
            path (`str` or `Path`): A YAML file of fields and values.

        Returns:
            `dict[str, Any]`: The values, by field, each of the field's type.

        Raises:
            ValueError: If there is no such file, it is no mapping, or has a key that no dataclass has as a field (the
                nearest are named) or a value that is none of the field's type.
        """
        if not Path(path).is_file():
            raise ValueError(f"`config`={str(path)!r}: no such file.")
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold settings, `field: value` a line, but it holds {content!r}.")
        for key in content:
            if key not in self._flags:
                near = difflib.get_close_matches(str(key), self._flags, n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(self._flags))}."
                raise ValueError(f"{path}: unknown key {key!r}; {hint}")
        return {key: self._typed(path, key, value) for key, value in content.items()}

    def _typed(self, path: str | Path, key: str, value: Any) -> Any:
        action = self._flags[key]
        if isinstance(value, list) and action.nargs == "+":
            return [self._typed(path, key, each) for each in value]
        if value is None or isinstance(value, (dict, list)):
            return value
        try:
            # As text, so that no fraction is cut off for an integer.
            typed = action.type(str(value))
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            kind = getattr(action.type, "__name__", "value").replace("string_to_bool", "bool")
            raise ValueError(f"{path}: `{key}` must be of type {kind}, but it is {value!r}.") from error
        if action.choices is not None and typed not in action.choices:
            hint = ' In YAML, a bare no is false: write "no".' if value is False else ""
            raise ValueError(
                f"{path}: `{key}` must be one of {', '.join(map(str, action.choices))}, but it is {value!r}.{hint}"
            )
        return typed

    def build(self, values: dict[str, Any], named: Container[str] | None = None) -> tuple:
        """
        Args:
            values (`dict[str, Any]`): By field; the others get their defaults.
            named (`Container[str]`, *optional*):
                Fields that the command line names, by default all. A `bf16: true` of a file is left out on a device
                that is not made for it, and one of the command line is an error there.

        Returns:
            `tuple`: An instance of each dataclass. Ends the process, as a parser does, if a required value is missing.

        Raises:
            ValueError: If the command line asks for bfloat16, and there is no GPU.
        """
        required = [
            setting.name
            for kind in self.dataclass_types
            for setting in fields(kind)
            if setting.init and setting.default is MISSING and setting.default_factory is MISSING
        ]
        if missing := [f"--{name}" for name in required if name not in values]:
            self.error(f"the following arguments are required: {', '.join(missing)}")
        return self.parse_dict(_fitting(values, named is None or "bf16" in named))


def _fitting(values: dict[str, Any], insists: bool) -> dict[str, Any]:
    """The values with bfloat16 where the device is made for it, or where it is insisted on."""
    if not values.get("bf16"):
        return values
    support = bf16_support(bool(values.get("use_cpu")))
    if not insists and not support.is_fast:
        logger.warning_once(
            f"Precision: float32 and not the `bf16` of the settings file, because {support.device}. --bf16 on the "
            "command line insists on it."
        )
        return {name: value for name, value in values.items() if name != "bf16"}
    use_cpu = bool(values.get("use_cpu"))
    return {**values, "use_cpu": use_cpu or needs_use_cpu(True, use_cpu)}


def settings_file(folder: Path, optimizer: str, forget_loss: str) -> Path | None:
    """
    The file of a folder that fits a run: `<optimizer>_<forget_loss>.yaml` or, failing that, `<optimizer>.yaml`.

    Args:
        folder (`Path`): Such as `recipes/configs/tofu`.
        optimizer (`str`): `"soul"`, `"sophia"` or, for all others, `"adamw"`.
        forget_loss (`str`): Name of the loss.

    Returns:
        `Path`: `None` where there is neither.
    """
    files = [folder / f"{optimizer}{loss}.yaml" for loss in (f"_{forget_loss}", "")]
    return next((file for file in files if file.is_file()), None)
