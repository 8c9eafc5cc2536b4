"""
Every branch on the engine that runs the model, and every sum over processes. No other file asks which engine runs.

Supported are one process and DistributedDataParallel, which average gradients over processes. FSDP and DeepSpeed shard
or step inside the backward, which a refresh must follow; until it does they are refused rather than run wrongly.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, gather_object

from .sophia import Sophia


if TYPE_CHECKING:
    from transformers import Trainer

_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


class Engine:
    """
    What unlearning asks of the engine under a Trainer, or of none, in a plain loop.

    Args:
        accelerator ([`~accelerate.Accelerator`], *optional*): The Trainer's. Without, there is one plain process.

    Raises:
        ValueError: If the engine is not supported.
    """

    def __init__(self, accelerator: Accelerator | None = None):
        if accelerator is not None and accelerator.distributed_type not in _SUPPORTED:
            raise ValueError(
                f"The engine {accelerator.distributed_type.value} is not supported yet: its refresh of the Hessian "
                "would be wrong. Use one process or DistributedDataParallel."
            )
        self.accelerator = accelerator
        self.num_processes = accelerator.num_processes if accelerator else 1
        self.process_index = accelerator.process_index if accelerator else 0
        # Gradients are averaged over processes, so a loss that is divided by a global count is too small by this.
        self.loss_factor = self.num_processes

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over all processes, on each of them."""
        return self.accelerator.reduce(tensor, "sum") if self.num_processes > 1 else tensor

    def gather(self, rows: list) -> list:
        """The elements of every process's list, on each of them; costs one small sum where all are empty."""
        if self.num_processes == 1:
            return rows
        count = torch.tensor(len(rows), device=self.accelerator.device)
        return gather_object(rows) if self.sum(count) else []

    def share(self, rows: list) -> list:
        """This process's part of `rows`; [`Engine.collect`] undoes it."""
        return rows[self.process_index :: self.num_processes]

    def collect(self, rows: list) -> list:
        """The parts of all processes, in the order that [`Engine.share`] found them in."""
        if self.num_processes == 1:
            return rows
        collected = gather_object([rows])
        longest = max(len(part) for part in collected)
        return [part[place] for place in range(longest) for part in collected if place < len(part)]

    def accumulate(self, model: torch.nn.Module, is_last: bool) -> AbstractContextManager:
        """A context for a micro-batch whose gradients are reduced over processes only if `is_last`."""
        return self.accelerator.no_sync(model) if self.num_processes > 1 and not is_last else nullcontext()

    def autocast(self) -> AbstractContextManager:
        """The precision that the model is trained in."""
        return self.accelerator.autocast() if self.accelerator else nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """The backward of a loss whose value each process has divided by the global count."""
        loss = loss * self.loss_factor
        if self.accelerator is None:
            loss.backward()
        else:
            # Accelerate divides by its own accumulation, which the global count already holds.
            self.accelerator.backward(loss * self.accelerator.gradient_accumulation_steps)

    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Brings gradients of `torch.autograd.grad` to where a backward leaves them: averaged; in float16, scaled."""
        scaler = self.accelerator.scaler if self.accelerator else None
        for parameter in parameters:
            if parameter.grad is None:
                continue
            if self.num_processes > 1:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            if scaler is not None:
                parameter.grad = scaler.scale(parameter.grad)  # not get_scale(): the scale is made here if need be

    def refresh(self, optimizer: torch.optim.Optimizer, scale: float, decay: float | None, square: bool) -> None:
        """Sends the gradients through the engine's own step into the Hessian."""
        sophia = find_sophia(optimizer)
        if self.accelerator is None:
            return sophia.update_hessian(scale, decay, square)
        state = self.accelerator.gradient_state
        # At the first micro-batch of an accumulation the Trainer has this off. Left on, it would step alone.
        sync_gradients = state.sync_gradients
        state._set_sync_gradients(True)
        with sophia.hessian_refresh(scale, decay, square):
            optimizer.step()
        state._set_sync_gradients(sync_gradients)


def find_sophia(optimizer: torch.optim.Optimizer | None) -> Sophia | None:
    """The [`Sophia`] inside the wrappers of an engine, or `None` if another optimizer runs."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer if isinstance(optimizer, Sophia) else None


def rows_per_forward(trainer: "Trainer") -> int:
    """Pairs of a training batch on one process, which the Trainer's search for a size that fits may have lowered."""
    return trainer._train_batch_size // max(1, trainer.args.n_gpu)


def save_checkpoint(trainer: "Trainer") -> str:
    """
    Saves a checkpoint of the last finished step at once, outside the Trainer's schedule.

    Returns:
        `str`: Its folder.
    """
    trainer._save_checkpoint(trainer.model_wrapped, trial=None)
    return f"{trainer.args.output_dir}/checkpoint-{trainer.state.global_step}"


def stop_at_rows(trainer: "Trainer", engine: Engine, rows: list[str]) -> None:
    """
    Stops every process before its step if the loss of one of them is not finite at some rows.

    Raises:
        FloatingPointError: After saving the state before the step; the rows are named.
    """
    rows = engine.gather(rows)
    if rows:
        checkpoint = save_checkpoint(trainer)
        raise FloatingPointError(
            f"The loss is not finite at {', '.join(rows)}, in step {trainer.state.global_step + 1}, which was not "
            f"taken; {checkpoint} holds the state before it. Usual causes: a learning rate or forget weight that is "
            "too high, or float16 without a scaler."
        )
