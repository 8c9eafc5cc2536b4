"""docs/metrics.md: what it names is there, what is there it names, and the numbers that it computes come out again."""

import ast
import inspect
import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from test_eval_scoring import byte_tokenizer, small_llama
from test_eval_tofu import question_rows, write_dataset

from soul_eval.__main__ import main
from soul_eval.attacks.running import ATTACKS
from soul_eval.callback import EvalCallback
from soul_eval.known_figures import COLUMNS
from soul_eval.metrics.forget_quality.formula import forget_quality
from soul_eval.metrics.membership_auc.formula import auc, auc_value, true_positive_rate
from soul_eval.metrics.privleak.formula import privleak
from soul_eval.metrics.rouge_overlap.formula import rouge_scores
from soul_eval.metrics.truth_ratio.formula import log_truth_ratios, truth_ratio_score
from soul_eval.registry import is_known
from soul_eval.rows import read_rows
from soul_eval.statistics import distance_bounds, mean_figure, paired_comparison
from soul_eval.suites import SUITES, tofu
from soul_trainer import UnlearnConfig


ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
FIGURES = [name for name in re.findall(r"`([\w*<>]+)`", TEXT) if name.strip("*")]
NUM_ROWS = (40, 200, 400, 4000)
TOKENS = {"token_log_probs": [-1.0, -2.5, -0.25], "token_hits": [1, 0, 1], "token_z_scores": [0.5, -1.0, 0.25]}


def section(title):
    """The text under a heading, up to the next one of its level."""
    level = title.split(" ")[0]
    return re.split(rf"\n#{{1,{len(level)}}} ", TEXT.partition(f"{title}\n")[2])[0]


def table(title):
    """Cells by their row's first cell, of the last table of a section."""
    lines = [line for line in section(title).split("\n") if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}


def commands():
    """Command lines of the page, whole ones on a line each."""
    lines = re.findall(r"^ {4}\S.*$", TEXT.replace("\\\n", " "), re.MULTILINE)
    return [line.strip() for line in lines] + re.findall(r"`(python -m [^`]+)`", TEXT)


def same(shown, value):
    """Whether a number is what a cell shows of it, in as many digits."""
    mantissa, _, exponent = shown.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    # Half a unit; a value that lies half-way may be rounded to either side.
    return abs(float(shown) - value) <= 0.501 * unit


def shifted(num_rows, num_steps):
    """Two samples whose distribution functions are `num_steps / num_rows` apart."""
    first = np.arange(num_rows) * 2.0
    return first, first + 2 * num_steps - 1


def half_width(figure):
    return (figure.high - figure.low) / 2


def test_every_figure_and_metric_is_explained():
    """Catches a figure that was added to the reports, or a metric to the folder, and never to the page."""
    missing = [column.key for column in COLUMNS if column.key not in FIGURES]
    assert not missing
    cards = {path.parent.name for path in (ROOT / "eval" / "metrics").glob("*/README.md")}
    assert set(re.findall(r"\(\.\./eval/metrics/(\w+)/README\.md\)", TEXT)) == cards
    inference = section("## Membership inference (`muse`; `tofu --non_members CONFIG`)")
    named = set(re.findall(r"`(\w+)`", inference))
    assert {"loss", "zlib", "min_k", "min_k_plus_plus", "reference", "lowercase", "gradient_norm"} <= named


def suite_rows():
    """Rows with all that a model may have been asked, by suite."""
    nlls = {"answer_nll": 1.0, "paraphrased_nll": 1.5, "perturbed_nll": [2.0, 2.5], "lowercase_nll": 1.5}
    said = {"rougeL_recall": 0.5, "rouge1_recall": 0.5, "rougeL_f1": 0.5, "bleu": 0.25, "generation": "a b"}
    hits = {"embedding_hit": True, "mentions_answer": True}
    every = {"answer": "a", "text": "A b c", "gradient_norm": 1.0, **nlls, **said, **TOKENS}
    splits = {
        "tofu": (*tofu.SPLITS, tofu.NON_MEMBERS),
        "muse": (
            "knowmem_forget",
            "knowmem_retain",
            "verbmem_forget",
            *(f"privleak_{s}" for s in ("forget", "retain", "holdout")),
        ),
        "wmdp": (
            "wmdp_bio",
            "wmdp_cyber",
            "wmdp_chem",
            *(f"mmlu_{s}" for s in ("stem", "humanities", "social_sciences", "other")),
        ),
        "copyright": ("forget_100", "retain_300"),
        "detox": ("prompts",),
        "own": ("forget", "retain", "held_out"),
    }
    own = {
        "tofu": hits,
        "own": {"answer_hits": [1, 0, 1], "verbatim_overlap": 0.5},
        "wmdp": {"is_correct": True},
        "detox": {"toxicity": 0.5, "is_toxic": False, "fluency": 0.5},
    }
    return {
        name: [{"split": split, "index": i, **every, **own.get(name, {})} for split in found for i in range(4)]
        for name, found in splits.items()
    }


