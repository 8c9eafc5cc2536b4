"""
The report as one page of HTML, which loads nothing: style, pictures, rows and the one script are in it, and a content
security policy lets nothing else run.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import TYPE_CHECKING

from .columns import Column
from .examples import as_script_data, example_data, few_examples
from .runs import Run, run_colours, shown_columns
from .sentences import interval_text, table_note, value_text
from .templating import render, visible
from .verdict import CAME_BACK, CANNOT_TELL, DAMAGED, FORGOTTEN, NOT_FORGOTTEN, PARTLY_FORGOTTEN, Verdict


if TYPE_CHECKING:
    from .drawings import Drawing


# With more models, a figure's sentence goes below their values and not beside them.
NUM_BESIDE = 5
# Class and sign of each kind: colour alone would say nothing to some.
VERDICT_SIGNS = {
    FORGOTTEN: ("good", "✓"),
    PARTLY_FORGOTTEN: ("partly", "◐"),
    NOT_FORGOTTEN: ("bad", "✗"),
    DAMAGED: ("bad", "!"),
    CAME_BACK: ("bad", "↩"),
    CANNOT_TELL: ("open", "?"),
}
ROLE_WORDS = {"target": "before unlearning", "gold": "never saw the rows", "unlearned": ""}


def html_page(
    title: str,
    notes: list[str],
    runs: list[Run],
    drawings: list[Drawing],
    best: dict[str, set[str]],
    sentences: dict[str, str],
    verdicts: list[Verdict],
) -> str:
    """
    The whole page.

    Args:
        title (`str`): Of the page.
        notes (`list[str]`): Paragraphs under the title, plain text.
        runs (`list[Run]`): As in `write_report`.
        drawings (`list[Drawing]`): From `draw_all`.
        best (`dict[str, set[str]]`): For each column the names of the runs to point out.
        sentences (`dict[str, str]`): For each column what it means here.
        verdicts (`list[Verdict]`): On the unlearned models, in their order.

    Returns:
        `str`: HTML, in which everything that came from outside is escaped.
    """
    splits = example_data(runs)
    columns, main = shown_columns(runs), shown_columns(runs, main_only=True)
    style = _file("page.css") + _run_style(runs)
    script = _file("page.js") if splits else ""
    return render(
        "report.html",
        title=title,
        notes=notes,
        policy=f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}",
        style=style,
        script=script,
        runs=runs,
        role_words=ROLE_WORDS,
        places={run.name: place for place, run in enumerate(runs)},
        verdicts=[(verdict, VERDICT_SIGNS[verdict.kind]) for verdict in verdicts],
        is_many=len(runs) > NUM_BESIDE,
        columns=columns,
        main_lines=_lines(main, runs, best, sentences),
        other_lines=_lines([column for column in columns if column not in main], runs, best, sentences),
        table_note=table_note(runs),
        drawings=[(drawing, base64.b64encode(drawing.png).decode("ascii")) for drawing in drawings],
        data=as_script_data({"runs": [visible(run.name) for run in runs], "splits": splits}) if splits else "",
        scores=sorted({split["score"] for split in splits if split["score"]}),
        examples=few_examples(runs, splits),
        settings=[(run.name, list(run.settings.items())) for run in runs if run.settings],
    )


def _lines(columns: list[Column], runs: list[Run], best: dict[str, set[str]], sentences: dict[str, str]) -> list[dict]:
    """The lines of a table of figures; the first of a group has the group's name if there are several groups."""
    lines, group = [], None
    is_grouped = len({column.group for column in columns}) > 1
    for column in columns:
        is_first = is_grouped and column.group != group
        group = column.group
        lines.append(
            {
                "group": group if is_first else "",
                "name": column.name,
                "arrow": column.arrow,
                "reading": column.reading,
                # No line ends within `p = 0.41`.
                "sentence": re.sub(r"\bp ([=<]) ", "p\u00a0\\1\u00a0", sentences.get(column.key) or ""),
                "cells": [_cell(column, run, best) for run in runs],
            }
        )
    return lines


def _cell(column: Column, run: Run, best: dict[str, set[str]]) -> dict:
    figure = run.figure(column.key)
    is_best = run.name in best.get(column.key, ())
    return {
        "kinds": [*(["reference"] if run.role != "unlearned" else []), *(["best"] if is_best else [])],
        "is_best": is_best,
        "num_rows": figure.num_rows if figure else 0,
        "value": value_text(column, figure),
        "interval": interval_text(column, figure),
    }


def _run_style(runs: list[Run]) -> str:
    colours = run_colours(runs)
    dots = [f".run{place}::before {{ background: {colours[run.name]}; }}" for place, run in enumerate(runs)]
    return "\n".join([f".figures-table {{ --models: {len(runs)}; }}", *dots, ""])


def _file(name: str) -> str:
    return "\n" + files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(source: str) -> str:
    """What a content security policy calls a style or script by."""
    if not source:
        return "'none'"
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
