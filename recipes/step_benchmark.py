"""
What a step of unlearning costs by optimizer, in CPU seconds of one thread: medians over steps, and ratios to AdamW of
runs that take turns. A model with random weights, the embedded corpus, 8 + 8 rows a step.
"""

import statistics
import tempfile
import time

import torch
from transformers import PrinterCallback, TrainerCallback, set_seed

from soul_recipes.fictitious_authors import make_corpus
from soul_recipes.neutral_tokenizer import train_tokenizer, training_text
from soul_recipes.small_llama import SmallModelArguments, new_model
from soul_trainer import UnlearnConfig, UnlearnTrainer


OPTIMIZERS = {
    "AdamW": {"optim": "adamw_torch", "learning_rate": 1e-4},
    "two directions, no curvature": {"rule": "none"},
    "two directions, diagonal": {"rule": "diagonal"},
    "two directions, Kronecker": {"rule": "kronecker"},
    "forget rows alone, Kronecker": {"rule": "kronecker", "retain_loss": "curvature"},
}
STEPS, TURNS = 16, 3


class Clock(TrainerCallback):
    """The CPU seconds between the ends of steps."""

    def __init__(self):
        self.seconds, self._last = [], None

    def on_step_end(self, args, state, control, **kwargs):
        now = time.process_time()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def run(settings: dict, corpus: dict, tokenizer, hidden_size: int) -> tuple[float, float]:
    """The median step and the seconds that measuring curvature took before the first."""
    set_seed(0)
    num_rows = sum(map(len, corpus.values()))
    model, clock = new_model(tokenizer, SmallModelArguments(hidden_size=hidden_size).fitted(num_rows)), Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = UnlearnConfig(
            output_dir=folder,
            per_device_train_batch_size=8,
            max_steps=STEPS,
            logging_steps=STEPS,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        trainer = UnlearnTrainer(model, args, corpus["forget"], corpus["retain"], tokenizer)
        trainer.pop_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.train()
    logged = [entry.get("curvature/refresh_seconds") for entry in trainer.state.log_history]
    return statistics.median(clock.seconds), next((seconds for seconds in logged if seconds), 0.0)


def table(hidden_size: int) -> str:
    """A row for each optimizer, as Markdown."""
    torch.set_num_threads(1)
    corpus = make_corpus(seed=0)
    texts = {split: [training_text(row, None) for row in rows] for split, rows in corpus.items()}
    general = [text for split in texts if split != "forget" for text in texts[split]]
    tokenizer = train_tokenizer(general, 1024, texts["retain"], texts["forget"], allow_strange=True)
    found = {name: [] for name in OPTIMIZERS}
    for _ in range(TURNS):
        for name, settings in OPTIMIZERS.items():
            found[name].append(run(settings, corpus, tokenizer, hidden_size))
    lines = ["| optimizer | CPU seconds a step | over AdamW | seconds to measure curvature |", "|---|---|---|---|"]
    for name, runs in found.items():
        ratio = statistics.median(own[0] / other[0] for own, other in zip(runs, found["AdamW"]))
        seconds = statistics.median(step for step, _ in runs)
        lines.append(f"| {name} | {seconds:.3f} | {ratio:.2f} | {min(curvature for _, curvature in runs):.1f} |")
    return "\n".join(lines)
