"""Folders that hold a dataset as it lies on the hub: a card that names configurations and splits, and their rows."""

import json
import tempfile
from pathlib import Path

from soul_trainer.records import OWNER_ONLY


Corpus = dict[str, list[dict]]
CARD = """# Fictitious authors

Invented by `recipes/fictitious_authors.py`, in the layout of TOFU (Maini et al., 2024, arXiv 2401.06121).
The `_perturbed` configurations add the paraphrase, five wrong answers and the author, or three wrong answers
in `real_authors` and `world_facts`, which are true.
"""


def dataset_files(configs: dict[str, dict[str, list[dict]]], card: str) -> dict[str, str]:
    """
    The files of a dataset with several splits to a configuration.

    Args:
        configs (`dict[str, dict[str, list[dict]]]`): Rows by configuration and split.
        card (`str`): What the card says below its header.

    Returns:
        `dict[str, str]`: Contents by name: `README.md`, and JSON Lines in `<configuration>/<split>.json`.
    """
    header, files = "", {}
    for config, splits in configs.items():
        header += f"- config_name: {config}\n  data_files:\n"
        for split, rows in splits.items():
            header += f"  - split: {split}\n    path: {config}/{split}.json\n"
            files[f"{config}/{split}.json"] = json_lines(rows)
    return {"README.md": f"---\nconfigs:\n{header}---\n{card}", **files}


def hub_files(corpus: Corpus) -> dict[str, str]:
    """The files of the hub dataset `locuslab/TOFU` for this corpus, by name: a JSON Lines file per configuration."""
    configs = {}
    for split, rows in corpus.items():
        configs[split] = [{"question": row["question"], "answer": row["answer"]} for row in rows]
        configs[f"{split}_perturbed"] = rows
    header = "".join(f"- config_name: {config}\n  data_files: {config}.json\n" for config in configs)
    files = {f"{config}.json": json_lines(rows) for config, rows in configs.items()}
    return {"README.md": f"---\nconfigs:\n{header}---\n{CARD}", **files}


def write_hub_layout(corpus: Corpus, folder: str | Path, overwrite: bool = False) -> Path:
    """Writes TOFU's files, so that `datasets.load_dataset(folder, "forget_perturbed")["train"]` reads them."""
    return write_files(hub_files(corpus), folder, overwrite)


def write_files(files: dict[str, str], folder: str | Path, overwrite: bool = False) -> Path:
    """
    Writes files to a folder, which appears whole or not at all. One that holds something else is left alone.

    Args:
        files (`dict[str, str]`): Contents by name, which may have folders.
        folder (`str` or `Path`): Where they go.
        overwrite (`bool`, *optional*, defaults to `False`): Whether a folder that holds something else is replaced.

    Returns:
        `Path`: The folder.

    Raises:
        FileExistsError: If the folder holds something else and `overwrite` is not set.
    """
    folder = Path(folder)
    if folder.exists():
        present = {path.relative_to(folder).as_posix(): path.read_bytes() for path in _files_in(folder)}
        if present == {name: text.encode() for name, text in files.items()}:
            return folder
        if not overwrite:
            raise FileExistsError(f"{folder} holds something else. Pass --overwrite to replace it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch, "new")
        for name, text in files.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(OWNER_ONLY)
            path.write_bytes(text.encode())
        if folder.exists():
            folder.rename(Path(scratch, "old"))
        new.rename(folder)
    return folder


def _files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def json_lines(rows: list[dict]) -> str:
    """Rows as JSON Lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)
