"""
Copyright: does a model go on with a text as the text itself does, given so many tokens of it?

As in Jia et al. (2024, SOUL), prompts are 100 and 300 tokens of the text, what the model says greedily is compared
with the text's own continuation by ROUGE-L and BLEU, and the lower the better; the text was Harry Potter there, after
Eldan and Russinovich (2023). SOUL draws passages at random, puts them into a chat as "Let's see how you would complete
this piece of text: ...", lets the model go on up to 600 tokens, prompt included, leaves out the first of them, and
gives BLEU in percent. Here passages are spread over the text, both prompts end at the same place, a prompt is the bare
text, as in pretraining, and as many tokens are compared as `continuation_tokens` says.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..rows import check_rows
from ..statistics import LOSS, UNIT, Figure, mean_figure
from .base import DETAILS, GENERATION, Part, Suite, column, match_rows
from .membership import token_fields
from .memorization import memorization_values
from .sources import spread


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FORGET, RETAIN = "forget", "retain"
PREFIXES = {FORGET: "", RETAIN: "retain_"}
# Fields of a row, by the figures that are their means.
MEANS = {
    "leak_rougeL": "rougeL_recall",
    "leak_rougeL_f1": "rougeL_f1",
    "leak_bleu": "bleu",
    "continuation_nll": "answer_nll",
}
HITS = "token_hits"


@dataclass
class CopyrightArguments:
    """The texts, and the passages that are taken from them."""

    text: str = field(
        metadata={"help": "What must not be reproduced: a text file, a folder of .txt files, or rows with a `text`."}
    )
    retain_text: str | None = field(default=None, metadata={"help": "A text that the model should still know."})
    config: str | None = field(default=None, metadata={"help": "Configuration of a dataset, as in `raw` of MUSE."})
    split: str = field(default="train", metadata={"help": "Split of `text`, if it is a dataset."})
    retain_split: str = field(default="train", metadata={"help": "Split of `retain_text`, if it is a dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of datasets on the hub."})
    prompt_tokens: str = field(default="100,300", metadata={"help": "Lengths of prompts in tokens, by commas."})
    continuation_tokens: int = field(default=200, metadata={"help": "Tokens that are compared after a prompt."})
    num_samples: int = field(
        default=200, metadata={"help": "Passages, spread evenly over the text; fewer if no more fit side by side."}
    )

    def __post_init__(self):
        self.prompt_lengths()
        for name in ("continuation_tokens", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but it is {getattr(self, name)}.")

    def prompt_lengths(self) -> list[int]:
        """`prompt_tokens` as numbers, the smallest first."""
        parts = [part.strip() for part in self.prompt_tokens.split(",")]
        if not all(part.isdecimal() and int(part) for part in parts):
            raise ValueError(
                f"`prompt_tokens` must be numbers of at least 1 with commas between, but it is {self.prompt_tokens!r}."
            )
        return sorted({int(part) for part in parts})


def load(arguments: CopyrightArguments, tokenizer: "PreTrainedTokenizerBase") -> list[dict]:
    """
    The passages: a pure function of the settings, the texts and the tokenizer.

    Args:
        arguments ([`CopyrightArguments`]): The texts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's, a fast one, which counts the tokens.

    Returns:
        `list[dict]`: With `split` (`forget_100`, ...), `index` (the passage), `prompt`, `answer` (the text's own
        continuation), `prompt_tokens` and `continuation_tokens`. Rows of the same index in `forget_100` and
        `forget_300` have the same `answer`.

    Raises:
        ValueError: If a text is not there, holds no passage, or the tokenizer is a slow one.
    """
    from soul_trainer.sources import load_texts

    lengths = arguments.prompt_lengths()
    longest = lengths[-1] + arguments.continuation_tokens
    if longest > tokenizer.model_max_length:
        raise ValueError(
            f"`prompt_tokens` and `continuation_tokens` make {longest} tokens, over the {tokenizer.model_max_length} "
            "that the tokenizer allows: lower them."
        )
    sources = {FORGET: (arguments.text, arguments.split, "text")}
    if arguments.retain_text:
        sources[RETAIN] = (arguments.retain_text, arguments.retain_split, "retain_text")
    rows = []
    for side, (source, split, name) in sources.items():
        texts = load_texts(source, arguments.config, split, arguments.dataset_revision, name)
        passages = _passages(texts, tokenizer, lengths, arguments, f"`{name}`={source!r}")
        for place, length in enumerate(lengths):
            for index, passage in enumerate(passages):
                prompt, answer = passage[place]
                row = {"split": f"{side}_{length}", "index": index, "prompt": prompt, "answer": answer}
                rows.append({**row, "prompt_tokens": length, "continuation_tokens": arguments.continuation_tokens})
    return rows


def parts(row: dict, arguments: CopyrightArguments) -> list[Part]:
    """What is asked about a passage: the likelihood of its continuation, and a continuation of the model's own."""
    from ..metrics.bleu.formula import sentence_bleu
    from ..metrics.rouge_overlap.formula import rouge_scores

    num_tokens = row["continuation_tokens"]

    def memory(scores: list) -> dict:
        (score,) = scores
        if len(score.log_probs) < num_tokens:
            raise ValueError(
                f"Row {row['index']} of `{row['split']}` is longer than the model's limit: lower `prompt_tokens` or "
                "`continuation_tokens`."
            )
        # A passage is followed by more text and not by the end of sequence, which is scored with any answer.
        own = score.first(num_tokens)
        return {"answer_nll": own.nll, **token_fields(own)}

    def overlap(text: str) -> dict:
        text = text.strip()
        return {"generation": text, **rouge_scores(row["answer"], text), "bleu": sentence_bleu(row["answer"], text)}

    asked = [{"prompt": row["prompt"], "completion": row["answer"]}]
    return [Part("memory", asked, memory, DETAILS), Part("generation", asked, overlap, GENERATION, num_tokens)]


