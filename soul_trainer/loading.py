"""Models and tokenizers by the names that a command line gives: folders, hub ids."""

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .settings import check_choice, setting


DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(kw_only=True)
class ModelArguments:
    """
    How models and tokenizers are loaded, by the names that transformers' `from_pretrained` has for it. A subclass has
    a field `model`, a hub id or a folder.

    Raises:
        ValueError: If `dtype` is unknown, or `revision` is set for a model that is not on the hub.
    """

    # A command may take others.
    known_dtypes: ClassVar[tuple[str, ...]] = DTYPES

    dtype: str = setting("auto", f"Of the weights: {', '.join(DTYPES)}. With auto, the dtype that they are saved in.")
    tokenizer: str | None = setting(None, "Hub id or folder of the tokenizer; by default the model's.")
    revision: str | None = setting(None, "Branch, tag or commit of --model on the hub.")
    attn_implementation: str | None = setting(
        None, "Of the attention: eager, sdpa, flash_attention_2, ...; by default transformers chooses."
    )
    trust_remote_code: bool = setting(False, "Whether code that comes with a model may run.")

    def __post_init__(self):
        check_choice("dtype", self.dtype, self.known_dtypes)
        model = getattr(self, "model", None)
        if self.revision and (model is None or Path(model).exists()):
            raise ValueError(
                f"`revision`={self.revision!r} (--revision) is of a `model` (--model) on the hub, and `model` is "
                f"{model!r}: leave it out. That of a dataset is `dataset_revision` (--dataset_revision)."
            )

    def load_model(self, name: str, device: "str | torch.device | None" = None) -> PreTrainedModel:
        """
        Loads a model, or an adapter on its base model, of which the adapter alone trains.

        Args:
            name (`str`): Folder or hub id: `model`, or another one that belongs to it, such as a gold model.
            device (`str` or `torch.device`, *optional*): By default where transformers puts it.

        Raises:
            ValueError: If `name` is a folder without a model.
        """
        return load_model(name, self.dtype, device, **self.pretrained_options(name))

    def load_tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """`tokenizer` or, if there is none, that of the model of this name."""
        name = self.tokenizer or name
        return load_tokenizer(name, self.trust_remote_code, self.revision_of(name))

    def pretrained_options(self, name: str) -> dict[str, Any]:
        """What `from_pretrained` is called with for the model of this name, besides the dtype."""
        revision = self.revision_of(name)
        options = {"revision": revision, "attn_implementation": self.attn_implementation}
        options = {key: value for key, value in options.items() if value is not None}
        return {**options, "trust_remote_code": self.trust_remote_code}

    def loading_settings(self) -> dict[str, Any]:
        """Those that differ from their defaults. Results of other ones are other results."""
        values = {each.name: (getattr(self, each.name), each.default) for each in fields(ModelArguments)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def revision_of(self, name: str) -> str | None:
        """The revision of the model of this name."""
        return self.revision if name == getattr(self, "model", None) else None


@contextmanager
def naming(what: str, name: str | Path) -> Iterator[None]:
    """
    A context in which what a library says of damaged files becomes a `ValueError` that names them.

    Args:
        what (`str`): What is read, for the message: `"The model"`.
        name (`str` or `Path`): Its folder, file or hub id.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except OSError as error:
        if Path(name).exists():
            raise
        # A folder that is not there looks like an id, and the hub's own words are of the network.
        said = f"There is no folder {str(name)!r}, and as an id on the hub it cannot be loaded: {error}"
        raise OSError(said) from error
    except (SafetensorError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError, json.JSONDecodeError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{what} {str(name)!r} cannot be read ({type(error).__name__}: {first_line}): a file is damaged, not "
            "whole, or of another model. Copy it, download it or save it again."
        ) from error


def load_model(
    name: str,
    dtype: str = "auto",
    device: "str | torch.device | None" = None,
    **options,
) -> PreTrainedModel:
    """
    Loads a causal language model, or an adapter on its base model, of which the adapter alone trains.

    Args:
        name (`str`): Folder or hub id.
        dtype (`str`, *optional*, defaults to `"auto"`): `float32`, `bfloat16`, ...; by default that of the weights.
        device (`str` or `torch.device`, *optional*): By default where transformers puts it.
        **options: Of `from_pretrained`: `revision`, `attn_implementation`, `trust_remote_code`, ...

    Raises:
        ValueError: If `name` is a folder without a model, or `dtype` is no floating dtype.
    """
    folder = _checked(name)
    if dtype != "auto" and not getattr(getattr(torch, dtype, None), "is_floating_point", False):
        raise ValueError(f"--dtype {dtype} is unknown: use auto, float32, bfloat16 or float16.")
    loader = AutoModelForCausalLM
    if is_adapter(folder):
        from peft import AutoPeftModelForCausalLM as loader

        options["is_trainable"] = True  # or else its gradients could not be asked for
    with naming("The model", name):
        model = loader.from_pretrained(name, dtype=dtype, **options)
    return model if device is None else model.to(device)


def load_tokenizer(name: str, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedTokenizerBase:
    """
    Loads the tokenizer of a model, or of an adapter's base model if none was saved with it.

    Args:
        name (`str`): Folder or hub id.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether code that comes with it may run.
        revision (`str`, *optional*): Branch, tag or commit on the hub.

    Raises:
        ValueError: If `name` is a folder without a model or a tokenizer.
    """
    folder = Path(name)
    if not any((folder / file).exists() for file in ("tokenizer_config.json", "tokenizer.json")):
        folder = _checked(name)
        if is_adapter(folder):
            from peft import PeftConfig

            name = PeftConfig.from_pretrained(name).base_model_name_or_path
    options = {} if revision is None else {"revision": revision}
    with naming("The tokenizer of", name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **options)


def is_adapter(name: str | Path) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(name) / "adapter_config.json").exists()


def default_device() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _checked(name: str) -> Path:
    folder = Path(name)
    if folder.exists() and not is_adapter(folder) and not (folder / "config.json").exists():
        raise ValueError(f"--model {name} holds no model: there is no config.json and no adapter_config.json in it.")
    if not folder.exists() and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ValueError(f"--model {name}: no such folder.")
    return folder
