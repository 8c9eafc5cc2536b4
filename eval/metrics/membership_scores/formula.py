"""
How much a model's losses on a row suggest that it was trained on it.

Every score is higher where a row is more likely to have been trained on; open-unlearning, MUSE and SOUL have the other
sign. A score says nothing by itself: members are told from non-members by comparing rows.
"""

import zlib
from collections.abc import Sequence

import numpy as np


# Share of a row's tokens that Min-K% looks at: 0.2 in the papers of Min-K% and Min-K%++, 0.4 in MUSE's PrivLeak.
DEFAULT_SHARE = 0.2


def loss_score(nll: Sequence[float]) -> np.ndarray:
    """
    Minus the loss (Yeom et al., 2018): `-nll`.

    Args:
        nll (`Sequence[float]` of length `rows`): Mean negative log-likelihood per token, in nats.

    Returns:
        `np.ndarray` of shape `(rows,)`: At most 0.
    """
    return -_numbers("nll", nll)


def zlib_score(nll: Sequence[float], texts: Sequence[str]) -> np.ndarray:
    """
    The loss over the bytes of the compressed text (Carlini et al., 2021): `-nll / bytes`. A text that is easy for any
    compressor must have a lower loss to count as known.

    Args:
        nll (`Sequence[float]` of length `rows`):
            Mean negative log-likelihood per token, as in all published code. Sums over tokens give nats per compressed
            byte instead, which ranks rows of different lengths otherwise.
        texts (`Sequence[str]` of length `rows`): What the losses are of. Its UTF-8 bytes go through `zlib.compress`.

    Returns:
        `np.ndarray` of shape `(rows,)`: At most 0. Carlini et al.'s `bytes / nll` ranks rows alike.
    """
    nll = _numbers("nll", nll)
    _check_lengths(nll=nll, texts=texts)
    return -nll / np.array([len(zlib.compress(text.encode("utf-8"))) for text in texts], dtype=np.float64)


def min_k_score(token_log_probs: Sequence[Sequence[float]], k: float = DEFAULT_SHARE) -> np.ndarray:
    """
    Min-K% Prob (Shi et al., 2024): the mean log-probability of a row's least probable tokens. A text that was never
    seen is likely to hold a few tokens that surprise.

    Args:
        token_log_probs (`Sequence[Sequence[float]]` of length `rows`): Log-probability of each token, in nats.
        k (`float`, *optional*, defaults to 0.2):
            Share of the tokens, in (0, 1], rounded down and at least one token.

    Returns:
        `np.ndarray` of shape `(rows,)`: At most 0.

    Raises:
        ValueError: If `k` is out of its range, a row has no token, or a number is not finite.
    """
    return _mean_of_lowest("token_log_probs", token_log_probs, k)


def min_k_plus_plus_score(token_z_scores: Sequence[Sequence[float]], k: float = DEFAULT_SHARE) -> np.ndarray:
    """
    Min-K%++ (Zhang et al., 2024): as [`min_k_score`], of log-probabilities that are standardised by
    the model's whole distribution at their position.

    Args:
        token_z_scores (`Sequence[Sequence[float]]` of length `rows`):
            `z = (log p(token) - mean) / std` of each token of a row, with the mean and the standard deviation of
            `log p(v)` over the vocabulary, each token `v` weighted by `p(v)`.
        k (`float`, *optional*, defaults to 0.2): As in [`min_k_score`].

    Returns:
        `np.ndarray` of shape `(rows,)`: Of any sign.

    Raises:
        ValueError: As in [`min_k_score`].
    """
    return _mean_of_lowest("token_z_scores", token_z_scores, k)


def reference_score(nll: Sequence[float], reference_nll: Sequence[float]) -> np.ndarray:
    """
    By how much the loss lies under that of a model which never saw the row (Watson et al., 2022; Carlini et al., 2021,
    take the ratio): `reference_nll - nll`.

    Args:
        nll (`Sequence[float]` of length `rows`): Mean negative log-likelihood per token, in nats.
        reference_nll (`Sequence[float]` of length `rows`): The reference model's on the same rows.

    Returns:
        `np.ndarray` of shape `(rows,)`: Of any sign.
    """
    nll, reference_nll = _numbers("nll", nll), _numbers("reference_nll", reference_nll)
    _check_lengths(nll=nll, reference_nll=reference_nll)
    return reference_nll - nll


