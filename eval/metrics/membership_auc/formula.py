"""How well scores tell members, which a model was trained on, from non-members, with intervals."""

import math
from collections.abc import Sequence

import numpy as np

from soul_eval.extras import require
from soul_eval.statistics import NUM_RESAMPLES, TAIL, Figure, interval_figure, random_generator, share_bounds


# Resamples that are in memory at a time: 200 of 5,000 rows are 8 MB.
RESAMPLES_AT_ONCE = 200
# Of what an interval of a true positive rate may miss, what goes to where the threshold lies: it is the larger doubt.
THRESHOLD_PART = 0.8


def auc_value(member_scores: Sequence[float], non_member_scores: Sequence[float]) -> float:
    """
    Probability that a random member scores above a random non-member, a tie counting half: the area under the ROC
    curve, from ranks (the Mann-Whitney statistic).

    Args:
        member_scores (`Sequence[float]`): Higher means more likely a member.
        non_member_scores (`Sequence[float]`): The same of rows that the model never saw.

    Returns:
        `float`: In [0, 1]; 0.5 where nothing tells them apart.

    Raises:
        ValueError: If either has no row, or a score is NaN.
    """
    members, non_members = _scores(member_scores, non_member_scores)
    below, up_to = _places(members, non_members)
    return float((below + up_to).mean() / (2 * len(non_members)))


def auc(member_scores: Sequence[float], non_member_scores: Sequence[float], sample: str = "") -> Figure:
    """
    [`auc_value`] with its bootstrap interval.

    Args:
        member_scores (`Sequence[float]`): As in [`auc_value`].
        non_member_scores (`Sequence[float]`): As in [`auc_value`].
        sample (`str`, *optional*): Name of the rows; AUCs of the same rows are resampled together.

    Returns:
        [`~statistics.Figure`]:
            Over all rows. Its interval resamples members and non-members separately; it is missing where either is a
            single row. Where every pair is ordered alike every resample is too: the interval is then the exact one of
            as many independent pairs as there are (Clopper and Pearson, 1934).

    Raises:
        ValueError: As in [`auc_value`].
    """
    value = auc_value(member_scores, non_member_scores)
    num_rows = len(member_scores) + len(non_member_scores)
    num_pairs = min(len(member_scores), len(non_member_scores))
    if num_pairs < 2:
        return Figure(value, num_rows)
    if value in (0.0, 1.0):
        return Figure(value, num_rows, *share_bounds(round(value) * num_pairs, num_pairs))
    return interval_figure(value, num_rows, resampled_auc(member_scores, non_member_scores, sample), num_pairs)


def resampled_auc(member_scores: Sequence[float], non_member_scores: Sequence[float], sample: str = "") -> np.ndarray:
    """
    [`auc_value`] of each resample. Arguments are those of [`auc`].

    Returns:
        `np.ndarray` of shape `(resamples,)`: In [0, 1].
    """
    members, non_members = _scores(member_scores, non_member_scores)
    below, up_to = _places(members, non_members)
    order = np.argsort(non_member_scores, kind="stable")
    member_draws = random_generator(f"{sample}/members")
    non_member_draws = random_generator(f"{sample}/non-members")
    areas = []
    for start in range(0, NUM_RESAMPLES, RESAMPLES_AT_ONCE):
        size = min(RESAMPLES_AT_ONCE, NUM_RESAMPLES - start)
        member_counts = _row_counts(member_draws, len(members), size)
        # How many of the resample are among the lowest i non-members. Rows are drawn, not ranks, so that models of the
        # same rows are resampled together.
        drawn = np.zeros((size, len(non_members) + 1), dtype=np.int64)
        np.cumsum(_row_counts(non_member_draws, len(non_members), size)[:, order], axis=1, out=drawn[:, 1:])
        areas.append((member_counts * (drawn[:, below] + drawn[:, up_to])).sum(1))
    return np.concatenate(areas) / (2 * len(members) * len(non_members))


