"""The study's recipe on a task of seconds: its optimizers by hand, its plans, its runs and how they are resumed."""

import json
import os
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from scenes import FORGET, RETAIN, scene_model, scene_tokenizer
from study_scenes import run_of

from soul_eval.study.figures import best_setting
from soul_eval.study.records import parse_run, read_runs
from soul_recipes import study
from soul_recipes.study_families import FAMILIES, LEVELS, OBJECTIVES, key, search_plan
from soul_recipes.study_optimizers import FilteredAdam, Lion, SplitAdam
from soul_recipes.study_runs import measure, settings_of
from soul_recipes.study_tasks import TASKS, Task, tofu_rows
from soul_trainer.curvature.kronecker import KroneckerCurvature


RECIPES = Path(__file__).parents[1] / "recipes"
TOFU = Path(__file__).parents[2] / "shared" / "tofu"


SEARCHED = [name for name, family in FAMILIES.items() if family.varied]
NUM_STEPS, RATE = 6, 0.01


# Optimizers


def parameters(seed=0):
    """A matrix and a vector in float64."""
    random = torch.Generator().manual_seed(seed)
    shapes = ((3, 4), (5,))
    return [torch.nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64)) for shape in shapes]


def gradients(half):
    """Those of a half, step by step."""
    random = torch.Generator().manual_seed({"forget": 1, "retain": 2}[half])
    return [
        [torch.randn(param.shape, generator=random, dtype=torch.float64) for param in parameters()]
        for _ in range(NUM_STEPS)
    ]


def adam_path(all_gradients, rate=RATE):
    """The parameters after each step of PyTorch's AdamW without decay."""
    params = parameters()
    optimizer = torch.optim.AdamW(params, lr=rate, weight_decay=0.0)
    path = []
    for step in all_gradients:
        for param, gradient in zip(params, step):
            param.grad = gradient.clone()
        optimizer.step()
        path.append([param.detach().clone() for param in params])
    return path


def halves_path(optimizer, params, weights):
    """The parameters after each step of both halves, as the trainer takes them."""
    path = []
    for forget, retain in zip(gradients("forget"), gradients("retain")):
        for group in optimizer.param_groups:
            group["forget_weight"], group["retain_weight"] = weights
        for param, gradient in zip(params, forget):
            param.grad = gradient.clone()
        with optimizer.forget_gradient():
            optimizer.step()
        for param, gradient in zip(params, retain):
            param.grad = gradient.clone()
        optimizer.step()
        path.append([param.detach().clone() for param in params])
    return path


def assert_same_path(path, expected):
    assert len(path) == len(expected) == NUM_STEPS
    for step, other in zip(path, expected):
        for part, right in zip(step, other):
            torch.testing.assert_close(part, right, rtol=1e-9, atol=1e-10)


def test_lion_is_the_published_algorithm():
    """Would catch a momentum that is updated before its sign is taken, and betas that are swapped."""
    params = parameters()
    optimizer = Lion(params, RATE)
    values = [param.detach().clone() for param in params]
    momenta = [torch.zeros_like(value) for value in values]
    for step in gradients("forget"):
        for place, (param, gradient) in enumerate(zip(params, step)):
            param.grad = gradient.clone()
            values[place] -= RATE * torch.sign(0.9 * momenta[place] + 0.1 * gradient)
            momenta[place] = 0.99 * momenta[place] + 0.01 * gradient
        optimizer.step()
        for param, value in zip(params, values):
            torch.testing.assert_close(param.detach(), value, rtol=0, atol=1e-12)


def test_split_adam_adds_the_steps_of_two_adams():
    """Would catch averages that the halves share, weights inside Adam (where they vanish), and a wrong correction."""
    params = parameters()
    path = halves_path(SplitAdam(params, RATE), params, (1.5, 0.25))
    start = [param.detach() for param in parameters()]
    forget, retain = adam_path(gradients("forget")), adam_path(gradients("retain"))
    expected = [
        [origin + 1.5 * (first - origin) + 0.25 * (second - origin) for origin, first, second in zip(start, *steps)]
        for steps in zip(forget, retain)
    ]
    assert_same_path(path, expected)


