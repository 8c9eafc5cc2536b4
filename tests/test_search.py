"""Hyperparameter search with Optuna: each trial is a run of its own, with its settings in force; the objective."""

import json
import math

import optuna
import pytest
import torch
from engine_jobs import asked_rows
from peft import LoraConfig
from scenes import (
    FORGET,
    RETAIN,
    largest_difference,
    scene_config,
    scene_model,
    scene_tokenizer,
    scene_trainer,
    weights,
)

from soul_eval.callback import EvalCallback
from soul_eval.search import ForgetQualitySubjectToUtility, first_order_hp_space, hp_space, soul_hp_space
from soul_trainer import UnlearnTrainer
from soul_trainer.engines import find_soul


SAMPLER = {"sampler": optuna.samplers.RandomSampler(0)}
DRAWN = [
    {"learning_rate": 3e-3, "rho": 0.5, "forget_weight": 0.5, "retain_weight": 2.0},
    {"learning_rate": 1e-2, "rho": 5.0, "forget_weight": 2.0, "retain_weight": 0.5},
]
METHODS = {
    "npo": ({"forget_loss": "npo", "retain_loss": "kl"}, {}),
    "dpo": (
        {
            "forget_loss": "dpo",
            "retain_loss": "kl",
            "reference": "cached_topk",
            "retain_weight_schedule": "primal_dual",
            "weight_mask": "wagle",
            "weight_mask_share": 0.5,
            "sam_radius": 0.01,
        },
        {},
    ),
    "once": (
        {"forget_loss": "ga", "hessian_interval": 0, "hessian_estimator": "empirical_fisher"},
        {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])},
    ),
}


def searcher(folder, trainer_arguments=None, **settings) -> UnlearnTrainer:
    """A trainer that makes another model for each trial."""
    return UnlearnTrainer(
        args=scene_config(folder, **settings),
        forget_dataset=FORGET,
        retain_dataset=RETAIN,
        processing_class=scene_tokenizer(),
        model_init=lambda trial: scene_model(trial.number if trial else 0),
        **(trainer_arguments or {}),
    )


def draw(trial):
    """The trial's settings of `DRAWN`."""
    return {name: trial.suggest_float(name, value, value) for name, value in DRAWN[trial.number].items()}


def losses(history):
    return [[entry.get(key) for key in ("loss", "forget_loss", "retain_loss")] for entry in history if "loss" in entry]


@pytest.mark.parametrize("method", METHODS)
def test_each_trial_is_the_run_that_its_settings_alone_would_be(tmp_path, method):
    """
    Would catch a trial that goes on from the last one's model, adapter, reference, Hessian or sums of losses, settings
    that do not reach the optimizer or the loss, and a finished trial's folder that blocks the next. A log every third
    step leaves sums of the fourth.
    """
    settings, arguments = METHODS[method]
    settings = {**settings, "logging_steps": 3}
    trainer, ends = searcher(tmp_path, arguments, **settings), []

    def objective(metrics):
        rho = find_soul(trainer.optimizer).param_groups[0]["rho"]
        ends.append((weights(trainer.model), rho, losses(trainer.state.log_history)))
        return metrics["eval_retain_loss"]

    best = trainer.hyperparameter_search(draw, objective, n_trials=2, direction="minimize", **SAMPLER)
    assert best.hyperparameters == DRAWN[int(best.run_id)]
    assert len(ends) == 2 and largest_difference(ends[0][0], ends[1][0]) > 1e-4
    for number, (drawn, (found, rho, logged)) in enumerate(zip(DRAWN, ends)):
        folder, own_model = tmp_path / f"alone-{number}", scene_model(number)
        alone = scene_trainer(folder, own_model, trainer_arguments=arguments, **settings, **drawn)
        alone.train()
        assert largest_difference(found, weights(alone.model)) == 0
        assert rho == drawn["rho"] and logged == losses(alone.state.log_history)
        record = json.loads((tmp_path / f"run-{number}" / "unlearning.json").read_text(encoding="utf-8"))
        assert record["settings"].items() >= drawn.items()
    # Settings are as before the search, and the run that follows is no trial.
    assert (trainer.args.rho, trainer.args.learning_rate, trainer.args.retain_weight) == (1.0, 1e-2, None)
    assert not (tmp_path / "unlearning.json").exists()
    vars(trainer.args).update(DRAWN[0])
    trainer.train()
    assert largest_difference(ends[0][0], weights(trainer.model)) == 0
    assert (tmp_path / "unlearning.json").exists()


