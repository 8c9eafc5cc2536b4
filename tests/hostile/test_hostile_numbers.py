"""A run is finished only if its gradients and its weights are finite and it took steps; else it says what is left."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_jobs import DEEPSPEED, save_models
from scenes import FORGET, RETAIN, largest_difference, scene_config, scene_model, scene_tokenizer, scene_trainer
from scenes import weights as weights_of
from transformers import AutoModelForCausalLM, TrainerCallback

from soul_trainer import Soul, UnlearnTrainer
from soul_trainer.records import RUN_FILE


ADAMW = {"optim": "adamw_torch", "hessian_interval": None}
OPTIMIZERS = {
    "sophia": {},
    "two_directions": {"rule": "diagonal", "hessian_interval": None},
    "kronecker": {"rule": "kronecker", "hessian_interval": None},
    "adamw": ADAMW,
    "adamw_unclipped": {**ADAMW, "max_grad_norm": 0},
    "sgd": {**ADAMW, "optim": "sgd"},
    "accumulated": {**ADAMW, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "lion_like": {"rule": "none", "hessian_interval": None, "max_grad_norm": 0},
}


class SpoilGradient(TrainerCallback):
    """From a step on, the gradient of one weight is not finite, while the losses are."""

    def __init__(self, model, step: int, value: float):
        self.step, self.value, self.is_on = step, value, False
        model.lm_head.weight.register_hook(self.spoilt)

    def spoilt(self, gradient):
        return torch.full_like(gradient, self.value) if self.is_on else gradient

    def on_step_begin(self, args, state, control, **kwargs):
        self.is_on = state.global_step >= self.step


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_stops_before_its_step(tmp_path, optimizer, value):
    """Would catch weights that become NaN in a step, and are saved as a success if it was the last one."""
    settings = {"num_train_epochs": 8, "save_strategy": "no", **OPTIMIZERS[optimizer]}
    trainer = scene_trainer(tmp_path, **settings)
    spoil = SpoilGradient(trainer.model, 2, value)
    trainer.add_callback(spoil)
    with pytest.raises(FloatingPointError, match=r"gradient is not finite in step 3, .*checkpoint-2 holds the state"):
        trainer.train()
    weights = weights_of(trainer.model)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert largest_difference(weights_of(saved), weights) == 0
    assert not (tmp_path / RUN_FILE).exists()


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
@pytest.mark.parametrize("step", [1, 3, 4])
def test_weights_that_are_not_finite_are_neither_saved_nor_finished(tmp_path, save_strategy, step):
    """Would catch NaN weights that the last step leaves, and an error that recommends a checkpoint with them."""

    class SpoilWeights(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == step:
                model.lm_head.weight.data[0, 0] = float("nan")

    settings = {"max_steps": 4, "save_strategy": save_strategy, "save_steps": 1, **ADAMW}
    trainer = scene_trainer(tmp_path, **settings)
    trainer.add_callback(SpoilWeights())
    way_on = f"checkpoint-{step - 1} has finite weights" if save_strategy == "steps" and step > 1 else "no checkpoint"
    with pytest.raises(
        FloatingPointError, match=f"weights are not finite after step {step}, and are not saved.*{way_on}"
    ):
        trainer.train()
    assert not (tmp_path / f"checkpoint-{step}").exists() and not (tmp_path / RUN_FILE).exists()
    for folder in tmp_path.glob("checkpoint-*"):
        saved = AutoModelForCausalLM.from_pretrained(folder)
        assert all(tensor.isfinite().all() for tensor in weights_of(saved).values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_such_weights_is_refused(tmp_path, value):
    """Would catch rows that are blamed for a model that is broken before the first step."""
    model = scene_model()
    model.lm_head.weight.data[0, 0] = value
    with pytest.raises(FloatingPointError, match="weights of `model` are not finite before the first step"):
        scene_trainer(tmp_path, model=model).train()


def test_a_run_without_a_step_is_refused(tmp_path):
    """Would catch a run that leaves out its only batch and is called finished."""
    settings = {"dataloader_drop_last": True, "per_device_train_batch_size": 64}
    with pytest.raises(ValueError, match=r"`dataloader_drop_last` leaves out a batch.*8 of 64 rows"):
        scene_trainer(tmp_path, **settings)


@pytest.mark.parametrize("large", [1e25, 1e30])
def test_a_gradient_that_cannot_be_squared_is_kept_out_of_the_hessian(large):
    """Would catch a weight that is frozen for good by an infinite Hessian."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = Soul([param], lr=0.1, rule="sophia", scaling="none")
    for gradient in ([1.0, 2.0, 3.0], [1.0, large, 3.0]):
        param.grad = torch.tensor(gradient)
        optimizer.update_hessian(1.0, decay=0.5)
    assert optimizer.state[param]["hessian"].tolist() == pytest.approx([0.75, 2.0, 6.75])
    assert int(optimizer.num_kept_out) == 1


def test_what_is_kept_out_is_said(tmp_path, caplog):
    """Would catch an estimate that is left out in silence."""
    trainer = UnlearnTrainer(
        scene_model(), scene_config(tmp_path, max_steps=1, save_strategy="no"), FORGET, RETAIN, scene_tokenizer()
    )
    weight = trainer.model.model.layers[0].mlp.down_proj.weight
    weight.register_hook(lambda gradient: gradient * 1e25)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert f"not finite at {weight.numel()} weights of this process" in caplog.text


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_a_gradient_of_one_process_stops_all_before_the_step(tmp_path, engine):
    """Would catch an engine that steps by it, skips every step in silence, or stops one process while others wait."""
    if engine in DEEPSPEED:
        pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    save_models(tmp_path / "models")
    script = Path(__file__).parent / "number_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command += [engine, str(tmp_path), "npo", "two_directions"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    for job in ("npo", "two_directions"):
        for rank in range(2):
            found = json.loads((tmp_path / f"{job}-{rank}.json").read_text(encoding="utf-8"))
            assert "gradient is not finite in step 3, which was not taken" in (found["error"] or ""), found
            assert found["steps"] == 2 and found["same"], found
        assert (tmp_path / f"{engine}-{job}" / "checkpoint-2" / "trainer_state.json").exists()
