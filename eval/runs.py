"""A run, its figures, and how many rows they are made of. Imports no torch."""

import re
from collections import Counter
from dataclasses import dataclass, field

from .columns import Column
from .registry import SUITES, column_of, is_known, place_of
from .statistics import Figure


ROLES = ("unlearned", "target", "gold")
# Okabe's and Ito's colours, which all eyes can tell apart.
ROLE_COLOURS = {"target": "#767676", "gold": "#E69F00"}
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
# Figures that are means over the rows of a split.
_OF_SPLIT = re.compile(
    "(.+?)_(?:probability|truth_ratio|truth_share|rouge[L1](?:_recall|_f1)?|(?:embedding_|mention_)?accuracy)"
)
# What the settings hold besides settings.
MEASURED_SETTINGS = ("seconds_per_step",)


@dataclass
class Run:
    """
    What a report knows of a model.

    Attributes:
        name (`str`): What the report calls it.
        summary (`dict[str, Figure]`): From a suite's `summarise`; bare numbers, or figures read from JSON, will do.
        rows (`list[dict]`): What the summary was made of; may be empty.
        trajectory (`list[dict]`, *optional*): From [`~trajectory.TrajectoryCallback`]; see also [`Run.curve`].
        log_history (`list[dict]`, *optional*): The Trainer's `state.log_history`.
        settings (`dict`, *optional*): Settings to show; `seconds_per_step` becomes a column of the table.
        role (`str`, *optional*, defaults to `"unlearned"`):
            `"target"` is the model before unlearning, `"gold"` one that never saw what was to be forgotten.
        attacks (`dict[str, dict[str, dict[str, Recovery]]]`, *optional*): From [`~attacks.command.attack_models`].
    """

    name: str
    summary: dict[str, Figure]
    rows: list[dict] = field(default_factory=list)
    trajectory: list[dict] | None = None
    log_history: list[dict] | None = None
    settings: dict | None = None
    role: str = "unlearned"
    attacks: dict | None = None

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"`role` must be one of {ROLES}, but that of {self.name!r} is {self.role!r}.")

    def figure(self, key: str) -> Figure | None:
        """A figure of the summary or, failing that, a measurement of the settings; `None` where there is neither."""
        found = self.summary.get(key)
        if found is None and key in MEASURED_SETTINGS:
            found = (self.settings or {}).get(key)
        return found if found is None or isinstance(found, Figure) else Figure.from_json(found)

    def value(self, key: str) -> float | None:
        """The value of that figure."""
        figure = self.figure(key)
        return None if figure is None else figure.value

    def keys(self) -> list[str]:
        """Names of the figures that there are; counts of rows are none."""
        keys = [*self.summary, *(key for key in MEASURED_SETTINGS if key in (self.settings or {}))]
        return [key for key in dict.fromkeys(keys) if not _is_count(key) and self.figure(key) is not None]

    def curve(self) -> list[dict]:
        """The figures in the course of training: the trajectory or, where there is none, what the Trainer logged."""
        return trajectory_of(self.log_history or []) if self.trajectory is None else self.trajectory


def run_colours(runs: list[Run]) -> dict[str, str]:
    """A colour for each run's name, in tables and pictures alike."""
    unlearned = [run.name for run in runs if run.role == "unlearned"]
    colours = {name: RUN_COLOURS[place % len(RUN_COLOURS)] for place, name in enumerate(unlearned)}
    return {run.name: ROLE_COLOURS.get(run.role) or colours[run.name] for run in runs}


def trajectory_of(log_history: list[dict], prefix: str = "eval_") -> list[dict]:
    """
    A trajectory from the evaluations that a Trainer logged.

    Args:
        log_history (`list[dict]`): The Trainer's `state.log_history`.
        prefix (`str`, *optional*, defaults to `"eval_"`):
            What was put before the names; `"eval_small_"` where an evaluation was called `small` and not by its suite.

    Returns:
        `list[dict]`: An entry a step, `step` and the suites' figures, whose names have lost `prefix` and the suite's
        name: `eval_tofu_forget_quality` is `forget_quality`. What no report knows, as run times, is left out.
    """
    entries: dict[int, dict] = {}
    for logged in log_history:
        figures = {}
        for name, value in logged.items():
            whole = name.removeprefix(prefix)
            suite, _, key = whole.partition("_")
            if not name.startswith(prefix) or _is_count(whole):
                continue
            if suite in SUITES and key:
                # The figures of a suite may have its name in theirs: `wmdp_bio_accuracy`.
                is_own = [column_of(each).group.lower() == suite for each in (key, whole)] == [False, True]
                figures[whole if is_own else key] = value
            elif is_known(whole):
                figures[whole] = value
        if figures:
            entries.setdefault(logged["step"], {"step": logged["step"]}).update(figures)
    return [entries[step] for step in sorted(entries)]


def shown_columns(runs: list[Run], main_only: bool = False) -> list[Column]:
    """
    The columns for which at least one run has a value, in the order of the report.

    Args:
        runs (`list[Run]`): The runs.
        main_only (`bool`, *optional*, defaults to `False`): Leaves out those that are of less interest, if others are.
    """
    columns = [column_of(key) for key in sorted({key for run in runs for key in run.keys()}, key=place_of)]
    main = [column for column in columns if column.is_main]
    return main if main_only and any(column.group != "Cost" for column in main) else columns


def row_counts(runs: list[Run]) -> dict[str, tuple[int, int]]:
    """
    How many rows the figures are made of, least and most over the runs: by split where there are rows, counts of them
    or figures that name their split, else by group of figures.
    """
    counts: dict[str, list[int]] = {}
    for run in runs:
        for name, count in _counts_of(run).items():
            counts.setdefault(name, []).append(count)
    return {name: (min(found), max(found)) for name, found in counts.items()}


def _counts_of(run: Run) -> dict[str, int]:
    counts = dict(Counter(row["split"] for row in run.rows))
    counts = counts or {key.removesuffix("_rows"): int(run.value(key)) for key in run.summary if _is_count(key)}
    if counts:
        return counts
    figures = {key: run.figure(key).num_rows for key in run.keys() if run.figure(key).num_rows}
    splits = {key: found[1] for key in figures if (found := _OF_SPLIT.fullmatch(key))}
    names = splits or {key: column_of(key).group.lower() for key in figures}
    for key, name in names.items():
        counts[name] = max(figures[key], counts.get(name, 0))
    return counts


def _is_count(key: str) -> bool:
    return key.endswith("_rows")
