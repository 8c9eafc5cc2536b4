"""
What a figure means for the runs at hand, in a sentence. Pure functions of runs; imports no torch.

Whether two models differ is told by a paired test where the same rows of both are at hand, and elsewhere by how their
95% intervals lie. That is no test, and the sentence says which of the two it stands on.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

from .columns import Column
from .metrics.answer_probability.formula import answer_probabilities, normalised_answer_probabilities
from .metrics.truth_ratio.formula import log_truth_ratios, truth_ratio_scores
from .runs import Run, row_counts, shown_columns
from .statistics import OPEN, Figure, paired_comparison


SIGNIFICANCE = 0.05
# More models than this are sorted by what holds for them.
NUM_NAMED = 3
# Smirnov's asymptotic critical distance at that level is this times sqrt(1 / m + 1 / n).
KS_CRITICAL = math.sqrt(-math.log(SIGNIFICANCE / 2) / 2)
# There the probability is normalised over options, so that it is not exp(-answer_nll).
OPTION_SPLITS = ("real_authors", "world_facts")
# A row's values make up the figure if their mean is it, up to rounding of a file.
SAME_FIGURE = 1e-6
NEVER_SAW = "a model that never saw them"


@dataclass(frozen=True)
class Meaning:
    """What holds for a model, how much, and what that stands on."""

    kind: str
    size: str = ""
    evidence: str = ""

    def __str__(self) -> str:
        return f"{self.kind}{self.size}{f' ({self.evidence})' if self.evidence else ''}"


def sentence(column: Column, runs: list[Run]) -> str:
    """
    What a figure means here.

    Args:
        column ([`~columns.Column`]): The figure.
        runs (`list[Run]`): As in `write_report`.

    Returns:
        `str`: A sentence with its full stop; empty where no unlearned model has the figure.
    """
    having = [run for run in runs if run.figure(column.key)]
    shown = [run for run in having if run.role == "unlearned"]
    if not shown:
        return ""
    target, gold = (next((run for run in having if run.role == role), None) for role in ("target", "gold"))
    if column.key == "forget_quality":
        return _forget_quality(column, shown)
    # Where models are compared, the intervals are left to the table.
    text_of = with_interval if len(shown) == 1 else value_text
    reference = gold if column.goal == "gold" and gold else target
    aside = ""
    if reference:
        text = text_of(column, reference.figure(column.key))
        aside = f"the gold model {text}" if reference is gold else f"from {text} before unlearning"
    meanings = [_meaning(column, run, reference) for run in shown]
    if len(shown) > NUM_NAMED:
        return _sorted_by_meaning(column, shown, meanings, aside)
    parts = []
    for run, meaning in zip(shown, meanings):
        said = text_of(column, run.figure(column.key))
        if not parts:  # what the figure is and what it is compared with are said once
            said = f"{column.phrase.format(said)}{f', {aside}' if aside else ''}"
        meaning = str(meaning or "")
        if parts:
            meaning = meaning.replace(f" than {NEVER_SAW}", "").replace(NEVER_SAW, "it")
        parts.append(f"{run.name} {said}" + (f": {meaning}" if meaning else ""))
    return "; ".join(parts) + "."


def table_note(runs: list[Run], intervals: str = "brackets hold 95% intervals") -> str:
    """
    What the arrows and intervals of a table mean, and how many rows it is made of.

    Args:
        runs (`list[Run]`): Those of the table.
        intervals (`str`, *optional*): How the intervals are written, to say so where there are any.
    """
    columns = shown_columns(runs)
    counts = []
    for name, (least, most) in row_counts(runs).items():
        counts.append(f"{least}{f' to {most}' if most != least else ''} of {name.replace('_', ' ')}")
    arrows = {column.arrow[:1] for column in columns}
    words = {"↑": "↑ higher is better", "↓": "↓ lower is better", "→": "→ nearer to the number is better"}
    parts = [text for arrow, text in words.items() if arrow in arrows]
    if any(interval_text(column, run.figure(column.key)) for column in columns for run in runs):
        parts.append(intervals)
    text = ", ".join(parts)
    return ". ".join(part for part in (text, f"Rows: {', '.join(counts)}" if counts else "") if part) + "."


def value_text(column: Column, figure: Figure | None) -> str:
    """A figure as text, without its interval."""
    return column.text(None if figure is None else figure.value)


def with_interval(column: Column, figure: Figure | None) -> str:
    """A figure as text, with its interval in brackets if it has one."""
    interval = interval_text(column, figure)
    return value_text(column, figure) + (f" {interval}" if interval else "")


def interval_text(column: Column, figure: Figure | None) -> str:
    """The interval of a figure, in brackets; empty where there is none."""
    if figure is None or figure.low is None or figure.high is None:
        return ""
    return f"[{column.text(figure.low)}, {column.text(figure.high)}]"


def _sorted_by_meaning(column: Column, shown: list[Run], meanings: list[Meaning | None], aside: str) -> str:
    groups: dict[str, list[str]] = {}
    for run, meaning in zip(shown, meanings):
        text = f"{run.name} ({column.text(run.value(column.key))})"
        groups.setdefault(meaning.kind if meaning else "", []).append(text)
    parts = [f"{kind}: {', '.join(names)}" if kind else ", ".join(names) for kind, names in groups.items()]
    parts = ([aside] if aside else []) + parts
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:] if aside else text


def _meaning(column: Column, run: Run, reference: Run | None) -> Meaning | None:
    figure = run.figure(column.key)
    if isinstance(column.goal, (int, float)):
        return _against_number(column, figure)
    if column.goal == "gold" and (reference is None or reference.role != "gold"):
        return Meaning("there is no gold model to say how much a model has that never saw them")
    if reference is None:
        return Meaning("there is no model before unlearning to compare with") if column.goal == "target" else None
    difference = figure.value - reference.value(column.key)
    strength, evidence = _strength(column.key, run, reference)
    size = f" by {column.text(abs(difference))}"
    if strength == "none":
        return Meaning(_same(column), evidence=evidence)
    if column.goal == "gold":
        kind, size = _against_gold(column, difference, strength == "perhaps"), ""
    else:
        kind = f"{'perhaps ' if strength == 'perhaps' else ''}{'up' if difference > 0 else 'down'}"
    return Meaning(kind, size, evidence)


def _same(column: Column) -> str:
    if column.goal != "gold":
        return "about the same"
    return f"no more than {NEVER_SAW}" if column.better == "lower" else f"no different from {NEVER_SAW}"


def _against_gold(column: Column, difference: float, is_doubtful: bool) -> str:
    perhaps = "perhaps " if is_doubtful else ""
    if column.better != "lower":
        return f"{perhaps}{'above' if difference > 0 else 'below'} {NEVER_SAW}"
    if difference > 0:
        return f"{perhaps}more than {NEVER_SAW}" + ("" if is_doubtful else ", so something of them is left")
    return f"{perhaps}less than {NEVER_SAW}" + ("" if is_doubtful else ", which is damage and no better forgetting")


def _against_number(column: Column, figure: Figure) -> Meaning:
    goal = f"{column.goal_words}, {column.goal:g}," if column.goal_words else f"{column.goal:g}"
    if figure.low is not None and figure.low <= column.goal <= figure.high:
        return Meaning(f"{goal} lies within the interval")
    goal = goal.rstrip(",")
    if figure.value == column.goal:
        return Meaning(f"as {goal}")
    side = "above" if figure.value > column.goal else "below"
    evidence = "the interval does not reach it" if figure.low is not None else "no interval to judge it by"
    return Meaning(f"{side} {goal}", evidence=evidence)


def _strength(key: str, run: Run, reference: Run) -> tuple[str, str]:
    """Whether two models' figures differ (`none`, `perhaps`, `clear`), and what says so."""
    figures = [each.figure(key) for each in (run, reference)]
    if run.value(key) == reference.value(key):
        return "none", "the same value"
    values = [row_values(key, each) for each in (run, reference)]
    if values[0] and values[0].keys() == values[1].keys() and len(values[0]) > 1:
        places = sorted(values[0])
        test = paired_comparison(*([each[place] for place in places] for each in values), key, OPEN)
        strength = "clear" if test.p_value <= SIGNIFICANCE else "none"
        p_text = "p < 0.001" if test.p_value < 0.001 else f"p = {test.p_value:.2g}"
        return strength, f"paired test, {p_text}"
    if any(figure.low is None or figure.high is None for figure in figures):
        return "clear", "no intervals to judge it by"
    (first, second) = figures
    if first.low > second.high or second.low > first.high:
        return "clear", "the intervals do not meet"
    if second.low <= first.value <= second.high and first.low <= second.value <= first.high:
        return "none", "within each other's intervals"
    return "perhaps", "the intervals overlap"


