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


logger = logging.get_logger(__name__)

# The underscore keeps it off the hub.
LOCK = "_held.lock"


@contextmanager
def hold_folder(folder: str | Path, engine: Engine | None = None) -> Iterator[None]:
    """
    A context in which no other command writes to a folder.

    Args:
        folder (`str` or `Path`): An output folder; it is made if it is not there.
        engine ([`~engines.Engine`], *optional*): Whose first process holds the folder for all of them.

    Raises:
        ValueError: If another command holds it; its process and machine are named.
    """
    engine = engine or Engine()
    path = Path(folder) / LOCK
    lock, refusals = FileLock(path, timeout=0, thread_local=False), []
    is_new = not path.parent.exists()
    if engine.process_index == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
            holder = {"process": os.getpid(), "machine": socket.gethostname(), "since": time.strftime("%F %T")}
            path.write_text(json.dumps(holder), encoding="utf-8")
        except NotImplementedError:  # a file system without locks
            logger.warning(f"{folder} cannot be held: let no other command write to it.")
        except Timeout:
            refusals = [f"The folder {str(folder)!r} is in use by {_holder(path)}: choose another, or wait."]
    if refusals := engine.gather(refusals):
        raise ValueError(refusals[0])
    try:
        yield
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
