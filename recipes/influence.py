"""
Compares solvers of influence unlearning on the embedded corpus, each at the strength that forgets equally much.

    python recipes/influence.py --models outputs/influence       # where the target is, or will be trained
"""

import copy
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from soul_eval.console import run_script
from soul_recipes.fictitious_authors import make_corpus
from soul_recipes.small_llama import SmallModelArguments
from soul_recipes.small_models import small_models
from soul_recipes.study_runs import SPLITS, probability
from soul_trainer.collator import UnlearnCollator
from soul_trainer.command_line import PlainParser
from soul_trainer.formats import prepare
from soul_trainer.influence import InfluenceArguments, influence_update


# Conjugate gradients get the damping that the others have by default.
SETTINGS = {
    "diagonal": {"solver": "diagonal"},
    "kronecker": {"solver": "kronecker"},
    "kronecker, 4 draws": {"solver": "kronecker", "num_draws": 4},
    "conjugate_gradient, 10 iterations": {"solver": "conjugate_gradient", "max_iterations": 10},
    "diagonal, 4 steps": {"solver": "diagonal", "num_steps": 4},
    "kronecker, 4 steps": {"solver": "kronecker", "num_steps": 4},
    "kronecker, 4 steps, remeasured": {"solver": "kronecker", "num_steps": 4, "remeasure": True},
}
ROWS_PER_BATCH, TRIALS, LARGEST_STRENGTH = 16, 8, 1.0


def target_of(corpus: dict, folder: Path) -> str:
    """The folder of the model that has learnt everything."""
    learnt = {
        split: Dataset.from_list(corpus[split]).select_columns(["question", "answer"])
        for split in (*SPLITS, "real_authors", "world_facts")
    }
    general = learnt.pop("real_authors").to_list() + learnt.pop("world_facts").to_list()
    return small_models({**learnt, "general": Dataset.from_list(general)}, folder, SmallModelArguments(), 0)[0]


def unlearned(model, halves: tuple, strength: float, settings: dict):
    """A copy of the model after the steps; none if they led nowhere."""
    moved = copy.deepcopy(model)
    try:
        influence_update(moved, *halves, InfluenceArguments(strength=strength, **settings))
    except FloatingPointError:
        return None
    return moved


def matched(model, tokenizer, corpus: dict, halves: tuple, settings: dict, goal: float) -> tuple:
    """The largest strength that leaves forget answers their goal, by bisection of its logarithm, and the model."""
    low, high, best = LARGEST_STRENGTH / 1000, LARGEST_STRENGTH, model
    for _ in range(TRIALS):
        strength = (low * high) ** 0.5
        moved = unlearned(model, halves, strength, settings)
        if moved is not None and probability(moved, tokenizer, corpus["forget"]) >= goal:
            low, best = strength, moved
        else:
            high = strength
    return low, best


def main(arguments: list[str] | None = None) -> None:
    """Prints a row of a table for each setting."""
    parser = PlainParser(__doc__)
    parser.add_argument("--models", type=Path, default=Path("outputs/influence"), help="Folder of the target.")
    parser.add_argument("--goal", type=float, default=0.2, help="Probability that forget answers are to keep.")
    parser.add_argument("--only", help="Settings in whose names this is found; by default all.")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    corpus = make_corpus(seed=0)
    target = target_of(corpus, options.models)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    collate = UnlearnCollator.for_tokenizer(tokenizer)

    def batches(half: str) -> list:
        rows = prepare(Dataset.from_list(corpus[half]), tokenizer, tokenizer.model_max_length, None, half)
        starts = range(0, len(rows), ROWS_PER_BATCH)
        return [collate([{half: row} for row in rows.select(range(len(rows))[s:][:ROWS_PER_BATCH])]) for s in starts]

    halves = batches("forget"), batches("retain")
    print("| setting | strength | forget | retain | held-out | CPU seconds |\n|---|---|---|---|---|---|")
    for name, settings in SETTINGS.items():
        if options.only and options.only not in name:
            continue
        strength, moved = matched(model, tokenizer, corpus, halves, settings, options.goal)
        left = " | ".join(f"{probability(moved, tokenizer, corpus[split]):.3f}" for split in SPLITS)
        start = time.process_time()
        unlearned(model, halves, strength, settings)
        print(f"| {name} | {strength:.3f} | {left} | {time.process_time() - start:.0f} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(run_script(main))
