"""
Sweeps optimizers equally over the embedded corpus, and prints what each of them is worth.

    python recipes/benchmark.py sweep --output_dir outputs/sweep        # resumes; --shard 0/2 does every second run
    python recipes/benchmark.py table --output_dir outputs/sweep
    python recipes/benchmark.py eval --dataset DIR --model DIR          # the speed of evaluation: evaluation_speed.py
    python recipes/benchmark.py memory                                  # of every forget loss: memory_benchmark.py

Each optimizer gets 24 settings for each objective and seed, 60 steps of 8 forget and 8 retain rows with gradients
clipped at 1, and starts from the same target. A run is a line of `runs-*.jsonl`.
"""

import argparse
import json
import tempfile
from pathlib import Path

import memory_benchmark
import numpy as np
import torch
from datasets import Dataset
from evaluation_speed import compare
from fictitious_authors import make_corpus
from small_llama import SmallModelArguments
from small_models import small_models
from sweep import key, plan, table
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils import logging

from soul_eval.metrics.forget_quality.formula import forget_quality
from soul_eval.metrics.truth_ratio.formula import truth_ratios
from soul_eval.scoring import answer_losses
from soul_trainer import UnlearnConfig, UnlearnTrainer
from soul_trainer.curvature import update_shares
from soul_trainer.formats import render


SPLITS = ("forget", "retain", "held_out")


@torch.inference_mode()
def forget_truth_ratios(model, tokenizer, rows: list[dict]) -> np.ndarray:
    """Truth ratios of the forget rows, shape `(rows,)`."""
    answers = [[row["paraphrased_answer"], *row["perturbed_answer"]] for row in rows]
    examples = [
        render({"question": row["question"], "answer": answer}, tokenizer)
        for row, group in zip(rows, answers)
        for answer in group
    ]
    losses = np.reshape(answer_losses(model, tokenizer, examples, progress=False), (len(rows), -1))
    return truth_ratios(losses[:, 0], losses[:, 1:])


def probability(model, tokenizer, rows: list[dict]) -> float:
    """Mean probability of the true answers."""
    examples = [render(row, tokenizer) for row in rows]
    return float(np.exp(-np.array(answer_losses(model, tokenizer, examples, progress=False))).mean())


def measure(run: dict, corpus: dict, target: str, gold_ratios: np.ndarray) -> dict:
    """Unlearns with the run's settings and measures what is left."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        args = UnlearnConfig(
            output_dir=folder,
            per_device_train_batch_size=8,
            num_train_epochs=6,
            logging_steps=60,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=run["seed"],
            **run["settings"],
        )
        trainer = UnlearnTrainer(model, args, corpus["forget"], corpus["retain"], tokenizer)
        trainer.pop_callback(PrinterCallback)
        output = trainer.train()
    moved = {name: float((p.detach() - before[name]).square().sum()) for name, p in model.named_parameters()}
    quality, statistic = forget_quality(forget_truth_ratios(model, tokenizer, corpus["forget"]), gold_ratios)
    clipped = [log["curvature/clipped"] for log in trainer.state.log_history if "curvature/clipped" in log]
    return {
        **run,
        "forget_quality": quality,
        "ks_statistic": statistic,
        **{f"{split}_probability": probability(model, tokenizer, corpus[split]) for split in SPLITS},
        "update_share": update_shares(moved),
        "clipped": clipped[-1] if clipped else None,
        "seconds_per_step": output.metrics["train_runtime"] / trainer.state.global_step,
    }


def sweep(folder: Path, seeds: list[int], shard: str) -> None:
    """Does the runs of a shard that are not in its file yet."""
    index, num_shards = map(int, shard.split("/"))
    path = folder / f"runs-{index}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    done = {key(json.loads(line)) for file in folder.glob("runs-*.jsonl") for line in file.read_text().splitlines()}
    for seed in seeds:
        corpus = make_corpus(seed=seed)
        rows = {split: Dataset.from_list(members) for split, members in corpus.items()}
        general = Dataset.from_list(corpus["real_authors"] + corpus["world_facts"])
        learnt = {split: rows[split].select_columns(["question", "answer"]) for split in SPLITS}
        learnt["general"] = general.select_columns(["question", "answer"])
        target, gold = small_models(learnt, folder / f"seed-{seed}", SmallModelArguments(), seed)
        tokenizer = AutoTokenizer.from_pretrained(gold)
        gold_ratios = forget_truth_ratios(AutoModelForCausalLM.from_pretrained(gold), tokenizer, corpus["forget"])
        for run in plan([seed])[index::num_shards]:
            if key(run) not in done:
                with path.open("a") as file:
                    file.write(json.dumps(measure(run, corpus, target, gold_ratios)) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["sweep", "table", "eval", "memory"])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/sweep"))
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--shard", default="0/1", help="This process's part of the runs: index/number.")
    parser.add_argument("--dataset", help="eval: TOFU's folder or hub id; by default the embedded corpus.")
    parser.add_argument("--forget_split", default="forget10", help="eval: the rows to forget, with --dataset.")
    parser.add_argument("--model", help="eval: the model; by default a small one that learns the rows first.")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.command == "memory":
        memory_benchmark.main(memory_benchmark.MemoryBenchmarkArguments())
    elif arguments.command == "eval":
        compare(arguments.output_dir, arguments.dataset, arguments.forget_split, arguments.model)
    else:
        if arguments.command == "sweep":
            sweep(arguments.output_dir, arguments.seeds, arguments.shard)
        print(table(arguments.output_dir))