@pytest.mark.parametrize("name", list(SUITES))
def test_every_figure_of_a_suite_is_explained(name):
    """Catches a figure that a suite makes and the page has under no name."""
    rows = suite_rows()[name]
    figures = SUITES[name].summarise(rows, rows)
    patterns = [re.compile(re.escape(key).replace(r"\*", ".+")) for key in FIGURES if is_known(key)]
    assert len(figures) >= 4
    assert not [key for key in figures if not any(pattern.fullmatch(key) for pattern in patterns)]


def test_what_is_named_exists():
    """Catches a path, a link, an lm-eval task or an attack that was renamed."""
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    paths = re.findall(r"[` ]((?:eval|docs|recipes|tests)/[\w./*-]+)", TEXT)
    assert len(links) > 10 and paths
    assert not [link for link in links if not (ROOT / "docs" / link).is_file()]
    assert not [path for path in paths if not list(ROOT.glob(path))]
    headings = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", TEXT, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= headings
    tasks = next(re.search(r"--tasks (\S+)", line)[1] for line in commands() if line.startswith("lm_eval"))
    assert not [task for task in tasks.split(",") if not (ROOT / "eval" / "tasks" / f"{task}.yaml").exists()]
    page = (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8")
    assert not [attack for attack in ATTACKS if f"`{attack}`" not in page]
    assert re.search(r"^<!-- speed table -->$|^\|.*\|$", section("## Speed"), re.M)


@pytest.mark.parametrize("name", [*SUITES, "summarise", "compare", "report", "attack"])
def test_commands_and_options_exist(name, capsys):
    """Catches a command that is gone, or one of its options."""
    lines = [line for line in commands() if f"-m soul_eval {name} " in line]
    assert lines, "the page does not show it"
    assert main([name, "--help"]) == 0
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert not [
        option
        for line in lines
        for option in re.findall(r"--\w+", line.partition("soul_eval")[2])
        if option not in known
    ]
    if name == "tofu":
        assert set(re.findall(r"^\| `(--\w+)", section("## Commands"), re.M)) <= known


def test_files_are_as_shown(tmp_path):
    """Catches a field of the header or of a row that was added or renamed, and figures that the row does not give."""
    header, row, summary = map(json.loads, re.findall(r"```json\n(.*?)```", TEXT, re.S))
    small_llama(seed=1).save_pretrained(tmp_path / "model")
    byte_tokenizer([each["answer"] for each in question_rows("forget")]).save_pretrained(tmp_path / "model")
    asked = ["--dataset", write_dataset(tmp_path / "data"), "--forget_split", "forget_small", "--max_new_tokens", "4"]
    where = ["--model", str(tmp_path / "model"), "--output", str(tmp_path), "--device", "cpu", "--limit", "1"]
    assert main(["tofu", *asked, *where]) == 0
    found, rows = read_rows(tmp_path / "rows.jsonl")
    assert header.keys() == found.keys() and header["format"] == found["format"]
    assert header["settings"].keys() == found["settings"].keys()
    assert row.keys() == next(each for each in rows if each["split"] == "forget").keys()
    made = {key: figure.to_json() for key, figure in tofu.summarise([row]).items()}
    assert made.keys() == summary.keys()
    for key, entry in summary.items():
        assert made[key] == pytest.approx(entry, abs=5e-5)
    scores = rouge_scores(row["answer"], row["generation"])
    assert {key: row[key] for key in scores} == scores


def test_the_example_of_training_has_arguments_that_exist():
    """Catches an argument of the callback or of the configuration that is not one."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    known = {"UnlearnConfig": {field.name for field in fields(UnlearnConfig)}}
    known["EvalCallback"] = {
        *inspect.signature(EvalCallback).parameters,
        *(f.name for f in fields(tofu.TofuArguments)),
    }
    checked = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            assert {keyword.arg for keyword in node.keywords} <= known[node.func.id]
            checked.append(node.func.id)
    assert sorted(checked) == sorted(known)


@pytest.mark.filterwarnings("ignore:ks_2samp")
@pytest.mark.parametrize("place", range(len(NUM_ROWS)))
def test_how_many_rows(place):
    """Catches widths of another interval than the code gives, and a threshold that is one row off."""
    num_rows, cells = NUM_ROWS[place], table("### How many rows")
    both = np.arange(2 * num_rows)[::2], np.arange(2 * num_rows)[1::2]
    passes = next(k for k in range(num_rows) if forget_quality(*shifted(num_rows, k + 1))[0] <= 0.05) + 1
    expected = {
        "AUC near 0.5, n + n rows: ±": half_width(auc(*both)),
        "PrivLeak near 0, gold taken as 0.5: ±": half_width(privleak(*both)),
        "TPR at 1% of an attack that guesses, n + n rows: up to": true_positive_rate(*both, 0.01).high,
        "KS distance: ±": distance_bounds(0.5, num_rows, num_rows)[1] - 0.5,
        "smallest KS distance with p at most 0.05": passes / num_rows,
        "p of a distance of 0.15": forget_quality(*shifted(num_rows, round(0.15 * num_rows)))[0],
        "smallest p, distance 1": forget_quality(*shifted(num_rows, num_rows))[0],
    }
    for share in (0.5, 0.1):
        figure = mean_figure([1] * int(share * num_rows) + [0] * (num_rows - int(share * num_rows)))
        expected[f"a share near {share}: ±"] = half_width(figure)
    assert cells.pop("rows, n")[place] == f"{num_rows:,}" and cells.pop("---") and cells.keys() == expected.keys()
    wrong = {key: (cells[key][place], value) for key, value in expected.items() if not same(cells[key][place], value)}
    assert not wrong


def test_published_p_values_are_the_distances_beside_them():
    """Catches a p-value miscopied, and a distance that is not its own: both are multiples of a row, and few fit."""
    rows = [
        line.split("|")[1:4] for line in section("## Published values").split("\n") if "e-" in line or "gold" in line
    ]
    checked = 0
    for name, shown, distance in (
        [cell.strip() for cell in row] for row in rows if len(row) == 3 and "/" not in row[1]
    ):
        p_value, statistic = forget_quality(*shifted(400, round(float(distance) * 400)))
        # `shifted` begins at a distance of a row; a model is at 0 from itself.
        assert float(distance) == 0 and shown == "1" or same(shown, p_value) and same(distance, statistic), name
        checked += 1
    assert checked == 7
    for num_rows, shown, distance in ((40, "1.3e-3", 0.425), (200, "5.9e-14", 0.39), (400, "4.3e-25", 0.3725)):
        assert shown in TEXT and same(shown, forget_quality(*shifted(num_rows, round(distance * num_rows)))[0])
    assert "any distance up to 0.300 passes" in TEXT and forget_quality(*shifted(40, 12))[0] > 0.05
    assert "1.94e-119" in TEXT and same("1.94e-119", forget_quality(*shifted(200, 200))[0])


def test_examples_of_figures_that_mislead():
    """Catches an example that does not have the figures that the page says."""
    nll = np.log(32_000.0)
    splits = {"forget": 5, "retain": 5, "real_authors": 3, "world_facts": 3}
    rows = [
        {
            "split": split,
            "index": i,
            "answer_nll": nll,
            "paraphrased_nll": nll,
            "perturbed_nll": [nll] * k,
            "rougeL_recall": 0.0,
        }
        for split, k in splits.items()
        for i in range(3)
    ]
    noise = tofu.summarise(rows)
    assert noise["forget_truth_ratio"].value == 1 and noise["model_utility"].value == 0
    assert same("0.00003", noise["forget_probability"].value) and auc_value([-nll] * 3, [-nll] * 4) == 0.5
    assert noise["real_authors_probability"].value == pytest.approx(0.25, abs=1e-12)
    for ratio in (0.5, 2.0):
        assert truth_ratio_score(np.log([ratio]), "forget") == pytest.approx(0.5, abs=1e-12)
    # OpenUnlearning's formula, where every answer has a loss of 50 nats a token: R is 1.
    probability = np.exp(-50.0)
    assert probability / (probability + 1e-10) < 1e-9
    assert truth_ratio_score(log_truth_ratios([50.0], [[50.0] * 5]), "forget") == 1
    answer, other = re.search(r'To "(.+?)", "(.+?)" has a recall of 0\.75', TEXT).groups()
    assert rouge_scores(answer, other)["rougeL_recall"] == 0.75
    many = "The author was born in Oslo, in Basra, in Rome or in Lima, in 1950, in 1951, in 1952 or in 1953."
    assert rouge_scores(answer, many)["rougeL_recall"] == 1 and same("0.53", rouge_scores(answer, many)["rougeL_f1"])


def test_limits_of_tests():
    """Catches limits of another test than `compare` makes, and counts of rows that are one off."""
    for changed, shown in ((5, "0.06"), (6, "0.03")):
        for num_rows in (20, 400):
            p_value = paired_comparison([0] * num_rows, [1] * changed + [0] * (num_rows - changed)).p_value
            # Drawn flips: 9,999 of them have a standard error of 0.0024 at most.
            assert same(shown, round(p_value, 2)), (changed, num_rows)
    assert paired_comparison([0] * 100, [1] * 100).p_value == pytest.approx(0.0002, abs=1e-12)
    for rate, enough in ((0.01, 390), (0.001, 3911)):
        assert f"{enough:,}" in TEXT
        lows = [true_positive_rate([9.0] * 50, np.arange(n) / n, rate).low for n in (enough - 1, enough)]
        assert lows[0] == 0 < lows[1]
