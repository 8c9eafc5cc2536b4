"""
TOFU (Maini et al., 2024): which rows, and which figures are made of them.

Figures are those of TOFU's own `aggregate_eval_stat.py`, and the same three of `held_out`: authors that the model has
learnt and unlearning never saw. Libraries that only a model needs are imported where one is used.
"""

from typing import TYPE_CHECKING

from ..extras import require
from ..metrics.answer_probability.formula import answer_probability, normalised_answer_probability
from ..metrics.forget_quality.formula import forget_quality
from ..metrics.model_utility.formula import model_utility
from ..metrics.truth_ratio.formula import log_truth_ratios, truth_ratio_score, truth_ratios
from ..rows import check_rows


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


SPLITS = ("forget", "retain", "held_out", "real_authors", "world_facts")
# Their answers are names, which have no paraphrase; what matters is which of the options the model prefers.
OPTION_SPLITS = ("real_authors", "world_facts")
UTILITY_SPLITS = ("retain", "real_authors", "world_facts")
FIGURES = ("probability", "rougeL_recall", "truth_ratio")


def load_splits(
    dataset: str, forget_split: str = "forget10", limit: int | None = None, held_out_rows: int = 0
) -> "dict[str, Dataset]":
    """
    Loads the rows of the suite.

    Args:
        dataset (`str`): Hub id (`locuslab/TOFU`) or folder in the hub's layout.
        forget_split (`str`, *optional*, defaults to `"forget10"`): The rows are those of `<forget_split>_perturbed`.
        limit (`int`, *optional*): Takes the first rows of each split only.
        held_out_rows (`int`, *optional*, defaults to 0):
            Where the dataset has no `held_out_perturbed`, as TOFU has none, so many rows at the end of
            `retain_perturbed` become `held_out`. TOFU's own evaluation asks the first 300 of those 400 rows.

    Returns:
        `dict[str, Dataset]`: By name of `SPLITS`; without `held_out` where the dataset has no `held_out_perturbed`.

    Raises:
        ValueError: If the dataset lacks a configuration or a split lacks a column.
    """
    from datasets import get_dataset_config_names, load_dataset

    if held_out_rows < 0:
        raise ValueError(f"`held_out_rows` must be at least 0, but it is {held_out_rows}.")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, but it is {limit}.")
    known = get_dataset_config_names(dataset)
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
        splits[split] = load_dataset(dataset, config)["train"]
    if held_out_rows and "held_out" not in splits:
        retain = splits["retain"]
        if held_out_rows >= len(retain):
            raise ValueError(f"`held_out_rows` must be less than {len(retain)}, all rows, but it is {held_out_rows}.")
        splits["held_out"] = retain.select(range(len(retain) - held_out_rows, len(retain)))
        splits["retain"] = retain.select(range(len(retain) - held_out_rows))
    return {split: rows.select(range(min(limit or len(rows), len(rows)))) for split, rows in splits.items()}


def evaluate_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    splits: "dict[str, Dataset]",
    batch_size: int = 32,
    prompt_template: str | None = None,
    max_new_tokens: int = 200,
    generate: bool = True,
    progress: bool = True,
) -> list[dict]:
    """
    Makes one row an example: all losses of all splits in one pass, then all generations in one.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, on the device where it is to run.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        splits (`dict[str, Dataset]`): From [`load_splits`].
        batch_size (`int`, *optional*, defaults to 32): Answers in a forward; generations are twice as many.
        prompt_template (`str`, *optional*): As in training; see `soul_trainer.formats.render`.
        max_new_tokens (`int`, *optional*, defaults to 200): Where a generation is cut off.
        generate (`bool`, *optional*, defaults to `True`): Without, rows have no `generation` and no ROUGE.
        progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Returns:
        `list[dict]`: Rows with `split`, `index`, `question`, `answer`; with `answer_nll`, `paraphrased_nll` and
        `perturbed_nll`, means per token in nats; and if `generate`, `generation`, `rouge1_recall` and `rougeL_recall`.
    """
    from ..scoring import answer_losses, greedy_answers

    rows = unscored_rows(splits)
    answers = [_answers(split, item) for split, items in splits.items() for item in items]
    examples = _examples(rows, answers, tokenizer, prompt_template)
    losses = iter(
        answer_losses(
            model,
            tokenizer,
            [example for row_examples in examples for example in row_examples],
            batch_size,
            progress=progress,
        )
    )
    for row, row_answers in zip(rows, answers):
        row["answer_nll"] = next(losses)
        row["paraphrased_nll"] = row["answer_nll"] if row["split"] in OPTION_SPLITS else next(losses)
        num_perturbed = len(row_answers) - (1 if row["split"] in OPTION_SPLITS else 2)
        row["perturbed_nll"] = [next(losses) for _ in range(num_perturbed)]
    if generate:
        prompts = [row_examples[0] for row_examples in examples]
        texts = greedy_answers(model, tokenizer, prompts, 2 * batch_size, max_new_tokens, progress=progress)
        add_generations(rows, texts)
    return rows


def unscored_rows(splits: "dict[str, Dataset]") -> list[dict]:
    """The rows of a suite before any model has seen them: `split`, `index`, `question`, `answer`."""
    for split, items in splits.items():
        needed = {
            "question",
            "answer",
            "perturbed_answer",
            *([] if split in OPTION_SPLITS else ["paraphrased_answer"]),
        }
        if missing := needed.difference(items.column_names):
            raise ValueError(f"The split {split!r} lacks the columns {sorted(missing)}; it has {items.column_names}.")
    return [
        {"split": split, "index": index, "question": item["question"], "answer": item["answer"]}
        for split, items in splits.items()
        for index, item in enumerate(items)
    ]


