"""What `benchmark.py sweep` compares, 24 settings for each optimizer and objective, and the table of its runs."""

import itertools
import json
from pathlib import Path

import numpy as np


OBJECTIVES = {"gradient difference": {"forget_loss": "ga"}, "NPO": {"forget_loss": "npo"}}
# Both keep h from retain rows: labels sampled anew every 10 steps, or true labels smoothed once before the first step.
ESTIMATORS = {
    "sampled": {"hessian_estimator": "gauss_newton_bartlett", "hessian_interval": 10, "hessian_batch_size": 32},
    "smoothed": {
        "hessian_estimator": "empirical_fisher",
        "hessian_label_smoothing": 0.1,
        "hessian_interval": 0,
        "hessian_batch_size": 4,
    },
}
# The released code: the training gradient squared at every step, no bias correction; its 5120 for B goes into rho.
RELEASED = {
    "optim": "soul",
    "hessian_data": "training",
    "hessian_estimator": "empirical_fisher",
    "hessian_interval": 1,
    "bias_correction": False,
}
# Name: settings that stay, then those that vary, 24 combinations each.
OPTIMIZERS = {
    "AdamW": (
        {"optim": "adamw_torch"},
        {"learning_rate": [4e-4, 8e-4, 1.6e-3, 3.2e-3], "retain_weight": [0.5, 1.0, 2.0, 5.0, 10.0, 20.0]},
    ),
    "SOUL": (
        {"optim": "soul"},
        {
            "estimator": list(ESTIMATORS),
            "learning_rate": [1e-3, 3e-3],
            "rho": [0.3, 3.0, 30.0],
            "retain_weight": [2.0, 5.0],
        },
    ),
    "SOUL as released": (
        RELEASED,
        {"learning_rate": [4e-4, 1.2e-3], "rho": [20.48, 204.8, 2048.0], "retain_weight": [1.0, 2.0, 5.0, 10.0]},
    ),
}
SHOWN = ("learning_rate", "rho", "retain_weight", "hessian_estimator")


def plan(seeds: list[int]) -> list[dict]:
    """Every run, in an order in which any prefix treats the optimizers nearly alike."""
    runs = []
    for seed, objective, (name, (fixed, varied)) in itertools.product(seeds, OBJECTIVES, OPTIMIZERS.items()):
        for values in itertools.product(*varied.values()):
            settings = {**OBJECTIVES[objective], **fixed, **dict(zip(varied, values))}
            settings |= ESTIMATORS.get(settings.pop("estimator", None), {})
            runs.append({"seed": seed, "objective": objective, "optimizer": name, "settings": settings})
    return runs


def key(run: dict) -> str:
    """What tells a run from the others."""
    return json.dumps([run[name] for name in ("seed", "objective", "optimizer", "settings")], sort_keys=True)


def table(folder: Path) -> str:
    """
    A Markdown table of each optimizer's best settings: those with the highest held-out probability among the settings
    whose forget probability is at most 0.2, both means over the seeds.
    """
    files = sorted(folder.glob("runs-*.jsonl"))
    runs = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    lines = [
        "| objective | optimizer | settings | forget | forget quality | retain | held-out | embeddings | s/step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for objective, name in itertools.product(OBJECTIVES, OPTIMIZERS):
        groups: dict[str, list[dict]] = {}
        for run in runs:
            if (run["objective"], run["optimizer"]) == (objective, name):
                groups.setdefault(json.dumps(run["settings"], sort_keys=True), []).append(run)
        means = [summary(group) for group in groups.values()]
        forgotten = [mean for mean in means if mean["forget_probability"] <= 0.2]
        if not forgotten:
            lines.append(f"| {objective} | {name} | none of {len(means)} settings forgets | | | | | | |")
            continue
        best = max(forgotten, key=lambda mean: mean["held_out_probability"])
        chosen = ", ".join(f"{name} {value}" for name, value in best["settings"].items() if name in SHOWN)
        lines.append(
            f"| {objective} | {name} | {chosen} | {best['forget_probability']:.3f} | {best['forget_quality']:.1e} | "
            f"{best['retain_probability']:.3f} | {best['held_out_probability']:.3f} ± {best['spread']:.3f} | "
            f"{best['embeddings']:.2f} | {best['seconds_per_step']:.3f} |"
        )
    return "\n".join(lines)


def summary(group: list[dict]) -> dict:
    """Means over the seeds of one setting; the forget quality's is the median, and `spread` is half the range."""
    held_out = [run["held_out_probability"] for run in group]
    names = ("forget_probability", "retain_probability", "held_out_probability", "seconds_per_step")
    return {
        **{name: float(np.mean([run[name] for run in group])) for name in names},
        "forget_quality": float(np.median([run["forget_quality"] for run in group])),
        "embeddings": float(np.mean([run["update_share"]["embeddings"] for run in group])),
        "spread": (max(held_out) - min(held_out)) / 2,
        "settings": group[0]["settings"],
        "num_seeds": len(group),
    }
