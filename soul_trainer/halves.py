"""The forget rows and the retain rows of a batch, as the objectives see them, and how many count."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import IGNORE_INDEX, ForgetRetainBatch, parts_of
from .divergences import TopTokens, WholeVocabulary
from .log_probs import shift_labels, token_log_probs


@dataclass
class Half:
    """
    The forget rows or the retain rows of a batch. `R` rows, `T` tokens, `V` vocabulary, `D` width of the model.

    Args:
        log_probs (`torch.FloatTensor` of shape `(R, T)`): Log-probability of each target; zero off the answer.
        targets (`torch.LongTensor` of shape `(R, T)`): From [`~log_probs.shift_labels`].
        logits (`torch.FloatTensor` of shape `(R, T, V)`): The model's.
        rows (`torch.LongTensor` of shape `(R,)`): Their places in the dataset.
        reference ([`~divergences.WholeVocabulary`] or [`~divergences.TopTokens`], *optional*):
            What the model gave to every token before unlearning.
        reference_log_prob (`torch.FloatTensor` of shape `(R,)`, *optional*): The answer's, before unlearning.
        hidden_states (`torch.FloatTensor` of shape `(R, T, D)`, *optional*): The output of a layer.
        reference_hidden_states (`torch.FloatTensor` of shape `(R, T, D)`, *optional*): The same before unlearning.
        preferred (`Half`, *optional*): The same rows with the answers that are preferred.
    """

    log_probs: Tensor
    targets: Tensor
    logits: Tensor
    rows: Tensor
    reference: WholeVocabulary | TopTokens | None = None
    reference_log_prob: Tensor | None = None
    hidden_states: Tensor | None = None
    reference_hidden_states: Tensor | None = None
    preferred: "Half | None" = None

    @property
    def is_answer(self) -> Tensor:
        """Which positions predict a token of the answer: `torch.BoolTensor` of shape `(R, T)`."""
        return self.targets != IGNORE_INDEX


def split(
    batch: ForgetRetainBatch,
    logits: Tensor,
    hidden_states: Tensor | None = None,
    reference_logits: Tensor | None = None,
    reference_hidden_states: Tensor | None = None,
) -> tuple[Half, Half]:
    """
    Splits a batch and what the model made of it.

    Args:
        batch ([`~batch.ForgetRetainBatch`]): Its parts follow each other, so that halves are views of whole tensors.
        logits (`torch.FloatTensor` of shape `(N, T, V)`): The model's.
        hidden_states (`torch.FloatTensor` of shape `(N, T, D)`, *optional*): The output of one of its layers.
        reference_logits (`torch.FloatTensor` of shape `(N, T, V)`, *optional*): The model's before unlearning.
        reference_hidden_states (`torch.FloatTensor` of shape `(N, T, D)`, *optional*): Likewise.

    Returns:
        `tuple[Half, Half]`: The forget and the retain half; either may have no rows.
    """
    targets = shift_labels(batch["labels"])
    log_probs = token_log_probs(logits, targets)
    wholes = {
        "log_probs": log_probs,
        "targets": targets,
        "logits": logits,
        "rows": batch["row"],
        "reference_log_prob": batch.get("reference_log_prob"),
        "hidden_states": hidden_states,
        "reference_hidden_states": reference_hidden_states,
    }

    def part(rows: slice) -> Half:
        reference = None
        if reference_logits is not None:
            reference = WholeVocabulary(reference_logits[rows])
        elif "reference_ids" in batch:
            reference = TopTokens(batch["reference_ids"][rows], batch["reference_log_probs"][rows])
        return Half(
            **{name: whole if whole is None else whole[rows] for name, whole in wholes.items()}, reference=reference
        )

    parts = parts_of(batch)
    forget, retain = part(parts["forget"]), part(parts["retain"])
    if parts["preferred"].start < parts["preferred"].stop:
        forget.preferred = part(parts["preferred"])
    return forget, retain


def count_answers(batch: ForgetRetainBatch, is_repeated: Tensor) -> Tensor:
    """
    What a batch adds to the counts that losses are divided by, once repeated rows have lost their labels.

    Args:
        batch ([`~batch.ForgetRetainBatch`]): Its `labels` are changed in place.
        is_repeated (`torch.BoolTensor` of shape `(pairs,)`): Pairs of rows that are there only to fill the batch up.

    Returns:
        `torch.LongTensor` of shape `(2, 2)`: `[[forget tokens, forget rows], [retain tokens, retain rows]]`.
    """
    counts = {}
    for name, rows in parts_of(batch).items():
        labels = batch["labels"][rows]  # a view
        labels[is_repeated[: len(labels)]] = IGNORE_INDEX
        num_tokens = (shift_labels(labels) != IGNORE_INDEX).sum(1)
        counts[name] = torch.stack([num_tokens.sum(), (num_tokens > 0).sum()])
    return torch.stack([counts["forget"], counts["retain"]])
