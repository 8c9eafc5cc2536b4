"""
TOFU (Maini et al., 2024): which rows, and which figures are made of them.

Figures are those of TOFU's own `aggregate_eval_stat.py`, and the same three of `held_out`: authors that the model has
learnt and unlearning never saw. Libraries that only a model needs are imported where one is used.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..metrics.answer_probability.formula import answer_probabilities, normalised_answer_probabilities
from ..metrics.forget_quality.formula import forget_quality, p_value_of
from ..metrics.model_utility.formula import model_utility
from ..metrics.rouge_overlap.formula import rouge_scores
from ..metrics.truth_ratio.formula import log_truth_ratios, truth_ratio_scores, truth_ratios, truth_shares
from ..rows import check_rows
from ..statistics import TAIL, UNIT, Figure, distance_bounds, mean_figure, resampled_means
from .base import GENERATION, Part, Suite, by_split, column, match_rows
from .embedding import accuracy_figures, judge_embeddings
from .membership import membership_figures, membership_parts, privacy_figures
from .memorization import memorization_values


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from soul_trainer.engines import Engine


SPLITS = ("forget", "retain", "held_out", "real_authors", "world_facts")
# Their answers are names, which have no paraphrase; what matters is which of the options the model prefers.
OPTION_SPLITS = ("real_authors", "world_facts")
UTILITY_SPLITS = ("retain", "real_authors", "world_facts")
FIGURES = ("probability", "rougeL_recall", "truth_ratio")
ROUGE = ("rougeL_recall", "rougeL_f1", "rouge1_recall", "rouge1_f1")
# Asked for their likelihood alone: rows of the same kind that no model was trained on.
NON_MEMBERS = "non_members"


# Of TOFU's 400 rows of retain_perturbed, whose own evaluation asks the first 300. recipes/tofu.py keeps the others
# from unlearning, so that they show what it costs where nobody looks. Of fewer rows none are taken away.
HELD_OUT_ROWS, LEAST_RETAIN_ROWS = 100, 300
HELD_OUT_HELP = (
    f"Last rows of retain_perturbed that unlearning must not see, where there is no such set; by default "
    f"{HELD_OUT_ROWS} of TOFU's 400. 0 for unlearning on all of them, as published."
)


@dataclass
class TofuArguments:
    """The rows of TOFU, or of a dataset of its form."""

    dataset: str = field(default="locuslab/TOFU", metadata={"help": "Hub id, or a folder in its layout."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a dataset on the hub."})
    forget_split: str = field(default="forget10", metadata={"help": "What was to be forgotten: forget01, 05 or 10."})
    held_out_rows: int | None = field(default=None, metadata={"help": HELD_OUT_HELP})
    max_new_tokens: int = field(default=200, metadata={"help": "Longest generation, in tokens."})
    generate: bool = field(default=True, metadata={"help": "Whether the model answers questions itself, for ROUGE."})
    non_members: str | None = field(
        default=None,
        metadata={"help": "Configuration of rows that no model has seen, for membership inference: holdout10, ..."},
    )
    gradient_norms: bool = field(
        default=False, metadata={"help": "Whether membership inference also uses norms of gradients, row by row."}
    )
    embedding_model: str | None = field(
        default=None,
        metadata={"help": "Sentence embeddings for SOUL's accuracy: sentence-transformers/paraphrase-MiniLM-L6-v2."},
    )


def load_splits(
    dataset: str,
    forget_split: str = "forget10",
    limit: int | None = None,
    held_out_rows: int | None = None,
    revision: str | None = None,
) -> "dict[str, Dataset]":
    """
    Loads the rows of the suite.

    Args:
        dataset (`str`): Hub id (`locuslab/TOFU`) or folder in the hub's layout.
        forget_split (`str`, *optional*, defaults to `"forget10"`): The rows are those of `<forget_split>_perturbed`.
        limit (`int`, *optional*): Takes the first rows of each split only.
        held_out_rows (`int`, *optional*):
            Where the dataset has no `held_out_perturbed`, as TOFU has none, so many rows at the end of
            `retain_perturbed` become `held_out`: those that `recipes/tofu.py` keeps from unlearning. By default
            [`HELD_OUT_ROWS`], if [`LEAST_RETAIN_ROWS`] remain, and else none.
        revision (`str`, *optional*): Of a dataset on the hub.

    Returns:
        `dict[str, Dataset]`: By name of `SPLITS`; without `held_out` where the dataset has no `held_out_perturbed`.

    Raises:
        ValueError: If the dataset lacks a configuration or a split lacks a column.
    """
    from datasets import get_dataset_config_names
    from transformers.utils import logging

    from soul_trainer.sources import load_split

    logger = logging.get_logger(__name__)
    if held_out_rows is not None and held_out_rows < 0:
        raise ValueError(f"`held_out_rows` must be at least 0, but it is {held_out_rows}.")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, but it is {limit}.")
    known = get_dataset_config_names(dataset, revision=revision)
    configs = {split: f"{forget_split if split == 'forget' else split}_perturbed" for split in SPLITS}
    splits = {}
    for split, config in configs.items():
        if config not in known:
            if split == "held_out":
                continue
            raise ValueError(
                f"`dataset`={dataset!r} has no configuration {config!r} for the split {split!r}; it has "
                f"{', '.join(known)}. Name the rows to forget with `forget_split`."
            )
        splits[split] = load_split(dataset, config, revision=revision)
    retain = splits["retain"]
    if held_out_rows is None and "held_out" not in splits and len(retain) >= HELD_OUT_ROWS + LEAST_RETAIN_ROWS:
        held_out_rows = HELD_OUT_ROWS
        logger.warning_once(
            f"The last {HELD_OUT_ROWS} rows of retain_perturbed are asked as held out, which unlearning must not have "
            "seen: recipes/tofu.py keeps them from it. If it did see them, add --held_out_rows 0."
        )
    if held_out_rows and "held_out" not in splits:
        if held_out_rows >= len(retain):
            raise ValueError(f"`held_out_rows` must be less than {len(retain)}, all rows, but it is {held_out_rows}.")
        splits["held_out"] = retain.select(range(len(retain) - held_out_rows, len(retain)))
        splits["retain"] = retain.select(range(len(retain) - held_out_rows))
    return {split: rows.select(range(min(limit or len(rows), len(rows)))) for split, rows in splits.items()}


def evaluate_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    splits: "dict[str, Dataset]",
    batch_size: int | str = "auto",
    prompt_template: str | None = None,
    max_new_tokens: int = 200,
    generate: bool = True,
    progress: bool = True,
    engine: "Engine | None" = None,
) -> list[dict]:
    """
    Makes one row an example: all losses of all splits in one pass, then all generations in one.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, on the device where it is to run.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        splits (`dict[str, Dataset]`): From [`load_splits`].
        batch_size (`int` or `str`, *optional*, defaults to `"auto"`): Tokens in a batch, padding included.
        prompt_template (`str`, *optional*): As in training; see `soul_trainer.formats.render`.
        max_new_tokens (`int`, *optional*, defaults to 200): Where a generation is cut off.
        generate (`bool`, *optional*, defaults to `True`): Without, rows have no `generation` and no ROUGE.
        progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.
        engine ([`~soul_trainer.engines.Engine`], *optional*): Shares the rows out over its processes.

    Returns:
        `list[dict]`: Rows with `split`, `index`, `question`, `answer`; with `answer_nll`, `paraphrased_nll` and
        `perturbed_nll`, means per token in nats; and if `generate`, `generation` and its ROUGE scores.
    """
    from ..evaluation import ask

    arguments = TofuArguments(max_new_tokens=max_new_tokens, generate=generate)
    parts_of = partial(parts, arguments=arguments)
    return ask(
        model, tokenizer, unscored_rows(splits), parts_of, batch_size, prompt_template, engine, progress=progress
    )


def unscored_rows(splits: "dict[str, Dataset]") -> list[dict]:
    """The rows of a suite before any model has seen them: `split`, `index`, the question and its answers."""
    rows = []
    for split, items in splits.items():
        kept = ["question", "answer", "perturbed_answer", *([] if split in OPTION_SPLITS else ["paraphrased_answer"])]
        if split == NON_MEMBERS:
            kept = ["question", "answer"]
        if missing := set(kept).difference(items.column_names):
            raise ValueError(f"The split {split!r} lacks the columns {sorted(missing)}; it has {items.column_names}.")
        kept += {"paraphrased_question"}.intersection(items.column_names)
        for index, item in enumerate(items.select_columns(kept)):
            if isinstance(item.get("perturbed_answer"), str):
                item["perturbed_answer"] = [item["perturbed_answer"]]
            rows.append({"split": split, "index": index, **item})
    return rows


def parts(row: dict, arguments: TofuArguments) -> list[Part]:
    """What is asked about a row: the likelihoods of its answers, and an answer of the model's own."""
    question = row["question"]

    def with_answers(*answers: str) -> list[dict]:
        return [{"question": question, "answer": answer} for answer in answers]

    if row["split"] == NON_MEMBERS:
        return membership_parts(with_answers(row["answer"])[0], arguments.gradient_norms)
    paraphrased = [row["paraphrased_answer"]] if "paraphrased_answer" in row else []

    def nlls(scores: list) -> dict:
        answer, *others = (score.nll for score in scores)
        return {
            "answer_nll": answer,
            "paraphrased_nll": others[0] if paraphrased else answer,
            "perturbed_nll": others[len(paraphrased) :],
            **({"answer_hits": [int(hit) for hit in scores[0].content.hits]} if row["split"] == "forget" else {}),
        }

    asked = [Part("losses", with_answers(row["answer"], *paraphrased, *row["perturbed_answer"]), nlls)]
    if arguments.generate:

        def overlap(text: str) -> dict:
            text = text.strip()
            fields = {"generation": text, **rouge_scores(row["answer"], text)}
            return fields | ({} if paraphrased else {"mentions_answer": row["answer"].lower() in text.lower()})

        asked.append(Part("generation", with_answers(row["answer"]), overlap, GENERATION, arguments.max_new_tokens))
    if arguments.embedding_model and "paraphrased_question" in row:
        paraphrase = [{"question": row["paraphrased_question"], "answer": row["answer"]}]

        def answer(text: str) -> dict:
            return {"paraphrased_generation": text.strip()}

        asked.append(Part("paraphrase", paraphrase, answer, GENERATION, arguments.max_new_tokens))
    if arguments.non_members and row["split"] == "forget":
        asked += membership_parts(with_answers(row["answer"])[0], arguments.gradient_norms)
    return asked


