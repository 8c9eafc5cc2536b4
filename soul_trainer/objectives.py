"""
Forget losses and retain losses: pure functions in two tables by name. One line in a table adds one.

A loss gives one number a row, a *sum* over the row's answer tokens (or one number for its whole sequence); the trainer
divides the sum over rows by a global count of tokens (or of sequences), so that batch size, gradient accumulation and
the number of processes do not change the trajectory.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .batch import IGNORE_INDEX, ForgetRetainBatch
from .log_probs import shift_labels, token_cross_entropy, token_kl, token_log_probs


@dataclass
class Half:
    """
    The forget rows or the retain rows of a batch, as the objectives see them. `R` rows, `T` tokens, `V` vocabulary.

    Args:
        log_probs (`torch.FloatTensor` of shape `(R, T)`): Log-probability of each target; zero off the answer.
        targets (`torch.LongTensor` of shape `(R, T)`): From [`~log_probs.shift_labels`].
        logits (`torch.FloatTensor` of shape `(R, T, V)`): The model's.
        reference_logits (`torch.FloatTensor` of shape `(R, T, V)`, *optional*): The model's before unlearning.
        reference_log_prob (`torch.FloatTensor` of shape `(R,)`, *optional*): The answer's, before unlearning.
        rows (`torch.LongTensor` of shape `(R,)`, *optional*): Their places in the dataset.
    """

    log_probs: Tensor
    targets: Tensor
    logits: Tensor
    reference_logits: Tensor | None = None
    reference_log_prob: Tensor | None = None
    rows: Tensor | None = None


def split(batch: ForgetRetainBatch, logits: Tensor, reference_logits: Tensor | None = None) -> tuple[Half, Half]:
    """
    Splits a batch and what the model made of it.

    Args:
        batch ([`~batch.ForgetRetainBatch`]): Forget rows come first in it, so that halves are views of whole tensors.
        logits (`torch.FloatTensor` of shape `(N, T, V)`): The model's.
        reference_logits (`torch.FloatTensor` of shape `(N, T, V)`, *optional*): The model's before unlearning.

    Returns:
        `tuple[Half, Half]`: The forget and the retain half; either may have no rows.
    """
    num_forget = int(batch["is_forget"].sum())
    targets = shift_labels(batch["labels"])
    log_probs = token_log_probs(logits, targets)
    wholes = (log_probs, targets, logits, reference_logits, batch.get("reference_log_prob"), batch["row"])

    def part(rows: slice) -> Half:
        return Half(*(whole if whole is None else whole[rows] for whole in wholes))

    return part(slice(num_forget)), part(slice(num_forget, None))


def count_answers(batch: ForgetRetainBatch, is_repeated: Tensor) -> Tensor:
    """
    What a batch adds to the counts that losses are divided by, once repeated rows have lost their labels.

    Args:
        batch ([`~batch.ForgetRetainBatch`]): Its `labels` are changed in place.
        is_repeated (`torch.BoolTensor` of shape `(pairs,)`): Pairs of rows that are there only to fill the batch up.

    Returns:
        `torch.LongTensor` of shape `(2, 2)`: `[[forget tokens, forget rows], [retain tokens, retain rows]]`.
    """
    counts = []
    for rows in (batch["is_forget"], ~batch["is_forget"]):
        places = rows.nonzero().squeeze(1)
        batch["labels"][places[is_repeated[: len(places)]]] = IGNORE_INDEX
        num_tokens = (shift_labels(batch["labels"][places]) != IGNORE_INDEX).sum(1)
        counts.append(torch.stack([num_tokens.sum(), (num_tokens > 0).sum()]))
    return torch.stack(counts)


@dataclass(frozen=True)
class Objective:
    """
    A loss and what it asks for.

    Args:
        function (`Callable`): `(Half, npo_beta) -> (R,)`, one sum a row.
        per (`str`, *optional*, defaults to `"token"`): The unit of the global count: `"token"` or `"sequence"`.
        answers (`str`, *optional*, defaults to `"own"`):
            Which answers the rows carry: `"own"`, `"refusal"` or `"random"` (those of retain rows).
        needs_reference_logits (`bool`, *optional*, defaults to `False`): Whether it reads `reference_logits`.
        needs_reference_log_prob (`bool`, *optional*, defaults to `False`): Whether it reads `reference_log_prob`.
    """

    function: Callable[[Half, float], Tensor]
    per: str = "token"
    answers: str = "own"
    needs_reference_logits: bool = False
    needs_reference_log_prob: bool = False

    def __call__(self, half: Half, npo_beta: float) -> Tensor:
        """The loss of each row, `(R,)`: zero where a row has no answer token, as those that fill a batch up."""
        has_answer = (half.targets != IGNORE_INDEX).any(1)
        return torch.where(has_answer, self.function(half, npo_beta), 0.0)


def nll(half: Half, npo_beta: float) -> Tensor:
    """Negative log-likelihood, nats summed over the answer: `-sum_t log p(y_t)`."""
    return -half.log_probs.sum(1)


def gradient_ascent(half: Half, npo_beta: float) -> Tensor:
    """Gradient ascent on the likelihood loss (GA; Jang et al., 2023): `sum_t log p(y_t)`."""
    return half.log_probs.sum(1)


def kl(half: Half, npo_beta: float) -> Tensor:
    """`sum_t KL(reference || model)` over answer positions (KL minimization of TOFU, Maini et al., 2024)."""
    return token_kl(half.logits, half.reference_logits, half.targets).sum(1)


def kl_away(half: Half, npo_beta: float) -> Tensor:
    """
    Drives the distribution away from what it was, as the released SOUL code does: `sum_t sum_v p(v) log p_ref(v)`.

    The negative of [`kl`] would be stuck: the model starts as its own reference, where KL has no gradient.
    """
    return -token_cross_entropy(half.logits, half.reference_logits, half.targets).sum(1)


def npo(half: Half, npo_beta: float) -> Tensor:
    """
    Negative preference optimization (Zhang et al., 2024, arXiv 2404.05868, eq. 3), per sequence:
    `-(2 / beta) log sigmoid(-beta log(p(y) / p_reference(y)))`. Its gradient tends to gradient ascent's as beta -> 0.
    """
    log_ratio = half.log_probs.sum(1) - half.reference_log_prob
    return softplus(npo_beta * log_ratio) * (2 / npo_beta)


FORGET_LOSSES: dict[str, Objective | None] = {
    "ga": Objective(gradient_ascent),
    "kl": Objective(kl_away, needs_reference_logits=True),
    "refusal": Objective(nll, answers="refusal"),
    "random": Objective(nll, answers="random"),
    "npo": Objective(npo, per="sequence", needs_reference_log_prob=True),
    "none": None,
}

RETAIN_LOSSES: dict[str, Objective | None] = {
    "nll": Objective(nll),
    "kl": Objective(kl, needs_reference_logits=True),
    "none": None,
}

# Factor of the retain weight, from the progress in epochs and the number of epochs. "epoch" is that of the `_epoch`
# methods of the released SOUL code: 0 in the first epoch, then it grows by 1 / epochs with each.
RETAIN_WEIGHT_SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda epoch, num_epochs: 1.0,
    "epoch": lambda epoch, num_epochs: int(epoch) / num_epochs,
    "linear": lambda epoch, num_epochs: epoch / num_epochs,
}


def l1_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Sum of absolute values of the trainable parameters (l1-sparse; Jia et al., 2023, arXiv 2304.04934)."""
    return sum(torch.linalg.vector_norm(p, ord=1, dtype=torch.float32) for p in parameters if p.requires_grad)


# What the model is taught to say instead of an answer by the forget loss "refusal".
REFUSALS = (
    "I'm not able to tell you about that.",
    "I don't have any information on this subject.",
    "That is something I know nothing about.",
    "I'm afraid I can't help with that question.",
    "I have no knowledge of this.",
    "Unfortunately, I can't answer that.",
    "This isn't something I have learned about.",
    "I'm sorry, but I do not know.",
    "I can't give you a reliable answer here.",
    "My knowledge does not reach that far.",
    "I'm not familiar with this topic.",
    "There is nothing I can say about that.",
    "I would have to guess, so I'd rather not answer.",
    "I haven't come across anything on this.",
    "That lies outside what I know.",
    "I'm unable to provide details on that.",
)
