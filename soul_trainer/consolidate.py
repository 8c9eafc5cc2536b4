"""
Turns a checkpoint of several processes into one that a single process resumes, weights and Hessian included.

    python -m soul_trainer.consolidate output/checkpoint-30 output_single/checkpoint-30 --trust_pickle

It reads what DeepSpeed ZeRO 1 to 3 and FSDP2 write (accelerate's or transformers'), needs no GPU and as much memory as
weights and states take in float32. Any engine without shards resumes the result, and any model of transformers loads
it. The random states of the other processes are left behind: with dropout, the run goes on with other masks.

DeepSpeed and torch's distributed checkpoints pickle objects of their own, and reading a pickle runs what it says. So
`--trust_pickle` is needed for them: give it for checkpoints of your own runs, and for no others.
"""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoConfig

from .command_line import PlainParser
from .held_folder import hold_output


# Where DeepSpeed keeps the optimizer's state_dict: in stages 1 and 2, and in stage 3.
_ZERO_STATES = ("base_optimizer_state", "optimizer_state_dict")
_ZERO_MASTERS = ("single_partition_of_fp32_groups", "fp32_flat_groups")
_SCRATCH = "_consolidate-"
# DeepSpeed's mark, and the folders of torch's distributed checkpoints, whose metadata are a pickle.
_PICKLED = ("latest", "sharded", "optimizer_0")
_LEFT_BEHIND = ("*.bin", "*.distcp", "*.pth", "model*.safetensors*", "zero_to_*.py", "latest", "optimizer.pt")


class Contents(NamedTuple):
    """
    What a checkpoint holds, whole and by the parameters' names.

    Attributes:
        weights (`dict[str, torch.Tensor]`): Float32 where the engine keeps such masters.
        states (`dict[str, dict[str, torch.Tensor]]`): The optimizer's, of each parameter that it steps.
        groups (`list[dict]`): Its parameter groups, `params` being names.
    """

    weights: dict[str, Tensor]
    states: dict[str, dict[str, Tensor]]
    groups: list[dict]


def consolidate(checkpoint: str | Path, output: str | Path, trust_pickle: bool = False) -> None:
    """
    Writes a checkpoint for one process.

    Args:
        checkpoint (`str` or `Path`): A `checkpoint-N` folder of a run with DeepSpeed ZeRO or FSDP2.
        output (`str` or `Path`): A folder that does not exist yet.
        trust_pickle (`bool`, *optional*, defaults to `False`): Whether pickles in the checkpoint may run code.

    Raises:
        ValueError: If `output` exists, or `checkpoint` holds no known shards, or pickles that are not trusted.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if output.exists():
        raise ValueError(f"`output`={str(output)!r} exists: name a folder that does not.")
    if not trust_pickle and any((checkpoint / name).exists() for name in _PICKLED):
        raise ValueError(
            f"{str(checkpoint)!r} holds pickles, and reading them runs whatever code they hold: add `trust_pickle` "
            "(--trust_pickle) if the checkpoint is of a run of your own."
        )
    with hold_output(output):
        _write(checkpoint, output)


def _write(checkpoint: Path, output: Path) -> None:
    contents = _read(checkpoint)
    temporary = output.with_name(output.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    shards = [path.name for path in checkpoint.iterdir() if path.is_dir()]
    shutil.copytree(checkpoint, temporary, ignore=shutil.ignore_patterns(*_LEFT_BEHIND, *shards))
    if (checkpoint / "rng_state_0.pth").exists():
        shutil.copy(checkpoint / "rng_state_0.pth", temporary / "rng_state.pth")
    is_one_group = any(group.get("scaling") == "trust_region" for group in contents.groups)
    if (checkpoint / "latest").exists() and not is_one_group:
        _restore_dropped_groups(temporary / "scheduler.pt")
    _write_weights(contents.weights, temporary)
    torch.save(_numbered(contents), temporary / "optimizer.pt")
    os.replace(temporary, output)


def _read(checkpoint: Path) -> Contents:
    if (checkpoint / "latest").exists():
        return _read_zero(checkpoint)
    if (checkpoint / "sharded").exists():
        shards = _read_dcp(checkpoint / "sharded")
        return Contents(shards["model"], shards["optimizer"]["state"], shards["optimizer"]["param_groups"])
    if (checkpoint / "optimizer.bin").exists():
        weights = torch.load(checkpoint / "pytorch_model_fsdp.bin", weights_only=True)
        optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)
        return Contents(weights, optimizer["state"], optimizer["param_groups"])
    if (checkpoint / "optimizer_0").exists():
        weights = _read_dcp(checkpoint / "pytorch_model_fsdp_0")["model"]
        optimizer = _read_dcp(checkpoint / "optimizer_0")["optimizer"]
        return Contents(weights, optimizer["state"], optimizer["param_groups"])
    raise ValueError(
        f"{str(checkpoint)!r} holds no shards of DeepSpeed ZeRO or FSDP2; one process may resume it as is."
    )


def _read_dcp(folder: Path) -> dict:
    # Beside the checkpoint, not in /tmp, which is often memory.
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder.parent.parent) as scratch:
        dcp_to_torch_save(folder, f"{scratch}/whole.pt")
        return torch.load(f"{scratch}/whole.pt", weights_only=True)


def _read_zero(checkpoint: Path) -> Contents:
    """DeepSpeed's own merging of weights does for states too: it is given them in the place of the weights."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    weights = get_fp32_state_dict_from_zero_checkpoint(checkpoint, tag)
    merged = {}
    for key in _state_names(checkpoint / tag):
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=checkpoint.parent) as scratch:
            optimizer = _copy_with_states_for_weights(checkpoint / tag, Path(scratch) / tag, key)
            merged[key] = get_fp32_state_dict_from_zero_checkpoint(scratch, tag, exclude_frozen_parameters=True)
    # As every partition is stepped at every step, these numbers are the same in all of them.
    numbers = {key: value for key, value in optimizer["state"][0].items() if not value.dim()}
    states = {
        name: {key: parts[name].clone() for key, parts in merged.items()}
        | {key: value.clone() for key, value in numbers.items()}
        for name in merged["exp_avg"]
    }
    shapes = torch.load(min((checkpoint / tag).glob("*model_states.pt")), weights_only=False)["param_shapes"]
    groups = [
        {**group, "params": [name for partition in group["params"] for name in shapes[partition]]}
        for group in optimizer["param_groups"]
    ]
    return Contents({name: tensor.clone() for name, tensor in weights.items()}, states, groups)


