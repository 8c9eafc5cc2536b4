"""
Fewer bits a weight. Unlearning with a small learning rate moves weights by less than the distance of two values that
4 bits can hold, so that rounding can put them back (Zhang et al., ICLR 2025, arXiv 2410.16454).

| function | how |
|---|---|
| `rounded_weights` | rounds the weights of a model in memory to nearest, on any device, and puts them back |
| `load_quantized` | loads a model through bitsandbytes: LLM.int8() or 4-bit NormalFloat |
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..extras import require
from ..models import ModelArguments


logger = logging.get_logger(__name__)

LEAST_BITS, MOST_BITS = 2, 24


def round_to_nearest(weight: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """
    Symmetric absmax rounding: `scale * round(w / scale)` with `scale = max |w| / (2**(bits - 1) - 1)`.

    Args:
        weight (`torch.FloatTensor` of shape `(outputs, inputs)`): Of any floating dtype; not changed.
        bits (`int`): 2 to 24: levels from `-(2**(bits - 1) - 1)` to `2**(bits - 1) - 1`; a tie goes to the even one.
        group_size (`int`, *optional*):
            So many neighbouring inputs of an output share a scale, fewer in the last group where it does not divide
            them. By default all inputs of an output.

    Returns:
        `torch.FloatTensor` of shape `(outputs, inputs)`: In the dtype of `weight`, rounded once more by it.
    """
    if not LEAST_BITS <= bits <= MOST_BITS:
        raise ValueError(f"`bits` must be {LEAST_BITS} to {MOST_BITS}, but it is {bits}.")
    if group_size is not None and group_size < 1:
        raise ValueError(f"`group_size` must be at least 1, but it is {group_size}.")
    num_outputs, num_inputs = weight.shape
    size = min(group_size or num_inputs, num_inputs)
    # Zeros that fill up the last group change no maximum.
    padded = torch.nn.functional.pad(weight.float(), (0, -num_inputs % size)).view(num_outputs, -1, size)
    scale = padded.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    # A group of zeros has no scale and needs none.
    levels = (padded / torch.where(scale > 0, scale, 1)).round()
    return (levels * scale).view(num_outputs, -1)[:, :num_inputs].to(weight.dtype)


@contextmanager
@torch.no_grad()
def rounded_weights(
    model: torch.nn.Module, bits: int, group_size: int | None = None, include_head: bool = False
) -> Iterator[torch.nn.Module]:
    """
    A context in which the weights of linear layers are rounded. Afterwards they are what they were, bit for bit.

        with rounded_weights(model, bits=4, group_size=64):
            rows = ask(model, ...)

    Args:
        model (`torch.nn.Module`): Not sharded. Its embeddings are left as they are, and so are biases and norms.
        bits (`int`): 2 to 24.
        group_size (`int`, *optional*): See [`round_to_nearest`]; 128 or 64 is common with 4 bits.
        include_head (`bool`, *optional*, defaults to `False`):
            Whether the output embedding is rounded too, unless it is tied to the input embedding.

    Returns:
        `Iterator[torch.nn.Module]`: The model itself.

    Raises:
        ValueError: If the model has an adapter, is quantized already or has no linear layer.
    """
    if hasattr(model, "merge_and_unload"):
        raise ValueError("`model` has an adapter: `merge_and_unload` it first, as whoever quantizes it would.")
    layers = _linear_layers(model, include_head)
    kept = [weight.detach().to("cpu", copy=True) for weight, _ in layers]
    try:
        for weight, is_transposed in layers:
            rounded = round_to_nearest(weight.T if is_transposed else weight, bits, group_size)
            weight.copy_(rounded.T if is_transposed else rounded)
        yield model
    finally:
        for (weight, _), before in zip(layers, kept):
            weight.copy_(before)


def load_quantized(
    name: str,
    bits: int,
    device: "str | torch.device | None" = None,
    loading: ModelArguments | None = None,
) -> PreTrainedModel:
    """
    Loads a model with weights of 8 bits (LLM.int8(), vector-wise, outliers apart) or 4 (NormalFloat, groups of 64).

    Args:
        name (`str`): Folder or hub id of a model, or of an adapter, which is merged first.
        bits (`int`): 8 or 4.
        device (`str` or `torch.device`, *optional*): By default a GPU if there is one.
        loading ([`ModelArguments`], *optional*):
            How it is loaded. Its `dtype` is that of all other weights, and of products with 4-bit weights.

    Raises:
        ImportError: If bitsandbytes is not installed.
        ValueError: If `bits` is neither.
    """
    if bits not in (4, 8):
        raise ValueError(f"`bits` must be 4 or 8 with bitsandbytes, but it is {bits}: round to nearest instead.")
    require("bitsandbytes")
    loading = loading or ModelArguments()
    whole = loading.load_model(name, "cpu")
    if bits == 4:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=str(whole.dtype).split(".")[1]
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"quantization_config": config, "device_map": {"": str(device)}, "dtype": whole.dtype}
    settings |= loading.pretrained_options(name)
    if not hasattr(whole, "merge_and_unload"):
        del whole
        return AutoModelForCausalLM.from_pretrained(name, **settings).eval()
    settings.pop("revision", None)
    with tempfile.TemporaryDirectory() as folder:
        whole.merge_and_unload().save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def _linear_layers(model: torch.nn.Module, include_head: bool) -> list[tuple[Tensor, bool]]:
    """Weights of linear layers, each once, and whether they are stored with the inputs first."""
    embeddings = [model.get_input_embeddings()] if hasattr(model, "get_input_embeddings") else []
    if not include_head and hasattr(model, "get_output_embeddings"):
        embeddings.append(model.get_output_embeddings())
    left_out = {id(module.weight) for module in embeddings if module is not None}
    found: dict[int, tuple[Tensor, bool]] = {}
    # Experts of a mixture may be a parameter of three dimensions and no layer: who rounds the rest should know.
    others = sum(weight.numel() for weight in model.parameters() if weight.ndim > 2)
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and id(module.weight) not in left_out:
            if not module.weight.is_floating_point():
                raise ValueError(f"`{name}` holds {module.weight.dtype}: the model is quantized already.")
            found[id(module.weight)] = (module.weight, isinstance(module, Conv1D))
    if not found:
        raise ValueError("`model` has no linear layer besides its embeddings: nothing to round.")
    if others:
        logger.warning(f"{others} weights of the model are in no linear layer and are not rounded.")
    return list(found.values())
