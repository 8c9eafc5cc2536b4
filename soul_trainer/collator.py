"""Rows to batches."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from .batch import IGNORE_INDEX, ForgetRetainBatch
from .log_probs import shift_labels


@dataclass
class UnlearnCollator:
    """
    Pads rows on the right to the longest of the batch.

    Items with a `forget`, a `retain` or a `preferred` row become a [`~batch.ForgetRetainBatch`], in this order; plain
    rows (as in evaluation) become `input_ids`, `attention_mask` and `labels` alone.

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
        parts = [[item[part] for item in items if part in item] for part in ("forget", "retain", "preferred")]
        rows = [row for part in parts for row in part]
        batch = self._pad(rows)
        batch["is_forget"] = torch.arange(len(rows)) < len(parts[0])
        if parts[2]:
            batch["is_preferred"] = torch.arange(len(rows)) >= len(rows) - len(parts[2])
        batch["row"] = torch.tensor([row["row"] for row in rows])
        if any("reference_log_prob" in row for row in rows):
            batch["reference_log_prob"] = torch.tensor([row.get("reference_log_prob", 0.0) for row in rows])
        if any("reference_ids" in row for row in rows):
            batch |= self._place_references(rows, batch["labels"])
        return batch

    @staticmethod
    def _place_references(rows: list[dict], labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """What rows keep for each answer token, at the position that predicts it."""
        num_ids = next(len(row["reference_ids"][0]) for row in rows if "reference_ids" in row)
        ids = torch.zeros(*labels.shape, num_ids, dtype=torch.long)
        log_probs = torch.zeros(*labels.shape, num_ids + 1)
        is_answer = shift_labels(labels) != IGNORE_INDEX
        for index, row in enumerate(rows):
            if "reference_ids" in row:
                ids[index, is_answer[index]] = torch.tensor(row["reference_ids"])
                log_probs[index, is_answer[index]] = torch.tensor(row["reference_log_probs"])
        return {"reference_ids": ids, "reference_log_probs": log_probs}

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
