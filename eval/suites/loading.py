"""Rows that a user names: a JSON file, a folder or a dataset on the hub. Imports nothing that only a model needs."""

from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset

JSON_FILES = (".json", ".jsonl")


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
        dataset (`str`): A JSON or JSON-lines file, a folder in the hub's layout, or a hub id.
        config (`str`, *optional*): Configuration, for those that have several.
        split (`str`, *optional*, defaults to `"train"`): Which rows; a file is one split, whatever this says.
        revision (`str`, *optional*): Of a dataset on the hub.
        columns (`tuple[str, ...]`, *optional*): Columns that must be there.
        name (`str`, *optional*, defaults to `"dataset"`): What errors call it.

    Returns:
        [`~datasets.Dataset`]

    Raises:
        ValueError: If there is no such file, split or column, or no row.
    """
    from datasets import load_dataset

    path = check_exists(dataset, name)
    if path.suffix in JSON_FILES and path.is_file():
        rows = load_dataset("json", data_files=dataset, split="train")
    else:
        splits = load_dataset(dataset, config, revision=revision)
        if split not in splits:
            raise ValueError(f"`{name}`={dataset!r} has no split {split!r}; it has {', '.join(splits)}.")
        rows = splits[split]
    if missing := sorted(set(columns).difference(rows.column_names)):
        raise ValueError(f"`{name}`={dataset!r} lacks the columns {missing}; it has {rows.column_names}.")
    if not len(rows):
        raise ValueError(f"`{name}`={dataset!r} holds no rows.")
    return rows


def check_exists(source: str, name: str) -> Path:
    """`source` as a path; a `ValueError` if it is not there and cannot be a hub id either."""
    path = Path(source)
    is_path = path.is_absolute() or source.startswith(".") or source.count("/") > 1
    if not path.exists() and (is_path or path.suffix in (".txt", *JSON_FILES)):
        raise ValueError(f"`{name}`={source!r}: no such file or folder.")
    return path


def spread(num_rows: int, num_chosen: int | None) -> list[int]:
    """So many places of a list, evenly spread and in order; all of them if there are no more, or for `None`."""
    num_chosen = num_rows if num_chosen is None else min(num_chosen, num_rows)
    return [place * num_rows // num_chosen for place in range(num_chosen)]
