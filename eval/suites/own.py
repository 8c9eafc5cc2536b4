"""
Rows of one's own: what a model still says of the rows to forget, and of those to keep, whatever they are.

No benchmark is behind it. Each answer is scored by its likelihood, and where there is a prompt the model answers
greedily; a text has its beginning for a prompt. So the same figures hold for questions, conversations and documents:
before and after unlearning, and beside a gold model if there is one.
"""

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..metrics.answer_probability.formula import answer_probabilities
from ..metrics.rouge_overlap.formula import rouge_scores
from ..rows import check_rows
from ..statistics import LOSS, UNIT, Figure, mean_figure
from .base import GENERATION, Part, Suite, by_split, column, match_rows
from .embedding import accuracy_figures
from .memorization import memorization_values
from .sources import spread


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


FORGET, RETAIN, HELD_OUT, GENERAL_TEXT = SPLITS = ("forget", "retain", "held_out", "general_text")
HITS = "answer_hits"
# A column of false answers, by TOFU's name: a row that has it can be judged by sentence embeddings.
WRONG_ANSWERS = "perturbed_answer"
# As in `soul_trainer.sources`, which comes with torch.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# Fields of a row that are figures as they are.
FIELDS = ("rougeL_recall", "rougeL_f1", "rouge1_recall", "rouge1_f1", "verbatim_overlap")


