"""The contract of a training batch: what the collator makes and what every objective may rely on."""

from typing import TypedDict

import torch


# The label of a position that takes no part in a loss. PyTorch's cross-entropy and transformers use the same number.
IGNORE_INDEX = -100


class ForgetRetainBatch(TypedDict, total=False):
    """
    Forget and retain rows in one batch, so that a step is one forward. `N` rows (forget rows first, then retain rows,
    then preferred ones), `T` tokens.

    Keys:
        input_ids (`torch.LongTensor` of shape `(N, T)`):
            Token ids, padded on the right.
        attention_mask (`torch.LongTensor` of shape `(N, T)`):
            1 on a row's own tokens, 0 on padding. It comes from lengths, so `pad_token_id` may equal `eos_token_id`.
        labels (`torch.LongTensor` of shape `(N, T)`):
            `input_ids` at answer tokens, `IGNORE_INDEX` at the prompt and at padding. Not shifted.
        is_forget (`torch.BoolTensor` of shape `(N,)`):
            Which rows must be forgotten.
        is_preferred (`torch.BoolTensor` of shape `(N,)`, *optional*):
            Which rows are forget rows once more, in the same order, with an answer that is preferred to their own;
            only for objectives that ask for it.
        row (`torch.LongTensor` of shape `(N,)`):
            The row's index in the dataset that it came from, to name it in errors and to look its reference up.
        reference_log_prob (`torch.FloatTensor` of shape `(N,)`, *optional*):
            Log-probability of the row's whole answer before unlearning; only for objectives that ask for it.
        reference_ids (`torch.LongTensor` of shape `(N, T, K)`, *optional*):
            At positions that predict an answer token, that token and the `K - 1` most probable others before
            unlearning; only with `reference="cached_topk"`.
        reference_log_probs (`torch.FloatTensor` of shape `(N, T, K + 1)`, *optional*):
            Their log-probabilities then, and that of all other tokens together.

    Example (pad is 0, `_` stands for `IGNORE_INDEX`; one forget row of 4 tokens and one retain row of 3):

        input_ids       [[5, 8, 9, 2], [5, 7, 2, 0]]
        attention_mask  [[1, 1, 1, 1], [1, 1, 1, 0]]
        labels          [[_, _, 9, 2], [_, 7, 2, _]]
        is_forget       [True, False]
        row             [13, 402]
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    is_forget: torch.Tensor
    is_preferred: torch.Tensor
    row: torch.Tensor
    reference_log_prob: torch.Tensor
    reference_ids: torch.Tensor
    reference_log_probs: torch.Tensor


def parts_of(batch: ForgetRetainBatch) -> dict[str, slice]:
    """Where the `forget`, the `retain` and the `preferred` rows of a batch are; any may be none."""
    num_forget = int(batch["is_forget"].sum())
    num_preferred = int(batch["is_preferred"].sum()) if "is_preferred" in batch else 0
    end = len(batch["is_forget"]) - num_preferred
    return {
        "forget": slice(0, num_forget),
        "retain": slice(num_forget, end),
        "preferred": slice(end, end + num_preferred),
    }


def select_rows(batch: ForgetRetainBatch, names: tuple[str, ...]) -> ForgetRetainBatch | None:
    """
    The rows of some parts of a batch, without the padding that only the others needed.

    Args:
        batch ([`ForgetRetainBatch`]): The whole.
        names (`tuple[str, ...]`): Of [`parts_of`], in the order of a batch.

    Returns:
        [`ForgetRetainBatch`]: Copies; `None` if there are no such rows.
    """
    parts = parts_of(batch)
    rows = [row for name in names for row in range(parts[name].start, parts[name].stop)]
    if not rows:
        return None
    chosen = {key: tensor[rows] for key, tensor in batch.items()}
    longest = int(chosen["attention_mask"].sum(1).max())
    return {key: tensor[:, :longest] if tensor.dim() > 1 else tensor for key, tensor in chosen.items()}
