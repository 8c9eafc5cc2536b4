"""Whether what a model says means the true answer rather than a wrong one, from sentence embeddings."""

from collections.abc import Sequence

import numpy as np


def embedding_hits(generations: np.ndarray, options: Sequence[np.ndarray]) -> np.ndarray:
    """
    Of each row, whether no wrong answer's embedding is nearer to the generation's than the true answer's, by cosine.

    A wrong answer that is exactly as near as the true one, such as one of the same words, does no harm: so it is in
    SOUL's code. A generation that has no direction (all zeros) hits nothing.

    Args:
        generations (`np.ndarray` of shape `(rows, dimension)`): Embeddings of what the model said.
        options (`Sequence[np.ndarray]` of length `rows`, each of shape `(options, dimension)`):
            Embeddings of the true answer, which comes first, and of the wrong ones.

    Returns:
        `np.ndarray` of shape `(rows,)`: Booleans. By chance 1 / options of them are true.

    Raises:
        ValueError: If rows or dimensions do not match, a row has no wrong answer, or a number is not finite.
    """
    if len(generations) != len(options):
        raise ValueError(
            f"`generations` and `options` must be of the same rows, but they have {len(generations)} and "
            f"{len(options)}."
        )
    hits = np.empty(len(generations), dtype=bool)
    for row, (generation, row_options) in enumerate(zip(generations, options)):
        generation, row_options = (np.asarray(each, dtype=np.float64) for each in (generation, row_options))
        if row_options.ndim != 2 or len(row_options) < 2 or generation.shape != row_options.shape[1:]:
            raise ValueError(
                f"Row {row} of `options` must be the true answer and at least one wrong one, in as many dimensions as "
                f"the generation, {generation.shape}, but its shape is {row_options.shape}."
            )
        if not (np.isfinite(generation).all() and np.isfinite(row_options).all()):
            raise ValueError(f"Row {row} has an embedding that is not finite.")
        # Summed option by option, not as a matrix product: equal options must come out exactly equal.
        lengths = np.sqrt((row_options**2).sum(1))
        similarities = (row_options * generation).sum(1) / np.where(lengths > 0, lengths, 1)
        hits[row] = generation.any() and similarities[0] == similarities.max()
    return hits