def summarise(rows: list[dict], reference_rows: list[dict] | None = None) -> dict[str, Figure]:
    """
    TOFU's figures, from rows alone.

    Args:
        rows (`list[dict]`): Of the model, as [`evaluate_model`] makes them or `read_rows` reads them.
        reference_rows (`list[dict]`, *optional*): Of the gold model, on the same forget rows.

    Returns:
        `dict[str, Figure]`: `model_utility`; `forget_quality` and `ks_statistic` if there are `reference_rows`; and
        for each split `<split>_probability`, `<split>_truth_ratio`, `<split>_truth_share` and ROUGE;
        `exact_memorization` and `extraction_strength` of the forget rows; and, if there are rows that no model has
        seen, membership inference: `mia_*`, and `privleak` against the gold model. A figure whose rows or columns are
        missing is left out.

    Raises:
        ValueError: If a number is missing or not finite, or `reference_rows` are not of the same forget rows.
    """
    check_rows(rows)
    split_rows = by_split(rows, (*SPLITS, NON_MEMBERS))
    values = {
        f"{split}_{name}": row_values
        for split in SPLITS
        for name, row_values in _row_values(split, split_rows[split]).items()
    }
    figures = {name: mean_figure(row_values, name.partition("_")[0]) for name, row_values in values.items()}
    for name, row_values in memorization_values(split_rows["forget"], "answer_hits").items():
        figures[name] = mean_figure(row_values, "forget")
    summary = _utility(values) | figures
    if reference_rows is not None and split_rows["forget"]:
        summary = _forget_quality(split_rows["forget"], reference_rows) | summary
    summary |= membership_figures(split_rows["forget"], split_rows[NON_MEMBERS], reference_rows)
    pairs = (
        tuple([row for row in each or [] if row["split"] == split] for split in ("forget", NON_MEMBERS))
        for each in (rows, reference_rows)
    )
    summary |= privacy_figures(*pairs)
    return summary | accuracy_figures(rows)


