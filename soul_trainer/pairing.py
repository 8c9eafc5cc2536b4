"""
Which retain row goes with which forget row, and which answer takes the place of its own: pure functions of
(seed, epoch, index), so that a run can resume.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset as RowDataset
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .formats import Example, encode
from .objectives import REFUSALS, Objective


logger = logging.get_logger(__name__)


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


def substitute_answers(
    objective: Objective | None, refusal_answers: str | None, retain: RowDataset
) -> Sequence[str] | None:
    """
    The answers that a forget loss puts in the place of the rows' own.

    Args:
        objective ([`~objectives.Objective`], *optional*): The forget loss.
        refusal_answers (`str`, *optional*): A file with a refusal in each line; by default `REFUSALS`.
        retain ([`~datasets.Dataset`]): From [`~formats.prepare`]; the answers of `"random"` are its rows'.

    Returns:
        `Sequence[str]`: Or `None` if the rows keep their own.

    Raises:
        ValueError: If the file or the rows hold no text.
    """
    if objective is None or objective.answers == "own":
        return None
    if objective.answers == "random":
        if "content" not in retain.column_names:
            raise ValueError("forget_loss='random' draws answers from `retain_dataset`, which must hold text rows.")
        return retain["content"][:]
    if refusal_answers is None:
        return REFUSALS
    lines = [line.strip() for line in Path(refusal_answers).read_text(encoding="utf-8").splitlines()]
    refusals = [line for line in lines if line]
    if not refusals:
        raise ValueError(f"`refusal_answers`={refusal_answers!r} holds no line of text.")
    return refusals


def warn_of_common_rows(forget: RowDataset, retain: RowDataset) -> None:
    """Warns, with their number, of forget rows that are retain rows too."""
    kept = {tuple(ids) for ids in retain["input_ids"]}
    num_common = sum(tuple(ids) in kept for ids in forget["input_ids"])
    if num_common:
        logger.warning(f"{num_common} rows of `forget_dataset` are rows of `retain_dataset` too: they pull both ways.")
