"""
Figures with their uncertainty: every aggregate says of how many rows it is made and within which bounds it lies.

Intervals hold 95%, stay within the range of the figure, and are wide where rows are few or all alike. Those of means
are made here alone: see [`mean_figure`]. What is drawn at random depends on nothing but a name and the number of rows,
so that the same rows give the same interval everywhere. Imports no torch.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from .extras import require


CONFIDENCE = 0.95
TAIL = (1 - CONFIDENCE) / 2
NUM_RESAMPLES = 2000
NUM_PERMUTATIONS = 9999
# Least and largest value of a row: of a share, of a loss, and of what has neither.
UNIT, LOSS, OPEN = (0.0, 1.0), (0.0, None), (None, None)
# Classifiers in float32 and BLEU exceed the ends of their scale by a few roundings.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Figure:
    """
    An aggregate over rows.

    Attributes:
        value (`float`): The aggregate.
        num_rows (`int`): Rows that it is made of.
        low (`float`, *optional*): Lower end of its interval; `None` where the rows, or no theory, give none.
        high (`float`, *optional*): Upper end.
    """

    value: float
    num_rows: int
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict:
        """A dictionary of the attributes that there are."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, entry: "dict | float") -> "Figure":
        """What [`Figure.to_json`] gave, or a bare number."""
        return cls(**entry) if isinstance(entry, Mapping) else cls(float(entry), 0)


@dataclass(frozen=True)
class PairedComparison:
    """
    How two models differ on the same rows.

    Attributes:
        difference (`float`): Mean of the second's values less the first's.
        low (`float`, *optional*): Lower end of the difference's interval, which [`mean_figure`] describes.
        high (`float`, *optional*): Upper end.
        p_value (`float`): Of a test that turns the signs of the rows' differences over at random.
        num_rows (`int`): Pairs of rows.
    """

    difference: float
    low: float | None
    high: float | None
    p_value: float
    num_rows: int


def values(figures: Mapping[str, Figure]) -> dict[str, float]:
    """The values alone, by name."""
    return {name: figure.value for name, figure in figures.items()}


def mean_figure(
    row_values: Sequence[float], sample: str = "", bounds: tuple[float | None, float | None] = UNIT
) -> Figure:
    """
    The mean of a value a row, with an interval.

    Where the range of the values is known, the interval is Gaffke's (2005; as Learned-Miller and Thomas, 2019, arXiv
    1905.06208, have it). Its upper end is the 97.5% point of the means under random weights, uniform on the simplex,
    of the rows and of one row more that has the upper end of the range; its lower end likewise with the lower end of
    the range. Rows that lie at the two ends make it the exact interval of a share (Clopper and Pearson, 1934), so that
    `n` rows of 1 have a lower end of `0.025 ** (1 / n)`. For other rows its coverage is a conjecture to which no
    exception is known. It never leaves the range, and it never vanishes: rows that are all alike do not say that the
    next one is.

    Where an end of the range is open, no interval holds for every distribution (Bahadur and Savage, 1956): it is
    Student's, cut off at the other end, and there is none for rows that are all alike.

    Args:
        row_values (`Sequence[float]` of length `rows`): Finite.
        sample (`str`, *optional*): Name of the rows; figures of the same rows are given the same weights.
        bounds (`tuple[float | None, float | None]`, *optional*, defaults to `(0.0, 1.0)`):
            Least and largest value that a row can have; `None` where there is no such value.

    Raises:
        ValueError: If there is no row, or a value lies outside of `bounds`.
    """
    row_values = np.asarray(row_values, dtype=np.float64)
    if not row_values.size:
        raise ValueError("`row_values` has no row, and no rows have no mean.")
    least, largest = bounds
    ends = [row_values.min(), row_values.max()]
    if (least is not None and ends[0] < least - ROUNDING) or (largest is not None and ends[1] > largest + ROUNDING):
        raise ValueError(
            f"Rows have values from {ends[0]:g} to {ends[1]:g}, but `bounds` is {bounds}: give their range."
        )
    value, num_rows = float(row_values.mean()), len(row_values)
    if least is None or largest is None:
        return Figure(value, num_rows, *_within(student_bounds(row_values), bounds))
    unit = np.clip((row_values - least) / (largest - least), 0.0, 1.0)
    if np.isin(unit, UNIT).all():
        ends = share_bounds(int(unit.sum()), num_rows)
    else:
        ends = (np.quantile(resampled_means(unit, sample, 0.0), TAIL),)
        ends += (np.quantile(resampled_means(unit, sample, 1.0), 1 - TAIL),)
    low, high = (float(least + (largest - least) * end) for end in ends)
    # Quantiles of draws, and roundings of a row over the end of its range.
    return Figure(value, num_rows, min(low, value), max(high, value))


def share_bounds(count: float, total: float, missed: float = TAIL) -> tuple[float, float]:
    """
    The exact interval of a share (Clopper and Pearson, 1934).

    Args:
        count (`float`): Rows that have it, of `total`. With a number of rows that is not whole, as of rows that hang
            together, it is the interval of Korn and Graubard (1998).
        total (`float`): Rows, more than 0.
        missed (`float`, *optional*, defaults to 0.025): Largest probability to lie beyond each of the ends.
    """
    quantile = require("scipy.special").betaincinv
    low = float(quantile(count, total - count + 1, missed)) if count > 0 else 0.0
    return low, float(quantile(count + 1, total - count, 1 - missed)) if count < total else 1.0


