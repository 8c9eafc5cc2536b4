"""
Pages of HTML from the templates in `templates/`. Every value that a template shows is escaped, whatever its type, and
control characters are spelled out. Imports no torch.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from jinja2 import Environment

# Directional overrides and isolates turn the text around them too, and the others are invisible.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """
    Spells out control characters, directional overrides and lone surrogates: `\\u202e`.

    Args:
        text (`str`): Of any origin. Line breaks and tabs stay.
    """
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def render(template: str, **values: Any) -> str:
    """
    Fills in a template.

    Args:
        template (`str`): Name of a file in `templates/`.
        **values: What it shows. None of them can add markup.
    """
    return _environment().get_template(template).render(values)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    # Here, because `--help` of every command would wait for it.
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = files(__package__).joinpath("templates")
    environment = Environment(
        loader=FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        finalize=_finalized,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = _unbroken
    return environment


def _finalized(value: Any) -> Any:
    from markupsafe import Markup

    if isinstance(value, Markup):  # a macro's output, or what is marked as safe
        return value
    return visible(str(value))


def _unbroken(text: str) -> str:
    """No line ends within an interval."""
    return re.sub(r"\[([^][]+), ([^][]+)\]", "[\\1,\u00a0\\2]", text)
