"""The rows of a study as Markdown."""

from collections.abc import Iterable, Mapping, Sequence

from ..markdown import markdown_text
from .figures import PairedDifference
from .summary import Kept, Row, rows_by_place


MISSING = "–"


def study_tables(rows: Sequence[Row], labels: Mapping[str, str] | None = None) -> str:
    """
    All tables of a study: for every task what is kept, then differences and the rest by objective.

    Args:
        rows (`Sequence[Row]`): From [`~summary.summarise`], of any tasks.
        labels (`Mapping[str, str]`, *optional*):
            What tables call families, in the order to show them. Families that it lacks follow by name.
    """
    parts = []
    for task in sorted({row.task for row in rows}):
        own = [row for row in rows if row.task == task]
        parts += [f"## {markdown_text(task)}", kept_table(own, labels)]
        for objective in sorted({row.objective for row in own}):
            some = [row for row in own if row.objective == objective]
            parts += [
                f"### {markdown_text(f'{task}, {objective}')}",
                difference_table(some, labels),
                detail_table(some, labels),
            ]
    return "\n\n".join(parts) + "\n"


def kept_table(
    rows: Sequence[Row],
    labels: Mapping[str, str] | None = None,
    objectives: Sequence[str] | None = None,
    compared_at: float | None = None,
) -> str:
    """
    Families down, objectives across; in a cell what is kept at each level and, below it, one paired difference.

    Args:
        rows (`Sequence[Row]`): Of one task.
        labels (`Mapping[str, str]`, *optional*): As in [`study_tables`].
        objectives (`Sequence[str]`, *optional*): Which, in which order; all by name by default.
        compared_at (`float`, *optional*): The level of the difference; the mean over levels by default.

    Raises:
        ValueError: If the rows are of more than one task, or a family has two rows of an objective.
    """
    cells = rows_by_place(rows)
    objectives = sorted({row.objective for row in rows}) if objectives is None else list(objectives)
    lines = _head(["family", *map(markdown_text, objectives)])
    for family in ordered_families((row.family for row in rows), labels):
        found = [cells.get((family, objective)) for objective in objectives]
        texts = [MISSING if row is None else _kept_cell(row, compared_at) for row in found]
        lines.append(_line([_label(family, labels), *texts]))
    return "\n".join([*lines, "", _kept_caption(rows, labels, compared_at)])


def difference_table(rows: Sequence[Row], labels: Mapping[str, str] | None = None) -> str:
    """
    The paired differences from the reference on one objective of one task: families down, levels across.

    Args:
        rows (`Sequence[Row]`): Of one task and objective.
        labels (`Mapping[str, str]`, *optional*): As in [`study_tables`].
    """
    cells = _by_family(rows)
    levels = list(rows[0].settings)
    lines = _head([f"less {_label(rows[0].reference, labels)}", *(f"at {level:g}" for level in levels), "mean"])
    for family in ordered_families(cells, labels):
        row = cells[family]
        texts = [_difference(row, level) or MISSING for level in (*levels, None)]
        if family != row.reference:
            lines.append(_line([_label(family, labels), *texts]))
    return "\n".join(lines)


def detail_table(rows: Sequence[Row], labels: Mapping[str, str] | None = None) -> str:
    """
    Whatever else is known of the families on one objective of one task.

    Args:
        rows (`Sequence[Row]`): Of one task and objective.
        labels (`Mapping[str, str]`, *optional*): As in [`study_tables`].
    """
    cells = _by_family(rows)
    head = ["family", "setting", "tried", "land", "seeds", "hypervolume", "forget quality", "relearned"]
    head += ["4 bits: forget", "4 bits: held-out", "general, nats", "s/step", "state, MB"]
    lines = _head(head, num_texts=2)
    for family in ordered_families(cells, labels):
        row = cells[family]
        failed = f" ({row.num_failed} failed)" if row.num_failed else ""
        lines.append(
            _line(
                [
                    _label(family, labels),
                    _settings(row.settings),
                    str(row.num_settings),
                    _number(row.landing, ".0%"),
                    f"{len(row.seeds)}{failed}",
                    _number(row.hypervolume, ".3f"),
                    _number(row.forget_quality, ".2g"),
                    _number(row.relearned, "+.2f"),
                    _number(row.rounded_forget, "+.3f"),
                    _number(row.rounded_held_out, "+.3f"),
                    _number(row.general, "+.3f"),
                    _number(row.seconds_per_step, ".3g"),
                    _number(None if row.state_bytes is None else row.state_bytes / 1e6, ".3g"),
                ]
            )
        )
    return "\n".join([*lines, "", _detail_caption(rows[0].detail_level)])


