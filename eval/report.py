"""
Runs to a table for the terminal, a page of Markdown, a page of HTML and a section of a model card. Imports no torch:
a report can be made again, wherever its rows are.
"""

import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from .columns import Column
from .markdown import markdown_text
from .registry import column_of
from .rows import write_whole
from .runs import Run, shown_columns
from .sentences import interval_text, sentence, table_note, value_text, with_interval
from .statistics import Figure
from .templating import visible
from .verdict import Verdict, verdict, verdicts, write_verdicts


__all__ = ["Run", "add_to_model_card", "model_card_section", "table", "write_report"]

TABLE_WIDTH = 120
# Longer names give way to a column.
NAME_WIDTH, LONGEST_NAME = 16, 40
_BEGIN, _END = "<!-- soul-eval: begin -->", "<!-- soul-eval: end -->"


def table(runs: list[Run]) -> str:
    """
    The verdicts, if there is a model to compare with, and the figures of main interest, a run a line, as plain text of
    at most `TABLE_WIDTH` columns: with intervals where they fit in, and otherwise with the ends below. More
    columns than fit go into a block of their own.

    Args:
        runs (`list[Run]`): In the order of the lines.

    Returns:
        `str`: Without a final line break. `↑` means that higher is better, `↓` lower.
    """
    columns = shown_columns(runs, main_only=True)
    name_width = min(NAME_WIDTH, max([1, *(len(visible(run.name)) for run in runs)]))
    cells = [_text_cells(column, runs, is_inline=True) for column in columns]
    is_inline = name_width + sum(_width(each) for each in cells) <= TABLE_WIDTH
    if not is_inline:
        cells = [_text_cells(column, runs, is_inline=False) for column in columns]
    blocks, room = [], 0
    for each in cells:
        room -= _width(each)
        if room < 0 or not blocks:
            blocks.append([])
            room = TABLE_WIDTH - name_width - _width(each)
        blocks[-1].append(each)
    note = table_note(runs, *([] if is_inline else ["95% intervals stand below"]))
    num_more = len(shown_columns(runs)) - len(columns)
    note += f" {num_more} more figures are in the summary and the report." if num_more else ""
    # Names have what room the fullest block leaves, and the same in all of them.
    room = TABLE_WIDTH - max((sum(map(_width, block)) for block in blocks), default=0)
    said = [f"{_shortened(each.run, LONGEST_NAME)}: {each.kind}. {each.sentence}" for each in verdicts(runs)]
    said = [textwrap.fill(each, TABLE_WIDTH, subsequent_indent="  ") for each in said]
    is_compared = any(run.role != "unlearned" for run in runs)
    parts = ["\n".join(said)] if said and is_compared else []
    parts += [_text_block(block, runs, max(1, room)) for block in blocks]
    return visible("\n\n".join([*parts, textwrap.fill(note, TABLE_WIDTH)]))  # a name may hold what a terminal obeys


def _text_cells(column: Column, runs: list[Run], is_inline: bool) -> list[str]:
    """Two lines of head, then for each run the figure and what goes below it, all of one width."""
    figures = [run.figure(column.key) for run in runs]
    values = [value_text(column, figure) for figure in figures]
    intervals = [interval_text(column, figure) for figure in figures]
    below = [""] * len(runs)
    if is_inline and any(intervals):
        width = max(map(len, intervals))
        values = [f"{value} {interval.ljust(width)}" for value, interval in zip(values, intervals)]
    elif not is_inline:
        # A p-value's interval goes over orders of magnitude, and says nothing in little room.
        is_shown = [bool(interval) and not column.is_p_value for interval in intervals]
        below = [_ends(column, figure) if shown else "" for figure, shown in zip(figures, is_shown)]
    first, second = column.label
    lines = [first, " ".join(filter(None, (second, column.arrow)))]
    lines += [line for pair in zip(values, below) for line in pair]
    width = max(map(len, lines))
    return [line.rjust(width) for line in lines]


def _shortened(name: str, width: int) -> str:
    name = visible(name)
    return name if len(name) <= width else f"{name[: width - 1]}…"


def _ends(column: Column, figure: Figure) -> str:
    """The ends of an interval in little room: `.004-.048`."""
    return "-".join(re.sub(r"^(-?)0\.", r"\1.", column.text(end)) for end in (figure.low, figure.high))


def _width(cells: list[str]) -> int:
    return len(cells[0]) + 1


def _text_block(cells: list[list[str]], runs: list[Run], room: int) -> str:
    names = [_shortened(run.name, room) for run in runs]
    name_cells = ["", "", *(line for name in names for line in (name, ""))]
    width = max(map(len, name_cells))
    lines = [" ".join(line) for line in zip((name.ljust(width) for name in name_cells), *cells)]
    lines.insert(2, " ".join("-" * (_width(each) - 1) for each in [["-" * width], *cells]))
    return "\n".join(line.rstrip() for place, line in enumerate(lines) if place < 3 or line.strip())


