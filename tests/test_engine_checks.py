"""What is refused at construction: by name, with the reason, before a model is trained wrongly."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType, ParallelismConfig
from accelerate.utils import DeepSpeedPlugin
from peft import LoraConfig
from scenes import FORGET, scene_config, scene_model, scene_trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import Trainer, TrainingArguments

from soul_trainer.engines import (
    Engine,
    check_engine,
    check_estimator,
    check_trainer,
    prepare_deepspeed,
)
from soul_trainer.engines.checks import check_rows_are_whole
from soul_trainer.engines.deepspeed import DeepSpeedEngine
from soul_trainer.engines.fsdp import FSDP2Engine
from soul_trainer.objectives import Objectives


def deepspeed_args(**config):
    """Arguments as the Trainer has them under a DeepSpeed configuration."""
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    numbers = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    plugin = DeepSpeedPlugin(hf_ds_config={**numbers, "zero_optimization": {"stage": 2}, **config})
    return SimpleNamespace(optim=SimpleNamespace(value="soul"), deepspeed_plugin=plugin)


def zero(stage=2, **offload):
    return {"zero_optimization": {"stage": stage, "offload_optimizer": offload}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, "an optimizer in DeepSpeed's configuration, 'AdamW'.*remove `optimizer`"),
        (zero(device="nvme", nvme_path="/tmp"), "offload_optimizer.device: nvme"),
        (zero(3, device="cpu", ratio=0.5), "offload_optimizer.ratio"),
        (zero(3, device="cpu", super_offload=True), "super_offload"),
        ({"tensor_parallel": {"autotp_size": 2}}, "`tensor_parallel` and `mics_shard_size`"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients"),
        ({**zero(device="cpu"), "zero_force_ds_cpu_optimizer": True}, "asks for its own Adam: set it to false"),
    ],
)
def test_deepspeed_is_refused_where_it_would_run_another_optimizer(config, message):
    """Would catch a run that says Sophia and takes DeepSpeed's Adam, and states that move behind its back."""
    with pytest.raises(ValueError, match=message):
        prepare_deepspeed(deepspeed_args(**config))


def test_offloaded_states_are_let_through():
    """Would catch accelerate putting an Adam of DeepSpeed's in Sophia's place, which it does unless it is told."""
    args = deepspeed_args(**zero(device="cpu"))
    prepare_deepspeed(args)
    assert args.deepspeed_plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] is False
    prepare_deepspeed(deepspeed_args())
    prepare_deepspeed(SimpleNamespace(deepspeed_plugin=None))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"distributed_type": DistributedType.MEGATRON_LM}, "MEGATRON_LM is not supported: use one process"),
        (
            {"distributed_type": DistributedType.FSDP, "fsdp_plugin": SimpleNamespace(fsdp_version=1)},
            "fsdp_version: 2",
        ),
        (
            {"distributed_type": DistributedType.DEEPSPEED, "deepspeed_plugin": SimpleNamespace(zero_stage=0)},
            "stage 0 shards nothing",
        ),
    ],
)
def test_engines_that_would_go_wrong_are_refused(state, message):
    """Would catch an engine that nobody tried, run in the hope that it works."""
    with pytest.raises(ValueError, match=message):
        check_engine(SimpleNamespace(**state))


def test_processes_that_share_rows_are_refused():
    """Would catch losses divided by tokens that several processes counted together."""
    with pytest.raises(ValueError, match="tp_size=2.*leave it at 1"):
        check_rows_are_whole(SimpleNamespace(parallelism_config=ParallelismConfig(tp_size=2)))


def test_estimators_and_losses_that_need_whole_weights_are_refused(tmp_path, monkeypatch):
    """Would catch a Hutchinson estimate, or a sum of absolute weights, of one process's part."""
    sharded = FSDP2Engine(SimpleNamespace(num_processes=1, process_index=0))
    with pytest.raises(ValueError, match="hutchinson.*Use gauss_newton_bartlett or empirical_fisher"):
        check_estimator("hutchinson", sharded, TrainingArguments(str(tmp_path)))
    check_estimator("hutchinson", Engine(), TrainingArguments(str(tmp_path)))
    monkeypatch.setattr(Engine, "shards", True)
    with pytest.raises(ValueError, match="`l1_weight` sums whole parameters"):
        scene_trainer(tmp_path, l1_weight=0.1)


@pytest.mark.parametrize("settings", [{"sam_radius": 0.1}, {"weight_mask": "wagle"}])
def test_what_moves_weights_between_steps_is_refused_under_deepspeed(tmp_path, settings):
    """Would catch gradients that are not there, and weights that DeepSpeed's own float32 copies write over."""
    trainer = scene_trainer(tmp_path, **settings)
    check_trainer(trainer, trainer.engine)
    check_trainer(trainer, FSDP2Engine(SimpleNamespace(num_processes=1, process_index=0)))
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2))
    engine = DeepSpeedEngine(SimpleNamespace(num_processes=1, process_index=0, state=state))
    (name,) = settings
    with pytest.raises(ValueError, match=f"`{name}` needs gradients between two steps.*shard with FSDP2"):
        check_trainer(trainer, engine)
    check_trainer(scene_trainer(tmp_path), engine)


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_samplers_that_ask_for_a_rows_length_are_refused(tmp_path, strategy):
    """Would catch a trainer that is made, and ends in the Trainer's error about items without `input_ids`."""
    with pytest.raises(ValueError, match=f"`train_sampling_strategy='{strategy}'` sorts.*use 'random'"):
        scene_trainer(tmp_path, train_sampling_strategy=strategy)


@pytest.fixture
def sharded_weight():
    """A parameter that FSDP2 holds, in a world of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    torch.distributed.destroy_process_group()


def test_dora_beside_a_model_that_was_sharded_while_loading_is_refused(sharded_weight, tmp_path):
    """Would catch peft's own error about mixed tensors, deep in the first forward."""
    model = torch.nn.Module()
    model.weight, model.peft_config = sharded_weight, {"default": LoraConfig(use_dora=True)}
    args, model.config = scene_config(tmp_path), scene_model().config
    parts = {"args": args, "model": model, "objectives": Objectives.named("npo", "nll"), "eval_dataset": None}
    trainer = SimpleNamespace(**parts, train_dataset=FORGET, optimizer=None, model_init=None, compute_loss_func=None)
    with pytest.raises(ValueError, match="leave `use_dora` out"):
        check_trainer(trainer, Engine())
    model.peft_config = {"default": LoraConfig()}
    check_trainer(trainer, Engine())
    args.load_best_model_at_end = True
    with pytest.raises(ValueError, match="`load_best_model_at_end` cannot load"):
        check_trainer(trainer, Engine())


def test_a_plain_trainer_is_checked_at_construction(tmp_path):
    """Would catch a mistyped setting that shows after the model is loaded and the data is tokenized, or never."""
    args = TrainingArguments(str(tmp_path), optim="soul", optim_args="rhoo=1", use_cpu=True)
    with pytest.raises(ValueError, match="Unknown key 'rhoo' in `optim_args`; SOUL knows rule, two_directions"):
        Trainer(scene_model(), args)
    args = TrainingArguments(str(tmp_path), optim="adamw_torch", optim_args="rhoo=1", use_cpu=True)
    Trainer(scene_model(), args)
