"""Rows that come as tokens, and the columns of any row that would change what a model reads: honoured or refused."""

from collections.abc import Collection
from typing import Any

from datasets import Dataset
from transformers.utils import logging

from .batch import IGNORE_INDEX


logger = logging.get_logger(__name__)

# What a model's `forward` or a Hugging Face collator would take besides, and nothing here reads.
_REFUSED = {"inputs_embeds", "head_mask", "past_key_values", "cache_position", "cross_attention_mask"}
_REFUSED |= {"loss_mask", "loss_weights", "shift_labels", "max_length_q", "max_length_k"}
# What processors of transformers 5.24 make of pictures and sounds, and what datasets call these.
_REFUSED |= {"image", "images", "video", "videos", "audio", "audios"}
_REFUSED |= {f"image_{name}" for name in ("sizes", "grid_thw", "grid_hw", "grids", "embeds", "features", "patches")}
_REFUSED |= {f"image_{name}" for name in ("attention_mask", "mask", "input_ids", "position_ids", "num_crops")}
_REFUSED |= {f"image_{name}" for name in ("pixel_values", "merge_sizes", "token_pooling", "tokens")}
_REFUSED |= {f"video_{name}" for name in ("grid_thw", "grids", "embeds", "features", "merge_sizes", "position_ids")}
_REFUSED |= {f"video_{name}" for name in ("compression_mask", "token_pooling")} | {"second_per_grid_ts"}
_REFUSED |= {f"audio_{name}" for name in ("values", "features", "embeds", "mask", "attention_mask", "embed_sizes")}
_REFUSED |= {f"audio_{name}" for name in ("input_features", "feature_lengths")} | {"speech_features"}
_REFUSED |= {"input_features", "input_features_mask", "feature_attention_mask", "input_values", "input_values_mask"}
_REFUSED |= {"high_res_pixel_values", "flattened_patches", "aspect_ratio_ids", "aspect_ratio_mask", "num_crops"}
_REFUSED_BEGINNINGS = ("pixel_", "encoder_", "decoder_", "cu_seq_lens")
# Columns of text rows that by their names belong to the prompt, or weigh a row. The kinds that are read have none.
_MEANT = {"context", "system", "system_prompt", "input", "instruction", "history", "documents", "label", "weight"}
_MASKS = ("completion_mask", "assistant_masks")
_READ = ("attention_mask", *_MASKS, "position_ids", "seq_lengths", "token_type_ids")


def has_columns_to_check(columns: list[str]) -> bool:
    """Whether tokenized rows have columns, besides `input_ids` and `labels`, that must be honoured or refused."""
    return any(column in _READ or _is_refused(column) for column in columns)


def check_columns(dataset: Dataset, read: Collection[str], name: str) -> None:
    """
    Checks that rows have no column that changes what a model reads and is not read here. Columns whose names only
    sound so, as `context`, are named in a warning, and all others that are not read in an info line.

    Args:
        dataset ([`~datasets.Dataset`]): Rows of text or of tokens.
        read (`Collection[str]`): The columns that are read.
        name (`str`): What errors call it.

    Raises:
        ValueError: If a row has such a column with a value in it; the row and the column are named.
    """
    unread = [column for column in dataset.column_names if column not in read]
    for column in sorted(filter(_is_refused, unread)):
        # From Arrow, so that no image or sound is decoded.
        for index, value in enumerate(dataset.with_format("arrow")[:][column].to_pylist()):
            # Datasets fill in the keys that only other rows have.
            if value is not None and not (isinstance(value, dict) and all(each is None for each in value.values())):
                raise ValueError(
                    f"Row {index} of `{name}` has a value in `{column}`, which is not read: remove the column, with "
                    f"`dataset.remove_columns({column!r})`, if the text alone is what you mean."
                )
    if meant := sorted(_MEANT.intersection(unread)):
        logger.warning(f"`{name}` has {meant}, which are not read. What the model needs must be in the prompt.")
    if others := sorted(set(unread) - _MEANT):
        logger.info(f"`{name}` has {others}, which are not read.")


def read_tokenized(
    dataset: Dataset, pad_token_id: int | None, max_length: int | None, name: str, eos_token_id: int | None = None
) -> Dataset:
    """
    Reads rows of tokens as a Hugging Face collator would.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `input_ids` and, optionally, `labels`, `attention_mask`, TRL's `completion_mask` and
            `assistant_masks`. Without `labels` all tokens but padding have one.
        pad_token_id (`int`, *optional*):
            The token that is padding where there are neither `labels` nor a mask. If it is the end of sequence as
            well, only what repeats it at an end of the row is padding, and a row's first one there is its end.
        max_length (`int`, *optional*): The longest row that is allowed.
        name (`str`): What errors call it.
        eos_token_id (`int`, *optional*): The end of sequence.

    Returns:
        [`~datasets.Dataset`]: Columns `input_ids`, `labels` and `row`, without padding that a mask marks.

    Raises:
        ValueError: If a column cannot be honoured or a row has nothing to predict; the row is named.
    """
    check_columns(dataset, ("input_ids", "labels", "row", *_READ), name)
    # Lists, where a format of torch's or numpy's gives arrays.
    kept = dataset.with_format(None).select_columns(
        [c for c in dataset.column_names if c in ("input_ids", "labels", *_READ)]
    )
    extra = [column for column in kept.column_names if column in _READ]

    def read(row: dict, index: int) -> dict:
        try:
            ids, labels = _read(row, pad_token_id, eos_token_id)
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


def _read(row: dict[str, Any], pad_token_id: int | None, eos_token_id: int | None) -> tuple[list[int], list[int]]:
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
    for column in _MASKS:
        if not set(row.get(column, ())) <= {0, 1}:
            raise ValueError(f"`{column}` must hold 0 and 1, but it holds {sorted(set(row[column]) - {0, 1})[:5]}.")
    masks = [row[column] for column in _MASKS if column in row]
    if "labels" not in row:
        # A mask tells padding from an end of sequence with the same id.
        is_padding = [False] * len(ids) if "attention_mask" in row else _padding(ids, pad_token_id, eos_token_id)
        labels = [IGNORE_INDEX if padding else token for token, padding in zip(ids, is_padding)]
        labels = [label if all(marks) else IGNORE_INDEX for label, *marks in zip(labels, *masks)]
    else:
        labels = row["labels"]
        for place in range(max(start, 1), end) if masks else ():
            if all(mask[place] for mask in masks) != (labels[place] != IGNORE_INDEX):
                named = " and ".join(f"`{column}`" for column in _MASKS if column in row)
                raise ValueError(f"`labels` and {named} disagree at token {place}: remove one of them.")
    return ids[start:end], labels[start:end]


def _padding(ids: list[int], pad_token_id: int | None, eos_token_id: int | None) -> list[bool]:
    """
    Which tokens are padding, as transformers' collator sees it: all with that id. An end of sequence with the same id
    is told by its place, since a model that never learns it never stops.
    """
    is_padding = [token == pad_token_id for token in ids]
    if pad_token_id is None or pad_token_id != eos_token_id or all(is_padding):
        return is_padding
    first = is_padding.index(False)
    last = len(ids) - 1 - is_padding[::-1].index(False)
    return [place < first or place > last + 1 for place in range(len(ids))]


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
    if strangers := [label for label in labels if label < 0 and label != IGNORE_INDEX]:
        raise ValueError(f"the label {strangers[0]} is no token; what has no loss is labelled {IGNORE_INDEX}.")
    if all(label == IGNORE_INDEX for label in labels[1:]):
        raise ValueError("no label after the first token: nothing to predict.")
