import base64
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from test_eval_metrics import random_rows

from soul_eval.report import Run, add_to_model_card, best_values, model_card_section, table, write_report
from soul_eval.suites.tofu import summarise


EVIL = '<script>alert("x")</script> & | pipe'
PICTURES = [
    "curvature.png",
    "forget_quality_against_model_utility.png",
    "held_out_probability_against_forget_probability.png",
    "losses.png",
    "truth_ratios.png",
]


def make_runs():
    """Target, gold and two unlearned models, with texts that must be escaped."""
    rng = np.random.default_rng(0)
    gold = random_rows(9, num_rows=12)
    runs = []
    for place, (name, role) in enumerate(
        [("target", "target"), ("gold", "gold"), ("A", "unlearned"), (EVIL, "unlearned")]
    ):
        rows = gold if role == "gold" else random_rows(place, num_rows=12)
        for row in rows:
            row |= {"question": f"{EVIL} {row['index']}?", "answer": EVIL, "generation": f"{name} says {EVIL}"}
        summary = summarise(rows, gold)
        run = Run(name, summary, rows, role=role)
        if role == "unlearned":
            run.trajectory = [{"step": step, **summary, "forget_quality": 10.0**-step} for step in range(0, 50, 10)]
            run.log_history = [{"step": s, "loss": -s, "forget_loss": -s, "retain_loss": 1.0} for s in range(5)]
            run.settings = {"rho": EVIL, "seconds_per_step": 0.1 * place}
        if name == EVIL:
            shares = rng.dirichlet(np.ones(5), 5)
            parts = ("embeddings", "head", "attention", "mlp", "other")
            run.log_history += [
                {"step": step, "curvature/clipped": 0.5}
                | {f"curvature/update_share/{part}": share for part, share in zip(parts, shares[step])}
                for step in range(5)
            ]
        runs.append(run)
    return runs


