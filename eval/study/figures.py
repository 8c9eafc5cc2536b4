"""What forgetting costs: figures of curves, the setting that costs least, and differences by seed. Pure functions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..extras import require
from ..statistics import CONFIDENCE
from .records import Run


# Forget probabilities at which runs are compared.
LEVELS = (0.3, 0.2, 0.1)
# A run lands if it forgets down to the one and keeps this share of the other.
LANDING_LEVEL, LANDING_SHARE = 0.2, 0.9


@dataclass(frozen=True)
class PairedDifference:
    """
    How two families differ over seeds.

    Attributes:
        mean (`float`): Of the second's values less the first's of the same seed.
        low (`float`, *optional*): Lower end of the 95% interval of the mean; `None` with fewer than two seeds.
        high (`float`, *optional*): Upper end.
        num_seeds (`int`): Seeds that both have.
    """

    mean: float
    low: float | None
    high: float | None
    num_seeds: int


def value_at(
    curve: Sequence[Mapping], level: float, key: str = "held_out", relative_to: Mapping | None = None
) -> float | None:
    """
    A figure at the moment when the forget probability first falls to a level.

    Args:
        curve (`Sequence[Mapping]`): A run's. Between evaluations, all figures move on straight lines over the steps.
        level (`float`): Forget probability.
        key (`str`, *optional*, defaults to `"held_out"`):
            Which figure. One that was evaluated at some steps only is interpolated between those.
        relative_to (`Mapping`, *optional*): The run's target, to get the share of its value.

    Returns:
        `float`, *optional*: `None` if the run never gets there, or the figure was not evaluated around that moment.
    """
    moment = _moment_at(curve, level)
    known = [(entry["step"], entry[key]) for entry in curve if entry.get(key) is not None]
    if moment is None or not known or not known[0][0] <= moment <= known[-1][0]:
        return None
    value = float(np.interp(moment, *zip(*known)))
    if relative_to is None:
        return value
    return None if relative_to.get(key) is None else value / relative_to[key]


def _moment_at(curve: Sequence[Mapping], level: float) -> float | None:
    """The step, with a fraction, at which the forget probability first falls to a level."""
    for place, entry in enumerate(curve):
        if entry["forget"] > level:
            continue
        if place == 0:
            return entry["step"]
        before = curve[place - 1]
        share = (before["forget"] - level) / (before["forget"] - entry["forget"])
        return before["step"] + share * (entry["step"] - before["step"])
    return None


def kept_at(run: Run, level: float) -> float | None:
    """The share of the target's held-out probability that is left at a level; `None` if a run fails or stops short."""
    return None if run.failed is not None else value_at(run.curve, level, relative_to=run.target)


def lands(run: Run, level: float = LANDING_LEVEL, keep: float = LANDING_SHARE) -> bool:
    """
    Whether a run forgets enough and keeps enough, both at the moment when it first has forgotten enough.

    Args:
        run (`Run`): The run; one that has failed does not land.
        level (`float`, *optional*, defaults to 0.2): Highest forget probability.
        keep (`float`, *optional*, defaults to 0.9): Least share of the target's held-out probability.
    """
    kept = kept_at(run, level)
    return kept is not None and kept >= keep


def mean_kept(run: Run, levels: Sequence[float] = LEVELS) -> float:
    """The mean over levels of [`kept_at`], where a level that is not reached counts 0."""
    return float(np.mean([kept_at(run, level) or 0.0 for level in levels]))


def hypervolume(curve: Sequence[Mapping], target: Mapping) -> float:
    """
    The area that a curve's evaluations dominate, of all that forgetting and keeping could be.

    Args:
        curve (`Sequence[Mapping]`): A run's, in any order.
        target (`Mapping`): The model before unlearning.

    Returns:
        `float`: In [0, 1]: the area of the points that some evaluation equals or exceeds both in the share forgotten,
        `1 - forget / target_forget`, and in the share kept, `held_out / target_held_out`. Nothing is interpolated.
    """
    points = [(1 - entry["forget"] / target["forget"], entry["held_out"] / target["held_out"]) for entry in curve]
    area, covered = 0.0, 0.0
    # From the furthest forgetting on: a point adds the strip by which it keeps more than all that forget more.
    for forgotten, kept in sorted(np.clip(points, 0, 1).tolist(), reverse=True):
        area += forgotten * max(kept - covered, 0.0)
        covered = max(covered, kept)
    return area


def run_hypervolume(run: Run) -> float:
    """The [`hypervolume`] of a run, 0 of one that has failed."""
    return 0.0 if run.failed is not None else hypervolume(run.curve, run.target)


def by_setting(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each setting, in an order that does not depend on that of the runs."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.setting_key, []).append(run)
    return {key: groups[key] for key in sorted(groups)}


def best_setting(runs: Sequence[Run], levels: Sequence[float] = LEVELS) -> dict:
    """
    The setting that keeps most, by [`mean_kept`] over its seeds; of equals, the one of the larger hypervolume.

    Args:
        runs (`Sequence[Run]`): The search of one family on one objective and task.
        levels (`Sequence[float]`, *optional*, defaults to `(0.3, 0.2, 0.1)`): Forget probabilities.

    Raises:
        ValueError: If there are none, or runs of more than one search, or runs that were kept for the end.
    """
    _check_search(runs)
    groups = by_setting(runs)

    def merit(key: str) -> tuple[float, float]:
        # Rounded, so that the order in which seeds are summed decides no tie.
        kept = np.mean([mean_kept(run, levels) for run in groups[key]])
        return round(float(kept), 12), round(float(np.mean([run_hypervolume(run) for run in groups[key]])), 12)

    return groups[max(groups, key=merit)][0].setting


def share_landing(runs: Sequence[Run], level: float = LANDING_LEVEL, keep: float = LANDING_SHARE) -> float:
    """
    How easy a family is to tune: the share of the settings tried that land.

    Args:
        runs (`Sequence[Run]`): As in [`best_setting`]. A setting of several seeds counts by the share that lands.
        level (`float`, *optional*, defaults to 0.2): As in [`lands`].
        keep (`float`, *optional*, defaults to 0.9): As in [`lands`].
    """
    _check_search(runs)
    shares = [np.mean([lands(run, level, keep) for run in group]) for group in by_setting(runs).values()]
    return float(np.mean(shares))


def _check_search(runs: Sequence[Run]) -> None:
    searches = {(run.task, run.objective, run.family) for run in runs}
    if len(searches) != 1:
        raise ValueError(f"`runs` must be of one family, objective and task, but they are of {sorted(searches)}.")
    if any(run.stage != "search" for run in runs):
        raise ValueError("`runs` must be those of the search, but some are final.")


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> PairedDifference:
    """
    The second less the first over the seeds that both have, with Student's interval of the mean.

    Args:
        first (`Mapping[int, float]`): A value a seed.
        second (`Mapping[int, float]`): The same of another family.

    Raises:
        ValueError: If they have no seed in common.
    """
    seeds = sorted(set(first) & set(second))
    if not seeds:
        raise ValueError(f"No seed is in both: {sorted(first)} and {sorted(second)}.")
    differences = np.array([second[seed] - first[seed] for seed in seeds], dtype=np.float64)
    mean = float(differences.mean())
    if len(seeds) < 2:
        return PairedDifference(mean, None, None, len(seeds))
    quantile = require("scipy.stats").t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1)
    margin = float(quantile * differences.std(ddof=1) / np.sqrt(len(seeds)))
    return PairedDifference(mean, mean - margin, mean + margin, len(seeds))
