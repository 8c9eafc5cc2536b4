"""One row for every task, objective and family of a study. Pure functions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .figures import (
    DETAIL_LEVEL,
    LEVELS,
    PairedDifference,
    best_kept,
    by_setting,
    chosen_runs,
    general_rise,
    paired_difference,
    run_hypervolume,
    score,
    share_landing,
)
from .records import Run


@dataclass(frozen=True)
class Kept:
    """
    What is left at a level, of the final runs of the setting for this level.

    Attributes:
        mean (`float`, *optional*): The [`~figures.best_kept`], over the seeds that reach the level.
        num_reached (`int`): Those seeds.
        num_seeds (`int`): All seeds.
    """

    mean: float | None
    num_reached: int
    num_seeds: int


@dataclass(frozen=True)
class Row:
    """
    What a study says of a family on an objective and a task. All but the first of the search is `None`, or empty,
    until there are final runs or where they have not measured it. What has no level of its own is of the final runs of
    the setting for `detail_level`.

    Attributes:
        task (`str`): The corpus and the model.
        objective (`str`): What is minimised.
        family (`str`): The optimizer.
        settings (`dict[float, dict]`):
            By level, the setting that the search chose for it, or the only one of the final runs if none was searched.
        num_settings (`int`): Settings that the search tried.
        landing (`float`, *optional*): Share of them that land; see [`~figures.share_landing`].
        kept (`dict[float, Kept]`): By level.
        scores (`dict[float, dict[int, float]]`): By level and seed, the [`~figures.score`].
        detail_level (`float`): One of the levels.
        seeds (`tuple[int, ...]`): Of the final runs.
        num_failed (`int`): Final runs that failed. They reach no level and have a hypervolume of 0.
        hypervolume (`float`, *optional*): Mean over seeds.
        forget_quality (`float`, *optional*): Median over seeds.
        relearned (`float`, *optional*):
            Forget probability after relearning less before, of rows that were not relearned, mean over seeds.
        rounded_forget (`float`, *optional*): Forget probability after rounding less before, mean over seeds.
        rounded_held_out (`float`, *optional*): The same of the held-out probability.
        general (`float`, *optional*): The [`~figures.general_rise`], mean over the seeds that reach the level.
        seconds_per_step (`float`, *optional*): Median over seeds.
        state_bytes (`float`, *optional*): Median over seeds.
        reference (`str`): The family that all others are compared with.
        differences (`dict[float, PairedDifference]`): By level, this family's scores less the reference's.
        mean_difference (`PairedDifference`, *optional*): The same of the mean over levels.
    """

    task: str
    objective: str
    family: str
    settings: dict[float, dict]
    num_settings: int
    landing: float | None
    kept: dict[float, Kept]
    scores: dict[float, dict[int, float]]
    detail_level: float
    seeds: tuple[int, ...]
    num_failed: int
    hypervolume: float | None
    forget_quality: float | None
    relearned: float | None
    rounded_forget: float | None
    rounded_held_out: float | None
    general: float | None
    seconds_per_step: float | None
    state_bytes: float | None
    reference: str
    differences: dict[float, PairedDifference] = field(default_factory=dict)
    mean_difference: PairedDifference | None = None


def summarise(
    runs: Iterable[Run], reference: str, levels: Sequence[float] = LEVELS, detail_level: float = DETAIL_LEVEL
) -> list[Row]:
    """
    Chooses each family's setting for each level on the search and makes its figures of the final runs of it.

    Args:
        runs (`Iterable[Run]`): All runs of a study, in any order.
        reference (`str`): The family to compare with, seed by seed.
        levels (`Sequence[float]`, *optional*, defaults to `(0.3, 0.2, 0.1)`): Forget probabilities.
        detail_level (`float`, *optional*, defaults to 0.2): Whose setting gives what has no level of its own.

    Returns:
        `list[Row]`: Sorted by task, objective and family.

    Raises:
        ValueError: If a seed of the search is also a final one of the same task, if there are final runs but none of
            a setting that the search chose, or if `detail_level` is none of the levels.
    """
    if detail_level not in levels:
        raise ValueError(f"`detail_level` must be one of the levels {tuple(levels)}, but it is {detail_level}.")
    # Sums of floats depend on the order of what is summed.
    runs = sorted(runs, key=lambda run: run.key)
    _check_seeds(runs)
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.task, run.objective, run.family), []).append(run)
    rows = {key: _row(group, reference, levels, detail_level) for key, group in groups.items()}
    compared = []
    for (task, objective, family), row in rows.items():
        other = rows.get((task, objective, reference))
        if other is not None and family != reference:
            found = {level: difference(row, other, level) for level in levels}
            found = {level: value for level, value in found.items() if value is not None}
            row = replace(row, differences=found, mean_difference=difference(row, other))
        compared.append(row)
    return sorted(compared, key=lambda row: (row.task, row.objective, row.family))


def difference(row: Row, other: Row, level: float | None = None) -> PairedDifference | None:
    """
    How much more a family keeps than another. A level that a run does not reach counts 0.

    Args:
        row (`Row`): The family.
        other (`Row`): The other, of the same task and objective.
        level (`float`, *optional*): Forget probability; the mean over all levels by default.

    Returns:
        `PairedDifference`, *optional*: `None` if they have no final seeds in common.

    Raises:
        ValueError: If the rows are of different tasks or objectives, or have no such level.
    """
    if (row.task, row.objective) != (other.task, other.objective):
        raise ValueError("`row` and `other` must be of one task and objective.")
    first, second = _by_seed(other, level), _by_seed(row, level)
    return paired_difference(first, second) if set(first) & set(second) else None


def verdicts(rows: Sequence[Row], family: str, reference: str, level: float | None = None) -> dict[str, bool | None]:
    """
    On which objectives a family keeps more than another beyond chance.

    Args:
        rows (`Sequence[Row]`): Of one task.
        family (`str`): The one that may be better.
        reference (`str`): The one to compare with, whichever the rows have.
        level (`float`, *optional*): Forget probability; the mean over all levels by default.

    Returns:
        `dict[str, bool | None]`: By objective on which both have a row, whether all of the paired difference's
            interval is above 0; `None` if there is no interval, for want of seeds or of differences between them.
            `False` is not "worse": swap the families to ask that.

    Raises:
        ValueError: If the rows are of several tasks, or have no such level, or no objective with both families.
    """
    cells = rows_by_place(rows)
    found = {}
    for objective in sorted({row.objective for row in rows}):
        pair = cells.get((family, objective)), cells.get((reference, objective))
        if None in pair:
            continue
        gain = difference(*pair, level)
        found[objective] = None if gain is None or gain.low is None else gain.low > 0
    if not found:
        raise ValueError(f"`rows` must have an objective with both {family!r} and {reference!r}.")
    return found


def rows_by_place(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """
    The rows of one task by family and objective.

    Raises:
        ValueError: If the rows are of more than one task, or a family has two rows of an objective.
    """
    tasks = sorted({row.task for row in rows})
    if len(tasks) != 1:
        raise ValueError(f"`rows` must be of one task, but they are of {tasks}.")
    cells = {(row.family, row.objective): row for row in rows}
    if len(cells) != len(rows):
        raise ValueError("`rows` must have one row for a family and an objective, but some have more.")
    return cells


def _check_seeds(runs: Sequence[Run]) -> None:
    for task in sorted({run.task for run in runs}):
        seeds = {
            stage: {run.seed for run in runs if (run.task, run.stage) == (task, stage)}
            for stage in ("search", "final")
        }
        both = sorted(seeds["search"] & seeds["final"])
        if both:
            raise ValueError(
                f"The final runs of {task!r} must have seeds of their own, but the search had {both} too."
            )


def _row(runs: Sequence[Run], reference: str, levels: Sequence[float], detail_level: float) -> Row:
    """A family's row, still without differences."""
    search = [run for run in runs if run.stage == "search"]
    chosen = {level: chosen_runs(runs, level) for level in levels}
    finals = chosen[detail_level][1]
    return Row(
        runs[0].task,
        runs[0].objective,
        runs[0].family,
        {level: setting for level, (setting, _) in chosen.items()},
        len(by_setting(search)),
        share_landing(search) if search else None,
        {level: _kept(own, level) for level, (_, own) in chosen.items() if own},
        {level: {run.seed: score(run, level) for run in own} for level, (_, own) in chosen.items()},
        detail_level,
        tuple(run.seed for run in finals),
        sum(run.failed is not None for run in finals),
        _of(np.mean, map(run_hypervolume, finals)),
        general=_of(np.mean, (general_rise(run, detail_level) for run in finals)),
        **_measured([run for run in finals if run.failed is None]),
        reference=reference,
    )


