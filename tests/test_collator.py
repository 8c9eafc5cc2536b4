"""Batches against literal tensors."""

import torch

from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.collator import UnlearnCollator


_ = IGNORE_INDEX
END = 2
FORGET = {"input_ids": [5, 8, 9, END], "labels": [_, _, 9, END], "row": 13}
RETAIN = {"input_ids": [5, 7, END], "labels": [_, 7, END], "row": 402}


def test_the_batch_of_the_contract():
    """
    Would catch a mask made from token ids (the end of sequence is the pad here), padding beyond the longest row,
    retain rows before forget rows, and row numbers that go with the wrong rows.
    """
    batch = UnlearnCollator(pad_token_id=END)([{"forget": FORGET, "retain": RETAIN}])
    expected = {
        "input_ids": [[5, 8, 9, END], [5, 7, END, END]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
        "labels": [[_, _, 9, END], [_, 7, END, _]],
        "is_forget": [True, False],
        "row": [13, 402],
    }
    assert {key: value.tolist() for key, value in batch.items()} == expected


def test_reference_log_probs_stay_with_their_rows():
    """Would catch references in the order of items rather than of rows: forget rows come first."""
    items = [{"forget": {**FORGET, "reference_log_prob": value}, "retain": RETAIN} for value in (-1.5, -2.5)]
    batch = UnlearnCollator(pad_token_id=0)(items)
    assert batch["reference_log_prob"].tolist() == [-1.5, -2.5, 0.0, 0.0]
    assert batch["is_forget"].tolist() == [True, True, False, False]


def test_one_half_alone_and_plain_rows():
    """Would catch objectives without a forget or a retain loss, and evaluation, tripping over the missing half."""
    batch = UnlearnCollator(pad_token_id=0)([{"retain": RETAIN}])
    assert batch["is_forget"].tolist() == [False] and "reference_log_prob" not in batch
    plain = UnlearnCollator(pad_token_id=0)([RETAIN, FORGET])
    assert sorted(plain) == ["attention_mask", "input_ids", "labels"]
    assert plain["input_ids"].dtype == torch.long
