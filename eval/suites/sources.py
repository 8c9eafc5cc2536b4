"""Rows of a dataset that may be on the hub, in a folder in the hub's layout, or plain JSON files. Imports no torch."""

import json
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory


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
            items = _hub_rows(dataset, config, split, revision)
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


def _hub_rows(dataset: str, config: str, split: str, revision: str | None) -> list[dict]:
    from datasets import load_dataset

    # The library's cache tells folders apart by their names alone: it would give the rows of another folder, or those
    # that this one had before.
    is_folder = Path(dataset).is_dir()
    with TemporaryDirectory(ignore_cleanup_errors=True) if is_folder else nullcontext() as cache_dir:
        return list(load_dataset(dataset, config, split=split, revision=revision, cache_dir=cache_dir))
