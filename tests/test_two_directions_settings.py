"""What two directions and forgetting alone ask of settings, and what a step that stops leaves."""

import json

import pytest
import torch
from peft import LoraConfig
from scenes import FORGET, RETAIN, largest_difference, scene_model, scene_tokenizer, scene_trainer, spoil, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from soul_trainer import Sophia, UnlearnConfig
from soul_trainer.collator import UnlearnCollator
from soul_trainer.engines import find_soul
from soul_trainer.formats import prepare


TWO = {"rule": "diagonal", "hessian_interval": None}
CURVATURE = {"retain_loss": "curvature"}
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def config(**settings) -> UnlearnConfig:
    return UnlearnConfig(output_dir="unused", report_to="none", use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("kronecker", "tensor", True, 0, "empirical_fisher", 0.1)),
        ({"rule": "diagonal"}, ("diagonal", "tensor", True, 0, "empirical_fisher", 0.1)),
        (CURVATURE, ("kronecker", "trust_region", False, 0, "empirical_fisher", 0.1)),
        ({"retain_loss": "none"}, ("kronecker", "tensor", False, 0, "empirical_fisher", 0.1)),
        ({"forget_loss": "none"}, ("kronecker", "tensor", False, 0, "empirical_fisher", 0.1)),
        ({"hessian_estimator": "hutchinson"}, ("diagonal", "tensor", True, 0, "hutchinson", 0.0)),
        ({"optim": "sophia"}, ("sophia", "none", False, 10, "gauss_newton_bartlett", 0.0)),
        ({"rule": "sophia"}, ("sophia", "none", False, 10, "gauss_newton_bartlett", 0.0)),
        ({"optim_args": "rule=none,scaling=trust_region"}, ("none", "trust_region", True, 0, "empirical_fisher", 0.1)),
    ],
)
def test_what_is_left_open_depends_on_the_rule(settings, expected):
    """Would catch the published optimizer with settings that were not published, and the other way round."""
    found = config(**settings).resolved()
    names = ("rule", "scaling", "two_directions", "hessian_interval", "hessian_estimator", "hessian_label_smoothing")
    assert tuple(getattr(found, name) for name in names) == expected


