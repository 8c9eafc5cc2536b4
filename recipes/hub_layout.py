"""The folder in which a corpus lies as `locuslab/TOFU` does on the hub."""

import json
import tempfile
from pathlib import Path


Corpus = dict[str, list[dict]]
CARD = """# Fictitious authors

Invented by `recipes/fictitious_authors.py`, in the layout of TOFU (Maini et al., 2024, arXiv 2401.06121).
The `_perturbed` configurations add the paraphrase, five wrong answers and the author, or three wrong answers
in `real_authors` and `world_facts`, which are true.
"""


def hub_files(corpus: Corpus) -> dict[str, str]:
    """The files of the hub dataset `locuslab/TOFU` for this corpus, by name: a JSON Lines file per configuration."""
    configs = {}
    for split, rows in corpus.items():
        configs[split] = [{"question": row["question"], "answer": row["answer"]} for row in rows]
        configs[f"{split}_perturbed"] = rows
    header = "".join(f"- config_name: {config}\n  data_files: {config}.json\n" for config in configs)
    files = {f"{config}.json": "".join(json.dumps(row) + "\n" for row in rows) for config, rows in configs.items()}
    return {"README.md": f"---\nconfigs:\n{header}---\n{CARD}", **files}


def write_hub_layout(corpus: Corpus, folder: str | Path, overwrite: bool = False) -> Path:
    """
    Writes the corpus so that `datasets.load_dataset(folder, "forget_perturbed")["train"]` reads it.

    The folder appears whole or not at all. One that holds something else is left alone unless `overwrite` is set.
    """
    folder, files = Path(folder), hub_files(corpus)
    if folder.exists():
        present = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        if present == {name: text.encode() for name, text in files.items()}:
            return folder
        if not overwrite:
            raise FileExistsError(f"{folder} holds something else. Pass --overwrite to replace it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        for name, text in files.items():
            new.joinpath(name).write_bytes(text.encode())
        if folder.exists():
            folder.rename(Path(scratch, "old"))
        new.rename(folder)
    return folder