def _by_seed(row: Row, level: float | None) -> Mapping[int, float]:
    """Scores at a level, or the mean over levels of each seed that has final runs for all of them."""
    if level is not None:
        if level not in row.scores:
            raise ValueError(f"`level` must be one of {tuple(row.scores)}, but it is {level}.")
        return row.scores[level]
    seeds = set.intersection(*(set(scores) for scores in row.scores.values()))
    return {seed: float(np.mean([scores[seed] for scores in row.scores.values()])) for seed in sorted(seeds)}


def _kept(finals: Sequence[Run], level: float) -> Kept:
    reached = [kept for run in finals if (kept := best_kept(run, level)) is not None]
    return Kept(_of(np.mean, reached), len(reached), len(finals))


def _measured(finals: Sequence[Run]) -> dict[str, float | None]:
    rounded = [run for run in finals if run.rounded is not None]
    relearned = [run.relearned for run in finals if run.relearned is not None]
    return {
        "forget_quality": _of(np.median, (run.forget_quality for run in finals)),
        "relearned": _of(np.mean, (found["after"] - found["before"] for found in relearned)),
        "rounded_forget": _of(np.mean, (_change_by_rounding(run, "forget") for run in rounded)),
        "rounded_held_out": _of(np.mean, (_change_by_rounding(run, "held_out") for run in rounded)),
        "seconds_per_step": _of(np.median, (run.seconds_per_step for run in finals)),
        "state_bytes": _of(np.median, (run.state_bytes for run in finals)),
    }


def _change_by_rounding(run: Run, key: str) -> float:
    """After rounding less before: the model that is rounded is the last of the curve."""
    return run.rounded[key] - run.curve[-1][key]


def _of(aggregate, found: Iterable[float | None]) -> float | None:
    """An aggregate of what there is; `None` of nothing."""
    known = [value for value in found if value is not None]
    return float(aggregate(known)) if known else None