def sums(filters, weights):
    """The weighted sums of forget gradients that went through a filter each, and retain gradients."""
    pairs = zip(gradients("forget"), gradients("retain"))
    return [
        [weights[0] * apply(first) + weights[1] * second for apply, first, second in zip(filters, *pair)]
        for pair in pairs
    ]


def test_filtered_adam_without_curvature_is_adam_on_the_sum():
    """Would catch a filter that shrinks where nothing is curved, and weights that are lost."""
    params = parameters()
    path = halves_path(FilteredAdam(params, RATE, rule="diagonal"), params, (1.0, 3.0))
    assert_same_path(path, adam_path(sums([torch.clone] * 2, (1.0, 3.0))))


def test_filtered_adam_divides_the_forget_gradient_by_its_curvature():
    """Would catch a filter of the retain gradient too, a mean over the model, and damping that is no share of it."""
    damping, random = 0.2, torch.Generator().manual_seed(5)
    diagonals = [torch.rand(param.shape, generator=random, dtype=torch.float64) ** 4 for param in parameters()]
    params = parameters()
    optimizer = FilteredAdam(params, RATE, rule="diagonal", damping=damping)
    optimizer.partition.names = dict(zip(params, "ab"))
    optimizer.set_hessian(dict(zip("ab", diagonals)))
    path = halves_path(optimizer, params, (2.0, 0.5))
    filters = [lambda g, h=h: g / (1 + h / (damping * h.mean())) for h in diagonals]
    assert_same_path(path, adam_path(sums(filters, (2.0, 0.5))))


def test_filtered_adam_uses_the_curvature_of_matrices():
    """Would catch a filter in another basis, and one with the whole inverse where a share of one is meant."""
    damping, random = 0.3, torch.Generator().manual_seed(6)
    outputs, inputs = (torch.linalg.qr(torch.randn(n, n, generator=random, dtype=torch.float64))[0] for n in (3, 4))
    values = torch.rand(3, 4, generator=random, dtype=torch.float64) ** 3
    rests = torch.zeros(3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), torch.zeros(())
    params = parameters()
    optimizer = FilteredAdam(params, RATE, rule="kronecker", damping=damping)
    optimizer.partition.names = dict(zip(params, "ab"))
    optimizer.matrices = {"a": KroneckerCurvature(inputs, outputs, values, *rests)}
    path = halves_path(optimizer, params, (1.0, 1.0))

    def filtered(gradient):
        return outputs @ ((outputs.T @ gradient @ inputs) / (1 + values / (damping * values.mean()))) @ inputs.T

    assert_same_path(path, adam_path(sums([filtered, torch.clone], (1.0, 1.0))))


# Plans


def test_every_family_has_as_many_settings():
    """Would catch a family that is searched more than others, and a setting that is tried twice."""
    for name, family in FAMILIES.items():
        settings = {json.dumps(setting, sort_keys=True) for setting in family.settings()}
        assert len(family.settings()) == len(settings) == (24 if family.varied else 1), name
        assert family.varied or family.settings() == [{}]
    assert set(FAMILIES) - set(SEARCHED) == {name for name in FAMILIES if name.startswith("soul")}


def test_a_search_that_stops_early_is_fair():
    """Would catch a plan by family, whose prefix favours the first, and keys that two runs share."""
    objectives = ["npo", "ga"]
    plan = search_plan("tofu", list(FAMILIES), objectives, 4)
    assert len(plan) == len({key(run) for run in plan}) == 24 * len(SEARCHED) * len(objectives)
    counts = {(name, objective): 0 for name in SEARCHED for objective in objectives}
    for run in plan:
        counts[run["family"], run["objective"]] += 1
        assert max(counts.values()) - min(counts.values()) <= 1
        # A line that was written and read is the same run.
        assert key(json.loads(json.dumps(run))) == key(run)


