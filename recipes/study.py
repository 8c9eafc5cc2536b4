"""
The study of docs/study.md: which optimizer forgets at the least cost, each searched equally, on seeds of no search.

    accelerate launch recipes/study.py --output_dir outputs/study        # resumes; on several processes, faster
    python recipes/study.py --tasks embedded-0.3M --objectives npo --families adamw,soul
    python recipes/study.py --report docs/study                          # tables and figures of the rows there

A run is a line of `<output_dir>/runs-<process>.jsonl`. Each family gets 24 settings on one seed; those that keep most
at each depth run again on other seeds, which make the figures.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from soul_eval.console import run_script
from soul_eval.study.figures import best_setting
from soul_eval.study.records import parse_run
from soul_recipes.study_families import FAMILIES, OBJECTIVES, SMALLEST, key, levels_of, search_plan
from soul_recipes.study_report import write_study
from soul_recipes.study_runs import measure
from soul_recipes.study_tasks import TASKS, make_task
from soul_trainer.command_line import PlainParser
from soul_trainer.held_folder import hold_output


# Of no final run. Those of TOFU take other authors each, of which there are not so many.
SEARCH_SEEDS = {"embedded-0.3M": 100, "embedded-2M": 100, "embedded-10M": 100, "tofu": 4, "smollm2": 4}
NUM_SEEDS = {"embedded-0.3M": 5, "embedded-2M": 3, "embedded-10M": 3, "tofu": 3, "smollm2": 3}


def done(folder: Path) -> dict[str, dict]:
    """The lines of all processes, by run; a line that was cut off is no run."""
    lines = {}
    for path in sorted(folder.glob("runs-*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            lines[key(line)] = line
    return lines


def final_plan(
    folder: Path,
    task: str,
    families: list[str],
    objectives: list[str],
    levels: list[float] | None = None,
    num_seeds: int | None = None,
) -> list[dict]:
    """
    The settings that the search chose for each depth, on every other seed; and defaults, which need no search. A task
    without a search takes what was found on the smallest model: learning rates fit the width by themselves.
    """
    num_seeds = NUM_SEEDS[task] if num_seeds is None else num_seeds
    if not 1 <= num_seeds <= SEARCH_SEEDS[task]:
        raise ValueError(
            f"`num_seeds` must be between 1 and {SEARCH_SEEDS[task]}, the seed of the search, but it is {num_seeds}."
        )
    runs = [parse_run(json.dumps(line)) for line in done(folder).values()]
    plan = []
    for seed in range(num_seeds):
        for objective in objectives:
            for name in families:
                searched = [
                    run for run in runs if (run.family, run.objective, run.stage) == (name, objective, "search")
                ]
                found = [run for run in searched if run.task == task]
                found = found or [run for run in searched if run.task == SMALLEST]
                depths = levels or levels_of(objective)
                settings = [best_setting(found, level) for level in depths] if FAMILIES[name].varied else [{}]
                unique = {json.dumps(setting, sort_keys=True): setting for setting in settings}
                shared = {"task": task, "family": name, "objective": objective}
                plan += [{**shared, "setting": each, "seed": seed, "stage": "final"} for each in unique.values()]
    return plan


def work(plan: list[dict], args: argparse.Namespace) -> None:
    """Does this process's runs of a plan, those that nobody has done."""
    index, _ = map(int, args.shard.split("/"))
    # Others write into the folder too, to files of their own.
    path = args.output_dir / f"runs-{args.name or index}.jsonl"
    with hold_output(path):
        add_runs(plan, args, path)


def add_runs(plan: list[dict], args: argparse.Namespace, path: Path) -> None:
    """Adds this process's runs of a plan to its file."""
    index, num_processes = map(int, args.shard.split("/"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        path.write_bytes(path.read_bytes() + b"\n")  # the next line would else be part of one that was cut off
    known, tasks = done(args.output_dir), {}
    for run in plan[index::num_processes]:
        if key(run) in known:
            continue
        place, is_final = (run["task"], run["seed"]), run["stage"] == "final"
        if place not in tasks:
            tasks = {place: make_task(*place, args.output_dir / "models", args.dataset, with_gold=is_final)}
        line = measure(run, tasks[place])
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def wait_for(plan: list[dict], folder: Path) -> None:
    """Until all processes have done their runs, among which settings are chosen."""
    while left := {key(run) for run in plan} - set(done(folder)):
        print(f"{len(left)} runs of the search are left to other processes.", flush=True)
        time.sleep(30)


def main(command_line: list[str] | None = None) -> None:
    """Searches, then runs what was found."""
    parser = PlainParser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study"))
    parser.add_argument("--dataset", type=Path, default=Path("tofu"), help="TOFU's folder, for tofu and smollm2.")
    parser.add_argument("--stage", choices=("search", "final"), help="By default one after the other.")
    parser.add_argument("--name", help="Of the file of runs, by default the process.")
    # A run is of one process: its Trainer must not find the launcher's variables.
    shard = f"{os.environ.pop('RANK', 0)}/{os.environ.pop('WORLD_SIZE', 1)}"
    os.environ.pop("LOCAL_RANK", None)
    parser.add_argument("--shard", default=shard, help="Without a launcher: this process's part, index/number.")
    parser.add_argument("--levels", type=float, nargs="+", help="Depths that choose a setting, by default all.")
    parser.add_argument("--num_seeds", type=int, help="Of final runs: by default 5 of embedded-0.3M, 3 of the others.")
    for name, known in (("tasks", TASKS), ("families", FAMILIES), ("objectives", OBJECTIVES)):
        default = ",".join(known) if name != "tasks" else "embedded-0.3M"
        parser.add_argument(f"--{name}", default=default, help=f"Of {', '.join(known)}.")
    parser.add_argument("--report", type=Path, help="Makes tables and pictures of the rows in a folder, and no runs.")
    args = parser.parse_args(command_line)
    if args.report:
        return write_study(args.report)
    torch.set_num_threads(1)
    tasks, families, objectives = (getattr(args, name).split(",") for name in ("tasks", "families", "objectives"))
    for task in tasks:
        plan = search_plan(task, families, objectives, SEARCH_SEEDS[task])
        if args.stage != "final":
            work(plan, args)
        if args.stage is None:
            wait_for(plan, args.output_dir)
        if args.stage != "search":
            plan = final_plan(args.output_dir, task, families, objectives, args.levels, args.num_seeds)
            work(plan, args)


if __name__ == "__main__":
    sys.exit(run_script(main))
