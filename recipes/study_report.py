"""The tables and the figure of a study, from rows that are kept: no model is needed."""

from pathlib import Path

from study_families import FAMILIES, OBJECTIVES

from soul_eval.study.drawing import draw_curves
from soul_eval.study.records import read_runs
from soul_eval.study.summary import summarise
from soul_eval.study.tables import study_tables


REFERENCE = "adamw"
LABELS = {name: family.label for name, family in FAMILIES.items()}
# Of each task's picture; all of them would hide each other.
DRAWN = ("adamw", "soul", "soul_diagonal", "soul_none", "forget_kronecker", "forget_none")


def write_study(folder: Path, levels: list[float]) -> None:
    """
    Writes `tables.md` and a picture for each task beside the rows.

    Args:
        folder (`Path`): Holds rows as `*.jsonl`.
        levels (`list[float]`): Forget probabilities at which families are compared.
    """
    runs = read_runs(sorted(folder.glob("*.jsonl")))
    parts = []
    for task in sorted({run.task for run in runs}):
        own = [run for run in runs if run.task == task]
        finished = {run.family for run in own if run.stage == "final"}
        if REFERENCE not in finished:
            continue
        compared = [run for run in own if run.family in finished]
        parts.append(study_tables(summarise(compared, REFERENCE, levels, levels[len(levels) // 2]), LABELS))
        objectives = [name for name in OBJECTIVES if any(run.objective == name for run in compared)]
        families = [name for name in DRAWN if name in finished]
        draw_curves(compared, folder / f"{task}.png", LABELS, objectives, families)
    (folder / "tables.md").write_text("\n".join(parts), encoding="utf-8")
