"""
DeepSpeed ZeRO. The engine owns gradients, optimizer and step; its optimizer holds Sophia, whose parameters are flat
partitions: of a whole parameter group in stages 1 and 2, of each parameter by itself in stage 3.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .base import Engine, LocalState, find_sophia


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

    def refresh(self, optimizer: torch.optim.Optimizer, scale: float, decay: float | None, square: bool) -> bool:
        """Sends the gradients through the engine's step, with its clipping off and its counters put back."""
        engine = self.deepspeed
        counters = {name: getattr(engine, name) for name in _COUNTERS}
        clipped = [(engine.optimizer, "clip_grad"), (engine._config, "gradient_clipping")]
        clipping = [(owner, name, getattr(owner, name)) for owner, name in clipped if hasattr(owner, name)]
        try:
            engine.lr_scheduler = None
            for owner, name, _ in clipping:
                setattr(owner, name, 0.0)
            with find_sophia(optimizer).hessian_refresh(scale, decay, square):
                engine.step()
            return engine.was_step_applied()
        finally:
            for owner, name, value in clipping:
                setattr(owner, name, value)
            for name, value in counters.items():
                setattr(engine, name, value)

    def local_states(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[LocalState]:
        """The parts of the flat partitions that belong to each parameter."""
        zero, sophia = self.deepspeed.optimizer, find_sophia(optimizer)
        for name, param in model.named_parameters():
            place = self._place_in_partition(zero, param) if param.requires_grad else None
            if place is None:
                continue
            flat, group, start, count = place
            if "exp_avg" in sophia.state.get(flat, {}):
                whole = sophia.state[flat]
                parts = {key: whole[key].narrow(0, start, count) for key in ("exp_avg", "hessian")}
                yield LocalState(name, group, {**parts, "hessian_weight": whole["hessian_weight"]})

    def _place_in_partition(self, zero: Any, param: Tensor) -> tuple[Tensor, int, int, int] | None:
        """Flat partition, parameter group, first element and number of elements, or `None` if nothing is here."""
        if self.stage == 3:
            sub_group, start, _ = zero.grad_position[zero.get_param_id(param)]
            part = param.ds_tensor.ds_numel
            # The last processes' parts are padded to the others' size.
            count = max(0, min(part, param.ds_numel - part * self.process_index))
            return zero.fp32_partitioned_groups_flat[sub_group], zero.sub_group_to_group_id[sub_group], start, count
        mapping = getattr(param, "_hp_mapping", None)
        if mapping is None:
            return None
        flat = self._flat_partitions(zero)[mapping.param_group_index]
        address = mapping.hp_fragment_address
        return flat, mapping.param_group_index, address.start, address.numel

    @staticmethod
    def _flat_partitions(zero: Any) -> list[Tensor]:
        """Sophia's parameters: ZeRO's own, or those of the optimizer that sums bfloat16 gradients in float32."""
        name = "single_partition_of_fp32_groups"
        return getattr(zero, name) if hasattr(zero, name) else zero.fp32_groups_flat_partition

    def local_weights(self, model: torch.nn.Module) -> Iterable[Tensor]:
        """Whole weights up to stage 2, partitions in stage 3; not the float32 masters, which no forward reads."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [parameter.ds_tensor.data if self.stage == 3 else parameter.data for parameter in trained]

    def forget_gathered(self, model: torch.nn.Module) -> None:
        """Partitions again, in stage 3, what a forward or the last step left gathered."""
        if self.stage == 3:
            self.deepspeed.optimizer._partition_all_parameters()
            # ZeRO++ keeps a second copy from a step's first forward, which is a reference's, for the backward.
            self.deepspeed.optimizer.invalidate_secondary_tensor()
