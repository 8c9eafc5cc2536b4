"""
MUSE (Shi et al., 2024): what a model says about texts, how it continues them, and whether it betrays having seen them.

Prompts, lengths and scores are those of MUSE's own `metrics/`, as shares where MUSE has percents: no chat template,
prompts tokenized by themselves, ROUGE-L as F1 without a stemmer. Imports no torch.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..metrics.rouge_overlap.formula import rouge_scores
from ..metrics.shadow_attack.formula import shadow_attacks
from ..rows import check_rows
from ..statistics import Figure, mean_figure
from .base import DETAILS, GENERATION, Part, Suite, by_split, column, match_rows
from .membership import gradient_part, membership_figures, privacy_figures, row_scores, token_fields
from .memorization import memorization_values
from .sources import load_rows, require_texts


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


KNOWMEM = ("knowmem_forget", "knowmem_retain")
VERBMEM = "verbmem_forget"
FORGET, RETAIN, HOLDOUT = PRIVLEAK = ("privleak_forget", "privleak_retain", "privleak_holdout")
SPLITS = (*KNOWMEM, VERBMEM, *PRIVLEAK)
METRICS = ("knowmem", "verbmem", "privleak")
# What a row was asked by, for telling whether a reference was asked the same.
ASKED = dict.fromkeys(KNOWMEM, "question") | {VERBMEM: "prompt"} | dict.fromkeys(PRIVLEAK, "text")
# Where MUSE cuts an answer off: the model begins another pair of its prompt.
STOPS = ("\n\n", "\nQuestion", "Question:")
# A continuation that begins with one of these needs no space before it.
ATTACHED = ",.;:!?)"


@dataclass
class MuseArguments:
    """The rows of MUSE, or of a dataset of its form."""

    dataset: str = field(
        default="muse-bench/MUSE-News",
        metadata={"help": "Hub id (muse-bench/MUSE-Books), a folder in its layout, or MUSE's own data/news."},
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a dataset on the hub."})
    metrics: str = field(default=",".join(METRICS), metadata={"help": "Those to measure, by commas."})
    knowmem_tokens: int = field(default=32, metadata={"help": "Longest answer to a question, in tokens."})
    verbmem_tokens: int = field(default=128, metadata={"help": "Longest continuation of a text, in tokens."})
    gradient_norms: bool = field(
        default=False, metadata={"help": "Whether membership inference also uses norms of gradients, row by row."}
    )

    def __post_init__(self):
        unknown = [name for name in self.metric_names() if name not in METRICS]
        if unknown:
            raise ValueError(f"`metrics` must be some of {', '.join(METRICS)}, by commas, but it has {unknown[0]!r}.")
        for name in ("knowmem_tokens", "verbmem_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but it is {getattr(self, name)}.")

    def metric_names(self) -> list[str]:
        """The metrics to measure."""
        return [name.strip() for name in self.metrics.split(",")]


def load_texts(arguments: MuseArguments, tokenizer: "PreTrainedTokenizerBase") -> list[dict]:
    """
    Loads the rows.

    Args:
        arguments ([`MuseArguments`]): Which.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the model, whose tokens say where a text is cut.

    Returns:
        `list[dict]`: Rows with `split` and `index`. Those of `knowmem_forget` and `knowmem_retain` have `question`,
        `answer` and `prompt`, those of `verbmem_forget` `prompt` and `answer`, those of `privleak_forget`,
        `privleak_retain` and `privleak_holdout` `text`. `end` is what follows a prompt that the model is to go on
        from: a token of its own, so that a prompt ends as MUSE's do.

    Raises:
        ValueError: If the dataset lacks a split or a column, a text is empty, or there is no end of sequence.
    """
    if not tokenizer.eos_token:
        raise ValueError("the tokenizer has no `eos_token`, which ends a prompt: set one.")
    loaders = {"knowmem": _knowmem_rows, "verbmem": _verbmem_rows, "privleak": _privleak_rows}
    rows = []
    for metric in METRICS:
        if metric in arguments.metric_names():
            for split, found in loaders[metric](arguments, tokenizer).items():
                rows += [{"split": split, "index": index, **row} for index, row in enumerate(found)]
    return rows


def parts(row: dict, arguments: MuseArguments) -> list[Part]:
    """What is asked about a row: an answer or a continuation of the model's own, or what attacks need."""
    if row["split"] in PRIVLEAK:
        asked = [{"text": row["text"]}, {"text": row["text"].lower()}]
        found = [Part("membership", asked, _membership_fields, DETAILS)]
        if arguments.gradient_norms:
            found.append(gradient_part(asked[0]))
        return found
    prompt = [{"prompt": row["prompt"], "completion": row["end"]}]

    def overlap(text: str) -> dict:
        text = (before_stop(text) if row["split"] in KNOWMEM else text).strip()
        return {"generation": text, **rouge_scores(row["answer"], text, use_stemmer=False)}

    if row["split"] in KNOWMEM:
        return [Part("generation", prompt, overlap, GENERATION, arguments.knowmem_tokens)]
    return [
        Part("generation", prompt, overlap, GENERATION, arguments.verbmem_tokens),
        Part("memorization", [continuation(row)], _memorization_fields, DETAILS),
    ]


