"""
Types and ranges of what files of an evaluation hold, checked when they are read: files come from other machines too,
and figures and pages are made of them. Imports no torch.
"""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from pydantic import ValidationError

_OF_NUMBERS = ("finite_number", "float_type")


def check(value: Any, kind: str, where: str = "", of: str = "", advice: str = "") -> None:
    """
    Raises if a value is not what its file may hold.

    Args:
        value (`Any`): As JSON knows it. It is left as it is.
        kind (`str`): `"row"`, `"header"`, `"finding"` of a journal, `"verdicts"` or `"general"`.
        where (`str`, *optional*): Begins the message: file and line.
        of (`str`, *optional*): What the value is, to go after the name of the field: ``" of row 3 of `forget`"``.
        advice (`str`, *optional*): Ends the message, if a number is none or not finite.

    Raises:
        ValueError: If a field has another type or is out of its range. The message names the field, its value and what
            is allowed.
    """
    # Here, because `--help` of every command would wait for pydantic.
    from pydantic import ValidationError

    from .file_models import ADAPTERS

    try:
        ADAPTERS[kind].validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{where}{_sentence(error, value, of, advice)}") from None


def _sentence(error: "ValidationError", value: Any, of: str, advice: str) -> str:
    errors = error.errors(include_url=False)
    # Of what the choices of a union say, the one that goes furthest into the value.
    found = max(errors, key=lambda each: (each["type"] == "finite_number", len(_path(each["loc"], value)[0])))
    names, entry = _path(found["loc"], value)
    if found["type"] == "missing":
        names += [] if entry is None else [str(entry)]
        return f"`{'.'.join([*names, str(found['loc'][-1])])}`{of} is missing."
    given = repr(found["input"])
    given = given if len(given) <= 80 else f"{given[:79]}…"
    is_number = found["type"] in _OF_NUMBERS
    allowed = "must be a finite number" if is_number else found["msg"].replace("Input should", "must", 1)
    ending = f" {advice}" if advice and is_number else ""
    field = f"`{'.'.join(names)}`" if names else "a line"
    return f"{field}{of} {allowed}, but {'it' if entry is None else f'entry {entry}'} is {given}.{ending}"


def _path(places: tuple, value: Any) -> tuple[list[str], int | None]:
    """
    Names on the way to a field, and a place in its list. Between them, pydantic names the choices of a union, which no
    file has.
    """
    names, entry = [], None
    for place in places:
        is_there = isinstance(place, int) and isinstance(value, list) and place < len(value)
        if is_there:
            entry, value = place, value[place]
        elif isinstance(value, dict) and place in value:
            names += [str(place)] if entry is None else [str(entry), str(place)]
            entry, value = None, value[place]
    return names, entry
