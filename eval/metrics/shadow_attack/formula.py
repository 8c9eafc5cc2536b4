"""A classifier that learns what rows to retain look like next to rows never seen, asked about the rows to forget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from soul_eval.extras import require
from soul_eval.statistics import Figure, mean_figure


# Of the attack as published (Jia et al., 2023 and 2024): both codebases use them.
PENALTY, KERNEL, GAMMA = 3, "rbf", "auto"
NUM_QUANTILES = 11


@dataclass(frozen=True)
class ShadowAttack:
    """
    What the attack found.

    Attributes:
        efficacy ([`~statistics.Figure`]): Share of the target rows that it takes for non-members, in [0, 1].
        shadow_accuracy (`float`): Share of the shadow rows that it tells, in [0, 1]. At 0.5 its word means nothing.
    """

    efficacy: Figure
    shadow_accuracy: float


def shadow_attack(
    shadow_members: Sequence,
    shadow_non_members: Sequence,
    targets: Sequence,
    sample: str = "",
    standardise: bool = False,
) -> ShadowAttack:
    """
    Share of the target rows that a support vector classifier takes for non-members, after it has learnt to tell shadow
    members from shadow non-members: the MIA-efficacy of Jia et al. (2023), as SOUL's code measures it.

    Args:
        shadow_members (`Sequence` of length `rows`):
            A number, or as many features, of each row that the model has kept: the retain rows.
        shadow_non_members (`Sequence` of length `rows`):
            The same of rows that it never saw. Give about as many: the classifier knows no other prior.
        targets (`Sequence` of length `rows`): The same of the rows to forget.
        sample (`str`, *optional*): Name of the target rows; figures of the same rows are resampled together.
        standardise (`bool`, *optional*, defaults to `False`):
            Whether to bring each feature to mean 0 and deviation 1 over the shadow rows. The published code does not,
            and then the result depends on the unit of a feature.

    Returns:
        [`ShadowAttack`]

    Raises:
        ValueError: If an input has no row, the numbers of features differ, or a feature is not finite.
    """
    inputs = {"shadow_members": shadow_members, "shadow_non_members": shadow_non_members, "targets": targets}
    members, non_members, rows = (_features(name, values) for name, values in inputs.items())
    num_features = {members.shape[1], non_members.shape[1], rows.shape[1]}
    if len(num_features) > 1:
        raise ValueError(f"All rows must have as many features, but their numbers are {sorted(num_features)}.")
    shadow = np.concatenate([members, non_members])
    if standardise:
        mean, deviation = shadow.mean(0), shadow.std(0)
        deviation[deviation == 0] = 1
        shadow, rows = (shadow - mean) / deviation, (rows - mean) / deviation
    is_member = np.repeat([1, 0], [len(members), len(non_members)])
    classifier = require("sklearn.svm").SVC(C=PENALTY, kernel=KERNEL, gamma=GAMMA).fit(shadow, is_member)
    accuracy = float((classifier.predict(shadow) == is_member).mean())
    return ShadowAttack(mean_figure(1.0 - classifier.predict(rows), sample), accuracy)


def shadow_attacks(
    shadow_members: Mapping[str, Sequence],
    shadow_non_members: Mapping[str, Sequence],
    targets: Mapping[str, Sequence],
    sample: str = "",
    standardise: bool = False,
) -> dict[str, ShadowAttack]:
    """
    One attack a score, each with that score alone, as in the published code.

    Args:
        shadow_members (`Mapping[str, Sequence]`):
            Features by name, such as what `membership_scores` gives (SOUL) or [`row_features`] (Jia et al.).
        shadow_non_members (`Mapping[str, Sequence]`): The same names.
        targets (`Mapping[str, Sequence]`): The same names.
        sample (`str`, *optional*): As in [`shadow_attack`].
        standardise (`bool`, *optional*, defaults to `False`): As in [`shadow_attack`].

    Returns:
        `dict[str, ShadowAttack]`: By name, the most accurate on the shadow rows first; SOUL reports that one.

    Raises:
        ValueError: If the names differ, or as in [`shadow_attack`].
    """
    if not shadow_members.keys() == shadow_non_members.keys() == targets.keys():
        names = [sorted(features) for features in (shadow_members, shadow_non_members, targets)]
        raise ValueError(f"All rows must have the same features, but they have {names}.")
    attacks = {
        name: shadow_attack(shadow_members[name], shadow_non_members[name], targets[name], sample, standardise)
        for name in shadow_members
    }
    return dict(sorted(attacks.items(), key=lambda item: -item[1].shadow_accuracy))


def row_features(log_probs: np.ndarray, labels: Sequence[int]) -> dict[str, "float | np.ndarray"]:
    """
    The five features of Jia et al. (2023), for a row of many tokens in the place of one label: means over them.

    Args:
        log_probs (`np.ndarray` of shape `(tokens, vocabulary)`): The model's log-probabilities at each position.
        labels (`Sequence[int]` of length `tokens`): The tokens that stand there.

    Returns:
        `dict[str, float | np.ndarray]`: `correctness` (share of tokens that are the most probable one), `confidence`
        (mean probability), `entropy`, `modified_entropy` (Song and Mittal, 2021), both in nats, and
        `probabilities`: as rows differ in length, the 11 deciles of the tokens' probabilities, the lowest first.

    Raises:
        ValueError: If there is no token, or not one label a position.
    """
    log_probs, labels = np.asarray(log_probs, dtype=np.float64), np.asarray(labels)
    if log_probs.ndim != 2 or labels.shape != log_probs.shape[:1] or not labels.size:
        raise ValueError(
            f"`log_probs` must be of shape (tokens, vocabulary) with a label a token, but the shapes are "
            f"{log_probs.shape} and {labels.shape}."
        )
    places = np.arange(len(labels))
    probs = np.exp(log_probs)
    own, own_log = probs[places, labels], log_probs[places, labels]
    # 0 log 0 is 0: a token of probability 0 has no part in an entropy.
    entropies = -(probs * np.where(probs > 0, log_probs, 0)).sum(1)
    others = probs.copy()
    others[places, labels] = 0
    # Certainty of a wrong token makes it infinite: the smallest number stands for a probability of 0.
    rest = np.log(np.maximum(1 - others, np.finfo(np.float64).tiny))
    modified = -(1 - own) * np.maximum(own_log, np.log(np.finfo(np.float64).tiny)) - (others * rest).sum(1)
    return {
        "correctness": float((log_probs.argmax(1) == labels).mean()),
        "confidence": float(own.mean()),
        "entropy": float(entropies.mean()),
        "modified_entropy": float(modified.mean()),
        "probabilities": np.quantile(own, np.linspace(0, 1, NUM_QUANTILES)),
    }


def _features(name: str, rows: Sequence) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    if not rows.size or rows.ndim > 2:
        raise ValueError(f"`{name}` must be a number, or as many features, a row, but its shape is {rows.shape}.")
    rows = rows.reshape(len(rows), -1)
    if not np.isfinite(rows).all():
        raise ValueError(f"Row {int((~np.isfinite(rows)).any(1).argmax())} of `{name}` is not finite.")
    return rows
