"""The figures over the course of training."""

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from soul_trainer.reference import eval_mode

from .rows import write_whole


TRAJECTORY_FILE = "trajectory.jsonl"


class TrajectoryCallback(TrainerCallback):
    """
    Evaluates the model before the first step and then every few steps, and keeps the figures in `trajectory.jsonl` in
    the output folder. Training goes on bit for bit as it would have without.

    Every process evaluates, since a sharded model needs them all; the first one writes.

    Args:
        evaluate (`Callable`): Takes the model and returns figures by name.
        every_steps (`int`): Optimizer steps between two evaluations.

    Attributes:
        trajectory (`list[dict]`): The figures, each with its `step`.
        first_step (`int`): Where training began or, after a resume, went on.
        seconds (`float`): How long evaluation took; within training, that is a part of the Trainer's `train_runtime`.
    """

    def __init__(self, evaluate: Callable[[PreTrainedModel], dict[str, float]], every_steps: int):
        if every_steps < 1:
            raise ValueError(f"`every_steps` must be at least 1, but it is {every_steps}.")
        self.evaluate = evaluate
        self.every_steps = every_steps
        self.trajectory: list[dict] = []
        self.first_step = 0
        self.seconds = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Evaluates the model before training or, after a resume, finds the figures up to where it goes on."""
        path = Path(args.output_dir) / TRAJECTORY_FILE
        self.trajectory = []
        self.first_step = state.global_step
        if state.global_step and path.exists():
            entries = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            self.trajectory = [entry for entry in entries if entry["step"] <= state.global_step]
        if not state.global_step:
            self.record(args, state, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Evaluates if this step is due."""
        if state.global_step % self.every_steps == 0:
            self.record(args, state, kwargs["model"])

    def record(self, args: TrainingArguments, state: TrainerState, model: PreTrainedModel) -> None:
        """Evaluates the model as it is, unless this step was; to be called after the last, which may be any."""
        if any(entry["step"] == state.global_step for entry in self.trajectory):
            return
        start = time.perf_counter()
        with _same_random_state(), eval_mode(model):
            figures = self.evaluate(model)
        self.seconds += time.perf_counter() - start
        self.trajectory.append({"step": state.global_step, **figures})
        if state.is_world_process_zero:
            lines = [json.dumps(entry, allow_nan=False) + "\n" for entry in self.trajectory]
            write_whole(Path(args.output_dir) / TRAJECTORY_FILE, "".join(lines))


@contextmanager
def _same_random_state() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