def true_positive_rate(
    member_scores: Sequence[float],
    non_member_scores: Sequence[float],
    false_positive_rate: float,
    sample: str = "",
) -> Figure:
    """
    Share of the members that an attacker finds who may be wrong about few non-members (Carlini et al., 2022): of all
    thresholds with at most this false positive rate, the highest true positive rate.

    With n non-members, rates below 1 / n cannot be measured: the value is then the share of members above every
    non-member, that at a rate of 0. The interval knows: it reaches down to 0 as long as the non-members do not show
    where the threshold lies.

    Args:
        member_scores (`Sequence[float]`): As in [`auc_value`].
        non_member_scores (`Sequence[float]`): As in [`auc_value`].
        false_positive_rate (`float`): In [0, 1], such as 0.01 or 0.001.
        sample (`str`, *optional*): Not used, since nothing is drawn; here so that all figures are called alike.

    Returns:
        [`~statistics.Figure`]:
            In [0, 1]. A bootstrap cannot say how far the highest non-members reach. The interval is exact instead,
            whatever the distributions: from where the threshold may lie (order statistics of the non-members) and
            what share of members may be above it (Clopper and Pearson, 1934).

    Raises:
        ValueError: If the rate is out of its range, or as in [`auc_value`].
    """
    if not 0 <= false_positive_rate <= 1:
        raise ValueError(f"`false_positive_rate` must be in [0, 1], but it is {false_positive_rate}.")
    members, non_members = _scores(member_scores, non_member_scores)
    binomial = require("scipy.stats").binom(len(non_members), false_positive_rate)
    # Non-members above the true threshold: hardly ever `few` or fewer, hardly ever more than `many`.
    few = binomial.ppf(THRESHOLD_PART * TAIL)
    few -= binomial.cdf(few) > THRESHOLD_PART * TAIL
    many = binomial.ppf(1 - THRESHOLD_PART * TAIL)
    # 0.07 * 100 is 7.000000000000001 in floating point, and 0.29 * 100 is 28.999999999999996.
    allowed = math.floor(false_positive_rate * len(non_members) + 1e-9)
    found, fewest, most = (_num_found(members, non_members, int(above) + 1) for above in (allowed, few, many))
    return Figure(
        found / len(members),
        len(members) + len(non_members),
        share_bounds(fewest, len(members), (1 - THRESHOLD_PART) * TAIL)[0],
        share_bounds(most, len(members), (1 - THRESHOLD_PART) * TAIL)[1],
    )


def _num_found(members: np.ndarray, non_members: np.ndarray, k: int) -> int:
    """Members that score above the k-th highest non-member."""
    if k < 1:
        return 0
    return len(members) if k > len(non_members) else int((members > non_members[-k]).sum())


def _places(members: np.ndarray, non_members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each member, how many of the sorted non-members lie below it, and how many not above."""
    return np.searchsorted(non_members, members, "left"), np.searchsorted(non_members, members, "right")


def _row_counts(generator: np.random.Generator, num_rows: int, num_resamples: int) -> np.ndarray:
    """How often each resample draws each row, shape `(resamples, rows)`."""
    return generator.multinomial(num_rows, np.full(num_rows, 1 / num_rows), num_resamples)


def _scores(member_scores: Sequence[float], non_member_scores: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays, the non-members sorted."""
    scores = {"member_scores": member_scores, "non_member_scores": non_member_scores}
    for name, values in scores.items():
        values = scores[name] = np.asarray(values, dtype=np.float64)
        if values.ndim != 1 or not values.size:
            raise ValueError(f"`{name}` must be one number a row, at least one, but its shape is {values.shape}.")
        if np.isnan(values).any():
            raise ValueError(f"Row {int(np.isnan(values).argmax())} of `{name}` is NaN: a score must be a number.")
    return scores["member_scores"], np.sort(scores["non_member_scores"])
