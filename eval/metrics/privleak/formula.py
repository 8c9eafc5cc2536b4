"""Whether an attack tells what an unlearned model was to forget, measured against a model that never saw it."""

from collections.abc import Sequence

import numpy as np

from soul_eval.metrics.membership_auc.formula import auc, auc_value, resampled_auc
from soul_eval.statistics import Figure, interval_figure


# AUC of a gold model that nobody has trained: it cannot tell rows apart that it has equally never seen.
CHANCE = 0.5


def privleak(
    member_scores: Sequence[float],
    non_member_scores: Sequence[float],
    gold_member_scores: Sequence[float] | None = None,
    gold_non_member_scores: Sequence[float] | None = None,
    sample: str = "",
) -> Figure:
    """
    PrivLeak of MUSE (Shi et al., 2024): by how many percent the unlearned model's AUC differs from the gold model's.

    `(auc - gold_auc) / gold_auc * 100`, where MUSE's code takes as AUC the probability that a *non-member* looks more
    like a member than a member does. With the usual AUC of [`auc`] that is
    `(gold_auc - auc) / (1 - gold_auc) * 100`. So it is negative where the model still knows (-100: every member is
    told), and positive where members look less seen than what was never seen.

    Args:
        member_scores (`Sequence[float]`):
            Of the unlearned model on the forget rows, higher where a row is more likely a member. MUSE takes
            [`min_k_score`] with `k=0.4`.
        non_member_scores (`Sequence[float]`): The same on held-out rows.
        gold_member_scores (`Sequence[float]`, *optional*):
            Of the gold model, trained without the forget rows, on the same forget rows. Without, its AUC is taken to
            be 0.5.
        gold_non_member_scores (`Sequence[float]`, *optional*): The same on the same held-out rows.
        sample (`str`, *optional*): Name of the rows; figures of the same rows are resampled together.

    Returns:
        [`~statistics.Figure`]:
            In percent, -100 or more; 0 is the goal. Its interval resamples the rows, and each row for both models.

    Raises:
        ValueError: If the gold model's scores are of other numbers of rows, if it tells every member itself, or as in
            [`auc`].
    """
    own = auc(member_scores, non_member_scores, sample)
    if gold_member_scores is None and gold_non_member_scores is None:
        if own.low is None:
            return Figure(_leak(own.value, CHANCE), own.num_rows)
        return Figure(_leak(own.value, CHANCE), own.num_rows, _leak(own.high, CHANCE), _leak(own.low, CHANCE))
    both = (member_scores, non_member_scores, gold_member_scores, gold_non_member_scores)
    counts = [0 if scores is None else len(scores) for scores in both]
    if counts[:2] != counts[2:]:
        raise ValueError(
            f"The gold model's scores must be of the same rows, but the unlearned model has {counts[0]} members and "
            f"{counts[1]} non-members, and the gold model {counts[2]} and {counts[3]}."
        )
    gold_area = auc_value(gold_member_scores, gold_non_member_scores)
    if gold_area == 1:
        raise ValueError(
            "The gold model scores every member above every non-member, so that PrivLeak is not defined: it must not "
            "have seen the forget rows, and the held-out rows must be like them."
        )
    value = _leak(own.value, gold_area)
    golds = resampled_auc(gold_member_scores, gold_non_member_scores, sample)
    if own.low is None or (golds == 1).any():
        return Figure(value, own.num_rows)
    areas = resampled_auc(member_scores, non_member_scores, sample)
    figure = interval_figure(value, own.num_rows, _leak(areas, golds), min(counts[:2]))
    if own.value in (0.0, 1.0):
        # The unlearned model's part does not vary between resamples, and its own interval says more.
        ends = [_leak(end, gold_area) for end in (own.low, own.high)]
        ends += [end for end in (figure.low, figure.high) if end is not None]
        return Figure(value, own.num_rows, min(ends), max(ends))
    return figure


def _leak(area: float | np.ndarray, gold_area: float | np.ndarray) -> float | np.ndarray:
    return 100 * ((1 - area) / (1 - gold_area) - 1)
