"""Sophia (Liu et al., 2023, arXiv 2305.14342), Algorithm 3, as a PyTorch optimizer. Imports torch alone."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class Sophia(Optimizer):
    r"""
    Second-order clipped optimizer: momentum divided by a running diagonal of the Hessian, clipped coordinate by
    coordinate.

        m     <- beta1 m + (1 - beta1) g
        theta <- theta (1 - lr weight_decay)
        theta <- theta - lr clip(m / (rho max(h, 0) + eps), -1, 1)

    The optimizer does not know how a Hessian is estimated. A refresh is *a step that moves nothing*: inside
    [`Sophia.hessian_refresh`], `step()` folds the squared gradient into `h` and leaves weights and momentum alone, so
    that the gradient of an estimator takes the way of every other gradient (backward, reduction, unscaling, sharding).

        with optimizer.hessian_refresh(scale=num_sampled_tokens):
            optimizer.step()                    # h <- beta2 h + (1 - beta2) scale g^2

    State is made at the first step or refresh rather than here, because engines swap parameters for flat partitions
    after construction. It is at least float32: a bfloat16 average would swallow its own updates.

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
            Whether `h` is divided by the sum of the weights in its average (1 - beta2^k after k refreshes), so that
            the first refreshes are not too small. The released SophiaG does not.
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
    ):
        _check_range("lr", lr, lr >= 0, ">= 0")
        _check_range("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")
        _check_range("rho", rho, rho > 0, "> 0")
        _check_range("eps", eps, eps > 0, "> 0")
        _check_range("weight_decay", weight_decay, weight_decay >= 0, ">= 0")
        _check_range(
            "hessian_interval", hessian_interval, hessian_interval is None or hessian_interval >= 1, "None or >= 1"
        )
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "maximize": maximize,
            "foreach": foreach,
            "hessian_interval": hessian_interval,
        }
        super().__init__(params, defaults)
        self._refresh: dict | None = None

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._refresh = None

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group of parameters; see [`torch.optim.Optimizer.add_param_group`]."""
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.is_complex():
                self.param_groups.pop()
                raise TypeError(f"Sophia has no rule for complex parameters, and one has dtype {param.dtype}.")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """
        Moves the parameters, or, inside [`Sophia.hessian_refresh`], folds their gradients into the Hessian instead.

        Args:
            closure (`Callable`, *optional*): Recomputes the gradients and returns the loss.

        Returns:
            `float`, *optional*: What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._refresh is not None:
            self.update_hessian(**self._refresh)
            return loss
        for group, params in self._buckets():
            interval = group["hessian_interval"]
            due = [param for param in params if interval and int(self.state[param]["step"]) % interval == 0]
            if due:
                self._fold(group, due, scale=1.0, decay=group["betas"][1], square=True)
            states = [_local_state(self.state[param]) for param in params]
            rule = _single_tensor_step if group["foreach"] is False else _multi_tensor_step
            rule([_local(param) for param in params], _gradients(group, params), states, group)
            for param in params:
                self.state[param]["step"] += 1
        return loss

    @contextmanager
    def hessian_refresh(self, scale: float, decay: float | None = None, square: bool = True) -> Iterator[None]:
        """
        A context in which `step()` refreshes the Hessian and moves nothing.

        Args:
            scale (`float`):
                Factor of the estimate, > 0. For the gradient of a mean over B sampled labels it is B (Sophia's
                equation for the Gauss-Newton-Bartlett estimator).
            decay (`float`, *optional*):
                Weight of the old `h` in [0, 1), by default beta2. With j/(j+1) at the j-th refresh (from 0), `h` is
                the plain mean of the estimates.
            square (`bool`, *optional*, defaults to `True`):
                Whether to square the gradient; an estimator of the diagonal itself (Hutchinson) says `False`.
        """
        if self._refresh is not None:
            raise ValueError("`hessian_refresh` is already active: refreshes cannot be nested.")
        _check_refresh(scale, decay)
        self._refresh = {"scale": scale, "decay": decay, "square": square}
        try:
            yield
        finally:
            self._refresh = None

    @torch.no_grad()
    def update_hessian(self, scale: float, decay: float | None = None, square: bool = True) -> None:
        """
        Folds the gradients that are there now into the Hessian: `h <- decay h + (1 - decay) scale g^2`. For plain
        loops; the arguments are those of [`Sophia.hessian_refresh`].
        """
        _check_refresh(scale, decay)
        for group, params in self._buckets():
            self._fold(group, params, scale, group["betas"][1] if decay is None else decay, square)

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
        denominator = state["hessian"].clamp_min(0).mul_(_curvature_scale(group, state)).add_(group["eps"])
        return state["exp_avg"].div(denominator).clamp_(-1, 1)

    def load_state_dict(self, state_dict: dict) -> None:
        """
        Loads the optimizer's state, in its own dtypes where PyTorch would cast it to the parameter's. Parameter groups
        without parameters, which some engines drop, need no match.
        """
        saved = [group for group in state_dict["param_groups"] if group["params"]]
        if len(saved) == sum(bool(group["params"]) for group in self.param_groups):
            left = iter(saved)
            groups = [next(left) if group["params"] else {**group, "params": []} for group in self.param_groups]
            state_dict = {**state_dict, "param_groups": groups}
        super().load_state_dict(state_dict)
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved_ids, params):
            for key, value in state_dict["state"].get(index, {}).items():
                loaded = self.state[param][key]
                if key == "hessian_weight":
                    self.state[param][key] = value.cpu().clone()  # a host number, which each step reads
                elif isinstance(value, Tensor) and loaded.dtype != value.dtype:
                    self.state[param][key] = value.to(loaded.device, copy=True)

    def _buckets(self) -> Iterator[tuple[dict, list[Tensor]]]:
        """Parameters that have a gradient, by group and by what one multi-tensor kernel can take; their state made."""
        if any(p.grad is not None and p.grad.is_sparse for group in self.param_groups for p in group["params"]):
            raise TypeError("Sophia needs dense gradients: build the embedding with `sparse=False`.")
        # PyTorch's distributed checkpoints want a state of each parameter, even of one that never has a gradient.
        is_sharded = any(isinstance(param, DTensor) for group in self.param_groups for param in group["params"])
        for group in self.param_groups:
            buckets = defaultdict(list)
            for param in group["params"]:
                if param.grad is None and not is_sharded:
                    continue
                if len(self.state[param]) == 0:
                    self.state[param] = _new_state(param)
                if param.grad is None:
                    continue
                buckets[type(param.grad), param.device, param.dtype].append(param)
            for params in buckets.values():
                yield group, params

    def _fold(self, group: dict, params: list[Tensor], scale: float, decay: float, square: bool) -> None:
        states = [_local_state(self.state[param]) for param in params]
        hessians = [state["hessian"] for state in states]
        gradients = _gradients(group, params)
        estimates = torch._foreach_mul(gradients, gradients) if square else gradients
        # h <- decay h + (1 - decay) scale estimate
        torch._foreach_mul_(hessians, decay)
        torch._foreach_add_(hessians, torch._foreach_mul(estimates, scale * (1 - decay)))
        for state in states:
            state["hessian_weight"].mul_(decay).add_(1 - decay)


