"""
Figures with their uncertainty: every aggregate says of how many rows it is made and within which bounds it lies.

Intervals hold 95%. They come from a bootstrap over rows whose draws depend on nothing but a name and the number of
rows, so that the same rows give the same interval everywhere. Imports no torch.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from .extras import require


CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
NUM_PERMUTATIONS = 9999


@dataclass(frozen=True)
class Figure:
    """
    An aggregate over rows.

    Attributes:
        value (`float`): The aggregate.
        num_rows (`int`): Rows that it is made of.
        low (`float`, *optional*): Lower end of its interval; `None` where one row, or no theory, gives none.
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
        low (`float`, *optional*): Lower end of the difference's interval.
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


def mean_figure(row_values: Sequence[float], sample: str = "") -> Figure:
    """
    The mean of a value a row.

    Args:
        row_values (`Sequence[float]` of length `rows`): Finite.
        sample (`str`, *optional*): Name of the rows; figures of the same rows are resampled together.
    """
    row_values = np.asarray(row_values, dtype=np.float64)
    return interval_figure(float(row_values.mean()), len(row_values), resampled_means(row_values, sample))


def interval_figure(value: float, num_rows: int, resampled: np.ndarray) -> Figure:
    """
    A figure with the percentile interval of what its resamples gave.

    Args:
        value (`float`): The figure itself.
        num_rows (`int`): Rows that it is made of.
        resampled (`np.ndarray` of shape `(resamples,)`): The same of each resample.
    """
    if num_rows < 2:
        return Figure(value, num_rows)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Figure(value, num_rows, float(low), float(high))


def resampled_means(row_values: np.ndarray, sample: str = "") -> np.ndarray:
    """
    The mean of each resample.

    Args:
        row_values (`np.ndarray` of shape `(rows,)`): A value a row.
        sample (`str`, *optional*): As in [`mean_figure`].

    Returns:
        `np.ndarray` of shape `(resamples,)`: Float64.
    """
    return _draws(len(row_values), sample) @ np.asarray(row_values, dtype=np.float64)


def random_generator(name: str) -> np.random.Generator:
    """A generator that depends on a name alone."""
    return np.random.default_rng(zlib.crc32(name.encode()))


@lru_cache(maxsize=16)
def _draws(num_rows: int, sample: str) -> np.ndarray:
    """Weights of the rows in each resample, shape `(resamples, rows)`."""
    counts = random_generator(sample).multinomial(num_rows, np.full(num_rows, 1 / num_rows), NUM_RESAMPLES)
    return counts / num_rows


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
    missed = (1 - CONFIDENCE) / 2
    margin = sum(math.sqrt(math.log(2 / missed) / (2 * count)) for count in (num_rows, num_reference_rows))
    return max(0.0, statistic - margin), min(1.0, statistic + margin)


def paired_comparison(first: Sequence[float], second: Sequence[float], sample: str = "") -> PairedComparison:
    """
    Whether two models differ on the same rows, by a sign-flip permutation test of the mean difference.

    Args:
        first (`Sequence[float]` of length `rows`): One model's value of each row.
        second (`Sequence[float]` of length `rows`): The other's of the same rows, in the same order.
        sample (`str`, *optional*): As in [`mean_figure`].

    Raises:
        ValueError: If they are not of the same number of rows, or of none.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"`first` and `second` must be of the same rows, but they have {len(first)} and {len(second)}."
        )
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    figure = mean_figure(differences, sample)
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
