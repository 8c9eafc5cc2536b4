"""What a model can still do, in one number."""

from collections.abc import Sequence

import numpy as np


def model_utility(values: Sequence[float]) -> float:
    """
    Harmonic mean: a model is as useful as its weakest part allows.

    Args:
        values (`Sequence[float]`):
            In TOFU nine: answer probability, ROUGE-L recall and truth-ratio score, on retain, real authors and world
            facts. Each in [0, 1].

    Returns:
        `float`: In [0, 1]; 0 if any value is 0.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0 or not (values >= 0).all():
        raise ValueError(f"`values` must be at least one number, none of them negative or NaN, but it is {values}.")
    if not values.all():
        return 0.0
    return float(values.size / (1 / values).sum())