def row_values(key: str, run: Run) -> dict[int, float]:
    """
    The values that a figure is the mean of.

    Args:
        key (`str`): The figure.
        run ([`~runs.Run`]): The model.

    Returns:
        `dict[int, float]`: By index of the row; empty unless the run's rows hold them all.
    """
    for pattern, split, value_of, fields in _ROW_VALUES:
        found = re.fullmatch(pattern, key)
        rows = [row for row in run.rows if found and row["split"] == found.expand(split)]
        if not rows or any(row.get(field) is None for row in rows for field in fields):
            continue
        values = value_of(rows[0]["split"], *([row[field] for row in rows] for field in fields))
        # A suite may mean something else by the name.
        if run.figure(key) and abs(float(np.mean(values)) - run.value(key)) <= SAME_FIGURE:
            return {row["index"]: float(value) for row, value in zip(rows, values)}
    return {}


def _probabilities(split: str, nlls: list[float], perturbed: list[list[float]]) -> np.ndarray:
    return normalised_answer_probabilities(nlls, perturbed) if split in OPTION_SPLITS else answer_probabilities(nlls)


def _truth_ratios(split: str, nlls: list[float], perturbed: list[list[float]]) -> np.ndarray:
    return truth_ratio_scores(log_truth_ratios(nlls, perturbed), "forget" if split == "forget" else "retain")


