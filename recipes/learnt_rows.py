"""Rows that a model learns: where they come from, and their tokens."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from soul_eval.suites.sources import JSON_FILES, load_split, load_texts
from soul_trainer.chunks import chunk_texts
from soul_trainer.formats import prepare


# The columns of each kind of row of `soul_trainer.formats`; in a dataset with those of several, the first counts.
KINDS = (("messages",), ("question", "answer"), ("prompt", "completion"), ("text",))


@dataclass
class ChunkArguments:
    """How long texts are cut."""

    chunk_length: int = field(
        default=1024, metadata={"help": "Tokens of a chunk of text; fewer if the model takes no more."}
    )
    chunk_overlap: int = field(
        default=0, metadata={"help": "Tokens that a chunk repeats from the one before, as context without a loss."}
    )


def kind_of(rows: Dataset, name: str = "dataset") -> tuple[str, ...]:
    """The columns that make a row; a `ValueError` if there are none."""
    for columns in KINDS:
        if set(columns) <= set(rows.column_names):
            return columns
    raise ValueError(f"`{name}` needs the columns of one of the kinds {KINDS}, but it has {rows.column_names}.")


def load_source(source: str, config: str | None = None, split: str = "train", name: str = "dataset") -> Dataset:
    """
    Loads the rows of a text file, a folder of `.txt` files, a JSON file, a folder in the hub's layout or a dataset.

    Args:
        source (`str`): Path or hub id.
        config (`str`, *optional*): Configuration of a dataset.
        split (`str`, *optional*, defaults to `"train"`): Split of a dataset.
        name (`str`, *optional*, defaults to `"dataset"`): What errors call it.

    Returns:
        [`~datasets.Dataset`]: With the columns of one kind of row and no others.

    Raises:
        ValueError: If there is no such source, configuration or split, or its columns make no row.
    """
    path = Path(source)
    is_text = path.is_file() and path.suffix not in JSON_FILES
    if is_text or (path.is_dir() and any(path.glob("*.txt"))):
        return Dataset.from_dict({"text": load_texts(source, name=name)})
    rows = load_split(source, config, split, name=name)
    return rows.select_columns(list(kind_of(rows, name)))


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
    kept = [part.filter(lambda row: _key(row) not in unwanted) for part in parts]
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
