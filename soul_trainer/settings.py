"""What settings are made of, and those of the objectives. Each is documented once, in its `help`."""

from dataclasses import dataclass, field


WEIGHT_MASKS = ("none", "wagle")


def setting(default, help: str):
    """A field of a dataclass of settings."""
    return field(default=default, metadata={"help": help})


def check_choice(name: str, value: str, known: tuple[str, ...] | dict) -> None:
    """Raises a `ValueError` that lists the known values unless `value` is one of them."""
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(known)}, but it is {value!r}.")


def check_at_least(least: int, **values: int | None) -> None:
    """Raises a `ValueError` that names the first of some values that is less than `least`; `None` is not set."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, but it is {value}.")


@dataclass
class ObjectiveArguments:
    """Settings of single objectives, in their papers' units. An objective names those that it reads."""

    npo_beta: float = setting(0.1, "NPO's inverse temperature (beta), > 0; gradient ascent is its limit at 0.")
    simnpo_beta: float = setting(4.5, "SimNPO's inverse temperature (beta) per mean token, > 0.")
    simnpo_margin: float = setting(0.0, "SimNPO's margin (gamma), >= 0.")
    dpo_beta: float = setting(0.1, "Inverse temperature (beta) of DPO and AltPO, > 0.")
    wga_power: float = setting(1.0, "WGA's power (beta) of a token's probability in its weight, >= 0; 0 is ascent.")
    satimp_saturation: float = setting(5.0, "SatImp's power (beta1) of a token's probability, >= 0.")
    satimp_importance: float = setting(1.0, "SatImp's power (beta2) of one minus a token's probability, >= 0.")
    undial_strength: float = setting(10.0, "What UNDIAL takes off the logit of a token to forget (beta), >= 0.")
    rmu_layer: int = setting(7, "Decoder layer, from 0, whose output RMU, or retain_loss=activations, looks at.")
    rmu_coefficient: float = setting(20.0, "Length of the vector that RMU steers activations to (c), > 0.")
    rmu_seed: int = setting(0, "Seed of the direction of that vector.")
    task_vector_scale: float = setting(1.0, "How much of the task vector is subtracted (alpha), > 0.")

    def check_objectives(self) -> None:
        """Raises a `ValueError` that names the first setting that is out of its range."""
        for name in ("npo_beta", "simnpo_beta", "dpo_beta", "rmu_coefficient", "task_vector_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be > 0, but it is {getattr(self, name)}.")
        for name in (
            *("simnpo_margin", "wga_power", "satimp_saturation", "satimp_importance", "undial_strength"),
            *("rmu_layer", "rmu_seed"),
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be >= 0, but it is {getattr(self, name)}.")


@dataclass
class StepArguments:
    """Settings of what is done around the optimizer's step, whatever the objective."""

    sam_radius: float = setting(
        0.0,
        "Radius of sharpness-aware unlearning (rho): forgetting is to hold within it of the weights, >= 0; 0 is off.",
    )
    weight_mask: str = setting(
        "none", f"Which weights train: {', '.join(WEIGHT_MASKS)} (all, or those WAGLE selects)."
    )
    weight_mask_share: float = setting(0.95, "With a weight mask: share of the weights that train, in (0, 1].")
    wagle_curvature: float = setting(1e-6, "WAGLE's curvature of the retain loss (gamma), > 0.")

    def check_steps(self) -> None:
        """Raises a `ValueError` that names the first setting that is out of its range."""
        check_choice("weight_mask", self.weight_mask, WEIGHT_MASKS)
        if not 0 <= self.sam_radius < float("inf"):
            raise ValueError(f"`sam_radius` must be a number >= 0, but it is {self.sam_radius}.")
        if not 0 < self.weight_mask_share <= 1:
            raise ValueError(f"`weight_mask_share` must be in (0, 1], but it is {self.weight_mask_share}.")
        if not self.wagle_curvature > 0:
            raise ValueError(f"`wagle_curvature` must be > 0, but it is {self.wagle_curvature}.")