@pytest.mark.parametrize(
    ("settings", "modules", "rate"),
    [
        ({}, "q_proj,v_proj", 12 * 0.12 / 32),
        # Seven matrices of a layer.
        ({"rule": "none"}, "all-linear", (2 / 7) ** 0.8 * 12 * 0.067 / 32),
        ({"optim": "adamw_torch"}, "all-linear", 1e-4),
        ({"optim": "sophia"}, "q_proj,v_proj", 1e-4),
        (CURVATURE, "q_proj,v_proj", 3e-4),
        ({"learning_rate": 0.5}, "q_proj,v_proj", 0.5),
    ],
)
def test_steps_of_adapters_are_longer(tmp_path, settings, modules, rate):
    """Would catch adapters that forget nothing: steps that fit all weights, or a deep model, move them too little."""
    settings = {**TWO, "rule": None, "learning_rate": None, "max_steps": 1, **settings}
    adapted = modules if modules == "all-linear" else modules.split(",")
    peft_config = LoraConfig(r=2, lora_alpha=32, target_modules=adapted, task_type="CAUSAL_LM")
    trainer = scene_trainer(tmp_path, scene_model(hidden_size=32), {"peft_config": peft_config}, **settings)
    assert trainer.args.learning_rate == pytest.approx(rate)
    if settings["rule"] is None and "optim" not in settings:
        assert trainer.args.resolved().rule == ("kronecker" if "retain_loss" in settings else "diagonal")
    lower = LoraConfig(r=4, lora_alpha=16, use_rslora=True, target_modules=adapted, task_type="CAUSAL_LM")
    trainer = scene_trainer(tmp_path, scene_model(hidden_size=32), {"peft_config": lower}, **settings)
    # Its scale is 16 / 4**0.5, as that of an alpha of 32.
    assert trainer.args.learning_rate == pytest.approx(rate)


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, 2**0.5 * 0.12 / 32),
        ({"rule": "none"}, 2**0.5 * 0.067 / 32),
        (CURVATURE, 3e-4),
        ({"scaling": "trust_region"}, 3e-4),
        ({"optim": "sophia"}, 1e-5),
        ({"optim": "adamw_torch"}, 1e-5),
        ({"learning_rate": 0.5}, 0.5),
    ],
)
def test_the_learning_rate_fits_the_model_and_the_scaling(tmp_path, settings, rate):
    """Would catch a default of another unit: a step of a tensor's size in a trust region moves far too much."""
    settings = {**TWO, "rule": None, "learning_rate": None, "max_steps": 1, **settings}
    trainer = scene_trainer(tmp_path, scene_model(hidden_size=32), **settings)
    trainer.train()
    assert trainer.args.learning_rate == pytest.approx(rate)
    assert trainer.optimizer.param_groups[0]["initial_lr"] == pytest.approx(rate)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**CURVATURE, "optim": "adamw_torch"}, "`retain_loss='curvature'`"),
        ({**CURVATURE, "scaling": "tensor"}, "`retain_loss='curvature'`"),
        ({**CURVATURE, "two_directions": True}, "`two_directions`"),
        ({"two_directions": True, "retain_loss": "none"}, "`two_directions`"),
        ({"two_directions": True, "forget_loss": "none"}, "`two_directions`"),
        ({**CURVATURE, "forget_weight": 2.0}, "`forget_weight`=2.0"),
        ({"retain_loss": "none", "forget_weight": 2.0}, "`forget_weight`=2.0"),
        ({"optim": "sophia", "rule": "diagonal"}, "`optim='sophia'`"),
        ({"scaling": "none"}, "`scaling`"),
        ({"scaling": "layer"}, "`scaling`"),
        ({"rule": "newton"}, "`rule`"),
        ({"damping": 0.0}, "`damping`"),
        ({"state_dtype": "float16"}, "`state_dtype`"),
        ({"hessian_interval": -1}, "`hessian_interval`"),
        ({"rule": "none", "curvature": "file.safetensors"}, "`curvature`"),
        pytest.param(
            {**CURVATURE, "rule": "sophia"},
            "`retain_loss='curvature'`",
        ),
        pytest.param(
            {"scaling": "trust_region", "rule": "sophia"},
            "`scaling`",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings, message):
    """Would catch a setting that has no effect, or a run that keeps nothing of what it was to keep."""
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_a_plain_trainer_has_one_gradient_and_sophia(tmp_path):
    """Would catch `optim="soul"` waiting, in any other Trainer, for a forget gradient that never comes."""
    args = TrainingArguments(
        str(tmp_path), optim="soul", max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1
    )
    rows = prepare(RETAIN, scene_tokenizer()).select_columns(["input_ids", "labels"])
    trainer = Trainer(scene_model(), args, UnlearnCollator(0), rows)
    trainer.train()
    soul = find_soul(trainer.optimizer)
    assert type(soul) is Sophia and not soul.defaults["two_directions"] and soul.defaults["hessian_interval"] == 10


def test_forgetting_alone_has_no_retain_rows_in_a_step(tmp_path):
    """Would catch time and a gradient for rows that no loss is of; the curvature alone reads them."""
    trainer = scene_trainer(tmp_path, **TWO, **CURVATURE)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["is_forget"].all() and len(batch["is_forget"]) == 4
    trainer.train()
    assert "retain_loss" not in {key for entry in trainer.state.log_history for key in entry}
    assert any(state["hessian"].any() for state in find_soul(trainer.optimizer).state.values())


@pytest.mark.parametrize("rule", ["diagonal", "kronecker"])
def test_a_trust_region_leaves_no_way_out_where_curvature_is_zero(tmp_path, rule):
    """Would catch LoRA's first matrices, whose gradient is zero until the second ones move, taking a step of 1e12."""
    settings = {**TWO, **CURVATURE, "rule": rule, "forget_loss": "ga", "learning_rate": None}
    trainer = scene_trainer(tmp_path, trainer_arguments={"peft_config": LORA}, **settings)
    before = weights(trainer.model)
    trainer.train()
    assert 0 < largest_difference(before, weights(trainer.model)) < 1.0


