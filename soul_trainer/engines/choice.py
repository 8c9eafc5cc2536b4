"""Which engine runs a model."""

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.nn import Module

from .base import Engine
from .checks import check_engine, check_rows_are_whole
from .deepspeed import DeepSpeedEngine
from .fsdp import FSDP2Engine, is_sharded


def make_engine(accelerator: Accelerator | None = None, model: Module | None = None) -> Engine:
    """
    The engine that runs a model.

    Args:
        accelerator ([`~accelerate.Accelerator`], *optional*): The Trainer's. Without, there is one plain process.
        model (`torch.nn.Module`, *optional*): Says whether transformers sharded it while loading it.

    Raises:
        ValueError: If the engine is not supported.
    """
    if accelerator is None:
        return Engine()
    check_engine(accelerator.state)
    check_rows_are_whole(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DeepSpeedEngine(accelerator)
    if accelerator.distributed_type == DistributedType.FSDP or (model is not None and is_sharded(model)):
        return FSDP2Engine(accelerator)
    return Engine(accelerator)
