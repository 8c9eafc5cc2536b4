"""What is refused: by name, with the reason and the way out, before a model is trained wrongly."""

from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments

from ..optim import Soul
from ..soul_settings import SOUL_NAMES
from .base import Engine
from .deepspeed import DeepSpeedEngine
from .fsdp import is_sharded


_ONE_OR_DDP = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def check_engine(state: AcceleratorState) -> None:
    """Raises a `ValueError` with the reason if Sophia would go wrong under the engine of an accelerator."""
    if state.distributed_type in _ONE_OR_DDP:
        return
    if state.distributed_type == DistributedType.DEEPSPEED:
        if state.deepspeed_plugin.zero_stage == 0:
            raise ValueError("ZeRO stage 0 shards nothing: use DistributedDataParallel, or stage 1, 2 or 3.")
    elif state.distributed_type == DistributedType.FSDP:
        version = getattr(state.fsdp_plugin, "fsdp_version", 1)
        if version != 2:
            raise ValueError(
                f"FSDP version {version} is not supported, because it gives the optimizer flat parameters without "
                "names: set `fsdp_version: 2`."
            )
    else:
        raise ValueError(
            f"The engine {state.distributed_type.value} is not supported: use one process, DistributedDataParallel, "
            "FSDP2 or DeepSpeed."
        )


