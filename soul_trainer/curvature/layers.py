"""
Sums over the inputs and output gradients of linear layers, taken by hooks while any backward runs.

| sums | over | what for |
|---|---|---|
| [`Factors`] | positions | K-FAC's two factors, whose eigenvectors are the basis |
| [`Moments`] | rows | EK-FAC's second moments of the weight's gradient in that basis |

They are sums and not means, so that micro-batches and processes add up, and a pass that was cut off can go on.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .positions import Inputs, KeptPositions, Positions, add_gram


# What a chunk of rows may hold at once, in numbers: 256 MB of float32; and what stays in a CPU's cache.
CHUNK_NUMBERS, CACHE_NUMBERS = 2**26, 2**16
# What wrappers of modules, which keep the parameters, put into the names.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


@dataclass(frozen=True)
class Layer:
    """
    A weight, and the linear modules that use it.

    Args:
        modules (`tuple[torch.nn.Module, ...]`): More than one where modules share the weight.
        in_features (`int`): Size of their inputs.
        out_features (`int`): Size of their outputs.
        transposed (`bool`): Whether the weight is `(in_features, out_features)`, as it is in GPT-2.
        dtype (`torch.dtype`): Of the weight.
        device (`torch.device`): Of the weight.
    """

    modules: tuple[nn.Module, ...]
    in_features: int
    out_features: int
    transposed: bool
    dtype: torch.dtype
    device: torch.device


def linear_layers(model: nn.Module, max_size: int = 16384, trainable_only: bool = True) -> dict[str, Layer]:
    """
    Finds the weights that only linear modules use; a weight that is tied to an embedding is not among them. No value
    or shape of a weight is read, because engines that shard leave empty ones behind.

    Args:
        model (`torch.nn.Module`): Unwrapped; its modules are those that the wrapped model runs.
        max_size (`int`, *optional*, defaults to 16384): Layers with more inputs or outputs are left out.
        trainable_only (`bool`, *optional*, defaults to `True`): Whether frozen weights are left out.

    Returns:
        `dict[str, Layer]`: By the weight's name among the model's parameters, in their order.
    """
    users: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            users.setdefault(parameter, []).append((module, attribute))
    layers = {}
    for name, parameter in model.named_parameters():
        modules = tuple(module for module, _ in users[parameter])
        sizes = {_sizes(module) if attribute == "weight" else None for module, attribute in users[parameter]}
        # Of modules that disagree on the layout, or are not linear, nothing can be said in one basis.
        if len(sizes) > 1 or None in sizes or (trainable_only and not parameter.requires_grad):
            continue
        in_features, out_features, transposed = sizes.pop()
        if max(in_features, out_features) <= max_size:
            plain = ".".join(part for part in name.split(".") if part not in WRAPPERS)
            layers[plain] = Layer(modules, in_features, out_features, transposed, parameter.dtype, parameter.device)
    return layers


def num_kronecker_numbers(layers: Iterable[Layer]) -> int:
    """How many numbers the Kronecker curvature of layers keeps, at full rank: both bases and the second moments."""
    sizes = [(layer.in_features, layer.out_features) for layer in layers]
    return sum(inputs**2 + outputs**2 + inputs * outputs for inputs, outputs in sizes)


def _sizes(module: nn.Module) -> tuple[int, int, bool] | None:
    """Inputs, outputs and whether the weight lies transposed; None of a module that is not linear."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, False
    # No model can hold one before transformers has been imported, so that this file need not import it.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    if conv1d is not None and isinstance(module, conv1d):
        return module.nx, module.nf, True
    return None


