"""
Estimators of the diagonal of the Hessian of the mean loss per answer token.

| name | labels | expectation |
|---|---|---|
| `gauss_newton_bartlett` | sampled from the model (Sophia, Algorithm 2) | the Gauss-Newton (= Fisher) diagonal |
| `empirical_fisher` | true, optionally smoothed | the mean over tokens of the squared gradient |
| `hutchinson` | true | the Hessian's diagonal; entries can be negative |

The first two square *one* gradient, so that any engine can reduce it: B (1/B sum_t s_t g_t)^2. Cross terms between
tokens vanish in expectation because sampled labels give gradients of mean zero (Bartlett's identity) and, with true
labels, because each token's loss gets a random sign s_t. Everything random is a function of (seed, draw, row), so that
an estimate does not depend on how its rows are split into batches.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from ..batch import IGNORE_INDEX, ForgetRetainBatch
from ..engines import Engine, find_soul
from ..log_probs import shift_labels
from ..settings import check_choice
from .labels import answer_uniforms, sampled_label_loss, signed_label_loss
from .layers import LayerStatistics


# Losses whose gradient is squared; Hutchinson's estimate is no square and has a way of its own.
ESTIMATORS = {
    "gauss_newton_bartlett": sampled_label_loss,
    "empirical_fisher": signed_label_loss,
    "hutchinson": None,
}


def estimate_hessian(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[ForgetRetainBatch],
    estimator: str = "gauss_newton_bartlett",
    label_smoothing: float = 0.0,
    seed: int = 0,
    draw: int = 0,
    decay: float | None = None,
    engine: Engine | None = None,
    statistics: LayerStatistics | None = None,
) -> bool:
    """
    Makes one estimate over all `batches` and folds it into the optimizer's Hessian. Gradients that were there before
    are put back (but DeepSpeed's, under which it must come between two steps), and the global random state is not
    used.

    Args:
        model (`torch.nn.Module`): A causal language model, as it is trained (wrapped by its engine).
        optimizer (`torch.optim.Optimizer`): [`Sophia`], or an engine's wrapper of it.
        batches (`Sequence[ForgetRetainBatch]`):
            This process's micro-batches, on the model's device; as many on every process.
        estimator (`str`, *optional*, defaults to `"gauss_newton_bartlett"`): A name from the table above.
        label_smoothing (`float`, *optional*, defaults to 0.0): For `"empirical_fisher"`, in [0, 1).
        seed (`int`, *optional*, defaults to 0): Seed of the run.
        draw (`int`, *optional*, defaults to 0): Number of the estimate within the run.
        decay (`float`, *optional*): Weight of the old average; see [`Sophia.hessian_refresh`].
        engine ([`~engines.Engine`], *optional*):
            From [`~engines.make_engine`]; by default one plain process.
        statistics ([`~layers.LayerStatistics`], *optional*):
            Entered: the same backwards add to its sums. Not in float16, whose loss scale it does not know.

    Returns:
        `bool`: False if the engine skipped the refresh, because float16 overflowed. Its loss scale is lower now.

    Raises:
        ValueError: If the optimizer is not Sophia or no batch has an answer token.
        FloatingPointError: If a loss is not finite; the rows are named, and the Hessian is left as it was.
    """
    engine = engine or Engine()
    check_choice("estimator", estimator, ESTIMATORS)
    if find_soul(optimizer) is None:
        raise ValueError(f"Only Sophia keeps a Hessian, and the optimizer is {type(optimizer).__name__}.")
    num_tokens = int(engine.sum(sum((shift_labels(b["labels"]) != IGNORE_INDEX).sum() for b in batches)))
    if num_tokens == 0:
        raise ValueError("The rows of the Hessian refresh hold no answer token.")
    if statistics is not None:
        statistics.gradient_scale = num_tokens / engine.loss_factor
        statistics.num_tokens += num_tokens
    with engine.gradients_set_aside(optimizer) as parameters:
        if estimator == "hutchinson":
            random = np.random.default_rng((seed, draw))
            bad_rows = _hutchinson_gradients(model, parameters, batches, num_tokens, random, engine)
        else:
            bad_rows = []
            for index, batch in enumerate(batches):
                is_last = index == len(batches) - 1
                with engine.accumulate(model, is_last):
                    with engine.autocast():
                        logits = logits_of(model, batch)
                    losses = ESTIMATORS[estimator](logits, batch, answer_uniforms(batch, seed, draw), label_smoothing)
                    bad_rows += _rows_not_finite(losses, batch)
                    engine.backward(losses.sum() / num_tokens, is_last)
        bad_rows = engine.gather(bad_rows)
        if bad_rows:
            raise FloatingPointError(f"The loss of the Hessian refresh is not finite at {', '.join(bad_rows)}.")
        is_direct = estimator == "hutchinson"  # an estimate of the diagonal, not a gradient to be squared
        scale = 1.0 if is_direct else float(num_tokens)
        return engine.fold(optimizer, lambda soul: soul.hessian_refresh(scale, decay, square=not is_direct))


def logits_of(model: torch.nn.Module, batch: ForgetRetainBatch) -> Tensor:
    """What the model gives to every token after each position, `(rows, tokens, vocabulary)`."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits


def _hutchinson_gradients(
    model: torch.nn.Module,
    parameters: list[Tensor],
    batches: Sequence[ForgetRetainBatch],
    num_tokens: int,
    random: np.random.Generator,
    engine: Engine,
) -> list[str]:
    """
    Leaves `u * (H u)` in the gradients, u of random signs, the same on every process: its mean is diag(H). Returns the
    rows whose loss is not finite.
    """
    signs = [torch.from_numpy(random.choice([-1.0, 1.0], size=p.shape)).to(p) for p in parameters]
    bad_rows = []
    for batch in batches:
        # The fused attention kernels have no second derivative; gradient checkpointing runs them again.
        with sdpa_kernel(SDPBackend.MATH):
            with engine.autocast():
                logits = logits_of(model, batch)
            targets = shift_labels(batch["labels"])
            scores = logits.transpose(1, 2).float()
            losses = cross_entropy(scores, targets, ignore_index=IGNORE_INDEX, reduction="none")
            bad_rows += _rows_not_finite(losses, batch)
            loss = losses.sum() * engine.loss_factor / num_tokens
            first = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
            slope = sum((gradient * sign).sum() for gradient, sign in zip(first, signs))
            second = torch.autograd.grad(slope, parameters, materialize_grads=True)
        for parameter, sign, product in zip(parameters, signs, second):
            estimate = sign * product
            parameter.grad = estimate if parameter.grad is None else parameter.grad + estimate
    engine.average_gradients(parameters)
    return bad_rows


def _rows_not_finite(losses: Tensor, batch: ForgetRetainBatch) -> list[str]:
    is_bad = ~losses.detach().sum(1).isfinite()
    return [
        f"row {row} of `{'forget' if is_forget else 'retain'}_dataset`"
        for row, is_forget in zip(batch["row"][is_bad].tolist(), batch["is_forget"][is_bad].tolist())
    ]
