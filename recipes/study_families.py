"""What `study.py` compares: families of optimizers, 24 settings each, and the objectives that all of them meet."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from soul_recipes.study_optimizers import FilteredAdam, Lion, MuonWithAdamW, SplitAdam


OBJECTIVES = {
    "ga": {"forget_loss": "ga"},
    "npo": {"forget_loss": "npo"},
    "simnpo": {"forget_loss": "simnpo"},
    "refusal": {"forget_loss": "refusal"},
    "rmu": {"forget_loss": "rmu", "retain_loss": "activations", "trainable_parameters": ".*"},
}
# The task whose search serves tasks without one.
SMALLEST = "embedded-0.3M"
LEVELS = (0.3, 0.2, 0.1)
# A refusal takes the place of an answer long before the answer itself is improbable.
LEVELS_OF = {"refusal": (0.9, 0.8, 0.7)}
# Learning rates are those of a model this wide and deep; wider and deeper ones get smaller rates.
REFERENCE_WIDTH, REFERENCE_LAYERS = 96, 2
_WEIGHTS = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0)
_ONCE = {"hessian_interval": 0, "hessian_estimator": "empirical_fisher", "hessian_label_smoothing": 0.1}
_RELEASED = {
    "hessian_data": "training",
    "hessian_estimator": "empirical_fisher",
    "hessian_interval": 1,
    "bias_correction": False,
}


@dataclass
class Family:
    """
    An optimizer, whatever its setting.

    Args:
        label (`str`): What tables call it.
        fixed (`dict`): Settings of [`UnlearnConfig`] that stay.
        varied (`dict[str, tuple]`, *optional*): Those that the search chooses, in all combinations; without, defaults.
        optimizer (`Callable`, *optional*):
            Makes the optimizer, `(model, setting) -> Optimizer`, where no name does.
    """

    label: str
    fixed: dict
    varied: dict[str, tuple] = field(default_factory=dict)
    optimizer: Callable[[nn.Module, dict], torch.optim.Optimizer] | None = None

    def settings(self) -> list[dict]:
        """Every combination."""
        return [dict(zip(self.varied, values)) for values in itertools.product(*self.varied.values())]


def _two_directions(rule: str) -> Family:
    varied = {"learning_rate": (4e-4, 7e-4, 1e-3, 1.5e-3, 2e-3, 3e-3), "retain_weight": (0.3, 0.5, 0.7, 1.0)}
    names = {"none": "no curvature", "diagonal": "diagonal", "kronecker": "Kronecker"}
    return Family(f"two directions, {names[rule]}", {"optim": "soul", "rule": rule}, varied)


def _forget_only(rule: str) -> Family:
    rates = (2.5e-4, 5e-4, 7e-4, 1e-3, 1.5e-3, 2.5e-3, 4e-3, 7e-3)
    varied = {"learning_rate": rates, "damping": (0.1, 0.3, 1.0)}
    if rule == "none":
        varied = {"learning_rate": tuple(round(0.003 * 1.4**place, 6) for place in range(12)), "beta1": (0.0, 0.9)}
    names = {"none": "no curvature", "diagonal": "diagonal", "kronecker": "Kronecker"}
    fixed = {"optim": "soul", "rule": rule, "retain_loss": "curvature"}
    return Family(f"forget rows alone, {names[rule]}", fixed, varied)


FAMILIES = {
    "adamw": Family(
        "AdamW on the sum",
        {"optim": "adamw_torch", "warmup_steps": 20},
        {"learning_rate": (4e-4, 8e-4, 1.6e-3, 3.2e-3), "retain_weight": _WEIGHTS},
    ),
    "soul": Family("SOUL by defaults", {"optim": "soul"}),
    "soul_diagonal": Family("SOUL by defaults, diagonal", {"optim": "soul", "rule": "diagonal"}),
    "soul_none": Family("SOUL by defaults, no curvature", {"optim": "soul", "rule": "none"}),
    "forget_none": _forget_only("none"),
    "forget_diagonal": _forget_only("diagonal"),
    "forget_kronecker": _forget_only("kronecker"),
    "two_none": _two_directions("none"),
    "two_diagonal": _two_directions("diagonal"),
    "two_kronecker": _two_directions("kronecker"),
    "adam_split": Family(
        "Adam for each half",
        {"optim": "soul", "rule": "none", "warmup_steps": 20},
        {"learning_rate": (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3), "retain_weight": (0.5, 1.0, 2.0, 4.0)},
        lambda model, setting: SplitAdam(model.parameters(), setting["learning_rate"]),
    ),
    "filter": Family(
        "Kronecker filter, then AdamW",
        {"optim": "soul", "rule": "kronecker", "warmup_steps": 20},
        {"learning_rate": (4e-4, 8e-4, 1.6e-3, 3.2e-3), "retain_weight": (1.0, 5.0, 20.0), "damping": (0.03, 0.1)},
        lambda model, setting: FilteredAdam(
            model.parameters(), setting["learning_rate"], "kronecker", setting["damping"]
        ),
    ),
    "sophia": Family(
        "Sophia, as published",
        {"optim": "sophia"},
        {"learning_rate": (4e-4, 1e-3, 3e-3), "rho": (0.3, 3.0, 30.0, 300.0), "retain_weight": (2.0, 10.0)},
    ),
    "released": Family(
        "SOUL, as released",
        {"optim": "sophia", **_RELEASED},
        {"learning_rate": (4e-4, 1.2e-3), "rho": (20.48, 204.8, 2048.0), "retain_weight": (1.0, 2.0, 5.0, 10.0)},
    ),
    "muon": Family(
        "Muon with AdamW on the sum",
        {"optim": "adamw_torch", "warmup_steps": 20},
        {"learning_rate": (2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3), "retain_weight": (1.0, 5.0, 10.0, 40.0)},
        lambda model, setting: MuonWithAdamW(model, setting["learning_rate"]),
    ),
    "lion": Family(
        "Lion on the sum",
        {"optim": "adamw_torch", "warmup_steps": 20},
        {"learning_rate": (1e-4, 2e-4, 4e-4, 8e-4), "retain_weight": _WEIGHTS},
        lambda model, setting: Lion(model.parameters(), setting["learning_rate"]),
    ),
}


def levels_of(objective: str) -> tuple[float, ...]:
    """The forget probabilities at which an objective is compared."""
    return LEVELS_OF.get(objective, LEVELS)


def key(run: dict) -> str:
    """The same for runs that would be the same."""
    return json.dumps([run[name] for name in ("task", "family", "objective", "setting", "seed", "stage")])


def search_plan(task: str, families: list[str], objectives: list[str], seed: int) -> list[dict]:
    """Every run of the search, in an order in which any prefix treats families nearly alike."""
    plans = [
        [
            {"task": task, "family": name, "objective": objective, "setting": setting, "seed": seed, "stage": "search"}
            for setting in FAMILIES[name].settings()
        ]
        for objective in objectives
        for name in families
        if FAMILIES[name].varied
    ]
    return [run for group in itertools.zip_longest(*plans) for run in group if run is not None]