@pytest.mark.parametrize("name, value", [("task", "smollm2"), ("family", "lion"), ("objective", "ga"), ("seed", 0)])
def test_keys_tell_runs_apart(name, value):
    """Would catch a run that passes for done because another one is."""
    run = search_plan("tofu", ["adamw"], ["npo"], 4)[0]
    assert key({**run, name: value}) != key(run)
    assert key({**run, "stage": "final"}) != key(run)
    assert key({**run, "setting": {**run["setting"], "retain_weight": 3.0}}) != key(run)


def test_no_final_run_has_the_seed_of_the_search():
    """Would catch figures of runs that chose their own setting."""
    assert set(study.SEARCH_SEEDS) == set(study.NUM_SEEDS) == set(TASKS)
    for task, seed in study.SEARCH_SEEDS.items():
        assert seed not in range(study.NUM_SEEDS[task])


@pytest.mark.skipif(not TOFU.exists(), reason="TOFU's files are not in ../shared/tofu")
def test_tofu_has_rows_for_every_seed_of_the_study():
    """Would catch a seed beyond the authors there are, whose slices are empty, and an author on two sides."""
    seeds = [study.SEARCH_SEEDS["tofu"], *range(study.NUM_SEEDS["tofu"])]
    requests = {seed: tofu_rows(TOFU, seed) for seed in seeds}
    for rows in requests.values():
        assert {split: len(found) for split, found in rows.items()} == {"forget": 80, "retain": 200, "held_out": 60}
    for split in ("forget", "retain", "held_out"):
        questions = [row["question"] for rows in requests.values() for row in rows[split]]
        assert len(set(questions)) > 0.99 * len(questions)  # TOFU itself repeats a few
    last = [json.loads(line)["question"] for line in (TOFU / "forget01.json").read_text().splitlines()]
    # forget01 has 2 of the 4 authors of seed 0.
    assert {row["question"] for row in requests[0]["forget"]} >= set(last)


