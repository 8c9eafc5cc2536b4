"""The recipe that searches for settings: trials, their table, the file of the best, and a search that goes on."""

from pathlib import Path

import optuna
import pytest
import yaml
from datasets import Dataset
from experiment_scenes import FLAGS, asked
from scenes import FORGET, RETAIN, scene_config, scene_model, scene_tokenizer

from soul_eval.experiment import Experiment, UnlearningTask
from soul_recipes import search as recipe
from soul_trainer import UnlearnTrainer


def learnt(folder: Path, rows: list[dict]) -> str:
    """A model of the scene that knows rows by heart: without, it has no utility to keep."""
    settings = {"optim": "adamw_torch", "forget_loss": "none", "max_steps": 80, "logging_steps": 80}
    args = scene_config(folder, **settings, per_device_train_batch_size=16, learning_rate=2e-2)
    trainer = UnlearnTrainer(scene_model(hidden_size=32), args, rows, rows, scene_tokenizer())
    trainer.train()
    trainer.save_model()
    return str(folder)


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> UnlearningTask:
    folder = tmp_path_factory.mktemp("models")
    splits = {"forget": FORGET, "retain": RETAIN, "real_authors": RETAIN[:6], "world_facts": RETAIN[6:]}
    return UnlearningTask(
        suite="tofu",
        title="A scene",
        target=learnt(folder / "target", FORGET + RETAIN),
        gold=learnt(folder / "gold", RETAIN),
        forget=Dataset.from_list(FORGET),
        retain=Dataset.from_list(RETAIN),
        rows=[row for split, rows in splits.items() for row in asked(rows, split)],
        asked={"max_new_tokens": 8},
    )


def searched(folder: Path, task: UnlearningTask, *flags: str) -> optuna.Study:
    command_line = ["--output_dir", str(folder), *FLAGS, "--learning_rates", "1e-3,1e-1", "--optim", "soul", *flags]
    experiment = Experiment("tofu", folder / "configs", recipe.SearchArguments, command_line=command_line)
    study = recipe.search(experiment, task, experiment.compare(task), "soul")
    recipe.write_best(study, "soul", experiment.settings("soul"))
    return study


def test_a_search_goes_on_and_leaves_the_best_for_the_recipe(tmp_path, task, capsys):
    """
    Would catch trials that a second start makes again, a best trial that breaks the model, and a file that the recipe
    does not read.
    """
    first = searched(tmp_path, task, "--trials", "2")
    study = searched(tmp_path, task, "--trials", "3")
    trials = study.get_trials()
    assert [trial.params for trial in trials[:2]] == [trial.params for trial in first.get_trials()[:2]]
    assert len(trials) == 3 and len({trial.params["rho"] for trial in trials}) == 3
    for trial in trials:
        assert 1e-3 <= trial.params["learning_rate"] <= 1e-1
        assert (tmp_path / "soul" / f"run-{trial.number}" / "unlearning.json").exists()
        is_useful = trial.value >= 0
        assert is_useful == (trial.value == trial.user_attrs["forget_quality"])
    printed = capsys.readouterr().out
    best = max(trials, key=lambda trial: trial.value)
    table = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert [line[0] for line in table[-4:]][:2] == ["---", str(best.number)] and table[-5][0] == "trial"
    path = tmp_path / "soul" / "best.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert settings == {"optim": "soul", "forget_loss": "npo", **best.params}
    read = Experiment("tofu", tmp_path, recipe.TofuArguments, command_line=["--config", str(path), "--use_cpu"])
    assert (read.config.learning_rate, read.config.rho) == (best.params["learning_rate"], best.params["rho"])


def test_what_a_search_needs_is_said(tmp_path):
    """Would catch a range that is read wrongly, and a search without a gold model that ends in a missing figure."""

    def arguments(*flags):
        Experiment("tofu", tmp_path, recipe.SearchArguments, command_line=["--use_cpu", *flags])

    for flags, message in (
        (("--rhos", "3"), "`rho`=.* is no range"),
        (("--learning_rates", "1e-2,1e-4"), "`learning_rate`=.* is no range"),
        (("--trials", "0"), "`trials` must be at least 1, but it is 0"),
        (("--num_requests", "2"), "A search forgets once"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments(*flags)
