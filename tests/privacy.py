"""What docs/privacy.md promises of files that know the rows to forget, held against the files that a command wrote."""

import re
import stat
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path


PAGE = (Path(__file__).parents[1] / "docs" / "privacy.md").read_text(encoding="utf-8")
# The names in the first column of the table of files.
PATTERNS = [
    pattern.replace("RUN", "*").replace("part-N", "part-*")
    for line in PAGE.splitlines()
    if line.startswith("| `")
    for pattern in re.findall(r"`([^`]+)`", line.split("|")[1])
]


def files_with(folder: Path, word: str) -> list[Path]:
    """Files anywhere in a folder that have a word in them, in the encodings that libraries write."""
    spelt = [word.encode(encoding) for encoding in ("utf-8", "utf-16-le")]
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path for path in files if any(each in path.read_bytes() for each in spelt)]


def fragments(texts: Iterable[str]) -> list[str]:
    """Of each text its longest part of letters and spaces, which JSON and HTML write as it is."""
    found = (max(re.findall(r"[A-Za-z0-9 ]+", text), key=len).strip() for text in texts)
    return sorted({part for part in found if len(part) >= 8})


def check_files(out: Path, texts: Iterable[str], known: Iterable[str]) -> None:
    """
    Checks that every file with rows to forget is on the page and private.

    Args:
        out (`Path`): The output folder of a command.
        texts (`Iterable[str]`): To forget.
        known (`Iterable[str]`): Names of files that must be among those found, or nothing was looked for.
    """
    words = fragments(texts)
    assert words, "there is nothing to look for"
    found = sorted({path for word in words for path in files_with(out, word)})
    names = [path.relative_to(out).as_posix() for path in found]
    assert set(known) <= set(names), names
    assert not [name for name in names if not any(fnmatch(name, pattern) for pattern in PATTERNS)]
    assert not [str(path) for path in found if stat.S_IMODE(path.stat().st_mode) != 0o600]