def before_stop(text: str) -> str:
    """An answer to a question up to where the model goes on with another question, as MUSE cuts it."""
    for stop in STOPS:
        text = text.split(stop)[0]
    return text


def continuation(row: dict) -> dict:
    """
    A prompt of verbatim memorization with the text's own continuation. MUSE's files have lost the space between them:
    it is put back, as OpenUnlearning does, unless punctuation or white space says that there was none.
    """
    prompt, answer = row["prompt"], row["answer"]
    is_parted = prompt[-1:].isspace() or answer[0].isspace() or answer[0] in ATTACHED
    return {"prompt": prompt, "completion": answer if is_parted else f" {answer}"}


def summarise(rows: list[dict], reference_rows: list[dict] | None = None) -> dict[str, Figure]:
    """
    MUSE's figures, from rows alone.

    Args:
        rows (`list[dict]`): Of the model.
        reference_rows (`list[dict]`, *optional*): Of the gold model, which was trained without the forget set.

    Returns:
        `dict[str, Figure]`: `knowmem_forget_rougeL`, `knowmem_retain_rougeL` and `verbmem_forget_rougeL`, mean F1 in
        [0, 1]; `verbmem_exact_memorization` and `verbmem_extraction_strength`; `privleak` if there are
        `reference_rows`, in percent (not defined, and left out, if the gold model itself tells all forget rows from
        the held-out ones); `mia_<attack>_auc` and its true positive rates, forget rows against held-out ones, with
        `mia_min_40_auc` for the attack that PrivLeak is made of; `shadow_attack_efficacy`, the share of forget rows
        that SOUL's classifier takes for unseen, and `shadow_attack_accuracy` on the rows that it learnt from. A
        figure whose rows are missing is left out.

    Raises:
        ValueError: If a number is missing or not finite, or `reference_rows` are not of the same rows.
    """
    check_rows(rows)
    splits = by_split(rows, SPLITS)
    gold = None
    if reference_rows is not None:
        gold = by_split(match_reference(rows, reference_rows), SPLITS)
    figures = {}
    for split in (*KNOWMEM, VERBMEM):
        scores = column(splits[split], "rougeL_f1")
        if scores:
            figures[f"{split}_rougeL"] = mean_figure(scores, split)
    for name, values in memorization_values(splits[VERBMEM], "token_hits").items():
        figures[f"verbmem_{name}"] = mean_figure(values, VERBMEM)
    golds = (gold[FORGET], gold[HOLDOUT]) if gold else None
    figures |= privacy_figures((splits[FORGET], splits[HOLDOUT]), golds)
    figures |= membership_figures(splits[FORGET], splits[HOLDOUT], reference_rows)
    return figures | _shadow(splits)