def _state_names(folder: Path) -> list[str]:
    """The states of the optimizer that are as large as its parameters."""
    shard = torch.load(min(folder.glob("*optim_states.pt")), weights_only=False, mmap=True)
    zero = shard["optimizer_state_dict"]
    optimizer = next(zero[name] for name in _ZERO_STATES if name in zero)
    return [key for key, value in optimizer["state"][0].items() if value.dim()]


def _copy_with_states_for_weights(folder: Path, copy: Path, key: str) -> dict:
    """Copies ZeRO's files with one of the optimizer's states for the float32 weights; returns its state_dict."""
    copy.mkdir()
    for path in folder.glob("*model_states.pt"):
        (copy / path.name).symlink_to(path.resolve())
    for path in folder.glob("*optim_states.pt"):
        # Pickles of the user's own run: DeepSpeed writes objects of its own into them.
        shard = torch.load(path, weights_only=False, mmap=True)
        zero = shard["optimizer_state_dict"]
        optimizer = next(zero[name] for name in _ZERO_STATES if name in zero)
        masters = next(name for name in _ZERO_MASTERS if name in zero)
        zero[masters] = [
            optimizer["state"][place][key][: master.numel()] for place, master in enumerate(zero[masters])
        ]
        torch.save(shard, copy / path.name)
    return optimizer


def _numbered(contents: Contents) -> dict:
    """The state_dict of an optimizer whose parameters are numbered through its groups, as PyTorch does."""
    numbers = {name: number for number, name in enumerate(n for group in contents.groups for n in group["params"])}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in contents.groups]
    return {"state": {numbers[name]: state for name, state in contents.states.items()}, "param_groups": groups}


def _restore_dropped_groups(path: Path) -> None:
    """The Trainer makes two parameter groups. DeepSpeed drops an empty one, and the schedule then knows of one."""
    schedule = torch.load(path, weights_only=True)
    keys = [key for key in ("base_lrs", "_last_lr", "lr_lambdas") if len(schedule.get(key, ())) == 1]
    several = {key: schedule[key] * 2 for key in keys}
    torch.save({**schedule, **several}, path)


def _write_weights(weights: dict[str, Tensor], output: Path) -> None:
    if (output / "adapter_config.json").exists():
        return _write_adapter(weights, output / "adapter_model.safetensors")
    config = AutoConfig.from_pretrained(output)
    name = json.loads((output / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    model = getattr(transformers, name)(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - set(model.all_tied_weights_keys):
        raise ValueError(f"The weights do not fit {name}: missing are {missing}, unexpected {unexpected}.")
    model.save_pretrained(output)


def _write_adapter(weights: dict[str, Tensor], path: Path) -> None:
    adapter = {}
    for name, tensor in weights.items():
        if ".default" in name:
            # peft leaves the adapter's own name out of a file, and with it what only wraps a tensor.
            name = name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector")
            name = name.replace(".modules_to_save.default", "")
            adapter[re.sub(r"\.default(?=\.|$)", "", name)] = tensor.contiguous()
    if path.exists():
        with safe_open(path, "pt") as saved:
            differing = set(saved.keys()) ^ set(adapter)
        if differing:
            raise ValueError(f"The adapter has tensors that are not understood here: {sorted(differing)}.")
    save_file(adapter, path, metadata={"format": "pt"})


def command(arguments: list[str] | None = None) -> None:
    """Does what the command line asks for; errors are those of [`consolidate`]."""
    parser = PlainParser(__doc__)
    parser.add_argument("checkpoint", help="A checkpoint-N folder of a run with DeepSpeed ZeRO or FSDP2.")
    parser.add_argument("output", help="A folder that does not exist yet.")
    parser.add_argument("--trust_pickle", action="store_true", help="Read pickles, which run code: of your own runs.")
    args = parser.parse_args(arguments)
    consolidate(args.checkpoint, args.output, args.trust_pickle)


if __name__ == "__main__":
    command()
