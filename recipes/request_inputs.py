"""What a notebook gives `unlearn()`, looked at and turned into what the recipe's command line takes."""

import json
import os
from enum import Enum
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from soul_recipes.hub_layout import json_lines
from soul_trainer.inputs import as_dataset, check_model, check_tokenizer
from soul_trainer.records import OWNER_ONLY, make_tokenizer_portable, write_whole
from soul_trainer.sources import READERS


def check_arguments(model: object, gold: object, folder: Path) -> None:
    """Raises a `ValueError` for what would be found out late, or not at all."""
    if gold is not None and not isinstance(gold, (str, os.PathLike)):
        raise ValueError(
            f"`gold` must be the folder or hub id of a model, but it is a {type(gold).__name__}: save it."
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir`={str(folder)!r} is a file: name a folder.")
    if not isinstance(model, (str, os.PathLike)):
        check_model(model)
    elif folder.exists() and Path(model).exists() and folder.samefile(model):
        raise ValueError(f"`output_dir` is the model's own folder, {str(folder)!r}: name another.")


def is_sentences(forget: object) -> bool:
    """Whether it is plain sentences and not a file, a folder, a hub id or rows."""
    if isinstance(forget, str):
        text = forget.strip()
        # A hub id has no space in it, and a file has an ending or a folder.
        is_place = Path(text).exists() or "://" in text or text.startswith(("/", "./", "../", "~")) or _is_file(text)
        return text.endswith(("?", "\uff1f")) or (" " in text and not is_place)
    if not isinstance(forget, (list, tuple)) or not forget or not all(isinstance(each, str) for each in forget):
        return False
    if files := [each for each in forget if _is_file(each.strip())]:
        raise ValueError(f"`forget` lists the file {files[0]!r}: give one file, a folder of files, or their rows.")
    return True


def _is_file(name: str) -> bool:
    """Whether it ends as a data file does."""
    path = Path(name)
    return bool({path.suffix.lower(), Path(path.stem).suffix.lower()} & set(READERS))


def as_source(source: object, path: Path) -> str:
    """Rows as a file, which the recipe reads."""
    if isinstance(source, (str, os.PathLike)):
        return str(source)
    rows = as_dataset(source, path.stem).to_list()
    for place, row in enumerate(rows):
        try:
            json.dumps(row)
        except TypeError as error:
            raise ValueError(f"Row {place} of `{path.stem}` has a value that is no text or number: {error}.") from None
    write_whole(path, json_lines(rows), OWNER_ONLY)
    os.chmod(path, 0o600)
    return str(path)


def saved(model: object, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> str:
    """The folder or hub id of a model; one in memory is saved first."""
    if isinstance(model, (str, os.PathLike)):
        return str(model)
    if tokenizer is None:
        raise ValueError("`tokenizer` is needed for a model in memory: `AutoTokenizer.from_pretrained(...)`.")
    check_tokenizer(tokenizer)
    target = folder / "target"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    make_tokenizer_portable(target)
    return str(target)


def as_flag(value: object) -> list[str]:
    """A setting as words of a command line, where several names have commas between."""
    if isinstance(value, (list, tuple)):
        return [",".join(map(str, value))]
    if isinstance(value, dict):
        return [json.dumps(value)]
    return [str(value.value if isinstance(value, Enum) else value)]
