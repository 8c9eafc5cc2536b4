"""
Which precision a model is trained in, and the float32 weights that a trainer keeps in the place of 16-bit ones.

A bfloat16 weight has 8 significant bits. A step that is smaller than half a unit in the last place is rounded away,
and the steps of fine-tuning are: of SmolLM2's weights, 1.0% move by a step of 5e-6, and 16% by one of 1e-4. The same
goes for the sum of all steps when the model is saved. Moved by 1e-4 each along the gradient, the weights give rows to
forget a probability of 0.831 in float32 (0.994 before), 0.985 rounded to nearest, and 0.832 rounded stochastically: up
or down at random, so that the mean is right. So this is how they are rounded.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import TrainingArguments, training_args


SHORT_DTYPES = (torch.bfloat16, torch.float16)
CHUNK = 2**24  # numbers that are rounded at once


@dataclass(frozen=True)
class BF16Support:
    """
    Attributes:
        is_fast (`bool`): Whether the device multiplies in bfloat16 faster than in float32.
        device (`str`): The device, and why, for a message.
    """

    is_fast: bool
    device: str


def bf16_support(use_cpu: bool = False) -> BF16Support:
    """
    Whether the device that training runs on is made for bfloat16. A device that emulates it is not: bfloat16 is slower
    there than float32. That goes for CPUs without AMX too. One with AVX512-BF16 took 1.7 times as long in bfloat16.

    Args:
        use_cpu (`bool`, *optional*, defaults to `False`): See [`~transformers.TrainingArguments`].
    """
    if use_cpu or not torch.accelerator.is_available():
        has_amx = _has_amx()
        return BF16Support(has_amx, f"the CPU has {'' if has_amx else 'no '}AMX instructions for bfloat16")
    if torch.cuda.is_available():
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name()
    else:
        is_native, name = training_args.is_torch_bf16_gpu_available(), torch.accelerator.current_accelerator().type
    return BF16Support(is_native, f"{name} {'multiplies' if is_native else 'does not multiply'} in bfloat16")


def _has_amx() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())  # before torch 2.10


def needs_use_cpu(bf16: bool | None, use_cpu: bool) -> bool:
    """
    Whether `use_cpu` must be set for `bf16=True`, because there is no accelerator.

    Raises:
        ValueError: If the CPU has no instructions for bfloat16, and `use_cpu` does not ask for the CPU.
    """
    if not bf16 or use_cpu or torch.accelerator.is_available() or training_args.is_torch_bf16_gpu_available():
        return False  # or else transformers refuses
    support = bf16_support()
    if not support.is_fast:
        raise ValueError(
            f"`bf16` (--bf16) cannot be honoured: there is no GPU, and {support.device}. Leave it out to train in "
            "float32, or add `use_cpu=True` (--use_cpu) to train in bfloat16 all the same, which is slower."
        )
    return True


@dataclass(frozen=True)
class Precision:
    """
    How a model is trained. See [`choose_precision`].

    Attributes:
        bf16 (`bool`): Whether it is trained under bfloat16 autocast.
        dtypes (`dict[str, torch.dtype]`): Names of the weights that are kept in float32, and what they are saved in.
        model_dtype (`torch.dtype`, *optional*): What the model is saved in, by its configuration.
        seed (`int`): Of the rounding.
        message (`str`): What was chosen and why; empty if there was nothing to choose.
    """

    bf16: bool
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    model_dtype: torch.dtype | None = None
    seed: int = 0
    message: str = ""

    def widen(self, model: torch.nn.Module) -> None:
        """Turns the weights to float32. Calling it again changes nothing."""
        self._cast(model, dict.fromkeys(self.dtypes, torch.float32))

    def is_narrow(self, model: torch.nn.Module) -> bool:
        """Whether weights that are kept in float32 are in 16 bits."""
        return any(name in self.dtypes and p.dtype == self.dtypes[name] for name, p in model.named_parameters())

    def narrow(self, model: torch.nn.Module) -> None:
        """Turns the weights back to what they were, rounded stochastically. Those that did not move stay the same."""
        self._cast(model, self.dtypes)

    def narrowed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A `state_dict` of the model with the weights as [`Precision.narrow`] makes them. Tied tensors stay tied."""
        made: dict[tuple, Tensor] = {}

        def narrow(name: str, tensor: Tensor) -> Tensor:
            dtype = self.dtypes.get(name, tensor.dtype)
            if tensor.dtype == dtype:
                return tensor
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), dtype)
            if key not in made:
                made[key] = self._rounded(name, tensor, dtype)
            return made[key]

        return {name: narrow(name, tensor) for name, tensor in state.items()}

    def _cast(self, model: torch.nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
        for name, parameter in model.named_parameters():
            dtype = dtypes.get(name, parameter.dtype)
            if parameter.dtype != dtype:
                parameter.grad = None  # of the other dtype, which autograd would not add to
                parameter.data = self._rounded(name, parameter.data, dtype)

    def _rounded(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype not in SHORT_DTYPES:
            return tensor.to(dtype)
        generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        return round_stochastically(tensor, dtype, generator)


def round_stochastically(tensor: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """
    Rounds to one of the two neighbours in a dtype of 16 bits, each with the probability that makes the mean right.

    Args:
        tensor (`torch.FloatTensor`): Of float32.
        dtype (`torch.dtype`): `torch.bfloat16` or `torch.float16`.
        generator (`torch.Generator`): On the tensor's device.

    Returns:
        `torch.Tensor`: Of the same shape. What is in the dtype already, or is not finite there, stays.
    """
    rounded = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    for exact, part in zip(tensor.reshape(-1).split(CHUNK), rounded.view(-1).split(CHUNK)):
        nearest = exact.to(dtype)
        rest = exact - nearest.float()
        # The bits of a float order as its magnitude does.
        outwards = torch.where((rest > 0) == (nearest > 0), 1, -1).to(torch.int16)
        other = (nearest.view(torch.int16) + outwards).view(dtype)
        gap = (other.float() - nearest.float()).abs()
        drawn = torch.rand(exact.shape, generator=generator, device=exact.device)
        moves = (drawn * gap < rest.abs()) & (nearest != 0) & other.isfinite()
        part.copy_(torch.where(moves, other, nearest))
    return rounded


def choose_precision(
    model: torch.nn.Module,
    args: TrainingArguments,
    float32_weights: bool | None = None,
    keeps_weights: str | None = None,
) -> Precision:
    """
    Chooses bfloat16 autocast if the settings leave it open, the weights are in 16 bits and the device is made for it,
    and float32 weights if weights in 16 bits are trained.

    Args:
        model (`torch.nn.Module`): The model, with its adapter and frozen as it will be trained.
        args ([`~transformers.TrainingArguments`]): Of these, `bf16` is open if it is `None`.
        float32_weights (`bool`, *optional*): Whether to keep float32 weights; by default wherever it is possible.
        keeps_weights (`str`, *optional*): Who else takes care of the weights, so that they must stay as they are.

    Raises:
        ValueError: If `float32_weights` is `True` and `keeps_weights` says that it cannot be.
    """
    if float32_weights and keeps_weights:
        raise ValueError(f"`float32_weights=True` cannot be honoured, because {keeps_weights}: leave it out.")
    short = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.dtype in SHORT_DTYPES}
    if not short or keeps_weights or float32_weights is False:
        return Precision(bool(args.bf16))
    is_open = args.bf16 is None and not args.fp16 and args.mixed_precision == "no"
    support = bf16_support(args.use_cpu)
    bf16 = support.is_fast if is_open else bool(args.bf16)
    has_autocast = bf16 or args.mixed_precision != "no"
    has_adapters = bool(getattr(model, "peft_config", None))
    dtypes = {name: p.dtype for name, p in short.items() if _is_widened(name, p, has_adapters, has_autocast)}
    kind = " and ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in short.values()}))
    how = "under bfloat16 autocast" if bf16 else "under autocast" if has_autocast else "without autocast"
    why = f", because {support.device}" if is_open else ""
    if has_adapters:
        message = f"The model comes in {kind} and stays so. Its adapters are trained in float32, {how}{why}."
    else:
        message = (
            f"The model comes in {kind}. It is trained in float32, in which no small step is lost, {how}{why}, and "
            f"saved in {kind}. `float32_weights=False` trains it in {kind}."
        )
    model_dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return Precision(bf16, dtypes, model_dtype, args.seed, message)


def _is_widened(name: str, parameter: torch.nn.Parameter, has_adapters: bool, has_autocast: bool) -> bool:
    if has_adapters:
        # Without autocast, layers of LoRA alone take inputs of another dtype.
        return parameter.requires_grad and (has_autocast or "lora_" in name)
    # Without autocast, a product takes one dtype. With it, a layer norm does, whose vectors need no memory.
    return parameter.requires_grad or not has_autocast or parameter.ndim < 2