# Runs


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Eight rows to forget, twelve to retain, four held out, and a model that has learnt nothing."""
    folder = tmp_path_factory.mktemp("target")
    scene_model(num_hidden_layers=2).save_pretrained(folder)
    scene_tokenizer().save_pretrained(folder)
    rows = {"forget": FORGET, "retain": RETAIN[:12], "held_out": RETAIN[12:]}
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "use_cpu": True}
    return Task("toy", rows, str(folder), settings, ["Mara was born in Rome ."], num_evaluations=2)


def run_by(family, setting=None, objective="npo", seed=0, stage="search"):
    """A run of a plan, by default of a middle setting of the family."""
    settings = FAMILIES[family].settings()
    setting = settings[len(settings) // 2] if setting is None else setting
    names = ("task", "family", "objective", "setting", "seed", "stage")
    return dict(zip(names, ("toy", family, objective, setting, seed, stage)))


CASES = [(name, "npo") for name in FAMILIES] + [(name, "rmu") for name in ("filter", "adam_split", "forget_kronecker")]


@pytest.mark.parametrize("family, objective", CASES)
def test_a_run_gives_a_line_that_is_a_run(task, family, objective):
    """Would catch a family whose every run crashes, a curve without its ends, and a line that the report refuses."""
    run = run_by(family, objective=objective)
    line = json.loads(json.dumps(measure(run, task)))
    found = parse_run(json.dumps(line))
    assert found.failed is None and key(line) == key(run)
    assert [entry["step"] for entry in found.curve] == [0, 2, 4]
    assert found.curve[0] == found.target
    assert found.curve[-1]["general"] != found.target["general"]
    assert all(entry["general"] > 0 for entry in found.curve)
    assert found.seconds_per_step > 0 and found.state_bytes > 0
    assert found.relearned is None and found.rounded is None


@pytest.mark.parametrize(
    "family, averages", [("adamw", 2), ("lion", 1), ("adam_split", 4), ("soul_none", 2), ("soul_diagonal", 3)]
)
def test_bytes_are_those_of_the_optimizers_averages(task, family, averages):
    """Would catch momenta that nobody uses and a gradient that is kept, which tables would charge to the family."""
    line = measure(run_by(family), task)
    num_bytes = 4 * averages * scene_model(num_hidden_layers=2).num_parameters()
    # Beside them are step counts, of a few bytes for each tensor.
    assert 0 <= line["state_bytes"] - num_bytes <= 21 * 16


@pytest.mark.parametrize("family", ["adamw", "filter", "soul"])
def test_a_final_run_is_attacked(task, family):
    """Would catch attacks that are left out, or are made of weights other than the run's."""
    line = measure(run_by(family, stage="final"), task)
    found = parse_run(json.dumps(line))
    assert found.relearned["after"] > found.relearned["before"] > 0
    assert abs(found.rounded["forget"] - found.curve[-1]["forget"]) < 0.01
    again = measure(run_by(family, stage="final"), task)
    timeless = [{name: value for name, value in each.items() if name != "seconds_per_step"} for each in (line, again)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("family, rate", [("adamw", 1e6), ("adamw", 1e36), ("sophia", 1e36), ("forget_none", 1e36)])
def test_a_run_that_diverges_says_so(task, tmp_path, family, rate):
    """Would catch a search that one bad setting ends, and NaN in a line, which makes its whole file unreadable."""
    setting = {**FAMILIES[family].settings()[0], "learning_rate": rate}
    line = measure(run_by(family, setting, objective="ga", stage="final"), task)
    assert "not finite" in line["failed"]
    path = tmp_path / "runs-0.jsonl"
    path.write_text(json.dumps(line) + "\n")
    (found,) = read_runs([path])
    assert found.failed and found.curve[0] == found.target


@pytest.mark.parametrize("family", FAMILIES)
def test_learning_rates_fall_with_width_and_depth(task, family):
    """Would catch a wide model at a narrow one's rate, and a trust region, which has its length over all weights."""
    setting = FAMILIES[family].settings()[-1]
    settings = settings_of(run_by(family, setting), replace(task, rate_factor=0.5), width=192, num_layers=8)
    if setting:
        scale = 1.0 if family.startswith("forget_") else 0.5 * 0.5 * 0.5
        assert settings["learning_rate"] == pytest.approx(scale * setting["learning_rate"])
        assert setting == FAMILIES[family].settings()[-1]  # the plan's own is what a line names
    else:
        assert "learning_rate" not in settings
    assert settings["forget_loss"] == OBJECTIVES["npo"]["forget_loss"] == "npo"


# Plans that are carried out


def arguments(folder, shard="0/1", name=None):
    """Of the command line, as far as `work` reads them."""
    return Namespace(output_dir=folder, dataset=folder, shard=shard, name=name)


def test_work_goes_on_where_it_was_cut_off(task, tmp_path, monkeypatch):
    """Would catch runs that are done again, a line that ends in half that hides its run or swallows the next one."""
    monkeypatch.setattr(study, "make_task", lambda *place, with_gold: task)
    plan, path = search_plan("toy", ["adamw", "lion"], ["npo"], 7)[:3], tmp_path / "runs-0.jsonl"
    study.work(plan[:2], arguments(tmp_path))
    first, second = path.read_text().splitlines()
    path.write_text(first + "\n" + second[: len(second) // 2])
    assert set(study.done(tmp_path)) == {key(plan[0])}
    study.work(plan, arguments(tmp_path))
    assert set(study.done(tmp_path)) == {key(run) for run in plan}
    lines = path.read_text().splitlines()
    assert lines[0] == first and len(lines) == 4
    # Another process, or another name, does none of it again.
    study.work(plan, arguments(tmp_path, name="other"))
    assert not (tmp_path / "runs-other.jsonl").exists()
    study.wait_for(plan, tmp_path)


def test_shards_share_a_plan(task, tmp_path, monkeypatch):
    """Would catch runs that two processes do, or none."""
    monkeypatch.setattr(study, "make_task", lambda *place, with_gold: task)
    # A line is its run: what matters here is who does which.
    monkeypatch.setattr(study, "measure", lambda run, task: {**asdict(run_of()), **run})
    plan = search_plan("toy", ["adamw", "lion", "soul"], ["npo", "ga"], 7)
    shares = []
    for index in range(3):
        study.work(plan, arguments(tmp_path, shard=f"{index}/3"))
        shares.append([key(json.loads(line)) for line in (tmp_path / f"runs-{index}.jsonl").read_text().splitlines()])
    assert [len(share) for share in shares] == [32, 32, 32]
    assert sorted(sum(shares, [])) == sorted(key(run) for run in plan)


def test_each_process_of_a_launcher_trains_alone(task, tmp_path, monkeypatch):
    """Would catch trainers that average the gradients of two runs, because they find themselves in one launch."""
    monkeypatch.setattr(study, "make_task", lambda *place, with_gold: task)
    monkeypatch.setitem(study.NUM_SEEDS, "embedded-0.3M", 1)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    chosen = ["--families", "soul,soul_none", "--objectives", "npo", "--stage", "final"]
    monkeypatch.setattr(sys, "argv", ["study.py", "--output_dir", str(tmp_path), *chosen])
    study.main()
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(os.environ)
    (run,) = read_runs([tmp_path / "runs-1.jsonl"])
    assert (run.family, run.setting, run.stage, run.failed) == ("soul_none", {}, "final", None)


@pytest.fixture
def searched(tmp_path):
    """Rows of a search: rate 1 keeps most at 0.2 and 0.1, rate 3 at 0.3, where it stops; and others'."""
    start = {"step": 0, "forget": 1.0, "retain": 1.0, "held_out": 0.8, "general": 4.0}
    short = [start, {**start, "step": 10, "forget": 0.3, "held_out": 0.79}]
    shared = {"task": "embedded-2M", "seed": study.SEARCH_SEEDS["embedded-2M"]}
    runs = [run_of(0.7, rate=1.0, **shared), run_of(0.4, rate=2.0, **shared), run_of(rate=3.0, curve=short, **shared)]
    runs += [run_of(0.99, rate=9.0, **{**shared, **other}) for other in ({"task": "tofu"}, {"objective": "ga"})]
    runs += [run_of(0.99, rate=8.0, **{**shared, "family": "lion"})]
    runs += [run_of(0.99, rate=7.0, **{**shared, "seed": 0, "stage": "final"})]
    lines = [json.dumps(asdict(run)) for run in runs]
    (tmp_path / "runs-0.jsonl").write_text("\n".join(lines[:3]) + "\n")
    (tmp_path / "runs-1.jsonl").write_text("\n".join(lines[3:]) + "\n" + lines[0][:80])
    assert best_setting(runs[:3], 0.3) == {"learning_rate": 3.0}
    return tmp_path


def test_final_runs_are_of_what_the_search_chose(searched):
    """
    Would catch a setting chosen by a final run or by another task, objective or family, one that runs twice because
    two depths chose it, defaults that run once for every depth, and a cut-off line that ends it all.
    """
    plan = study.final_plan(searched, "embedded-2M", ["adamw", "soul"], ["npo"], list(LEVELS))
    assert {run["stage"] for run in plan} == {"final"} and {run["task"] for run in plan} == {"embedded-2M"}
    settings = {"adamw": [{"learning_rate": 3.0}, {"learning_rate": 1.0}], "soul": [{}]}
    for seed in range(3):
        for family, expected in settings.items():
            own = [run["setting"] for run in plan if (run["seed"], run["family"]) == (seed, family)]
            assert own == expected
    assert len(plan) == len({key(run) for run in plan}) == 9
    # Each seed is done for all families before the next one.
    assert [run["seed"] for run in plan] == sorted(run["seed"] for run in plan)
