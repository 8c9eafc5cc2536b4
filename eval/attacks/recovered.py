"""
How much of what unlearning took away an attack brings back:

    share = (attacked - unlearned) / (target - unlearned)

with means over the same rows of three models. 0 is nothing and 1 all; below 0 the attack only did damage, and above 1
the attacked model gives the answers more readily than the target. Neither is cut off. Imports no torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..metrics.answer_probability.formula import answer_probabilities
from ..statistics import TAIL, UNIT, Figure, interval_figure, mean_figure, resampled_means
from ..suites.base import column, match_rows


# Figures lie in [0, 1]; of a smaller difference no share can be told.
LEAST_FORGOTTEN = 0.01


@dataclass(frozen=True)
class Recovery:
    """
    What an attack has brought back, in one figure.

    Attributes:
        attacked ([`~statistics.Figure`]): Mean of the unlearned model under the attack.
        unlearned ([`~statistics.Figure`]): Of the unlearned model without it.
        target ([`~statistics.Figure`]): Of the model before unlearning.
        share ([`~statistics.Figure`], *optional*): The share recovered; any real number.
        reason (`str`, *optional*): Why there is no share.
    """

    attacked: Figure
    unlearned: Figure
    target: Figure
    share: Figure | None = None
    reason: str | None = None

    def to_json(self) -> dict:
        """A dictionary of the attributes, with `None` for a share that there is not."""
        means = {name: getattr(self, name).to_json() for name in ("attacked", "unlearned", "target")}
        return {**means, "share": self.share.to_json() if self.share else None, "reason": self.reason}


def share_recovered(
    attacked: Sequence[float],
    unlearned: Sequence[float],
    target: Sequence[float],
    sample: str = "",
    least_forgotten: float = LEAST_FORGOTTEN,
    bounds: tuple[float | None, float | None] = UNIT,
) -> Recovery:
    """
    The share recovered, from one value a row. A resample of the interval weighs the rows of all three models alike. As
    in [`~statistics.mean_figure`], it has one row more, which changes most under the attack: in the one direction for
    the lower end, in the other for the upper.

    There is no share where the target is not ahead of the unlearned model by `least_forgotten` in the mean, or not in
    every resample: a quotient by nearly nothing is noise, and its percentiles are no interval (Fieller, 1954).

    Args:
        attacked (`Sequence[float]` of length `rows`): Of the unlearned model under the attack.
        unlearned (`Sequence[float]` of length `rows`): Of the unlearned model, same rows, same order.
        target (`Sequence[float]` of length `rows`): Of the target.
        sample (`str`, *optional*): Name of the rows; see [`~statistics.mean_figure`].
        least_forgotten (`float`, *optional*, defaults to 0.01): More than 0.
        bounds (`tuple[float | None, float | None]`, *optional*, defaults to `(0.0, 1.0)`):
            Least and largest value that a row can have; where one is `None`, resamples have no row more.

    Returns:
        [`Recovery`]

    Raises:
        ValueError: If they are not of the same number of rows, of none, or not finite.
    """
    if not least_forgotten > 0:
        raise ValueError(f"`least_forgotten` must be more than 0, but it is {least_forgotten}.")
    groups = {"attacked": attacked, "unlearned": unlearned, "target": target}
    groups = {name: np.asarray(values, dtype=np.float64) for name, values in groups.items()}
    lengths = {name: len(values) for name, values in groups.items()}
    if len(set(lengths.values())) > 1 or not lengths["attacked"]:
        raise ValueError(f"The three models must be of the same rows, and of one at least, but they have {lengths}.")
    for name, values in groups.items():
        is_finite = np.isfinite(values)
        if not is_finite.all():
            raise ValueError(f"`{name}` must be finite, but is {values[~is_finite][0]} at place {is_finite.argmin()}.")
    figures = {name: mean_figure(values, sample, bounds) for name, values in groups.items()}
    gained, lost = (groups[name] - groups["unlearned"] for name in ("attacked", "target"))
    forgotten = lost.mean()
    means = f"the target has {figures['target'].value:.3g} and the unlearned model {figures['unlearned'].value:.3g}"
    if forgotten < least_forgotten:
        return Recovery(**figures, reason=f"{means}, which leaves less than {least_forgotten:g} to recover")
    resampled_lost = resampled_means(lost, sample)
    if resampled_lost.min() <= 0:
        return Recovery(**figures, reason=f"{means}, but it is not ahead in every resample of the rows")
    share, num_rows = float(gained.mean() / forgotten), len(gained)
    if None in bounds or num_rows < 2:
        shares = resampled_means(gained, sample) / resampled_lost
        return Recovery(**figures, share=interval_figure(share, num_rows, shares))
    span = bounds[1] - bounds[0]
    # The row that moves the quotient most changes from end to end under the attack, and has nothing forgotten.
    resampled_lost = resampled_means(lost, sample, 0.0)
    low, high = (
        float(np.quantile(resampled_means(gained, sample, change) / resampled_lost, tail))
        for change, tail in ((-span, TAIL), (span, 1 - TAIL))
    )
    return Recovery(**figures, share=Figure(share, num_rows, min(low, share), max(high, share)))


def probability(rows: list[dict]) -> np.ndarray | None:
    """`exp(-answer_nll)` of each row; `None` if no row has it."""
    losses = column(rows, "answer_nll")
    return None if losses is None else answer_probabilities(losses)


def rougeL_recall(rows: list[dict]) -> np.ndarray | None:
    """ROUGE-L recall of each row's generation; `None` if no row has it."""
    recalls = column(rows, "rougeL_recall")
    return None if recalls is None else np.asarray(recalls)


# Values of rows that rise with knowledge. A suite with other figures passes its own.
VALUES: dict[str, Callable[[list[dict]], np.ndarray | None]] = {
    "probability": probability,
    "rougeL_recall": rougeL_recall,
}


def recoveries(
    attacked: list[dict],
    unlearned: list[dict],
    target: list[dict],
    values: Mapping[str, Callable[[list[dict]], np.ndarray | None]] = VALUES,
    split: str = "forget",
    asked: str = "question",
    least_forgotten: float = LEAST_FORGOTTEN,
) -> dict[str, Recovery]:
    """
    The share recovered of each figure, from rows.

    Args:
        attacked (`list[dict]`): Rows of the unlearned model under the attack; those of `split` count.
        unlearned (`list[dict]`): Of the unlearned model; rows that `attacked` lacks are left out.
        target (`list[dict]`): Of the target, likewise.
        values (`Mapping[str, Callable]`, *optional*): By figure, what takes rows to a value each, or to `None`.
        split (`str`, *optional*, defaults to `"forget"`): What was to be forgotten.
        asked (`str`, *optional*, defaults to `"question"`): Field of rows that must be the same for all models.
        least_forgotten (`float`, *optional*, defaults to 0.01): See [`share_recovered`].

    Returns:
        `dict[str, Recovery]`: Without figures that a model's rows lack.

    Raises:
        ValueError: If there are no rows of `split`, or they are not of the same questions.
    """
    attacked = [row for row in attacked if row["split"] == split]
    if not attacked:
        raise ValueError(f"There are no attacked rows of `split`={split!r}.")
    indices = {row["index"] for row in attacked}
    groups = [attacked]
    for rows in (unlearned, target):
        same = [row for row in rows if row["split"] == split and row["index"] in indices]
        groups.append(match_rows(attacked, same, (split,), asked))
    found = {}
    for name, value_of in values.items():
        triple = [value_of(rows) for rows in groups]
        if all(each is not None for each in triple):
            found[name] = share_recovered(*triple, sample=split, least_forgotten=least_forgotten)
    return found
