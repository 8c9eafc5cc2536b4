"""Rows of the benchmarks' datasets, and checks of them. Imports nothing that only a model needs."""

from pathlib import Path


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
    from soul_trainer.sources import load_split, read_file

    file = Path(dataset) / config / f"{split}.json"
    where = f"the split {split!r} of the configuration {config!r} of {dataset!r}"
    try:
        items = read_file(file) if file.is_file() else load_split(dataset, config, split, revision)
    except ValueError as error:
        raise ValueError(f"`dataset`: cannot load {where}: {error}") from error
    rows = []
    for index, item in enumerate(items):
        missing = [name for name in columns if item.get(name) is None]
        if missing:
            present = sorted(name for name, value in item.items() if value is not None)
            raise ValueError(f"Row {index} of {where} lacks {', '.join(missing)}; it has {', '.join(present)}.")
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


def spread(num_rows: int, num_chosen: int | None) -> list[int]:
    """So many places of a list, evenly spread and in order; all of them if there are no more, or for `None`."""
    num_chosen = num_rows if num_chosen is None else min(num_chosen, num_rows)
    return [place * num_rows // num_chosen for place in range(num_chosen)]
