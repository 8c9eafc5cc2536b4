"""
Lists what killed runs left behind in a folder, and deletes it when told: copies of rows, which know what was to be
forgotten, and files that were not finished.

    python -m soul_trainer.clean OUTPUT_DIR                  # lists, and deletes nothing
    python -m soul_trainer.clean OUTPUT_DIR --delete

Finished results and checkpoints are left alone. Stop the runs that write to the folder first: on this machine their
copies of rows are recognised and left alone, on another machine they are not.
"""

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from .command_line import PlainParser
from .scratch import PREFIX, process_of


ROWS, PART, FINDINGS, MEASUREMENT = "copies of rows", "half-written", "unfinished evaluation", "unfinished curvature"
_FOLDERS = {r"_reference-.+": ROWS, r".+\.part": PART, r"_consolidate-.+": PART}
# What this package writes, so that no browser's download is taken for ours.
_WRITTEN = "json|jsonl|md|txt|yaml|csv|html|png|svg|safetensors"
_FILES = {
    rf".+\.({_WRITTEN})\.part": PART,
    r".+\.jsonl\.part-\d+": FINDINGS,
    r".+\.progress\.safetensors": MEASUREMENT,
}


@dataclass(frozen=True)
class Leftover:
    """
    Something that a killed run left behind.

    Attributes:
        path (`Path`): A file or a folder.
        kind (`str`): `"copies of rows"`, `"half-written"`, `"unfinished evaluation"`, which the same command would go
            on with, or `"unfinished curvature"`, likewise.
        num_bytes (`int`): Its size.
        modified (`float`): When it was last written, in seconds since the epoch.
        kept_because (`str`, *optional*): Why it is not deleted.
    """

    path: Path
    kind: str
    num_bytes: int
    modified: float
    kept_because: str | None = None


def find_leftovers(folder: str | Path) -> list[Leftover]:
    """
    What killed runs left behind in a folder, and, on this machine, in the folder for temporary files.

    Args:
        folder (`str` or `Path`): The `output_dir` of runs, or a folder above. Links are not followed.

    Returns:
        `list[Leftover]`: By path.

    Raises:
        ValueError: If there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder`={str(folder)!r} is no folder: name the output_dir of a run.")
    scratch = Path(tempfile.gettempdir()).glob(f"{PREFIX}*")
    found = {path: ROWS for path in scratch if process_of(path.name) and os.access(path, os.W_OK)}
    found |= dict(_walk(folder))
    return [_leftover(path, kind) for path, kind in sorted(found.items())]


def delete_leftovers(leftovers: list[Leftover]) -> list[Leftover]:
    """
    Deletes what nothing speaks for keeping.

    Args:
        leftovers (`list[Leftover]`): From [`find_leftovers`].

    Returns:
        `list[Leftover]`: What is gone.

    Raises:
        OSError: If something cannot be deleted.
    """
    gone = [leftover for leftover in leftovers if leftover.kept_because is None]
    for leftover in gone:
        if leftover.path.is_dir():
            shutil.rmtree(leftover.path)
        else:
            leftover.path.unlink()
    return gone


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    for place, folders, files in os.walk(folder):
        for names, kinds in ((folders, _FOLDERS), (files, _FILES)):
            for name in list(names):
                path = Path(place, name)
                kind = next((kind for pattern, kind in kinds.items() if re.fullmatch(pattern, name)), None)
                if kind is None or path.is_symlink() or (path.suffix == ".part" and not _is_ours(path)):
                    continue
                yield path, kind
                if path.is_dir():
                    folders.remove(name)  # what is in it goes, or stays, with it


def _is_ours(path: Path) -> bool:
    """Whether something half-written is a file, whose name has told, or a folder that was to become a model's."""
    inside = [] if path.is_file() else [each.name for each in path.iterdir()]
    return not inside or any(re.fullmatch(r".+\.(safetensors|json)|checkpoint-\d+", name) for name in inside)


def _leftover(path: Path, kind: str) -> Leftover:
    inside = [path, *(path.rglob("*") if path.is_dir() else ())]
    stats = [each.lstat() for each in inside]
    size = sum(stat.st_size for each, stat in zip(inside, stats) if not each.is_dir())
    kept_because, process = None, process_of(path.name)
    if any(re.fullmatch(r"checkpoint-\d+", each.name) for each in inside):
        kept_because = "it holds a checkpoint"
    elif process and psutil.pid_exists(process):
        kept_because = f"process {process} is at work"
    return Leftover(path, kind, size, max(stat.st_mtime for stat in stats), kept_because)


def _line(leftover: Leftover, now: float) -> str:
    hours = max(0.0, now - leftover.modified) / 3600
    age = f"{hours:.0f} hours ago" if hours < 48 else f"{hours / 24:.0f} days ago"
    kept = f", kept: {leftover.kept_because}" if leftover.kept_because else ""
    return f"{leftover.kind:<22} {leftover.num_bytes / 2**20:>9.2f} MiB {age:>13}  {leftover.path}{kept}"


def command(arguments: list[str] | None = None) -> None:
    """Does what the command line asks for; errors are those of [`find_leftovers`] and [`delete_leftovers`]."""
    parser = PlainParser(__doc__)
    parser.add_argument("folder", metavar="OUTPUT_DIR", help="folder of a run, or one above several")
    parser.add_argument("--delete", action="store_true", help="delete what is listed; without, nothing is deleted")
    args = parser.parse_args(arguments)
    leftovers, now = find_leftovers(args.folder), time.time()
    for leftover in leftovers:
        print(_line(leftover, now))
    deletable = [leftover for leftover in leftovers if leftover.kept_because is None]
    if not deletable:
        print("There is nothing to delete.")
    elif args.delete:
        print(f"Deleted: {len(delete_leftovers(leftovers))}.")
    else:
        print(f"{len(deletable)} can be deleted: add --delete.")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        command(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