def add_generations(rows: list[dict], generations: list[str]) -> None:
    """Adds `generation` and, as TOFU measures it against `answer`, `rouge1_recall` and `rougeL_recall` to rows."""
    scorer = require("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    for row, generation in zip(rows, generations):
        scores = scorer.score(row["answer"], generation)
        row["generation"] = generation
        row["rouge1_recall"] = scores["rouge1"].recall
        row["rougeL_recall"] = scores["rougeL"].recall


def summarise(rows: list[dict], reference_rows: list[dict] | None = None) -> dict[str, float]:
    """
    TOFU's figures, from rows alone.

    Args:
        rows (`list[dict]`): Of the model, as [`evaluate_model`] makes them or `read_rows` reads them.
        reference_rows (`list[dict]`, *optional*): Of the gold model, on the same forget rows.

    Returns:
        `dict[str, float]`: `model_utility`; `forget_quality` and `ks_statistic` if there are `reference_rows`; for
        each split `<split>_probability`, `<split>_rougeL_recall`, `<split>_truth_ratio` and `<split>_rows`, their
        number. A figure whose rows or columns are missing is left out.

    Raises:
        ValueError: If a number is missing or not finite, or `reference_rows` are not of the same forget rows.
    """
    check_rows(rows)
    by_split: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for row in rows:
        if row["split"] not in by_split:
            raise ValueError(f"`split` must be one of {SPLITS}, but row {row['index']} has {row['split']!r}.")
        by_split[row["split"]].append(row)
    figures = {}
    for split, split_rows in by_split.items():
        if split_rows:
            found = _split_figures(split, split_rows)
            figures |= {f"{split}_{name}": value for name, value in found.items()}
    utility = [figures.get(f"{split}_{name}") for split in UTILITY_SPLITS for name in FIGURES]
    summary = {} if None in utility else {"model_utility": model_utility(utility)}
    if reference_rows is not None and by_split["forget"]:
        summary |= _forget_quality(by_split["forget"], reference_rows)
    return summary | figures


def match_reference(rows: list[dict], reference_rows: list[dict]) -> list[dict]:
    """
    The forget rows of a reference, which must be those of `rows`.

    Raises:
        ValueError: If their indices or their questions differ.
    """
    check_rows(reference_rows)
    own = {row["index"]: row for row in rows if row["split"] == "forget"}
    reference = {row["index"]: row for row in reference_rows if row["split"] == "forget"}
    advice = "Evaluate both models on the same dataset, forget split and limit."
    if own.keys() != reference.keys():
        num_common = len(own.keys() & reference)
        raise ValueError(
            f"`reference` has {len(reference)} forget rows and the model {len(own)}, {num_common} of them the same. "
            f"{advice}"
        )
    for index, row in own.items():
        questions = {each["question"] for each in (row, reference[index]) if each.get("question") is not None}
        if len(questions) > 1:
            raise ValueError(f"`reference` has another question in forget row {index}: {sorted(questions)}. {advice}")
    return list(reference.values())


def _answers(split: str, item: dict) -> list[str]:
    paraphrased = [] if split in OPTION_SPLITS else [item["paraphrased_answer"]]
    perturbed = item["perturbed_answer"]
    return [item["answer"], *paraphrased, *([perturbed] if isinstance(perturbed, str) else perturbed)]


def _examples(
    rows: list[dict], answers: list[list[str]], tokenizer: "PreTrainedTokenizerBase", prompt_template: str | None
) -> list[list]:
    from soul_trainer.formats import render

    examples = []
    for row, row_answers in zip(rows, answers):
        try:
            examples.append(
                [
                    render({"question": row["question"], "answer": answer}, tokenizer, prompt_template)
                    for answer in row_answers
                ]
            )
        except ValueError as error:
            raise ValueError(f"Row {row['index']} of `{row['split']}`: {error}") from error
    return examples


def _split_figures(split: str, rows: list[dict]) -> dict[str, float]:
    if split in OPTION_SPLITS:
        rows = [{**row, "paraphrased_nll": _first(row.get("paraphrased_nll"), row.get("answer_nll"))} for row in rows]
    answer, paraphrased, perturbed, rouge = (
        _column(rows, key) for key in ("answer_nll", "paraphrased_nll", "perturbed_nll", "rougeL_recall")
    )
    figures = {}
    if answer and split not in OPTION_SPLITS:
        figures["probability"] = answer_probability(answer)
    elif answer and perturbed:
        figures["probability"] = normalised_answer_probability(answer, perturbed)
    if rouge:
        figures["rougeL_recall"] = float(sum(rouge) / len(rouge))
    if paraphrased and perturbed:
        side = "forget" if split == "forget" else "retain"
        figures["truth_ratio"] = truth_ratio_score(log_truth_ratios(paraphrased, perturbed), side)
    return {**figures, "rows": len(rows)}


def _forget_quality(forget_rows: list[dict], reference_rows: list[dict]) -> dict[str, float]:
    gold_rows = match_reference(forget_rows, reference_rows)
    ratios = []
    for rows in (forget_rows, gold_rows):
        paraphrased, perturbed = _column(rows, "paraphrased_nll"), _column(rows, "perturbed_nll")
        if not paraphrased or not perturbed:
            return {}
        ratios.append(truth_ratios(paraphrased, perturbed))
    p_value, statistic = forget_quality(*ratios)
    return {"forget_quality": p_value, "ks_statistic": statistic}


def _column(rows: list[dict], key: str) -> list | None:
    """A key's values, or `None` if no row has it."""
    values = [row.get(key) for row in rows]
    missing = [row for row, value in zip(rows, values) if value is None]
    if len(missing) == len(rows):
        return None
    if missing:
        raise ValueError(f"Row {missing[0]['index']} of `{missing[0]['split']}` lacks `{key}`, which other rows have.")
    return values


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)
