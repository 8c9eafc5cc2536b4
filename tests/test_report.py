import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_eval_metrics import random_rows

from soul_eval.columns import GROUPS
from soul_eval.known_figures import COLUMNS
from soul_eval.registry import column_of, place_of
from soul_eval.report import (
    Run,
    add_to_model_card,
    best_values,
    markdown_table,
    model_card_section,
    table,
    write_report,
)
from soul_eval.runs import row_counts, shown_columns, trajectory_of
from soul_eval.statistics import Figure, values
from soul_eval.suites.tofu import summarise


ROOT = Path(__file__).parents[1]
EVIL = '<script>alert("x")</script> & | pipe <!-- \u2028'
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
            curve = {"step": 0, **values(summary)}
            run.trajectory = [{**curve, "step": step, "forget_quality": 10.0**-step} for step in range(0, 50, 10)]
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
        self.tags, self.open, self.links, self.handlers, self.scripts, self.policy = [], [], [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "img", "link", "br", "input"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset")]
        self.handlers += [name for name, _ in attributes if name.startswith("on") or name == "style"]
        if tag == "script":
            self.scripts.append((dict(attributes), ""))
        if tag == "meta" and ("http-equiv", "Content-Security-Policy") in attributes:
            self.policy = dict(attributes)["content"]

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            attributes, text = self.scripts.pop()
            self.scripts.append((attributes, text + data))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_complete_and_needs_nothing_else(tmp_path):
    """Catches pictures left beside the page, anything fetched from a network, and text that runs as a script."""
    path = write_report(tmp_path / "report", f"Title {EVIL}", make_runs(), [f"Note {EVIL}"])
    assert path == tmp_path / "report" / "report.html"
    assert sorted(os.listdir(tmp_path / "report")) == sorted([*PICTURES, "report.html", "report.md", "verdict.json"])
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and page.handlers == []
    assert "link" not in page.tags and "iframe" not in page.tags
    assert len(page.links) == 5 and all(link.startswith("data:image/png;base64,") for link in page.links)
    pictures = {base64.b64decode(link.partition(",")[2]) for link in page.links}
    assert pictures == {(path.parent / name).read_bytes() for name in PICTURES}
    assert not re.search(r"https?://|url\(|@import", text)
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; | pipe" in text
    assert text.count('class="example"') == 10

    # Data, then our own script, which is the only one that the policy lets run.
    (data_attributes, data), (script_attributes, script) = page.scripts
    assert data_attributes == {"type": "application/json", "id": "data"} and script_attributes == {}
    assert script.strip() == (ROOT / "eval" / "page.js").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.policy and page.policy.startswith("default-src 'none'")
    assert "unsafe" not in page.policy
    assert not set("<>&\u2028") & set(data)
    found = json.loads(data)
    assert found["runs"] == ["target", "gold", "A", EVIL] and found["splits"][0]["name"] == "forget"
    assert sorted(split["name"] for split in found["splits"]) == sorted(
        ["forget", "retain", "held out", "real authors", "world facts"]
    )
    row = found["splits"][0]["rows"][3]
    assert row["question"] == f"{EVIL} 3?" and row["truth"] == EVIL
    assert [answer[0] for answer in row["answers"]] == [f"{name} says {EVIL}" for name in found["runs"]]


def test_examples_are_matched_by_index_and_not_by_place(tmp_path):
    """Catches answers to other questions side by side where one model has other rows, or none, or no generation."""
    first = [
        {"split": "retain", "index": index, "question": f"q{index}", "answer": "a", "generation": f"one {index}"}
        for index in (2, 0, 1)
    ]
    second = [{**row, "generation": f"two {row['index']}", "rougeL_recall": 0.12345} for row in first[:2]]
    third = [{**row, "generation": None} for row in first]
    write_report(tmp_path, "Title", [Run("one", {}, first), Run("two", {}, second), Run("three", {}, third)])
    (_, data), _ = Page((tmp_path / "report.html").read_text(encoding="utf-8")).scripts
    (split,) = json.loads(data)["splits"]
    assert [row["question"] for row in split["rows"]] == ["q0", "q1", "q2"]
    assert [row["answers"] for row in split["rows"]] == [
        [["one 0", None], ["two 0", 0.1235], None],
        [["one 1", None], None, None],
        [["one 2", None], ["two 2", 0.1235], None],
    ]


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
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    figures = text[text.index("|  | target |") :]
    head, _, *lines = [line for line in figures.splitlines() if line[:1] == "|"]
    assert head.endswith(r"\| pipe \<!-- |") and head.startswith("|  | target | gold | A |")
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert rows["forget quality ↑"][2:] == ["**0.200**", "1.0e-09"]
    assert rows["forget probability ↓"][1:] == ["0.120", "0.300", "**0.100**"]
    assert rows["forget truth ratio ↑"][1:] == ["0.700", "**0.650**", "0.990"]
    assert rows["model utility ↑"][2:] == ["**0.500**", "**0.500**"]
    without_gold = best_values([run for run in runs if run.role != "gold"])
    assert not without_gold["forget_probability"] and without_gold["forget_quality"] == {"A"}
    assert sum(line.startswith("- **forget quality ↑**: Can the truth ratios") for line in text.splitlines()) == 1
    assert "- **forget quality ↑**: A's truth ratios could be the gold model's: p = 0.2" in text
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "A's truth ratios could be the gold model's" in page.replace("&#39;", "'")


def test_the_best_is_nearest_where_a_number_is_the_goal():
    """Catches an AUC of 0.2 taken for better than one of 0.55, and a winner among figures without a direction."""
    runs = [
        Run("a", {"mia_loss_auc": 0.2, "wmdp_bio_accuracy": 0.1, "odd": 1.0, "privleak": -20.0}),
        Run("b", {"mia_loss_auc": 0.55, "wmdp_bio_accuracy": 0.27, "odd": 2.0, "privleak": 30.0}),
    ]
    best = best_values(runs)
    assert best == {"mia_loss_auc": {"b"}, "wmdp_bio_accuracy": {"b"}, "odd": set(), "privleak": {"a"}}


def test_intervals_are_shown_with_their_figures():
    """Catches intervals that are lost on the way, or stand beside another model's figure."""
    runs = [
        Run("a", {"toxicity_mean": Figure(0.41, 400, 0.38, 0.44), "fluency": 0.9}),
        Run("b", {"toxicity_mean": {"value": 0.3, "num_rows": 1}, "fluency": Figure(0.8, 400, 0.7, 0.85)}),
    ]
    rows = markdown_table(runs).splitlines()[2:]
    assert rows[0] == "| toxicity mean ↓ | 0.410 [0.380, 0.440] | **0.300** |"
    assert rows[1] == "| fluency ↑ | **0.900** | 0.800 [0.700, 0.850] |"
    lines = table(runs).splitlines()
    assert lines[3].startswith("a 0.410 [0.380, 0.440]") and lines[4].split() == [
        "b",
        "0.300",
        "0.800",
        "[0.700,",
        "0.850]",
    ]
    assert "brackets hold 95% intervals" in lines[-1] and "400" in lines[-1]
    assert "| 0.410 [0.380, 0.440] | 0.300 |" in model_card_section(runs[0], runs[1])


def test_report_shows_what_there_is(tmp_path):
    """Catches a report that needs a gold model, a trajectory, logs, questions or forget rows."""
    run = Run("only", {"retain_probability": 0.9})
    write_report(tmp_path / "least", "Title", [run], "One note.")
    assert sorted(os.listdir(tmp_path / "least")) == ["report.html", "report.md", "verdict.json"]
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
    said, _, text = table(runs).partition("\n\n")
    lines = text.splitlines()
    assert max(map(len, [*said.split("\n"), *lines])) <= 120
    assert said.startswith("a name that is far too long for any tab…: cannot tell. The answers to forget have")
    # A line for each figure and one for its interval; then a line of notes.
    body = lines[3 : lines.index("")]
    assert len(body) == 2 * len(runs) and all(re.search(r"\s\.\d{3}-\.\d{3}\b", line) for line in body[1::2])
    ends = [match.end() for match in re.finditer(r"-+", lines[2])]
    for line in body[::2]:
        assert all(line[end - 1] != " " and line[end : end + 1] in ("", " ") for end in ends[1:])
    utility = runs[0].figure("model_utility")
    assert f"{utility.low:.3f}-{utility.high:.3f}".replace("0.", ".") in body[1]
    assert "…" in body[4] and "↑" in lines[1] and "12 of forget" in " ".join(lines[-2:])
    plain = table([Run("x", {"forget_quality": 0.0, "model_utility": 0.5})]).splitlines()
    assert plain[3].split() == ["x", "0", "0.500"]


def test_table_has_blocks_for_more_than_fits_and_leaves_out_what_matters_less():
    """Catches lines that wrap, columns that get lost, and an empty table where no figure is of main interest."""
    leaks = {
        f"leak_{name}_{count}": 0.1 for name in ("rougeL", "bleu") for count in (25, 50, 100, 200, 400, 800, 1600)
    }
    lines = table([Run("x", leaks | {"odd_figure": 3.0})]).splitlines()
    assert max(map(len, lines)) <= 120 and sum(line.startswith("x ") for line in lines) == 2
    assert sum(line.count("0.100") for line in lines) == 14 and not any("3.000" in line for line in lines)
    assert "1 more figure" in lines[-1]
    assert table([Run("x", {"odd_figure": 3.0})]).splitlines()[3].split() == ["x", "3.000"]


def test_every_figure_has_words_and_a_place():
    """Catches an entry that breaks a sentence or a table, a family that takes another's figures, and a lost figure."""
    for column in COLUMNS:
        assert column.group in GROUPS and column.better in ("higher", "lower", "near") and column.reading.endswith(".")
        assert column.phrase.count("{}") == 1 and column.key.count("*") <= 1
        assert column.better != "near" or isinstance(column.goal, float)
    expected = {
        "forget_rougeL_recall": ("Forgetting", "forget ROUGE-L ↓"),
        "forget_embedding_accuracy": ("Forgetting", "forget embedding accuracy ↓"),
        "world_facts_truth_ratio": ("What is kept", "world facts truth ratio ↑"),
        "knowmem_retain_rougeL": ("MUSE", "knowmem retain ↑"),
        "privleak": ("MUSE", "privacy leakage → 0"),
        "wmdp_cyber_accuracy": ("WMDP", "WMDP cyber ↓"),
        "mmlu_accuracy": ("WMDP", "MMLU accuracy ↑"),
        "extraction_strength": ("Forgetting", "extraction strength ↓"),
        "leak_bleu_100": ("Copyright", "leak BLEU, 100 tokens ↓"),
        "leak_rougeL_f1_100": ("Copyright", "leak ROUGE-L F1, 100 tokens ↓"),
        "exact_memorization_50": ("Copyright", "exact memorization, 50 tokens ↓"),
        "retain_leak_rougeL_50": ("Copyright", "kept: leak ROUGE-L, 50 tokens ↑"),
        "mmlu_social_sciences_accuracy": ("WMDP", "MMLU social sciences ↑"),
        "toxicity_rate": ("Detoxification", "toxicity rate ↓"),
        "fluency": ("Detoxification", "fluency ↑"),
        "mia_min_k_auc": ("Membership inference", "min k AUC → 0.5"),
        "mia_loss_tpr_01": ("Membership inference", "loss TPR at 0.1% ↓"),
        "relearning_recovered": ("Attacks", "relearning recovered ↓"),
        "recovered_prefix_forget_probability": ("Attacks", "recovered: prefix forget probability ↓"),
        "hellaswag_acc": ("General ability", "hellaswag accuracy ↑"),
        "wikitext_word_perplexity": ("General ability", "wikitext word perplexity ↓"),
        "nobody_knows": ("Other figures", "nobody knows"),
        "odd": ("Other figures", "odd"),
    }
    assert {key: (column_of(key).group, column_of(key).title) for key in expected} == expected
    keys = ["leak_rougeL_100", "odd", "leak_rougeL_50", "forget_probability", "forget_quality", "b9_recovered"]
    assert sorted(keys, key=place_of) == [keys[4], keys[3], keys[2], keys[0], keys[5], keys[1]]
    shown = shown_columns([Run("x", {"odd": 1.0, "forget_rows": 5.0}, settings={"rho": 3.0, "seconds_per_step": 2.0})])
    assert [column.key for column in shown] == ["seconds_per_step", "odd"]


def test_curves_come_from_the_log_where_there_is_no_trajectory():
    """Catches figures under their logged names, run times among them, and two suites of a step in two points."""
    log = [
        {"step": 0, "eval_tofu_forget_quality": 0.1, "eval_tofu_forget_rows": 5},
        {"step": 5, "loss": 1.0, "epoch": 1.0},
        {"step": 10, "eval_tofu_forget_quality": 0.3, "eval_runtime": 9.0, "eval_loss": 2.0},
        {"step": 10, "eval_model_utility": 0.7, "eval_samples_per_second": 3.0},
        {"step": 10, "eval_wmdp_bio_accuracy": 0.4, "eval_wmdp_mmlu_accuracy": 0.5, "eval_muse_privleak": -3.0},
    ]
    expected = [
        {"step": 0, "forget_quality": 0.1},
        {
            "step": 10,
            "forget_quality": 0.3,
            "model_utility": 0.7,
            "wmdp_bio_accuracy": 0.4,
            "mmlu_accuracy": 0.5,
            "privleak": -3.0,
        },
    ]
    assert trajectory_of(log) == expected == Run("x", {}, log_history=log).curve()
    assert trajectory_of([{"step": 3, "test_wmdp_wmdp_bio_accuracy": 1.0}], "test_")[0]["wmdp_bio_accuracy"] == 1.0
    assert Run("x", {}, log_history=log, trajectory=[]).curve() == []


def test_rows_are_counted_from_what_there_is():
    """Catches a report that says of how many rows its figures are only where the rows are at hand."""
    rows = [{"split": "forget", "index": index} for index in range(3)]
    assert row_counts([Run("a", {}, rows), Run("b", {}, rows[:2])]) == {"forget": (2, 3)}
    assert row_counts([Run("a", {"retain_rows": 7.0})]) == {"retain": (7, 7)}
    assert row_counts([Run("a", {"toxicity_mean": Figure(0.1, 5), "toxicity_rate": Figure(0.1, 9)})]) == {
        "detoxification": (9, 9)
    }
    figures = {"forget_probability": Figure(0.1, 5), "real_authors_truth_ratio": Figure(0.1, 7), "ks": Figure(1.0, 9)}
    assert row_counts([Run("a", figures)]) == {"forget": (5, 5), "real_authors": (7, 7)}
    assert row_counts([Run("a", {"toxicity_mean": 0.1})]) == {}


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
