"""
DeepSpeed ZeRO. The engine owns gradients, optimizer and step; its optimizer holds ours, whose parameters are flat
partitions: of a whole parameter group in stages 1 and 2, of each parameter by itself in stage 3.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..optim import Partition, Section, Soul
from .base import Engine, find_soul


# What a step of the engine counts. A refresh is no step of training, so it puts them back.
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps", "lr_scheduler", "_global_grad_norm")


class DeepSpeedEngine(Engine):
    """
    DeepSpeed ZeRO, stages 1 to 3. A refresh is a step of the engine without clipping, that counts nothing.

    Args:
        accelerator ([`~accelerate.Accelerator`]): The Trainer's, which makes the engine when it prepares the model.
    """

    shards = True

    def __init__(self, accelerator: Accelerator):
        super().__init__(accelerator)
        self.stage = accelerator.state.deepspeed_plugin.zero_stage

    @property
    def deepspeed(self) -> Any:
        """The `deepspeed.DeepSpeedEngine`, once the Trainer has prepared the model."""
        return self.accelerator.deepspeed_engine_wrapped.engine

    def accumulate(self, model: torch.nn.Module, is_last: bool) -> AbstractContextManager:
        """The engine itself knows from the boundary, which [`backward`] sets."""
        return nullcontext()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Not accelerate's, which would step at once; the loss is already divided by the global count."""
        self.deepspeed.set_gradient_accumulation_boundary(is_last)
        self.deepspeed.backward(loss * self.loss_factor, scale_wrt_gas=False)

    @contextmanager
    def gradients_set_aside(self, optimizer: torch.optim.Optimizer) -> Iterator[list[torch.nn.Parameter]]:
        """The engine has no gradients between two steps, and none can be put back in the middle of one."""
        yield []

    def fold(
        self,
        optimizer: torch.optim.Optimizer,
        inside: Callable[[Soul], AbstractContextManager],
        max_grad_norm: float = 0.0,
        model: torch.nn.Module | None = None,
    ) -> bool:
        """Sends the gradients through the engine's step, with its clipping as asked and its counters put back."""
        engine = self.deepspeed
        counters = {name: getattr(engine, name) for name in _COUNTERS}
        clipped = [(engine.optimizer, "clip_grad"), (engine._config, "gradient_clipping")]
        clipping = [(owner, name, getattr(owner, name)) for owner, name in clipped if hasattr(owner, name)]
        try:
            engine.lr_scheduler = None
            for owner, name, _ in clipping:
                setattr(owner, name, max_grad_norm)
            with inside(find_soul(optimizer)):
                engine.step()
            return engine.was_step_applied()
        finally:
            for owner, name, value in clipping:
                setattr(owner, name, value)
            for name, value in counters.items():
                setattr(engine, name, value)

    def has_finite_gradients(self, optimizer: torch.optim.Optimizer) -> bool:
        """Left to DeepSpeed, which has the gradients, and leaves out a step of such: [`step_was_lost`] tells."""
        return True

    def step_was_lost(self) -> bool:
        """Whether it left out the last step, though float16 is not at work."""
        return not self.deepspeed.fp16_enabled() and not self.deepspeed.was_step_applied()

    def holds_whole(self, model: torch.nn.Module) -> bool:
        """Up to stage 2, and before stage 3 has partitioned them."""
        return not any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())

    def partition(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Partition:
        """Where each parameter lies in the flat partitions."""
        zero = self.deepspeed.optimizer
        named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        sections: dict[Tensor, list[Section]] = {}
        for name, param in named:
            flat, start, count, offset = self._place_in_partition(zero, param)
            shape = param.ds_shape if self.stage == 3 else param.shape
            sections.setdefault(flat, []).append(Section(name, shape, (start, count), offset))
        return FlatPartition(sections, self.sum, self.accelerator.device)

    def _place_in_partition(self, zero: Any, param: Tensor) -> tuple[Tensor, int, int, int]:
        """The flat partition, first element and number of elements in it, and the first one's place in the tensor."""
        if self.stage == 3:
            sub_group, start, _ = zero.grad_position[zero.get_param_id(param)]
            part = param.ds_tensor.ds_numel
            offset = part * self.process_index
            # The last processes' parts are padded to the others' size.
            count = max(0, min(part, param.ds_numel - offset))
            return zero.fp32_partitioned_groups_flat[sub_group], start, count, offset
        flats, mapping = self._flat_partitions(zero), getattr(param, "_hp_mapping", None)
        if mapping is None:
            groups = zero.bit16_groups if hasattr(zero, "bit16_groups") else zero.bf16_groups
            group = next(index for index, params in enumerate(groups) if any(param is other for other in params))
            return flats[group], 0, 0, 0
        address = mapping.hp_fragment_address
        return flats[mapping.param_group_index], address.start, address.numel, mapping.lp_fragment_address.start

    @staticmethod
    def _flat_partitions(zero: Any) -> list[Tensor]:
        """The flat parameters: ZeRO's own, or those of the optimizer that sums bfloat16 gradients in float32."""
        name = "single_partition_of_fp32_groups"
        return getattr(zero, name) if hasattr(zero, name) else zero.fp32_groups_flat_partition

    def local_weights(self, model: torch.nn.Module) -> Iterable[Tensor]:
        """Whole weights up to stage 2, partitions in stage 3; not the float32 masters, which no forward reads."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Stage 3 partitions them when the Trainer prepares the model.
        return [getattr(parameter, "ds_tensor", parameter).data for parameter in trained]

    def forget_gathered(self, model: torch.nn.Module) -> None:
        """Partitions again, in stage 3, what a forward or the last step left gathered."""
        if self.stage == 3:
            self.deepspeed.optimizer._partition_all_parameters()
            # ZeRO++ keeps a second copy from a step's first forward, which is a reference's, for the backward.
            self.deepspeed.optimizer.invalidate_secondary_tensor()


class FlatPartition(Partition):
    """
    Flat parameters that hold parts of many tensors.

    Args:
        sections (`dict[torch.Tensor, list[Section]]`):
            Of each flat parameter: the same tensors in the same order on every process, those of which nothing is here
            with a count of zero.
        total (`Callable`): Sums a tensor over processes.
        device (`torch.device`): On which processes can sum.
    """

    def __init__(self, sections: dict[Tensor, list[Section]], total: Callable[[Tensor], Tensor], device: torch.device):
        super().__init__()
        self._sections, self._total, self._device = sections, total, device

    def sections(self, param: Tensor) -> list[Section]:
        """Those of the tensors in the flat parameter; before the model is prepared, it is a tensor by itself."""
        return self._sections.get(param) or super().sections(param)

    def sum(self, params: list[Tensor], numbers: Tensor) -> Tensor:
        """Over all processes, each of which holds other elements."""
        return self._total(numbers.to(self._device)).to(numbers.device)

    def is_whole(self, params: set[Tensor]) -> bool:
        """DeepSpeed steps parameter groups, and sub-groups in stage 3, one by one."""
        return not self._sections or params == set(self._sections)

    def params(self, groups: list[dict]) -> list[Tensor]:
        """The flat parameters, which stage 3 gives to its groups for a step alone."""
        return list(self._sections)

    def part(self, param: Tensor, section: Section, whole: Tensor) -> Tensor:
        """The elements that are here, flattened."""
        return whole.flatten()[section.offset : section.offset + section.bounds[1]]

    def apply(self, param: Tensor, section: Section, part: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Puts the whole tensor together, as a sum of parts beside zeros, on every process."""
        whole = torch.zeros(section.shape.numel(), dtype=part.dtype, device=part.device)
        whole[section.offset : section.offset + part.numel()] = part
        return self.part(param, section, function(self.sum([param], whole).view(section.shape)))
