"""Temporary folders that tell whose they are, so that those of killed runs can be found; see clean.py."""

import os
import re
import socket
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp


# Then comes the process, which may still be at work.
PREFIX, REFERENCE = "soul-trainer-", "_reference-"


def scratch_folder() -> TemporaryDirectory:
    """A temporary folder of this process."""
    return TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-", ignore_cleanup_errors=True)


def reference_folder(folder: Path) -> str:
    """Makes a folder of this process in that of a run; the underscore keeps it off the hub."""
    return mkdtemp(prefix=f"{REFERENCE}{own_name()}-", dir=folder)


def own_name() -> str:
    """This process and its machine: an output folder may be seen by several machines."""
    return f"{os.getpid()}-{socket.gethostname()}"


def machine_of(name: str) -> str | None:
    """The machine on which a folder of this name was made, if the name tells."""
    found = re.fullmatch(rf"{REFERENCE}\d+-(.+)-[^-]+", name)
    return found and found[1]


def process_of(name: str) -> int | None:
    """The process that made a folder of this name; `None` if the name is none of ours."""
    for prefix in (PREFIX, REFERENCE):
        number = name.removeprefix(prefix).partition("-")[0]
        if name.startswith(prefix) and number.isdecimal():
            return int(number)
    return None
