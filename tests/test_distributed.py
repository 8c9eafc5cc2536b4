"""What stops one process stops both. That they learn what one process learns is held by test_engines.py."""

import subprocess
import sys
from pathlib import Path

import pytest


STOPPING_WORKER = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
from scenes import scene_model, scene_trainer
from transformers import TrainerCallback

folder, cause = sys.argv[1:]
trainer = scene_trainer(
    folder, scene_model(), per_device_train_batch_size=2, num_train_epochs=3, forget_loss="ga", ddp_backend="gloo"
)
class Interrupt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGINT)
if cause == "interrupt":
    trainer.add_callback(Interrupt())
else:
    original = trainer.objectives.forget.function
    def spoilt(half, beta):
        losses = original(half, beta)
        is_here = trainer.state.global_step == 2 and trainer.args.process_index == 1
        return losses * float("nan") if is_here else losses
    trainer.objectives = trainer.objectives._replace(forget=type(trainer.objectives.forget)(spoilt))
try:
    trainer.train()
except (KeyboardInterrupt, FloatingPointError) as error:
    print(f"rank {{trainer.args.process_index}}: {{type(error).__name__}}: {{error}}", flush=True)
torch.distributed.barrier()
os._exit(0)  # torch's own threads now and then abort an orderly exit
"""


@pytest.mark.parametrize(
    ("cause", "error", "step"),
    [("interrupt", "KeyboardInterrupt", 3), ("nan", "FloatingPointError: The loss is not finite at row", 2)],
)
def test_what_stops_one_process_stops_both_with_a_checkpoint(tmp_path, cause, error, step):
    """Would catch one process that saves while the other waits for its gradients, for ever."""
    script = tmp_path / "worker.py"
    script.write_text(STOPPING_WORKER.format(tests=str(Path(__file__).parent)), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run([*command, str(tmp_path / "out"), cause], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"rank 0: {error}" in done.stdout and f"rank 1: {error}" in done.stdout
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{step}"]
