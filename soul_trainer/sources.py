"""
Rows and texts by the names that users give: files, folders in the hub's layout, datasets on the hub.

Files are read here and not by `load_dataset`, which makes dates of strings that look like them, takes `*` in a name
for a pattern, and keeps what it read in a cache beside the user's other data.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, concatenate_datasets, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import metadata_load

from .scratch import scratch_folder


# The columns of each kind of row of formats.py; in a dataset with those of several, the first counts.
KINDS = (("messages",), ("question", "answer"), ("prompt", "completion"), ("text",))
# What a chat template reads of a row beside its messages: functions that it may call, and names of the template's own.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
_TEXT_FILES = (".txt", ".md")
# Of a folder, they say what it is and are none of its data.
_ABOUT = re.compile(r"(readme|licen[cs]e|notice|dataset_infos?)(\..*)?", re.IGNORECASE)


def load_split(
    dataset: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    columns: tuple[str, ...] = (),
    name: str = "dataset",
) -> Dataset:
    """
    Loads one split of a dataset.

    Args:
        dataset (`str`): A file with one of the endings [`READERS`], a folder of them, or a hub id.
        config (`str`, *optional*): Configuration, for datasets that have several.
        split (`str`, *optional*, defaults to `"train"`): Which rows; a file is one split, whatever this says.
        revision (`str`, *optional*): Of a dataset on the hub.
        columns (`tuple[str, ...]`, *optional*): Columns that must be there.
        name (`str`, *optional*, defaults to `"dataset"`): What errors call it.

    Returns:
        [`~datasets.Dataset`]: One row for each text file.

    Raises:
        ValueError: If there is no such file, configuration, split or column, or no row; if a file's ending is unknown
            or its content damaged; or if a folder mixes files of several kinds.
    """
    path = check_exists(dataset, name)
    if path.is_file():
        rows = read_file(path, name)
    elif path.is_dir():
        rows = _read_folder(path, config, split, name)
    else:
        rows = _of_split(_read_hub(dataset, config, revision, name), split, f"`{name}`={dataset!r}")
    if missing := sorted(set(columns).difference(rows.column_names)):
        raise ValueError(f"`{name}`={dataset!r} lacks the columns {missing}; it has {rows.column_names}.")
    if not len(rows):
        raise ValueError(f"`{name}`={dataset!r} holds no rows.")
    return rows


def load_source(
    source: str, config: str | None = None, split: str = "train", revision: str | None = None, name: str = "dataset"
) -> Dataset:
    """
    Loads rows of whatever kind they are: [`load_split`], with a check that its columns make a row.

    Raises:
        ValueError: As [`load_split`] does, and if the columns make no kind of row; see [`kind_of`].
    """
    rows = load_split(source, config, split, revision, name=name)
    kind_of(rows, name)
    return rows


def load_texts(
    source: str, config: str | None = None, split: str = "train", revision: str | None = None, name: str = "dataset"
) -> list[str]:
    """
    Loads texts: those of text files, or the column `text` of a dataset; see [`load_split`].

    Returns:
        `list[str]`: One for each file or row, in the order of the files' names; empty ones are left out.

    Raises:
        ValueError: As [`load_split`] does, and if there is no column `text`.
    """
    rows = load_split(source, config, split, revision, ("text",), name)
    return [text for text in rows["text"] if text]


def kind_of(rows: Dataset, name: str = "dataset") -> tuple[str, ...]:
    """The columns that make a row; a `ValueError` if there are none."""
    for columns in KINDS:
        if set(columns) <= set(rows.column_names):
            return columns
    raise ValueError(f"`{name}` needs the columns of one of the kinds {KINDS}, but it has {rows.column_names}.")


def row_columns(rows: Dataset, name: str = "dataset") -> list[str]:
    """The columns that make a row, and what a chat template reads besides, if there is some."""
    return [*kind_of(rows, name), *(column for column in TEMPLATE_COLUMNS if column in rows.column_names)]


def check_exists(source: str, name: str) -> Path:
    """`source` as a path; a `ValueError` if it is not there and cannot be a hub id either."""
    if not isinstance(source, (str, Path)) or not str(source):
        raise ValueError(f"`{name}`={source!r} must be a file, a folder or a hub id.")
    path, source = Path(source), str(source)
    is_path = path.is_absolute() or source.startswith(".") or source.count("/") > 1
    if not path.exists() and (is_path or _ending(path) in READERS):
        raise ValueError(f"`{name}`={source!r}: no such file or folder.")
    return path


def read_file(path: Path, name: str = "dataset") -> Dataset:
    """
    Reads a file by its ending, in any case of letters; it may be compressed, which another ending tells.

    Args:
        path (`Path`): The file.
        name (`str`, *optional*, defaults to `"dataset"`): What errors call it.

    Raises:
        ValueError: If the ending is unknown, or what is in the file is not what its ending says: file and line are
            named.
    """
    ending, label = _ending(path), f"`{name}`={str(path)!r}"
    if ending not in READERS:
        raise ValueError(f"{label}: a file ending in {ending or 'nothing'} is not understood. {_KNOWN}")
    try:
        with _opened(path) as file:
            content = file.read()
    # What each of the libraries says of a file that is cut off or is not compressed as its name says.
    except (EOFError, OSError, lzma.LZMAError, zipfile.BadZipFile, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{label} cannot be read: {error}.") from error
    if not content:
        raise ValueError(f"{label} is an empty file: it holds no rows.")
    return READERS[ending](content, label)


def _ending(path: Path) -> str:
    """The last ending that is no compression's, in small letters."""
    endings = [ending.lower() for ending in path.suffixes]
    return next((ending for ending in reversed(endings) if ending not in _OPENERS), "")


