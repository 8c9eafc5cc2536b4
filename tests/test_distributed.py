"""Two processes against one: the same numbers, not only the same exit code."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


# The same global batches; gradients are summed in another order, over 6 steps of at most 0.01.
SAME_SUMS = 5e-6

WORKER = """
import sys
sys.path.insert(0, {tests!r})
import torch
from scenes import scene_model, scene_trainer, weights
from soul_trainer.engines import find_sophia

world, folder, accumulation = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
trainer = scene_trainer(
    folder,
    scene_model(),
    num_train_epochs=3,
    per_device_train_batch_size=4 // (world * accumulation),
    gradient_accumulation_steps=accumulation,
    hessian_interval=2,
    hessian_batch_size=5,
    forget_loss=sys.argv[4],
    retain_loss=sys.argv[5],
    ddp_backend="gloo" if world > 1 else None,
)
seen = []
original = trainer.compute_loss
def watched(model, inputs, *args, **kwargs):
    seen.append((round(trainer.state.epoch or 0, 2), inputs["row"].tolist()))
    return original(model, inputs, *args, **kwargs)
trainer.compute_loss = watched
trainer.train()
sophia = find_sophia(trainer.optimizer)
names = dict((p, n) for n, p in trainer.model.named_parameters())
hessians = dict((names[p], state["hessian"]) for p, state in sophia.state.items())
losses = [entry["forget_loss"] for entry in trainer.state.log_history if "forget_loss" in entry]
torch.save(dict(weights=weights(trainer.model), hessians=hessians, losses=losses, seen=seen),
           folder + "/result-" + str(trainer.args.process_index) + ".pt")
"""


def launch(folder: Path, world: int, accumulation: int, objectives: tuple[str, str]) -> list[dict]:
    """Runs the scene on `world` processes; what each of them ended with."""
    folder.mkdir()
    script = folder / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent)), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
    command = [sys.executable, *launcher, str(script), str(world), str(folder), str(accumulation), *objectives]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.parametrize(
    ("accumulation", "objectives"), [(1, ("npo", "nll")), (2, ("ga", "kl"))], ids=["npo", "accumulated"]
)
def test_two_processes_follow_one(tmp_path, accumulation, objectives):
    """
    Would catch losses divided by a local count (the rows have different lengths), a Hessian whose B is that of one
    process, sampled labels or pairs that depend on the process, references in another order, and a pairing stuck at
    the first epoch. 5 rows a refresh leave one process with a row less.
    """
    (single,) = launch(tmp_path / "single", 1, accumulation, objectives)
    both = launch(tmp_path / "both", 2, accumulation, objectives)
    assert single["losses"] == pytest.approx(both[0]["losses"], rel=1e-5)
    for name, weight in single["weights"].items():
        assert torch.equal(both[0]["weights"][name], both[1]["weights"][name])
        assert (weight - both[0]["weights"][name]).abs().max() < SAME_SUMS
    for name, hessian in single["hessians"].items():
        assert torch.allclose(hessian, both[0]["hessians"][name], rtol=1e-3, atol=1e-9)
    epochs = [[rows for epoch, rows in both[0]["seen"] if int(epoch) == e] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]


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
    original = trainer.forget_objective.function
    def spoilt(half, beta):
        losses = original(half, beta)
        is_here = trainer.state.global_step == 2 and trainer.args.process_index == 1
        return losses * float("nan") if is_here else losses
    trainer.forget_objective = type(trainer.forget_objective)(spoilt)
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
