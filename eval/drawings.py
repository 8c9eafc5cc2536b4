"""The pictures of a report. A run has the same colour in all of them."""

import io
from dataclasses import dataclass

import numpy as np

from .columns import ARROWS
from .extras import require
from .metrics.truth_ratio.formula import log_truth_ratios
from .registry import column_of
from .runs import Run, run_colours


mpl_figure = require("matplotlib.figure")

PART_COLOURS = {
    "embeddings": "#D55E00",
    "head": "#E69F00",
    "attention": "#0072B2",
    "mlp": "#56B4E9",
    "other": "#999999",
}
ROLE_MARKERS = {"target": "s", "gold": "*", "unlearned": "o"}
# Smaller p-values are all the same to a reader, and would squeeze the rest of the axis.
SMALLEST_P = 1e-30
TRADE_OFFS = (
    ("forget_probability", "held_out_probability", "What forgetting costs rows held out"),
    ("forget_probability", "retain_probability", "What forgetting costs the rows to keep"),
    ("model_utility", "forget_quality", "Forget quality against model utility"),
    ("knowmem_forget_rougeL", "knowmem_retain_rougeL", "Knowledge to forget and to keep"),
    ("wmdp_bio_accuracy", "mmlu_accuracy", "Hazardous and general knowledge"),
    ("toxicity_mean", "fluency", "Toxicity and fluency"),
)
_PATHS = (
    "Each line is a run in the course of training, from the target (square) to its end (large dot); bars are 95% "
    "intervals."
)
_ENDS = "The target is a square, an unlearned model a dot, the gold model a star; bars are 95% intervals."
_CAPTIONS = {
    "forget_quality": "The gold model (star) never saw the rows to forget. Above the dashed line, p = 0.05, no run "
    f"can be told from it; below {SMALLEST_P:g} all are drawn alike.",
    **dict.fromkeys(
        ("held_out_probability", "retain_probability"),
        "A run that forgets and costs nothing moves straight left, to the gold model (star) if there is one.",
    ),
}
_CLIPPED, _SHARE = "curvature/clipped", "curvature/update_share/"


@dataclass(frozen=True)
class Drawing:
    """A picture: its file name, title, caption and PNG bytes, and whether it takes the width of the page."""

    file: str
    title: str
    caption: str
    png: bytes
    is_wide: bool = False


def draw_all(runs: list[Run]) -> list[Drawing]:
    """
    Draws whatever the runs have the data for.

    Args:
        runs (`list[Run]`): As in `write_report`.

    Returns:
        `list[Drawing]`: Trade-offs, truth ratios, losses, curvature.
    """
    trade_offs: dict[str, Drawing] = {}
    for x, y, title in TRADE_OFFS:
        # Of several costs of the same forgetting, the first that was measured is shown.
        if x not in trade_offs and (drawing := _trade_off(runs, x, y, title)):
            trade_offs[x] = drawing
    drawings = (
        *trade_offs.values(),
        _truth_ratios(runs),
        _losses(runs),
        _curvature(runs),
    )
    return [drawing for drawing in drawings if drawing]


def _trade_off(runs: list[Run], x: str, y: str, title: str) -> Drawing | None:
    if not any(_ends(run, x, y) for run in runs if run.role == "unlearned"):
        return None
    figure = mpl_figure.Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = _axes(figure.subplots(), title, _axis_label(x, "←→"), _axis_label(y, "↓↑"))
    colours = run_colours(runs)
    for run in runs:
        path = _points(run.curve(), x, y)
        axes.plot(*path, color=colours[run.name], linewidth=1.6, marker="o", markersize=3, alpha=0.75)
        end = _ends(run, x, y)
        if not end:
            continue
        values, (x_errors, y_errors) = end
        axes.errorbar(*values, y_errors, x_errors, fmt="none", ecolor=colours[run.name], elinewidth=1.4, alpha=0.6)
        size = {"gold": 240, "target": 80, "unlearned": 90}[run.role]
        axes.scatter(
            *values,
            color=colours[run.name],
            marker=ROLE_MARKERS[run.role],
            s=size,
            edgecolors="black",
            linewidths=0.8,
            zorder=3,
            clip_on=False,
            label=run.name,
        )
    if y == "forget_quality":
        axes.set_yscale("log")
        axes.set_ylim(top=4)
        axes.axhline(0.05, color="#767676", linewidth=1, linestyle="--", zorder=0)
    axes.legend(frameon=False)
    has_paths = any(len(_points(run.curve(), x, y)[0]) > 1 for run in runs)
    caption = f"{_PATHS if has_paths else _ENDS} {_CAPTIONS.get(y, '')}".strip()
    return Drawing(f"{y}_against_{x}.png", title, caption, _png(figure))


def _axis_label(key: str, arrows: str) -> str:
    """The figure's name and where better is, with the axis's own arrows for lower and higher."""
    column = column_of(key)
    name = "forget quality, p-value" if column.is_p_value else column.name
    if column.better not in ARROWS:
        return name
    arrow = arrows[column.better == "higher"]
    return f"{name} ({arrow} better)" if arrow == "←" else f"{name} (better {arrow})"


def _ends(run: Run, x: str, y: str) -> tuple[list[float], list] | None:
    """The last point of a run and, for each axis, how far its interval reaches below and above."""
    figures = [run.figure(key) for key in (x, y)]
    if None in figures:
        return None
    values, errors = [], []
    for key, figure in zip((x, y), figures):
        floor = SMALLEST_P if key == "forget_quality" else -np.inf
        value = max(figure.value, floor)
        ends = [value if end is None else max(end, floor) for end in (figure.low, figure.high)]
        values.append(value)
        # A percentile interval need not hold the figure itself.
        errors.append([[max(value - ends[0], 0)], [max(ends[1] - value, 0)]])
    return values, errors


