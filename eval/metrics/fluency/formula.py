"""Whether generations are language at all, from a gibberish classifier's probabilities."""

from collections.abc import Sequence

import numpy as np


def fluency(probabilities: Sequence[float]) -> float:
    """
    The mean probability that a gibberish classifier gives to "clean".

    Args:
        probabilities (`Sequence[float]` of length `rows`): Of each generation, in [0, 1].

    Returns:
        `float`: In [0, 1].

    Raises:
        ValueError: If there is no row, or a number is not in [0, 1].
    """
    values = np.asarray(probabilities, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"`probabilities` must be one number a row, at least one, but its shape is {values.shape}.")
    wrong = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if wrong.size:
        raise ValueError(f"`probabilities` must be in [0, 1], but row {wrong[0]} has {values[wrong[0]]}.")
    return float(values.mean())