def _new_state(param: Tensor) -> dict[str, Tensor]:
    return {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros_like(param, dtype=_state_dtype(param), memory_format=torch.preserve_format),
        "hessian": torch.zeros_like(param, dtype=_state_dtype(param), memory_format=torch.preserve_format),
        # The sum of the weights in the average `hessian`: what its start-up bias is corrected by. Float64, because
        # 1 - 0.95 is not a float32.
        "hessian_weight": torch.tensor(0.0, dtype=torch.float64),
    }


def _state_dtype(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)


def _local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds: the rule is one for each coordinate and needs no more."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: _local(value) for key, value in state.items()}


def _gradients(group: dict, params: list[Tensor]) -> list[Tensor]:
    gradients = [_local(param.grad).to(_state_dtype(param)) for param in params]
    return torch._foreach_neg(gradients) if group["maximize"] else gradients


def _curvature_scale(group: dict, state: dict[str, Tensor]) -> float:
    """What `h` is multiplied by: rho, over the weight of the average if its bias is corrected."""
    weight = float(state["hessian_weight"]) if group["bias_correction"] else 1.0
    return group["rho"] / (weight or 1.0)


def _multi_tensor_step(params: list[Tensor], gradients: list[Tensor], states: list[dict], group: dict) -> None:
    beta1, lr = group["betas"][0], group["lr"]
    exp_avgs = [state["exp_avg"] for state in states]
    # m <- beta1 m + (1 - beta1) g
    torch._foreach_mul_(exp_avgs, beta1)
    torch._foreach_add_(exp_avgs, torch._foreach_mul(gradients, 1 - beta1))
    # rho max(h, 0) + eps
    denominators = torch._foreach_clamp_min([state["hessian"] for state in states], 0)
    torch._foreach_mul_(denominators, [_curvature_scale(group, state) for state in states])
    torch._foreach_add_(denominators, group["eps"])
    # clip(m / denominator, -1, 1)
    directions = torch._foreach_div(exp_avgs, denominators)
    torch._foreach_clamp_max_(directions, 1)
    torch._foreach_clamp_min_(directions, -1)
    # theta <- theta (1 - lr weight_decay) - lr direction
    torch._foreach_mul_(directions, -lr)
    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    torch._foreach_add_(params, directions)


def _single_tensor_step(params: list[Tensor], gradients: list[Tensor], states: list[dict], group: dict) -> None:
    """The same operations in the same order, one tensor at a time: less memory for temporaries, the same bits."""
    for param, gradient, state in zip(params, gradients, states):
        _multi_tensor_step([param], [gradient], [state], group)


def _check_refresh(scale: float, decay: float | None) -> None:
    _check_range("scale", scale, scale > 0, "> 0")
    _check_range("decay", decay, decay is None or 0 <= decay < 1, "None or in [0, 1)")


def _check_range(name: str, value: object, is_valid: bool, range_: str) -> None:
    if not is_valid:
        raise ValueError(f"`{name}` must be {range_}, but it is {value}.")
