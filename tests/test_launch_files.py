"""The files for `accelerate launch`, through accelerate's own loader, launcher and plugins."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands import launch
from accelerate.commands.config import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)


ROOT = Path(__file__).parents[1]
NAMES = ("single", "ddp", "fsdp2", "zero2", "zero3", "zero3_offload")
SEVERAL = NAMES[1:]
DEEPSPEED = NAMES[3:]
# What accelerate reads before it knows of arguments.
HEAD = {"compute_environment", "distributed_type", "fsdp_config", "deepspeed_config"}
# Those of the Trainer that fill DeepSpeed's "auto".
TRAINER = {
    "world_size": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "max_grad_norm": 0.5,
    "learning_rate": 1e-5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "save_on_each_node": False,
    "bf16": True,
    "bf16_full_eval": False,
    "fp16": False,
    "fp16_full_eval": False,
}


def path_of(name):
    return str(ROOT / "recipes" / "accelerate" / f"{name}.yaml")


def launched(name, *flags):
    """Arguments and environment as `accelerate launch` has them for this file, but for starting anything."""
    parser = launch.launch_command_parser()
    args, defaults, takes_precision = launch._validate_launch_command(
        parser.parse_args(["--config_file", path_of(name), "--main_process_port", "0", *flags, "script.py"])
    )
    if args.use_deepspeed:
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if takes_precision else [])]
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        command, environment = prepare_deepspeed_cmd_env(args)
        assert command is None, "a launcher that reaches the other machines by itself"
    elif args.multi_gpu or args.use_fsdp:
        environment = prepare_multi_gpu_env(args)
    else:
        environment = prepare_simple_launcher_cmd_env(args)[1]
    return args, environment


def deepspeed_config(name, monkeypatch):
    """DeepSpeed's configuration, as the Trainer has it once its own arguments have filled it."""
    pytest.importorskip("deepspeed")
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    monkeypatch.chdir(ROOT)
    for key, value in launched(name)[1].items():
        monkeypatch.setenv(key, value)
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision("bf16")
    filled = HfTrainerDeepSpeedConfig(plugin.deepspeed_config)
    filled.trainer_config_process(SimpleNamespace(**TRAINER))
    assert not filled.mismatches
    return filled.config, plugin


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_one_that_accelerate_reads(name):
    """Would catch a misspelt key: accelerate refuses those at the top and silently ignores those further down."""
    load_config_from_file(path_of(name))
    given = yaml.safe_load(Path(path_of(name)).read_text(encoding="utf-8"))
    below = {**given.get("deepspeed_config", {}), **given.get("fsdp_config", {})}
    args, known = launched(name)[0], {action.dest for action in launch.launch_command_parser()._actions}
    for key, value in {**given, **below}.items():
        if key not in HEAD | {"main_process_port"}:
            assert key in known and getattr(args, key) == value, f"{key} does not reach the launch"


@pytest.mark.parametrize("name", NAMES)
def test_each_file_chooses_its_engine_and_precision(name):
    """Would catch a file that starts another engine, or in float32."""
    args, environment = launched(name)
    assert args.multi_gpu == (name == "ddp")
    assert bool(args.use_fsdp) == (name == "fsdp2") == (environment.get("ACCELERATE_USE_FSDP") == "true")
    assert bool(args.use_deepspeed) == (name in DEEPSPEED) == (environment.get("ACCELERATE_USE_DEEPSPEED") == "true")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


@pytest.mark.parametrize("name", SEVERAL)
def test_each_file_is_launched_once_a_machine(name):
    """Would catch a default launcher that needs ssh, and a number of processes that is taken for one machine's."""
    flags = ("--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "10.0.0.1", "--num_processes", "16")
    args, _ = launched(name, *flags)
    assert (args.nproc_per_node, args.nnodes, args.node_rank) == ("8", "2", 1)
    assert args.rdzv_endpoint == f"10.0.0.1:{args.main_process_port}"


@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed_leaves_optimizer_and_numbers_to_the_trainer(name, monkeypatch):
    """Would catch an optimizer in Sophia's place, an "auto" that nobody fills, and a clip of DeepSpeed's own."""
    config, plugin = deepspeed_config(name, monkeypatch)
    assert "optimizer" not in config and "scheduler" not in config
    assert "auto" not in str(config)
    assert config["gradient_clipping"] == 0.5 and config["gradient_accumulation_steps"] == 4
    assert config["bf16"]["enabled"] is True
    zero = config["zero_optimization"]
    assert zero["stage"] == (2 if name == "zero2" else 3)
    assert plugin.zero3_init_flag == zero["stage3_gather_16bit_weights_on_model_save"] == (name != "zero2")
    offload = "cpu" if name == "zero3_offload" else "none"
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == offload


def test_fsdp_is_the_second_version_by_layers_with_a_model_that_can_be_read(monkeypatch):
    """Would catch FSDP1, which is refused, one unit for the whole model, and a folder without model.safetensors."""
    for key, value in launched("fsdp2")[1].items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"


SCRIPT = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
import soul_trainer

args = TrainingArguments(sys.argv[1], optim="soul", max_steps=1, report_to="none", save_strategy="no")
config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
row = {"input_ids": torch.arange(8), "labels": torch.arange(8)}
trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=[row] * 8)
trainer.train()
zero = trainer.optimizer.optimizer
print("runs", type(zero).__name__, "with", type(zero.optimizer).__name__, "offloaded:", zero.offload_optimizer)
trainer.save_model()
"""


def test_offloaded_states_are_sophias(tmp_path):
    """Would catch DeepSpeed's Adam in Sophia's place, and a model that is not saved."""
    pytest.importorskip("deepspeed")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    arguments = ["--config_file", path_of("zero3_offload"), "--num_processes", "1", "--main_process_port", "0"]
    arguments += ["--mixed_precision", "no"]  # on a CPU, the Trainer has bfloat16 without DeepSpeed alone
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *arguments, str(script), str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "runs DeepSpeedZeroOptimizer_Stage3 with Sophia offloaded: True" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 1000
