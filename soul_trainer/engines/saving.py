"""What a trainer saves of a model whose weights it keeps in float32, and the precision of its accelerator."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments

from ..precision import Precision
from ..records import make_tokenizer_portable, write_whole
from .choice import make_engine
from .fsdp import is_sharded
from .hooks import check_weights


def keeper_of_weights(args: TrainingArguments, model: torch.nn.Module) -> str | None:
    """Who takes care of the weights, so that no trainer may turn them to float32; for a message."""
    if getattr(args, "deepspeed_plugin", None) is not None:
        return "DeepSpeed keeps float32 weights of its own"
    if is_sharded(model):
        return "transformers has sharded the model while loading it (`dtype=torch.float32` loads it in float32)"
    if getattr(model, "hf_quantizer", None) is not None:
        return "the model is quantized"
    return None


def set_bf16(args: TrainingArguments, bf16: bool) -> None:
    """
    Sets `bf16` in settings that are made already, before their trainer has an accelerator.

    Args:
        args ([`~transformers.TrainingArguments`]): The settings.
        bf16 (`bool`): Whether to train under bfloat16 autocast.
    """
    args.bf16 = bf16
    if bf16:
        args.mixed_precision = "bf16"
    if not AcceleratorState._shared_state:
        return
    state = AcceleratorState()
    # A former trainer of this process has left its precision behind, which accelerate would not change.
    if state.distributed_type != DistributedType.DEEPSPEED and state.mixed_precision != args.mixed_precision:
        AcceleratorState._reset_state()


class SavedDtypeMixin(Trainer):
    """
    Saves a model in the dtype that it came in, though its weights are float32 in training. Checkpoints keep float32,
    so that a resumed run goes on with the same bits.

    Attributes:
        precision ([`Precision`], *optional*): Of the model; `None` before there is one.
    """

    precision: Precision | None = None
    _writes_checkpoint = False

    def _save_checkpoint(self, model: torch.nn.Module, trial) -> None:
        self._writes_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writes_checkpoint = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        As [`~transformers.Trainer`]'s, which also pushes, and with which a checkpoint begins. A model whose weights
        are not finite is neither saved nor pushed.
        """
        # A trainer that does not unlearn has no engine of its own.
        check_weights(self, getattr(self, "engine", None) or make_engine(self.accelerator, self.model))
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # The Trainer pickles its arguments beside the model, and uploads what is there.
        token, self.args.hub_token = self.args.hub_token, None
        try:
            self._save_in_dtype(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        if self.args.should_save:
            make_tokenizer_portable(output_dir or self.args.output_dir)

    def _save_in_dtype(self, output_dir: str | None, state_dict: dict | None) -> None:
        if self.precision is None or not self.precision.dtypes:
            super()._save(output_dir, state_dict)
            return
        with self._config_kept():
            if self._writes_checkpoint or not self.args.should_save:
                super()._save(output_dir, state_dict)
                return
            state_dict = self.model.state_dict() if state_dict is None else state_dict
            super()._save(output_dir, self.precision.narrowed(state_dict))
        path = Path(output_dir or self.args.output_dir, "config.json")
        if path.exists() and not hasattr(self.model, "peft_config"):
            # The model wrote the dtype that its weights have in memory.
            config = json.loads(path.read_text(encoding="utf-8"))
            config["dtype"] = str(self.precision.model_dtype).removeprefix("torch.")
            write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")

    @contextmanager
    def _config_kept(self) -> Iterator[None]:
        """Saving sets the dtype of the model's configuration, also in memory."""
        config = getattr(self.model, "config", None)
        dtype = getattr(config, "dtype", None)
        try:
            yield
        finally:
            if config is not None:
                config.dtype = dtype
