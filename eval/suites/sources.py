"""
Rows that a user names: a dataset on the hub, a folder in the hub's layout, or files of JSON, CSV, Parquet or text.
Imports nothing that only a model needs.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset

# The readers of `datasets` by a file's ending; CSV has one of its own here.
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
DATA_FILES = (*READERS, ".csv")
# The columns of each kind of row of `soul_trainer.formats`; in a dataset with those of several, the first counts.
KINDS = (("messages",), ("question", "answer"), ("prompt", "completion"), ("text",))


def load_split(
    dataset: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    columns: tuple[str, ...] = (),
    name: str = "dataset",
) -> "Dataset":
    """
    Loads one split of a dataset.

    Args:
        dataset (`str`): A JSON, JSON-lines, CSV or Parquet file, a folder in the hub's layout, or a hub id.
        config (`str`, *optional*): Configuration, for those that have several.
        split (`str`, *optional*, defaults to `"train"`): Which rows; a file is one split, whatever this says.
        revision (`str`, *optional*): Of a dataset on the hub.
        columns (`tuple[str, ...]`, *optional*): Columns that must be there.
        name (`str`, *optional*, defaults to `"dataset"`): What errors call it.

    Returns:
        [`~datasets.Dataset`]

    Raises:
        ValueError: If there is no such file, configuration, split or column, or no row.
    """
    path = check_exists(dataset, name)
    if path.suffix in DATA_FILES and path.is_file():
        splits = {split: _read_file(path)}
    else:
        splits = _read(dataset, path.exists(), name=config, revision=revision)
    if split not in splits:
        raise ValueError(f"`{name}`={dataset!r} has no split {split!r}; it has {', '.join(splits)}.")
    rows = splits[split]
    if missing := sorted(set(columns).difference(rows.column_names)):
        raise ValueError(f"`{name}`={dataset!r} lacks the columns {missing}; it has {rows.column_names}.")
    if not len(rows):
        raise ValueError(f"`{name}`={dataset!r} holds no rows.")
    return rows


def load_texts(
    source: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    name: str = "dataset",
) -> list[str]:
    """
    Loads texts.

    Args:
        source (`str`): A text file, a folder of `.txt` files, or a dataset with a column `text`; see [`load_split`].
        config (`str`, *optional*): Configuration of a dataset.
        split (`str`, *optional*, defaults to `"train"`): Split of a dataset.
        revision (`str`, *optional*): Revision of a dataset on the hub.
        name (`str`, *optional*, defaults to `"dataset"`): What errors call it.

    Returns:
        `list[str]`: One for each file or row; empty rows are left out.

    Raises:
        ValueError: If there is no such source, a file is not UTF-8, or a dataset has no column `text`.
    """
    path = check_exists(source, name)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not path.exists() or not files or path.suffix in DATA_FILES:
        rows = load_split(source, config, split, revision, ("text",), name)
        return [text for text in rows["text"] if text]
    try:
        return [file.read_text(encoding="utf-8") for file in files]
    except UnicodeDecodeError as error:
        raise ValueError(f"`{name}`={source!r} is not text in UTF-8: {error}.") from error


def load_source(
    source: str, config: str | None = None, split: str = "train", revision: str | None = None, name: str = "dataset"
) -> "Dataset":
    """
    Loads rows of whatever kind they are.

    Args:
        source (`str`): A text file or a folder of `.txt` files, whose rows are texts, or what [`load_split`] takes.
        config (`str`, *optional*): Configuration of a dataset.
        split (`str`, *optional*, defaults to `"train"`): Split of a dataset.
        revision (`str`, *optional*): Revision of a dataset on the hub.
        name (`str`, *optional*, defaults to `"dataset"`): What errors call it.

    Returns:
        [`~datasets.Dataset`]: With all its columns.

    Raises:
        ValueError: If there is no such source, or its columns make no kind of row; see [`kind_of`].
    """
    from datasets import Dataset

    path = Path(source)
    is_text = path.is_file() and path.suffix not in DATA_FILES
    if is_text or (path.is_dir() and any(path.glob("*.txt"))):
        return Dataset.from_dict({"text": load_texts(source, name=name)})
    rows = load_split(source, config, split, revision, name=name)
    kind_of(rows, name)
    return rows


def kind_of(rows: "Dataset", name: str = "dataset") -> tuple[str, ...]:
    """The columns that make a row; a `ValueError` if there are none."""
    for columns in KINDS:
        if set(columns) <= set(rows.column_names):
            return columns
    raise ValueError(f"`{name}` needs the columns of one of the kinds {KINDS}, but it has {rows.column_names}.")


def load_rows(
    dataset: str, config: str, split: str, columns: tuple[str, ...], revision: str | None = None
) -> list[dict]:
    """
    Loads a split.

    Args:
        dataset (`str`):
            Hub id, a folder in the hub's layout, or a folder with `<config>/<split>.json`, each a JSON list of rows
            or of texts, as MUSE's own `load_data.py` writes them.
        config (`str`): Configuration on the hub.
        split (`str`): Split of the configuration.
        columns (`tuple[str, ...]`): Columns to keep; of a list of texts there is one, `text`.
        revision (`str`, *optional*): Of a dataset on the hub.

    Returns:
        `list[dict]`: With those columns alone.

    Raises:
        ValueError: If there is no such configuration or split, it has no row, or a row lacks a column.
    """
    items = _plain_rows(Path(dataset) / config / f"{split}.json")
    where = f"the split {split!r} of the configuration {config!r} of {dataset!r}"
    if items is None:
        try:
            items = load_split(dataset, config, split, revision)
        except ValueError as error:
            raise ValueError(f"`dataset`: cannot load {where}: {error}") from error
    rows = []
    for index, item in enumerate(items):
        missing = [name for name in columns if item.get(name) is None]
        if missing:
            raise ValueError(f"Row {index} of {where} lacks {', '.join(missing)}; it has {', '.join(sorted(item))}.")
        rows.append({name: item[name] for name in columns})
    if not rows:
        raise ValueError(f"`dataset`: {where} has no rows.")
    return rows


def require_texts(rows: list[dict], split: str, *columns: str) -> None:
    """Raises a `ValueError` that names the row if one of the columns holds no text or an empty one."""
    for index, row in enumerate(rows):
        for name in columns:
            if not isinstance(row[name], str) or not row[name].strip():
                raise ValueError(f"Row {index} of `{split}`: `{name}` must be a text, but it is {row[name]!r}.")


def _plain_rows(path: Path) -> list[dict] | None:
    """A JSON list; `None` where there is no such file or, as in a folder of the hub's layout, it holds JSON lines."""
    if not path.is_file():
        return None
    content = path.read_text(encoding="utf-8")
    if not content.lstrip().startswith("["):
        return None
    return [{"text": item} if isinstance(item, str) else item for item in json.loads(content)]


