"""What a trainer is given, looked at where it comes in: a model that it can train, and rows that are the model's."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.compute
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .batch import IGNORE_INDEX


def check_model(model: object) -> None:
    """
    Checks that a model is a causal language model that is loaded.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): As the trainer was given it.

    Raises:
        ValueError: If it is something else; the way out is named.
    """
    if isinstance(model, str):
        raise ValueError(f"`model` is the string {model!r}: load it with `AutoModelForCausalLM.from_pretrained`.")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = type(inner).__name__
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(f"`model` is a {kind} and no model of transformers: load one with AutoModelForCausalLM.")
    if inner.config.is_encoder_decoder:
        raise ValueError(
            f"`model` is a {kind}, whose encoder reads the prompt apart from the answer: only causal language models "
            "can be trained here (AutoModelForCausalLM)."
        )
    if inner.get_input_embeddings() is None or inner.get_output_embeddings() is None:
        raise ValueError(f"`model` is a {kind}, which has no language-model head: load it with AutoModelForCausalLM.")


def as_dataset(rows: Any, name: str) -> Dataset:
    """
    Rows of whatever holds them, as a dataset.

    Args:
        rows ([`~datasets.Dataset`], `Sequence[Mapping]`, `Mapping`, `pandas.DataFrame` or `torch.utils.data.Dataset`):
            Rows, or columns by their names.
        name (`str`): What errors call them.

    Raises:
        ValueError: If it is a dataset of several splits or one without a length, or holds something else.
    """
    if isinstance(rows, Dataset):
        return rows
    if isinstance(rows, (DatasetDict, IterableDatasetDict)):
        splits = ", ".join(map(repr, rows))
        raise ValueError(f"`{name}` has several splits, {splits}: give one of them, as dataset[{next(iter(rows))!r}].")
    if isinstance(rows, (IterableDataset, torch.utils.data.IterableDataset)):
        raise ValueError(
            f"`{name}` is read in a stream and has no length, and rows are paired by their places: take as many as "
            "you need, `Dataset.from_list(list(dataset.take(1000)))`."
        )
    if isinstance(rows, str):
        raise ValueError(f"`{name}` is the string {rows!r}: load its rows, with `datasets.load_dataset`.")
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # a data frame
        # What is missing is NaN there, which is a number.
        columns = {str(column): rows[column].tolist() for column in rows.columns}
        missing = {str(column): rows[column].isna().tolist() for column in rows.columns}
        return _made(
            Dataset.from_dict,
            {key: [None if gone else each for each, gone in zip(columns[key], missing[key])] for key in columns},
            name,
        )
    if isinstance(rows, Mapping):
        return _made(Dataset.from_dict, dict(rows), name)
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise ValueError(f"`{name}` is a {type(rows).__name__}: give a `datasets.Dataset` or a list of rows.")
    rows = [rows[place] for place in range(len(rows))]
    for place, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"Row {place} of `{name}` must have columns, as a dictionary has, but it is {row!r:.60}.")
    rows = [dict(row) for row in rows]
    try:
        return _made(Dataset.from_list, rows, name)
    except ValueError as error:
        place = bisect_left(range(len(rows)), True, key=lambda place: not _fits(rows[: place + 1]))
        raise ValueError(f"Row {place} of `{name}`: {error}") from error


def _fits(rows: list[dict]) -> bool:
    try:
        _made(Dataset.from_list, rows, "rows")
    except ValueError:
        return False
    return True


def _made(make: Callable[[Any], Dataset], rows: Any, name: str) -> Dataset:
    try:
        return make(rows)
    except UnicodeEncodeError as error:
        raise ValueError(f"`{name}` holds half of a character (a lone surrogate), {error.object!r:.60}.") from error
    except (pyarrow.ArrowException, OverflowError, TypeError) as error:
        raise ValueError(f"`{name}` is no table of rows, each column of one type and one length: {error}.") from error


def check_tokenizer(tokenizer: object) -> None:
    """Raises a `ValueError` unless it is a tokenizer."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        inner = getattr(tokenizer, "tokenizer", None)
        way = "give its `tokenizer`" if inner is not None else "load one with `AutoTokenizer.from_pretrained`"
        raise ValueError(f"`processing_class` is {tokenizer!r:.60} and no tokenizer: {way}.")


def check_ids(rows: Dataset, model: PreTrainedModel, name: str) -> None:
    """
    Checks that the model knows every token and every label.

    Args:
        rows ([`~datasets.Dataset`]): Tokenized rows.
        model ([`~transformers.PreTrainedModel`]): The model that is to read them.
        name (`str`): What errors call the rows.

    Raises:
        ValueError: If a token is beyond the model's embeddings, or is none; the row is named.
    """
    for column in ("input_ids", "labels"):
        if column in rows.column_names:
            _check_ids(rows, column, model, name)


def _check_ids(rows: Dataset, column: str, model: PreTrainedModel, name: str) -> None:
    if not pyarrow.types.is_integer(rows.with_format("arrow")[:0][column].type.value_type):
        raise ValueError(f"`{column}` of `{name}` must be whole numbers, but they are {rows[column][0]!r:.60}.")
    least = IGNORE_INDEX if column == "labels" else 0
    # An adapter may wrap the embeddings.
    num_known = getattr(model.get_input_embeddings(), "num_embeddings", model.config.get_text_config().vocab_size)
    # Without a list for each row, because a set to retain may be large.
    found = pyarrow.compute.min_max(rows.with_format("arrow")[:][column].combine_chunks().flatten()).as_py()
    if found["min"] is None or least <= found["min"] <= found["max"] < num_known:
        return
    for place, ids in enumerate(rows[column]):
        if strangers := [token for token in ids if not least <= token < num_known]:
            worst = max(strangers, key=abs)
            raise ValueError(
                f"Row {place} of `{name}` has the {'label' if column == 'labels' else 'token'} {worst}, and the model "
                f"knows the tokens 0 to {num_known - 1}: "
                "give the model's own tokenizer, or let the model grow first, with "
                "`model.resize_token_embeddings(len(tokenizer))`."
            )


def check_tokenized(columns: Sequence[str], name: str) -> None:
    """Raises a `ValueError` unless rows are tokens."""
    if "input_ids" not in columns:
        raise ValueError(
            f"`{name}` needs rows of tokens, `input_ids` and perhaps `labels`, but it has {list(columns)}: "
            "`soul_trainer.formats.prepare(rows, tokenizer)` makes them."
        )
