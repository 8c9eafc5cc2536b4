"""The picture of a study: what forgetting costs in the course of training."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..extras import require
from ..runs import RUN_COLOURS
from .figures import DETAIL_LEVEL, best_kept, chosen_runs
from .records import Run
from .tables import ordered_families


mpl_figure = require("matplotlib.figure")

COLOURS = (*RUN_COLOURS, "#E69F00")
# Families beyond the colours have the same again in another style.
STYLES = ("-", "--", ":")
NUM_LEVELS = 201
PANELS_ACROSS = 3


@dataclass(frozen=True)
class Band:
    """
    A family's frontier over seeds: the most that is kept at each level or below it.

    Attributes:
        levels (`np.ndarray` of shape `(levels,)`): Forget probabilities, falling.
        mean (`np.ndarray` of shape `(levels,)`): [`~figures.best_kept`], over the seeds that get there; NaN where none
            does.
        low (`np.ndarray` of shape `(levels,)`): Least over those seeds.
        high (`np.ndarray` of shape `(levels,)`): Most.
        num_reached (`np.ndarray` of shape `(levels,)`): Those seeds.
        num_seeds (`int`): All seeds.
    """

    levels: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    num_reached: np.ndarray
    num_seeds: int

    @property
    def is_whole(self) -> np.ndarray:
        """Where all seeds get, so that the mean does not leap as one drops out."""
        return self.num_reached == self.num_seeds


def band(runs: Sequence[Run], levels: Sequence[float]) -> Band:
    """
    The frontiers of a family's seeds, read at the same levels.

    Args:
        runs (`Sequence[Run]`): One a seed; one that has failed gets nowhere.
        levels (`Sequence[float]`): Forget probabilities.
    """
    kept = np.array([[best_kept(run, level) for level in levels] for run in runs], dtype=np.float64)
    num_reached = np.isfinite(kept).sum(axis=0)
    reached = num_reached > 0
    mean, low, high = np.full((3, len(levels)), np.nan)
    for values, aggregate in ((mean, np.nanmean), (low, np.nanmin), (high, np.nanmax)):
        values[reached] = aggregate(kept[:, reached], axis=0)
    return Band(np.asarray(levels, dtype=np.float64), mean, low, high, num_reached, len(runs))


def draw_curves(
    runs: Sequence[Run],
    path: str | os.PathLike,
    labels: Mapping[str, str] | None = None,
    objectives: Sequence[str] | None = None,
    families: Sequence[str] | None = None,
    level: float = DETAIL_LEVEL,
    title: str | None = None,
) -> None:
    """
    Draws a panel an objective and a line a family, of the final runs of its setting for a level, and saves a PNG.

    Args:
        runs (`Sequence[Run]`): Of one task: those of the search, which choose the settings, and the final ones.
        path (`str` or `os.PathLike`): The PNG.
        labels (`Mapping[str, str]`, *optional*):
            What the legend calls families, in its order. With the same labels, pictures of several tasks agree in
            their colours.
        objectives (`Sequence[str]`, *optional*): Which, in which order; all by name by default.
        families (`Sequence[str]`, *optional*): Which, all by default. They keep the colours that they have among all.
        level (`float`, *optional*, defaults to 0.2): The forget probability that settings are chosen for.
        title (`str`, *optional*): Above the panels; the task by default.

    Raises:
        ValueError: If there are no final runs, or runs of several tasks, or two of a family's on the same seed, or
            if a family has final runs but none of its setting.
    """
    figure = curves_figure(runs, labels, objectives, families, level, title)
    figure.savefig(path, format="png", dpi=150, facecolor="white")


def curves_figure(
    runs: Sequence[Run],
    labels: Mapping[str, str] | None = None,
    objectives: Sequence[str] | None = None,
    families: Sequence[str] | None = None,
    level: float = DETAIL_LEVEL,
    title: str | None = None,
):
    """The figure of [`draw_curves`], unsaved."""
    objectives = sorted({run.objective for run in runs}) if objectives is None else list(objectives)
    # A label or a family that is not drawn takes its colour all the same, so that pictures agree.
    styles = family_styles(ordered_families({*(labels or {}), *(run.family for run in runs)}, labels))
    finals = _final_runs(
        [run for run in runs if run.objective in objectives and (families is None or run.family in families)], level
    )
    across = min(PANELS_ACROSS, len(objectives))
    down = -(-len(objectives) // across)
    figure = mpl_figure.Figure(figsize=(max(3.6 * across, 5.4), 3.4 * down + 1.1), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flatten()
    before = [run.target["forget"] for run in finals if run.failed is None]
    levels = np.linspace(max(before, default=1.0), 0, NUM_LEVELS)
    for axes, objective in zip(panels, objectives):
        _draw_panel(axes, [run for run in finals if run.objective == objective], objective, levels, styles)
    # What is held out may come to be known better than before.
    panels[0].set_ylim(0, max(1.05, panels[0].get_ylim()[1]))
    for axes in panels[len(objectives) :]:
        axes.set_visible(False)
    for place, axes in enumerate(panels[: len(objectives)]):
        if place + across >= len(objectives):
            axes.set_xlabel("forget probability (better →)")
            axes.xaxis.set_tick_params(labelbottom=True)
        if place % across == 0:
            axes.set_ylabel("share of held-out\nprobability kept")
    figure.suptitle(title or finals[0].task, x=0.01, ha="left", fontsize=12, fontweight="bold")
    drawn = {run.family for run in finals}
    handles = _legend_lines({family: style for family, style in styles.items() if family in drawn})
    names = [(labels or {}).get(family, family) for family in handles]
    figure.legend(
        list(handles.values()), names, loc="outside lower center", ncols=min(4, len(names)), frameon=False, fontsize=9
    )
    return figure


def family_styles(families: Sequence[str]) -> dict[str, dict]:
    """The colour and the kind of line of each family, by its place."""
    return {
        family: {"color": COLOURS[place % len(COLOURS)], "linestyle": STYLES[place // len(COLOURS) % len(STYLES)]}
        for place, family in enumerate(families)
    }


def _final_runs(runs: Sequence[Run], level: float) -> list[Run]:
    """Those of every family's setting for a level."""
    tasks = sorted({run.task for run in runs})
    if len(tasks) > 1:
        raise ValueError(f"`runs` must be of one task, but they are of {tasks}.")
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.objective, run.family), []).append(run)
    finals = [run for group in groups.values() for run in chosen_runs(group, level)[1]]
    if not finals:
        raise ValueError("`runs` must have final runs of what is to be drawn, but they have none.")
    if len({run.key for run in finals}) != len(finals):
        raise ValueError("`runs` must have one run for an objective, a family, a setting and a seed.")
    return finals


def _draw_panel(axes, runs: Sequence[Run], objective: str, levels: np.ndarray, styles: Mapping[str, dict]) -> None:
    axes.set_title(objective, loc="left", fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlim(levels[0], 0)
    for family, style in styles.items():
        own = [run for run in runs if run.family == family]
        if not own:
            continue
        found = band(own, levels)
        axes.fill_between(levels, found.low, found.high, color=style["color"], alpha=0.13, linewidth=0)
        axes.plot(levels, np.where(found.is_whole, found.mean, np.nan), linewidth=1.8, label=family, **style)
        axes.plot(levels, np.where(found.is_whole, np.nan, found.mean), linewidth=0.7, label="_some_seeds", **style)


def _legend_lines(styles: Mapping[str, dict]) -> dict:
    line = require("matplotlib.lines").Line2D
    return {family: line([], [], linewidth=1.8, **style) for family, style in styles.items()}
