"""The report as one page of HTML, which loads nothing: style and pictures are in it, and it needs no script."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING

from .runs import Run, shown_columns


if TYPE_CHECKING:
    from .drawings import Drawing


NUM_EXAMPLES = 10

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5d6470; --paper: #fbfbfa; --card: #ffffff; --line: #e2e4e8;
  --accent: #0072b2; --best: #e3f1f9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e9eb; --soft: #a2a9b4; --paper: #16181b; --card: #1f2226;
  --line: #353a41; --accent: #56b4e9; --best: #17364a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 0.9rem; }
p { max-width: 46rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { padding: 0.55rem 0.6rem; text-align: right; }
td, th[scope=row] { white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; line-height: 1.25; }
tbody tr { border-top: 1px solid var(--line); }
th[scope=row] { text-align: left; color: var(--ink); }
td.best { background: var(--best); font-weight: 700; }
tr.reference td, tr.reference th { color: var(--soft); font-weight: 400; font-style: italic; }
dl.readings { display: grid; grid-template-columns: max-content 1fr; gap: 0.35rem 1.1rem; font-size: 0.92rem; }
dl.readings dt { font-weight: 600; } dl.readings dd { margin: 0; color: var(--soft); max-width: 48rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.25rem; }
figure { margin: 0; padding: 0.9rem; border: 1px solid var(--line); border-radius: 10px; background: var(--card); }
figure.wide { grid-column: 1 / -1; }
figure img { display: block; width: 100%; height: auto; border-radius: 6px; }
figcaption { margin-top: 0.7rem; font-size: 0.88rem; color: var(--soft); }
.example { margin: 0 0 1rem; padding: 0.9rem 1.1rem; border: 1px solid var(--line); border-radius: 10px;
  background: var(--card); }
.example h3 { margin: 0 0 0.6rem; font-size: 1rem; }
.example dl { display: grid; grid-template-columns: 9rem 1fr 3.2rem; gap: 0.3rem 1rem; margin: 0; font-size: 0.92rem; }
.example dt { color: var(--soft); overflow-wrap: anywhere; } .example dd { margin: 0; overflow-wrap: anywhere; }
.example dd.score { text-align: right; color: var(--soft); font-variant-numeric: tabular-nums; }
.example .truth { font-weight: 600; }
details { margin: 0.6rem 0; } summary { cursor: pointer; color: var(--accent); }
details td, details th { text-align: left; white-space: normal; overflow-wrap: anywhere; padding: 0.3rem 0.75rem; }
@media (max-width: 40rem) { dl.readings, .example dl { grid-template-columns: 1fr; } dl.readings dd,
  .example dd { margin-bottom: 0.4rem; } .example dd.score { text-align: left; } }
""".strip()


def html_page(
    title: str, notes: list[str], runs: list[Run], drawings: list[Drawing], best: dict[str, set[str]]
) -> str:
    """
    The whole page.

    Args:
        title (`str`): Of the page.
        notes (`list[str]`): Paragraphs under the title, plain text.
        runs (`list[Run]`): As in `write_report`.
        drawings (`list[Drawing]`): From `draw_all`.
        best (`dict[str, set[str]]`): For each column the names of the runs to point out.

    Returns:
        `str`: HTML, in which everything that came from outside is escaped.
    """
    sections = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        _table(runs, best),
        "<h2>How to read it</h2>",
        _readings(runs),
        _figures(drawings),
        _examples(runs),
        _settings(runs),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _table(runs: list[Run], best: dict[str, set[str]]) -> str:
    columns = shown_columns(runs)
    titles = [escape(c.title).replace(" ↑", "&nbsp;↑").replace(" ↓", "&nbsp;↓") for c in columns]
    head = "".join(f'<th scope="col" title="{escape(c.reading)}">{t}</th>' for c, t in zip(columns, titles))
    rows = []
    for run in runs:
        cells = [f'<th scope="row">{escape(run.name)}</th>']
        for column in columns:
            mark = ' class="best"' if run.name in best[column.key] else ""
            cells.append(f"<td{mark}>{escape(column.text(run.value(column.key)))}</td>")
        kind = "" if run.role == "unlearned" else ' class="reference"'
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _readings(runs: list[Run]) -> str:
    items = (f"<dt>{escape(c.title)}</dt><dd>{escape(c.reading)}</dd>" for c in shown_columns(runs))
    return '<dl class="readings">\n' + "\n".join(items) + "\n</dl>"


def _figures(drawings: list[Drawing]) -> str:
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
    return '<h2>Figures</h2>\n<div class="figures">\n' + "\n".join(items) + "\n</div>"


def _examples(runs: list[Run]) -> str:
    """Forget rows that are spread over the split, with what each model says."""
    by_run = [
        {row["index"]: row for row in run.rows if row["split"] == "forget" and row.get("generation") is not None}
        for run in runs
    ]
    questions = {index: row for rows in by_run for index, row in rows.items() if row.get("question")}
    if not questions:
        return ""
    indices = list(questions)
    count = min(NUM_EXAMPLES, len(indices))
    chosen = [indices[place * len(indices) // count] for place in range(count)]
    blocks = []
    for index in chosen:
        answer = questions[index].get("answer") or ""
        lines = [f'<dt>true answer</dt><dd class="truth">{escape(answer)}</dd><dd></dd>']
        for run, rows in zip(runs, by_run):
            if index in rows:
                score = rows[index].get("rougeL_recall")
                shown = "" if score is None else f"{score:.2f}"
                text = rows[index]["generation"] or "(nothing)"
                lines.append(
                    f'<dt>{escape(run.name)}</dt><dd>{escape(text)}</dd><dd class="score" title="ROUGE-L recall">'
                    f"{shown}</dd>"
                )
        question = escape(questions[index]["question"])
        blocks.append(f'<div class="example"><h3>{question}</h3><dl>\n' + "\n".join(lines) + "\n</dl></div>")
    return (
        "<h2>What was to be forgotten, and what the models say</h2>\n<p>The number is the ROUGE-L recall: the share "
        "of the true answer that is in the model's.</p>\n" + "\n".join(blocks)
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
                f'<details><summary>{escape(run.name)}</summary>\n<div class="scroll"><table><tbody>\n{rows}\n'
                "</tbody></table></div></details>"
            )
    return "<h2>Settings</h2>\n" + "\n".join(blocks) if blocks else ""
