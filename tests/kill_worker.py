"""
Trains once without interruption, and once through 20 deaths by kill -9, each followed by a resume.

    python tests/kill_worker.py FOLDER

Every life is a fork of this process, which has imported everything but run nothing. Deaths are at chosen places, where
a refresh or a save is half done, and at random times. Prints how each life ended.
"""

import io
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scenes import scene_model, scene_trainer
from transformers import TrainerCallback, TrainerState, modeling_utils

from soul_trainer import Soul


SETTINGS = {
    "num_train_epochs": 24,  # 48 steps: longer than 20 lives get
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
    "hessian_interval": 2,
    "forget_loss": "npo",
    "retain_loss": "kl",
}
# Place, and the time at which the run comes by it in that life.
CHOSEN = [
    *(("refresh", 2), ("model.safetensors", 1), ("refresh", 3), ("optimizer.pt", 1), ("trainer_state.json", 1)),
    *(("scheduler.pt", 1), ("refresh", 2), ("rng_state.pth", 2), ("rotation", 1), ("refresh", 4)),
]
NUM_RANDOM = 10
# A random death comes within so many steps from where training began or went on. Steps are counted, not timed: on a
# machine that became faster since the first life, lives of some seconds would end in a finished run.
MOST_STEPS = 6


class Tell(TrainerCallback):
    """Says when training goes on, and each step that is done."""

    def __init__(self, pipe: int):
        self.pipe = pipe

    def on_train_begin(self, args, state, control, **kwargs):
        os.write(self.pipe, b"!")

    on_step_end = on_train_begin


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(place: str, time_: int) -> None:
    """Makes this process die in the middle of what it does at a place, the `time_`-th time."""
    left = [time_]

    def is_due(is_here: bool = True) -> bool:
        left[0] -= is_here
        return is_here and left[0] == 0

    def replace(owner: object, name: str, half: Callable) -> None:
        whole = getattr(owner, name)

        def call(*args, **kwargs):
            return half(whole, *args, **kwargs)

        setattr(owner, name, call)

    def fold(whole, soul, bucket, *args, **kwargs):
        if is_due():
            whole(soul, soul._bucket(bucket.group, bucket.params[: len(bucket.params) // 2]), *args, **kwargs)
            die()
        return whole(soul, bucket, *args, **kwargs)

    def save(whole, value, path, *args, **kwargs):
        if is_due(str(path).endswith(place)):
            buffer = io.BytesIO()
            whole(value, buffer)
            Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
            die()
        return whole(value, path, *args, **kwargs)

    def save_weights(whole, tensors, path, *args, **kwargs):
        whole(tensors, path, *args, **kwargs)
        if is_due():
            os.truncate(path, Path(path).stat().st_size // 2)
            die()

    def save_json(whole, state, path):
        whole(state, path)
        if is_due():
            os.truncate(path, Path(path).stat().st_size // 2)
            die()

    def rotate(whole, folder, *args, **kwargs):
        if is_due(Path(folder).name.startswith("checkpoint")):
            next(Path(folder).glob("*.safetensors")).unlink()
            die()
        return whole(folder, *args, **kwargs)

    if place == "refresh":
        replace(Soul, "_fold", fold)
    elif place == "model.safetensors":
        replace(modeling_utils, "safe_save_file", save_weights)
    elif place == "trainer_state.json":
        replace(TrainerState, "save_to_json", save_json)
    elif place == "rotation":
        replace(shutil, "rmtree", rotate)
    else:
        replace(torch, "save", save)


def live(folder: Path, place: str, time_: int, pipe: int) -> None:
    """Starts, or resumes from the newest whole checkpoint, and trains to the end."""
    if place:
        die_at(place, time_)
    trainer = scene_trainer(folder, scene_model(num_hidden_layers=2, attention_dropout=0.2), **SETTINGS)
    trainer.add_callback(Tell(pipe))
    try:
        trainer.train(resume_from_checkpoint=True)
    except ValueError as error:
        if "found no whole checkpoint" not in str(error):
            raise
        trainer.train()
    trainer.save_model()


def lives(
    folder: Path, place: str = "", time_: int = 0, steps: int | None = None, seconds: float = 0
) -> tuple[int, float]:
    """
    A life in a process of its own, killed so many seconds after so many steps: how it ended, as `waitpid` says, and
    seconds of training.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            live(folder, place, time_, writing)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        sys.stderr.flush()
        os._exit(0)
    os.close(writing)
    os.read(reading, 1)
    start = time.perf_counter()
    if steps is not None:
        for _ in range(steps):
            os.read(reading, 1)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    ended = os.waitpid(child, 0)[1]
    os.close(reading)
    return ended, time.perf_counter() - start


def main() -> None:
    folder = Path(sys.argv[1])
    ended, duration = lives(folder / "whole")
    assert ended == 0
    draw = random.Random(0)
    plan = [*CHOSEN]
    plan += [("", 0, draw.randrange(MOST_STEPS), draw.uniform(0, duration / 48)) for _ in range(NUM_RANDOM)]
    draw.shuffle(plan)
    for life in plan:
        ended, _ = lives(folder / "killed", *life)
        steps = sorted(int(path.name.partition("-")[2]) for path in (folder / "killed").glob("checkpoint-*"))
        death = "killed" if ended == signal.SIGKILL else ended
        # On a line of its own: the one before may have been cut off.
        print(f"\n{death} at {life[0] or 'random'}, checkpoints {steps}", flush=True)
    assert lives(folder / "killed")[0] == 0


if __name__ == "__main__":
    main()
