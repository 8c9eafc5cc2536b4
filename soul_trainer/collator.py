"""Rows to batches."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from .batch import IGNORE_INDEX, ForgetRetainBatch


@dataclass
class UnlearnCollator:
    """
    Pads rows on the right to the longest of the batch.

    Items with a `forget` or a `retain` row become a [`~batch.ForgetRetainBatch`], forget rows first; plain rows (as in
    evaluation) become `input_ids`, `attention_mask` and `labels` alone.

    Args:
        pad_token_id (`int`): Fills `input_ids`. It may be the end of sequence: the mask comes from lengths.
    """

    pad_token_id: int

    @classmethod
    def for_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "UnlearnCollator":
        """Pads with the tokenizer's padding or, where it has none, with its end of sequence."""
        return cls(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    def __call__(self, items: list[dict]) -> ForgetRetainBatch:
        if "input_ids" in items[0]:
            return self._pad(items)
        halves = [[item[half] for item in items if half in item] for half in ("forget", "retain")]
        rows = halves[0] + halves[1]
        batch = self._pad(rows)
        batch["is_forget"] = torch.tensor([True] * len(halves[0]) + [False] * len(halves[1]))
        batch["row"] = torch.tensor([row["row"] for row in rows])
        if halves[0] and "reference_log_prob" in halves[0][0]:
            batch["reference_log_prob"] = torch.tensor([row.get("reference_log_prob", 0.0) for row in rows])
        return batch

    def _pad(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORE_INDEX),
        }
        for index, row in enumerate(rows):
            width = len(row["input_ids"])
            batch["input_ids"][index, :width] = torch.tensor(row["input_ids"])
            batch["attention_mask"][index, :width] = 1
            batch["labels"][index, :width] = torch.tensor(row["labels"])
        return batch
