"""How the weight of the retain loss changes during a run."""

from collections.abc import Callable


# Factor of the retain weight, from the progress in epochs and the number of epochs. "epoch" is that of the `_epoch`
# methods of the released SOUL code: 0 in the first epoch, then it grows by 1 / epochs with each. "primal_dual" changes
# the weight itself, by `dual_step`.
RETAIN_WEIGHT_SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda epoch, num_epochs: 1.0,
    "epoch": lambda epoch, num_epochs: int(epoch) / num_epochs,
    "linear": lambda epoch, num_epochs: epoch / num_epochs,
    "primal_dual": lambda epoch, num_epochs: 1.0,
}


def dual_step(weight: float, retain_loss: float, limit: float, step_size: float) -> float:
    """
    One ascent step on the dual variable of the constraint `retain_loss <= limit` (PDU; Entesari et al., 2025, arXiv
    2506.05314).

    Args:
        weight (`float`): The variable, which is the weight of the retain loss, >= 0.
        retain_loss (`float`): Of the last step, in nats a token.
        limit (`float`): What it may be at most (epsilon), >= 0.
        step_size (`float`): Of the ascent (eta), >= 0.

    Returns:
        `float`: `max(0, weight + step_size (retain_loss - limit))`.
    """
    return max(0.0, weight + step_size * (retain_loss - limit))
