"""Optimizers of the study that are baselines and nobody's default: they share the trainer's two passes, or its one."""

import torch
from torch import Tensor, nn

from soul_trainer.optim import Soul


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al., 2023, arXiv 2302.06675) with its published betas: the sign of an interpolated momentum."""

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        """Moves each coordinate by the learning rate."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                momentum = state.setdefault("exp_avg", torch.zeros_like(param))
                param.add_(torch.lerp(param.grad, momentum, beta1).sign_(), alpha=-group["lr"])
                momentum.lerp_(param.grad, 1 - beta2)


class MuonWithAdamW(torch.optim.Optimizer):
    """
    Muon for the hidden matrices and AdamW for everything else, as its author prescribes
    (https://github.com/KellerJordan/Muon): embeddings, output head, norms and biases. It is one optimizer with two
    `param_groups`, Muon's first, so that a scheduler or a checkpoint treats it like any other.

    Muon's updates are scaled to the root mean square of AdamW's (Liu et al., 2025, arXiv 2502.16982), so that one
    learning rate serves both groups.

    Args:
        model (`torch.nn.Module`): Its parameters that train are optimized.
        lr (`float`): Learning rate of both groups, >= 0.
        momentum (`float`, *optional*, defaults to 0.95): Muon's, in [0, 1).
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.95)`): AdamW's, each in [0, 1).
        weight_decay (`float`, *optional*, defaults to 0.0): Of both groups, >= 0.

    Raises:
        ImportError: If torch is older than 2.9, which has no Muon.
        ValueError: If the model has no hidden matrix or nothing else to train, or a value is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ):
        if not hasattr(torch.optim, "Muon"):
            raise ImportError(f"Muon needs torch>=2.9, and torch is {torch.__version__}: upgrade it.")
        matrices = hidden_matrices(model)
        is_matrix = set(matrices)
        others = [param for param in model.parameters() if param.requires_grad and param not in is_matrix]
        if not matrices or not others:
            raise ValueError(
                f"`model` must train hidden matrices and other parameters, but it trains {len(matrices)} and "
                f"{len(others)}: use torch.optim.Muon or AdamW alone."
            )
        options = {"lr": lr, "weight_decay": weight_decay}
        self.muon = torch.optim.Muon(matrices, momentum=momentum, adjust_lr_fn="match_rms_adamw", **options)
        self.adamw = torch.optim.AdamW(others, betas=betas, **options)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure=None):
        """Takes a step of each optimizer in its group; see [`torch.optim.Optimizer.step`]."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Loading a state replaces the groups and the state of this object, and both optimizers must see the new ones.
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self.muon.state = self.adamw.state = self.state
        self.muon.step()
        self.adamw.step()
        return loss


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices of a model that train and belong neither to an embedding nor to its output head."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    ends = {param for module in [*embeddings, head] if module is not None for param in module.parameters()}
    return [param for param in model.parameters() if param.requires_grad and param.ndim == 2 and param not in ends]


class HalvesOptimizer(Soul):
    """
    The forget gradient of a step is kept until the retain gradient is there; then `combine` makes of both what Adam
    steps by, in as many averages as it gives gradients.
    """

    def __init__(self, params, lr: float, rule: str = "none", damping: float = 0.1, betas=(0.9, 0.999)):
        super().__init__(params, lr, rule=rule, damping=damping, two_directions=True)
        self.adam_betas = betas

    def update_forget_momentum(self) -> None:
        """Keeps the gradient as it is."""
        # Which also makes the state of each, where a Hessian will be.
        for bucket in self._buckets():
            for param in bucket.params:
                if param.grad is not None:
                    self.state[param]["forget_gradient"] = param.grad.detach().clone()
                # Of Soul's own momenta none is used, and the study counts bytes.
                for name in ("exp_avg", "exp_avg_forget"):
                    self.state[param].pop(name, None)

    @torch.no_grad()
    def step(self, closure=None):
        """Moves the parameters by Adam's steps, or folds a gradient in."""
        if self._inside is not None:
            return super().step(closure)
        beta1, beta2 = self.adam_betas
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                forget = state.pop("forget_gradient", None)
                if param.grad is None or forget is None:
                    continue
                state["steps"] = state.get("steps", 0) + 1
                for place, gradient in enumerate(self.combine(param, forget, param.grad, group)):
                    first = state.setdefault(f"exp_avg_{place}", torch.zeros_like(param))
                    second = state.setdefault(f"exp_avg_sq_{place}", torch.zeros_like(param))
                    first.lerp_(gradient, 1 - beta1)
                    second.lerp_(gradient.square(), 1 - beta2)
                    size = (second / (1 - beta2 ** state["steps"])).sqrt_().add_(1e-8)
                    weight = self.weights(group)[place]
                    param.addcdiv_(first, size, value=-group["lr"] * weight / (1 - beta1 ** state["steps"]))
        return None

    def combine(self, param: Tensor, forget: Tensor, retain: Tensor, group: dict) -> list[Tensor]:
        """The gradients that each have an average of their own."""
        raise NotImplementedError

    def weights(self, group: dict) -> list[float]:
        """Of the steps of those averages."""
        raise NotImplementedError


class SplitAdam(HalvesOptimizer):
    """Adam for each half, whose steps are added (the decoupled momenta of DualOptim, arXiv 2504.15827)."""

    def combine(self, param: Tensor, forget: Tensor, retain: Tensor, group: dict) -> list[Tensor]:
        """Both, as they are."""
        return [forget, retain]

    def weights(self, group: dict) -> list[float]:
        """Those of the losses."""
        return [group["forget_weight"], group["retain_weight"]]


class FilteredAdam(HalvesOptimizer):
    """Adam on the sum, once the forget gradient has lost what retain rows are curved along: g / (1 + h / damping)."""

    def combine(self, param: Tensor, forget: Tensor, retain: Tensor, group: dict) -> list[Tensor]:
        """The weighted sum."""
        (section,) = self.partition.sections(param)
        matrix, damping = self.matrices.get(section.name), group["damping"]
        if matrix is None:
            h = self.state[param]["hessian"]
            filtered = forget * damping / (h / h.mean().clamp_min(1e-30) + damping)
        else:
            filtered = damping * matrix.precondition(forget, damping, matrix.mean)
        return [group["forget_weight"] * filtered + group["retain_weight"] * retain]

    def weights(self, group: dict) -> list[float]:
        """Of the one."""
        return [1.0]
