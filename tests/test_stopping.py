"""Early stopping at a level: at which step, after a resume and on two processes too, and where the level is from."""

import subprocess
import sys
from pathlib import Path

import pytest
from scenes import FORGET, largest_difference, logged, scene_model, scene_trainer, weights
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from soul_trainer import UnlearningStoppingCallback, gold_forget_loss


EVERY_STEP = {"forget_loss": "ga", "num_train_epochs": 4, "eval_strategy": "steps", "eval_steps": 1}


def stopped(folder, *callbacks, resume=None, **settings):
    trainer = scene_trainer(folder, trainer_arguments={"callbacks": list(callbacks)}, **{**EVERY_STEP, **settings})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("metric", "grows"), [("eval_forget_loss", True), ("forget_loss", False)], ids=["evaluated", "trained"]
)
def test_training_stops_at_the_first_step_that_reaches_the_level(tmp_path, metric, grows):
    """Would catch a stop a step late or early, the wrong direction, and figures of training that are not seen."""
    whole = logged(stopped(tmp_path / "whole"), metric)
    assert len(whole) == 8 and whole == sorted(whole, reverse=not grows)
    level = (whole[3] + whole[4]) / 2
    callback = UnlearningStoppingCallback(level, metric, greater_is_better=grows)
    trainer = stopped(tmp_path / "stopped", callback, overwrite=True)
    assert trainer.state.global_step == 5
    assert logged(trainer, metric) == whole[:5]
    # Trained once more, from where it is: the count starts anew.
    trainer.train()
    assert trainer.state.global_step == 1 and callback.num_reached == 1


def test_patience_counts_the_times_in_a_row():
    """Would catch a single outlier that stops training, and counts that outlive a figure back below the level."""
    callback = UnlearningStoppingCallback(2.0, "figure", patience=2)
    control, is_stopped = TrainerControl(), []
    for value in (2.5, 1.0, 2.0, 3.0):
        callback.on_log(TrainingArguments(report_to="none", use_cpu=True), TrainerState(), control, {"figure": value})
        is_stopped.append(control.should_training_stop)
    assert is_stopped == [False, False, False, True]


def test_a_resumed_run_stops_where_the_whole_one_does(tmp_path):
    """Would catch a count that starts over, takes another callback's, or a resume that dies on a callback it adds."""
    level = logged(stopped(tmp_path / "plain", save_strategy="steps", save_steps=1), "eval_forget_loss")[1]

    def callbacks():
        return UnlearningStoppingCallback(level, patience=4), UnlearningStoppingCallback(1e6, patience=2)

    whole = stopped(tmp_path / "whole", *callbacks(), save_strategy="steps", save_steps=1)
    assert whole.state.global_step == 5
    for step in (3, 4):
        resumed = stopped(tmp_path / "again", *callbacks(), resume=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == 5
        assert largest_difference(weights(whole.model), weights(resumed.model)) == 0
    # From a checkpoint of a run without it, it counts what it sees itself: steps 3 to 6.
    added = UnlearningStoppingCallback(level, patience=4)
    checkpoint = str(tmp_path / "plain" / "checkpoint-2")
    trainer = stopped(tmp_path / "added", added, resume=checkpoint, save_strategy="steps", save_steps=1)
    assert trainer.state.global_step == 6


def test_the_level_of_a_gold_model_is_what_the_trainer_would_log(tmp_path):
    """Would catch another mean or other batches than the evaluation's, dropout, and a level of the wrong model."""
    dropout = {"attention_dropout": 0.5}
    trainer = scene_trainer(tmp_path, scene_model(0, **dropout), per_device_eval_batch_size=3)
    gold = scene_model(1, **dropout).train()
    level = gold_forget_loss(gold, trainer)
    # 8 rows in batches of 3 float32 numbers, averaged in another order.
    own = scene_trainer(tmp_path, scene_model(1, **dropout), per_device_eval_batch_size=3).evaluate()
    assert level == pytest.approx(own["eval_forget_loss"], rel=1e-6)
    assert abs(level - trainer.evaluate()["eval_forget_loss"]) > 1e-3
    assert gold.training and gold_forget_loss(gold, trainer, FORGET[:2]) != pytest.approx(level, rel=1e-3)


def test_what_cannot_stop_a_run_is_said(tmp_path):
    """Would catch a misspelt figure that trains to the end, one that is never evaluated, and levels no one reaches."""
    for level in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`level` must be a finite number"):
            UnlearningStoppingCallback(level)
    with pytest.raises(ValueError, match="`patience` must be at least 1, but it is 0"):
        UnlearningStoppingCallback(1.0, patience=0)
    with pytest.raises(ValueError, match="set `eval_strategy`"):
        stopped(tmp_path, UnlearningStoppingCallback(1.0), eval_strategy="no")
    for name in ("eval_forgot_loss", "forgot_loss"):
        with pytest.raises(ValueError, match=f"`metric`='{name}' is not logged. What is: .*eval_forget_loss"):
            stopped(tmp_path, UnlearningStoppingCallback(1.0, name))
    trainer = scene_trainer(tmp_path)
    with pytest.raises(ValueError, match="`dataset`='gold' is not among what the Trainer evaluates: forget, retain"):
        gold_forget_loss(scene_model(), trainer, "gold")
    trainer.eval_dataset = trainer.eval_dataset["forget"]
    with pytest.raises(ValueError, match="`dataset`='forget' is not among .*: rows without a name"):
        gold_forget_loss(scene_model(), trainer)


class LastDigit(TrainerCallback):
    """Logs a figure that reaches 1.0 in step 2 on the second process alone."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        below = 1.0 - 1e-9 * (state.global_step < 2 or args.process_index == 0)
        self.trainer.log({"loss_like": below})


WORKER = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
from scenes import scene_model, scene_trainer
from soul_trainer import UnlearningStoppingCallback, gold_forget_loss
from test_stopping import LastDigit

trainer = scene_trainer(sys.argv[1], per_device_train_batch_size=2, ddp_backend="gloo", per_device_eval_batch_size=3)
level = gold_forget_loss(scene_model(1), trainer)
gold = scene_trainer(sys.argv[1], scene_model(1), ddp_backend="gloo", per_device_eval_batch_size=3)
assert abs(gold.evaluate()["eval_forget_loss"] - level) < 1e-6
trainer.add_callback(UnlearningStoppingCallback(1.0, "loss_like"))
trainer.add_callback(LastDigit(trainer))
trainer.train()
print(f"rank {{trainer.args.process_index}}: step {{trainer.state.global_step}}", flush=True)
torch.distributed.barrier()
os._exit(0)  # torch's own threads now and then abort an orderly exit
"""


def test_two_processes_stop_at_the_same_step(tmp_path):
    """
    Would catch a process that stops alone, on rounding, while the other waits for its gradients for ever, and a gold
    model's level that rows which fill up a batch change.
    """
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent)), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 0: step 2" in done.stdout and "rank 1: step 2" in done.stdout
