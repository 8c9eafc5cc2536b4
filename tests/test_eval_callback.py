"""A suite in the course of training; tests/test_engines.py holds it to one process under every engine."""

import pytest
from engine_jobs import asked_rows
from scenes import scene_trainer

from soul_eval.callback import EvalCallback
from soul_eval.report import Run


STEPS = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}


def watched_trainer(folder, trainer_arguments=None, **settings):
    trainer = scene_trainer(folder, trainer_arguments=trainer_arguments, **STEPS, **settings)
    gold = [{**row, "paraphrased_nll": 1.0, "perturbed_nll": [2.0] * (1 + row["index"] % 3)} for row in asked_rows()]
    callback = EvalCallback(trainer, rows=asked_rows(), reference_rows=gold, max_new_tokens=4)
    trainer.add_callback(callback)
    return trainer, callback


def test_figures_come_through_the_trainer(tmp_path):
    """
    Catches figures that trackers and the best model's choice do not see, a suite that runs once for each of the
    Trainer's datasets, and a curve in the report that does not come from the run.
    """
    trainer, callback = watched_trainer(
        tmp_path,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_tofu_forget_probability",
        greater_is_better=False,
    )
    asked = []
    ask = callback.ask
    callback.ask = lambda model: asked.append(trainer.state.global_step) or ask(model)
    trainer.train()
    assert asked == [0, 2, 4]
    entries = [entry for entry in trainer.state.log_history if "eval_tofu_forget_probability" in entry]
    assert [entry["step"] for entry in entries] == [0, 2, 4]
    assert {"eval_tofu_forget_quality", "eval_tofu_forget_rougeL_recall", "eval_tofu_ks_statistic"} <= entries[
        0
    ].keys()
    values = [entry["eval_tofu_forget_probability"] for entry in entries]
    assert len(set(values)) == 3 and trainer.state.best_metric == min(values[1:])
    curve = Run("run", {}, log_history=trainer.state.log_history).curve()
    assert [point["step"] for point in curve] == [0, 2, 4]
    assert [point["forget_probability"] for point in curve] == values
    assert callback.seconds > 0
    # The best model, which is loaded now, through `evaluate()` by hand.
    for _ in range(2):
        assert trainer.evaluate()["eval_tofu_forget_probability"] == pytest.approx(min(values[1:]), abs=1e-6)
    assert asked == [0, 2, 4, 4]


def test_a_subset_has_a_name_and_a_limit(tmp_path):
    """Catches two subsets that overwrite each other in the log, and a limit that is not kept."""
    trainer = scene_trainer(tmp_path, max_steps=1, **STEPS)
    trainer.add_callback(EvalCallback(trainer, rows=asked_rows(), limit=2, name="few", generate=False))
    callback = EvalCallback(trainer, rows=asked_rows(), generate=False)
    trainer.add_callback(callback)
    trainer.train()
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert {"eval_few_forget_probability", "eval_tofu_forget_probability"} <= logged
    assert not any("rouge" in key for key in logged)
    few = trainer.callback_handler.callbacks[-2]
    assert len(few.rows) == 4 and len(callback.rows) == 9


def test_what_does_not_exist_is_named(tmp_path):
    """Catches a misspelt suite or setting that ends in a bare KeyError or TypeError, and a reference of other rows."""
    trainer = scene_trainer(tmp_path)
    with pytest.raises(ValueError, match="`suite` must be one of tofu, .*'tufu'"):
        EvalCallback(trainer, "tufu")
    with pytest.raises(ValueError, match=r"no setting \['forget'\]; it has dataset, .*forget_split"):
        EvalCallback(trainer, rows=[], forget="forget10")
    with pytest.raises(ValueError, match="`reference` has 0 forget rows and the model 7"):
        EvalCallback(trainer, rows=asked_rows(), reference_rows=[])
