"""Runs of a suite: those that were stopped, those of other weights, and those of several processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from subprocesses import TWO_PROCESSES, python, succeeded
from test_eval_scoring import byte_tokenizer, small_llama
from test_eval_tofu import python_path, question_rows, write_dataset

from soul_eval.__main__ import main
from soul_eval.journal import Journal
from soul_eval.models import weights_digest
from soul_eval.rows import read_rows
from soul_eval.running import GENERAL, IDENTITY


# Float32 sums in other batches; losses are of the order of 1 to 10.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "small")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_llama(seed=1).save_pretrained(folder)
    byte_tokenizer([row["answer"] for row in question_rows("forget")]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(dataset, model_dir):
    asked = ["--dataset", dataset, "--forget_split", "forget_small", "--max_new_tokens", "6", "--device", "cpu"]
    return ["tofu", "--model", str(model_dir), *asked]


@pytest.fixture(scope="module")
def expected(arguments, tmp_path_factory):
    """The rows of one process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    assert main([*arguments, "--output", str(folder)]) == 0
    assert os.listdir(folder) == ["rows.jsonl", "summary.json"] or sorted(os.listdir(folder)) == [
        "rows.jsonl",
        "summary.json",
    ]
    return read_rows(folder / "rows.jsonl")


def assert_same_rows(folder, expected):
    header, rows = read_rows(folder / "rows.jsonl")
    for name in ("weights", "questions", "settings"):
        assert header[name] == expected[0][name]
    for row, wanted in zip(rows, expected[1], strict=True):
        assert row["generation"] == wanted["generation"] and (row["split"], row["index"]) == (
            wanted["split"],
            wanted["index"],
        )
        for name in ("answer_nll", "paraphrased_nll", "perturbed_nll"):
            assert row[name] == pytest.approx(wanted[name], abs=ROUNDING)


def test_a_killed_run_goes_on_where_it_was(arguments, expected, tmp_path, capsys):
    """Catches finished rows that are asked again, and rows that are lost or doubled by a kill."""
    command = [sys.executable, "-m", "soul_eval", *arguments, "--output", str(tmp_path), "--batch_size", "64"]
    running = subprocess.Popen(command, env=python_path() | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    journal = tmp_path / "rows.jsonl.part-0"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 12:
        assert running.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "rows.jsonl").exists()
    with journal.open("a") as file:
        file.write('[["forget", 5, "los')  # as a kill in the middle of a line leaves it
    found = [tuple(json.loads(line)[0]) for line in journal.read_text().split("\n")[1:-1]]
    assert 10 < len(found) < 60
    asked = []
    before = Journal.add
    try:
        Journal.add = lambda self, key, fields: asked.append(key) or before(self, key, fields)
        assert main([*arguments, "--output", str(tmp_path)]) == 0
    finally:
        Journal.add = before
    assert not set(asked) & set(found) and len(asked) + len(found) == 60
    assert_same_rows(tmp_path, expected)
    assert sorted(os.listdir(tmp_path)) == ["rows.jsonl", "summary.json"]


@pytest.mark.parametrize("found", [1, 7, 23, 40, 59, "every third"])
def test_a_resumed_run_finds_the_same_bits(arguments, tmp_path, monkeypatch, found):
    """Catches batches of the remaining rows alone, whose padding moves the last digits, by up to 7e-6 a token."""
    run = [*arguments, "--batch_size", "256", "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda self: None)
        assert main(run) == 0
    whole = (tmp_path / "rows.jsonl").read_text()
    first, *lines = (tmp_path / "rows.jsonl.part-0").read_text().splitlines(keepends=True)
    assert len(lines) == 60
    kept = lines[::3] if found == "every third" else lines[:found]
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "rows.jsonl.part-0").write_text("".join([first, *kept]))
    assert main(run) == 0
    assert (tmp_path / "rows.jsonl").read_text().splitlines()[1:] == whole.splitlines()[1:]


def test_rows_of_other_weights_are_not_mixed(arguments, model_dir, expected, tmp_path, caplog):
    """Catches the former model's figures under the new one's name, whether its rows were finished or not."""
    other = small_llama(seed=2)
    assert weights_digest(other) != expected[0]["weights"] == weights_digest(small_llama(seed=1))
    folder, output = tmp_path / "model", tmp_path / "out"
    for source in model_dir.iterdir():
        (tmp_path / "model").mkdir(exist_ok=True)
        (folder / source.name).write_bytes(source.read_bytes())
    run = [*arguments, "--model", str(folder), "--output", str(output)]
    assert main(run) == 0
    former = (output / "rows.jsonl").read_text()
    other.save_pretrained(folder)
    assert main(run) == 0
    header, rows = read_rows(output / "rows.jsonl")
    assert header["weights"] == weights_digest(other)
    assert rows[0]["answer_nll"] != pytest.approx(expected[1][0]["answer_nll"], abs=1e-3)
    (kept,) = output.glob("rows.*.jsonl")
    assert kept.read_text() == former
    # Unfinished rows of other weights are of no use.
    (output / "rows.jsonl").unlink()
    stale = {"format": "x", "weights": expected[0]["weights"]}
    entry = [["forget", 0, "losses"], {"answer_nll": 77.0}]
    (output / "rows.jsonl.part-0").write_text(f"{json.dumps(stale)}\n{json.dumps(entry)}\n")
    assert main(run) == 0
    assert read_rows(output / "rows.jsonl")[1] == rows


def change_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))


def change_tokenizer(folder):
    byte_tokenizer(["another text altogether"] * 9).save_pretrained(folder)


@pytest.mark.parametrize("change", [change_config, change_tokenizer])
def test_rows_of_another_setup_are_not_mixed(arguments, model_dir, tmp_path, change):
    """Catches figures that are passed off as those of the same weights with other settings or another tokenizer."""
    folder, output = shutil.copytree(model_dir, tmp_path / "model"), tmp_path / "out"
    run = [*arguments, "--model", str(folder), "--output", str(output), "--limit", "2", "--no_generate"]
    assert main(run) == 0
    before = read_rows(output / "rows.jsonl")
    change(folder)
    assert main(run) == 0
    header, rows = read_rows(output / "rows.jsonl")
    assert header["weights"] == before[0]["weights"] and header["setup"] != before[0]["setup"]
    assert rows[0]["answer_nll"] != pytest.approx(before[1][0]["answer_nll"], abs=1e-3)
    assert len(list(output.glob("rows.*.jsonl"))) == 1


def test_overwriting_starts_anew(arguments, tmp_path):
    """Catches unfinished findings that --overwrite keeps, so that nobody can be rid of them."""
    run = [*arguments, "--output", str(tmp_path), "--limit", "1", "--no_generate"]
    assert main(run) == 0
    header, rows = read_rows(tmp_path / "rows.jsonl")
    identity = {key: header[key] for key in IDENTITY}
    identity["settings"] = {key: value for key, value in identity["settings"].items() if key not in GENERAL}
    for flags, expected in (([], 77.0), (["--overwrite"], rows[0]["answer_nll"])):
        (tmp_path / "rows.jsonl").unlink()
        journal = Journal(tmp_path / "rows.jsonl", identity)
        journal.add(("forget", 0, "losses"), {**rows[0], "answer_nll": 77.0})
        journal.close()
        assert main([*run, *flags]) == 0
        assert read_rows(tmp_path / "rows.jsonl")[1][0]["answer_nll"] == expected


def test_a_misspelt_task_is_found_before_the_model_runs(arguments, tmp_path, capsys):
    """Catches an error after hours, and a resume that asks everything again because the task was corrected."""
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    assert main([*arguments, "--output", str(tmp_path / "out"), "--general", "hellaswagg"]) == 1
    assert "hellaswag" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_two_processes_find_what_one_finds(arguments, expected, tmp_path):
    """Catches rows that a process answers twice or not at all, and two processes that write one file."""
    output = succeeded(python(*TWO_PROCESSES, "-m", "soul_eval", *arguments, "--output", tmp_path, folder=tmp_path))
    assert output.count("forget") and output.count("model.rows") == 0
    assert_same_rows(tmp_path, expected)
    assert not list(tmp_path.glob("rows.jsonl.part-*"))


def test_weights_are_told_apart():
    """Catches a hash of names or shapes alone, and one that depends on where a tensor lies in memory."""
    model = small_llama(seed=1)
    digest = weights_digest(model)
    weight = model.model.layers[0].mlp.down_proj.weight
    before = weight[3, 5].item()
    with torch.no_grad():
        weight[3, 5] += 1e-3
    assert weights_digest(model) != digest
    with torch.no_grad():
        weight[3, 5] = before
    weight.data = weight.data.T.contiguous().T
    assert weights_digest(model) == digest
    assert weights_digest(model.to(torch.bfloat16)) != digest


def test_comparing_two_models(arguments, expected, tmp_path, capsys):
    """Catches a difference of the wrong sign, and a test that calls equal models different."""
    assert main([*arguments, "--output", str(tmp_path / "one")]) == 0
    header, rows = read_rows(tmp_path / "one" / "rows.jsonl")
    better = [{**row, "answer_nll": row["answer_nll"] - 0.5 - 0.01 * row["index"]} for row in rows]
    (tmp_path / "better.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [header, *better]))
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "one" / "rows.jsonl"), str(tmp_path / "better.jsonl")]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert float(lines["forget_answer_nll"][1]) == pytest.approx(-0.525)
    assert float(lines["forget_answer_nll"][4]) == pytest.approx(2 / 2**6, rel=0.01)  # all six signs alike
    other = [{**row, "question": f"{row['question']}!"} for row in rows]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [header, *other]))
    assert main(["compare", str(tmp_path / "one" / "rows.jsonl"), str(tmp_path / "other.jsonl")]) == 1
    assert float(lines["forget_rougeL_recall"][1]) == 0 and float(lines["forget_rougeL_recall"][4]) == 1
    assert main(["compare", str(tmp_path / "one" / "rows.jsonl"), str(tmp_path / "none.jsonl")]) == 1


def test_a_report_of_rows(arguments, expected, tmp_path, capsys):
    """Catches a page that can only be made by a recipe."""
    for name in ("gold", "own"):
        assert main([*arguments, "--output", str(tmp_path / name), "--limit", "3"]) == 0
    files = {name: str(tmp_path / name / "rows.jsonl") for name in ("gold", "own")}
    page = ["report", f"SOUL={files['own']}", "--gold", files["gold"], "--output", str(tmp_path / "page")]
    assert main(page) == 0
    assert "SOUL" in capsys.readouterr().out and (tmp_path / "page" / "report.html").exists()


def test_findings_of_several_processes_serve_one(tmp_path):
    """Catches findings of a second process that a resume in one loses, or counts twice in the next."""
    identity, path = {"weights": "w"}, tmp_path / "rows.jsonl"
    for process in range(2):
        journal = Journal(path, identity, process)
        journal.add(("forget", process, "losses"), {"answer_nll": float(process)})
        journal.close()
    resumed = Journal(path, identity)
    assert resumed.done == {("forget", place, "losses"): {"answer_nll": float(place)} for place in range(2)}
    assert [piece.name for piece in tmp_path.iterdir()] == ["rows.jsonl.part-0"]
    resumed.add(("forget", 2, "losses"), {"answer_nll": 2.0})
    resumed.close()
    for identity, expected in (({"weights": "w"}, 3), ({"weights": "v"}, 0)):
        journal = Journal(path, identity)
        journal.close()
        assert len(journal.done) == expected and journal.is_stale == (expected == 0)