def _truth_ratios(runs: list[Run]) -> Drawing | None:
    samples = {run.name: _log10_truth_ratios(run) for run in runs}
    pooled = np.concatenate(list(samples.values()))
    if not pooled.size:
        return None
    figure = mpl_figure.Figure(figsize=(7.2, 4.6), layout="constrained")
    title = "Truth ratios of the rows to forget"
    axes = _axes(figure.subplots(), title, "truth ratio R (log scale)", "share of rows with at most R")
    # A model that has diverged has ratios of any size, at which only the edge of the picture is of use.
    low, high = np.clip(np.quantile(pooled, [0.002, 0.998]) + [-0.1, 0.1], -6, 6)
    colours = run_colours(runs)
    # References first, so that a run that matches the gold model is seen to lie on it.
    for run in sorted(runs, key=lambda run: run.role == "unlearned"):
        values = np.sort(samples[run.name])
        if values.size:
            shares = np.concatenate([np.arange(values.size + 1) / values.size, [1]])
            steps = 10.0 ** np.clip(np.concatenate([[low], values, [high]]), low, high)
            width = 4 if run.role == "gold" else 1.8
            style = "--" if run.role == "target" else "-"
            axes.step(
                steps, shares, where="post", color=colours[run.name], linewidth=width, linestyle=style, label=run.name
            )
    axes.set_xscale("log")
    axes.axvline(1, color="#767676", linewidth=1, linestyle=":", zorder=0)
    axes.legend(frameon=False)
    caption = (
        "Distribution functions. Left of R = 1 a model finds true answers more probable than false ones. The largest "
        "vertical distance from the gold model's line is the statistic behind the forget quality."
    )
    return Drawing("truth_ratios.png", title, caption, _png(figure))


def _losses(runs: list[Run]) -> Drawing | None:
    names = {"loss": "whole loss", "forget_loss": "forget loss", "retain_loss": "retain loss"}
    found = [name for name in names if any(_series(run, name)[0] for run in runs)]
    if not found:
        return None
    figure = mpl_figure.Figure(figsize=(3.6 * len(found) + 0.4, 3.4), layout="constrained")
    colours = run_colours(runs)
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(found))), found):
        _axes(axes, names[name], "step", "")
        for run in runs:
            steps, values = _series(run, name)
            if steps:
                axes.plot(steps, values, color=colours[run.name], linewidth=1.6, label=run.name)
        if name == found[0]:
            axes.legend(frameon=False)
    caption = "Losses as the Trainer logged them; the whole loss is the weighted sum of its parts."
    return Drawing("losses.png", "Losses in training", caption, _png(figure), is_wide=True)


def _curvature(runs: list[Run]) -> Drawing | None:
    curved = [run for run in runs if _series(run, _CLIPPED)[0]]
    if not curved:
        return None
    figure = mpl_figure.Figure(figsize=(3.9 * (len(curved) + 1), 3.6), layout="constrained")
    panels = figure.subplots(1, len(curved) + 1)
    colours = run_colours(runs)
    _axes(panels[0], "coordinates at the clip", "step", "share")
    panels[0].set_ylim(-0.02, 1.02)
    for run in curved:
        panels[0].plot(*_series(run, _CLIPPED), color=colours[run.name], linewidth=1.6, label=run.name)
    panels[0].legend(frameon=False)
    for axes, run in zip(panels[1:], curved):
        _axes(axes, f"{run.name}: where the update goes", "step", "share of the squared update")
        parts = {part: _series(run, _SHARE + part) for part in PART_COLOURS}
        parts = {part: series for part, series in parts.items() if series[0]}
        if parts:
            steps = next(iter(parts.values()))[0]
            colours_of_parts = [PART_COLOURS[part] for part in parts]
            axes.stackplot(steps, *(values for _, values in parts.values()), colors=colours_of_parts, labels=parts)
            axes.set_xlim(min(steps), max(max(steps), min(steps) + 1))
            axes.set_ylim(0, 1)
            handles, labels = axes.get_legend_handles_labels()
            axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    caption = (
        "Left: 1 is sign descent, 0 a Newton-like step. The others: where the squared update goes. If nearly all of "
        "it goes to the embeddings, words are edited and not what the model knows."
    )
    return Drawing("curvature.png", "Curvature", caption, _png(figure), is_wide=True)


def _points(entries: list[dict], x: str, y: str) -> tuple[list[float], list[float]]:
    complete = [entry for entry in entries if entry.get(x) is not None and entry.get(y) is not None]
    floor = SMALLEST_P if y == "forget_quality" else 0.0
    return [entry[x] for entry in complete], [max(entry[y], floor) for entry in complete]


def _log10_truth_ratios(run: Run) -> np.ndarray:
    keys = ("paraphrased_nll", "perturbed_nll")
    rows = [row for row in run.rows if row["split"] == "forget" and None not in map(row.get, keys)]
    if not rows:
        return np.empty(0)
    return log_truth_ratios(*([row[key] for row in rows] for key in keys)) / np.log(10)


def _series(run: Run, key: str) -> tuple[list[int], list[float]]:
    entries = [entry for entry in run.log_history or [] if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def _axes(axes, title: str, x_label: str, y_label: str):
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()
