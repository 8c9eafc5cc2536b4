"""Settings that cannot work are refused where they are given, by name, and never rounded or taken for another."""

import math

import pytest
from scenes import scene_trainer
from transformers import TrainingArguments

from soul_trainer import UnlearnConfig
from soul_trainer.curvature.command import CurvatureArguments
from soul_trainer.influence import InfluenceArguments
from soul_trainer.sampling import SamplingConfig
from soul_trainer.soul_settings import SoulArguments, parse_optim_args


NUMBERS = (
    *(
        "learning_rate",
        "num_train_epochs",
        "weight_decay",
        "max_grad_norm",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
    ),
    *("forget_weight", "retain_weight", "retain_loss_limit", "dual_step_size", "dual_warmup_epochs", "l1_weight"),
    *("npo_beta", "simnpo_beta", "simnpo_margin", "dpo_beta", "wga_power", "satimp_saturation"),
    *("satimp_importance", "undial_strength", "rmu_coefficient", "task_vector_scale", "sam_radius"),
    *("weight_mask_share", "wagle_curvature", "damping", "rho", "beta1", "beta2", "eps", "hessian_label_smoothing"),
)
WHOLE = (
    *("reference_topk", "max_length", "rmu_layer", "rmu_seed", "hessian_interval", "hessian_batch_size"),
    *("hessian_rows", "curvature_rank", "per_device_train_batch_size", "gradient_accumulation_steps"),
)
POSITIVE = (
    *("npo_beta", "simnpo_beta", "dpo_beta", "rmu_coefficient", "task_vector_scale", "wagle_curvature"),
    *("damping", "rho", "eps", "weight_mask_share"),
)
BELOW_ONE = ("beta1", "beta2", "hessian_label_smoothing", "adam_beta1", "adam_beta2")
REFUSED = [
    *((name, value, "must be a finite number") for name in NUMBERS for value in (math.inf, -math.inf, math.nan)),
    *((name, "1.0", "must be a number") for name in NUMBERS if not name.startswith(("learning", "weight_d", "adam"))),
    *((name, True, "must be a number") for name in ("damping", "npo_beta", "forget_weight")),
    *((name, -1.0, "must be (>|in)") for name in NUMBERS),
    *((name, 0.0, "must be (>|in)") for name in POSITIVE),
    *((name, 1.0, r"must be in \[0, 1\)") for name in BELOW_ONE),
    *((name, value, "must be a whole number") for name in WHOLE for value in (2.5, 2.0, "2")),
    *((name, -1, "must be >=") for name in WHOLE),
    ("weight_mask_share", 1.5, r"must be in \(0, 1\]"),
    ("num_train_epochs", 0, "must be > 0, or `max_steps` say"),
]


@pytest.mark.parametrize("name, value, message", REFUSED)
def test_a_setting_that_cannot_work_is_refused(name, value, message):
    """Would catch a run that ends in NaN, does nothing or rounds a setting, because nobody looked at its value."""
    with pytest.raises(ValueError, match=f"`{name}` {message}"):
        UnlearnConfig("out", **{name: value})


@pytest.mark.parametrize(
    "kind, settings, name",
    [
        (InfluenceArguments, {"strength": math.nan}, "strength"),
        (InfluenceArguments, {"tolerance": 1.0}, "tolerance"),
        (InfluenceArguments, {"num_steps": 1.5}, "num_steps"),
        (InfluenceArguments, {"max_iterations": 0}, "max_iterations"),
        (SamplingConfig, {"temperature": math.inf}, "temperature"),
        (SamplingConfig, {"top_p": 0}, "top_p"),
        (SamplingConfig, {"batch_size": 1.0}, "batch_size"),
        (SamplingConfig, {"seed": -1}, "seed"),
        (CurvatureArguments, {"model": "m", "dataset": "d", "output": "o", "rank": 2.5}, "rank"),
        (CurvatureArguments, {"model": "m", "dataset": "d", "output": "o", "chunk_length": 0}, "chunk_length"),
        (CurvatureArguments, {"model": "m", "dataset": "d", "output": "o", "save_minutes": math.nan}, "save_minutes"),
    ],
)
def test_the_settings_of_other_commands_are_refused_as_well(kind, settings, name):
    """Would catch a command whose settings have no range."""
    with pytest.raises(ValueError, match=f"`{name}` must be "):
        kind(**settings)


@pytest.mark.parametrize(
    "optim_args, message",
    [
        ("rho=1,rho=2", "names 'rho' twice"),
        ("interval=1,hessian_interval=2", "names 'hessian_interval' twice"),
        ({"interval": 1, "hessian_interval": 2}, "names 'hessian_interval' twice"),
        ("rho=", "has rho='', which is no float"),
        ("rho", "has rho='', which is no float"),
        ("rho=high", "has rho='high', which is no float"),
        ("interval=2.5", "has interval='2.5', which is no int"),
        ("bias_correction=maybe", "which is no bool"),
        ("rh=1", "Unknown key 'rh'"),
    ],
)
def test_a_malformed_optim_args_is_refused(optim_args, message):
    """Would catch a key whose first or last value wins in silence."""
    with pytest.raises(ValueError, match=message):
        parse_optim_args(optim_args)