def _as_they_are(split: str, values: list[float]) -> list[float]:
    return values


# Figures, the split of their rows, and what a row's fields make of it.
_ROW_VALUES = (
    (r"(.+)_probability", r"\1", _probabilities, ("answer_nll", "perturbed_nll")),
    (r"(.+)_probability", r"\1", lambda _, nlls: answer_probabilities(nlls), ("answer_nll",)),
    (r"retain_continuation_nll_(\d+)", r"retain_\1", _as_they_are, ("answer_nll",)),
    (r"(.+)_nll", r"\1", _as_they_are, ("answer_nll",)),
    (r"(.+)_verbatim_overlap", r"\1", _as_they_are, ("verbatim_overlap",)),
    (r"(.+)_truth_ratio", r"\1", _truth_ratios, ("paraphrased_nll", "perturbed_nll")),
    (r"(.+)_rougeL_recall", r"\1", _as_they_are, ("rougeL_recall",)),
    (r"(.+)_rougeL", r"\1", _as_they_are, ("rougeL_f1",)),
    (r"(.+)_embedding_accuracy", r"\1", _as_they_are, ("embedding_hit",)),
    (r"(.+)_mention_accuracy", r"\1", _as_they_are, ("mentions_answer",)),
    (r"(.+)_accuracy", r"\1", _as_they_are, ("is_correct",)),
    (r"leak_rougeL_(\d+)", r"forget_\1", _as_they_are, ("rougeL_recall",)),
    (r"retain_leak_rougeL_(\d+)", r"retain_\1", _as_they_are, ("rougeL_recall",)),
    (r"leak_bleu_(\d+)", r"forget_\1", _as_they_are, ("bleu",)),
    (r"toxicity_mean", "prompts", _as_they_are, ("toxicity",)),
    (r"toxicity_rate", "prompts", _as_they_are, ("is_toxic",)),
    (r"fluency", "prompts", _as_they_are, ("fluency",)),
)


def _forget_quality(column: Column, shown: list[Run]) -> str:
    can, cannot = [], []
    for run in shown:
        (can if run.value(column.key) > SIGNIFICANCE else cannot).append(run)
    parts = []
    for group, words in ((can, "could be the gold model's"), (cannot, "are not the gold model's")):
        if group:
            names = ", ".join(f"{run.name}'s" for run in group)
            p_values = ", ".join(_p_text(run.value(column.key)) for run in group)
            parts.append(f"{names} truth ratios {words}: p = {p_values}")
    text = "; ".join(parts)
    num_rows = min(run.figure(column.key).num_rows for run in shown)
    if can and num_rows:
        distance = KS_CRITICAL * math.sqrt(2 / num_rows)
        text += f" (of {num_rows} rows each, any distance under about {distance:.2f} would pass)"
    return text[0].upper() + text[1:] + "."


def _p_text(value: float) -> str:
    return f"{value:.1e}" if 0 < value < 0.001 else f"{value:.2g}" if value else "0"
