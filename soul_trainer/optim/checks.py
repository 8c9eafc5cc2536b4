"""The ranges of the optimizer's settings."""

from .rules import RULES
from .scaling import SCALINGS


DAMPING_SCOPES = ("tensor", "model")


def check_settings(settings: dict) -> None:
    """Raises a `ValueError` that names the first setting of [`Soul`] that is out of its range."""
    get = settings.__getitem__
    for name, known in (("rule", RULES), ("scaling", SCALINGS), ("damping_scope", DAMPING_SCOPES)):
        check_range(name, get(name), get(name) in known, f"one of {', '.join(known)}")
    check_range("lr", get("lr"), get("lr") >= 0, ">= 0")
    betas = get("betas")
    check_range("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")
    for name in ("rho", "eps", "damping"):
        check_range(name, get(name), get(name) > 0, "> 0")
    check_range("weight_decay", get("weight_decay"), get("weight_decay") >= 0, ">= 0")
    interval = get("hessian_interval")
    check_range("hessian_interval", interval, interval is None or interval >= 1, "None or >= 1")
    dtype = get("state_dtype")
    check_range("state_dtype", dtype, dtype in ("float32", "bfloat16"), "torch.float32 or torch.bfloat16")
    # A clipped direction is no solution of (H + damping) d = m, and one that is not clipped has any size.
    fitting = ("none", "tensor") if RULES[get("rule")].clips else ("tensor", "trust_region")
    allowed = f"{' or '.join(fitting)} with the rule {get('rule')}"
    check_range("scaling", get("scaling"), get("scaling") in fitting, allowed)


def check_refresh(scale: float, decay: float | None) -> None:
    """Raises a `ValueError` if an argument of a refresh is out of its range."""
    check_range("scale", scale, scale > 0, "> 0")
    check_range("decay", decay, decay is None or 0 <= decay < 1, "None or in [0, 1)")


def check_range(name: str, value: object, is_valid: bool, range_: str) -> None:
    """Raises a `ValueError` that names the setting unless its value is valid."""
    if not is_valid:
        raise ValueError(f"`{name}` must be {range_}, but it is {value}.")
