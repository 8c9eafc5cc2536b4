"""A long measurement that is written down on its way, and goes on where it was with the same bits."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from ..batch import ForgetRetainBatch
from ..engines import Engine
from ..optim import Soul
from .estimators import estimate_hessian
from .file import PROGRESS, Curvature, from_tensors, read_tensors, to_tensors, write_tensors
from .kronecker import KroneckerCurvature
from .layers import LayerStatistics
from .measure import MatrixPasses


_SUM, _BASIS = "sum:", "basis:"


class SummingEngine(Engine):
    """
    Processes that each have the whole model, without a wrapper around it: gradients are added up where an estimate
    ends. Nothing is scaled, in the precision of the weights.

    Attributes:
        folds (`bool`): Whether estimates reach the optimizer, or only the hooks see their backwards.
    """

    def __init__(self, state=None):
        super().__init__(state)
        self.loss_factor, self.folds = 1, True

    def sum(self, tensor: Tensor | int) -> Tensor | int:
        """See [`Engine.sum`]; a number is taken too, of a process that has no row of an estimate."""
        if self.num_processes > 1 and not isinstance(tensor, Tensor):
            tensor = torch.tensor(tensor, device=self.accelerator.device)
        return super().sum(tensor)

    def accumulate(self, model: torch.nn.Module, is_last: bool) -> AbstractContextManager:
        """Nothing is reduced in a backward."""
        return nullcontext()

    def autocast(self) -> AbstractContextManager:
        """The weights' own precision."""
        return nullcontext()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """A plain backward."""
        loss.backward()

    def fold(
        self,
        optimizer: torch.optim.Optimizer,
        inside: Callable[[Soul], AbstractContextManager],
        max_grad_norm: float = 0.0,
        model: torch.nn.Module | None = None,
    ) -> bool:
        """Adds gradients up over processes and sends them into the optimizer, if they are to go there."""
        if not self.folds:
            return True
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            # One that no row of an estimate reaches, as an expert, has a square of zero in the mean over estimates.
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.sum(gradient)
        with inside(optimizer):
            optimizer.step()
        return True


class Measurement:
    """
    Estimates over all rows, pass by pass. The diagonal is the mean of those of the first group whose labels differ:
    of both its passes or, where the second one repeats the labels of the first, of one.

    Args:
        model (`torch.nn.Module`): Unwrapped, without dropout; what does not train is not measured.
        batches (`Callable[[int], list[ForgetRetainBatch]]`): This process's micro-batches of an estimate, by number.
        num_estimates (`int`): Of a pass.
        passes ([`MatrixPasses`]): On the same engine, a [`SummingEngine`].
        estimator (`str`): See [`estimate_hessian`].
        label_smoothing (`float`): Likewise.
        seed (`int`): Likewise.

    Attributes:
        position (`int`): Estimates of the pass at hand that are done.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        batches: Callable[[int], list[ForgetRetainBatch]],
        num_estimates: int,
        passes: MatrixPasses,
        estimator: str,
        label_smoothing: float,
        seed: int,
    ):
        self.model, self.batches, self.num_estimates, self.passes = model, batches, num_estimates, passes
        self.settings = {"estimator": estimator, "label_smoothing": label_smoothing, "seed": seed}
        self.parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        # Never stepped: it is what adds the diagonal up.
        self.soul = Soul(self.parameters.values(), rule="diagonal")
        self.soul.partition = passes.engine.partition(model, self.soul)
        self.position = 0

    @property
    def diagonals(self) -> dict[str, Tensor]:
        """The diagonal of each parameter that trains, by name."""
        return {name: self.soul.state[parameter]["hessian"] for name, parameter in self.parameters.items()}

    def run(self, after_estimate: Callable[[], None], after_pass: Callable[[], None]) -> None:
        """
        Measures to the end.

        Args:
            after_estimate (`Callable`): Called, on every process, where [`save_progress`] may be.
            after_pass (`Callable`): Likewise, when the sums of a pass have become bases or matrices.
        """
        passes = self.passes
        while not passes.are_done:
            with self._gradients_needed():
                while self.position < self.num_estimates:
                    passes.estimate(self.position, self._estimate)
                    self.position += 1
                    after_estimate()
            passes.finish_pass()
            passes.matrices = {name: _on_cpu(matrix) for name, matrix in passes.matrices.items()}
            self.position = 0
            after_pass()

    def _estimate(self, statistics: LayerStatistics) -> None:
        passes, number = self.passes, self.passes.number
        draw = self.position if passes.keeps else number % 2 * self.num_estimates + self.position
        passes.engine.folds = number == 0 if passes.keeps else number < 2
        batches, decay = self.batches(self.position), draw / (draw + 1)
        options = {**self.settings, "draw": draw, "engine": passes.engine, "statistics": statistics}
        estimate_hessian(self.model, self.soul, batches, decay=decay, **options)

    @contextmanager
    def _gradients_needed(self) -> Iterator[None]:
        """Where the diagonal is there already, a backward need not go further than to the group's first layer."""
        needed = self.parameters if self.passes.number < 2 else self.passes.group
        try:
            for name, parameter in self.parameters.items():
                parameter.requires_grad_(name in needed)
            yield
        finally:
            for parameter in self.parameters.values():
                parameter.requires_grad_(True)


