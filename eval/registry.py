"""
The column of every figure. One that is not among the known ones is shown all the same, under its own name. Imports no
torch.
"""

import re
from dataclasses import replace
from functools import cache

from .columns import GROUPS, Column
from .known_figures import COLUMNS


SUITES = ("tofu", "muse", "wmdp", "copyright", "detox", "own")


@cache
def column_of(key: str) -> Column:
    """
    The column of a figure.

    Args:
        key (`str`): Its name in a summary.

    Returns:
        [`~columns.Column`]: The one of `known_figures.COLUMNS` that fits best, with what its `*` stood for put in;
        where none fits, one without a direction, named after the key.
    """
    place, found = _match(key)
    if found is None:
        words = key.replace("_", " ").split()
        half = (len(words) + 1) // 2
        label = (" ".join(words[:half]), " ".join(words[half:]))
        return Column(key, label, None, "A figure that the report knows only by its name.", GROUPS[-1])
    filling = found.group(1).strip("_").replace("_", " ") if found.groups() else ""
    label = tuple(part.replace("*", filling).strip() for part in COLUMNS[place].label)
    return replace(COLUMNS[place], key=key, label=label)


def is_known(key: str) -> bool:
    """Whether one of `COLUMNS` fits."""
    return _match(key)[1] is not None


def place_of(key: str) -> tuple:
    """Where a figure stands among others: by group, by column, then by name with numbers as numbers."""
    name = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]
    return GROUPS.index(column_of(key).group), _match(key)[0], name


def _match(key: str) -> tuple[int, re.Match | None]:
    for place, pattern in _PATTERNS:
        if found := pattern.fullmatch(key):
            return place, found
    return len(COLUMNS), None


# Exact names, families with a beginning, then those that know only an end, which would take the others' figures.
_PATTERNS = [
    (place, re.compile(re.escape(column.key).replace(r"\*", "(.*)")))
    for place, column in sorted(enumerate(COLUMNS), key=lambda each: ("*" in each[1].key, each[1].key[0] == "*"))
]
