"""One command at a time in an output folder, and the same run on all of its processes."""

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.utils import logging

from .engines import Engine
from .leftovers import LOCK, PART, ROWS, delete_leftovers, find_leftovers, lock_of
from .scratch import own_name


logger = logging.get_logger(__name__)

# What the next command in a folder deletes; a measurement, or an evaluation, that was cut off is gone on with.
_DELETED = (ROWS, PART)


@contextmanager
def hold_folder(folder: str | Path, engine: Engine | None = None) -> Iterator[None]:
    """
    A context in which no other command writes to a folder. What killed runs left in it, copies of rows and
    half-written files, is deleted first.

    Args:
        folder (`str` or `Path`): An output folder; it is made if it is not there.
        engine ([`~engines.Engine`], *optional*): Whose first process holds the folder for all of them.

    Raises:
        ValueError: If another command holds it; its process and machine are named.
    """
    engine, folder = engine or Engine(), Path(folder)
    own = engine.gather([own_name()])
    with _hold(folder / LOCK, f"The folder {str(folder)!r}", engine) as is_held:
        if is_held:
            left = find_leftovers(folder, folder / LOCK, own)
            if gone := delete_leftovers([leftover for leftover in left if leftover.kind in _DELETED]):
                logger.warning(f"Deleted what a killed run left: {', '.join(str(each.path) for each in gone)}.")
        if engine.num_processes > 1:
            engine.gather([])  # before another makes files that look like leftovers
        yield


@contextmanager
def hold_output(path: str | Path, engine: Engine | None = None) -> Iterator[None]:
    """
    A context in which no other command writes a file, or a folder that takes the place of another at the end.

    Args:
        path (`str` or `Path`): What is written; a lock lies beside it.
        engine ([`~engines.Engine`], *optional*): Whose first process holds it for all of them.

    Raises:
        ValueError: If another command is writing it; its process and machine are named.
    """
    with _hold(lock_of(path), f"The output {str(path)!r}", engine or Engine()):
        yield


@contextmanager
def _hold(path: Path, what: str, engine: Engine) -> Iterator[bool]:
    """Holds a lock; yields whether this process does."""
    lock, refusals = FileLock(path, timeout=0, thread_local=False), []
    is_new = not path.parent.exists()
    if engine.process_index == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            holder = {"process": os.getpid(), "machine": socket.gethostname(), "since": time.strftime("%F %T")}
            path.write_text(json.dumps(holder), encoding="utf-8")
        except NotImplementedError:  # a file system without locks
            logger.warning(f"{path.parent} cannot be held: let no other command write to it.")
        except Timeout:
            refusals = [f"{what} is in use by {_holder(path)}: choose another, or wait."]
        except OSError as error:
            refusals = [f"{what} cannot be written to: {error}."]
    if refusals := engine.gather(refusals):
        raise ValueError(refusals[0])
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            # While it is held: afterwards, the file may be another's.
            path.unlink(missing_ok=True)
            lock.release()
        if is_new and engine.process_index == 0 and path.parent.exists() and not any(path.parent.iterdir()):
            path.parent.rmdir()


def check_alike(engine: Engine, facts: Mapping[str, object]) -> None:
    """
    Checks that all processes of a run are at the same.

    Args:
        engine ([`~engines.Engine`]): Of the run.
        facts (`Mapping[str, object]`): What must not differ, by its name.

    Raises:
        ValueError: On every process, if something differs; it is named.
    """
    first, *others = engine.gather([{name: repr(value) for name, value in facts.items()}])
    for process, found in enumerate(others, start=1):
        for name in first:
            if found.get(name) != first[name]:
                here, there = (f"{value:.80}" for value in (first[name], str(found.get(name))))
                raise ValueError(
                    f"`{name}` differs between processes: {here} on process 0, and {there} on process {process}. "
                    "Start all of them with the same command, files and model."
                )


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['process']} on {holder['machine']} since {holder['since']}"
    except (OSError, ValueError, KeyError):  # it has just begun, or ended
        return "another command"
