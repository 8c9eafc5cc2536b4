"""The tensors of a model, in memory or in a folder, one at a time; and safetensors files that are written so."""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from .loading import naming
from .weights import update_digest


_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass
class StoredWeights:
    """
    The tensors of a model.

    Attributes:
        label (`str`): What errors call the model.
        names (`list[str]`): Its tensors in order, without those that are tied to another.
        tied (`dict[str, str]`): For each tied tensor the name of the one that it is tied to.
        read (`Callable`): `(name) -> tensor`, for a name in `names`.
        folder (`Path`, *optional*): Where they lie, if not in memory.
    """

    label: str
    names: list[str]
    tied: dict[str, str]
    read: Callable[[str], Tensor]
    folder: Path | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, tied ones under each of their names, in the order of [`~weights.weights_digest`]."""
        for name in sorted([*self.names, *self.tied]):
            yield name, self.read(self.tied.get(name, name))

    def digest(self) -> str:
        """The hash that [`~weights.weights_digest`] gives of the loaded model."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors():
            update_digest(digest, name, tensor)
        return digest.hexdigest()


def stored_weights(model: str | Path | torch.nn.Module, argument: str = "model") -> StoredWeights:
    """
    Args:
        model (`str`, `Path` or `torch.nn.Module`): Folder, hub id, or a model in memory.
        argument (`str`, *optional*, defaults to `"model"`): What errors call it.

    Returns:
        [`StoredWeights`]

    Raises:
        ValueError: If there is no such folder, its weights are not safetensors, or the model has LoRA adapters or is
            sharded; the error says what to do.
    """
    if isinstance(model, torch.nn.Module):
        return _of_module(model, argument)
    folder = _folder(str(model), argument)
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"`{argument}`={str(model)!r} is an adapter, which is a difference already: load it on a later version by "
            "`PeftModel.from_pretrained(later, adapter)`. Or merge it into its base model first, by "
            "`AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(folder)`."
        )
    return _of_folder(folder, argument)


def weight_files(folder: Path, argument: str = "model") -> list[Path]:
    """The safetensors files of a model's folder; a `ValueError` if there are none."""
    if (folder / _INDEX).exists():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    if not (folder / _SINGLE).exists():
        raise ValueError(
            f"`{argument}`={str(folder)!r} has neither {_SINGLE} nor {_INDEX}: load the model with transformers, and "
            "save it with `save_pretrained`."
        )
    return [folder / _SINGLE]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end of the context and is removed if the context fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(
    path: Path,
    entries: list[tuple[str, torch.dtype, tuple[int, ...]]],
    tensors: Iterable[Tensor],
    metadata: dict[str, str],
) -> None:
    """
    Writes a safetensors file of which no more than one tensor is in memory.

    Args:
        path (`Path`): The file.
        entries (`list[tuple]`): Name, dtype (one of torch's floating dtypes of 16 to 64 bits) and shape of each.
        tensors (`Iterable[torch.Tensor]`): The tensors in the same order.
        metadata (`dict[str, str]`): Goes into the header.
    """
    header, start = {"__metadata__": metadata}, 0
    for name, dtype, shape in entries:
        end = start + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data
    _write(path, struct.pack("<Q", len(encoded)) + encoded, tensors)


def rewrite_tensors(source: Path, path: Path, change: Callable[[str], Tensor]) -> None:
    """
    Writes a safetensors file again with other values: names, dtypes, shapes and metadata stay.

    Args:
        source (`Path`): The file whose header is used.
        path (`Path`): The file that is written.
        change (`Callable`): `(name) -> tensor` of the same dtype and shape.
    """
    with source.open("rb") as file:
        size = file.read(8)
        encoded = file.read(struct.unpack("<Q", size)[0])
    header = json.loads(encoded)
    names = sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    _write(path, size + encoded, map(change, names))


def _write(path: Path, head: bytes, tensors: Iterable[Tensor]) -> None:
    with path.open("wb") as file:
        file.write(head)
        for tensor in tensors:
            file.write(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy())


def _of_module(model: torch.nn.Module, argument: str) -> StoredWeights:
    if hasattr(model, "peft_config"):
        raise ValueError(f"`{argument}` has LoRA adapters: merge them first, by `model.merge_and_unload()`.")
    state = {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    is_sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    if is_sharded or any(value.is_meta or hasattr(value, "full_tensor") for value in state.values()):
        raise ValueError(f"`{argument}` is sharded, or has no weights yet: save it, and name the folder.")
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied is None:
        owners: dict[int, str] = {}
        found = {name: owners.setdefault(value.data_ptr(), name) for name, value in state.items() if value.numel()}
        tied = {name: owner for name, owner in found.items() if owner != name}
    tied = {name: owner for name, owner in tied.items() if name in state}
    return StoredWeights(f"`{argument}`", sorted(state.keys() - tied.keys()), tied, state.__getitem__)


def _of_folder(folder: Path, argument: str) -> StoredWeights:
    places = {name: file for file in weight_files(folder, argument) for name in _names_in(file)}

    def read(name: str) -> Tensor:
        with safe_open(places[name], "pt") as file:
            return file.get_tensor(name)

    with torch.device("meta"):
        keys = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).all_tied_weights_keys
    tied = {}
    for name, owner in keys.items():
        # Most folders hold a tied tensor once, some under its other name, and some under both.
        if owner not in places:
            name, owner = owner, name
        if owner in places and (name not in places or torch.equal(read(name), read(owner))):
            tied[name] = owner
    return StoredWeights(str(folder), sorted(places.keys() - tied.keys()), tied, read, folder)


def _folder(name: str, argument: str) -> Path:
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or folder.exists() or name.startswith(".") or name.count("/") > 1:
        raise ValueError(f"`{argument}`={name!r} is no folder.")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.h5", "*.msgpack", "*.gguf", "*.pth", "*.pt"]))


def _names_in(path: Path) -> list[str]:
    with naming("The file", path), safe_open(path, "pt") as file:
        return list(file.keys())