def student_bounds(row_values: np.ndarray) -> tuple[float | None, float | None]:
    """Student's interval of the mean; `None` for both ends where fewer than two rows, or rows all alike, give none."""
    num_rows = len(row_values)
    deviation = float(np.std(row_values, ddof=1)) if num_rows > 1 else 0.0
    if not deviation:
        return None, None
    mean, margin = float(np.mean(row_values)), student_quantile(num_rows) * deviation / math.sqrt(num_rows)
    return mean - margin, mean + margin


def student_quantile(num_rows: int) -> float:
    """How many standard errors Student's interval of `num_rows` rows, two at least, reaches to each side."""
    return float(require("scipy.special").stdtrit(num_rows - 1, 1 - TAIL))


def interval_figure(value: float, num_rows: int, resampled: np.ndarray, num_drawn: int | None = None) -> Figure:
    """
    A figure with the percentile interval of what its resamples gave, for figures that are no means.

    Resamples of few rows vary too little, so the percentiles are those that give Student's interval where the figure
    is the mean of normal values ("expanded percentiles", Hesterberg, 2015, arXiv 1411.5279).

    Args:
        value (`float`): The figure itself.
        num_rows (`int`): Rows that it is made of.
        resampled (`np.ndarray` of shape `(resamples,)`): The same of each resample.
        num_drawn (`int`, *optional*): Rows of the smallest sample, if several were resampled apart.

    Returns:
        [`Figure`]: Without interval where there are fewer than two rows, or every resample gave the same.
    """
    num_drawn = num_rows if num_drawn is None else num_drawn
    resampled = np.asarray(resampled)
    if num_drawn < 2 or resampled.min() == resampled.max():
        return Figure(value, num_rows)
    tail = float(require("scipy.special").ndtr(-math.sqrt(num_drawn / (num_drawn - 1)) * student_quantile(num_drawn)))
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Figure(value, num_rows, float(low), float(high))


def resampled_means(row_values: np.ndarray, sample: str = "", one_more: float | None = None) -> np.ndarray:
    """
    The mean under each draw of random weights of the rows, uniform on the simplex (Rubin, 1981).

    Args:
        row_values (`np.ndarray` of shape `(rows,)`): A value a row.
        sample (`str`, *optional*): As in [`mean_figure`].
        one_more (`float`, *optional*): The value of a row that is weighed beside them, as in [`mean_figure`].

    Returns:
        `np.ndarray` of shape `(resamples,)`: Float64.
    """
    row_values = np.asarray(row_values, dtype=np.float64)
    weights = _weights(len(row_values), sample)
    sums, total = weights[:, :-1] @ row_values, weights[:, :-1].sum(1)
    if one_more is None:
        return sums / total
    return (sums + weights[:, -1] * one_more) / (total + weights[:, -1])


def random_generator(name: str) -> np.random.Generator:
    """A generator that depends on a name alone."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def _within(
    interval: tuple[float | None, float | None], bounds: tuple[float | None, float | None]
) -> tuple[float | None, float | None]:
    (low, high), (least, largest) = interval, bounds
    if low is None or high is None:
        return None, None
    return low if least is None else max(low, least), high if largest is None else min(high, largest)


@lru_cache(maxsize=16)
def _weights(num_rows: int, sample: str) -> np.ndarray:
    """Weights, not normalised, of the rows and of one more, shape `(resamples, rows + 1)`."""
    return random_generator(sample).standard_exponential((NUM_RESAMPLES, num_rows + 1))


def distance_bounds(statistic: float, num_rows: int, num_reference_rows: int) -> tuple[float, float]:
    """
    Bounds of the distance between two distribution functions, whatever they are.

    Each empirical distribution function is within `sqrt(log(2 / a) / (2 n))` of its own with probability `1 - a`
    (Dvoretzky, Kiefer and Wolfowitz; Massart, 1990), here with half of what may be missed for each.

    Args:
        statistic (`float`): Largest distance between the empirical functions, in [0, 1].
        num_rows (`int`): Rows of the first.
        num_reference_rows (`int`): Rows of the second.

    Returns:
        `tuple[float, float]`: Bounds in [0, 1].
    """
    margin = sum(math.sqrt(math.log(2 / TAIL) / (2 * count)) for count in (num_rows, num_reference_rows))
    return max(0.0, statistic - margin), min(1.0, statistic + margin)


def paired_comparison(
    first: Sequence[float],
    second: Sequence[float],
    sample: str = "",
    bounds: tuple[float | None, float | None] = UNIT,
) -> PairedComparison:
    """
    Whether two models differ on the same rows, by a sign-flip permutation test of the mean difference.

    Args:
        first (`Sequence[float]` of length `rows`): One model's value of each row.
        second (`Sequence[float]` of length `rows`): The other's of the same rows, in the same order.
        sample (`str`, *optional*): As in [`mean_figure`].
        bounds (`tuple[float | None, float | None]`, *optional*, defaults to `(0.0, 1.0)`):
            Least and largest value that a row can have for either model; `None` where there is no such value.

    Raises:
        ValueError: If they are not of the same number of rows, or of none.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"`first` and `second` must be of the same rows, but they have {len(first)} and {len(second)}."
        )
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    least, largest = bounds
    span = None if least is None or largest is None else largest - least
    figure = mean_figure(differences, sample, OPEN if span is None else (-span, span))
    p_value = 1.0
    if differences.any() and len(differences) > 1:
        test = require("scipy.stats").permutation_test(
            (differences,),
            lambda sample, axis: np.mean(sample, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=NUM_PERMUTATIONS,
            batch=1000,
            rng=random_generator(sample),
        )
        p_value = float(test.pvalue)
    return PairedComparison(figure.value, figure.low, figure.high, p_value, figure.num_rows)
