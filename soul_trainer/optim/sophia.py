"""`Sophia`: the published optimizer, as one setting of [`Soul`]."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .optimizer import Soul
from .partition import Partition
from .rules import RULES, Bucket


class Sophia(Soul):
    r"""
    Second-order clipped optimizer (Liu et al., 2023, arXiv 2305.14342): momentum divided by a running diagonal of the
    Hessian, clipped coordinate by coordinate.

        m     <- beta1 m + (1 - beta1) g
        theta <- theta (1 - lr weight_decay)
        theta <- theta - lr clip(m / (rho max(h, 0) + eps), -1, 1)

    It is [`Soul`] with the rule `sophia`, one momentum and no scaling but its own clip.

    Args:
        params (`Iterable`): Parameters or parameter groups, as for every PyTorch optimizer.
        lr (`float`, *optional*, defaults to 1e-5): Learning rate, >= 0. At most `lr` is added to any coordinate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.95)`):
            Decay of the momentum (beta1) and of the Hessian per refresh (beta2), each in [0, 1).
        rho (`float`, *optional*, defaults to 0.04):
            Curvature scale, > 0: the smaller, the more coordinates are clipped (sign descent at 0). The paper uses
            0.04 for pre-training and asks to tune it; it must fit the scale of `h`.
        eps (`float`, *optional*, defaults to 1e-15): Added to the denominator, > 0.
        weight_decay (`float`, *optional*, defaults to 0.0): Decoupled weight decay, >= 0.
        bias_correction (`bool`, *optional*, defaults to `True`):
            Whether `h` is divided by the sum of the weights in its average, so that the first refreshes are not too
            small. The released SophiaG does not.
        maximize (`bool`, *optional*, defaults to `False`): Whether to ascend.
        foreach (`bool`, *optional*): Whether to use multi-tensor kernels; by default yes. Results are the same.
        hessian_interval (`int`, *optional*):
            If set, every `hessian_interval`-th `step()` first folds its own squared gradient into `h` with scale 1
            (`rho` absorbs any other), which needs no callback: the estimator of the released SOUL code, with 1.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If a parameter is complex or a gradient sparse.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        rho: float = 0.04,
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        hessian_interval: int | None = None,
        state_dtype: torch.dtype = torch.float32,
    ):
        super().__init__(
            params,
            lr,
            betas,
            rule="sophia",
            scaling="none",
            rho=rho,
            eps=eps,
            weight_decay=weight_decay,
            bias_correction=bias_correction,
            maximize=maximize,
            foreach=foreach,
            hessian_interval=hessian_interval,
            state_dtype=state_dtype,
        )

    @staticmethod
    @torch.no_grad()
    def direction(state: dict[str, Tensor], group: dict) -> Tensor:
        """
        The direction of the last step, before the learning rate, from the state that the step left.

        Args:
            state (`dict[str, torch.Tensor]`):
                Of a parameter, or of a part of one: `exp_avg`, `hessian`, `hessian_weight`.
            group (`dict`): The parameter group that it is in.

        Returns:
            `torch.Tensor` of the shape of `exp_avg`, in [-1, 1], float32.
        """
        bucket = Bucket(group, [state["exp_avg"]], [state], Partition())
        return RULES["sophia"].directions(bucket, "exp_avg", [])[0]
