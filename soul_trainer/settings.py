"""What settings are made of, and those of the objectives. Each is documented once, in its `help`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import NoneType
from typing import Annotated, get_args, get_origin, get_type_hints


WEIGHT_MASKS = ("none", "wagle")


def setting(default, help: str):
    """A field of a dataclass of settings."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Range:
    """
    The finite numbers that a setting may be, which stand with its type: `Annotated[float, Range(above=0)]`.

    Args:
        least (`float`, *optional*): The least of them.
        above (`float`, *optional*): What they are more than.
        most (`float`, *optional*): The largest of them.
        below (`float`, *optional*): What they are less than.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if high is not None:
            return f"in {'[' if self.above is None else '('}{low}, {high}{']' if self.below is None else ')'}"
        return f">= {low}" if self.above is None else f"> {low}"


Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Decay = Annotated[float, Range(least=0, below=1)]
Share = Annotated[float, Range(above=0, most=1)]
Count = Annotated[int, Range(least=1)]
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]  # as numpy takes it
CountFromZero = Annotated[int, Range(least=0)]


def check_ranges(settings: object, inherited: Mapping[str, object] | None = None) -> None:
    """
    Checks every setting whose type has a [`Range`] or is `bool`, for which any text that is not empty would be true.

    Args:
        settings (`object`): An instance of a dataclass.
        inherited (`Mapping[str, type]`, *optional*): Types of fields that another library declares without a range.

    Raises:
        ValueError: If a value is of another type or out of its range; the setting is named.
    """
    for name, hint in {**get_type_hints(type(settings), include_extras=True), **(inherited or {})}.items():
        kinds = get_args(hint) if NoneType in get_args(hint) else (hint,)
        ranged = next((kind for kind in kinds if get_origin(kind) is Annotated), None)
        value = getattr(settings, name, None)
        if set(kinds) - {NoneType} == {bool} and value is not None and value not in (True, False):
            raise ValueError(f"`{name}` must be True or False, but it is {value!r}.")
        if ranged is None or (value is None and NoneType in kinds):
            continue
        kind, range_ = get_args(ranged)
        if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
            raise ValueError(f"`{name}` must be a {'whole ' if kind is int else ''}number, but it is {value!r}.")
        if value not in range_:
            wanted = range_ if math.isfinite(value) else "a finite number"
            raise ValueError(f"`{name}` must be {wanted}, but it is {value}.")


def check_choice(name: str, value: str, known: tuple[str, ...] | dict) -> None:
    """Raises a `ValueError` that lists the known values unless `value` is one of them."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(known)}, but it is {value!r}.")


def check_at_least(least: int, **values: int | None) -> None:
    """Raises a `ValueError` that names the first of some values that is less than `least`; `None` is not set."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, but it is {value}.")


@dataclass
class ObjectiveArguments:
    """Settings of single objectives, in their papers' units. An objective names those that it reads."""

    npo_beta: Positive = setting(0.1, "NPO's inverse temperature (beta), > 0; gradient ascent is its limit at 0.")
    simnpo_beta: Positive = setting(4.5, "SimNPO's inverse temperature (beta) per mean token, > 0.")
    simnpo_margin: NotNegative = setting(0.0, "SimNPO's margin (gamma), >= 0.")
    dpo_beta: Positive = setting(0.1, "Inverse temperature (beta) of DPO and AltPO, > 0.")
    wga_power: NotNegative = setting(
        1.0, "WGA's power (beta) of a token's probability in its weight, >= 0; 0 is ascent."
    )
    satimp_saturation: NotNegative = setting(5.0, "SatImp's power (beta1) of a token's probability, >= 0.")
    satimp_importance: NotNegative = setting(1.0, "SatImp's power (beta2) of one minus a token's probability, >= 0.")
    undial_strength: NotNegative = setting(10.0, "What UNDIAL takes off the logit of a token to forget (beta), >= 0.")
    rmu_layer: CountFromZero = setting(
        7, "Decoder layer, from 0, whose output RMU, or retain_loss=activations, looks at."
    )
    rmu_coefficient: Positive = setting(20.0, "Length of the vector that RMU steers activations to (c), > 0.")
    rmu_seed: CountFromZero = setting(0, "Seed of the direction of that vector.")
    task_vector_scale: Positive = setting(1.0, "How much of the task vector is subtracted (alpha), > 0.")


@dataclass
class StepArguments:
    """Settings of what is done around the optimizer's step, whatever the objective."""

    sam_radius: NotNegative = setting(
        0.0,
        "Radius of sharpness-aware unlearning (rho): forgetting is to hold within it of the weights, >= 0; 0 is off.",
    )
    weight_mask: str = setting(
        "none", f"Which weights train: {', '.join(WEIGHT_MASKS)} (all, or those WAGLE selects)."
    )
    weight_mask_share: Share = setting(0.95, "With a weight mask: share of the weights that train, in (0, 1].")
    wagle_curvature: Positive = setting(1e-6, "WAGLE's curvature of the retain loss (gamma), > 0.")