def match_reference(rows: list[dict], reference_rows: list[dict]) -> list[dict]:
    """The forget rows of a reference; a `ValueError` if their indices or questions are not those of `rows`."""
    check_rows(reference_rows)
    return match_rows(rows, reference_rows, ("forget",), "question")


def _row_values(split: str, rows: list[dict]) -> dict[str, np.ndarray]:
    """The values of a split's figures, one a row."""
    if split in OPTION_SPLITS:
        rows = [{"paraphrased_nll": row.get("answer_nll"), **_present(row)} for row in rows]
    answer, paraphrased, perturbed = (column(rows, f"{name}_nll") for name in ("answer", "paraphrased", "perturbed"))
    found = {}
    if answer and split not in OPTION_SPLITS:
        found["probability"] = answer_probabilities(answer)
    elif answer and perturbed:
        found["probability"] = normalised_answer_probabilities(answer, perturbed)
    if paraphrased and perturbed:
        log_ratios = log_truth_ratios(paraphrased, perturbed)
        found["truth_ratio"] = truth_ratio_scores(log_ratios, "forget" if split == "forget" else "retain")
        found["truth_share"] = truth_shares(log_ratios)
    overlaps = {name: column(rows, name) for name in ROUGE}
    return found | {name: np.asarray(scores) for name, scores in overlaps.items() if scores}


