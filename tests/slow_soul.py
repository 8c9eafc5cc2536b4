"""`Soul` written slowly, for comparison: float64, one tensor at a time, curvature as dense matrices; and its scene."""

import numpy as np
import torch
from sophia_scenes import SHAPES, make_params, set_gradients

from soul_trainer.optim import Partition, Soul


MATRICES = (0, 6)  # those of `SHAPES` that have a dense curvature under the rule kronecker
SECOND_GROUP = 3  # the first tensor of the second group

# What a group of parameters needs to say; the optimizer's own defaults.
SETTINGS = {
    "lr": 1e-4,
    "betas": (0.9, 0.95),
    "rule": "diagonal",
    "scaling": "tensor",
    "two_directions": False,
    "damping": 0.1,
    "damping_scope": "tensor",
    "weight_decay": 0.0,
    "rho": 0.04,
    "eps": 1e-15,
    "bias_correction": True,
    "maximize": False,
    "forget_weight": 1.0,
    "retain_weight": 1.0,
}


class DenseCurvature:
    """The curvature of one matrix as a dense matrix `(size, size)`: a `MatrixCurvature` made by hand."""

    def __init__(self, dense: np.ndarray):
        self.dense, self.mean = dense, float(np.trace(dense) / len(dense))

    def precondition(self, matrix: torch.Tensor, damping: float, mean: torch.Tensor) -> torch.Tensor:
        system = self.dense / float(mean) + damping * np.eye(len(self.dense))
        solved = np.linalg.solve(system, matrix.double().flatten().numpy())
        return torch.from_numpy(solved).view(matrix.shape).to(matrix.dtype)


def dense_curvature(size: int, seed: int) -> DenseCurvature:
    """Symmetric and positive, with eigenvalues over two decades."""
    random = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(random.normal(size=(size, size)))
    return DenseCurvature(basis @ np.diag(10 ** random.uniform(-1, 1, size)) @ basis.T)


class SlowTensor:
    """A tensor with its averages, flattened, in float64."""

    def __init__(self, theta: torch.Tensor, settings: dict, dense: np.ndarray | None = None):
        self.theta = theta.detach().double().flatten().numpy().copy()
        self.settings, self.dense = {**SETTINGS, **settings}, dense
        self.is_known = False
        self.m_retain, self.m_forget, self.h = (np.zeros_like(self.theta) for _ in range(3))
        self.h_weight = 0.0

    def gradient(self, tensor: torch.Tensor | None) -> np.ndarray | None:
        """The signed gradient; zero where the other half has reached the tensor; `None` if it takes no part."""
        if tensor is None:
            return np.zeros_like(self.theta) if self.is_known and self.settings["two_directions"] else None
        self.is_known = True
        gradient = tensor.double().flatten().numpy()
        return -gradient if self.settings["maximize"] else gradient

    def curvature(self) -> np.ndarray:
        """H, a dense matrix; that of the identity where there is none."""
        if self.settings["rule"] == "none":
            return np.eye(len(self.theta))
        if self.settings["rule"] == "kronecker" and self.dense is not None:
            return self.dense
        is_corrected = self.settings["bias_correction"] and self.h_weight
        return np.diag(np.maximum(self.h, 0) / (self.h_weight if is_corrected else 1.0))

    def damped(self, mean: float) -> np.ndarray:
        """H + damping mean, a dense matrix."""
        if self.settings["rule"] == "none":
            return np.eye(len(self.theta))
        return self.curvature() + self.settings["damping"] * mean * np.eye(len(self.theta))

    def direction(self, momentum: np.ndarray, mean: float) -> np.ndarray:
        """(H + damping mean)^-1 m, or Sophia's rule."""
        if self.settings["rule"] == "sophia":
            denominator = self.settings["rho"] * np.diag(self.curvature()) + self.settings["eps"]
            return np.clip(momentum / denominator, -1, 1)
        return np.linalg.solve(self.damped(mean), momentum)


def mean_curvature(tensors: list[SlowTensor]) -> float:
    """The mean of H's diagonal over some tensors; any number where there is none."""
    diagonal = np.concatenate([np.diag(tensor.curvature()) for tensor in tensors])
    return float(diagonal.mean()) if diagonal.any() else 1.0