@pytest.mark.parametrize("value", ["rho=inf", "rho=nan", "beta1=1", "eps=0", "batch_size=0", "damping=-1"])
def test_a_plain_trainer_s_optim_args_have_the_same_ranges(value):
    """Would catch a range that only `UnlearnConfig` has."""
    with pytest.raises(ValueError, match="must be"):
        SoulArguments(**parse_optim_args(value)).check()


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 0},
        {"learning_rate": None, "retain_weight": None, "max_length": None, "hessian_rows": None},
        {"num_train_epochs": 0, "max_steps": 3},
        {"num_train_epochs": 0.5, "max_grad_norm": 0, "weight_decay": 0},
        {"weight_mask_share": 1, "sam_radius": 0, "hessian_interval": 0, "rmu_layer": 0},
    ],
)
def test_the_ends_of_ranges_are_taken(settings):
    """Would catch a range that leaves out a value that means something."""
    UnlearnConfig("out", **settings)


def test_plain_arguments_are_checked_when_they_become_settings():
    """Would catch `TrainingArguments` whose values nobody looks at."""
    with pytest.raises(ValueError, match="`max_grad_norm` must be >= 0"):
        UnlearnConfig.from_training_arguments(TrainingArguments("out", max_grad_norm=-1.0))


IDLE = [
    ({"warmup_steps": math.nan}, "`warmup_steps` must be a finite number"),
    ({"logging_steps": math.nan}, "`logging_steps` must be a finite number"),
    ({"save_strategy": "steps", "save_steps": 0}, "`save_steps` must be > 0"),
    ({"save_strategy": "steps", "save_steps": -1}, "`save_steps` must be > 0"),
    ({"eval_strategy": "steps", "eval_steps": -2}, "`eval_steps` must be > 0"),
    ({"save_total_limit": 0}, "`save_total_limit` must be >= 1"),
    ({"max_steps": 0}, "`max_steps` must be >= 1, or -1"),
    ({"max_steps": -7}, "`max_steps` must be >= -1"),
    ({"max_steps": 2.5}, "`max_steps` must be a whole number"),
    ({"seed": -1}, r"`seed` must be in \[0, 4294967295\]"),
    ({"seed": 2**32}, r"`seed` must be in \[0, 4294967295\]"),
    ({"seed": 1.5}, "`seed` must be a whole number"),
    ({"data_seed": -1}, r"`data_seed` must be in \[0, 4294967295\]"),
    ({"per_device_eval_batch_size": 0}, "`per_device_eval_batch_size` must be >= 1"),
    ({"dataloader_num_workers": -1}, "`dataloader_num_workers` must be >= 0"),
    ({"neftune_noise_alpha": math.nan}, "`neftune_noise_alpha` must be a finite number"),
    ({"lr_scheduler_kwargs": {"num_cycles": math.nan}}, "`lr_scheduler_kwargs` has num_cycles=nan"),
    *(
        ({name: value}, f"`{name}` must be True or False, but it is {value!r}")
        for name in ("two_directions", "gradient_checkpointing", "bf16", "overwrite", "push_to_hub")
        for value in ("no", "maybe", 2)
    ),
    *(({"eval_delay": value}, "`eval_delay` must be") for value in (-3, math.nan, "5", True)),
    *(({"eval_accumulation_steps": value}, "`eval_accumulation_steps` must be") for value in (-3, "5", 2.5, 0)),
    *(({name: "5"}, f"`{name}` must be a") for name in ("warmup_steps", "logging_steps", "save_steps")),
    ({"dataloader_num_workers": "5"}, "`dataloader_num_workers` must be a whole number"),
    ({"save_steps": math.inf}, "`save_steps` must be a finite number"),
    ({"logging_steps": math.inf}, "`logging_steps` must be a finite number"),
    ({"forget_loss": ["npo"]}, "`forget_loss` must be one of"),
    ({"forget_weight": 0, "retain_weight": 0}, "leave nothing to train on"),
    ({"forget_weight": 0, "retain_loss": "none", "rule": "sophia"}, "leave nothing to train on"),
]


@pytest.mark.parametrize("settings, message", IDLE)
def test_settings_of_the_trainer_that_mean_nothing_are_refused(settings, message):
    """Would catch a run that ends as finished after a schedule of NaN, no steps, or steps of another number."""
    with pytest.raises(ValueError, match=message):
        UnlearnConfig("out", **settings)


def test_a_penalty_that_is_infinite_stops_the_run(tmp_path):
    """Would catch a loss of infinity that is logged as 0 and ends as finished, because its gradient is clipped."""
    with pytest.raises(FloatingPointError, match="not finite at no row but .*`l1_weight`.* in step 1"):
        scene_trainer(tmp_path, l1_weight=1e38).train()
    assert not (tmp_path / "unlearning.json").exists()


def test_a_warm_up_that_never_ends_is_said(tmp_path, caplog):
    """Would catch a run that ends as finished and has hardly moved."""
    scene_trainer(tmp_path, warmup_steps=1000).train()
    assert "never gets to `learning_rate` (now 0.01). Lower `warmup_steps` (now 1000)" in caplog.text


def test_the_best_model_needs_a_figure_that_there_is(tmp_path):
    """Would catch a KeyError at the first evaluation, after an epoch of training."""
    best = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    with pytest.raises(ValueError, match="`metric_for_best_model`.*set it to one of forget_loss, retain_loss"):
        scene_trainer(tmp_path, **best)
    scene_trainer(tmp_path, **best, metric_for_best_model="retain_loss").train()
