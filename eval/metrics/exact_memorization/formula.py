"""How much of an answer a model says by itself, token by token."""

from collections.abc import Sequence

import numpy as np


def exact_memorization(token_hits: Sequence[Sequence[bool]]) -> np.ndarray:
    """
    Each row's share of answer tokens that are the model's most probable ones, given the true tokens before them
    (Tirumala et al., 2022, section 3; "EM" of OpenUnlearning).

    Args:
        token_hits (`Sequence[Sequence[bool]]` of length `rows`):
            Of each answer token, whether it is the model's most probable one. OpenUnlearning leaves out the end of
            sequence.

    Returns:
        `np.ndarray` of shape `(rows,)`: Float64, in [0, 1].

    Raises:
        ValueError: If a row has no token, or anything but booleans.
    """
    shares = np.empty(len(token_hits))
    for row, hits in enumerate(token_hits):
        hits = np.asarray(hits)
        if hits.ndim != 1 or not hits.size or hits.dtype != bool:
            raise ValueError(
                f"Row {row} of `token_hits` must be one boolean for each answer token, at least one, but it is "
                f"{hits.tolist()}."
            )
        shares[row] = hits.mean()
    return shares
