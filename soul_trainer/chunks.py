"""Long texts to rows of tokens, each no longer than a model takes."""

from collections.abc import Iterable

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .batch import IGNORE_INDEX


def chunk_texts(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overlap: int = 0,
    separator: str | None = None,
) -> Dataset:
    """
    Cuts texts into chunks of tokens, none of which is lost.

    Every chunk begins as the tokenizer begins a text (Llama's `<s>`), if it does. Tokens that a chunk repeats from the
    one before are its context: they have no label, so that no token counts twice.

    Args:
        texts (`Iterable[str]`): The texts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        max_length (`int`): Longest chunk, in tokens, at least 2.
        overlap (`int`, *optional*, defaults to 0):
            Tokens of context from the chunk before, less than a chunk has without its start. With 0 and a tokenizer
            without a start, nothing predicts the first token of a chunk; with 1 something does.
        separator (`str`, *optional*):
            What joins the texts to one, which is cut wherever a chunk is full and has no end of sequence: MUSE's way
            (Shi et al., 2024), with `"\\n\\n"`. By default each text is cut by itself, and an end of sequence ends it.

    Returns:
        [`~datasets.Dataset`]: `input_ids` and `labels`, lists of `int` of the same length, as [`~formats.prepare`]
        takes them.

    Raises:
        ValueError: If there is no text, one is empty, a length is out of its range, or there is no end of sequence.
    """
    texts = list(texts)
    if not texts:
        raise ValueError("`texts` is empty: it needs at least one text.")
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"Row {row} of `texts` is empty or not a string: {text!r}.")
    start = text_start(tokenizer)
    room = max_length - len(start)
    if max_length < 2 or room < 1:
        raise ValueError(f"`max_length`={max_length} leaves no room for text: raise it.")
    if not 0 <= overlap < room:
        raise ValueError(f"`overlap` must be in [0, {room}), the tokens of a chunk, but it is {overlap}.")
    if separator is None and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no `eos_token`, which ends a text: set one.")
    end = [tokenizer.eos_token_id] if separator is None else []
    wholes = texts if separator is None else [separator.join(texts)]
    # Texts longer than the model are what this is for: no warning of their length.
    chunks = []
    for row, ids in enumerate(tokenizer(wholes, add_special_tokens=False, verbose=False)["input_ids"]):
        ids = ids + end
        if len(start) + len(ids) < 2:
            raise ValueError(f"Row {row} of `texts` is a single token, which nothing predicts: leave it out.")
        chunks += _chunks(ids, start, room, overlap)
    return Dataset.from_list(chunks)


def text_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer puts before any text."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    place = next(place for place in range(len(whole)) if whole[place : place + len(plain)] == plain)
    return whole[:place]


def _chunks(ids: list[int], start: list[int], room: int, overlap: int) -> list[dict]:
    rows, done = [], 0
    while done < len(ids):
        begin = max(done - overlap, 0)
        end = min(begin + room, len(ids))
        # The last token, alone, would be predicted from nothing.
        if done and end - begin == 1 and not start:
            begin -= 1
        context = len(start) + done - begin
        rows.append({"input_ids": start + ids[begin:end], "labels": [IGNORE_INDEX] * context + ids[done:end]})
        done = end
    return rows
