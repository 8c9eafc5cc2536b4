"""What `Trainer.hyperparameter_search` needs for unlearning: an objective, and the settings to draw from."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from soul_trainer.config import UnlearnConfig


if TYPE_CHECKING:
    from optuna import Trial

FORGET_METRIC, UTILITY_METRIC = "eval_tofu_forget_quality", "eval_tofu_model_utility"


@dataclass(frozen=True)
class ForgetQualitySubjectToUtility:
    """
    The best forgetting among the settings that keep a model useful: `compute_objective` of
    [`~transformers.Trainer.hyperparameter_search`], with `direction="maximize"`. The figures are those that
    [`EvalCallback`] logs.

    - Where the utility is at least `min_utility`, the value is that of the forget figure: itself, its negative, or its
      distance from a goal, negative.
    - Elsewhere it is below all of these, by the part of `min_utility` that is missing: of two settings that both break
      the model, the one that breaks it less is better, so that the search finds its way back.

    A figure that is not a number, as of a model that diverged, counts as the worst of its kind.

    Args:
        min_utility (`float`): The least utility that will do, > 0; see [`of_target`].
        forget_metric (`str`, *optional*, defaults to `"eval_tofu_forget_quality"`): The figure of forgetting.
        utility_metric (`str`, *optional*, defaults to `"eval_tofu_model_utility"`): That of utility; higher is better.
        forget_goal (`str` or `float`, *optional*, defaults to `"max"`):
            What the forget figure should be: as large as can be (`"max"`), as small (`"min"`), or a number, such as
            the gold model's.
        forget_range (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
            The least and the largest value that the forget figure can have.

    Raises:
        ValueError: If an argument is out of its range; when called, if a figure is missing (those that are there get
            listed) or the forget figure out of `forget_range`.
    """

    min_utility: float
    forget_metric: str = FORGET_METRIC
    utility_metric: str = UTILITY_METRIC
    forget_goal: str | float = "max"
    forget_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if not 0 < self.min_utility < math.inf:
            raise ValueError(f"`min_utility` must be a number > 0, but it is {self.min_utility}.")
        if isinstance(self.forget_goal, str) and self.forget_goal not in ("max", "min"):
            raise ValueError(f"`forget_goal` must be 'max', 'min' or a number, but it is {self.forget_goal!r}.")
        low, high = self.forget_range
        if not low < high:
            raise ValueError(f"`forget_range` must be (least, largest), but it is {self.forget_range}.")

    @classmethod
    def of_target(
        cls, metrics: dict[str, float], share_of_target: float = 0.95, **settings: object
    ) -> "ForgetQualitySubjectToUtility":
        """
        The objective whose least utility is a share of what the model had before unlearning.

        Args:
            metrics (`dict[str, float]`): Of that model: `trainer.evaluate()` before the search.
            share_of_target (`float`, *optional*, defaults to 0.95): In (0, 1].
            **settings: The other arguments of the class.

        Raises:
            ValueError: If the share is out of its range or `metrics` has no utility.
        """
        if not 0 < share_of_target <= 1:
            raise ValueError(f"`share_of_target` must be in (0, 1], but it is {share_of_target}.")
        name = settings.get("utility_metric", UTILITY_METRIC)
        return cls(share_of_target * _figure(metrics, "utility_metric", name), **settings)

    def __call__(self, metrics: dict[str, float]) -> float:
        """
        Args:
            metrics (`dict[str, float]`): Of an evaluation.

        Returns:
            `float`: Higher is better.
        """
        utility = _figure(metrics, "utility_metric", self.utility_metric)
        value = _figure(metrics, "forget_metric", self.forget_metric)
        low, high = self.forget_range
        if not (math.isnan(value) or low <= value <= high):
            raise ValueError(
                f"`forget_metric`={self.forget_metric!r} is {value}, outside `forget_range`={self.forget_range}: give "
                "the range that it can have, so that no setting without utility is better than one with."
            )
        worst = min(self._score(low), self._score(high))
        if math.isnan(utility):
            return worst - 1
        if utility < self.min_utility:
            return worst - (self.min_utility - utility) / self.min_utility
        return worst if math.isnan(value) else self._score(value)

    def _score(self, value: float) -> float:
        if isinstance(self.forget_goal, str):
            return value if self.forget_goal == "max" else -value
        return -abs(value - self.forget_goal)


def hp_space(**choices: tuple[float, float] | list) -> Callable[["Trial"], dict]:
    """
    Settings to draw from, as `hp_space` of [`~transformers.Trainer.hyperparameter_search`] with Optuna.

    Args:
        **choices: Fields of [`~soul_trainer.UnlearnConfig`]. A tuple of two numbers > 0 is a range, drawn from
            uniformly in the logarithm; of two integers, integers are drawn. A list holds the values to choose from.

    Returns:
        `Callable`: A trial's settings.

    Raises:
        ValueError: If a field is unknown (the Trainer would go on without it) or its range is empty.

    Example:

    ```python
    >>> space = hp_space(learning_rate=(1e-6, 1e-4), rho=(0.01, 100.0), retain_loss=["nll", "kl"])
    ```
    """
    known = {field.name for field in fields(UnlearnConfig)}
    for name, values in choices.items():
        if name not in known:
            raise ValueError(f"UnlearnConfig has no field {name!r} to search over.")
        if isinstance(values, tuple) and not (len(values) == 2 and 0 < values[0] < values[1]):
            raise ValueError(f"`{name}`={values} is no range: give (least, largest), both > 0, or a list of values.")
        if not isinstance(values, tuple) and not values:
            raise ValueError(f"`{name}` has no values to choose from.")

    def space(trial: "Trial") -> dict:
        return {name: _suggest(trial, name, values) for name, values in choices.items()}

    return space


def _suggest(trial: "Trial", name: str, values: tuple | list) -> object:
    if not isinstance(values, tuple):
        return trial.suggest_categorical(name, list(values))
    suggest = trial.suggest_int if all(isinstance(value, int) for value in values) else trial.suggest_float
    return suggest(name, *values, log=True)


# For language models of the usual sizes; a small model trained from scratch needs learning rates 100 times as high.
soul_hp_space = hp_space(learning_rate=(1e-6, 1e-4), rho=(0.01, 100.0), retain_weight=(0.1, 10.0))
first_order_hp_space = hp_space(learning_rate=(1e-6, 1e-4), retain_weight=(0.1, 10.0))


def _figure(metrics: dict[str, float], argument: str, name: str) -> float:
    if name not in metrics:
        raise ValueError(
            f"`{argument}`={name!r} is not among the figures: {', '.join(sorted(metrics))}. EvalCallback logs those "
            "of a suite; forget quality needs its `reference_rows`."
        )
    return float(metrics[name])
