"""Training until the rows are forgotten: where the level comes from, when a run stops, and which weights it keeps."""

import pytest
import torch
from datasets import Dataset
from scenes import FORGET, RETAIN, largest_difference, logged, scene_model, scene_trainer, weights

from soul_eval.levels import FORGOTTEN_PROBABILITY, check_until, gold_probability, lengthen, until_callback
from soul_eval.scoring import answer_losses
from soul_trainer import UnlearnConfig, UntilForgottenCallback
from soul_trainer.formats import render


ASCENT = {"forget_loss": "ga", "retain_weight": 0.0, "num_train_epochs": 6}


def probability(model, tokenizer, rows):
    """The evaluation's, which shares no code with the callback's."""
    losses = answer_losses(model.eval(), tokenizer, [render(row, tokenizer) for row in rows], progress=False)
    return float(torch.tensor(losses, dtype=torch.float64).neg().exp().mean())


def trained(folder, level, resume=None, max_utility_loss=1.0, every=1, **settings):
    trainer = scene_trainer(folder, **{**ASCENT, **settings})
    rows = trainer.train_dataset
    until = UntilForgottenCallback(
        trainer, rows.forget, level, kept=rows.retain, max_utility_loss=max_utility_loss, every=every
    )
    trainer.add_callback(until)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, until


def test_a_run_stops_at_the_first_look_below_the_level_and_says_what_the_evaluation_says(tmp_path):
    """Would catch a stop a look late, other probabilities than the evaluation, and looks that change training."""
    whole, _ = trained(tmp_path / "whole", 1e-9)
    found = logged(whole, "until/forget_probability")
    assert found[-1] < found[0] and len(found) == whole.state.max_steps + 1
    assert found[-1] == pytest.approx(probability(whole.model, whole.processing_class, FORGET), rel=1e-4)
    level = (found[4] + found[5]) / 2
    trainer, _ = trained(tmp_path / "stopped", level)
    assert trainer.state.global_step == next(step for step, value in enumerate(found) if value <= level)
    plain = scene_trainer(tmp_path / "plain", **ASCENT)
    plain.train()
    assert largest_difference(weights(plain.model), weights(whole.model)) == 0
    sparse, _ = trained(tmp_path / "sparse", level, every=4)
    assert sparse.state.global_step == 8


def test_a_run_that_costs_too_much_keeps_the_best_weights_within_the_limit(tmp_path):
    """Would catch a limit that is only reported, and the last weights in the place of the best."""
    whole, _ = trained(tmp_path / "whole", 1e-9, learning_rate=0.01)
    kept = logged(whole, "until/kept_probability")
    limit = 1 - kept[3] / kept[0] + 1e-9
    assert kept[4] < kept[3]
    trainer, until = trained(tmp_path / "limited", 1e-9, max_utility_loss=limit, learning_rate=0.01)
    assert until.best.step == 3 and trainer.state.best_global_step == 3
    assert probability(trainer.model, trainer.processing_class, RETAIN) >= (1 - limit) * kept[0] * (1 - 1e-4)
    early, _ = trained(tmp_path / "early", until.best.forget_probability, learning_rate=0.01)
    assert largest_difference(weights(early.model), weights(trainer.model)) == 0


def test_nothing_more_is_forgotten_while_what_is_lost_is_won_back(tmp_path):
    """Would catch steps that go on forgetting beyond the level, and cost what the retain loss could win back."""
    settings = {"learning_rate": 0.02, "retain_weight": 1.0, "optim": "adamw_torch", "num_train_epochs": 12}
    free, _ = trained(tmp_path / "free", 1e-9, **settings)
    level = logged(free, "until/forget_probability")[4]
    # The limit keeps the run going: the kept rows, which an untrained model hardly knows, must become more probable.
    held, until = trained(tmp_path / "held", level, max_utility_loss=0.0, **settings)
    forgotten, kept = (logged(held, f"until/{name}_probability") for name in ("forget", "kept"))
    assert min(forgotten) > min(logged(free, "until/forget_probability"))
    assert held.forget_weight == (0.0 if forgotten[-1] <= level else 1.0)
    assert kept[-1] >= kept[0] and until.is_within_limit
    alone, until = trained(tmp_path / "alone", level, max_utility_loss=0.0, **settings, retain_loss="none")
    assert alone.state.global_step < free.state.max_steps and until.best.step == 0