def write_report(output_dir: str | os.PathLike, title: str, runs: list[Run], notes: str | Sequence[str] = ()) -> Path:
    """
    Writes `verdict.json`, `report.md`, the pictures as PNG files, and `report.html`, which holds them and needs
    nothing else. Both pages begin with the verdicts.

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
    said = {column.key: sentence(column, runs) for column in shown_columns(runs)}
    for drawing in drawings:
        write_whole(output / drawing.file, drawing.png)
    images = [
        f"![{markdown_text(drawing.title)}]({drawing.file})\n\n{markdown_text(drawing.caption)}"
        for drawing in drawings
    ]
    judged = verdicts(runs)
    write_verdicts(output, judged)
    parts = [f"# {markdown_text(title)}", verdict_table(judged), *map(markdown_text, notes), markdown_table(runs)]
    parts += [markdown_text(table_note(runs)), _sentences(said), *images, _readings(runs)]
    write_whole(output / "report.md", "\n\n".join(part for part in parts if part) + "\n")
    write_whole(output / "report.html", html_page(title, notes, runs, drawings, best_values(runs), said, judged))
    return output / "report.html"


def markdown_table(runs: list[Run]) -> str:
    """The figures, one a row, with their intervals; the best value of the unlearned models is bold."""
    best = best_values(runs)
    lines = [["", *(markdown_text(run.name) for run in runs)], ["---", *("---:" for _ in runs)]]
    for column in shown_columns(runs):
        cells = []
        for run in runs:
            figure = run.figure(column.key)
            text = value_text(column, figure)
            text = f"**{text}**" if run.name in best[column.key] else text
            cells.append(" ".join(filter(None, (text, interval_text(column, figure)))))
        lines.append([markdown_text(column.title), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict_table(judged: list[Verdict]) -> str:
    """The verdicts in Markdown: one with its reasons, or a table of several; empty if there is none."""
    if len(judged) == 1:
        (only,) = judged
        reasons = "\n".join(f"> - {markdown_text(reason)}" for reason in only.reasons)
        return f"> **{only.title}.** {markdown_text(only.sentence)}\n>\n{reasons}"
    lines = [["", "verdict", ""], ["---"] * 3]
    lines += [[markdown_text(each.run), f"**{each.title}**", markdown_text(each.sentence)] for each in judged]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if judged else ""


def best_values(runs: list[Run]) -> dict[str, set[str]]:
    """
    For each column the names of the unlearned models with the best value; none where fewer than two compete, or where
    the gold model's value is the goal and there is no gold model.
    """
    gold = next((run for run in runs if run.role == "gold"), None)
    best = {}
    for column in shown_columns(runs):
        values = {run.name: run.value(column.key) for run in runs if run.role == "unlearned"}
        values = {name: value for name, value in values.items() if value is not None}
        goal = gold and gold.value(column.key) if column.is_gold_best else column.goal
        is_near = isinstance(goal, (int, float))
        if len(values) < 2 or (column.is_gold_best and not is_near) or (column.better is None and not is_near):
            best[column.key] = set()
            continue
        if is_near:
            winner = min(values.values(), key=lambda value: abs(value - goal))
        else:
            winner = (max if column.better == "higher" else min)(values.values())
        best[column.key] = {name for name, value in values.items() if column.text(value) == column.text(winner)}
    return best


def model_card_section(run: Run, target: Run | None = None, gold: Run | None = None) -> str:
    """
    The verdict on a model and its figures, for its card.

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
    for column in shown_columns([run], main_only=True):
        values = [with_interval(column, each.figure(column.key)) for _, each in models]
        lines.append([markdown_text(column.title), *values, markdown_text(column.reading)])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    gold_note = " The gold model was trained without the rows to forget." if gold else ""
    tofu_note = " Their definitions are TOFU's (arXiv 2401.06121)." if run.figure("model_utility") else ""
    judged = verdict(run, target, gold)
    said = f"**{judged.title}.** {markdown_text(judged.sentence)}"
    note = f"{markdown_text(table_note([run]))}{gold_note}{tofu_note}"
    return f"## Evaluation of unlearning\n\n{said}\n\n{note}\n\n{rows}\n"


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


def _sentences(said: dict[str, str]) -> str:
    return "\n".join(
        f"- **{markdown_text(column_of(key).title)}**: {markdown_text(text)}" for key, text in said.items() if text
    )


def _readings(runs: list[Run]) -> str:
    lines = (f"- **{markdown_text(column.title)}**: {markdown_text(column.reading)}" for column in shown_columns(runs))
    return "## How to read the figures\n\n" + "\n".join(lines)
