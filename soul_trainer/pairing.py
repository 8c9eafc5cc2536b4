"""Which retain row goes with which forget row: a pure function of (seed, epoch, index), so that a run can resume."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from datasets import Dataset as RowDataset
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .formats import Example, encode


def paired_row(seed: int, epoch: int, index: int, num_forget: int, num_retain: int) -> int:
    """
    The retain row that is paired with a forget row.

    Over the epochs the forget rows walk through one shuffle of the retain rows after another, so that no retain row
    comes twice before every one has come once.

    Args:
        seed (`int`): Seed of the shuffles, >= 0.
        epoch (`int`): Epoch, from 0.
        index (`int`): Forget row, in [0, num_forget).
        num_forget (`int`): Number of forget rows.
        num_retain (`int`): Number of retain rows.

    Returns:
        `int`: Retain row, in [0, num_retain).
    """
    shuffle, place = divmod(epoch * num_forget + index, num_retain)
    return int(_shuffle(seed, shuffle, num_retain)[place])


@lru_cache(maxsize=4)
def _shuffle(seed: int, shuffle: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng((seed, shuffle)).permutation(num_rows)


class PairedDataset(Dataset):
    """
    Forget rows, each with a retain row. Its length is the number of forget rows: an epoch is a pass over them.

    Args:
        forget ([`~datasets.Dataset`]): From [`~formats.prepare`].
        retain ([`~datasets.Dataset`]): From [`~formats.prepare`].
        seed (`int`): Seed of the pairing and of the substituted answers.
        answers (`Sequence[str]`, *optional*):
            Answers that take the place of the forget rows' own: one is drawn per (seed, epoch, index).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Needed with `answers`.
        max_length (`int`, *optional*): Needed with `answers`; see [`~formats.encode`].
        with_forget (`bool`, *optional*, defaults to `True`): Whether items hold the forget row.
        with_retain (`bool`, *optional*, defaults to `True`): Whether items hold the retain row.
    """

    def __init__(
        self,
        forget: RowDataset,
        retain: RowDataset,
        seed: int,
        answers: Sequence[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
        with_forget: bool = True,
        with_retain: bool = True,
    ):
        if answers is not None and "prompt" not in forget.column_names:
            raise ValueError(
                "This forget loss replaces answers, so `forget_dataset` must hold text rows with a prompt and an "
                f"answer; it came tokenized, with the columns {forget.column_names}."
            )
        self.forget, self.retain, self.seed = forget, retain, seed
        self.answers, self.tokenizer, self.max_length = answers, tokenizer, max_length
        self.with_forget, self.with_retain = with_forget, with_retain
        # In shared memory, because persistent data loader workers would keep an ordinary attribute's first value.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the pairing; the Trainer's data loader calls it before each epoch."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: int) -> dict[str, dict]:
        epoch = int(self._epoch)
        item = {}
        if self.with_forget:
            row = self.forget[index]
            item["forget"] = row if self.answers is None else self._substitute(row, epoch, index)
        if self.with_retain:
            item["retain"] = self.retain[paired_row(self.seed, epoch, index, len(self), len(self.retain))]
        return item

    def _substitute(self, row: dict, epoch: int, index: int) -> dict:
        answer = self.answers[np.random.default_rng((self.seed, epoch, index)).integers(len(self.answers))]
        example = Example(**{name: row[name] for name in Example._fields}).with_content(answer)
        return {**row, **encode(self.tokenizer, example, self.max_length)}
