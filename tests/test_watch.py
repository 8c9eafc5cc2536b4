"""Warnings of a run that does nothing, destroys what it should keep, or is too short to say."""

import pytest
from scenes import scene_trainer


LONG = {"num_train_epochs": 26, "logging_steps": 1000}


def said(caplog, folder, **settings):
    scene_trainer(folder, **{**LONG, **settings}).train()
    return [record.getMessage() for record in caplog.records if record.name.endswith("callbacks.watch")]


def test_a_run_that_does_nothing_says_so_and_names_the_setting(tmp_path, caplog):
    """Would catch eight epochs at a learning rate that moves nothing, with no line that says so."""
    found = said(caplog, tmp_path, optim="adamw_torch", learning_rate=1e-7, forget_loss="npo")
    assert len(found) == 1
    assert "The forget loss stands still" in found[0] and "raise `learning_rate` (now 1e-07)" in found[0]
    assert "after 13 of 52 steps" in found[0]


def test_a_clipped_run_names_rho(tmp_path, caplog):
    """Would catch advice on the learning rate alone where the clip makes the curvature moot."""
    (found,) = said(caplog, tmp_path, optim="sophia", rho=1e-6, learning_rate=1e-7, forget_loss="npo")
    assert "`rho` (now 1e-06), because 1" in found or "`rho` (now 1e-06), because 9" in found


def test_a_run_that_destroys_what_it_should_keep_says_so_once(tmp_path, caplog):
    """Would catch a retain loss that runs away in silence, and a warning at every step."""
    settings = {"optim": "adamw_torch", "learning_rate": 0.05, "forget_loss": "ga", "retain_weight": 0.0}
    (found,) = said(caplog, tmp_path, **settings)
    assert "The retain loss runs away" in found and "Lower `learning_rate` (now 0.05)" in found


def test_a_good_run_says_nothing_and_a_short_one_that_it_is_short(tmp_path, caplog):
    """Would catch warnings that are always there, which nobody reads."""
    good = {"optim": "adamw_torch", "learning_rate": 1e-3, "forget_loss": "npo"}
    assert said(caplog, tmp_path / "good", **good) == []
    (found,) = said(caplog, tmp_path / "short", **good, num_train_epochs=3)
    assert "only 6 steps. Raise `num_train_epochs` (now 3)" in found


@pytest.mark.parametrize("rule", ["none", "diagonal"])
def test_two_directions_are_watched_too(tmp_path, caplog, rule):
    """Would catch losses of the forget pass that the watch never sees."""
    (found,) = said(caplog, tmp_path, optim="soul", rule=rule, learning_rate=1e-8, forget_loss="npo")
    assert "The forget loss stands still" in found