def _on_cpu(matrix: KroneckerCurvature) -> KroneckerCurvature:
    tensors = {name: tensor.cpu() for name, tensor in matrix.tensors().items()}
    return KroneckerCurvature.from_tensors(tensors, matrix.transposed)


def save_progress(path: Path, measurement: Measurement, metadata: dict) -> None:
    """
    Writes down where a measurement is, whole or not at all. Every process must call it, and the first one writes.

    Args:
        path (`Path`): The file.
        measurement ([`Measurement`]): Between two estimates, of which there was one at least.
        metadata (`dict`): What another measurement must have to go on with it.
    """
    passes = measurement.passes
    sums, bases = passes.state_tensors()
    if passes.engine.process_index:
        return
    tensors, kept = to_tensors(Curvature(measurement.diagonals, passes.matrices, metadata))
    tensors |= {_SUM + name: tensor for name, tensor in sums.items()}
    tensors |= {_BASIS + name: tensor for name, tensor in bases.items()}
    place = {"pass": passes.number, "position": measurement.position, "num_tokens": passes.statistics.num_tokens}
    write_tensors(path, tensors, {**kept, PROGRESS: {**place, "errors": passes.errors}})


def load_progress(path: Path, measurement: Measurement, metadata: dict) -> None:
    """
    Goes on where a measurement of the same metadata was. Every process must call it.

    Args:
        path (`Path`): A file of [`save_progress`].
        measurement ([`Measurement`]): That has not begun.
        metadata (`dict`): As it was given to [`save_progress`].

    Raises:
        ValueError: If the file is of another measurement; what differs is named.
    """
    tensors, kept = read_tensors(path)
    place, curvature = kept.pop(PROGRESS, None), from_tensors(tensors, kept)
    if place is None:
        raise ValueError(f"{str(path)!r} is no file of a measurement's progress: move it away.")
    if differs := _differences(curvature.metadata, metadata):
        raise ValueError(
            f"{str(path)!r} is the progress of another measurement ({'; '.join(differs)}): repeat its command to go "
            "on with it, or add --overwrite to begin anew."
        )
    sums, bases = (
        {name[len(key) :]: tensor for name, tensor in tensors.items() if name.startswith(key)}
        for key in (_SUM, _BASIS)
    )
    measurement.soul.set_hessian(curvature.diagonals)
    measurement.position = place["position"]
    measurement.passes.load_state(place["pass"], place["num_tokens"], sums, bases, curvature.matrices, place["errors"])


def _differences(found: dict, wanted: dict) -> list[str]:
    found, wanted = ({**each, **each.get("settings", {})} for each in (found, wanted))
    return [
        f"`{name}` is {found.get(name)!r}, not {value!r}"
        for name, value in wanted.items()
        # A name says nothing: the hashes do.
        if name not in ("settings", "model", "dataset") and found.get(name) != value
    ]
