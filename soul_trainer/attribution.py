"""
WAGLE: which weights to unlearn with (Jia et al., 2024, arXiv 2410.17509). Before training, each weight gets a score,

    S_i = theta_i g_forget,i - g_retain,i g_forget,i / curvature,

what the forget loss would lose if the weight were taken out, less what the retain loss would then win back; g are the
gradients of the mean cross-entropy per answer token, and the Hessian of the retain loss is taken for a multiple of the
identity, the curvature (gamma in the paper, `mu` in its code). The share of weights with the largest |S_i| trains.

A mask is a projection: after each step of the optimizer, the weights that do not train are put back, so that neither
momentum nor weight decay moves them, whichever optimizer it is. Like the released code's, it comes after clipping:
the gradient's norm is that of all weights.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .batch import IGNORE_INDEX, ForgetRetainBatch
from .engines import Engine, trained_parameters
from .log_probs import shift_labels, token_log_probs


MASK_FILE = "weight_mask.safetensors"
# The bits of float32's smallest and largest number above 0, which order as the numbers do.
_SMALLEST, _LARGEST = 1, 0x7F7FFFFF


def weight_scores(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    forget_batches: Sequence[ForgetRetainBatch],
    retain_batches: Sequence[ForgetRetainBatch],
    curvature: float,
    engine: Engine | None = None,
) -> list[Tensor]:
    """
    The magnitudes of WAGLE's scores. Costs one forward and backward of all rows, and as much memory as two gradients
    and float32 scores. Gradients that were there before are put back.

    Args:
        model (`torch.nn.Module`): A causal language model, as it is trained (wrapped by its engine).
        optimizer (`torch.optim.Optimizer`): Of its parameters; it takes no step.
        forget_batches (`Sequence[ForgetRetainBatch]`):
            This process's micro-batches of rows to forget, on the model's device; as many on every process.
        retain_batches (`Sequence[ForgetRetainBatch]`): Likewise, of rows to retain.
        curvature (`float`): Of the retain loss, > 0 (gamma in the paper).
        engine ([`~engines.Engine`], *optional*): From [`~engines.make_engine`]; by default one plain process.

    Returns:
        `list[torch.FloatTensor]`: Float32, >= 0, of this process's part of each weight that trains, in the order of
        [`~engines.Engine.local_weights`].

    Raises:
        ValueError: If the curvature is not above 0, or no batch has an answer token.
        FloatingPointError: If a loss or a score is not finite; the rows are named.
    """
    engine = engine or Engine()
    if not curvature > 0:
        raise ValueError(f"`wagle_curvature` must be > 0, but it is {curvature}.")
    with engine.gradients_set_aside(optimizer):
        forget = engine.gradients(model, lambda: _backward(model, forget_batches, "forget", engine))
        retain = engine.gradients(model, lambda: _backward(model, retain_batches, "retain", engine))
    scores = []
    for weight in engine.local_weights(model):
        # Popped, so that a gradient's memory is free as soon as its scores are there.
        gradient, other = forget.pop(0).float(), retain.pop(0).float()
        scores.append(((weight.float() - other / curvature) * gradient).abs())
    if engine.sum_over_parts(model, [(~score.isfinite()).sum() for score in scores]):
        raise FloatingPointError(
            f"Scores of the weight mask are not finite: the gradients are, times 1 / `wagle_curvature`={curvature}, "
            "over float32. Raise `wagle_curvature`."
        )
    return scores


def select_top_share(
    scores: list[Tensor], share: float, model: torch.nn.Module, engine: Engine | None = None
) -> list[Tensor]:
    """
    Selects the weights with the largest scores, over all parameters and processes. The threshold is found by bisection
    on the bits of float32, 31 counts, so that no score leaves its process and any engine selects the same.

    Args:
        scores (`list[torch.FloatTensor]`): From [`weight_scores`].
        share (`float`): Of the weights that train, in (0, 1].
        model (`torch.nn.Module`): The model, wrapped by its engine or not.
        engine ([`~engines.Engine`], *optional*): By default one plain process.

    Returns:
        `list[torch.BoolTensor]`: Of the shapes of `scores`; true where a weight trains. Of equal scores at the
        threshold all are selected; those that are 0, which nothing of the forget rows reaches, never.

    Raises:
        ValueError: If the share is not in (0, 1].
    """
    engine = engine or Engine()
    if not 0 < share <= 1:
        raise ValueError(f"`weight_mask_share` must be in (0, 1], but it is {share}.")
    bits = [score.view(torch.int32) for score in scores]
    num_weights = count(model, [torch.ones_like(score, dtype=torch.bool) for score in scores], engine)
    num_wanted = max(1, round(share * num_weights))
    low, high = _SMALLEST, _LARGEST
    while low < high:
        middle = (low + high + 1) // 2
        if count(model, [part >= middle for part in bits], engine) >= num_wanted:
            low = middle
        else:
            high = middle - 1
    return [part >= low for part in bits]


def count(model: torch.nn.Module, chosen: list[Tensor], engine: Engine) -> int:
    """
    Args:
        model (`torch.nn.Module`): The model, wrapped by its engine or not.
        chosen (`list[torch.BoolTensor]`): Parts, as [`~engines.Engine.local_weights`].
        engine ([`~engines.Engine`]): That runs the model.

    Returns:
        `int`: How many weights are chosen, over all processes.
    """
    return int(engine.sum_over_parts(model, [part.sum() for part in chosen]))


class WeightMask:
    """
    Holds weights where they are: one byte a weight, and the values of those that do not train.

    Args:
        model (`torch.nn.Module`): The model, wrapped by its engine or not, with the values that are to be kept.
        trains (`list[torch.BoolTensor]`): This process's parts, from [`select_top_share`].
        engine ([`~engines.Engine`], *optional*): By default one plain process.
    """

    def __init__(self, model: torch.nn.Module, trains: list[Tensor], engine: Engine | None = None):
        self.model, self.engine = model, engine or Engine()
        self.engine.forget_gathered(model)
        self.frozen = [~part for part in trains]
        self.kept = [weight[part] for weight, part in zip(self.engine.local_weights(model), self.frozen)]

    @torch.no_grad()
    def apply(self) -> None:
        """Puts the weights that do not train back to what they were. To be called after each step of the optimizer."""
        self.engine.forget_gathered(self.model)
        for weight, frozen, kept in zip(self.engine.local_weights(self.model), self.frozen, self.kept):
            weight.masked_scatter_(frozen, kept)

    def save(self, folder: str | Path, settings: dict[str, str]) -> None:
        """
        Writes the mask to a checkpoint, whole, so that any engine and number of processes can go on with it. Every
        process must call it; the first one writes.

        Args:
            folder (`str` or `Path`): The checkpoint.
            settings (`dict[str, str]`): That the mask came from, which [`WeightMask.load`] compares.
        """
        packed = {}
        for (name, parameter), frozen in zip(_named(self.model), self.frozen):
            whole = self.engine.whole(parameter, frozen.to(torch.uint8))
            if self.engine.process_index == 0:
                packed[name] = torch.from_numpy(np.packbits(whole.flatten().cpu().numpy()))
        if self.engine.process_index == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(packed, Path(folder) / MASK_FILE, metadata=settings)

    @classmethod
    def load(
        cls, folder: str | Path, settings: dict[str, str], model: torch.nn.Module, engine: Engine | None = None
    ) -> "WeightMask":
        """
        The mask of a checkpoint, whose weights the model already has.

        Args:
            folder (`str` or `Path`): The checkpoint.
            settings (`dict[str, str]`): Of this run.
            model (`torch.nn.Module`): The model, wrapped by its engine or not.
            engine ([`~engines.Engine`], *optional*): By default one plain process.

        Raises:
            ValueError: If the checkpoint has no mask, or one of other settings or of other parameters.
        """
        engine, path = engine or Engine(), Path(folder) / MASK_FILE
        if not path.exists():
            raise ValueError(f"{str(folder)!r} was saved without `weight_mask`: resume it without, or begin anew.")
        with safe_open(path, "pt") as saved:
            if saved.metadata() != settings:
                raise ValueError(
                    f"{str(path)!r} is of {saved.metadata()}, and this run of {settings}: make them equal."
                )
            named = _named(model)
            if set(saved.keys()) != {name for name, _ in named}:
                raise ValueError(f"{str(path)!r} masks other parameters than those that this run trains.")
            trains = []
            for name, parameter in named:
                bits = np.unpackbits(saved.get_tensor(name).numpy(), count=parameter.numel())
                whole = torch.from_numpy(bits).view(parameter.shape).to(parameter.device)
                trains.append(engine.part(parameter, whole) == 0)
        return cls(model, trains, engine)


def _named(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Names and parameters in the order of the engine's parts, without what wrappers put before a name."""
    own = {id(parameter) for parameter in trained_parameters(model)}
    return [
        (name.replace("_orig_mod.", "").removeprefix("module."), parameter)
        for name, parameter in model.named_parameters()
        if id(parameter) in own
    ]


def _backward(model: torch.nn.Module, batches: Sequence[ForgetRetainBatch], half: str, engine: Engine) -> None:
    """The gradient of the mean cross-entropy per answer token, over all processes."""
    targets = [shift_labels(batch["labels"]) for batch in batches]
    num_tokens = int(engine.sum(sum((part != IGNORE_INDEX).sum() for part in targets)))
    if num_tokens == 0:
        raise ValueError(f"The rows of `{half}_dataset` hold no answer token.")
    bad_rows = []
    for index, (batch, target) in enumerate(zip(batches, targets)):
        is_last = index == len(batches) - 1
        with engine.accumulate(model, is_last):
            with engine.autocast():
                logits = model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
                ).logits
            row_losses = -token_log_probs(logits, target).sum(1)
            bad_rows += [f"row {row} of `{half}_dataset`" for row in batch["row"][~row_losses.isfinite()].tolist()]
            engine.backward(row_losses.sum() / num_tokens, is_last)
    bad_rows = engine.gather(bad_rows)
    if bad_rows:
        raise FloatingPointError(f"The loss of the weight mask is not finite at {', '.join(bad_rows)}.")
