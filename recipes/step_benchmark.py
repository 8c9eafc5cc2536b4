"""
What second order costs, in CPU seconds of one thread: a step of unlearning by optimizer, one measurement of Kronecker
curvature against an epoch of AdamW over the same rows, and the checks of losses and gradients within a step. What is
compared takes turns, because the speed of a machine changes. A model with random weights, the embedded corpus, 8 rows
to forget and 8 to retain in a step.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from soul_recipes.fictitious_authors import make_corpus
from soul_recipes.neutral_tokenizer import train_tokenizer, training_text
from soul_recipes.small_llama import SmallModelArguments, new_model
from soul_trainer import UnlearnConfig, UnlearnTrainer, engines
from soul_trainer.collator import UnlearnCollator
from soul_trainer.engines import Engine
from soul_trainer.formats import prepare


ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-4}
OPTIMIZERS = {
    "AdamW": ADAMW,
    "two directions, no curvature": {"rule": "none"},
    "two directions, diagonal": {"rule": "diagonal"},
    "two directions, Kronecker": {"rule": "kronecker"},
    "forget rows alone, Kronecker": {"rule": "kronecker", "retain_loss": "curvature"},
}
STEPS, TURNS, BATCH = 16, 3, 8


class Clock(TrainerCallback):
    """
    The CPU seconds of a training whose other callbacks come before.

    Attributes:
        steps (`list[float]`): Between the ends of steps.
        curvature (`float`): Before the first step, in which nothing but curvature takes long.
        training (`float`): From the first step to the end of the last.
    """

    def __init__(self):
        self.steps, self.curvature, self.training = [], 0.0, 0.0
        self._begin = self._first = self._last = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self._begin is None:
            self._begin = time.process_time()

    def on_step_begin(self, args, state, control, **kwargs):
        if self._first is None:
            self._first = time.process_time()
            self.curvature = self._first - self._begin

    def on_step_end(self, args, state, control, **kwargs):
        now = time.process_time()
        if self._last is not None:
            self.steps.append(now - self._last)
        self._last, self.training = now, now - self._first


class Scene:
    """
    The rows, their tokenizer, and trainings of a new model on them.

    Args:
        hidden_size (`int`): Width of the model.
        corpus (`dict[str, list[dict]]`, *optional*): Rows by split; by default the embedded corpus.
    """

    def __init__(self, hidden_size: int, corpus: dict[str, list[dict]] | None = None):
        torch.set_num_threads(1)
        self.corpus = corpus or make_corpus(seed=0)
        texts = {split: [training_text(row, None) for row in rows] for split, rows in self.corpus.items()}
        general = [text for split in texts if split != "forget" for text in texts[split]]
        self.tokenizer = train_tokenizer(general, 1024, texts["retain"], texts["forget"], allow_strange=True)
        self.size = SmallModelArguments(hidden_size=hidden_size).fitted(sum(map(len, self.corpus.values())))

    @property
    def epoch(self) -> int:
        """Steps in which each row to retain is read once."""
        return -(-len(self.corpus["retain"]) // BATCH)

    def unlearn(self, settings: dict, max_steps: int) -> Clock:
        """Steps by an optimizer."""

        def trainer(model, shared: dict) -> Trainer:
            args = UnlearnConfig(**shared, **settings)
            return UnlearnTrainer(model, args, self.corpus["forget"], self.corpus["retain"], self.tokenizer)

        return self._clocked(trainer, max_steps)

    def finetune(self, max_steps: int) -> Clock:
        """Steps of AdamW on the rows to retain alone."""
        rows = prepare(Dataset.from_list(self.corpus["retain"]), self.tokenizer, self.tokenizer.model_max_length)

        def trainer(model, shared: dict) -> Trainer:
            args = TrainingArguments(**shared, **ADAMW, remove_unused_columns=False)
            collate = UnlearnCollator.for_tokenizer(self.tokenizer)
            return Trainer(
                model, args, train_dataset=rows.select_columns(["input_ids", "labels"]), data_collator=collate
            )

        return self._clocked(trainer, max_steps)

    def _clocked(self, make_trainer, max_steps: int) -> Clock:
        set_seed(0)
        model, clock = new_model(self.tokenizer, self.size), Clock()
        with tempfile.TemporaryDirectory() as folder:
            shared = {"output_dir": folder, "per_device_train_batch_size": BATCH, "max_steps": max_steps}
            shared |= {"logging_steps": max_steps, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
            trainer = make_trainer(model, {**shared, "use_cpu": True})
            trainer.pop_callback(PrinterCallback)
            trainer.add_callback(clock)
            trainer.train()
        return clock


def step_table(scene: Scene, num_steps: int = STEPS, num_turns: int = TURNS) -> str:
    """A row for each optimizer, as Markdown: medians over steps, and of turns the median of ratios."""
    found = {name: [] for name in OPTIMIZERS}
    for _ in range(num_turns):
        for name, settings in OPTIMIZERS.items():
            found[name].append(statistics.median(scene.unlearn(settings, num_steps).steps))
    lines = ["| optimizer | CPU seconds a step | over AdamW |", "|---|---|---|"]
    for name, steps in found.items():
        ratio = statistics.median(own / other for own, other in zip(steps, found["AdamW"]))
        lines.append(f"| {name} | {statistics.median(steps):.3f} | {ratio:.2f} |")
    return "\n".join(lines)


def curvature_table(scene: Scene, num_turns: int = TURNS) -> str:
    """What measuring Kronecker curvature once costs, and epochs over the same rows, as Markdown."""
    num_rows, names = len(scene.corpus["retain"]), ("curvature", "unlearning", "fine-tuning")
    found = {name: [] for name in names}
    for _ in range(num_turns):
        found["curvature"].append(scene.unlearn({"rule": "kronecker"}, 1).curvature)
        found["unlearning"].append(scene.unlearn(ADAMW, scene.epoch).training)
        found["fine-tuning"].append(scene.finetune(scene.epoch).training)
    labels = (
        f"Kronecker curvature of {num_rows} rows, measured once",
        f"an epoch of unlearning by AdamW: each of the {num_rows} rows once, beside a row to forget",
        f"an epoch of fine-tuning by AdamW: each of the {num_rows} rows once, alone",
    )
    lines = ["| | CPU seconds | curvature over it |", "|---|---|---|"]
    for name, label in zip(names, labels):
        ratio = statistics.median(own / other for own, other in zip(found["curvature"], found[name]))
        lines.append(f"| {label} | {statistics.median(found[name]):.2f} | {ratio:.2f} |")
    return "\n".join(lines)


@contextmanager
def timed_checks() -> Iterator[list[float]]:
    """The CPU seconds within each check of a loss or of gradients, while it is open."""
    seconds: list[float] = []

    def timed(check: Callable) -> Callable:
        def run(*args):
            begin = time.process_time()
            try:
                return check(*args)
            finally:
                seconds.append(time.process_time() - begin)

        return run

    with (
        patch.object(Engine, "has_finite_gradients", timed(Engine.has_finite_gradients)),
        patch.object(engines, "stop_at_loss", timed(engines.stop_at_loss)),
    ):
        yield seconds


def checks_table(scene: Scene, num_steps: int = STEPS, num_turns: int = TURNS) -> str:
    """The share of a step's CPU time that its checks take, as Markdown."""
    lines = [
        "| checks of losses and gradients | a step | CPU milliseconds a step | of a step |",
        "|---|---|---|---|",
    ]
    for name in ("AdamW", "two directions, diagonal", "two directions, Kronecker"):
        found = []
        for _ in range(num_turns):
            with timed_checks() as seconds:
                clock = scene.unlearn(OPTIMIZERS[name], num_steps)
            found.append((sum(seconds) / num_steps, sum(seconds) / clock.training))
        milliseconds, share = 1000 * statistics.median(f[0] for f in found), statistics.median(f[1] for f in found)
        lines.append(f"| {name} | {len(seconds) / num_steps:.0f} | {milliseconds:.2f} | {share:.2%} |")
    return "\n".join(lines)


def table(hidden_size: int) -> str:
    """All three tables."""
    scene = Scene(hidden_size)
    return f"{step_table(scene)}\n\n{curvature_table(scene)}\n\n{checks_table(scene)}"