def ordered_families(families: Iterable[str], labels: Mapping[str, str] | None = None) -> list[str]:
    """Each family once, those that have a label in the order of the labels, then the others by name."""
    places = {family: place for place, family in enumerate(labels or {})}
    return sorted(set(families), key=lambda family: (places.get(family, len(places)), family))


def _by_family(rows: Sequence[Row]) -> dict[str, Row]:
    cells = {family: row for (family, _), row in rows_by_place(rows).items()}
    if len({row.objective for row in rows}) != 1:
        raise ValueError("`rows` must be of one objective.")
    return cells


def _kept_cell(row: Row, compared_at: float | None) -> str:
    if not row.kept:
        return MISSING
    kept = " / ".join(map(_kept, row.kept.values()))
    difference = _difference(row, compared_at)
    return kept if difference is None else f"{kept}<br>{difference}"


def _difference(row: Row, level: float | None) -> str | None:
    """A difference with its interval, and its seeds where they are not all of the row's."""
    if level is not None and level not in row.settings:
        raise ValueError(f"`compared_at` must be one of {tuple(row.settings)}, but it is {level}.")
    found: PairedDifference | None = row.mean_difference if level is None else row.differences.get(level)
    if found is None:
        return None
    interval = "" if found.low is None else f" [{found.low:+.3f}, {found.high:+.3f}]"
    count = f" ({found.num_seeds} seed{'' if found.num_seeds == 1 else 's'})"
    fewer = count if found.num_seeds != len(row.seeds) else ""
    return f"{found.mean:+.3f}{interval}{fewer}"


def _kept(kept: Kept) -> str:
    if kept.mean is None:
        return MISSING
    return f"{kept.mean:.2f}" + (
        f" ({kept.num_reached}/{kept.num_seeds})" if kept.num_reached < kept.num_seeds else ""
    )


def _kept_caption(rows: Sequence[Row], labels: Mapping[str, str] | None, compared_at: float | None) -> str:
    first = rows[0]
    seeds = sorted({len(row.seeds) for row in rows if row.seeds})
    counts = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))) if seeds else "no"
    where = "averaged over these levels" if compared_at is None else f"at {compared_at:g}"
    return (
        f"Largest share of the target's held-out probability in the course of training at a forget probability of at "
        f"most {' / '.join(f'{level:g}' for level in first.settings)}, each with the setting that the search chose "
        f"for it: means over the seeds that get there ({MISSING}: none does; 2/3: two of three do), {counts} "
        f"seed{'' if seeds == [1] else 's'}. Below: the difference from {_label(first.reference, labels)} by seed, "
        f"{where}, where a level not reached counts 0, with its 95% interval (Student's t)."
    )


def _detail_caption(level: float) -> str:
    return (
        f"Of the setting for {level:g}, except where settings are given by level. relearned: what the forget "
        "probability of rows that were not relearned gains by relearning others. 4 bits: what rounding the last model "
        f"changes. general: what general text costs more than the target's, where most is kept at {level:g}."
    )


def _settings(settings: Mapping[float, Mapping]) -> str:
    """One text if all levels have the same setting, or else a line for the levels of each."""
    levels: dict[str, list[str]] = {}
    for level, setting in settings.items():
        levels.setdefault(_setting(setting), []).append(f"{level:g}")
    if len(levels) == 1:
        return next(iter(levels))
    return "<br>".join(f"{', '.join(own)}: {setting}" for setting, own in levels.items())


def _setting(setting: Mapping) -> str:
    return ", ".join(markdown_text(f"{name} {_plain(value)}") for name, value in sorted(setting.items())) or "defaults"


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _label(family: str, labels: Mapping[str, str] | None) -> str:
    return markdown_text((labels or {}).get(family, family))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(cells: Sequence[str], num_texts: int | None = None) -> list[str]:
    """A table's first two lines; the columns after its texts are numbers."""
    num_texts = len(cells) if num_texts is None else num_texts
    return [_line(cells), _line(["---"] * num_texts + ["---:"] * (len(cells) - num_texts))]
