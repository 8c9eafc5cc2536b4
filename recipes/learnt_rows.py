"""Rows that a model learns: where they come from, and their tokens."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from soul_trainer.chunks import chunk_texts
from soul_trainer.formats import prepare
from soul_trainer.sources import check_exists, kind_of, load_source, load_texts, row_columns


@dataclass
class ChunkArguments:
    """How long texts are cut."""

    chunk_length: int = field(
        default=1024, metadata={"help": "Tokens of a chunk of text; fewer if the model takes no more."}
    )
    chunk_overlap: int = field(
        default=0, metadata={"help": "Tokens that a chunk repeats from the one before, as context without a loss."}
    )


def load_learnt(source: str, config: str | None = None, split: str = "train", name: str = "dataset") -> Dataset:
    """As [`~soul_trainer.sources.load_source`], with the columns of one kind of row and no others."""
    rows = load_source(source, config, split, name=name)
    return rows.select_columns(row_columns(rows, name))


def first_texts(source: str, config: str | None, split: str, max_rows: int | None, name: str = "dataset") -> list[str]:
    """
    Loads texts as [`~soul_trainer.sources.load_texts`] does, or only the first, and reads no more of a dataset.

    Args:
        source (`str`): A text file, a folder of `.txt` files, or a dataset with a column `text`.
        config (`str`, *optional*): Configuration of a dataset.
        split (`str`): Split of a dataset.
        max_rows (`int`, *optional*): How many.
        name (`str`, *optional*, defaults to `"dataset"`): What errors call it.
    """
    path = Path(source)
    if max_rows is None or path.is_file() or any(path.glob("*.txt")):
        return load_texts(source, config, split, name=name)[:max_rows]
    check_exists(source, name)
    rows = load_dataset(source, config, split=split, streaming=True)
    return [row["text"] for row in islice((row for row in rows if row["text"]), max_rows)]


def without(parts: Sequence[Dataset], excluded: Sequence[Dataset]) -> list[Dataset]:
    """
    Leaves rows out, so that a model that learns the others never saw them.

    Args:
        parts (`Sequence[Dataset]`): Rows, of any kinds.
        excluded (`Sequence[Dataset]`): Rows, each of which must be there.

    Raises:
        ValueError: If a row to be left out is in none of the parts.
    """
    # Whatever else was left out of such a row, a gold model that learnt it in another spelling would not be one.
    unwanted = {_key(row): (place, index) for place, part in enumerate(excluded) for index, row in enumerate(part)}
    present = {_key(row) for part in parts for row in part}
    if strangers := [place for key, place in unwanted.items() if key not in present]:
        source, row = strangers[0]
        raise ValueError(
            f"`exclude`: {len(strangers)} rows are not in `dataset` word for word, first row {row} of source {source}."
        )
    kept = [part.filter(lambda row: _key(row) not in unwanted, keep_in_memory=True) for part in parts]
    return [part for part in kept if len(part)]


def tokenized(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    chunks: ChunkArguments,
    max_length: int,
    prompt_template: str | None = None,
    name: str = "dataset",
) -> Dataset:
    """
    Tokens and labels of rows of one kind.

    Args:
        rows ([`~datasets.Dataset`]): Texts, which are cut into chunks, or rows with an answer, which alone has labels.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.
        chunks ([`ChunkArguments`]): How texts are cut.
        max_length (`int`): Tokens that the model takes.
        prompt_template (`str`, *optional*): See [`~formats.render`].
        name (`str`, *optional*, defaults to `"dataset"`): What errors call it.

    Returns:
        [`~datasets.Dataset`]: Columns `input_ids` and `labels`.
    """
    if kind_of(rows, name) == ("text",):
        return chunk_texts(rows["text"], tokenizer, min(chunks.chunk_length, max_length), chunks.chunk_overlap)
    return prepare(rows, tokenizer, max_length, prompt_template, name).select_columns(["input_ids", "labels"])


def _key(row: dict) -> str:
    return json.dumps(row, sort_keys=True)
