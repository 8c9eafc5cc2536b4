"""
The report as one page of HTML, which loads nothing: style, pictures, rows and the one script are in it, and a content
security policy lets nothing else run.
"""

from __future__ import annotations

import base64
import hashlib
import re
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from .columns import Column
from .examples import as_script_data, example_data, few_examples
from .runs import Run, run_colours, shown_columns
from .sentences import interval_text, table_note, value_text
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
    style = _file("page.css") + _run_style(runs)
    script = _file("page.js") if splits else ""
    sections = [
        f"<h1>{escape(title)}</h1>",
        _verdicts(runs, verdicts),
        *(f"<p>{escape(note)}</p>" for note in notes),
        _figures_section(runs, best, sentences),
        _pictures(drawings),
        _examples(runs, splits),
        _settings(runs),
    ]
    if splits:
        names = [run.name for run in runs]
        data = as_script_data({"runs": names, "splits": splits})
        sections += [f'<script type="application/json" id="data">{data}</script>', f"<script>{script}</script>"]
    body = "\n".join(section for section in sections if section)
    policy = f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _verdicts(runs: list[Run], verdicts: list[Verdict]) -> str:
    if not verdicts:
        return ""
    places = {run.name: place for place, run in enumerate(runs)}
    items = []
    for verdict in verdicts:
        kind, sign = VERDICT_SIGNS[verdict.kind]
        reasons = "\n".join(f"<li>{_unbroken(reason)}</li>" for reason in verdict.reasons)
        items.append(
            f'<article class="verdict {kind}">\n<p class="kind"><span class="sign" aria-hidden="true">{sign}</span>'
            f'{escape(verdict.title)} <span class="run run{places[verdict.run]}">{escape(verdict.run)}</span></p>\n'
            f"<div><p>{_unbroken(verdict.sentence)}</p>\n"
            f"<details><summary>Why</summary>\n<ul>\n{reasons}\n</ul></details></div>\n</article>"
        )
    note = '<p class="aside">Brackets hold 95% intervals. docs/verdict.md has the rules.</p>'
    body = "\n".join(items)
    several = " several" if len(verdicts) > 1 else ""
    return f'<section class="verdicts{several}" aria-label="Verdict">\n{body}\n{note}\n</section>'


def _unbroken(text: str) -> str:
    """No line ends within an interval."""
    return re.sub(r"\[([^][]+), ([^][]+)\]", "[\\1,\u00a0\\2]", escape(text))


def _figures_section(runs: list[Run], best: dict[str, set[str]], sentences: dict[str, str]) -> str:
    columns = shown_columns(runs)
    if not columns:
        return ""
    main = shown_columns(runs, main_only=True)
    others = [column for column in columns if column not in main]
    parts = [_table(main, runs, best, sentences), f'<p class="aside">{escape(table_note(runs))}</p>']
    if others:
        summary = f"<summary>{len(others)} more figures</summary>"
        parts.append(f"<details>{summary}\n{_table(others, runs, best, sentences)}</details>")
    return "\n".join([*parts, _readings(columns)])


def _table(columns: list[Column], runs: list[Run], best: dict[str, set[str]], sentences: dict[str, str]) -> str:
    heads = []
    for place, run in enumerate(runs):
        role = f"<small>{ROLE_WORDS[run.role]}</small>" if ROLE_WORDS[run.role] else ""
        heads.append(f'<th scope="col"><span class="run run{place}">{escape(run.name)}</span>{role}</th>')
    lines, group = [], None
    is_many = len(runs) > NUM_BESIDE
    is_grouped = len({column.group for column in columns}) > 1
    for column in columns:
        if is_grouped and column.group != group:
            group = column.group
            lines.append(f'<tr class="group"><th colspan="{len(runs) + 1}" scope="colgroup">{escape(group)}</th></tr>')
        arrow = f' <span class="arrow">{escape(column.arrow)}</span>' if column.arrow else ""
        name = f"{escape(column.name)}{arrow}"
        means = sentences.get(column.key)
        # No line ends within `p = 0.41`.
        means = re.sub(r"\bp ([=<]) ", "p\u00a0\\1\u00a0", means or "")
        means = f'<span class="means">{escape(means)}</span>' if means else ""
        cells = "".join(_cell(column, run, best) for run in runs)
        head = f'<th scope="row" title="{escape(column.reading)}">{name}{"" if is_many else means}</th>'
        lines.append(f"<tr>{head}{cells}</tr>")
        if is_many and means:
            lines.append(f'<tr class="meaning"><td colspan="{len(runs) + 1}">{means}</td></tr>')
    head, body, kind = "".join(heads), "\n".join(lines), " many" if is_many else ""
    return (
        f'<div class="scroll"><table class="figures-table{kind}"><thead><tr><td></td>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(column: Column, run: Run, best: dict[str, set[str]]) -> str:
    figure = run.figure(column.key)
    kinds = ["reference"] if run.role != "unlearned" else []
    value = escape(value_text(column, figure))
    if run.name in best.get(column.key, ()):
        kinds.append("best")
        value = f"<b>{value}</b>"
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    rows = f' title="{figure.num_rows} rows"' if figure and figure.num_rows else ""
    interval = interval_text(column, figure)
    small = f"<small>{escape(interval)}</small>" if interval else ""
    return f"<td{kind}{rows}>{value}{small}</td>"


def _readings(columns: list[Column]) -> str:
    items = (f"<dt>{escape(column.title)}</dt><dd>{escape(column.reading)}</dd>" for column in columns)
    items = "\n".join(items)
    return f'<details><summary>How to read each figure</summary>\n<dl class="readings">\n{items}\n</dl></details>'


def _pictures(drawings: list[Drawing]) -> str:
    if not drawings:
        return ""
    items = []
    for drawing in drawings:
        kind = ' class="wide"' if drawing.is_wide else ""
        data = base64.b64encode(drawing.png).decode("ascii")
        items.append(
            f'<figure{kind}><img alt="{escape(drawing.title)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(drawing.caption)}</figcaption></figure>"
        )
    return '<h2>Charts</h2>\n<div class="figures">\n' + "\n".join(items) + "\n</div>"


def _examples(runs: list[Run], splits: list[dict]) -> str:
    if not splits:
        return ""
    scores = sorted({split["score"] for split in splits if split["score"]})
    explained = f"<p>The number beside a name is {escape(' or '.join(scores))}.</p>\n" if scores else ""
    return (
        f"<h2>What the models say</h2>\n{explained}"
        '<section id="examples" aria-label="Examples" hidden>\n<div class="controls" role="search">\n'
        '<label>Search questions and answers<input type="search" id="query" autocomplete="off" spellcheck="false">'
        '</label>\n<label>Rows<select id="split"></select></label>\n'
        '<label id="order-label">Order<select id="order"></select></label>\n'
        '<output id="count" for="query split" aria-live="polite"></output>\n</div>\n'
        '<div id="list"></div>\n<button type="button" id="more">Show more</button>\n</section>\n'
        f"<noscript>\n<p>A few of the rows; with JavaScript all.</p>\n{few_examples(runs, splits)}\n</noscript>"
    )


def _settings(runs: list[Run]) -> str:
    blocks = []
    for run in runs:
        if run.settings:
            rows = "\n".join(
                f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(str(value))}</td></tr>'
                for name, value in run.settings.items()
            )
            blocks.append(
                f'<details><summary>{escape(run.name)}</summary>\n<div class="scroll"><table class="settings">'
                f"<tbody>\n{rows}\n</tbody></table></div></details>"
            )
    return "<h2>Settings</h2>\n" + "\n".join(blocks) if blocks else ""


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
