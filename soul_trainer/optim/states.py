"""The states of parameters: what they begin as, and what gradients add to them."""

import torch
from torch import Tensor

from .partition import local
from .rules import RULES, Bucket


def new_state(group: dict, param: Tensor) -> dict[str, Tensor]:
    """The state of a parameter before its first step."""
    wide = torch.promote_types(param.dtype, torch.float32)
    momentum_dtype = torch.bfloat16 if group["state_dtype"] == "bfloat16" else wide

    def zeros(dtype: torch.dtype) -> Tensor:
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

    state = {"step": torch.tensor(0.0), "exp_avg": zeros(momentum_dtype)}
    if group["two_directions"]:
        state["exp_avg_forget"] = zeros(momentum_dtype)
    if RULES[group["rule"]].has_hessian:
        # The sum of the weights in the average `hessian`: what its start-up bias is corrected by. Float64, because
        # 1 - 0.95 is not a float32.
        # The mean of many estimates would stand still in 16 bits.
        state |= {"hessian": zeros(wide), "hessian_weight": torch.tensor(0.0, dtype=torch.float64)}
    return state


def check_states(states: dict, defaults: dict) -> None:
    """
    Checks states that are to be loaded.

    Args:
        states (`dict`): The `state` of a state_dict, by parameter.
        defaults (`dict`): Of the optimizer that loads them.

    Raises:
        ValueError: If they are of another optimizer, or of another `rule`.
    """
    needed = {"exp_avg"}
    if defaults["two_directions"]:
        needed.add("exp_avg_forget")
    if RULES[defaults["rule"]].has_hessian:
        needed |= {"hessian", "hessian_weight"}
    for held in filter(None, states.values()):  # a parameter without a gradient has none
        missing = needed - set(held)
        if missing:
            raise ValueError(
                f"The state is of another optimizer or `rule`: it has {sorted(held)}, and no {sorted(missing)}. "
                "Resume with the optimizer that the checkpoint was saved with, or begin a new run."
            )


def gradients_of(bucket: Bucket) -> list[Tensor]:
    """In at least float32, and of zeros where a parameter has none."""
    gradients = []
    for param in bucket.params:
        dtype = torch.promote_types(param.dtype, torch.float32)
        here = local(param)
        gradients.append(torch.zeros_like(here, dtype=dtype) if param.grad is None else local(param.grad).to(dtype))
    return torch._foreach_neg(gradients) if bucket.group["maximize"] else gradients


def accumulate(averages: list[Tensor], decay: float, added: list[Tensor]) -> None:
    """`average <- decay average + added`; an average of 16 bits is rounded once."""
    if averages[0].dtype == added[0].dtype:
        torch._foreach_mul_(averages, decay)
        torch._foreach_add_(averages, added)
        return
    wide = torch._foreach_mul([average.to(added[0].dtype) for average in averages], decay)
    torch._foreach_add_(wide, added)
    torch._foreach_copy_(averages, wide)
