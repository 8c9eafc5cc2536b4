"""Rows that come as tokens, and the columns of any row that would change what a model reads: honoured or refused."""

from typing import Any

from datasets import Dataset
from transformers.utils import logging

from .batch import IGNORE_INDEX


logger = logging.get_logger(__name__)

# What a model's `forward` or a Hugging Face collator would take besides, and nothing here reads.
_REFUSED = {"inputs_embeds", "input_features", "input_values", "head_mask", "past_key_values", "cache_position"}
_REFUSED |= {"cross_attention_mask", "loss_mask", "loss_weights", "shift_labels", "max_length_q", "max_length_k"}
_REFUSED_BEGINNINGS = ("pixel_", "image", "audio", "video", "encoder_", "decoder_", "cu_seq_lens")
# Columns of text rows that change the prompt or stand in it.
_REFUSED_OF_TEXT = {"images", "image", "audio", "audios", "video", "videos", "chat_template_kwargs"}
# Columns of text rows that by their names belong to the prompt. The kinds that are read have none of them.
_LIKE_A_PROMPT = {"context", "system", "system_prompt", "input", "instruction", "history", "documents"}
_MASKS = ("completion_mask", "assistant_masks")
_READ = ("attention_mask", *_MASKS, "position_ids", "seq_lengths", "token_type_ids")


def has_columns_to_check(columns: list[str]) -> bool:
    """Whether tokenized rows have columns, besides `input_ids` and `labels`, that must be honoured or refused."""
    return any(column in _READ or _is_refused(column) for column in columns)


def check_text_columns(dataset: Dataset, name: str) -> None:
    """
    Checks that rows of text have no column that changes the prompt and is not read. Columns whose names only sound so,
    as `context`, are named in a warning.

    Args:
        dataset ([`~datasets.Dataset`]): Rows of text.
        name (`str`): What errors call it.

    Raises:
        ValueError: If a row has such a column with a value in it; the row and the column are named.
    """
    for column in sorted(_REFUSED_OF_TEXT & set(dataset.column_names)):
        # From Arrow, so that no image or sound is decoded.
        for index, value in enumerate(dataset.with_format("arrow")[:][column].to_pylist()):
            # Datasets fill in the keys that only other rows have.
            if value and not (isinstance(value, dict) and all(each is None for each in value.values())):
                raise ValueError(
                    f"Row {index} of `{name}` has a value in `{column}`, which is not read: remove the column, with "
                    f"`dataset.remove_columns({column!r})`, if the text alone is what you mean."
                )
    if unread := sorted(_LIKE_A_PROMPT & set(dataset.column_names)):
        logger.warning(f"`{name}` has {unread}, which are not read: write into the prompt what the model needs.")


def read_tokenized(dataset: Dataset, pad_token_id: int | None, max_length: int | None, name: str) -> Dataset:
    """
    Reads rows of tokens as a Hugging Face collator would.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `input_ids` and, optionally, `labels`, `attention_mask`, TRL's `completion_mask` and
            `assistant_masks`. Without `labels` all tokens but padding have one.
        pad_token_id (`int`, *optional*): The token that is padding where there are neither `labels` nor a mask.
        max_length (`int`, *optional*): The longest row that is allowed.
        name (`str`): What errors call it.

    Returns:
        [`~datasets.Dataset`]: Columns `input_ids`, `labels` and `row`, without padding that a mask marks.

    Raises:
        ValueError: If a column cannot be honoured or a row has nothing to predict; the row is named.
    """
    if refused := sorted(filter(_is_refused, dataset.column_names)):
        raise ValueError(f"Row 0 of `{name}` has {refused}, which are not read: remove them, `remove_columns`.")
    # Lists, where a format of torch's or numpy's gives arrays.
    kept = dataset.with_format(None).select_columns(
        [c for c in dataset.column_names if c in ("input_ids", "labels", *_READ)]
    )
    extra = [column for column in kept.column_names if column in _READ]

    def read(row: dict, index: int) -> dict:
        try:
            ids, labels = _read(row, pad_token_id)
            _check(ids, labels, max_length)
        except ValueError as error:
            raise ValueError(f"Row {index} of `{name}`: {error}") from error
        # Rows that say no more than tokens and labels stay as they are.
        changed = {} if "labels" in row and not extra else {"input_ids": ids, "labels": labels}
        return {**changed, "row": index}

    return kept.map(
        read,
        with_indices=True,
        remove_columns=extra,
        desc=f"Reading {name}",
        keep_in_memory=True,
        load_from_cache_file=False,
    )


def _is_refused(column: str) -> bool:
    return column in _REFUSED or column.startswith(_REFUSED_BEGINNINGS)


def _read(row: dict[str, Any], pad_token_id: int | None) -> tuple[list[int], list[int]]:
    """Tokens and labels of one row, without the padding at its ends."""
    ids = row["input_ids"]
    if ids is None:
        raise ValueError("no `input_ids`.")
    for column in ("labels", "attention_mask", *_MASKS, "position_ids", "token_type_ids"):
        if column in row and (row[column] is None or len(row[column]) != len(ids)):
            number = "no" if row[column] is None else len(row[column])
            raise ValueError(f"{len(ids)} `input_ids` but {number} `{column}`.")
    start, end = _span(row.get("attention_mask", [1] * len(ids)))
    if any(row.get("token_type_ids", ())):
        raise ValueError("`token_type_ids` are not all 0, and they are not read: remove the column.")
    if "seq_lengths" in row and list(row["seq_lengths"] or ()) not in ([len(ids)], [end - start]):
        raise ValueError(f"`seq_lengths` is {row['seq_lengths']}: packed rows are not read, give one sequence a row.")
    if "position_ids" in row and list(row["position_ids"][start:end]) != list(range(end - start)):
        raise ValueError("`position_ids` do not count from 0, as the model will: give one sequence a row, unpacked.")
    masks = [row[column] for column in _MASKS if column in row]
    if "labels" not in row:
        # A mask tells padding from an end of sequence with the same id; without one, as transformers' collator does.
        padding = None if "attention_mask" in row else pad_token_id
        labels = [IGNORE_INDEX if token == padding else token for token in ids]
        labels = [label if all(marks) else IGNORE_INDEX for label, *marks in zip(labels, *masks)]
    else:
        labels = row["labels"]
        for place in range(max(start, 1), end) if masks else ():
            if all(mask[place] for mask in masks) != (labels[place] != IGNORE_INDEX):
                named = " and ".join(f"`{column}`" for column in _MASKS if column in row)
                raise ValueError(f"`labels` and {named} disagree at token {place}: remove one of them.")
    return ids[start:end], labels[start:end]


def _span(mask: list[int]) -> tuple[int, int]:
    """From where to where a mask has ones."""
    ones = [place for place, value in enumerate(mask) if value]
    if not ones:
        raise ValueError("`attention_mask` is 0 everywhere.")
    if not set(mask) <= {0, 1} or ones[-1] - ones[0] + 1 != len(ones):
        raise ValueError(
            "`attention_mask` must be 1 for all tokens between the padding at the ends: give one sequence a row, "
            "without masked parts."
        )
    return ones[0], ones[-1] + 1


def _check(ids: list[int], labels: list[int], max_length: int | None) -> None:
    if max_length is not None and len(ids) > max_length:
        raise ValueError(f"{len(ids)} tokens, but the longest row may have {max_length}.")
    if all(label == IGNORE_INDEX for label in labels[1:]):
        raise ValueError("no label after the first token: nothing to predict.")