def summarise(rows: list[dict], reference_rows: list[dict] | None = None) -> dict[str, Figure]:
    """
    The figures of each length `k` of prompts, from rows alone.

    Args:
        rows (`list[dict]`): Of the model.
        reference_rows (`list[dict]`, *optional*): Of a gold model; no figure needs them.

    Returns:
        `dict[str, Figure]`: `leak_rougeL_<k>` (recall), `leak_rougeL_f1_<k>`, `leak_bleu_<k>` (in [0, 1]),
        `exact_memorization_<k>`, `extraction_strength_<k>` and `continuation_nll_<k>` (nats per token; its exponential
        is the perplexity); those of the text to keep start with `retain_`. A figure whose column is missing is left
        out.

    Raises:
        ValueError: If a number is missing or not finite, or a split is unknown.
    """
    check_rows(rows)
    by_split: dict[str, list[dict]] = {}
    for row in rows:
        by_split.setdefault(row["split"], []).append(row)
    figures = {}
    for split, members in by_split.items():
        side, _, length = split.rpartition("_")
        if side not in PREFIXES or not length.isdecimal():
            raise ValueError(f"`split` must be forget_<k> or retain_<k>, but row {members[0]['index']} has {split!r}.")
        for name, values in _row_values(members).items():
            # Passages are the same for all lengths, and so are the resamples.
            bounds = LOSS if name == "continuation_nll" else UNIT
            figures[f"{PREFIXES[side]}{name}_{length}"] = mean_figure(values, side, bounds)
    return figures


def match_reference(rows: list[dict], reference_rows: list[dict]) -> list[dict]:
    """The rows of a reference; a `ValueError` if its passages are not those of `rows`."""
    return match_rows(rows, reference_rows, tuple(dict.fromkeys(row["split"] for row in rows)), "prompt")


def _row_values(rows: list[dict]) -> dict[str, np.ndarray]:
    found = {name: values for name, key in MEANS.items() if (values := column(rows, key))}
    return found | memorization_values(rows, HITS)


def _passages(
    texts: list[str],
    tokenizer: "PreTrainedTokenizerBase",
    lengths: list[int],
    arguments: CopyrightArguments,
    source: str,
) -> list[list[tuple[str, str]]]:
    """Of each passage, a prompt of each length with the continuation; no token is in two continuations."""
    num_tokens = arguments.continuation_tokens
    if not tokenizer.is_fast:
        raise ValueError("Passages of a text are cut at tokens, for which the model needs a fast tokenizer.")
    documents = [
        tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False) for text in texts
    ]
    slots = [
        (document, start)
        for document, encoded in enumerate(documents)
        for start in range(lengths[-1], len(encoded["input_ids"]) - num_tokens + 1, num_tokens)
    ]
    if not slots:
        longest = max((len(encoded["input_ids"]) for encoded in documents), default=0)
        raise ValueError(
            f"{source} has no text of more than {longest} tokens, but a passage takes {lengths[-1] + num_tokens}: "
            "lower `prompt_tokens` or `continuation_tokens`, or join short texts."
        )
    passages, before, free = [], None, 0
    for document, start in (slots[place] for place in spread(len(slots), arguments.num_samples)):
        free = free if document == before else 0
        encoded = documents[document]
        last = len(encoded["input_ids"]) - num_tokens
        for place in range(max(start, free), min(start + num_tokens, last + 1)):
            cut = [_cut(texts[document], encoded, place, length, num_tokens, tokenizer) for length in lengths]
            if None not in cut:
                passages.append(cut)
                before, free = document, place + num_tokens
                break
    if not passages:
        raise ValueError(f"No passage of {source} makes the same tokens by itself as in the whole text.")
    return passages


def _cut(
    text: str, encoded: dict, place: int, length: int, num_tokens: int, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, str] | None:
    """Text before and after a token, or `None` if it does not make the same tokens when it is read by itself."""
    from soul_trainer.batch import IGNORE_INDEX
    from soul_trainer.formats import encode, render

    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    middle, end = offsets[place - 1][1], offsets[place + num_tokens - 1][1]
    for start in _starts(text, offsets, place - length):
        prompt, answer = text[start:middle], text[middle:end]
        if not answer.strip():
            return None
        found = encode(tokenizer, render({"prompt": prompt, "completion": answer}, tokenizer))
        num_prompt = found["labels"].count(IGNORE_INDEX)
        # Before the prompt's own tokens there may be one that opens every text.
        opening, own = num_prompt - length, found["input_ids"][: num_prompt + num_tokens]
        if opening >= 0 and own[opening:] == ids[place - length : place + num_tokens]:
            if set(own[:opening]) <= set(tokenizer.all_special_ids):
                return prompt, answer
    return None


def _starts(text: str, offsets: list[tuple[int, int]], place: int) -> Iterator[int]:
    """Where the text of a token may start: with the white space before it, or without."""
    before, end = offsets[place - 1][1] if place else 0, offsets[place][1]
    yield before
    bare = text[before:end].lstrip()
    if len(bare) < end - before:
        yield end - len(bare)


SUITE = Suite("copyright", CopyrightArguments, load, parts, summarise, None, match_reference)
