"""The models that are evaluated: loading one, and telling it from all others."""

import hashlib
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from soul_trainer.weights import weights_digest as weights_digest


# Where a configuration came from, and by which version, says nothing of what the model answers.
_NOT_SETUP = (
    "_name_or_path",
    "transformers_version",
    "peft_version",
    "base_model_name_or_path",
    "inference_mode",
    "revision",
)


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a model, or of an adapter's base model where none was saved with it.

    Args:
        name (`str`): Folder or hub id.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether code that comes with it may run.

    Raises:
        ValueError: If `name` is a folder without a model.
    """
    folder = _checked(name)
    if _is_adapter(folder) and not (folder / "tokenizer_config.json").exists():
        from peft import PeftConfig

        name = PeftConfig.from_pretrained(name).base_model_name_or_path
    return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def load_model(
    name: str,
    device: "str | torch.device | None" = None,
    dtype: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """
    Loads a model, or an adapter on its base model.

    Args:
        name (`str`): Folder or hub id.
        device (`str` or `torch.device`, *optional*): By default a GPU if there is one.
        dtype (`str`, *optional*, defaults to `"auto"`): `float32`, `bfloat16`, ...; by default that of the weights.
        seed (`int`, *optional*, defaults to 0): Set before anything else.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether code that comes with it may run.

    Raises:
        ValueError: If `name` is a folder without a model, or `dtype` is no floating dtype.
    """
    folder = _checked(name)
    if dtype != "auto" and not getattr(getattr(torch, dtype, None), "is_floating_point", False):
        raise ValueError(f"--dtype {dtype} is unknown: use auto, float32, bfloat16 or float16.")
    set_seed(seed)
    loader, options = AutoModelForCausalLM, {}
    if _is_adapter(folder):
        from peft import AutoPeftModelForCausalLM as loader

        options = {"is_trainable": True}  # or else its gradients could not be asked for
    model = loader.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def setup_digest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """
    A hash of what makes figures of weights: the configurations of the model and of its adapters, and the tokenizer.

    Returns:
        `str`: Hexadecimal SHA-256.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    configs = [model.config, *getattr(model, "peft_config", {}).values()]
    setup = {
        "configs": [
            {key: value for key, value in each.to_dict().items() if key not in _NOT_SETUP} for each in configs
        ],
        "tokenizer": tokenizer.get_vocab() if backend is None else backend.to_str(),
        "special_tokens": [tokenizer.special_tokens_map, tokenizer.chat_template, tokenizer.model_max_length],
    }
    return hashlib.sha256(json.dumps(setup, sort_keys=True, default=_as_text).encode()).hexdigest()


def _as_text(value: object) -> str:
    return str(sorted(map(str, value)) if isinstance(value, (set, frozenset)) else value)


def _checked(name: str) -> Path:
    folder = Path(name)
    if folder.exists() and not _is_adapter(folder) and not (folder / "config.json").exists():
        raise ValueError(f"--model {name} holds no model: there is no config.json and no adapter_config.json in it.")
    if not folder.exists() and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ValueError(f"--model {name}: no such folder.")
    return folder


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def weight_files(model_name: str) -> list[list]:
    """Names, sizes and times of a folder's weights: a model that was trained again in its place has others."""
    files = sorted(Path(model_name).glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
