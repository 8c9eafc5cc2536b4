"""`optim="soul"` in transformers' own tables."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
from scenes import FORGET, RETAIN, scene_model, scene_tokenizer
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

import soul_trainer
from soul_trainer import HessianCallback, Sophia, SoulArguments, UnlearnConfig
from soul_trainer.collator import UnlearnCollator
from soul_trainer.engines import find_soul
from soul_trainer.formats import prepare
from soul_trainer.soul_settings import parse_optim_args


def plain_trainer(tmp_path, model=None, optim_args="rho=0.5,hessian_interval=2", callbacks=(), **settings) -> Trainer:
    """A Trainer that knows of nothing but the string."""
    defaults = {"optim": "soul", "max_steps": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 2}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path), optim_args=optim_args, **{**defaults, **quiet, **settings})
    tokenizer = scene_tokenizer()
    rows = prepare(FORGET, tokenizer).select_columns(["input_ids", "labels"])
    model = scene_model() if model is None else model
    return Trainer(model, args, UnlearnCollator(0), rows, processing_class=tokenizer, callbacks=list(callbacks))


@pytest.mark.parametrize("name", ["soul", "sophia"])
def test_a_plain_trainer_makes_sophia_and_it_refreshes_itself(tmp_path, name):
    """Would catch a name that only our trainer knows, and a Sophia whose Hessian stays zero: sign descent."""
    trainer = plain_trainer(tmp_path, optim=name)
    trainer.train()
    sophia = find_soul(trainer.optimizer)
    assert isinstance(sophia, Sophia) and sophia.defaults["rho"] == 0.5
    decays = {group["weight_decay"] for group in sophia.param_groups}
    assert decays == {0.0}
    for state in sophia.state.values():
        assert float(state["hessian_weight"]) == pytest.approx(1 - 0.95**2)
    assert any(state["hessian"].any() for state in sophia.state.values())


def test_arguments_survive_json_pickle_copies_and_the_command_line(tmp_path):
    """Would catch a name that is not a real member of the enumeration: it breaks where arguments travel."""
    args = TrainingArguments(output_dir=str(tmp_path), optim="soul")
    assert pickle.loads(pickle.dumps(args)).optim == "soul"
    assert json.loads(args.to_json_string())["optim"] == "soul"
    (parsed,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--optim", "sophia"]
    )
    assert parsed.optim == "sophia"
    (config,) = HfArgumentParser(UnlearnConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--rho", "3", "--forget_loss", "ga", "--no_bias_correction"]
    )
    assert (config.rho, config.forget_loss, config.bias_correction, config.optim.value) == (3.0, "ga", False, "soul")


def test_registering_twice_changes_nothing():
    """Would catch a second import (a notebook's reload) that dies on a name that exists."""
    before = list(type(TrainingArguments(output_dir="x").optim))
    soul_trainer.register()
    assert list(type(TrainingArguments(output_dir="x").optim)) == before


def test_optim_args_fill_the_fields_of_the_configuration(tmp_path):
    """Would catch two places for one fact: `optim_args` that the callback never hears of."""
    config = UnlearnConfig(
        output_dir=str(tmp_path), optim_args="rho=2,estimator=hutchinson,rows=8,bias_correction=false"
    )
    assert (config.rho, config.hessian_estimator, config.hessian_rows, config.bias_correction) == (
        2.0,
        "hutchinson",
        8,
        False,
    )
    again = UnlearnConfig.from_training_arguments(
        TrainingArguments(output_dir=str(tmp_path), optim_args="rho=2", optim="soul")
    )
    assert again.rho == 2.0 and again.remove_unused_columns is False


def test_optim_args_of_other_optimizers_are_left_alone(tmp_path):
    """Would catch our parser refusing the keys of an optimizer that is not ours."""
    config = UnlearnConfig(output_dir=str(tmp_path), optim="adamw_torch", optim_args="fused=true")
    assert config.rho == SoulArguments().rho


@pytest.mark.parametrize("text", ["rho", "rho=", "=3", "rho=x", "hessian_interval=1.5", "bias_correction=perhaps"])
def test_malformed_optim_args_are_named(text):
    """Would catch "not enough values to unpack" as the answer to a typing mistake."""
    with pytest.raises(ValueError, match="optim_args"):
        parse_optim_args(text)


def test_help_comes_from_the_fields():
    """Would catch a field without documentation, or a second copy of it."""
    for name in ("rho", "forget_loss", "hessian_data", "overwrite"):
        assert UnlearnConfig.__dataclass_fields__[name].metadata["help"]
    own = set(UnlearnConfig.__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__)
    assert all(UnlearnConfig.__dataclass_fields__[name].metadata.get("help") for name in own)


def test_torch_loads_the_optimizer_without_foreign_pickles(tmp_path):
    """Would catch state that only an unsafe load can read."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = Sophia([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert torch.equal(loaded["state"][0]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def hessian_lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "Sophia's Hessian" in record.getMessage()]


def test_a_line_at_the_start_says_which_hessian_runs(tmp_path, caplog):
    """Would catch a user who takes one estimator for the other, and two lines that contradict each other."""
    plain_trainer(tmp_path).train()
    assert len(hessian_lines(caplog)) == 1
    assert "the square of the training gradient, every 2 step(s)" in hessian_lines(caplog)[0]
    caplog.clear()
    trainer = plain_trainer(tmp_path)
    retain = prepare(RETAIN, scene_tokenizer(), name="retain_dataset")
    trainer.add_callback(HessianCallback(trainer, retain))
    trainer.train()
    assert len(hessian_lines(caplog)) == 1
    assert "gauss_newton_bartlett on retain rows, every 2 step(s)" in hessian_lines(caplog)[0]
    caplog.clear()
    plain_trainer(tmp_path, optim="adamw_torch", optim_args=None).train()
    assert not hessian_lines(caplog)


def test_a_hessian_that_nobody_estimates_is_refused(tmp_path):
    """Would catch sign descent under the name of a second-order optimizer."""
    with pytest.raises(ValueError, match="`hessian_interval=0` leaves the Hessian to HessianCallback"):
        plain_trainer(tmp_path, optim_args="hessian_interval=0").train()


def test_weights_of_16_bits_are_warned_of(tmp_path, caplog):
    """Would catch a run whose steps are all rounded away, which looks like a model that cannot forget."""
    plain_trainer(tmp_path, scene_model().to(torch.bfloat16)).train()
    assert "any under 6e-5" in caplog.text
    caplog.clear()
    plain_trainer(tmp_path, bf16=True).train()
    assert "any under 6e-5" not in caplog.text
    weight = torch.tensor(0.02, dtype=torch.bfloat16)
    assert weight + 5.9e-5 == weight != weight + 6.2e-5


def test_a_process_that_never_imported_us_unpickles_our_name(tmp_path):
    """Would catch a spawned worker, or a reader of training_args.bin, that dies of a name it does not know."""
    args = TrainingArguments(str(tmp_path), optim="sophia")
    torch.save(args, tmp_path / "training_args.bin")
    pickled = pickle.dumps(TrainingArguments(str(tmp_path), optim="adamw_torch"))
    assert b"soul_trainer" not in pickled
    code = "import sys, torch; print(torch.load(sys.argv[1], weights_only=False).optim.value)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "training_args.bin")], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "sophia", done.stderr


def test_hyperparameter_search_runs_every_trial_with_sophia(tmp_path):
    """Would catch a search whose trials go on with the first one's optimizer, or lose `optim_args`."""
    pytest.importorskip("optuna", reason="needs optuna")
    seen = []

    class Watch(TrainerCallback):
        def on_train_end(self, args, state, control, optimizer=None, **kwargs):
            group = find_soul(optimizer).param_groups[0]
            seen.append((group["initial_lr"], group["rho"], len(find_soul(optimizer).state)))

    trainer = plain_trainer(tmp_path, callbacks=[Watch()], eval_strategy="no")
    trainer.model_init, trainer.eval_dataset = (lambda trial: scene_model()), trainer.train_dataset

    def space(trial):
        return {
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
            "optim_args": trial.suggest_categorical("optim_args", ["rho=0.5,hessian_interval=2", "rho=5"]),
        }

    best = trainer.hyperparameter_search(space, backend="optuna", n_trials=4, direction="minimize")
    assert len(seen) == 4 and len({lr for lr, _, _ in seen}) == 4
    assert {rho for _, rho, _ in seen} <= {0.5, 5.0} and {states for _, _, states in seen} == {seen[0][2]} != {0}
    assert set(best.hyperparameters) == {"learning_rate", "optim_args"}


def test_another_optimizer_may_wrap_itself(tmp_path):
    """Would catch our callback, which is in every Trainer, looking for Sophia for ever."""

    class Circle(torch.optim.SGD):
        @property
        def optimizer(self):
            return self

    assert find_soul(Circle([torch.nn.Parameter(torch.ones(1))], lr=1.0)) is None
    assert find_soul(None) is None