def match_reference(rows: list[dict], reference_rows: list[dict]) -> list[dict]:
    """The rows of a reference in the order of `rows`; a `ValueError` if they were asked something else."""
    check_rows(reference_rows)
    own = by_split(rows, SPLITS)
    return [row for split in SPLITS if own[split] for row in match_rows(rows, reference_rows, (split,), ASKED[split])]


def _knowmem_rows(arguments: MuseArguments, tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[dict]]:
    found = {}
    for split in KNOWMEM:
        side = split.partition("_")[2]
        pairs, shown = (
            load_rows(arguments.dataset, "knowmem", name, ("question", "answer"), arguments.dataset_revision)
            for name in (f"{side}_qa", f"{side}_qa_icl")
        )
        require_texts(pairs, split, "question", "answer")
        before = "".join(f"Question: {pair['question']}\nAnswer: {pair['answer']}\n\n" for pair in shown)
        found[split] = [
            {**pair, "prompt": f"{before}Question: {pair['question']}\nAnswer: ", "end": tokenizer.eos_token}
            for pair in pairs
        ]
    return found


def _verbmem_rows(arguments: MuseArguments, tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[dict]]:
    rows = load_rows(arguments.dataset, "verbmem", "forget", ("prompt", "gt"), arguments.dataset_revision)
    require_texts(rows, VERBMEM, "prompt", "gt")
    found = []
    for row in rows:
        # Special tokens at the start are among the tokens that MUSE counts.
        ids = tokenizer(row["gt"])["input_ids"][: arguments.verbmem_tokens]
        # A character of several tokens may have lost its last.
        answer = tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")
        found.append({"prompt": row["prompt"], "answer": answer, "end": tokenizer.eos_token})
    require_texts(found, VERBMEM, "answer")
    return {VERBMEM: found}


def _privleak_rows(arguments: MuseArguments, tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[dict]]:
    found = {}
    for split in PRIVLEAK:
        name = split.partition("_")[2]
        found[split] = load_rows(arguments.dataset, "privleak", name, ("text",), arguments.dataset_revision)
        require_texts(found[split], split, "text")
        for index, row in enumerate(found[split]):
            # Both as it stands and in lower case, whatever the tokenizer adds.
            for text in (row["text"], row["text"].lower()):
                if len(tokenizer(text)["input_ids"]) < 2:
                    raise ValueError(f"Row {index} of `{split}`: {text!r} is a single token, which nothing predicts.")
    return found


def _memorization_fields(scores: list) -> dict:
    # The end of sequence is not of the text: MUSE and OpenUnlearning leave it out, here and below.
    own = scores[0].content
    return {"answer_nll": own.nll, "token_hits": token_fields(own)["token_hits"]}


def _membership_fields(scores: list) -> dict:
    own, lowercase = (score.content for score in scores)
    return {"answer_nll": own.nll, **token_fields(own), "lowercase_nll": lowercase.nll}


def _shadow(splits: dict[str, list[dict]]) -> dict[str, Figure]:
    """The shadow attack by the score that tells retain rows from held-out ones best, as SOUL reports it."""
    scores = [row_scores(splits[split]) for split in (RETAIN, HOLDOUT, FORGET)]
    names = [name for name in scores[0] if all(name in each and np.isfinite(each[name]).all() for each in scores)]
    if not names:
        return {}
    attacks = shadow_attacks(*({name: each[name] for name in names} for each in scores), sample="mia")
    best = next(iter(attacks.values()))
    num_rows = len(splits[RETAIN]) + len(splits[HOLDOUT])
    return {
        "shadow_attack_efficacy": best.efficacy,
        "shadow_attack_accuracy": Figure(best.shadow_accuracy, num_rows),
    }


SUITE = Suite("muse", MuseArguments, load_texts, parts, summarise, check_reference=match_reference)
