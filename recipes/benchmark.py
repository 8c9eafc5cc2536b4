"""
Measures what a run costs.

    python recipes/benchmark.py step                              # CPU seconds: step_benchmark.py
    python recipes/benchmark.py eval --dataset DIR --model DIR      # the speed of evaluation: evaluation_speed.py
    python recipes/benchmark.py memory                              # of every forget loss: memory_benchmark.py
"""

import argparse
from pathlib import Path

from transformers.utils import logging

from soul_recipes import memory_benchmark, step_benchmark
from soul_recipes.evaluation_speed import compare


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["step", "eval", "memory"])
    parser.add_argument("--hidden_size", type=int, default=256, help="step: the width of the model.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark"))
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
        print(step_benchmark.table(arguments.hidden_size))
