"""The rows of a study as Markdown."""

from collections.abc import Iterable, Mapping, Sequence

from .summary import Kept, Row


MISSING = "–"


def study_tables(rows: Sequence[Row], labels: Mapping[str, str] | None = None) -> str:
    """
    All tables of a study: for every task what is kept, then the rest by objective.

    Args:
        rows (`Sequence[Row]`): From [`~summary.summarise`], of any tasks.
        labels (`Mapping[str, str]`, *optional*):
            What tables call families, in the order to show them. Families that it lacks follow by name.
    """
    parts = []
    for task in sorted({row.task for row in rows}):
        own = [row for row in rows if row.task == task]
        parts += [f"## {task}", kept_table(own, labels)]
        for objective in sorted({row.objective for row in own}):
            parts += [f"### {task}, {objective}", detail_table([r for r in own if r.objective == objective], labels)]
    return "\n\n".join(parts) + "\n"


def kept_table(
    rows: Sequence[Row], labels: Mapping[str, str] | None = None, objectives: Sequence[str] | None = None
) -> str:
    """
    Families down, objectives across; in a cell what is kept at each level and, below it, the paired difference.

    Args:
        rows (`Sequence[Row]`): Of one task.
        labels (`Mapping[str, str]`, *optional*): As in [`study_tables`].
        objectives (`Sequence[str]`, *optional*): Which, in which order; all by name by default.

    Raises:
        ValueError: If the rows are of more than one task, or a family has two rows of an objective.
    """
    cells = _by_place(rows)
    objectives = sorted({row.objective for row in rows}) if objectives is None else list(objectives)
    lines = [_line(["family", *objectives]), _line(["---"] * (1 + len(objectives)))]
    for family in ordered_families((row.family for row in rows), labels):
        found = [cells.get((family, objective)) for objective in objectives]
        lines.append(_line([_label(family, labels), *(MISSING if row is None else _kept_cell(row) for row in found)]))
    return "\n".join([*lines, "", _kept_caption(rows, labels)])


def detail_table(rows: Sequence[Row], labels: Mapping[str, str] | None = None) -> str:
    """
    Whatever else is known of the families on one objective of one task.

    Args:
        rows (`Sequence[Row]`): Of one task and objective.
        labels (`Mapping[str, str]`, *optional*): As in [`study_tables`].
    """
    cells = {family: row for (family, _), row in _by_place(rows).items()}
    if len(cells) != len(rows):
        raise ValueError("`rows` must be of one objective.")
    head = ["family", "setting", "tried", "land", "seeds", "hypervolume", "forget quality", "relearned"]
    head += ["4 bits: forget", "4 bits: held-out", "s/step", "state, MB"]
    lines = [_line(head), _line(["---"] * 2 + ["---:"] * (len(head) - 2))]
    for family in ordered_families(cells, labels):
        row = cells[family]
        failed = f" ({row.num_failed} failed)" if row.num_failed else ""
        lines.append(
            _line(
                [
                    _label(family, labels),
                    _setting(row.setting),
                    str(row.num_settings),
                    _number(row.landing, ".0%"),
                    f"{len(row.seeds)}{failed}",
                    _number(row.hypervolume, ".3f"),
                    _number(row.forget_quality, ".2g"),
                    _number(row.relearned, ".2f"),
                    _number(row.rounded_forget, "+.3f"),
                    _number(row.rounded_held_out, "+.3f"),
                    _number(row.seconds_per_step, ".3g"),
                    _number(None if row.state_bytes is None else row.state_bytes / 1e6, ".3g"),
                ]
            )
        )
    return "\n".join(lines)


def ordered_families(families: Iterable[str], labels: Mapping[str, str] | None = None) -> list[str]:
    """Each family once, those that have a label in the order of the labels, then the others by name."""
    places = {family: place for place, family in enumerate(labels or {})}
    return sorted(set(families), key=lambda family: (places.get(family, len(places)), family))


def _by_place(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    tasks = sorted({row.task for row in rows})
    if len(tasks) != 1:
        raise ValueError(f"`rows` must be of one task, but they are of {tasks}.")
    cells = {(row.family, row.objective): row for row in rows}
    if len(cells) != len(rows):
        raise ValueError("`rows` must have one row for a family and an objective, but some have more.")
    return cells


def _kept_cell(row: Row) -> str:
    if not row.kept:
        return MISSING
    kept = " / ".join(map(_kept, row.kept))
    difference = row.difference
    if difference is None:
        return kept
    if difference.low is None:
        return f"{kept}<br>{difference.mean:+.3f}"
    interval = f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    fewer = f" ({difference.num_seeds} seeds)" if difference.num_seeds != len(row.seeds) else ""
    return f"{kept}<br>{interval}{fewer}"


def _kept(kept: Kept) -> str:
    if kept.mean is None:
        return MISSING
    return f"{kept.mean:.2f}" + (
        f" ({kept.num_reached}/{kept.num_seeds})" if kept.num_reached < kept.num_seeds else ""
    )


def _kept_caption(rows: Sequence[Row], labels: Mapping[str, str] | None) -> str:
    levels = next((row.kept for row in rows if row.kept), ())
    first = rows[0]
    seeds = sorted({len(row.seeds) for row in rows if row.seeds})
    counts = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))) if seeds else "no"
    where = "averaged over these levels" if first.compared_at is None else f"at {first.compared_at:g}"
    return (
        f"Share of the target's held-out probability at a forget probability of "
        f"{' / '.join(f'{kept.level:g}' for kept in levels)}: means over the seeds that get there ({MISSING}: none "
        f"does; 2/3: two of three do), {counts} seed{'' if seeds == [1] else 's'}. Below: the difference from "
        f"{_label(first.reference, labels)} by seed, {where}, where a level not reached counts 0, with its 95% "
        "interval (Student's t)."
    )


def _setting(setting: Mapping) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in sorted(setting.items()))


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _label(family: str, labels: Mapping[str, str] | None) -> str:
    return (labels or {}).get(family, family)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