class SlowSoul:
    """The optimizer: lists of gradients go in, one of each tensor."""

    def __init__(self, tensors: list[SlowTensor]):
        self.tensors = tensors

    def _reached(self, gradients: list[torch.Tensor | None]) -> list[tuple[SlowTensor, np.ndarray]]:
        pairs = [(tensor, tensor.gradient(gradient)) for tensor, gradient in zip(self.tensors, gradients)]
        return [(tensor, gradient) for tensor, gradient in pairs if gradient is not None]

    def refresh(self, gradients: list, scale: float, decay: float | None = None, square: bool = True) -> None:
        for tensor, g in self._reached(gradients):
            beta2 = tensor.settings["betas"][1] if decay is None else decay
            tensor.h = beta2 * tensor.h + (1 - beta2) * scale * (g**2 if square else g)
            tensor.h_weight = beta2 * tensor.h_weight + (1 - beta2)

    def forget(self, gradients: list) -> None:
        for tensor, g in self._reached(gradients):
            beta1 = tensor.settings["betas"][0]
            tensor.m_forget = beta1 * tensor.m_forget + (1 - beta1) * g

    def step(self, gradients: list) -> list[dict[str, np.ndarray]]:
        """Moves the weights; the scaled directions of each tensor that took part."""
        reached = self._reached(gradients)
        tensors = [tensor for tensor, _ in reached]
        for tensor, g in reached:
            beta1 = tensor.settings["betas"][0]
            tensor.m_retain = beta1 * tensor.m_retain + (1 - beta1) * g
        names = ["m_forget", "m_retain"] if self.tensors[0].settings["two_directions"] else ["m_retain"]
        halves = {name: self._scaled(tensors, name) for name in names}
        for place, tensor in enumerate(tensors):
            s = tensor.settings
            update = halves["m_retain"][place]
            if s["two_directions"]:
                update = s["forget_weight"] * halves["m_forget"][place] + s["retain_weight"] * update
            tensor.theta = tensor.theta * (1 - s["lr"] * s["weight_decay"]) - s["lr"] * update
        return halves

    def _scaled(self, tensors: list[SlowTensor], momentum: str) -> list[np.ndarray]:
        settings = self.tensors[0].settings
        means = [mean_curvature([tensor]) for tensor in tensors]
        if settings["damping_scope"] == "model" and settings["scaling"] == "trust_region":
            means = [mean_curvature(tensors)] * len(tensors)
        directions = [tensor.direction(getattr(tensor, momentum), mean) for tensor, mean in zip(tensors, means)]
        if settings["scaling"] == "none":
            return directions
        if settings["scaling"] == "tensor":
            sizes = [np.sqrt(np.mean(d**2)) if d.any() else 1.0 for d in directions]
            return [np.clip(0.3 * d / size, -1, 1) for d, size in zip(directions, sizes)]
        cost = sum(d @ tensor.damped(mean) @ d for d, tensor, mean in zip(directions, tensors, means))
        return [d / np.sqrt(cost) if cost else d for d in directions]


def settings_of(rule, scaling, scope="tensor", two=True, **others):
    return {"rule": rule, "scaling": scaling, "damping_scope": scope, "two_directions": two, "rho": 0.3, **others}


def make_soul(params, settings, groups=None, dense=None):
    """An optimizer with names `0`, `1`, ... and the curvature of matrices."""
    optimizer = Soul(groups or params, **settings)
    optimizer.partition = Partition({param: str(place) for place, param in enumerate(params)})
    optimizer.matrices = {str(place): curvature for place, curvature in (dense or {}).items()}
    return optimizer


def scene(settings, shapes=SHAPES, weights=(1.3, 0.6), second=None):
    """Two groups whose settings differ, the optimizer and its slow twin."""
    params = make_params(shapes=shapes)
    groups = [{"lr": 0.03, "weight_decay": 0.1}, {"lr": 0.01, "betas": (0.5, 0.8), "damping": 0.4, "rho": 2.0}]
    groups[1] |= {"bias_correction": False, **(second or {})}
    for group in groups:
        group |= dict(zip(("forget_weight", "retain_weight"), weights))
    split = {"params": params[:SECOND_GROUP], **groups[0]}, {"params": params[SECOND_GROUP:], **groups[1]}
    places = MATRICES if settings["rule"] == "kronecker" else ()
    dense = {place: dense_curvature(params[place].numel(), seed=place) for place in places}
    optimizer = make_soul(params, settings, list(split), dense)
    slow = SlowSoul(
        [
            SlowTensor(param, {**settings, **groups[place >= SECOND_GROUP]}, getattr(dense.get(place), "dense", None))
            for place, param in enumerate(params)
        ]
    )
    return params, optimizer, slow


def gradients(params, seed, without=None):
    set_gradients(params, seed)
    if without is not None:
        params[without].grad = None
    return [param.grad for param in params]


def advance(params, optimizer, slow, step, two):
    """A step of both, with refreshes then and now and halves that miss a tensor; the slow directions."""
    if step in (0, 3, 5) and optimizer.defaults["rule"] != "none":
        how = {0: {}, 3: {"decay": 0.5}, 5: {"decay": 0.8, "square": False}}[step]
        slow.refresh(gradients(params, 5000 + step), 12.0, **how)
        with optimizer.hessian_refresh(12.0, **how):
            optimizer.step()
    if two:
        slow.forget(gradients(params, 700 + step, without=4 if step == 4 else None))
        with optimizer.forget_gradient():
            optimizer.step()
    halves = slow.step(gradients(params, step, without=1 if step == 2 else None))
    optimizer.step()
    return halves
