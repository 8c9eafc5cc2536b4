"""What unlearning asks of an engine, and the answer of one process and of DistributedDataParallel."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor

from ..batch import parts_of
from ..optim import Partition, Soul


class GradientError(FloatingPointError):
    """A gradient is not finite, while the losses are."""


# Float16's loss scale is halved by each: from 2^16, where it starts, to where none is left.
MOST_OVERFLOWS = 24


class Engine:
    """
    One process, or DistributedDataParallel; [`make_engine`] chooses, and the other engines override what they must.

    Args:
        accelerator ([`~accelerate.Accelerator`] or [`~accelerate.PartialState`], *optional*):
            The Trainer's. Without, there is one plain process. A bare state is enough for all that does not train.

    Attributes:
        shards (`bool`):
            Whether each process holds a part of the model or of the optimizer alone. Such engines are also those whose
            checkpoints are loaded after the Trainer has prepared the model, not before.
    """

    shards = False

    def __init__(self, accelerator: Accelerator | PartialState | None = None):
        self.accelerator = accelerator
        self.num_processes = accelerator.num_processes if accelerator else 1
        self.process_index = accelerator.process_index if accelerator else 0
        # Gradients are averaged over processes, so a loss that is divided by a global count is too small by this.
        self.loss_factor = self.num_processes

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all processes, on each of them."""
        return reduce(tensor, "sum") if self.num_processes > 1 else tensor

    def gather(self, rows: list) -> list:
        """The elements of every process's list, on each of them; costs one small sum where all are empty."""
        if self.num_processes == 1:
            return rows
        count = torch.tensor(len(rows), device=self.accelerator.device)
        return gather_object(rows) if self.sum(count) else []

    def share(self, rows: list) -> list:
        """
        This process's part of `rows`; [`Engine.collect`] undoes it. Every process gets as many, because a forward of a
        sharded model needs them all: some get a row a second time.
        """
        part = rows[self.process_index :: self.num_processes]
        return part + rows[: -(-len(rows) // self.num_processes) - len(part)]

    def collect(self, values: list, num_rows: int) -> list:
        """The values of all processes for the `num_rows` rows that were shared out, in the rows' order."""
        if self.num_processes == 1:
            return values
        return [value for values_there in zip(*gather_object([values])) for value in values_there][:num_rows]

    def is_repeated(self, batch: dict[str, Tensor], is_last: bool, num_pairs: int) -> Tensor:
        """
        Which pairs of rows in a micro-batch are there only to fill it up: where an epoch does not divide evenly,
        accelerate starts over from its first rows, so that every process gets as many.

        Args:
            batch ([`~batch.ForgetRetainBatch`]): This process's.
            is_last (`bool`): Whether it is the last that the data loader gave.
            num_pairs (`int`): Pairs of an epoch.

        Returns:
            `torch.BoolTensor` of shape `(pairs,)`.
        """
        parts = parts_of(batch)
        num_here = max(parts[half].stop - parts[half].start for half in ("forget", "retain"))
        places = torch.arange(num_here, device=batch["labels"].device)
        # Accelerate counts the remainder too, but loses it where a resumed epoch skips its first batches.
        remainder = num_pairs % (len(places) * self.num_processes)
        fills_up = is_last and self.num_processes > 1 and self.accelerator.even_batches
        is_end = fills_up and self.accelerator.gradient_state.end_of_dataloader
        return self.process_index * len(places) + places >= (remainder if is_end and remainder else num_pairs)

    def accumulate(self, model: torch.nn.Module, is_last: bool) -> AbstractContextManager:
        """A context for a micro-batch whose gradients need not be reduced over processes unless `is_last`."""
        return self.accelerator.no_sync(model) if self.num_processes > 1 and not is_last else nullcontext()

    def autocast(self) -> AbstractContextManager:
        """The precision that the model is trained in."""
        return self.accelerator.autocast() if self.accelerator else nullcontext()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """
        The backward of a loss whose value each process has divided by the global count.

        Args:
            loss (`torch.FloatTensor` of shape `()`): This process's part of a mean.
            is_last (`bool`): Whether no further micro-batch follows before [`Engine.fold`].
        """
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

    @contextmanager
    def gradients_set_aside(self, optimizer: torch.optim.Optimizer) -> Iterator[list[torch.nn.Parameter]]:
        """A context in which the optimizer's parameters, which it gives, have no gradients but those made in it."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        gradients = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            yield parameters
        finally:
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient

    def gradients(self, model: torch.nn.Module, backward: Callable[[], None]) -> list[Tensor]:
        """
        Gradients for another use than a step, between two steps. Those that parameters have must be set aside.

        Args:
            model (`torch.nn.Module`): The model, wrapped by its engine or not.
            backward (`Callable`):
                Calls [`Engine.backward`] for each micro-batch. It is called again where float16 overflows, at a lower
                loss scale.

        Returns:
            `list[torch.Tensor]`: This process's parts, unscaled, in the order of [`Engine.local_weights`].

        Raises:
            GradientError: If float16 overflows at every loss scale.
        """
        parameters = trained_parameters(model)
        scaler = self.accelerator.scaler if self.accelerator else None
        for _ in range(MOST_OVERFLOWS):
            backward()
            gradients = [
                torch.zeros_like(weight) if parameter.grad is None else self.local({"": parameter.grad})[""]
                for parameter, weight in zip(parameters, self.local_weights(model))
            ]
            for parameter in parameters:
                parameter.grad = None
            if scaler is None:
                return gradients
            scale = scaler.get_scale()
            for gradient in gradients:
                gradient.div_(scale)
            if not self.sum_over_parts(model, [(~gradient.isfinite()).sum() for gradient in gradients]):
                return gradients
            scaler.update(scale * scaler.get_backoff_factor())
        raise GradientError("The gradient overflows float16 at every loss scale.")

    def sum_over_parts(self, model: torch.nn.Module, numbers: list[Tensor]) -> Tensor:
        """
        Sums what is said of each part of the weights, every weight once, whoever holds it.

        Args:
            model (`torch.nn.Module`): The model, wrapped by its engine or not.
            numbers (`list[torch.Tensor]`): Tensors of shape `()`, one of each part, as [`Engine.local_weights`].

        Returns:
            `torch.Tensor` of shape `()`: The same on every process.
        """
        # A model may be spread over devices by its `device_map`.
        total = torch.zeros_like(numbers[0], device=self.accelerator.device if self.accelerator else None)
        for parameter, number in zip(trained_parameters(model), numbers):
            if self.owns(parameter):
                total += number.to(total.device)
        return self.sum(total)

    def owns(self, parameter: torch.nn.Parameter) -> bool:
        """Whether this process is the one, of those that hold the same part of a parameter, to count it in a sum."""
        return self.process_index == 0

    def whole(self, parameter: torch.nn.Parameter, part: Tensor) -> Tensor:
        """The whole of what each process holds a part of, as it does of the parameter; every process must call it."""
        return part

    def part(self, parameter: torch.nn.Parameter, whole: Tensor) -> Tensor:
        """This process's part of a tensor of the parameter's shape; undoes [`Engine.whole`]."""
        return whole

    def fold(
        self,
        optimizer: torch.optim.Optimizer,
        inside: Callable[[Soul], AbstractContextManager],
        max_grad_norm: float = 0.0,
        model: torch.nn.Module | None = None,
    ) -> bool:
        """
        Sends the gradients through the engine's own step into what the optimizer keeps, moving nothing.

        Args:
            optimizer (`torch.optim.Optimizer`): [`~optim.Soul`], or the engine's wrapper of it.
            inside (`Callable`): Enters the context of the optimizer in which its step moves nothing.
            max_grad_norm (`float`, *optional*, defaults to 0.0): Clips the gradients before; 0 does not.
            model (`torch.nn.Module`, *optional*): Whose gradients are clipped, as the Trainer prepared it.

        Returns:
            `bool`: False if the engine skipped the step, because float16 overflowed: its loss scale is lower now.
        """
        soul = find_soul(optimizer)
        if self.accelerator is None:
            with inside(soul):
                soul.step()
            return True
        state = self.accelerator.gradient_state
        # At the first micro-batch of an accumulation the Trainer has this off. Left on, it would step alone.
        sync_gradients = state.sync_gradients
        state._set_sync_gradients(True)
        try:
            if max_grad_norm > 0:
                self.accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            with inside(soul):
                optimizer.step()
        finally:
            state._set_sync_gradients(sync_gradients)
        return not optimizer.step_was_skipped

    def has_finite_gradients(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the gradients of a step are finite, on every process; those of float16 are left to its scaler."""
        if self.accelerator is not None and self.accelerator.scaler is not None:
            return True
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        return self._are_finite(self.local({"": gradient})[""] for gradient in gradients)

    def has_finite_weights(self, model: torch.nn.Module) -> bool:
        """Whether all that training changes of the model is finite, on every process."""
        return self._are_finite(self.local_weights(model))

    def _are_finite(self, tensors: Iterable[Tensor]) -> bool:
        """One pass over the tensors, and one number that is read from the device."""
        device = self.accelerator.device if self.accelerator else None
        alike = defaultdict(list)
        for tensor in tensors:
            if tensor.device.type == "meta":  # which another process has read, and gives out when it is sharded
                continue
            alike[tensor.device, torch.promote_types(tensor.dtype, torch.float32)].append(tensor)
        # NaN or infinite where any value is. Of all ways to find that, this reads memory fastest.
        norms = [torch.stack(torch._foreach_norm(each, 2, dtype)).sum() for (_, dtype), each in alike.items()]
        total = torch.stack([each.to(device or norms[0].device, torch.float32) for each in norms]) if norms else None
        count = torch.zeros((), dtype=torch.long, device=device) if total is None else (~total.isfinite()).sum()
        return not (self.sum(count) if self.shards else count)

    def step_was_lost(self) -> bool:
        """Whether the engine has left out the step that the optimizer was asked for, for no reason of float16's."""
        return False

    def holds_whole(self, model: torch.nn.Module) -> bool:
        """Whether this process has whole weights, as a hash of them needs."""
        return True

    def partition(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Partition:
        """Whose tensors the optimizer's parameters hold, for a model that the Trainer has prepared."""
        return Partition({parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad})

    def local(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parts of a parameter's state that this process holds."""
        return state

    def local_weights(self, model: torch.nn.Module) -> Iterable[Tensor]:
        """
        The tensors in which this process holds what training changes of the model, in an order that stays. Writing to
        them changes the model, and no autograd graph hears of it.
        """
        return [parameter.data for parameter in trained_parameters(model)]

    def swap_weights(self, model: torch.nn.Module, others: list[Tensor]) -> None:
        """Exchanges the values of [`Engine.local_weights`] and of `others`. Not between a forward and its backward."""
        self.forget_gathered(model)
        for weight, other in zip(self.local_weights(model), others):
            now = weight.clone()
            weight.copy_(other)
            other.copy_(now)

    def forget_gathered(self, model: torch.nn.Module) -> None:
        """Drops whole weights that the engine kept after a forward: the next one reads [`Engine.local_weights`]."""


def trained_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that training changes, in the order of [`Engine.local_weights`]."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def find_soul(optimizer: torch.optim.Optimizer | None) -> Soul | None:
    """The [`~optim.Soul`] inside the wrappers of an engine, or `None` if another optimizer runs."""
    wrappers = []  # which a foreign optimizer may have in a circle
    while not isinstance(optimizer, Soul | None) and optimizer not in wrappers:
        wrappers.append(optimizer)
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer if isinstance(optimizer, Soul) else None
