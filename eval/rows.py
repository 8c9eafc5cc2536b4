"""
`rows.jsonl`: a header line with what was evaluated and how, then one line an example. Every figure is made from rows,
so that it can be made again without the model. Imports no torch.
"""

import json
import os
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


FORMAT = "soul_eval.rows/2"
OWNER_ONLY = 0o600
_LIBRARIES = ("soul-trainer", "torch", "transformers", "peft", "datasets", "numpy", "scipy", "rouge_score")


def make_header(model: str, settings: dict, seed: int, suite: str = "tofu", **identity: object) -> dict:
    """
    What it takes to make the rows again.

    Args:
        model (`str`): Path or hub id of the model.
        settings (`dict`): The settings of the evaluation.
        seed (`int`): The seed that was set, although nothing here draws at random.
        suite (`str`, *optional*, defaults to `"tofu"`): Whose rows they are.
        **identity: What else tells these rows from others: hashes of the weights and of the questions.

    Returns:
        `dict`: `format`, `suite`, `model`, `settings`, `seed`, `commit`, `libraries`, ``time`, and `identity`.
    """
    return {
        "format": FORMAT,
        "suite": suite,
        "model": model,
        **identity,
        "settings": settings,
        "seed": seed,
        "commit": _commit(),
        "libraries": {name: found for name in _LIBRARIES if (found := _version(name))},
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_rows(path: str | os.PathLike, rows: list[dict], header: dict | None = None) -> None:
    """
    Writes `rows.jsonl`, whole or not at all.

    Args:
        path (`str` or `os.PathLike`): The file; its folder is made.
        rows (`list[dict]`): One an example: `split`, `index`, `answer_nll`, ...
        header (`dict`, *optional*): From [`make_header`].
    """
    check_rows(rows)
    lines = ([{"format": FORMAT, **header}] if header else []) + rows
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines))


def read_rows(path: str | os.PathLike) -> tuple[dict, list[dict]]:
    """
    Reads `rows.jsonl`, with or without a header line.

    Args:
        path (`str` or `os.PathLike`): The file.

    Returns:
        `tuple[dict, list[dict]]`: The header, empty if there is none, and the rows. A row without an `index` gets its
        place in its split.

    Raises:
        ValueError: If a line is not a row, a field is of another type or out of its range, or two rows of a split have
            the same `index`; line and field are named.
    """
    header, rows, counts, lines_of = {}, [], {}, {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = _parse(line, f"{path}, line {number}")
            if "split" not in row:
                if number > 1:
                    raise ValueError(f"{path}, line {number}: a row needs a `split`, but it has {sorted(row)}.")
                header = row
                _check_header(header, f"{path}, line {number}: ")
                continue
            check_rows([row], f"{path}, line {number}: ")
            split = row["split"]
            row.setdefault("index", counts.get(split, 0))
            counts[split] = counts.get(split, 0) + 1
            first = lines_of.setdefault((split, row["index"]), number)
            if first != number:
                raise ValueError(f"{path}, line {number}: {_name(row)} is in line {first} already.")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    return header, rows


def check_rows(rows: Iterable[dict], where: str = "") -> None:
    """
    Checks rows against their [schema](schema.py).

    Args:
        rows (`Iterable[dict]`): The rows.
        where (`str`, *optional*): What an error begins with, before it names row and field.

    Raises:
        ValueError: If a field is of another type or out of its range.
    """
    # Imported here, because a command line's help needs no schema.
    from .schema import Row, check_fields

    for row in rows:
        check_fields(Row, row, where)


def write_whole(path: str | os.PathLike, content: str | bytes, mode: int = OWNER_ONLY) -> None:
    """
    Writes a file under another name and renames it, so that no reader meets half of it.

    Args:
        path (`str` or `os.PathLike`): The file. One that is there keeps its permissions.
        content (`str` or `bytes`): What goes in.
        mode (`int`, *optional*, defaults to `OWNER_ONLY`): Permissions of a new file: what is asked of a model, and
            what it says, is of rows that must be forgotten.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = path.stat().st_mode & 0o777 if path.exists() else mode
    temporary = path.with_name(path.name + ".part")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(temporary, path)


def _check_header(header: dict, where: str) -> None:
    from .schema import Header, check_fields

    check_fields(Header, header, where)
    found = header.get("format", FORMAT)
    name, _, number = str(found).partition("/")
    own_name, _, own_number = FORMAT.partition("/")
    if name != own_name or not number.isdigit():
        raise ValueError(f"{where}`format` is {found!r}, and rows of an evaluation have {FORMAT!r}.")
    if int(number) > int(own_number):
        raise ValueError(
            f"{where}`format` is {found!r}, of a later version than this one ({FORMAT!r}): update soul-trainer."
        )


def _parse(line: bytes, where: str) -> dict:
    try:
        text = line.decode("utf-8")
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}).") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object, but it is {text.strip()[:60]!r}.")
    return row


def _name(row: dict) -> str:
    return f"row {row.get('index')} of `{row.get('split')}`"


def _commit() -> str:
    """The commit of this code, marked if it was changed since; the package's version where git knows no commit."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # An installed copy may lie within a repository that is not its own.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True, text=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, check=True).stdout
        return found + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return f"soul-trainer {_version('soul-trainer') or 'unknown'}"


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
