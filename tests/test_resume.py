"""Runs that stop and go on: the same final weights, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scenes import largest_difference, scene_model, scene_trainer, weights
from transformers import TrainerCallback


SETTINGS = {
    "num_train_epochs": 3,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 1,
    "save_strategy": "steps",
    "save_steps": 3,
    "hessian_interval": 2,
}


@pytest.mark.parametrize(
    "settings",
    [
        {"forget_loss": "npo"},
        {"forget_loss": "refusal", "retain_loss": "kl"},
        {"forget_loss": "ga", "hessian_interval": 0, "hessian_estimator": "empirical_fisher"},
        {"forget_loss": "random", "hessian_estimator": "hutchinson", "retain_weight_schedule": "epoch"},
    ],
    ids=["npo", "refusal", "once", "hutchinson"],
)
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, settings):
    """
    Would catch a Hessian that is not saved or is refreshed from other rows, pairing that starts over, and a reference
    taken from the checkpoint instead of the model that training began with. The checkpoint is within an epoch, and
    dropout draws from the global random state.
    """
    model = {"attention_dropout": 0.2}
    whole = scene_trainer(tmp_path / "whole", scene_model(**model), **{**SETTINGS, **settings})
    whole.train()
    assert whole.state.global_step == 12
    resumed = scene_trainer(tmp_path / "whole", scene_model(**model), **{**SETTINGS, **settings})
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert largest_difference(weights(whole.model), weights(resumed.model)) == 0


def test_a_refresh_leaves_no_trace_in_training(tmp_path):
    """
    Would catch a refresh that draws from the global random state, leaves gradients behind, or turns on the optimizer
    at a first micro-batch: with a learning rate of 0, gradients must not depend on it.
    """
    losses = []
    for interval in (1, 5):
        trainer = scene_trainer(
            tmp_path / str(interval),
            scene_model(attention_dropout=0.3),
            hessian_interval=interval,
            learning_rate=0.0,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
        )
        trainer.train()
        losses.append([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
        assert len(losses[-1]) == 4
    assert losses[0] == losses[1]


class Interrupt(TrainerCallback):
    """Presses Ctrl-C in the middle of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_leaves_a_checkpoint_that_goes_on_bit_for_bit(tmp_path):
    """Would catch half a step lost at an interrupt, and a signal handler that stays behind."""
    settings = {**SETTINGS, "save_strategy": "no"}
    whole = scene_trainer(tmp_path / "whole", **settings)
    whole.train()
    handler = signal.getsignal(signal.SIGINT)
    stopped = scene_trainer(tmp_path / "stopped", **settings)
    stopped.add_callback(Interrupt(step=4))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "stopped" / "unlearning.json").exists()
    resumed = scene_trainer(tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    assert largest_difference(weights(whole.model), weights(resumed.model)) == 0


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from scenes import scene_trainer
scene_trainer({folder!r}, num_train_epochs=400).train()
"""


def test_ctrl_c_from_outside_stops_the_process_with_a_checkpoint(tmp_path):
    """Would catch a process that ignores Ctrl-C, or dies of it before its checkpoint is written."""
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        if "'loss'" in line:
            break
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "KeyboardInterrupt" in output
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert {"exp_avg", "hessian", "hessian_weight", "step"} == set(state[0])