def check_rows_are_whole(accelerator: Accelerator) -> None:
    """Raises a `ValueError` if processes share rows out among them, which the counts of a loss do not know."""
    parallel = getattr(accelerator, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        if parallel is not None and getattr(parallel, name, 1) > 1:
            raise ValueError(
                f"`{name}={getattr(parallel, name)}` lets several processes work on one row, which the counts of the "
                "losses do not know: leave it at 1, and shard with FSDP2 or ZeRO-3."
            )


def check_estimator(estimator: str, engine: Engine, args: TrainingArguments) -> None:
    """Raises a `ValueError` if an estimator of the Hessian cannot run under an engine, or as the settings have it."""
    is_reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if estimator == "hutchinson" and is_reentrant:
        raise ValueError(
            "`hessian_estimator='hutchinson'` differentiates twice, which reentrant checkpoints cannot: set "
            "`gradient_checkpointing_kwargs={'use_reentrant': False}`, or another estimator."
        )
    if estimator == "hutchinson" and engine.shards:
        raise ValueError(
            "`hessian_estimator='hutchinson'` differentiates twice, which FSDP2 and DeepSpeed cannot: their weights "
            "are there for one backward alone. Use gauss_newton_bartlett or empirical_fisher."
        )


def check_trainer(trainer: Trainer, engine: Engine) -> None:
    """Raises a `ValueError` for arguments of an [`UnlearnTrainer`] that it, or the engine, cannot honour."""
    args = trainer.args
    if args.optim in SOUL_NAMES and not isinstance(trainer.optimizer, Soul | None):
        raise ValueError(
            f"`optimizers` is a {type(trainer.optimizer).__name__}, but `optim` names Sophia: leave one out."
        )
    if args.optim in SOUL_NAMES and trainer.optimizer is not None:
        wanted = args.resolved()
        for name in ("rule", "two_directions"):
            if trainer.optimizer.defaults[name] != getattr(wanted, name):
                raise ValueError(
                    f"`optimizers` has `{name}`={trainer.optimizer.defaults[name]!r}, and the settings say "
                    f"{getattr(wanted, name)!r}: set `{name}` to what the optimizer has."
                )
    if trainer.model_init is not None and trainer.optimizer is not None:
        raise ValueError(
            "`optimizers` steps one model, and `model_init` makes another for each training: leave one out."
        )
    _check_batches(trainer, engine)
    _check_best(trainer)
    if trainer.compute_loss_func is not None:
        raise ValueError("`compute_loss_func` has no place in unlearning: choose `forget_loss` and `retain_loss`.")
    adapters = getattr(trainer.model, "peft_config", {}).values()
    num_layers = getattr(trainer.model.config.get_text_config(), "num_hidden_layers", None)
    if trainer.objectives.any("needs_hidden_states") and num_layers is not None and args.rmu_layer >= num_layers:
        raise ValueError(
            f"`rmu_layer`={args.rmu_layer} is not in the model, whose {num_layers} layers count from 0: choose one in "
            "the first half."
        )
    if trainer.objectives.any("is_negated") and adapters:
        if not trainer.has_fresh_adapter or any(not _is_negated_by_factor(adapter) for adapter in adapters):
            raise ValueError(
                "`forget_loss='task_vector'` negates the product of a LoRA adapter's matrices: give a plain LoRA as "
                "`peft_config`, without `bias`, `modules_to_save`, `trainable_token_indices`, DoRA and PiSSA, or "
                "train the whole model."
            )
    if is_sharded(trainer.model) and any(getattr(adapter, "use_dora", False) for adapter in adapters):
        raise ValueError(
            "DoRA takes the norm of whole weights, which a model that transformers sharded while loading it does not "
            "have: leave `use_dora` out, or let accelerate shard it (FSDP2 in its configuration), or DeepSpeed."
        )
    if args.load_best_model_at_end and is_sharded(trainer.model):
        raise ValueError(
            "`load_best_model_at_end` cannot load whole weights into a model that transformers sharded while loading "
            "it: leave it out, and load the best checkpoint afterwards."
        )
    for name in ("sam_radius", "weight_mask"):
        if getattr(args, name) not in (0, "none") and isinstance(engine, DeepSpeedEngine):
            raise ValueError(
                f"`{name}` needs gradients between two steps and weights that it may move, and DeepSpeed gives out "
                "neither: its step uses the gradients up, and writes its own float32 copy of the weights over them. "
                f"Leave `{name}` out, or shard with FSDP2."
            )
    if args.l1_weight and engine.shards:
        raise ValueError(
            "`l1_weight` sums whole parameters, of which FSDP2 and DeepSpeed hold parts: leave it at 0, or use one "
            "process or DistributedDataParallel."
        )


def _check_best(trainer: Trainer) -> None:
    args = trainer.args
    if not args.load_best_model_at_end:
        return
    is_of_sets = isinstance(trainer.eval_dataset, dict) and trainer.compute_metrics is None
    if is_of_sets and args.metric_for_best_model in (None, "loss", "eval_loss"):
        known = ", ".join(f"{name}_loss" for name in trainer.eval_dataset)
        raise ValueError(
            f"`load_best_model_at_end` needs a figure, and `metric_for_best_model`={args.metric_for_best_model!r} is "
            f"that of one set of rows, of which there are several: set it to one of {known}."
        )


def _check_batches(trainer: Trainer, engine: Engine) -> None:
    args, num_pairs = trainer.args, len(trainer.train_dataset)
    num_rows = args.train_batch_size * engine.num_processes
    if args.dataloader_drop_last and num_pairs < num_rows:
        raise ValueError(
            f"`dataloader_drop_last` leaves out a batch that is not full, and the only one has {num_pairs} of "
            f"{num_rows} rows, so that no step would be taken: leave it out, or lower `per_device_train_batch_size`."
        )
    if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise ValueError(
            f"`train_sampling_strategy={args.train_sampling_strategy!r}` sorts rows by their lengths, and here a pair "
            "is drawn, whose retain row is another in each epoch: use 'random' or 'sequential'."
        )


def _is_negated_by_factor(adapter: Any) -> bool:
    """Whether an adapter's effect changes its sign with that of one of its factors."""
    is_lora = getattr(adapter.peft_type, "value", adapter.peft_type) == "LORA"
    is_plain = is_lora and adapter.bias == "none" and not adapter.use_dora
    is_plain = is_plain and not adapter.modules_to_save and not adapter.trainable_token_indices
    return is_plain and adapter.init_lora_weights in (True, "gaussian")


def prepare_deepspeed(args: TrainingArguments) -> None:
    """
    Lets DeepSpeed take Sophia, with optimizer states on the CPU too, where accelerate would replace it by an Adam of
    DeepSpeed's own.

    Args:
        args ([`~transformers.TrainingArguments`]): Settings that name Sophia.

    Raises:
        ValueError: If the configuration names an optimizer of its own, or keeps states where Sophia cannot step.
    """
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is None:
        return
    config = plugin.deepspeed_config
    if "optimizer" in config:
        raise ValueError(
            f"`optim={args.optim.value!r}` meets an optimizer in DeepSpeed's configuration, "
            f"{config['optimizer'].get('type')!r}, which would run in its place: remove `optimizer` from the file."
        )
    zero = config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    for name, is_set in (
        ("zenflow", zero.get("zenflow")),
        ("offload_optimizer.super_offload", offload.get("super_offload")),
        ("offload_optimizer.device: nvme", offload.get("device") == "nvme"),
        ("offload_param.device: nvme", (zero.get("offload_param") or {}).get("device") == "nvme"),
        ("offload_optimizer.ratio", offload.get("ratio", 1.0) != 1.0),
        ("torch_autocast", (config.get("torch_autocast") or {}).get("enabled")),
    ):
        if is_set:
            raise ValueError(f"DeepSpeed's `{name}` moves states, or steps, by itself: remove it, or use AdamW.")
    if config.get("tensor_parallel", {}).get("autotp_size", 1) > 1 or zero.get("mics_shard_size", -1) > 1:
        raise ValueError(
            "DeepSpeed's `tensor_parallel` and `mics_shard_size` leave it open which process holds which rows and "
            "states: remove them, and shard with ZeRO-3."
        )
    if zero.get("round_robin_gradients"):
        raise ValueError(
            "DeepSpeed's `round_robin_gradients` reorders partitions so that no one can tell whose states are where: "
            "set it to false."
        )
    if offload.get("device", "none") != "none":
        if config.get("zero_force_ds_cpu_optimizer"):
            raise ValueError(
                "`zero_force_ds_cpu_optimizer: true` in DeepSpeed's configuration asks for its own Adam: set it to "
                "false, which Sophia needs."
            )
        config["zero_force_ds_cpu_optimizer"] = False
