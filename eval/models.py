"""The models that are evaluated: loading one, and telling it from all others."""

import hashlib
import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from soul_trainer import loading
from soul_trainer.loading import ModelArguments as ModelArguments
from soul_trainer.loading import default_device
from soul_trainer.loading import load_tokenizer as load_tokenizer
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


def load_model(
    name: str,
    device: "str | torch.device | None" = None,
    dtype: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """
    Loads a model that is to be evaluated, or an adapter on its base model. [`ModelArguments`] has more settings.

    Args:
        name (`str`): Folder or hub id.
        device (`str` or `torch.device`, *optional*): By default a GPU if there is one.
        dtype (`str`, *optional*, defaults to `"auto"`): `float32`, `bfloat16`, ...; by default that of the weights.
        seed (`int`, *optional*, defaults to 0): Set before anything else.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether code that comes with it may run.

    Raises:
        ValueError: If `name` is a folder without a model, or `dtype` is no floating dtype.
    """
    set_seed(seed)
    options = {"device": device or default_device(), "trust_remote_code": trust_remote_code}
    return loading.load_model(name, dtype, **options).eval()


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


def weight_files(model_name: str) -> list[list]:
    """Names, sizes and times of a folder's weights: a model that was trained again in its place has others."""
    files = sorted(Path(model_name).glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