class Draws(TrainerCallback):
    """Moves the global random state between the passes of a step, and after it."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.rand(3)

    on_step_end = on_step_begin


def test_dropout_of_the_forget_pass_is_a_function_of_seed_and_step(tmp_path):
    """Would catch a pass that draws from the global state, which a resumed run loads only after it, or one dropout."""
    found = []
    for dropout, callbacks in ((0.3, []), (0.3, [Draws()]), (0.0, [])):
        # The retain rows' own dropout is drawn from the global state, and has no weight here.
        settings = {**TWO, "rule": "none", "forget_loss": "ga", "retain_weight": 0.0, "max_grad_norm": 0.0}
        model = scene_model(attention_dropout=dropout)
        folder = tmp_path / str(len(found))
        trainer = scene_trainer(folder, model, trainer_arguments={"callbacks": callbacks}, **settings)
        trainer.train()
        found.append(weights(trainer.model))
    assert largest_difference(found[0], found[1]) == 0 < largest_difference(found[0], found[2])


def test_the_forget_pass_leaves_the_retain_pass_its_dropout(tmp_path):
    """Would catch a retain pass whose dropout depends on what the forget pass drew."""
    found = []
    for loss, weight in (("ga", 0.0), ("dpo", 0.0)):
        settings = {**TWO, "rule": "none", "forget_loss": loss, "forget_weight": weight}
        trainer = scene_trainer(tmp_path / loss, scene_model(attention_dropout=0.3), **settings)
        trainer.train()
        found.append(weights(trainer.model))
    assert largest_difference(*found) == 0


def spoilt_trainer(folder, half, row, **settings):
    """A trainer whose model gives no number at one row, which has a word of its own; and how to heal the model."""
    rows = {"forget": [dict(r) for r in FORGET], "retain": [dict(r) for r in RETAIN]}
    rows[half][row]["question"] += " that"
    trainer = scene_trainer(folder, **settings)
    spoil(trainer.model, "that")
    trainer.train_dataset.forget = prepare(rows["forget"], scene_tokenizer(), 64)
    trainer.train_dataset.retain = prepare(rows["retain"], scene_tokenizer(), 64)
    return trainer


# The forget row is of the first step; retain row 5 comes after one step with seed 0, which the test asserts.
@pytest.mark.parametrize(
    ("half", "row"),
    [
        ("forget", 3),
        ("retain", 5),
    ],
)
def test_a_loss_that_is_not_finite_leaves_the_state_before_the_step(tmp_path, half, row):
    """Would catch a checkpoint that has half of the step in it, which a resume takes twice, or a row not named."""
    settings = {"rule": "none", "hessian_interval": None, "forget_loss": "ga", "num_train_epochs": 4, "save_steps": 1}
    settings |= {"per_device_train_batch_size": 2, "save_strategy": "steps"}
    stopped = spoilt_trainer(tmp_path, half, row, **settings)
    saved = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            saved[state.global_step] = {
                name: find_soul(stopped.optimizer).state[param]["exp_avg_forget"].clone()
                for name, param in stopped.model.named_parameters()
            }

    stopped.add_callback(Keep())
    with pytest.raises(FloatingPointError, match=rf"loss is not finite at row {row} of `{half}_dataset`"):
        stopped.train()
    steps = stopped.state.global_step
    assert steps > 0, "the step that is stopped must have a past"
    checkpoint = tmp_path / f"checkpoint-{steps}"
    if half == "retain":
        # The forget half is in: whoever resumes must know.
        callbacks = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]
        assert callbacks["FoldCallback"]["attributes"]["last_fold"] == steps
        return
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    kept = sorted(tuple(value["exp_avg_forget"].flatten().tolist()) for value in state.values())
    assert kept == sorted(tuple(value.flatten().tolist()) for value in saved[steps].values())
    assert all(value.isfinite().all() for value in weights(stopped.model).values())
