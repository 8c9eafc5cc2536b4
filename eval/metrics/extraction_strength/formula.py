"""How little of an answer one must give away for the model to say the rest."""

from collections.abc import Sequence

import numpy as np


def extraction_strength(token_hits: Sequence[Sequence[bool]]) -> np.ndarray:
    """
    Each row's share of answer that greedy decoding gives, after the shortest beginning of it from which it gives the
    whole rest: `1 - k / length`, with `k` the tokens of that beginning (Wang et al., 2025, after Carlini et al., 2021;
    "ES" of OpenUnlearning). That is the length of the run of hits at the end, over the length of the answer.

    From that beginning on, the model's own text is the true one, so hits under teacher forcing are enough and nothing
    needs to be generated.

    Args:
        token_hits (`Sequence[Sequence[bool]]` of length `rows`):
            Of each answer token, whether it is the model's most probable one, given the true tokens before it.
            OpenUnlearning leaves out the end of sequence.

    Returns:
        `np.ndarray` of shape `(rows,)`: Float64, in [0, 1]; 0 where the last token is missed. OpenUnlearning's figure
        is never below one token's share, `max(this, 1 / length)`.

    Raises:
        ValueError: If a row has no token, or anything but booleans.
    """
    strengths = np.empty(len(token_hits))
    for row, hits in enumerate(token_hits):
        hits = np.asarray(hits)
        if hits.ndim != 1 or not hits.size or hits.dtype != bool:
            raise ValueError(
                f"Row {row} of `token_hits` must be one boolean for each answer token, at least one, but it is "
                f"{hits.tolist()}."
            )
        misses = np.flatnonzero(~hits)
        beginning = misses[-1] + 1 if misses.size else 0
        strengths[row] = (hits.size - beginning) / hits.size
    return strengths