def test_a_search_finds_what_forgets_and_stays_useful(tmp_path):
    """
    Would catch figures of a former trial's model, an objective that never sees a suite's figures, settings of one
    trial that stay for a next that does not draw them, and a diverged trial that takes the search with it.
    """
    trainer = searcher(tmp_path, forget_loss="ga", logging_steps=4)
    gold = [{**row, "paraphrased_nll": 1.0, "perturbed_nll": [2.0] * (1 + row["index"] % 3)} for row in asked_rows()]
    suite = EvalCallback(trainer, rows=asked_rows(), reference_rows=gold, generate=False)
    trainer.add_callback(suite)
    before = trainer.evaluate()
    # No model utility without TOFU's other splits: the suite's other figures serve as well.
    objective = ForgetQualitySubjectToUtility.of_target(
        before, 0.5, forget_metric="eval_tofu_forget_probability", utility_metric="eval_tofu_retain_probability",
        forget_goal="min",
    )  # fmt: skip
    figures, rhos = [], []

    def space(trial):
        if trial.number == 1:
            return {"learning_rate": trial.suggest_float("learning_rate", 1e30, 1e30)}
        return {"rho": trial.suggest_float("rho", 0.1, 0.1)} if trial.number == 0 else {}

    def watched(metrics):
        figures.append(metrics)
        rhos.append(find_soul(trainer.optimizer).param_groups[0]["rho"])
        return objective(metrics)

    best = trainer.hyperparameter_search(
        space, watched, n_trials=3, direction="maximize", catch=(FloatingPointError,), **SAMPLER
    )
    assert best.run_id in ("0", "2") and rhos == [0.1, 1.0]
    assert figures[0]["eval_tofu_forget_probability"] != figures[1]["eval_tofu_forget_probability"]
    assert objective.min_utility == before["eval_tofu_retain_probability"] / 2
    assert best.objective == max(objective(metrics) for metrics in figures)
    # Its weights are no numbers, and so they are nowhere.
    assert not list(tmp_path.glob("**/checkpoint-*"))


def test_feasible_settings_come_before_all_others():
    """Would catch a penalty that a bad but useful setting does not beat, and one without a direction."""
    objective = ForgetQualitySubjectToUtility(0.6)

    def value(quality, utility, objective=objective):
        return objective({"eval_tofu_forget_quality": quality, "eval_tofu_model_utility": utility, "epoch": 1.0})

    ranked = [value(1.0, 0.6), value(1e-12, 0.9), value(0.0, 0.6), value(1.0, 0.59), value(0.9, 0.3), value(1.0, 0.0)]
    assert ranked == sorted(ranked, reverse=True) and len(set(ranked)) == 6
    assert ranked[0] == 1.0 and value(1.0, math.nan) <= ranked[-1] < ranked[-2]
    assert value(math.nan, 0.7) == ranked[2]
    # Goals other than the largest: here the least, and the gold model's 40 percent.
    for goal, best, worst in (("min", 0.0, 100.0), (40.0, 40.0, 100.0)):
        objective = ForgetQualitySubjectToUtility(0.6, forget_goal=goal, forget_range=(0.0, 100.0))
        ranked = [value(best, 0.7, objective), value(worst, 0.6, objective), value(best, 0.5, objective)]
        assert ranked == sorted(ranked, reverse=True) and len(set(ranked)) == 3