def _opened(path: Path) -> io.IOBase:
    return _OPENERS.get(path.suffix.lower(), open)(path, "rb")


def _open_zip(path: Path, _: str) -> io.IOBase:
    with zipfile.ZipFile(path) as archive:
        members = [each for each in archive.namelist() if not each.endswith("/")]
        if len(members) != 1:
            raise zipfile.BadZipFile(f"an archive must hold one file, and this one holds {len(members)}")
        return io.BytesIO(archive.read(members[0]))


def _open_stream(path: Path, _: str) -> io.IOBase:
    return pyarrow.input_stream(path, compression="detect")


def _decoded(content: bytes, label: str) -> str:
    try:
        return content.decode("utf-8-sig")  # spreadsheets put a byte order mark before the first character
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{label}, line {line}, is not text in UTF-8: save it as UTF-8.") from error


def _read_json(content: bytes, label: str) -> Dataset:
    """A list of rows, or a row a line. A row that is a string is a text."""
    text = _decoded(content, label)
    if text.lstrip().startswith("["):
        try:
            items = _parsed(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{label}, line {error.lineno}, is no JSON: {error.msg}.") from error
        items = {f"item {number}": item for number, item in enumerate(items)}
    else:
        items = {}
        for number, line in enumerate(text.split("\n"), 1):
            try:
                items |= {f"line {number}": _parsed(line)} if line.strip() else {}
            except json.JSONDecodeError as error:
                raise ValueError(f"{label}, line {number}, is no JSON: {error.msg}: {line[:60]!r}.") from error
    rows = [{"text": item} if isinstance(item, str) else item for item in items.values()]
    for place, row in zip(items, rows):
        if not isinstance(row, dict):
            raise ValueError(f"{label}, {place}, is no object with columns, but {row!r:.60}.")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return _table({name: [row.get(name) for row in rows] for name in names}, list(items), label)


def _parsed(text: str) -> Any:
    """What JSON holds; a `JSONDecodeError` also where Python would go wrong or choose."""
    try:
        found = json.loads(text, object_pairs_hook=_object)
    except _TwiceError as error:
        raise json.JSONDecodeError(str(error), text, 0) from None
    except RecursionError:
        raise json.JSONDecodeError("it is nested too deeply", text, 0) from None
    return found


class _TwiceError(Exception):
    """An object has a name twice, of which Python would take the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _table(columns: dict[str, list], places: list[str], label: str) -> Dataset:
    """Columns as a dataset; an error names the first place whose value is of another type than those before it."""
    try:
        return Dataset.from_dict(columns)
    except UnicodeEncodeError as error:
        raise ValueError(f"{label} holds half of a character (a lone surrogate), {error.object!r:.60}.") from error
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError, OverflowError) as error:
        for name, values in columns.items():
            types = [None if value is None else type(value).__name__ for value in values]
            first = next(filter(None, types), None)
            for place, found in zip(places, types):
                if found not in (None, first):
                    raise ValueError(
                        f"{label}, {place}: `{name}` is of the type {found}, and of the type {first} before."
                    ) from error
        raise ValueError(f"{label}: {error}.") from error


def _read_csv(separator: str) -> Callable[[bytes, str], Dataset]:
    def read(content: bytes, label: str) -> Dataset:
        lines = csv.reader(io.StringIO(_decoded(content, label), newline=""), delimiter=separator, strict=True)
        longest = csv.field_size_limit(2**31 - 1)  # a cell may hold a book
        try:
            names = next(lines)
            rows = []
            for row in filter(None, lines):
                if len(row) != len(names):
                    counts = f"has {len(row)} value(s), and the first line {len(names)} name(s)"
                    raise ValueError(f"{label}, line {lines.line_num}, {counts}.")
                rows.append(row)
        except csv.Error as error:
            raise ValueError(f"{label}, line {lines.line_num}, is no table: {error}.") from error
        finally:
            csv.field_size_limit(longest)
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{label} has several columns of the name {twice!r}.")
        return Dataset.from_dict({name: [row[place] for row in rows] for place, name in enumerate(names)})

    return read


def _read_parquet(content: bytes, label: str) -> Dataset:
    import pyarrow.parquet

    try:
        return Dataset.from_dict(pyarrow.parquet.read_table(io.BytesIO(content)).to_pydict())
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{label} is no Parquet file: {error}.") from error


def _read_text(content: bytes, label: str) -> Dataset:
    return Dataset.from_dict({"text": [_decoded(content, label)]})


READERS: dict[str, Callable[[bytes, str], Dataset]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv(","),
    ".tsv": _read_csv("\t"),
    ".parquet": _read_parquet,
    **dict.fromkeys(_TEXT_FILES, _read_text),
}
_OPENERS: dict[str, Any] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zip": _open_zip,
    ".zst": _open_stream,
    ".lz4": _open_stream,
}
_KNOWN = f"Known are {', '.join(READERS)}, each also compressed ({', '.join(_OPENERS)})."


def _of_split(splits: Mapping[str, Any], split: str, label: str) -> Any:
    if split not in splits:
        raise ValueError(f"{label} has no split {split!r}; it has {', '.join(map(str, splits))}.")
    return splits[split]


def _read_folder(folder: Path, config: str | None, split: str, name: str) -> Dataset:
    label = f"`{name}`={str(folder)!r}"
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        saved = load_from_disk(str(folder), keep_in_memory=True)
        return saved if isinstance(saved, Dataset) else _of_split(saved, split, label)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_about(path.relative_to(folder))]
    if not files:
        raise ValueError(f"{label} is a folder without files.")
    if not _names_its_files(folder):
        endings = {_ending(path) for path in files}
        if not endings <= set(READERS) or len({READERS[ending] for ending in endings}) > 1:
            found = ", ".join(path.name for path in {_ending(path): path for path in files}.values())
            raise ValueError(
                f"{label}: the folder mixes kinds of files ({found}), so that it is open which are its rows. Name one "
                f"file, or keep one kind in the folder. {_KNOWN}"
            )
        if endings <= set(_TEXT_FILES):
            return concatenate_datasets([read_file(path, name) for path in files])
    return _read_layout(folder, config, split, name)


def _is_about(path: Path) -> bool:
    return bool(_ABOUT.fullmatch(path.name)) or any(part.startswith((".", "_")) for part in path.parts)


def _names_its_files(folder: Path) -> bool:
    """Whether the folder's card says which of its files make which split."""
    card = folder / "README.md"
    return card.is_file() and "configs" in (metadata_load(card) or {})


def _read_layout(folder: Path, config: str | None, split: str, name: str) -> Dataset:
    label = f"`{name}`={str(folder)!r}"
    with scratch_folder() as scratch:
        try:
            builder = load_dataset_builder(str(folder), config, cache_dir=scratch)
        except (ValueError, FileNotFoundError) as error:
            said = str(error).partition("\nExample of usage")[0]
            if re.search(r"[*?\[\]]", str(folder.resolve())):
                said = "`datasets` takes *, ?, [ and ] in a folder's name for a pattern. Rename it or name a file."
            raise ValueError(f"{label}: {said}") from error
        paths = _of_split(builder.config.data_files or {}, split, label)
        return concatenate_datasets([read_file(Path(path), name) for path in paths])


def _read_hub(dataset: str, config: str | None, revision: str | None, name: str) -> dict[str, Dataset]:
    try:
        return load_dataset(dataset, name=config, revision=revision)
    except (ValueError, FileNotFoundError, DatasetGenerationError) as error:
        raise ValueError(f"`{name}`={dataset!r}: {error}") from error
