"""Losses whose labels are drawn, or whose signs are, so that the square of one gradient estimates curvature."""

import numpy as np
import torch
from torch import Tensor

from ..batch import IGNORE_INDEX, ForgetRetainBatch
from ..log_probs import CHUNK_TOKENS, shift_labels, token_log_probs


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
