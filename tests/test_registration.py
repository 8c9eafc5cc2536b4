"""`optim="soul"` in transformers' own tables."""

import json
import pickle

import pytest
import torch
from scenes import FORGET, scene_model, scene_tokenizer
from transformers import HfArgumentParser, Trainer, TrainingArguments

import soul_trainer
from soul_trainer import Sophia, SophiaArguments, UnlearnConfig
from soul_trainer.collator import UnlearnCollator
from soul_trainer.config import parse_optim_args
from soul_trainer.engines import find_sophia
from soul_trainer.formats import prepare


@pytest.mark.parametrize("name", ["soul", "sophia"])
def test_a_plain_trainer_makes_sophia_and_it_refreshes_itself(tmp_path, name):
    """Would catch a name that only our trainer knows, and a Sophia whose Hessian stays zero: sign descent."""
    args = TrainingArguments(
        output_dir=str(tmp_path),
        optim=name,
        optim_args="rho=0.5, hessian_interval=2",
        learning_rate=1e-3,
        max_steps=4,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    tokenizer = scene_tokenizer()
    rows = prepare(FORGET, tokenizer).select_columns(["input_ids", "labels"])
    trainer = Trainer(scene_model(), args, UnlearnCollator(0), rows)
    trainer.train()
    sophia = find_sophia(trainer.optimizer)
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
    assert config.rho == SophiaArguments().rho


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