class Factors:
    """
    K-FAC's factors of one layer, summed over positions: `inputs` = sum a a^T `(in, in)`, `outputs` = sum g g^T
    `(out, out)`, and `count`, the positions. Positions without an output gradient are left out: they are
    padding, or no loss reaches them. (A row's first token attends to itself alone: its query's gradient is zero but
    for rounding, and whether it counts in that layer depends on the rounding.)

    Args:
        layer ([`Layer`]): Gives the sizes and, if it is wider than float32, the dtype.
        device (`torch.device`, *optional*): By default the weight's.
    """

    def __init__(self, layer: Layer, device: torch.device | None = None):
        self.dtype = torch.promote_types(layer.dtype, torch.float32)
        like = {"dtype": self.dtype, "device": device or layer.device}
        self.inputs = torch.zeros(layer.in_features, layer.in_features, **like)
        self.outputs = torch.zeros(layer.out_features, layer.out_features, **like)
        self.count = torch.zeros((), dtype=torch.int64, device=like["device"])

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Adds inputs `(rows, ..., in)` and the gradients `(rows, ..., out)` of the summed loss in the outputs."""
        self.add_positions(Positions.used(inputs, gradients))

    def add_positions(self, positions: Positions) -> None:
        """Adds positions of this layer."""
        gradients = positions.scaled_gradients(self.dtype)
        if not len(gradients):
            return
        is_reached = positions.is_reached()
        if is_reached.all():
            self.inputs += positions.inputs.gram(self.dtype)
        else:
            add_gram(self.inputs, positions.inputs.numbers[is_reached].to(self.dtype))
            gradients = gradients[is_reached]
        add_gram(self.outputs, gradients)
        self.count += len(gradients)

    def has_inputs_of(self, other: "Factors") -> bool:
        """Whether the sums over inputs are the same, as those of layers that read the same tensor."""
        left, right = ((each.inputs.shape, each.inputs.device, int(each.count)) for each in (self, other))
        return left == right and torch.equal(self.inputs, other.inputs)

    def tensors(self) -> dict[str, Tensor]:
        """The sums themselves, by name."""
        return {"inputs": self.inputs, "outputs": self.outputs, "count": self.count}


class Moments:
    """
    EK-FAC's second moments of one layer. A row n, a sequence, has the weight's gradient W_n = G_n^T A_n `(out, in)`,
    with G_n `(tokens, out)` the output gradients and A_n `(tokens, in)` the inputs, and C_n = U_G^T W_n U_A in the
    basis. Summed over rows:

    | name | sum of | shape |
    |---|---|---|
    | `values` | C_n^2, entry by entry | `(outputs kept, inputs kept)` |
    | `output_totals` | the squared norms of the rows of U_G^T W_n: over all inputs | `(outputs kept,)` |
    | `input_totals` | the squared norms of the columns of W_n U_A: over all outputs | `(inputs kept,)` |
    | `total` | the squared norm of W_n | `()` |

    The totals say how much lies outside the basis where it keeps only some directions.

    Squares of whole rows are right though a row holds many tokens: with sampled labels (or random signs) the gradient
    of a token's loss has mean zero, whatever the other tokens' labels are (Bartlett), so the cross terms between the
    tokens' losses vanish in expectation, and the squared gradient of the row's summed loss estimates the sum over its
    tokens of the squared gradients without bias. Squares of single positions would not do: one token's loss reaches
    the weight by many positions, and these terms belong together.

    Inputs `(tokens, in)` without a dimension of rows, as an expert gets them from a router, leave no choice: each
    position is a row then. The modules of a shared weight, too, count each as rows of their own.

    Args:
        layer ([`Layer`]): The layer.
        input_vectors (`torch.FloatTensor` of shape `(in, inputs kept)`): U_A, orthonormal columns.
        output_vectors (`torch.FloatTensor` of shape `(out, outputs kept)`): U_G, orthonormal columns.
    """

    def __init__(self, layer: Layer, input_vectors: Tensor, output_vectors: Tensor):
        if (len(input_vectors), len(output_vectors)) != (layer.in_features, layer.out_features):
            raise ValueError(
                f"The eigenvectors are of a layer of {len(input_vectors)} inputs and {len(output_vectors)} outputs, "
                f"and this one has {layer.in_features} and {layer.out_features}."
            )
        self.transposed = layer.transposed
        self.input_vectors, self.output_vectors = input_vectors, output_vectors
        self.dtype = input_vectors.dtype
        self.values = input_vectors.new_zeros(output_vectors.shape[1], input_vectors.shape[1])
        self.output_totals = input_vectors.new_zeros(output_vectors.shape[1])
        self.input_totals = input_vectors.new_zeros(input_vectors.shape[1])
        self.total = input_vectors.new_zeros(())

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Adds inputs `(rows, tokens, in)` or `(tokens, in)` and the gradients of the summed loss in the outputs."""
        self.add_positions(Positions.used(inputs, gradients))

    def add_positions(self, positions: Positions) -> None:
        """Adds positions of this layer."""
        gradients = positions.scaled_gradients(self.dtype)
        if not len(gradients):
            return
        projected = positions.inputs.projected(self.input_vectors), gradients @ self.output_vectors
        if positions.inputs.row_size == 1:
            self._add_single(positions.inputs.numbers.to(self.dtype), gradients, *projected)
        else:
            self._add_rows(positions, gradients, *projected)

    def _add_single(self, inputs: Tensor, gradients: Tensor, kept_inputs: Tensor, kept_gradients: Tensor) -> None:
        """Adds rows of one position, for which (g a^T)^2 = g^2 (a^2)^T needs no matrix a row."""
        input_norms, gradient_norms = inputs.square().sum(1), gradients.square().sum(1)
        input_squares, gradient_squares = kept_inputs.square(), kept_gradients.square()
        self.values.addmm_(gradient_squares.T, input_squares)
        self.output_totals += input_norms @ gradient_squares
        self.input_totals += gradient_norms @ input_squares
        self.total += input_norms @ gradient_norms

    def _add_rows(self, positions: Positions, gradients: Tensor, kept_inputs: Tensor, kept_gradients: Tensor) -> None:
        inputs, squares = positions.inputs.numbers.to(self.dtype), torch.zeros_like(self.values)
        is_whole = all(len(vectors) == vectors.shape[1] for vectors in (self.input_vectors, self.output_vectors))
        limit = CACHE_NUMBERS if squares.device.type == "cpu" else CHUNK_NUMBERS
        size = max(1, limit // max(squares.numel(), positions.inputs.row_size**2))
        for rows in positions.row_groups(size):
            row_inputs, row_gradients = rows.padded(kept_inputs), rows.padded(kept_gradients)
            products = row_gradients.mT @ row_inputs
            if len(products) == 1:
                squares.addcmul_(products[0], products[0])
            else:
                squares += products.square_().sum(0)
            if not is_whole:
                self._add_totals(rows.padded(inputs), rows.padded(gradients), row_inputs, row_gradients)
        self.values += squares
        if is_whole:  # the squares of all pairs of directions are all that there is
            self.output_totals += squares.sum(1)
            self.input_totals += squares.sum(0)
            self.total += squares.sum()

    def _add_totals(self, inputs: Tensor, gradients: Tensor, kept_inputs: Tensor, kept_gradients: Tensor) -> None:
        # ||W^T u||^2 = (G u)^T (A A^T) (G u) needs products of tokens with tokens, and no W.
        input_gram, output_gram = inputs @ inputs.mT, gradients @ gradients.mT
        self.output_totals += (kept_gradients * (input_gram @ kept_gradients)).sum((0, 1))
        self.input_totals += (kept_inputs * (output_gram @ kept_inputs)).sum((0, 1))
        self.total += (input_gram * output_gram).sum()

    def tensors(self) -> dict[str, Tensor]:
        """The sums themselves, by name."""
        names = ("values", "output_totals", "input_totals", "total")
        return {name: getattr(self, name) for name in names}


class LayerStatistics:
    """
    While it is entered, every backward adds the inputs and output gradients of `layers` to `accumulators`. Gradients
    and weights are as they would be without it. Right under gradient checkpointing of both kinds: what is not going to
    have a backward adds nothing.

    Args:
        layers (`dict[str, Layer]`): From [`linear_layers`].
        accumulators (`Mapping[str, Factors | Moments]`):
            By the same names; a layer without one is left alone, so that a large model can go in several passes.

    Attributes:
        gradient_scale (`float`):
            What gradients are multiplied by, to be set before each backward, so that they are of the *sum* of the
            tokens' losses: of a loss that was divided by the number of tokens this number, times what the engine
            divides by. The curvature of the mean loss per token is then the sum over rows by the number of tokens.
        num_tokens (`int`): Those tokens so far, over all processes, as whoever makes the backwards counts them.

    Example:

        >>> layers = linear_layers(model)
        >>> with LayerStatistics(layers, {name: Factors(layer) for name, layer in layers.items()}) as statistics:
        ...     statistics.gradient_scale = num_tokens
        ...     (losses.sum() / num_tokens).backward()
    """

    def __init__(self, layers: dict[str, Layer], accumulators: Mapping[str, Factors | Moments]):
        self.accumulators = dict(accumulators)
        self.gradient_scale, self.num_tokens = 1.0, 0
        self._kept: KeptPositions | None = None
        # Of the last layer: the tensor that it read, and the positions of it that count.
        self._last: tuple[Tensor, Inputs] | None = None
        self._modules = {name: layers[name].modules for name in self.accumulators}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "LayerStatistics":
        for name, modules in self._modules.items():
            hook = partial(self._observe, name)
            self._handles += [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
        return self

    def __exit__(self, *exception) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._use(None, None)

    def _observe(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        if not output.requires_grad:  # nothing trains, or it is the first forward of reentrant checkpointing
            return None
        inputs = args[0] if args else next(iter(kwargs.values()))
        return _Observed.apply(output, inputs.detach(), partial(self._add, name))

    @contextmanager
    def keeping(self, limit: int) -> Iterator[KeptPositions]:
        """
        A context in which positions are not only added up but kept, for [`~LayerStatistics.add_kept`].

        Args:
            limit (`int`): Bytes that they may take; see [`~positions.KeptPositions`].
        """
        before, self._kept = self.num_tokens, KeptPositions(limit)
        try:
            yield self._kept
            self._kept.num_tokens = self.num_tokens - before
        finally:
            self._kept = None

    @torch.no_grad()
    def add_kept(self, kept: KeptPositions) -> None:
        """Adds positions that were kept in another pass, as if the model had run again: with the same bits."""
        for name, positions in kept.positions:
            self._use(None, positions.inputs)
            self.accumulators[name].add_positions(positions)
        self._use(None, None)
        self.num_tokens += kept.num_tokens

    @torch.no_grad()
    def _add(self, name: str, inputs: Tensor, gradients: Tensor) -> None:
        inputs, gradients = torch.atleast_2d(inputs), torch.atleast_2d(gradients)
        tensor, others = self._last or (None, None)
        is_same = tensor is not None and _place(tensor) == _place(inputs)
        with torch.autocast(inputs.device.type, enabled=False):
            positions = Positions.used(inputs, gradients, self.gradient_scale, others if is_same else None)
            self._use(inputs, positions.inputs)
            self.accumulators[name].add_positions(positions)
        if self._kept is not None:
            self._kept.add(name, positions)

    def _use(self, tensor: Tensor | None, inputs: Inputs | None) -> None:
        """Lets go of what was made of the inputs of the layer before, unless this one has the same."""
        if self._last is not None and self._last[1] is not inputs:
            self._last[1].forget()
        self._last = None if inputs is None else (tensor, inputs)

    def tensors(self) -> Iterator[Tensor]:
        """All sums, in the same order on every process, to be added up in place over processes."""
        yield from self.state_tensors().values()

    def state_tensors(self) -> dict[str, Tensor]:
        """All sums themselves, by the names of weight and sum with a dot between them, for a safetensors file."""
        return {
            f"{name}.{key}": tensor
            for name, accumulator in self.accumulators.items()
            for key, tensor in accumulator.tensors().items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts the sums of [`~LayerStatistics.state_tensors`] back, to go on with a pass."""
        state = self.state_tensors()
        if state.keys() != tensors.keys():
            raise ValueError(f"These are sums of other layers: {sorted(state.keys() ^ tensors.keys())[:6]} differ.")
        for name, tensor in state.items():
            tensor.copy_(tensors[name])


class _Observed(torch.autograd.Function):
    """
    A module's output as it is, whose backward hands on the module's inputs and its gradient. Autograd keeps the
    inputs, not a hook's closure: so checkpointing drops and recomputes them as it does everything that autograd keeps.
    """

    @staticmethod
    def forward(ctx, output, inputs, add):
        ctx.save_for_backward(inputs)
        ctx.add = add
        return output.detach()  # and not a view, which could not be modified in place

    @staticmethod
    def backward(ctx, gradients):
        ctx.add(*ctx.saved_tensors, gradients)
        return gradients, None, None


def _place(tensor: Tensor) -> tuple:
    """The same for tensors that are one in memory."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
