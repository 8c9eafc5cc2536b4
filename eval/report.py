"""
Runs to a table for the terminal, a page of Markdown, a page of HTML and a section of a model card. Imports no torch:
a report can be made again, wherever its rows are.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from .rows import write_whole
from .runs import ARROWS, COLUMNS, Run, shown_columns


__all__ = ["Run", "add_to_model_card", "model_card_section", "table", "write_report"]

TABLE_WIDTH = 120
_BEGIN, _END = "<!-- soul-eval: begin -->", "<!-- soul-eval: end -->"


def table(runs: list[Run]) -> str:
    """
    The runs, one a line, as plain text of at most `TABLE_WIDTH` columns.

    Args:
        runs (`list[Run]`): In the order of the lines.

    Returns:
        `str`: Without a final line break. `↑` means that higher is better, `↓` lower.
    """
    columns = shown_columns(runs)
    heads = [(column.label[0], f"{column.label[1]} {ARROWS[column.better]}") for column in columns]
    lines = [["", *(head[0] for head in heads)], ["", *(head[1] for head in heads)]]
    lines += [[run.name, *(column.text(run.value(column.key)) for column in columns)] for run in runs]
    widths = [max(map(len, column)) for column in zip(*lines)]
    widths[0] = max(1, min(widths[0], TABLE_WIDTH - sum(width + 1 for width in widths[1:])))
    for line in lines:
        if len(line[0]) > widths[0]:
            line[0] = line[0][: widths[0] - 1] + "…"
    lines.insert(2, ["-" * width for width in widths])
    aligned = (
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))] for line in lines
    )
    return "\n".join(" ".join(line).rstrip() for line in aligned)


def write_report(output_dir: str | os.PathLike, title: str, runs: list[Run], notes: str | Sequence[str] = ()) -> Path:
    """
    Writes `report.md`, the pictures as PNG files, and `report.html`, which holds them and needs nothing else.

    Args:
        output_dir (`str` or `os.PathLike`): The folder; it is made.
        title (`str`): Of both pages.
        runs (`list[Run]`): Unlearned models, and if there are any the target and the gold model.
        notes (`str` or `Sequence[str]`, *optional*): Paragraphs to go under the title.

    Returns:
        `Path`: `report.html`.

    Raises:
        ValueError: If there is no run, or two have the same name.
        ImportError: If matplotlib is not installed.
    """
    from .drawings import draw_all
    from .page import html_page

    names = [run.name for run in runs]
    if not runs or len(set(names)) < len(names):
        raise ValueError(f"`runs` needs at least one run, and a name of its own for each, but it has {names}.")
    output = Path(output_dir)
    notes = [notes] if isinstance(notes, str) else list(notes)
    drawings = draw_all(runs)
    for drawing in drawings:
        write_whole(output / drawing.file, drawing.png)
    images = [f"![{_cell(drawing.title)}]({drawing.file})\n\n{drawing.caption}" for drawing in drawings]
    parts = [f"# {title}", *notes, markdown_table(runs), _readings(runs), *images]
    write_whole(output / "report.md", "\n\n".join(parts) + "\n")
    write_whole(output / "report.html", html_page(title, notes, runs, drawings, best_values(runs)))
    return output / "report.html"


def markdown_table(runs: list[Run]) -> str:
    """The runs, one a row; the best value of the unlearned models is bold."""
    columns = shown_columns(runs)
    best = best_values(runs)
    lines = [["", *(column.title for column in columns)], ["---", *("---:" for _ in columns)]]
    for run in runs:
        cells = []
        for column in columns:
            text = column.text(run.value(column.key))
            cells.append(f"**{text}**" if run.name in best[column.key] else text)
        lines.append([_cell(run.name), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def best_values(runs: list[Run]) -> dict[str, set[str]]:
    """
    For each column the names of the unlearned models with the best value; none where fewer than two compete, or where
    the gold model's value is the goal and there is no gold model.
    """
    best = {}
    gold = next((run for run in runs if run.role == "gold"), None)
    for column in COLUMNS:
        values = {run.name: run.value(column.key) for run in runs if run.role == "unlearned"}
        values = {name: value for name, value in values.items() if value is not None}
        if len(values) < 2:
            best[column.key] = set()
            continue
        goal = gold.value(column.key) if gold and column.is_gold_best else None
        if column.is_gold_best and goal is None:
            best[column.key] = set()
            continue
        if goal is not None:
            winner = min(values.values(), key=lambda value: abs(value - goal))
        else:
            winner = (max if column.better == "higher" else min)(values.values())
        best[column.key] = {name for name, value in values.items() if column.text(value) == column.text(winner)}
    return best


def model_card_section(run: Run, target: Run | None = None, gold: Run | None = None) -> str:
    """
    The figures of a model, for its card.

    Args:
        run (`Run`): The model that the card is of.
        target (`Run`, *optional*): The model before unlearning.
        gold (`Run`, *optional*): A model that never saw what was to be forgotten.

    Returns:
        `str`: Markdown, for [`add_to_model_card`].
    """
    models = [("this model", run), ("before unlearning", target), ("gold model", gold)]
    models = [(name, each) for name, each in models if each is not None]
    lines = [["figure", *(name for name, _ in models), "how to read it"], ["---", *("---:" for _ in models), "---"]]
    for column in shown_columns([run]):
        values = [column.text(each.value(column.key)) for _, each in models]
        lines.append([column.title, *values, column.reading])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    gold_note = " The gold model was trained without the rows to forget." if gold else ""
    return (
        "## Evaluation of unlearning\n\n"
        f"Figures as TOFU (arXiv 2401.06121) defines them; ↑ higher is better, ↓ lower.{gold_note}\n\n{rows}\n"
    )


def add_to_model_card(path: str | os.PathLike, section: str) -> None:
    """
    Puts a section into a model card, in the place of the one that was put there before.

    Args:
        path (`str` or `os.PathLike`): The card, `README.md`; it is made if it is not there.
        section (`str`): From [`model_card_section`].
    """
    path = Path(path)
    card = path.read_text(encoding="utf-8") if path.exists() else ""
    before, begin, rest = card.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and not end:
        raise ValueError(f"{path} has {_BEGIN} and no {_END}: add it where the section ends.")
    before = before.rstrip() + "\n\n" if before.strip() else ""
    write_whole(path, f"{before}{_BEGIN}\n{section.strip()}\n{_END}\n{after.lstrip()}")


def _readings(runs: list[Run]) -> str:
    return "\n".join(f"- **{column.title}**: {column.reading}" for column in shown_columns(runs))


def _cell(text: str) -> str:
    """Text that cannot end a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
