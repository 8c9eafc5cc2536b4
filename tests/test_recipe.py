"""TOFU's recipe from rows to report, on smaller corpora; once through the launcher, the rest in this process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from privacy import check_files

from soul_eval.rows import read_rows
from soul_eval.suites.tofu import NON_MEMBERS
from soul_recipes import tofu as recipe
from soul_recipes.fictitious_authors import make_corpus
from soul_recipes.hub_layout import write_hub_layout
from soul_recipes.tofu_rows import TofuRows, paired_splits


RECIPES = Path(__file__).parents[1] / "recipes"


SMALL = ["--authors", "5", "--hidden_size", "32", "--finetune_epochs", "3", "--num_train_epochs", "2"]
SMALL += ["--evaluations", "1", "--max_new_tokens", "8", "--hessian_interval", "2", "--logging_steps", "1"]
SPLITS = {"forget", "retain", "held_out", "real_authors", "world_facts"}


def run_recipe(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs `recipes/tofu.py` through the launcher."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", str(RECIPES / "tofu.py")]
    return subprocess.run(
        [*launcher, "--output_dir", str(folder), *SMALL, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_the_recipe_runs_from_rows_to_report_and_again(tmp_path):
    """
    Would catch a break anywhere between rows and report, a second run that trains again, a finished run that other
    settings overwrite, and a model card without figures.
    """
    first = run_recipe(tmp_path)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    for name in ("target", "AdamW", "SOUL", "gold"):
        assert f"\n{name} " in first.stdout
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    for optimizer in ("adamw_torch", "soul"):
        folder = tmp_path / optimizer
        header, rows = read_rows(tmp_path / f"{optimizer}.rows.jsonl")
        assert header["settings"]["optim"] == optimizer
        assert {row["split"] for row in rows} == SPLITS
        assert "Evaluation of unlearning" in (folder / "README.md").read_text(encoding="utf-8")
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        steps = [entry["step"] for entry in history if "eval_tofu_forget_quality" in entry]
        assert steps[0] == 0 and len(steps) == 2
    forget = [row["answer"] for row in rows if row["split"] == "forget"]
    check_files(tmp_path, forget, ["soul.rows.jsonl", "target.rows.jsonl", "report.html"])
    weights = (tmp_path / "soul" / "model.safetensors").stat().st_mtime_ns
    recipe.main(["--output_dir", str(tmp_path), *SMALL])
    assert (tmp_path / "soul" / "model.safetensors").stat().st_mtime_ns == weights
    with pytest.raises(ValueError, match="holds a finished run"):
        recipe.main(["--output_dir", str(tmp_path), *SMALL, "--retain_weight", "3"])


def tofu_like(folder: Path) -> str:
    """A folder with TOFU's configurations, on three authors to forget in nested splits, and one that nobody knows."""
    corpus = make_corpus(8, num_forget=3, num_retain=4)
    forget, retain = corpus["forget"], corpus["retain"]
    splits = {"forget01": forget[40:], "forget05": forget[20:], "forget10": forget, "holdout10": corpus["held_out"]}
    splits |= {"retain90": retain, "retain95": forget[:20] + retain, "retain99": forget[:40] + retain}
    splits |= {name: corpus[name] for name in ("retain", "real_authors", "world_facts")}
    return str(write_hub_layout(splits, folder / "tofu"))


@pytest.mark.parametrize(
    "given, expected",
    [
        ((None, None), ("forget10", "retain90")),
        (("forget01", None), ("forget01", "retain99")),
        (("forget05", None), ("forget05", "retain95")),
        ((None, "retain99"), ("forget01", "retain99")),
        (("mine", "yours"), ("mine", "yours")),
        (("forget05", "retain90"), ("forget05", "retain90")),
    ],
)
def test_splits_go_together(given, expected):
    """Would catch forget05 with retain90, half of whose other rows are then neither forgotten nor kept."""
    assert paired_splits(*given) == expected


def test_a_split_without_a_partner_is_refused():
    """Would catch a dataset of one's own that is unlearned with TOFU's rows to retain."""
    for given in (("mine", None), (None, "forget"), ("forget00", None)):
        with pytest.raises(ValueError, match="name both"):
            paired_splits(*given)