class Page(HTMLParser):
    """What of a page a browser would load or run, and whether its tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.links, self.handlers = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset")]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_complete_and_needs_nothing_else(tmp_path):
    """Catches pictures left beside the page, anything fetched from a network, and text that runs as a script."""
    path = write_report(tmp_path / "report", f"Title {EVIL}", make_runs(), [f"Note {EVIL}"])
    assert path == tmp_path / "report" / "report.html"
    assert sorted(os.listdir(tmp_path / "report")) == sorted([*PICTURES, "report.html", "report.md"])
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and page.handlers == []
    assert "script" not in page.tags and "link" not in page.tags
    assert len(page.links) == 5 and all(link.startswith("data:image/png;base64,") for link in page.links)
    pictures = {base64.b64decode(link.partition(",")[2]) for link in page.links}
    assert pictures == {(path.parent / name).read_bytes() for name in PICTURES}
    assert not re.search(r"https?://|url\(|@import", text)
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; | pipe 0?" in text
    assert text.count('class="example"') == 10 and text.count("target says") == 10


def test_report_names_the_best_and_says_how_to_read_it(tmp_path):
    """
    Catches references that compete with the models, a lower value taken for the worse one, and a destroyed model that
    wins where the gold model's value is the goal.
    """
    runs = make_runs()
    runs[1].summary |= {"forget_probability": 0.12, "forget_truth_ratio": 0.7}
    runs[2].summary |= {"forget_quality": 0.2, "forget_probability": 0.3, "model_utility": 0.5}
    runs[2].summary |= {"forget_truth_ratio": 0.65}
    runs[3].summary |= {"forget_truth_ratio": 0.99}
    runs[3].summary |= {"forget_quality": 1e-9, "forget_probability": 0.1, "model_utility": 0.5}
    write_report(tmp_path, "Title", runs)
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in lines
        if line[:1] == "|"
    }
    heads = rows[""]
    quality, probability, utility = (
        heads.index(head) for head in ("forget quality ↑", "forget prob. ↓", "model utility ↑")
    )
    assert rows["A"][quality] == "**0.200**" and rows["gold"][quality] == "1.000"
    assert rows["A"][probability] == "0.300" and rows["A"][utility] == "**0.500**"
    evil = next(line for line in lines if line.startswith("| <script>"))
    assert "\\| pipe" in evil and "| 1.0e-09 |" in evil and "| **0.100** |" in evil and "| 0.990 |" in evil
    assert "**0.650**" in rows["A"]
    without_gold = best_values([run for run in runs if run.role != "gold"])
    assert not without_gold["forget_probability"] and without_gold["forget_quality"] == {"A"}
    assert sum(line.startswith("- **forget quality ↑**: Can the truth ratios") for line in lines) == 1


def test_report_shows_what_there_is(tmp_path):
    """Catches a report that needs a gold model, a trajectory, logs, questions or forget rows."""
    run = Run("only", {"retain_probability": 0.9})
    write_report(tmp_path / "least", "Title", [run], "One note.")
    assert sorted(os.listdir(tmp_path / "least")) == ["report.html", "report.md"]
    rows = random_rows(0, num_rows=5)
    write_report(tmp_path / "rows", "Title", [Run("rows", summarise(rows), rows)])
    assert (tmp_path / "rows" / "truth_ratios.png").exists()
    with pytest.raises(ValueError, match="a name of its own"):
        write_report(tmp_path, "Title", [run, run])
    with pytest.raises(ValueError, match="at least one run"):
        write_report(tmp_path, "Title", [])
    with pytest.raises(ValueError, match="`role` must be one of"):
        Run("x", {}, role="golden")


def test_table_fits_the_terminal():
    """Catches columns out of line with their heads, and lines that wrap."""
    runs = make_runs()
    runs[2].name = "a name that is far too long for any table " * 3
    lines = table(runs).splitlines()
    assert len(lines) == 3 + len(runs) and max(map(len, lines)) <= 120
    ends = [match.end() for match in re.finditer(r"-+", lines[2])]
    for line in lines[3:]:
        assert [line[end - 1] != " " and line[end : end + 1] in ("", " ") for end in ends[1:]] == [True] * (
            len(ends) - 1
        )
    assert "…" in lines[5] and "↑" in lines[1]
    assert table([Run("x", {"forget_quality": 0.0, "model_utility": 0.5})]).splitlines()[-1].split() == [
        "x",
        "0",
        "0.500",
    ]


def test_model_card_section_is_put_in_once(tmp_path):
    """Catches a section added again at every save, and a card whose own text is lost."""
    target, gold, run, _ = make_runs()
    card = tmp_path / "README.md"
    add_to_model_card(card, model_card_section(run, target, gold))
    alone = card.read_text(encoding="utf-8")
    assert alone.count("## Evaluation of unlearning") == 1 and "before unlearning | gold model" in alone
    card.write_text("# Card\n\nOwn text.\n", encoding="utf-8")
    add_to_model_card(card, model_card_section(run))
    once = card.read_text(encoding="utf-8")
    add_to_model_card(card, model_card_section(run))
    assert card.read_text(encoding="utf-8") == once
    card.write_text(once + "\nMore of its own.\n", encoding="utf-8")
    add_to_model_card(card, "## Evaluation of unlearning\n\nNew.\n")
    final = card.read_text(encoding="utf-8")
    assert "Own text." in final and "More of its own." in final and "New." in final and "before" not in final
    card.write_text("<!-- soul-eval: begin -->\ncut off", encoding="utf-8")
    with pytest.raises(ValueError, match="has <!-- soul-eval: begin --> and no"):
        add_to_model_card(card, "new")


def test_report_imports_no_torch():
    """Catches a report that can only be made where the model was."""
    code = "import sys, soul_eval.report, soul_eval.drawings, soul_eval.page; print('torch' in sys.modules)"
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr
