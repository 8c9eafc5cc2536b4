"""Requests to forget one after the other."""

import json

import pytest
from datasets import Dataset
from experiment_scenes import asked, scene_experiment, scene_task
from safetensors.torch import load_file
from scenes import FORGET, RETAIN, largest_difference

from soul_eval.continual import Request, check_requests, run_requests
from soul_eval.rows import read_rows
from soul_eval.suites import tofu


def scene_requests() -> list[Request]:
    """The scene's rows to forget in two parts of two names each."""
    questions = asked(FORGET, "forget")
    parts = {"first": slice(0, 4), "second": slice(4, 8)}
    return [Request(name, Dataset.from_list(FORGET[part]), questions[part]) for name, part in parts.items()]


def continual_task(folder):
    """The scene's task without its rows to forget, which are the requests'."""
    task = scene_task(folder)
    task.rows = [row for row in task.rows if row["split"] == "retain"]
    return task


def history_of(folder, key):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[key] for entry in log if key in entry}


def test_each_request_starts_from_the_last_model(tmp_path):
    """Would catch a second request that starts from the target, and one that asks about what nobody has asked for."""
    task = continual_task(tmp_path)
    stages = run_requests(scene_experiment(tmp_path, "--optim", "soul"), task, scene_requests())
    folders = [tmp_path / "out" / "soul" / f"request-{place}" for place in (1, 2)]
    key = "eval_tofu_retain_probability"
    first, second = (history_of(folder, key) for folder in folders)
    assert second[0] == pytest.approx(first[max(first)], abs=1e-9) != first[0]
    models = [load_file(folder / "model.safetensors") for folder in folders]
    assert largest_difference(*models) > 1e-3
    questions = [[row["question"] for row in stage.run.rows if row["split"] == "forget"] for stage in stages]
    assert questions == [[row["question"] for row in FORGET[:4]], [row["question"] for row in FORGET]]
    headers = [read_rows(folder.with_name(f"{folder.name}.rows.jsonl"))[0] for folder in folders]
    assert [header["settings"]["target"] for header in headers] == [task.target, str(folders[0])]


def test_figures_are_of_each_request_and_of_all_so_far(tmp_path):
    """Would catch figures of another request, of another model's rows, and a gold model that is asked other rows."""
    stages = run_requests(scene_experiment(tmp_path), continual_task(tmp_path), scene_requests())
    assert [(stage.optimizer, stage.request) for stage in stages] == [
        (optimizer, request) for optimizer in ("AdamW", "SOUL") for request in ("first", "second")
    ]
    gold = read_rows(tmp_path / "out" / "gold.rows.jsonl")[1]
    last = stages[-1]
    assert list(last.by_request) == ["first", "second"] and list(stages[0].by_request) == ["first"]
    for name, wanted in (("first", range(4)), ("second", range(4, 8))):
        own, reference = (
            [row for row in rows if row["split"] == "retain" or row["index"] in wanted]
            for rows in (last.run.rows, gold)
        )
        assert last.by_request[name].summary == tofu.summarise(own, reference)
    assert last.run.summary == tofu.summarise(last.run.rows, gold)
    record = json.loads((tmp_path / "out" / "requests.json").read_text(encoding="utf-8"))
    value = last.by_request["first"].value("forget_probability")
    assert record[-1]["each"]["first"]["forget_probability"] == value
    text = (tmp_path / "out" / "requests.md").read_text(encoding="utf-8")
    assert "SOUL 2 on 1" in text and "1: first, 2: second" in text
    assert "1: first, 2: second" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_requests_are_found_done_and_other_requests_refused(tmp_path):
    """Would catch requests that are unlearned again, and a sequence whose first part was another."""
    task, experiment = continual_task(tmp_path), scene_experiment(tmp_path, "--optim", "soul")
    run_requests(experiment, task, scene_requests())
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    run_requests(scene_experiment(tmp_path, "--optim", "soul"), task, scene_requests())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == times
    with pytest.raises(ValueError, match="holds a finished run with other settings"):
        run_requests(scene_experiment(tmp_path, "--optim", "soul"), task, scene_requests()[::-1])


def test_a_request_may_keep_rows_of_its_own(tmp_path):
    """Would catch a request's own retain rows that are not used, or that change nothing of what tells runs apart."""
    task, requests = continual_task(tmp_path), scene_requests()
    for request in requests:
        request.retain = Dataset.from_list(RETAIN[:2])
    experiment = scene_experiment(tmp_path, "--optim", "soul")
    seen = []
    make_trainer = experiment.make_trainer

    def watched(task, config):
        seen.append((len(task.forget), len(task.retain)))
        return make_trainer(task, config)

    experiment.make_trainer = watched
    run_requests(experiment, task, requests)
    assert seen == [(4, 2), (4, 2)]
    with pytest.raises(ValueError, match="holds a finished run with other settings"):
        run_requests(scene_experiment(tmp_path, "--optim", "soul"), task, scene_requests())


def test_bad_requests_are_named():
    """Would catch a row that two requests ask, of which one would be counted twice."""
    first, second = scene_requests()
    with pytest.raises(ValueError, match="`requests` needs at least one"):
        check_requests([], [])
    with pytest.raises(ValueError, match="a name of its own.*first.*first"):
        check_requests([first, first], [])
    second.rows = [*second.rows, first.rows[1]]
    with pytest.raises(ValueError, match="Row 1 of `forget` is in 'second' and 'first'"):
        check_requests([first, second], [])
    with pytest.raises(ValueError, match="Row 0 of `forget` is in 'first' and `task.rows`"):
        check_requests([first], asked(FORGET, "forget"))
    with pytest.raises(ValueError, match="'first' has no rows"):
        check_requests([Request("first", first.forget, [])], [])
