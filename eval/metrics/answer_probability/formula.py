"""How probable the true answer is, from mean token losses."""

from collections.abc import Sequence

import numpy as np


def answer_probabilities(answer_nll: Sequence[float]) -> np.ndarray:
    """
    Probability of each answer, the geometric mean of its tokens' probabilities: `exp(-answer_nll)`.

    Args:
        answer_nll (`Sequence[float]` of length `rows`): Mean negative log-likelihood per answer token, in nats.

    Returns:
        `np.ndarray` of shape `(rows,)`: Float64 in [0, 1].
    """
    return np.exp(-np.asarray(answer_nll, dtype=np.float64))


def normalised_answer_probabilities(
    answer_nll: Sequence[float], perturbed_nll: Sequence[Sequence[float]]
) -> np.ndarray:
    """
    Probability of each true answer among the options of its row: `p / (p + sum(p_k))` with `p = exp(-nll)`.

    Args:
        answer_nll (`Sequence[float]` of length `rows`): As in [`answer_probabilities`].
        perturbed_nll (`Sequence[Sequence[float]]` of length `rows`): The same of each row's wrong answers.

    Returns:
        `np.ndarray` of shape `(rows,)`:
            Float64 in [0, 1]; with k wrong answers a model that knows nothing has about `1 / (k + 1)`.
    """
    # p / (p + sum(p_k)) = 1 / (1 + sum(p_k / p)), which is no 0 / 0 where every option is improbable.
    with np.errstate(over="ignore"):
        odds = [
            np.exp(nll - np.asarray(options, dtype=np.float64)).sum()
            for nll, options in zip(answer_nll, perturbed_nll)
        ]
    return 1 / (1 + np.array(odds))


def answer_probability(answer_nll: Sequence[float]) -> float:
    """The mean of [`answer_probabilities`]."""
    return float(answer_probabilities(answer_nll).mean())


def normalised_answer_probability(answer_nll: Sequence[float], perturbed_nll: Sequence[Sequence[float]]) -> float:
    """The mean of [`normalised_answer_probabilities`]."""
    return float(normalised_answer_probabilities(answer_nll, perturbed_nll).mean())
