"""Whether an unlearned model can be told from one that never saw what it was to forget."""

from collections.abc import Sequence

import numpy as np


try:
    from scipy import stats
except ImportError as error:
    raise ImportError("Forget quality needs scipy: pip install soul-trainer[eval]") from error


def forget_quality(truth_ratios: Sequence[float], gold_truth_ratios: Sequence[float]) -> tuple[float, float]:
    """
    Two-sample Kolmogorov-Smirnov test between the truth ratios of two models on the forget rows.

    Args:
        truth_ratios (`Sequence[float]`): Of the unlearned model, one a forget row.
        gold_truth_ratios (`Sequence[float]`): Of the gold model, trained without the forget rows.

    Returns:
        `tuple[float, float]`: The p-value in [0, 1], and the statistic in [0, 1], the largest distance between the two
        distribution functions.
    """
    test = stats.ks_2samp(np.asarray(truth_ratios, dtype=np.float64), np.asarray(gold_truth_ratios, dtype=np.float64))
    return float(test.pvalue), float(test.statistic)


def p_value_of(statistic: float, num_rows: int, num_gold_rows: int) -> float:
    """
    The p-value of a statistic by the distribution of many rows, which is a little off the exact one of few.

    Args:
        statistic (`float`): In [0, 1].
        num_rows (`int`): Rows of the unlearned model.
        num_gold_rows (`int`): Rows of the gold model.

    Returns:
        `float`: In [0, 1].
    """
    return float(stats.kstwo.sf(statistic, max(1, round(num_rows * num_gold_rows / (num_rows + num_gold_rows)))))