@dataclass
class OwnArguments:
    """The rows: question/answer, prompt/completion, messages or text."""

    forget: str = field(
        metadata={
            "help": "Rows to forget: a file (.json, .jsonl, .csv, .tsv, .parquet, .txt, .md), a folder of such files, "
            "or a hub id, as ID:CONFIG:SPLIT where it has several."
        }
    )
    retain: str | None = field(default=None, metadata={"help": "Rows that unlearning is told to keep."})
    held_out: str | None = field(
        default=None, metadata={"help": "Rows that the model knows and unlearning never sees: its cost elsewhere."}
    )
    general_text: str | None = field(
        default=None,
        metadata={"help": "Rows that no training has seen, such as texts: what unlearning costs the language itself."},
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of datasets on the hub."})
    max_rows: int = field(
        default=400,
        metadata={"help": "Rows of those to keep and held out that are asked, spread evenly; to forget, all are."},
    )
    prompt_tokens: int = field(
        default=100, metadata={"help": "Tokens of a text that the model goes on from; half of a shorter text."}
    )
    generate: bool = field(default=True, metadata={"help": "Whether the model answers; without, no ROUGE."})
    max_new_tokens: int = field(default=200, metadata={"help": "Longest answer, in tokens."})
    embedding_model: str | None = field(
        default=None,
        metadata={
            "help": "Sentence embeddings for the accuracy of rows with a column perturbed_answer: "
            "sentence-transformers/paraphrase-MiniLM-L6-v2."
        },
    )

    def __post_init__(self):
        for name in ("max_rows", "prompt_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but it is {getattr(self, name)}.")


def load_splits(arguments: OwnArguments) -> "dict[str, Dataset]":
    """
    The rows as they are, whole splits.

    Args:
        arguments ([`OwnArguments`]): Which.

    Returns:
        `dict[str, Dataset]`: `forget` and, if they are named, `retain`, `held_out` and `general_text`.

    Raises:
        ValueError: If a source is not there or its columns make no row.
    """
    sources = {split: getattr(arguments, split) for split in SPLITS}
    return {split: load(source, arguments.dataset_revision, split) for split, source in sources.items() if source}


def load(source: str, revision: str | None = None, name: str = "dataset") -> "Dataset":
    """
    Loads rows that are named in one word.

    Args:
        source (`str`): A file, a folder or a hub id, with `:CONFIG` or `:CONFIG:SPLIT` after it if need be.
        revision (`str`, *optional*): Revision of a dataset on the hub.
        name (`str`, *optional*, defaults to `"dataset"`): What errors call it.
    """
    from soul_trainer.sources import load_source

    path, config, split = source, None, None
    if not Path(source).exists():
        # At least two characters: a drive's letter is no source.
        path, config, split = re.fullmatch(r"(.{2,}?|.?)(?::([^:/\\]*))?(?::([^:/\\]*))?", source).groups()
    return load_source(path, config or None, split or "train", revision, name)


def unscored_rows(
    splits: "dict[str, Dataset]", tokenizer: "PreTrainedTokenizerBase", arguments: OwnArguments
) -> list[dict]:
    """
    The rows of the suite before any model has seen them.

    Args:
        splits (`dict[str, Dataset]`): From [`load_splits`], or made elsewhere.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's, which counts the tokens of texts.
        arguments ([`OwnArguments`]): How many rows, how long.

    Returns:
        `list[dict]`: With `split`, `index`, `row` (its place in the split's file), and `question`, `prompt` with
        `completion`, `messages` or `text`. All but messages have `answer`, and texts `prompt`: the texts' beginning,
        and as much of the rest as the model is to say.

    Raises:
        ValueError: If a text is too short to be parted; the row is named.
    """
    from soul_trainer.sources import row_columns

    rows = []
    for split, dataset in splits.items():
        columns = [*row_columns(dataset, split), *{WRONG_ANSWERS}.intersection(dataset.column_names)]
        kept = spread(len(dataset), None if split == FORGET else arguments.max_rows)
        for index, (place, item) in enumerate(zip(kept, dataset.select(kept).select_columns(columns))):
            try:
                asked = _asked(item, tokenizer, arguments)
            except ValueError as error:
                raise ValueError(f"Row {place} of `{split}`: {error}") from error
            rows.append({"split": split, "index": index, "row": place, **asked})
    return rows


def parts(row: dict, arguments: OwnArguments) -> list[Part]:
    """What is asked about a row: the likelihood of its answer or text, and an answer of the model's own."""
    names = ("question", "answer", "prompt", "completion", *TEMPLATE_COLUMNS) if "text" not in row else ("text",)
    if "messages" in row:
        names = ("messages", *TEMPLATE_COLUMNS)
    asked = {name: row[name] for name in names if name in row}

    def memory(scores: list) -> dict:
        (score,) = scores
        return {"answer_nll": score.nll, HITS: [int(hit) for hit in score.content.hits]}

    def overlap(text: str) -> dict:
        text = text.strip()
        fields = {"generation": text, **rouge_scores(row["answer"], text)}
        return fields | {"verbatim_overlap": verbatim_overlap(row["answer"], text)}

    found = [Part("memory", [asked], memory)]
    # What the model makes of text that it never learnt is a matter of its loss: there is no answer to be repeated.
    if arguments.generate and row["split"] != GENERAL_TEXT:
        if "text" in row:
            asked = {"prompt": row["prompt"], "completion": row["answer"]}
        found.append(Part("generation", [asked], overlap, GENERATION, arguments.max_new_tokens))
    return found


def verbatim_overlap(answer: str, generation: str) -> float:
    """
    The longest run of the answer's words that the generation repeats word for word, as a share of the answer. Case and
    punctuation do not count.

    Args:
        answer (`str`): The true one. One without a word is compared by its characters.
        generation (`str`): The model's.

    Returns:
        `float`: In [0, 1]; 1 where the whole answer is in the generation.
    """
    words, said = (re.findall(r"\w+", text.casefold()) for text in (answer, generation))
    if not words:
        words, said = list(answer), list(generation)
    longest = difflib.SequenceMatcher(None, words, said, autojunk=False).find_longest_match()
    return longest.size / len(words)


def summarise(rows: list[dict], reference_rows: list[dict] | None = None) -> dict[str, Figure]:
    """
    The figures, from rows alone.

    Args:
        rows (`list[dict]`): Of the model.
        reference_rows (`list[dict]`, *optional*): Of a gold model; no figure needs them.

    Returns:
        `dict[str, Figure]`: For each split `<split>_probability`, `<split>_nll` (nats per token), ROUGE
        (`<split>_rougeL_recall`, ...) and `<split>_verbatim_overlap`; `exact_memorization` and `extraction_strength`
        of the rows to forget, and those of the others with their split before; of `general_text` only
        `general_text_nll`. A figure whose column is missing is left out.

    Raises:
        ValueError: If a number is missing or not finite, or a split is unknown.
    """
    check_rows(rows)
    figures = {}
    for split, members in by_split(rows, SPLITS).items():
        if split == GENERAL_TEXT:
            if losses := column(members, "answer_nll"):
                figures["general_text_nll"] = mean_figure(losses, split, LOSS)
            continue
        prefix = "" if split == FORGET else f"{split}_"
        values = {f"{split}_{name}": found for name, found in _row_values(members).items()}
        values |= {f"{prefix}{name}": found for name, found in memorization_values(members, HITS).items()}
        for name, found in values.items():
            figures[name] = mean_figure(found, split, LOSS if name.endswith("_nll") else UNIT)
    return figures | accuracy_figures(rows)


def match_reference(rows: list[dict], reference_rows: list[dict]) -> list[dict]:
    """The rows of a reference; a `ValueError` if they are not those of `rows`."""
    check_rows(reference_rows)
    own = by_split(rows, SPLITS)
    matched = []
    for split in (split for split in SPLITS if own[split]):
        asked = next(key for key in ("question", "prompt") if key in own[split][0])
        matched += match_rows(rows, reference_rows, (split,), asked)
    return matched


def _row_values(rows: list[dict]) -> dict[str, np.ndarray]:
    nlls = column(rows, "answer_nll")
    found = {"probability": answer_probabilities(nlls), "nll": np.asarray(nlls)} if nlls else {}
    return found | {name: np.asarray(values) for name in FIELDS if (values := column(rows, name))}


def _asked(item: dict, tokenizer: "PreTrainedTokenizerBase", arguments: OwnArguments) -> dict:
    """A row as it is asked, with what reports show: its question or prompt, and its answer."""
    if isinstance(item.get("prompt"), list):
        turns = {"messages": item["prompt"] + (item["completion"] or [])}
        item = turns | {name: item[name] for name in TEMPLATE_COLUMNS if item.get(name)}
    if "messages" in item:
        *before, last = item["messages"] or [{}]
        question = next((turn["content"] for turn in before[::-1] if turn["role"] == "user"), "")
        return {**item, "question": question, "answer": str(last.get("content") or "").strip()}
    if "completion" in item:
        return {**item, "answer": str(item["completion"] or "").strip()}
    return {**item, **_parted(item["text"], tokenizer, arguments)} if "text" in item else item


def _parted(text: str, tokenizer: "PreTrainedTokenizerBase", arguments: OwnArguments) -> dict:
    """The beginning of a text as `prompt`, and what comes after it, up to as many tokens as are generated."""
    if not isinstance(text, str):
        raise ValueError(f"`text` must be a text, but it is {text!r}.")
    if not tokenizer.is_fast:
        raise ValueError("texts are parted at tokens, for which the model needs a fast tokenizer.")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    middle = min(arguments.prompt_tokens, len(offsets) // 2)
    start = offsets[middle - 1][1] if middle else 0
    end = offsets[min(middle + arguments.max_new_tokens, len(offsets)) - 1][1] if offsets else 0
    prompt, answer = text[:start], text[start:end]
    if not prompt.strip() or not answer.strip():
        raise ValueError(f"{text[:60]!r} is too short to be parted into a beginning and a rest.")
    return {"prompt": prompt, "answer": answer}


def judge(rows: list[dict], arguments: OwnArguments) -> None:
    """Adds `embedding_hit` to the rows that have an answer of the model's own and wrong ones to compare it with."""
    if arguments.embedding_model is None:
        return
    from ..embeddings import nearest_answers

    judged = [row for row in rows if row.get("generation") is not None and row.get(WRONG_ANSWERS)]
    texts = ([row[key] for row in judged] for key in ("generation", "answer", WRONG_ANSWERS))
    for row, hit in zip(judged, nearest_answers(*texts, model=arguments.embedding_model)):
        row["embedding_hit"] = bool(hit)


def _load(arguments: OwnArguments, tokenizer: "PreTrainedTokenizerBase") -> list[dict]:
    return unscored_rows(load_splits(arguments), tokenizer, arguments)


SUITE = Suite("own", OwnArguments, _load, parts, summarise, judge, match_reference)
