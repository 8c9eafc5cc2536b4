"""
How far the next-token distribution p is from another, q, at each answer position, in nats. q is what the model said
before unlearning, whole or its most probable tokens alone, or is made of p itself.

A rule gives the divergence, its derivative by log p and the sum of that over outcomes. Everything lives for a chunk of
positions in float32, as in `log_probs.py`, and is computed again in the backward.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .log_probs import LEAST_LOG_PROB, answer_chunks


class WholeVocabulary(NamedTuple):
    """Logits of the reference, `(rows, tokens, vocabulary)`. No gradient flows into them."""

    logits: Tensor

    def compare(self, chunk: Tensor, log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
        """See [`TopTokens.compare`]; here every token is an outcome."""
        log_q = _log_softmax(self.logits.detach().flatten(0, 1)[chunk])
        return log_p, log_q, labels, 0.0

    def spread(self, chunk: Tensor, log_p: Tensor, slope: Tensor, total: Tensor | float) -> Tensor:
        """See [`TopTokens.spread`]."""
        return slope - log_p.exp() * total


class TopTokens(NamedTuple):
    """
    The `K` tokens that the reference finds most probable at each position, the label first among them, and the mass of
    all others as one more outcome. Merging outcomes can only lower a KL divergence: by the mass of the others times
    the divergence within them.

    Attributes:
        ids (`torch.LongTensor` of shape `(rows, tokens, K)`): The tokens.
        log_probs (`torch.FloatTensor` of shape `(rows, tokens, K + 1)`): Theirs, and that of the others together.
    """

    ids: Tensor
    log_probs: Tensor

    def compare(self, chunk: Tensor, log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
        """
        Brings p and q to the same outcomes.

        Args:
            chunk (`torch.LongTensor` of shape `(positions,)`): Places among all rows' tokens.
            log_p (`torch.FloatTensor` of shape `(positions, V)`): The model's.
            labels (`torch.LongTensor` of shape `(positions,)`): The tokens that are to be predicted.

        Returns:
            `tuple`: log p and log q of each outcome, `(positions, outcomes)`; which outcome the label is; and the log
            of how many tokens an outcome stands for.
        """
        ids = self.ids.flatten(0, 1)[chunk]
        rest = log_p.scatter(1, ids, float("-inf")).logsumexp(1, keepdim=True)
        seen = torch.cat([log_p.gather(1, ids), rest], 1).clamp_min(LEAST_LOG_PROB)
        sizes = torch.zeros_like(seen)
        sizes[:, -1] = torch.tensor(float(max(log_p.shape[1] - ids.shape[1], 1))).log()
        log_q = self.log_probs.flatten(0, 1)[chunk].float().clamp_min(LEAST_LOG_PROB)
        return seen, log_q, torch.zeros_like(labels), sizes

    def spread(self, chunk: Tensor, log_p: Tensor, slope: Tensor, total: Tensor | float) -> Tensor:
        """
        The derivative by the logits, `(positions, V)`, from the `slope`, by the outcomes' log-probabilities, and its
        `total` over them: an outcome of probability P moves by p_v / P with each logit of its own, and by -p_v with
        all.
        """
        ids = self.ids.flatten(0, 1)[chunk]
        p = log_p.exp()
        rest = p.scatter(1, ids, 0.0).sum(1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
        grad = p * (slope[:, -1:] / rest)
        grad.scatter_(1, ids, slope[:, :-1])
        return grad - p * total


class _Itself(NamedTuple):
    """The model's own distribution, as a constant."""

    def compare(self, chunk: Tensor, log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
        return log_p, log_p, labels, 0.0

    spread = WholeVocabulary.spread


def token_kl(logits: Tensor, reference: WholeVocabulary | TopTokens, targets: Tensor) -> Tensor:
    """
    KL(q || p), q the reference, at each answer position.

    Args:
        logits (`torch.FloatTensor` of shape `(rows, tokens, vocabulary)`): The model that is trained.
        reference ([`WholeVocabulary`] or [`TopTokens`]): No gradient flows into it.
        targets (`torch.LongTensor` of shape `(rows, tokens)`): From [`~log_probs.shift_labels`]; says which count.

    Returns:
        `torch.FloatTensor` of shape `(rows, tokens)`: Float32, zero where `targets` is `IGNORE_INDEX`.
    """
    return _TokenDivergence.apply(logits, targets, reference, _kl)


def token_cross_entropy(logits: Tensor, reference: WholeVocabulary | TopTokens, targets: Tensor) -> Tensor:
    """
    Cross-entropy of the reference under the model's own distribution, `-sum_v p(v) log q(v)`: KL(p || q) plus the
    model's entropy. Arguments and result are those of [`token_kl`]; tokens outside [`TopTokens`] share their mass
    evenly.
    """
    return _TokenDivergence.apply(logits, targets, reference, _cross_entropy_under_p)


def token_distillation(
    logits: Tensor, reference: WholeVocabulary | TopTokens, targets: Tensor, strength: float
) -> Tensor:
    """
    Cross-entropy `-sum_v q'(v) log p(v)` with q' the reference after `strength` is taken off the label's logit.
    Arguments and result are else those of [`token_kl`].
    """
    return _TokenDivergence.apply(logits, targets, reference, partial(_distillation, strength=strength))


def token_suppression(logits: Tensor, targets: Tensor) -> Tensor:
    """
    Cross-entropy `-sum_v q(v) log p(v)` with q the model's own distribution without the label, as a constant.
    Arguments and result are those of [`token_kl`].
    """
    return _TokenDivergence.apply(logits, targets, _Itself(), partial(_distillation, strength=float("inf")))


def token_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """
    `(max_v z_v - mean_v z_v)^2`, z the logits. Arguments and result are those of [`token_kl`], but the unit is logits
    squared.
    """
    return _TokenDivergence.apply(logits, targets, _Itself(), _margin)


def _kl(log_p: Tensor, log_q: Tensor, labels: Tensor, sizes: Tensor | float) -> tuple[Tensor, Tensor, float]:
    q = log_q.exp()
    return (q * (log_q - log_p)).sum(1), -q, -1.0


def _cross_entropy_under_p(
    log_p: Tensor, log_q: Tensor, labels: Tensor, sizes: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    terms = -log_p.exp() * (log_q - sizes)
    value = terms.sum(1)
    return value, terms, value[:, None]


def _distillation(
    log_p: Tensor, log_q: Tensor, labels: Tensor, sizes: Tensor | float, strength: float
) -> tuple[Tensor, Tensor, float]:
    less = torch.zeros_like(log_q).scatter_(1, labels[:, None], strength)
    q = (log_q - less).softmax(1)
    return -(q * log_p).sum(1), -q, -1.0


def _margin(log_p: Tensor, log_q: Tensor, labels: Tensor, sizes: float) -> tuple[Tensor, Tensor, float]:
    # Log-probabilities are logits less a number that the difference does not see.
    highest, place = log_p.max(1)
    margin = highest - log_p.mean(1)
    slope = torch.full_like(log_p, -1 / log_p.shape[1])
    slope.scatter_add_(1, place[:, None], torch.ones_like(margin)[:, None])
    return margin.square(), 2 * margin[:, None] * slope, 0.0


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, reference, rule):
        divergence = logits.new_zeros(targets.numel(), dtype=torch.float32)
        for chunk, log_p, labels in _chunks(logits, targets):
            divergence[chunk] = rule(*reference.compare(chunk, log_p, labels))[0]
        ctx.save_for_backward(logits, targets, *reference)
        ctx.kind, ctx.rule = type(reference), rule
        return divergence.view_as(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, targets, *reference = ctx.saved_tensors
        reference, grad = ctx.kind(*reference), grad.flatten()
        grad_logits = torch.zeros_like(logits.flatten(0, 1))
        for chunk, log_p, labels in _chunks(logits, targets):
            slope, total = ctx.rule(*reference.compare(chunk, log_p, labels))[1:]
            by_logits = reference.spread(chunk, log_p, slope, total)
            grad_logits[chunk] = (by_logits * grad[chunk, None]).to(grad_logits.dtype)
        return grad_logits.view_as(logits), None, None, None


def _chunks(logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    flat_logits, flat_targets = logits.flatten(0, 1), targets.flatten()
    for chunk in answer_chunks(targets):
        yield chunk, _log_softmax(flat_logits[chunk]), flat_targets[chunk]


def _log_softmax(logits: Tensor) -> Tensor:
    # Tokens that a model forbids have -inf, of which 0 * -inf would make no number.
    return logits.float().log_softmax(1).clamp_min_(LEAST_LOG_PROB)