def test_rows_that_nobody_has_seen_are_asked_where_there_are_some(tmp_path):
    """Would catch membership inference against the wrong split, or against none where the dataset brings one."""
    dataset = tofu_like(tmp_path)
    rows = TofuRows(dataset, "forget10", "retain90", held_out_rows=20)
    assert rows.holdout_split == "holdout10" and len(rows.asked[NON_MEMBERS]) == 20
    learnt = {question for part in rows.learnt().values() for question in part["question"]}
    assert not set(rows.asked[NON_MEMBERS]["question"]) & learnt
    assert TofuRows(dataset, "forget05", "retain95").holdout_split is None
    assert TofuRows(dataset, "forget05", "retain95", holdout_split="holdout10").holdout_split == "holdout10"
    assert len(rows.retain) == 60 and not set(rows.retain["question"]) & set(rows.held_out["question"])
    assert len(TofuRows(dataset, "forget10", "retain90", max_retain_rows=30).retain) == 30


def test_nested_splits_become_requests_of_what_is_new(tmp_path):
    """Would catch rows that are forgotten twice, or kept while they are forgotten, and two under one index."""
    rows = TofuRows(tofu_like(tmp_path), "forget10", "retain90", held_out_rows=20)
    requests = rows.requests(["forget01", "forget05", "forget10"])
    assert [len(request.forget) for request in requests] == [20, 20, 20]
    assert [len(request.retain) for request in requests] == [100, 80, 60]
    for request in requests:
        assert [row["question"] for row in request.rows] == request.forget["question"][:]
        assert not set(request.forget["question"]) & set(request.retain["question"])
    assert [row["index"] for request in requests for row in request.rows] == list(range(60))
    with pytest.raises(ValueError, match="the rows of 'forget01' are all in earlier requests"):
        rows.requests(["forget05", "forget01"])


def test_requests_of_authors_are_whole_authors(tmp_path):
    """Would catch an author of whom half is forgotten, rows that are left out, and parts without rows."""
    rows = TofuRows(tofu_like(tmp_path), "forget10", "retain90")
    for num_requests, sizes in ((1, [60]), (2, [20, 40]), (3, [20, 20, 20])):
        requests = rows.author_requests(num_requests)
        assert [len(request.forget) for request in requests] == sizes
        questions = [question for request in requests for question in request.forget["question"]]
        assert questions == rows.forget["question"][:]
        assert questions == [row["question"] for request in requests for row in request.rows]
    for num_requests in (0, 4):
        with pytest.raises(ValueError, match="`num_requests` must be between 1 and 3"):
            rows.author_requests(num_requests)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--requests", "forget01"], "`requests` .*needs `dataset`"),
        (["--forget_split", "forget01"], "`forget_split` .*needs `dataset`"),
        (["--dataset", "x", "--requests", "forget01", "--num_requests", "2"], "give one of the two"),
        (["--num_requests", "0"], "`num_requests` must be at least 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, said):
    """Would catch a flag that is ignored without a word."""
    with pytest.raises(ValueError, match=said):
        recipe.main(["--use_cpu", *flags])


def test_more_requests_than_authors_are_refused_before_a_model_is_trained(tmp_path):
    """Would catch minutes of training that end in an error about a flag."""
    with pytest.raises(ValueError, match="`num_requests` must be between 1 and 1"):
        recipe.main(["--use_cpu", "--authors", "5", "--num_requests", "2", "--output_dir", str(tmp_path), *SMALL])
    assert not list(tmp_path.glob("target*"))


def test_published_requests_run_one_after_the_other(tmp_path, capsys):
    """Would catch requests on a dataset's own splits that do not run, or that leave membership inference out."""
    dataset, out = tofu_like(tmp_path), tmp_path / "out"
    flags = [*SMALL, "--optim", "adamw_torch", "--held_out_rows", "20", "--use_cpu", "--num_train_epochs", "1"]
    recipe.main(["--output_dir", str(out), "--dataset", dataset, "--requests", "forget05,forget10", *flags])
    record = json.loads((out / "requests.json").read_text(encoding="utf-8"))
    assert [entry["after"] for entry in record] == ["forget05", "forget10"]
    assert list(record[1]["each"]) == ["forget05", "forget10"]
    assert {"model_utility", "forget_quality", "mia_loss_auc"} <= set(record[1]["each"]["forget05"])
    printed = capsys.readouterr().out
    assert "AdamW 2 on 1" in printed and "1: forget05, 2: forget10" in printed
    assert not list((out / "adamw_torch" / "request-1").rglob("*.jsonl"))
