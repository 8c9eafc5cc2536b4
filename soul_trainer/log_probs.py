"""
Logits and labels to log-probabilities. This is the only place where labels are shifted.

A vocabulary-wide tensor is the largest thing in a step, so it is never copied: labels are shifted instead of logits,
only the positions of answers are read, and float32 lives no longer than a chunk of `CHUNK_TOKENS` positions.
"""

import torch
from torch.autograd.function import once_differentiable

from .batch import IGNORE_INDEX


CHUNK_TOKENS = 1024
LEAST_LOG_PROB = -1e4


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """
    Moves labels to the position whose logits predict them.

    Args:
        labels (`torch.LongTensor` of shape `(rows, tokens)`): Labels as in a batch, not shifted.

    Returns:
        `torch.LongTensor` of shape `(rows, tokens)`: `targets[:, t] = labels[:, t + 1]`; `IGNORE_INDEX` at the end.
    """
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def token_log_probs(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """
    Log-probability of each target token.

    Args:
        logits (`torch.FloatTensor` of shape `(rows, tokens, vocabulary)`): Any floating dtype.
        targets (`torch.LongTensor` of shape `(rows, tokens)`): From [`shift_labels`].
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Mass in [0, 1) that is spread evenly over the vocabulary: the result is then the expectation of the
            log-probability under the smoothed label.

    Returns:
        `torch.FloatTensor` of shape `(rows, tokens)`: Float32, zero where `targets` is `IGNORE_INDEX`.
    """
    _check_positions(logits, targets)
    return _TokenLogProbs.apply(logits, targets, label_smoothing)


@torch.no_grad()
def token_scores(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probability of each target token, and whether it is the most probable one. Arguments are those of
    [`token_log_probs`].

    Returns:
        `tuple[torch.FloatTensor, torch.BoolTensor]` of shape `(rows, tokens)`: Zero where `targets` is `IGNORE_INDEX`.
    """
    _check_positions(logits, targets)
    flat_logits, flat_targets = logits.flatten(0, 1), targets.flatten()
    log_probs = logits.new_zeros(flat_targets.shape, dtype=torch.float32)
    hits = torch.zeros_like(flat_targets, dtype=torch.bool)
    for chunk in answer_chunks(targets):
        scores, labels = flat_logits[chunk].float(), flat_targets[chunk]
        log_probs[chunk] = scores.gather(1, labels[:, None]).squeeze(1) - scores.logsumexp(1)
        hits[chunk] = scores.argmax(1) == labels
    return log_probs.view_as(targets), hits.view_as(targets)


@torch.no_grad()
def token_statistics(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    What membership inference asks of each target token. Arguments are those of [`token_log_probs`].

    Returns:
        `tuple[torch.FloatTensor, torch.BoolTensor, torch.FloatTensor]` of shape `(rows, tokens)`: The log-probability;
        whether the token is the most probable one; and the log-probability less its mean under the model's own
        distribution, over its standard deviation there (Min-K%++, Zhang et al., 2024), 0 where the model is certain.
        All zero where `targets` is `IGNORE_INDEX`.
    """
    _check_positions(logits, targets)
    flat_logits, flat_targets = logits.flatten(0, 1), targets.flatten()
    log_probs, z_scores = (logits.new_zeros(flat_targets.shape, dtype=torch.float32) for _ in range(2))
    hits = torch.zeros_like(flat_targets, dtype=torch.bool)
    for chunk in answer_chunks(targets):
        labels = flat_targets[chunk]
        hits[chunk] = flat_logits[chunk].argmax(1) == labels
        # Tokens that a model forbids have -inf, of which 0 * -inf would make no number.
        scores = flat_logits[chunk].float().log_softmax(1).clamp_min_(LEAST_LOG_PROB)
        log_probs[chunk] = scores.gather(1, labels[:, None]).squeeze(1)
        probs = scores.exp()
        mean = (probs * scores).sum(1)
        deviation = (probs * (scores - mean[:, None]).square()).sum(1).sqrt()
        z = (log_probs[chunk] - mean) / deviation
        z_scores[chunk] = torch.where(deviation > 0, z, 0.0)
    return log_probs.view_as(targets), hits.view_as(targets), z_scores.view_as(targets)


def _check_positions(logits: torch.Tensor, targets: torch.Tensor) -> None:
    if logits.shape[:2] != targets.shape:
        raise ValueError(
            f"The model returned logits of shape {tuple(logits.shape)} for labels of shape {tuple(targets.shape)}: it "
            "adds positions of its own, as prompt tuning does, which is not supported."
        )


def answer_chunks(targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The answer positions, as places among all rows' tokens, in chunks of at most `CHUNK_TOKENS`."""
    return (targets.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1).split(CHUNK_TOKENS)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, label_smoothing):
        flat_logits, flat_targets = logits.flatten(0, 1), targets.flatten()
        log_probs = logits.new_zeros(flat_targets.shape, dtype=torch.float32)
        for chunk in answer_chunks(targets):
            scores = flat_logits[chunk].float()
            value = scores.gather(1, flat_targets[chunk, None]).squeeze(1)
            if label_smoothing:
                value = (1 - label_smoothing) * value + label_smoothing * scores.mean(1)
            log_probs[chunk] = value - scores.logsumexp(1)
        ctx.save_for_backward(logits, targets)
        ctx.label_smoothing = label_smoothing
        return log_probs.view_as(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # d log p(y) / d logits = onehot(y) - softmax(logits)
        logits, targets = ctx.saved_tensors
        flat_logits, flat_targets, grad = logits.flatten(0, 1), targets.flatten(), grad.flatten()
        grad_logits = torch.zeros_like(flat_logits)
        for chunk in answer_chunks(targets):
            delta = flat_logits[chunk].float().softmax(1).neg_()
            if ctx.label_smoothing:
                delta += ctx.label_smoothing / delta.shape[1]
            weight = delta.new_full((len(chunk), 1), 1 - ctx.label_smoothing)
            delta.scatter_add_(1, flat_targets[chunk, None], weight)
            grad_logits[chunk] = (delta * grad[chunk, None]).to(grad_logits.dtype)
        return grad_logits.view_as(logits), None, None
