"""
What killed runs leave behind in a folder: copies of rows, which know what was to be forgotten, and files that were not
finished. And who is at work in a folder, whose files are no leftovers.
"""

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from .scratch import PREFIX, machine_of, process_of


# The underscore keeps it off the hub.
LOCK = "_held.lock"

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


def lock_of(path: str | Path) -> Path:
    """Where a command that writes a file, or a folder that takes the place of another, says that it is at work."""
    path = Path(path)
    return path.with_name(f"_{path.name}{LOCK}")


def is_held(lock: Path) -> bool:
    """Whether a lock's process is alive; a killed one leaves the file behind."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0, thread_local=False):
            return False
    except (Timeout, OSError, NotImplementedError):  # nobody can tell: better not to delete
        return True


def find_leftovers(folder: str | Path, held: Path | None = None, own: Collection[str] = ()) -> list[Leftover]:
    """
    What killed runs left behind in a folder, and, on this machine, in the folder for temporary files.

    Args:
        folder (`str` or `Path`): The `output_dir` of runs, or a folder above. Links are not followed.
        held (`Path`, *optional*): The lock by which the caller holds the folder.
        own (`Collection[str]`, *optional*): The caller's processes, each as `process-machine`.

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
    busy = [lock for lock in folder.rglob(f"*{LOCK}") if lock != held and is_held(lock)]
    return [_leftover(path, kind, busy, own) for path, kind in sorted(found.items())]


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


def _is_written_under(lock: Path, path: Path) -> bool:
    if lock.name == LOCK:
        return path.is_relative_to(lock.parent)
    return path.parent == lock.parent and f"{path.name.removesuffix('.part')}" == lock.name[1:].removesuffix(LOCK)


def _leftover(path: Path, kind: str, busy: list[Path], own: Collection[str]) -> Leftover:
    inside = [path, *(path.rglob("*") if path.is_dir() else ())]
    stats = [each.lstat() for each in inside]
    size = sum(stat.st_size for each, stat in zip(inside, stats) if not each.is_dir())
    kept_because, process = None, process_of(path.name)
    if any(re.fullmatch(r"checkpoint-\d+", each.name) for each in inside):
        kept_because = "it holds a checkpoint"
    elif process and machine_of(path.name) in (None, socket.gethostname()) and psutil.pid_exists(process):
        kept_because = f"process {process} is at work"
    elif process and f"{process}-{machine_of(path.name)}" in own:
        kept_because = "it is this run's"
    elif any(_is_written_under(lock, path) for lock in busy):
        kept_because = "another command is at work in its folder"
    return Leftover(path, kind, size, max(stat.st_mtime for stat in stats), kept_because)
