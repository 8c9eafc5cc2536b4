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

from .batch import IGNORE_INDEX, ForgetRetainBatch
from .config import HESSIAN_ESTIMATORS, check_choice
from .engines import Engine, find_sophia
from .log_probs import CHUNK_TOKENS, shift_labels, token_log_probs
from .sophia import Sophia


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

    Returns:
        `bool`: False if the engine skipped the refresh, because float16 overflowed. Its loss scale is lower now.

    Raises:
        ValueError: If the optimizer is not Sophia or no batch has an answer token.
        FloatingPointError: If a loss is not finite; the rows are named, and the Hessian is left as it was.
    """
    engine = engine or Engine()
    check_choice("estimator", estimator, HESSIAN_ESTIMATORS)
    if find_sophia(optimizer) is None:
        raise ValueError(f"Only Sophia keeps a Hessian, and the optimizer is {type(optimizer).__name__}.")
    num_tokens = int(engine.sum(sum((shift_labels(b["labels"]) != IGNORE_INDEX).sum() for b in batches)))
    if num_tokens == 0:
        raise ValueError("The rows of the Hessian refresh hold no answer token.")
    with engine.gradients_set_aside(optimizer) as parameters:
        if estimator == "hutchinson":
            random = np.random.default_rng((seed, draw))
            bad_rows = _hutchinson_gradients(model, parameters, batches, num_tokens, random, engine)
        else:
            bad_rows = []
            loss = {"gauss_newton_bartlett": sampled_label_loss, "empirical_fisher": signed_label_loss}[estimator]
            for index, batch in enumerate(batches):
                is_last = index == len(batches) - 1
                with engine.accumulate(model, is_last):
                    with engine.autocast():
                        logits = _logits(model, batch)
                    losses = loss(logits, batch, answer_uniforms(batch, seed, draw), label_smoothing)
                    bad_rows += _rows_not_finite(losses, batch)
                    engine.backward(losses.sum() / num_tokens, is_last)
        bad_rows = engine.gather(bad_rows)
        if bad_rows:
            raise FloatingPointError(f"The loss of the Hessian refresh is not finite at {', '.join(bad_rows)}.")
        is_direct = estimator == "hutchinson"  # an estimate of the diagonal, not a gradient to be squared
        return engine.refresh(optimizer, 1.0 if is_direct else float(num_tokens), decay, square=not is_direct)


def sampled_label_loss(logits: Tensor, batch: ForgetRetainBatch, uniforms: Tensor, label_smoothing: float) -> Tensor:
    """Gauss-Newton-Bartlett's: the cross-entropy with labels from the model's own softmax, `(rows, tokens)`, nats."""
    targets = shift_labels(batch["labels"])
    return -token_log_probs(logits, sample_labels(logits, targets, uniforms))


def signed_label_loss(logits: Tensor, batch: ForgetRetainBatch, uniforms: Tensor, label_smoothing: float) -> Tensor:
    """The empirical Fisher's: the true labels' cross-entropy, each token under a random sign, `(rows, tokens)`."""
    signs = torch.where(uniforms < 0.5, -1.0, 1.0)
    return -(signs * token_log_probs(logits, shift_labels(batch["labels"]), label_smoothing))


@torch.no_grad()
def sample_labels(logits: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
    """
    Draws a label from the softmax of the logits at each answer position, by inverting its distribution function.

    Args:
        logits (`torch.FloatTensor` of shape `(rows, tokens, vocabulary)`): The model's.
        targets (`torch.LongTensor` of shape `(rows, tokens)`): Says which positions are answers.
        uniforms (`torch.FloatTensor` of shape `(rows, tokens)`): In [0, 1).

    Returns:
        `torch.LongTensor` of shape `(rows, tokens)`: `IGNORE_INDEX` off the answers.
    """
    flat_logits, flat_uniforms, sampled = logits.flatten(0, 1), uniforms.flatten(), targets.flatten().clone()
    for chunk in (sampled != IGNORE_INDEX).nonzero().squeeze(1).split(CHUNK_TOKENS):
        cumulative = flat_logits[chunk].float().softmax(1).cumsum(1)
        # Rounding leaves the total a little off 1; what is drawn must stay below it.
        thresholds = flat_uniforms[chunk, None] * cumulative[:, -1:]
        sampled[chunk] = (
            torch.searchsorted(cumulative, thresholds, right=True).squeeze(1).clamp_max(logits.shape[2] - 1)
        )
    return sampled.view_as(targets)


def answer_uniforms(batch: ForgetRetainBatch, seed: int, draw: int) -> Tensor:
    """
    Uniform numbers in [0, 1), one an answer position, as a function of (seed, draw, row) and the place in the answer.

    Returns:
        `torch.FloatTensor` of shape `(rows, tokens)`: Zero off the answers.
    """
    is_answer = shift_labels(batch["labels"]) != IGNORE_INDEX
    uniforms = torch.zeros(is_answer.shape)
    for index, (row, is_forget) in enumerate(zip(batch["row"].tolist(), batch["is_forget"].tolist())):
        places = is_answer[index].cpu()
        drawn = np.random.default_rng((seed, draw, row, is_forget)).random(int(places.sum()), dtype=np.float32)
        uniforms[index, places] = torch.from_numpy(drawn)
    return uniforms.to(is_answer.device)


def update_shares(squares: dict[str, float]) -> dict[str, float]:
    """
    Splits a sum of squares over the parts of a language model.

    Args:
        squares (`dict[str, float]`): The squared update of each parameter, by its name in the model.

    Returns:
        `dict[str, float]`: `embeddings`, `head`, `attention`, `mlp`, `other`, which sum to 1, and `largest_tensor`.
        A head that is tied to the embeddings counts as embeddings.
    """
    sums = dict.fromkeys(("embeddings", "head", "attention", "mlp", "other"), 0.0)
    for name, value in squares.items():
        sums[_part_of_model(name)] += value
    total = sum(sums.values()) or 1.0
    largest = max(squares.values(), default=0.0)
    return {**{part: value / total for part, value in sums.items()}, "largest_tensor": largest / total}


def describe_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, learning_rates: list[float], engine: Engine
) -> dict[str, dict[str, float]]:
    """
    What the last step did, summed over the processes that hold parts of it.

    Args:
        model (`torch.nn.Module`): The unwrapped model.
        optimizer (`torch.optim.Optimizer`): [`Sophia`], or an engine's wrapper of it.
        learning_rates (`list[float]`): Of its parameter groups, in the last step.
        engine ([`~engines.Engine`]): That runs the model.

    Returns:
        `dict[str, dict[str, float]]`: For each trained parameter, by name: `count` of coordinates, how many were
        `clipped`, the sum of the `hessian`, and the `squared` update.
    """
    groups = find_sophia(optimizer).param_groups
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    places = {name: place for place, name in enumerate(names)}
    sums = torch.zeros(len(names), 4, dtype=torch.float64)
    for name, group, state in engine.local_states(model, optimizer):
        direction = Sophia.direction(state, groups[group])
        figures = (
            direction.numel(),
            (direction.abs() >= 1).sum(),
            state["hessian"].sum(dtype=torch.float64),
            learning_rates[group] ** 2 * direction.square().sum(),
        )
        sums[places[name]] += torch.tensor([float(figure) for figure in figures], dtype=torch.float64)
    if engine.shards:
        sums = engine.sum(sums.to(engine.accelerator.device))
    keys = ("count", "clipped", "hessian", "squared")
    return {name: dict(zip(keys, row)) for name, row in zip(names, sums.tolist())}


def _part_of_model(name: str) -> str:
    # The names that the decoder families of transformers use: Llama, Qwen, Gemma, GPT-2, GPT-NeoX, OPT, Falcon, Phi.
    parts = {
        "head": ("lm_head", "embed_out"),
        "embeddings": ("embed", "wte", "wpe"),
        "attention": ("attn", "attention"),
        "mlp": ("mlp", "feed_forward", "experts", "fc1", "fc2"),
    }
    is_norm = "norm" in name or ".ln_" in name
    return next((part for part, keys in parts.items() if not is_norm and any(key in name for key in keys)), "other")


def _logits(model: torch.nn.Module, batch: ForgetRetainBatch) -> Tensor:
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
                logits = _logits(model, batch)
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
