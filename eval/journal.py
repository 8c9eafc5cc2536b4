"""
What an evaluation has found so far, on disk: after a kill it goes on with the rows that are missing.

Each process adds to a file of its own, whose first line says what is evaluated. A file that says something else is of
no use and is removed. Imports no torch.
"""

import json
import logging
from pathlib import Path

from .rows import OWNER_ONLY, write_whole
from .schema import Findings, check_fields


logger = logging.getLogger(__name__)

Key = tuple[str, int, str]


class Journal:
    """
    The findings of an evaluation.

    Args:
        path (`Path`): The rows' file to be; the journal lies beside it.
        identity (`dict`): What the findings depend on, as JSON knows it.
        process_index (`int`, *optional*, defaults to 0): Of this process.
        gather (`Callable`, *optional*): Waits for all processes; see [`~soul_trainer.engines.Engine.gather`].

    Attributes:
        done (`dict[tuple[str, int, str], dict]`): Findings by split, index and part.
        is_stale (`bool`): Whether there were findings of something else, which are gone.
    """

    def __init__(self, path: Path, identity: dict, process_index: int = 0, gather=None):
        self.done: dict[Key, dict] = {}
        self.is_stale = False
        pieces = [piece for piece in sorted(path.parent.glob(f"{path.name}.part-*")) if piece.suffix != ".part"]
        first_line = json.dumps(identity, sort_keys=True)
        for piece in pieces:
            lines = piece.read_text(encoding="utf-8").split("\n")
            if len(lines) == 1:  # killed before its first line was whole
                continue
            if lines[0] != first_line:
                self.is_stale = True
                continue
            # What follows the last line break was cut off by a kill.
            for number, line in enumerate(lines[1:-1], start=2):
                self._take(line, f"{piece}, line {number}")
        if gather:
            gather([])
        if process_index == 0:
            entries = [json.dumps([key, fields], ensure_ascii=False) for key, fields in self.done.items()]
            write_whole(path.with_name(f"{path.name}.part-0"), "\n".join([first_line, *entries, ""]))
            for piece in pieces:
                if piece.name != f"{path.name}.part-0":
                    piece.unlink(missing_ok=True)
        if gather:
            gather([])
        self._path = path
        own = path.with_name(f"{path.name}.part-{process_index}")
        own.touch(OWNER_ONLY)
        self._file = own.open("a", encoding="utf-8")
        if process_index:
            self._file.write(first_line + "\n")
            self._file.flush()

    def _take(self, line: str, where: str) -> None:
        """Takes up a line. What it says of a row that cannot be read is asked again."""
        try:
            (split, index, part), fields = json.loads(line)
            is_known = isinstance(split, str) and isinstance(index, int) and isinstance(part, str)
            if not is_known or not isinstance(fields, dict):
                raise ValueError(f"it is {line[:60]!r}")
            check_fields(Findings, fields)
        except (ValueError, TypeError, RecursionError) as error:
            logger.warning(f"{where} is skipped, because it is no finding ({error}): what it was of is asked again.")
            return
        self.done[split, index, part] = fields

    def add(self, key: Key, fields: dict) -> None:
        """Keeps the findings of a part of a row."""
        self._file.write(json.dumps([key, fields], ensure_ascii=False, allow_nan=True) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Ends this process's file."""
        self._file.close()

    def remove(self) -> None:
        """Removes all files, once the rows are written."""
        for piece in self._path.parent.glob(f"{self._path.name}.part-*"):
            piece.unlink(missing_ok=True)
