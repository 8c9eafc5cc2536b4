"""One row for every task, objective and family of a study. Pure functions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .figures import (
    LEVELS,
    PairedDifference,
    best_setting,
    by_setting,
    kept_at,
    mean_kept,
    paired_difference,
    run_hypervolume,
    share_landing,
)
from .records import Run


@dataclass(frozen=True)
class Kept:
    """
    What is left at a level.

    Attributes:
        level (`float`): Forget probability.
        mean (`float`, *optional*): Share of the target's held-out probability, over the seeds that reach the level.
        num_reached (`int`): Those seeds.
        num_seeds (`int`): All seeds.
    """

    level: float
    mean: float | None
    num_reached: int
    num_seeds: int


@dataclass(frozen=True)
class Row:
    """
    What a study says of a family on an objective and a task. All but the first of the search is `None`, or empty,
    until there are final runs or where they have not measured it.

    Attributes:
        task (`str`): The corpus and the model.
        objective (`str`): What is minimised.
        family (`str`): The optimizer.
        setting (`dict`): The setting that the search chose, or the only one of the final runs if none was searched.
        num_settings (`int`): Settings that the search tried.
        landing (`float`, *optional*): Share of them that land; see [`~figures.share_landing`].
        seeds (`tuple[int, ...]`): Of the final runs.
        num_failed (`int`): Final runs that failed. They reach no level and have a hypervolume of 0.
        kept (`tuple[Kept, ...]`): By level.
        hypervolume (`float`, *optional*): Mean over seeds.
        forget_quality (`float`, *optional*): Median over seeds.
        relearned (`float`, *optional*): Forget probability after relearning, mean over seeds.
        rounded_forget (`float`, *optional*): Forget probability after rounding less before, mean over seeds.
        rounded_held_out (`float`, *optional*): The same of the held-out probability.
        seconds_per_step (`float`, *optional*): Median over seeds.
        state_bytes (`float`, *optional*): Median over seeds.
        reference (`str`): The family that all others are compared with.
        compared_at (`float`, *optional*): The level of the comparison; `None` is the mean over levels.
        difference (`PairedDifference`, *optional*): This family less the reference; a level not reached counts 0.
    """

    task: str
    objective: str
    family: str
    setting: dict
    num_settings: int
    landing: float | None
    seeds: tuple[int, ...]
    num_failed: int
    kept: tuple[Kept, ...]
    hypervolume: float | None
    forget_quality: float | None
    relearned: float | None
    rounded_forget: float | None
    rounded_held_out: float | None
    seconds_per_step: float | None
    state_bytes: float | None
    reference: str
    compared_at: float | None
    difference: PairedDifference | None


def summarise(
    runs: Iterable[Run], reference: str, levels: Sequence[float] = LEVELS, compared_at: float | None = None
) -> list[Row]:
    """
    Chooses each family's setting on the search and makes its figures of the final runs of that setting.

    Args:
        runs (`Iterable[Run]`): All runs of a study, in any order.
        reference (`str`): The family to compare with, seed by seed.
        levels (`Sequence[float]`, *optional*, defaults to `(0.3, 0.2, 0.1)`): Forget probabilities.
        compared_at (`float`, *optional*): The level to compare at; the mean over `levels` by default.

    Returns:
        `list[Row]`: Sorted by task, objective and family.

    Raises:
        ValueError: If a seed of the search is also a final one of the same task, or if there are final runs but none
            of the setting that the search chose.
    """
    # Sums of floats depend on the order of what is summed.
    runs = sorted(runs, key=lambda run: run.key)
    _check_seeds(runs)
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.task, run.objective, run.family), []).append(run)
    chosen = {key: _choose(group, levels) for key, group in groups.items()}
    scores = {key: _scores(finals, levels, compared_at) for key, (_, finals) in chosen.items()}
    rows = []
    for (task, objective, family), group in groups.items():
        setting, finals = chosen[task, objective, family]
        search = [run for run in group if run.stage == "search"]
        pair = scores.get((task, objective, reference), {}), scores[task, objective, family]
        row = Row(
            task,
            objective,
            family,
            setting,
            len(by_setting(search)),
            share_landing(search) if search else None,
            tuple(run.seed for run in finals),
            sum(run.failed is not None for run in finals),
            tuple(_kept(finals, level) for level in levels) if finals else (),
            _of(np.mean, map(run_hypervolume, finals)),
            **_measured([run for run in finals if run.failed is None]),
            reference=reference,
            compared_at=compared_at,
            difference=paired_difference(*pair) if family != reference and set(pair[0]) & set(pair[1]) else None,
        )
        rows.append(row)
    return sorted(rows, key=lambda row: (row.task, row.objective, row.family))


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


def _choose(runs: Sequence[Run], levels: Sequence[float]) -> tuple[dict, list[Run]]:
    """A family's setting and its final runs, by seed."""
    search = [run for run in runs if run.stage == "search"]
    finals = by_setting(run for run in runs if run.stage == "final")
    first = runs[0]
    name = f"{first.family!r} on {first.objective!r} of {first.task!r}"
    if not search:
        if len(finals) > 1:
            raise ValueError(f"{name} has final runs of {len(finals)} settings and no search to choose one.")
        return first.setting, list(runs)
    setting = best_setting(search, levels)
    key = next(run.setting_key for run in search if run.setting is setting)
    if finals and key not in finals:
        raise ValueError(f"{name} has no final run of the setting that its search chose: {setting}.")
    return setting, finals.get(key, [])


def _scores(finals: Sequence[Run], levels: Sequence[float], compared_at: float | None) -> dict[int, float]:
    return {run.seed: mean_kept(run, levels if compared_at is None else (compared_at,)) for run in finals}


def _kept(finals: Sequence[Run], level: float) -> Kept:
    reached = [kept for run in finals if (kept := kept_at(run, level)) is not None]
    return Kept(level, _of(np.mean, reached), len(reached), len(finals))


def _measured(finals: Sequence[Run]) -> dict[str, float | None]:
    rounded = [run for run in finals if run.rounded is not None]
    return {
        "forget_quality": _of(np.median, (run.forget_quality for run in finals)),
        "relearned": _of(np.mean, (run.relearned["forget"] for run in finals if run.relearned is not None)),
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