def test_a_limit_that_nothing_meets_leaves_the_model_as_it_was(tmp_path):
    """Would catch a damaged model in the place of the untouched one, and a limit that is not one."""
    trainer, until = trained(tmp_path, 1e-9, max_utility_loss=0.0, learning_rate=0.05)
    assert until.best.step == 0
    assert largest_difference(weights(scene_model()), weights(trainer.model)) == 0


def test_a_resumed_run_keeps_the_same_weights(tmp_path):
    """Would catch best weights, a level or a start that a checkpoint forgets."""
    first, _ = trained(tmp_path / "first", 1e-9, learning_rate=0.01)
    kept = logged(first, "until/kept_probability")
    settings = {"max_utility_loss": 1 - kept[3] / kept[0] + 1e-9, "learning_rate": 0.01}
    settings |= {"save_strategy": "steps", "save_steps": 5}
    whole, best = trained(tmp_path / "whole", 1e-9, **settings)
    assert best.best.step == 3
    checkpoint = str(tmp_path / "whole" / "checkpoint-5")
    resumed, again = trained(tmp_path / "again", 1e-9, resume=checkpoint, **settings)
    assert (again.start, again.best) == (best.start, best.best)
    assert largest_difference(weights(whole.model), weights(resumed.model)) == 0


def test_the_level_is_from_the_best_evidence_there_is(tmp_path):
    """Would catch a gold model that is not asked, and rows never learnt that are ignored."""
    forget = Dataset.from_list(FORGET)
    others = forget.add_column("paraphrased_answer", [f"so {row['answer']}" for row in FORGET])
    others = others.add_column("perturbed_answer", [["other words", "none"]] * len(FORGET))
    trainer, gold = scene_trainer(tmp_path), scene_model(1)
    asked = gold_probability(gold, trainer, trainer.train_dataset.forget)
    assert asked == pytest.approx(probability(scene_model(1), trainer.processing_class, FORGET), rel=1e-4)
    never = Dataset.from_list(RETAIN)
    found = [
        until_callback(trainer, "forgotten", others, gold, never),
        until_callback(trainer, "forgotten", others, None, never),
        until_callback(trainer, "forgotten", others),
        until_callback(trainer, "forgotten", forget),
        until_callback(trainer, "0.03", others, gold, never),
    ]
    assert [each.level for each in found] == [asked, None, None, FORGOTTEN_PROBABILITY, 0.03]
    assert len(found[1].like) == len(RETAIN) and len(found[2].like) == len(FORGET)
    trainer.add_callback(found[1])
    trainer.train()
    assert found[1].level == pytest.approx(probability(scene_model(), trainer.processing_class, RETAIN), rel=1e-4)


def test_short_runs_get_enough_steps_and_long_ones_stay_as_they_are(tmp_path):
    """Would catch a request of 20 rows whose run ends after five steps."""
    config = UnlearnConfig(str(tmp_path), per_device_train_batch_size=8, use_cpu=True, report_to="none")
    lengthen(config, 20)
    assert config.num_train_epochs == 20
    lengthen(config, 4000)
    assert config.num_train_epochs == 20
    config.max_steps = 7
    lengthen(config, 3)
    assert (config.max_steps, config.num_train_epochs) == (7, 20)


def test_numbers_out_of_range_are_refused(tmp_path):
    """Would catch a level that no run reaches, a share above one, and a word that is read as a level."""
    trainer = scene_trainer(tmp_path)
    rows = trainer.train_dataset.forget
    for arguments, said in (
        ({"level": 1.5}, "`level` must be a probability"),
        ({}, "either `level`"),
        ({"level": 0.1, "like": rows}, "either `level`"),
        ({"level": 0.1, "max_utility_loss": 2.0}, "`max_utility_loss` must be a share"),
        ({"level": 0.1, "every": 0}, "`every` must be at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            UntilForgottenCallback(trainer, rows, **arguments)
    with pytest.raises(ValueError, match="`forget` has no rows"):
        UntilForgottenCallback(trainer, [], 0.1)
    for value in ("soon", "1", "nan", "-0.1"):
        with pytest.raises(ValueError, match="`until` must be 'epochs', 'forgotten' or a probability"):
            check_until(value)