def check_exists(source: str, name: str) -> Path:
    """`source` as a path; a `ValueError` if it is not there and cannot be a hub id either."""
    path = Path(source)
    is_path = path.is_absolute() or source.startswith(".") or source.count("/") > 1
    if not path.exists() and (is_path or path.suffix in (".txt", *DATA_FILES)):
        raise ValueError(f"`{name}`={source!r}: no such file or folder.")
    return path


def spread(num_rows: int, num_chosen: int | None) -> list[int]:
    """So many places of a list, evenly spread and in order; all of them if there are no more, or for `None`."""
    num_chosen = num_rows if num_chosen is None else min(num_chosen, num_rows)
    return [place * num_rows // num_chosen for place in range(num_chosen)]


def _read_file(path: Path) -> "Dataset":
    if path.suffix in READERS:
        return _read(READERS[path.suffix], True, data_files=str(path))["train"]
    import pandas
    from datasets import Dataset

    # All is text: an answer may be a year, or "None". Spreadsheets put a byte order mark before the first name.
    rows = pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    return Dataset.from_pandas(rows, preserve_index=False)


def _read(source: str, is_local: bool, **arguments: str | None) -> "dict[str, Dataset]":
    from datasets import load_dataset

    from soul_trainer.scratch import scratch_folder

    if not is_local:
        return load_dataset(source, **arguments)
    # The library's cache tells folders apart by their names alone: it would give the rows of another folder, or those
    # that this one had before.
    with scratch_folder() as cache_dir:
        return load_dataset(source, cache_dir=cache_dir, keep_in_memory=True, **arguments)
