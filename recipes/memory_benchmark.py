"""
Measures the peak memory of unlearning with each optimizer, as a ratio to AdamW's, and with each forget loss, as a
ratio to gradient difference's: the model, its gradients, the optimizer's states, activations, and what is kept of the
model before unlearning. A whole training is measured, from the pass that computes references to the last step.

    python recipes/benchmark.py memory                                              # 34 million parameters
    python recipes/memory_benchmark.py --hidden_size 2048 --num_hidden_layers 16    # on a GPU, say

On a CPU each allocation of torch's is counted, so that two measurements differ by no byte; on a GPU, torch counts.
"""

import gc
import tempfile
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)
from transformers.utils import logging

from soul_recipes.fictitious_authors import make_corpus
from soul_recipes.memory_plan import MIB, allocated_peak
from soul_recipes.neutral_tokenizer import train_tokenizer, training_text
from soul_trainer import UnlearnConfig, UnlearnTrainer
from soul_trainer.objectives import FORGET_LOSSES


# Kronecker curvature, the default of small models, takes a minute to measure in each training.
OPTIMIZERS = {
    "AdamW": {"optim": "adamw_torch"},
    "SOUL, diagonal": {"optim": "soul", "rule": "diagonal", "hessian_batch_size": 2},
}
RULES = {"none": "no curvature", "diagonal": "diagonal", "kronecker": "Kronecker"}
ALL_OPTIMIZERS = {
    "AdamW": OPTIMIZERS["AdamW"],
    "Sophia": {"optim": "sophia", "hessian_batch_size": 2},
    **{f"SOUL, {label}": {**OPTIMIZERS["SOUL, diagonal"], "rule": rule} for rule, label in RULES.items()},
}
BASELINE = "ga"
# Beside each forget loss with the retain loss `nll`: what needs whole distributions of the model before unlearning.
DISTRIBUTIONS = {
    f"{name}, {reference}": {**losses, "reference": reference}
    for name, losses in {
        "ga with retain_loss kl": {"forget_loss": "ga", "retain_loss": "kl"},
        "undial": {"forget_loss": "undial"},
    }.items()
    for reference in ("auto", "cached_topk")
}


@dataclass
class MemoryBenchmarkArguments:
    """The model that is unlearned; its weights are random, in float32."""

    hidden_size: int = field(default=512, metadata={"help": "Width of the model."})
    num_hidden_layers: int = field(default=8, metadata={"help": "Layers of the model, at least 1."})
    vocab_size: int = field(default=8192, metadata={"help": "Rows of its embeddings, at least 1024."})
    batch_size: int = field(default=1, metadata={"help": "Pairs of a forget and a retain row in a step."})
    steps: int = field(default=2, metadata={"help": "Optimizer steps; the first one makes the optimizer's states."})

    def model_config(self) -> LlamaConfig:
        """A Llama's configuration."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.hidden_size * 8 // 3,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=max(1, self.hidden_size // 64),
            max_position_embeddings=512,
        )


def make_rows(num_rows: int) -> tuple[PreTrainedTokenizerBase, dict[str, Dataset]]:
    """A tokenizer, and as many rows to forget (with alternate answers) as to retain."""
    corpus = make_corpus()
    rows = {
        split: [
            {"question": row["question"], "answer": row["answer"], "alternate": row["perturbed_answer"]}
            for row in corpus[split][:num_rows]
        ]
        for split in ("forget", "retain")
    }
    tokenizer = train_tokenizer([training_text(row) for row in corpus["retain"]])
    return tokenizer, {split: Dataset.from_list(part) for split, part in rows.items()}


def training_peak(
    config: LlamaConfig, tokenizer: PreTrainedTokenizerBase, rows: dict[str, Dataset], settings: dict
) -> int:
    """
    The most bytes that a training from random weights holds at a time, the model's own included.

    Args:
        config ([`~transformers.LlamaConfig`]): Of the model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the rows.
        rows (`dict[str, Dataset]`): `forget` and `retain`.
        settings (`dict`): Fields of [`UnlearnConfig`].
    """

    def train() -> None:
        set_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            args = UnlearnConfig(
                output_dir=folder, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1, **settings
            )
            trainer = UnlearnTrainer(LlamaForCausalLM(config), args, rows["forget"], rows["retain"], tokenizer)
            trainer.pop_callback(PrinterCallback)
            trainer.train()

    gc.collect()  # what a former training left in circles would be freed in this one, and taken off its peak
    if not torch.cuda.is_available() or settings.get("use_cpu"):
        return allocated_peak(train)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train()
    return torch.cuda.max_memory_allocated() - before


def shared_settings(args: MemoryBenchmarkArguments) -> dict:
    """The settings of every training."""
    # RMU steers a layer that a small model may not have.
    layer = min(args.num_hidden_layers - 1, 7)
    return {"per_device_train_batch_size": args.batch_size, "max_steps": args.steps, "rmu_layer": layer}


def compare_optimizers(args: MemoryBenchmarkArguments) -> list[list[str]]:
    """The rows of a table: for each optimizer with gradient difference, MiB and their ratio to AdamW's."""
    tokenizer, rows = make_rows(args.batch_size * args.steps)
    table, baseline = [["optimizer", "MiB", "ratio"]], None
    for name, optimizer in ALL_OPTIMIZERS.items():
        settings = {**shared_settings(args), **optimizer, "forget_loss": BASELINE}
        peak = training_peak(args.model_config(), tokenizer, rows, settings)
        baseline = baseline or peak
        table.append([name, f"{peak / MIB:.1f}", f"{peak / baseline:.3f}"])
    return table


def compare_memory(args: MemoryBenchmarkArguments) -> list[list[str]]:
    """The rows of a table: for each forget loss and each optimizer, MiB and their ratio to gradient difference's."""
    config = args.model_config()
    tokenizer, rows = make_rows(args.batch_size * args.steps)
    cases = {name: {"forget_loss": name} for name in FORGET_LOSSES if name != "none"} | DISTRIBUTIONS
    cases["task_vector"]["retain_loss"] = "none"  # what it learnt would be taken back
    table = [["forget loss", *(f"{name}{what}" for name in OPTIMIZERS for what in (", MiB", ", ratio"))]]
    baseline = {}
    for case in sorted(cases, key=lambda name: name != BASELINE):
        line = [case]
        for name, optimizer in OPTIMIZERS.items():
            peak = training_peak(config, tokenizer, rows, {**shared_settings(args), **optimizer, **cases[case]})
            ratio = peak / baseline.setdefault(name, peak)
            line += [f"{peak / MIB:.1f}", f"{ratio:.3f}"]
        table.append(line)
    return table


def main(args: MemoryBenchmarkArguments) -> None:
    """Prints both tables."""
    logging.set_verbosity_error()
    with torch.device("meta"):
        num_parameters = LlamaForCausalLM(args.model_config()).num_parameters()
    print(f"{num_parameters / 1e6:.1f}M parameters in float32; pairs of rows in a step: {args.batch_size}")
    for compare in (compare_optimizers, compare_memory):
        head, *lines = compare(args)
        rows = (head, ["---", *["---:"] * (len(head) - 1)], *lines)
        print("", *(f"| {' | '.join(row)} |" for row in rows), sep="\n", flush=True)


if __name__ == "__main__":
    main(*HfArgumentParser(MemoryBenchmarkArguments).parse_args_into_dataclasses())