def lowercase_score(nll: Sequence[float], lowercase_nll: Sequence[float]) -> np.ndarray:
    """
    How much the loss grows when the text is lower-cased (Carlini et al., 2021): `lowercase_nll / nll`.

    Args:
        nll (`Sequence[float]` of length `rows`): Mean negative log-likelihood per token, in nats, not negative.
        lowercase_nll (`Sequence[float]` of length `rows`): The same of each row's text in lower case.

    Returns:
        `np.ndarray` of shape `(rows,)`:
            At least 0; 1 where lower case changes nothing, infinite where only the text as it stands has a loss of 0.
    """
    nll, lowercase_nll = _numbers("nll", nll), _numbers("lowercase_nll", lowercase_nll)
    _check_lengths(nll=nll, lowercase_nll=lowercase_nll)
    for name, losses in {"nll": nll, "lowercase_nll": lowercase_nll}.items():
        if (losses < 0).any():
            row = int((losses < 0).argmax())
            raise ValueError(f"Row {row} of `{name}` is negative, {losses[row]}: give losses, not log-probabilities.")
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(nll == lowercase_nll, 1.0, lowercase_nll / nll)


def gradient_norm_score(gradient_norms: Sequence[float]) -> np.ndarray:
    """
    Minus the norm of the gradient of a row's loss (Wang et al., 2024, arXiv 2402.17012): `-norm`.

    Args:
        gradient_norms (`Sequence[float]` of length `rows`): From `soul_eval.gradient_norms`.

    Returns:
        `np.ndarray` of shape `(rows,)`: At most 0.
    """
    return -_numbers("gradient_norms", gradient_norms)


def membership_scores(
    token_log_probs: Sequence[Sequence[float]],
    token_z_scores: Sequence[Sequence[float]] | None = None,
    texts: Sequence[str] | None = None,
    reference_nll: Sequence[float] | None = None,
    lowercase_nll: Sequence[float] | None = None,
    gradient_norms: Sequence[float] | None = None,
    k: float = DEFAULT_SHARE,
) -> dict[str, np.ndarray]:
    """
    Every score whose inputs are given.

    Args:
        token_log_probs (`Sequence[Sequence[float]]` of length `rows`): As in [`min_k_score`].
        token_z_scores (`Sequence[Sequence[float]]` of length `rows`, *optional*): As in [`min_k_plus_plus_score`].
        texts (`Sequence[str]` of length `rows`, *optional*): As in [`zlib_score`].
        reference_nll (`Sequence[float]` of length `rows`, *optional*): As in [`reference_score`].
        lowercase_nll (`Sequence[float]` of length `rows`, *optional*): As in [`lowercase_score`].
        gradient_norms (`Sequence[float]` of length `rows`, *optional*): As in [`gradient_norm_score`].
        k (`float`, *optional*, defaults to 0.2): As in [`min_k_score`].

    Returns:
        `dict[str, np.ndarray]`: Arrays of shape `(rows,)`, under the names `loss` and `min_k` and, where there is what
        they need, `min_k_plus_plus`, `zlib`, `reference`, `lowercase` and `gradient_norm`.

    Raises:
        ValueError: If the inputs are not of the same number of rows, or as in the single scores.
    """
    scores = {"min_k": min_k_score(token_log_probs, k)}
    nll = [-float(np.mean(np.asarray(row, dtype=np.float64))) for row in token_log_probs]
    scores["loss"] = loss_score(nll)
    if token_z_scores is not None:
        scores["min_k_plus_plus"] = min_k_plus_plus_score(token_z_scores, k)
    if texts is not None:
        scores["zlib"] = zlib_score(nll, texts)
    if reference_nll is not None:
        scores["reference"] = reference_score(nll, reference_nll)
    if lowercase_nll is not None:
        scores["lowercase"] = lowercase_score(nll, lowercase_nll)
    if gradient_norms is not None:
        scores["gradient_norm"] = gradient_norm_score(gradient_norms)
    _check_lengths(**scores)
    return scores


def _mean_of_lowest(name: str, rows: Sequence[Sequence[float]], k: float) -> np.ndarray:
    if not 0 < k <= 1:
        raise ValueError(f"`k` must be a share of the tokens in (0, 1], but it is {k}: give 0.2 for 20%.")
    scores = []
    for index, row in enumerate(rows):
        row = np.asarray(row, dtype=np.float64)
        if row.ndim != 1 or not row.size or not np.isfinite(row).all():
            raise ValueError(f"Row {index} of `{name}` must be at least one finite number, but it is {row}.")
        scores.append(np.sort(row)[: max(1, int(row.size * k))].mean())
    return np.array(scores)


def _numbers(name: str, values: Sequence[float]) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"`{name}` must be one number a row, but its shape is {values.shape}.")
    if np.isnan(values).any():
        raise ValueError(f"Row {int(np.isnan(values).argmax())} of `{name}` is NaN.")
    return values


def _check_lengths(**columns: Sequence) -> None:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"The inputs must be of the same rows, but their numbers of rows are {lengths}.")