def _present(row: dict) -> dict:
    return {key: value for key, value in row.items() if value is not None}


def _utility(values: dict[str, np.ndarray]) -> dict[str, Figure]:
    nine = [f"{split}_{name}" for split in UTILITY_SPLITS for name in FIGURES]
    if not set(nine) <= values.keys():
        return {}
    num_rows = sum(len(values[f"{split}_probability"]) for split in UTILITY_SPLITS)
    utility = model_utility([values[name].mean() for name in nine])
    ends = []
    # The utility rises with each of the nine, so that its interval ends where theirs do, as `mean_figure` has them.
    for one_more, tail in zip(UNIT, (TAIL, 1 - TAIL)):
        # The rows of a split are weighed together, so that what hangs together in them stays together.
        draws = np.stack([resampled_means(values[name], name.partition("_")[0], one_more) for name in nine])
        ends.append(float(np.quantile([model_utility(draw) for draw in draws.T], tail)))
    return {"model_utility": Figure(utility, num_rows, min(ends[0], utility), max(ends[1], utility))}


def _forget_quality(forget_rows: list[dict], reference_rows: list[dict]) -> dict[str, Figure]:
    gold_rows = match_reference(forget_rows, reference_rows)
    ratios = []
    for rows in (forget_rows, gold_rows):
        paraphrased, perturbed = column(rows, "paraphrased_nll"), column(rows, "perturbed_nll")
        if not paraphrased or not perturbed:
            return {}
        ratios.append(truth_ratios(paraphrased, perturbed))
    p_value, statistic = forget_quality(*ratios)
    num_rows = len(forget_rows)
    bounds = distance_bounds(statistic, num_rows, len(gold_rows))
    # The p-value falls as the distance grows, so that bounds of one are bounds of the other.
    low, high = (p_value_of(bound, num_rows, len(gold_rows)) for bound in reversed(bounds))
    return {
        "forget_quality": Figure(p_value, num_rows, low, high),
        "ks_statistic": Figure(statistic, num_rows, *bounds),
    }


def _load(arguments: TofuArguments, tokenizer: "PreTrainedTokenizerBase") -> list[dict]:
    from soul_trainer.sources import load_split

    splits = load_splits(
        arguments.dataset,
        arguments.forget_split,
        held_out_rows=arguments.held_out_rows,
        revision=arguments.dataset_revision,
    )
    if arguments.non_members:
        splits[NON_MEMBERS] = load_split(arguments.dataset, arguments.non_members, revision=arguments.dataset_revision)
    return unscored_rows(splits)


def _judge(rows: list[dict], arguments: TofuArguments) -> None:
    if arguments.embedding_model:
        judge_embeddings(rows, arguments.embedding_model)


SUITE = Suite("tofu", TofuArguments, _load, parts, summarise, _judge, match_reference)
