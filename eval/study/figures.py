"""What forgetting costs: figures of curves, the setting that costs least, and differences by seed. Pure functions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..statistics import student_bounds
from .records import Run


# Forget probabilities at which runs are compared.
LEVELS = (0.3, 0.2, 0.1)
# The one whose setting is drawn and described in detail.
DETAIL_LEVEL = 0.2
# A run lands if it keeps this share at that level.
LANDING_LEVEL, LANDING_SHARE = 0.2, 0.9


@dataclass(frozen=True)
class PairedDifference:
    """
    How two families differ over seeds.

    Attributes:
        mean (`float`): Of the second's values less the first's of the same seed.
        low (`float`, *optional*):
            Lower end of the 95% interval of the mean; `None` with fewer than two seeds, or differences all alike.
        high (`float`, *optional*): Upper end.
        num_seeds (`int`): Seeds that both have.
    """

    mean: float
    low: float | None
    high: float | None
    num_seeds: int


def best_moment(curve: Sequence[Mapping], level: float) -> tuple[float, float] | None:
    """
    When a run keeps most of all the moments at which it has forgotten enough.

    A curve need not fall: with a learning rate that decays, a run may lose what is held out in the middle and regain
    it by the end, so that the first moment below a level says little of what the run can be stopped with.

    Args:
        curve (`Sequence[Mapping]`): A run's. Between evaluations, all figures move on straight lines over the steps.
        level (`float`): Highest forget probability.

    Returns:
        `tuple[float, float]`, *optional*: The step, with a fraction, and the held-out probability; of equals, the
        earliest. `None` if the run never gets there.
    """
    # On the part of a line that is low enough, most is kept at one of its ends: an evaluation, or where it crosses.
    moments = [(entry["step"], entry["held_out"]) for entry in curve if entry["forget"] <= level]
    for before, after in zip(curve, curve[1:]):
        if min(before["forget"], after["forget"]) < level < max(before["forget"], after["forget"]):
            share = (before["forget"] - level) / (before["forget"] - after["forget"])
            moments.append(tuple(before[key] + share * (after[key] - before[key]) for key in ("step", "held_out")))
    return max(moments, key=lambda moment: (moment[1], -moment[0]), default=None)


def best_kept(run: Run, level: float) -> float | None:
    """
    The largest share of the target's held-out probability that a run has at any moment of low enough forgetting.

    Args:
        run (`Run`): The run; one that has failed gets nowhere.
        level (`float`): Highest forget probability.

    Returns:
        `float`, *optional*: At the [`best_moment`]; `None` if the run never gets there.
    """
    moment = None if run.failed is not None else best_moment(run.curve, level)
    return None if moment is None else moment[1] / run.target["held_out"]


def score(run: Run, level: float) -> float:
    """The [`best_kept`] of a run, 0 if it never gets there: what searches and comparisons go by."""
    return best_kept(run, level) or 0.0


def general_rise(run: Run, level: float) -> float | None:
    """
    What a run costs on general text at its [`best_moment`].

    Args:
        run (`Run`): The run. General text may be evaluated at some steps only: it is interpolated between those.
        level (`float`): Highest forget probability.

    Returns:
        `float`, *optional*: Nats a token above the target's; `None` if the run never gets there, or has not evaluated
        general text around that moment.
    """
    if run.failed is not None or run.target.get("general") is None:
        return None
    moment = best_moment(run.curve, level)
    known = [(entry["step"], entry["general"]) for entry in run.curve if entry.get("general") is not None]
    if moment is None or not known or not known[0][0] <= moment[0] <= known[-1][0]:
        return None
    return float(np.interp(moment[0], *zip(*known))) - run.target["general"]


def lands(run: Run, level: float = LANDING_LEVEL, keep: float = LANDING_SHARE) -> bool:
    """
    Whether a run forgets enough and keeps enough at one and the same moment.

    Args:
        run (`Run`): The run; one that has failed does not land.
        level (`float`, *optional*, defaults to 0.2): Highest forget probability.
        keep (`float`, *optional*, defaults to 0.9): Least share of the target's held-out probability.
    """
    kept = best_kept(run, level)
    return kept is not None and kept >= keep


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


def best_setting(runs: Sequence[Run], level: float) -> dict:
    """
    The setting that keeps most at a level, by the mean [`score`] over its seeds; of equals, of larger hypervolume.

    Args:
        runs (`Sequence[Run]`): The search of one family on one objective and task.
        level (`float`): Highest forget probability.

    Raises:
        ValueError: If there are none, or runs of more than one search, or runs that were kept for the end.
    """
    _check_search(runs)
    groups = by_setting(runs)

    def merit(key: str) -> tuple[float, float]:
        # Rounded, so that the order in which seeds are summed decides no tie.
        kept = np.mean([score(run, level) for run in groups[key]])
        return round(float(kept), 12), round(float(np.mean([run_hypervolume(run) for run in groups[key]])), 12)

    return groups[max(groups, key=merit)][0].setting


def chosen_runs(runs: Sequence[Run], level: float) -> tuple[dict, list[Run]]:
    """
    A family's setting at a level, and the final runs of it.

    Args:
        runs (`Sequence[Run]`): All runs of one family on one objective and task.
        level (`float`): Highest forget probability.

    Returns:
        `tuple[dict, list[Run]]`: The [`best_setting`] of the search or, if nothing was searched, the only one of the
        final runs; and its final runs by seed, none as long as the family has none of any setting.

    Raises:
        ValueError: If the family has final runs, but none of that setting, or several settings and no search.
    """
    _check_family(runs)
    search = [run for run in runs if run.stage == "search"]
    finals = by_setting(sorted((run for run in runs if run.stage == "final"), key=lambda run: run.seed))
    first = runs[0]
    name = f"{first.family!r} on {first.objective!r} of {first.task!r}"
    if not search:
        if len(finals) > 1:
            raise ValueError(f"{name} has final runs of {len(finals)} settings and no search to choose one.")
        return first.setting, next(iter(finals.values()))
    setting = best_setting(search, level)
    key = next(run.setting_key for run in search if run.setting is setting)
    if finals and key not in finals:
        raise ValueError(f"{name} has no final run of the setting that its search chose for {level:g}: {setting}.")
    return setting, finals.get(key, [])


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
    _check_family(runs)
    if any(run.stage != "search" for run in runs):
        raise ValueError("`runs` must be those of the search, but some are final.")


def _check_family(runs: Sequence[Run]) -> None:
    families = {(run.task, run.objective, run.family) for run in runs}
    if len(families) != 1:
        raise ValueError(f"`runs` must be of one family, objective and task, but they are of {sorted(families)}.")


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
    return PairedDifference(mean, *student_bounds(differences), len(seeds))