def test_an_objective_says_what_it_lacks():
    """Would catch a KeyError that does not say what there is, and a range that lets a useless model win."""
    objective = ForgetQualitySubjectToUtility(0.6)
    with pytest.raises(
        ValueError, match="`utility_metric`='eval_tofu_model_utility' is not .*: epoch, eval_forget_loss"
    ):
        objective({"eval_forget_loss": 1.0, "epoch": 1.0})
    with pytest.raises(ValueError, match="`forget_metric`='eval_tofu_forget_quality' is not among the figures"):
        objective({"eval_tofu_model_utility": 0.7})
    with pytest.raises(ValueError, match=r"`forget_metric`=.* is 70.0, outside `forget_range`=\(0.0, 1.0\)"):
        objective({"eval_tofu_forget_quality": 70.0, "eval_tofu_model_utility": 0.7})
    for arguments, message in (
        ({"min_utility": 0.0}, "`min_utility` must be a number > 0, but it is 0.0"),
        ({"min_utility": 0.6, "forget_goal": "more"}, "`forget_goal` must be 'max', 'min' or a number.*'more'"),
        ({"min_utility": 0.6, "forget_range": (1.0, 0.0)}, "`forget_range` must be"),
    ):
        with pytest.raises(ValueError, match=message):
            ForgetQualitySubjectToUtility(**arguments)
    with pytest.raises(ValueError, match=r"`share_of_target` must be in \(0, 1\], but it is 95"):
        ForgetQualitySubjectToUtility.of_target({"eval_tofu_model_utility": 0.7}, 95)
    with pytest.raises(ValueError, match="`utility_metric`='eval_tofu_model_utility' is not among"):
        ForgetQualitySubjectToUtility.of_target({"epoch": 0.0})


def test_settings_are_drawn_uniformly_in_the_logarithm():
    """Would catch ranges that are drawn from linearly, which never try a small value, and settings that do nothing."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    space = hp_space(learning_rate=(1e-6, 1e-2), hessian_interval=(1, 100), retain_loss=["nll", "kl"])
    drawn = [space(study.ask()) for _ in range(200)]
    rates = torch.tensor([settings["learning_rate"] for settings in drawn]).log10()
    # Uniform on [-6, -2]: mean -4 with a standard error of 4 / sqrt(12 * 200) = 0.08.
    assert abs(rates.mean() + 4) < 0.3 and rates.min() >= -6 and rates.max() <= -2
    assert {type(settings["hessian_interval"]) for settings in drawn} == {int}
    assert {settings["retain_loss"] for settings in drawn} == {"nll", "kl"}
    assert soul_hp_space(study.ask()).keys() == {"learning_rate", "rho", "retain_weight"}
    assert first_order_hp_space(study.ask()).keys() == {"learning_rate", "retain_weight"}
    with pytest.raises(ValueError, match="UnlearnConfig has no field 'lr' to search over"):
        hp_space(lr=(1e-6, 1e-4))
    for values in ((1e-4, 1e-6), (0.0, 1.0), (1.0, 2.0, 3.0)):
        with pytest.raises(ValueError, match="`rho`=.* is no range"):
            hp_space(rho=values)
    with pytest.raises(ValueError, match="`retain_loss` has no values"):
        hp_space(retain_loss=[])


def test_what_a_search_cannot_do_is_said(tmp_path):
    """Would catch a trial's setting that is recorded but not in force, two sources of a model, a lost optimizer."""
    trainer = searcher(tmp_path)
    with pytest.raises(ValueError, match="`max_length` cannot differ between trials"):
        trainer.hyperparameter_search(
            lambda trial: {"max_length": trial.suggest_int("max_length", 9, 9)}, n_trials=1, **SAMPLER
        )
    with pytest.raises(ValueError, match="`retain_weight` must be >= 0, but it is -1.0"):
        trainer.hyperparameter_search(
            lambda trial: {"retain_weight": trial.suggest_float("retain_weight", -1, -1)}, n_trials=1, **SAMPLER
        )
    with pytest.raises(ValueError, match="needs `model` or `model_init`"):
        searcher(tmp_path, {"model": scene_model()})
    with pytest.raises(ValueError, match="needs `model` or `model_init`"):
        UnlearnTrainer(args=scene_config(tmp_path), forget_dataset=FORGET, retain_dataset=RETAIN)
    optimizer = torch.optim.SGD(scene_model().parameters(), lr=1.0)
    with pytest.raises(ValueError, match="`optimizers` .* `model_init`"):
        searcher(tmp_path, {"optimizers": (optimizer, None)}, optim="adamw_torch")
