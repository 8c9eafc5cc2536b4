"""The tables and the figure of a study, from rows that are kept: no model is needed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from soul_eval.markdown import markdown_text
from soul_eval.study.drawing import draw_curves
from soul_eval.study.figures import best_setting
from soul_eval.study.records import Run, read_runs
from soul_eval.study.summary import summarise
from soul_eval.study.tables import detail_table, difference_table, kept_table
from soul_recipes.study_families import FAMILIES, OBJECTIVES, SMALLEST, levels_of


REFERENCE = "adamw"
LABELS = {name: family.label for name, family in FAMILIES.items()}
# Of each task's picture; all of them would hide each other.
DRAWN = ("adamw", "soul", "soul_none", "forget_kronecker", "forget_none")


def finished(runs: Sequence[Run], levels: Sequence[float]) -> list[str]:
    """The families of an objective that have final runs of the setting for every level."""
    families = []
    for name, family in FAMILIES.items():
        own = [run for run in runs if run.family == name]
        search, final = ([run for run in own if run.stage == stage] for stage in ("search", "final"))
        wanted = [best_setting(search, level) for level in levels] if family.varied and search else [{}]
        if final and all(any(run.setting == setting for run in final) for setting in wanted):
            families.append(name)
    return families


def with_settings(runs: Sequence[Run], task: str) -> list[Run]:
    """The runs of a task. A family that was not searched there brings the search on the smallest model."""
    own = [run for run in runs if run.task == task]
    searched = {run.family for run in own if run.stage == "search"}
    borrowing = {(run.family, run.objective) for run in own if run.family not in searched}
    found = [run for run in runs if (run.task, run.stage) == (SMALLEST, "search")]
    return own + [replace(run, task=task) for run in found if (run.family, run.objective) in borrowing]


def write_study(folder: Path) -> None:
    """
    Writes `tables.md` and a picture for each task beside the rows.

    Args:
        folder (`Path`): Holds rows as `*.jsonl`.
    """
    runs = read_runs(sorted(folder.glob("*.jsonl")))
    parts = []
    for task in sorted({run.task for run in runs}):
        own = with_settings(runs, task)
        objectives = [name for name in OBJECTIVES if any(run.objective == name for run in own)]
        for objective in objectives:
            some = [run for run in own if run.objective == objective]
            levels = levels_of(objective)
            middle = levels[1:2]
            for depths in (levels, middle):
                names = finished(some, depths)
                compared = [run for run in some if run.family in names]
                # What has all levels is in the first table; the second is for what has one.
                is_news = depths == levels or set(names) != set(finished(some, levels))
                if REFERENCE in names and len(names) > 1 and is_news:
                    rows = summarise(compared, REFERENCE, depths, middle[0])
                    title = f"## {markdown_text(f'{task}, {objective}')}, at {', '.join(map(str, depths))}"
                    tables = (kept_table(rows, LABELS), difference_table(rows, LABELS), detail_table(rows, LABELS))
                    parts += [title, *tables]
        drawn = [name for name in objectives if name in ("ga", "npo", "simnpo")]
        at_middle = {
            name: finished([run for run in own if run.objective == name], levels_of(name)[1:2]) for name in drawn
        }
        families = [name for name in DRAWN if any(name in names for names in at_middle.values())]
        if REFERENCE in families:
            shown = [run for run in own if run.objective in drawn and run.family in at_middle[run.objective]]
            draw_curves(shown, folder / f"{task}.png", LABELS, drawn, families)
    (folder / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
