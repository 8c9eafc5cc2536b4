"""
Which retain row goes with which forget row, and which answer comes beside, or in the place of, its own: pure functions
of (seed, epoch, index), so that a run can resume.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset as RowDataset
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .config import UnlearnConfig
from .formats import Example, encode, without_first_labels
from .objectives import Objective, Objectives
from .refusals import REFUSALS


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


@dataclass(frozen=True)
class Answers:
    """
    Other answers than a forget row's own, of which one is drawn per (seed, epoch, index).

    Args:
        shared (`Sequence[str]`, *optional*): Those of every row; by default those in its column `alternate`.
        are_preferred (`bool`): Whether they come beside the row's own answer rather than in its place.
    """

    shared: Sequence[str] | None
    are_preferred: bool

    def draw(self, row: dict, seed: int, epoch: int, index: int) -> str:
        """The answer of a row in an epoch."""
        answers = row["alternate"] if self.shared is None else self.shared
        return answers[np.random.default_rng((seed, epoch, index)).integers(len(answers))]


class PairedDataset(Dataset):
    """
    Forget rows, each with a retain row. Its length is the number of forget rows: an epoch is a pass over them.

    Args:
        forget ([`~datasets.Dataset`]): From [`~formats.prepare`].
        retain ([`~datasets.Dataset`]): From [`~formats.prepare`].
        seed (`int`): Seed of the pairing and of the substituted answers.
        answers ([`Answers`], *optional*): For forget losses that look at other answers than the rows' own.
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
        answers: Answers | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
        with_forget: bool = True,
        with_retain: bool = True,
    ):
        if answers is not None and "prompt" not in forget.column_names:
            raise ValueError(
                "This forget loss puts other answers after the prompts, so `forget_dataset` must hold text rows with "
                f"a prompt and an answer; it came tokenized, with the columns {forget.column_names}."
            )
        self.forget, self.retain, self.seed = forget, retain, seed
        self.answers, self.tokenizer, self.max_length = answers, tokenizer, max_length
        self.with_forget, self.with_retain = with_forget, with_retain
        # Of the preferred answers that the first epochs draw, before unlearning; see `preferred_rows`.
        self.preferred_log_prob: dict[tuple[int, str], float] = {}
        self.num_known_epochs = 0
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
            # The model before unlearning is gone when a second training goes on for longer, and cannot be asked.
            drawn = epoch % self.num_known_epochs if self.num_known_epochs else epoch
            other = None if self.answers is None else self._with_other_answer(row, drawn, index)
            if other is None:
                item["forget"] = row
            elif self.answers.are_preferred:
                known = self.preferred_log_prob[index, other["content"]]
                item |= {"forget": row, "preferred": {**other, "reference_log_prob": known}}
            else:
                item["forget"] = other
        if self.with_retain:
            item["retain"] = self.retain[paired_row(self.seed, epoch, index, len(self), len(self.retain))]
        return item

    def preferred_rows(self, num_epochs: int) -> dict[tuple[int, str], dict]:
        """The rows with preferred answers that the first `num_epochs` epochs draw, by forget row and answer."""
        rows = {}
        for index, row in enumerate(self.forget):
            for epoch in range(num_epochs):
                other = self._with_other_answer(row, epoch, index)
                rows[index, other["content"]] = other
        return rows

    def _with_other_answer(self, row: dict, epoch: int, index: int) -> dict:
        answer = self.answers.draw(row, self.seed, epoch, index)
        example = Example(**{name: row[name] for name in Example._fields}).with_content(answer)
        return {**row, **example._asdict(), **encode(self.tokenizer, example, self.max_length)}


def make_pairs(
    forget: RowDataset,
    retain: RowDataset,
    objectives: Objectives,
    args: UnlearnConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> PairedDataset:
    """
    The rows that objectives look at.

    Args:
        forget ([`~datasets.Dataset`]): From [`~formats.prepare`].
        retain ([`~datasets.Dataset`]): From [`~formats.prepare`].
        objectives ([`~objectives.Objectives`]): Say which rows, and with which answers.
        args ([`UnlearnConfig`]): Has the seed, and the file of refusals.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.
        max_length (`int`): See [`~formats.encode`].

    Raises:
        ValueError: If rows lack what an objective asks for, as in [`other_answers`] and
            [`~formats.without_first_labels`].
    """
    if objectives.any("skipped_tokens"):
        forget = without_first_labels(forget, objectives.forget.skipped_tokens, name="forget_dataset")
    return PairedDataset(
        forget,
        retain,
        seed=args.seed if args.data_seed is None else args.data_seed,
        answers=other_answers(objectives.forget, args.refusal_answers, forget, retain),
        tokenizer=tokenizer,
        max_length=max_length,
        with_forget=objectives.forget is not None,
        with_retain=objectives.retain is not None,
    )


def other_answers(
    objective: Objective | None, refusal_answers: str | None, forget: RowDataset, retain: RowDataset
) -> Answers | None:
    """
    The answers besides the rows' own that a forget loss looks at.

    Args:
        objective ([`~objectives.Objective`], *optional*): The forget loss.
        refusal_answers (`str`, *optional*): A file with a refusal in each line; by default `REFUSALS`.
        forget ([`~datasets.Dataset`]): From [`~formats.prepare`].
        retain ([`~datasets.Dataset`]): From [`~formats.prepare`]; the answers of `"random"` are its rows'.

    Returns:
        [`Answers`]: Or `None` if it looks at the rows' own alone.

    Raises:
        ValueError: If the file or the rows hold no text.
    """
    if objective is None or objective.answers == "own":
        return None
    shared = None
    if objective.answers == "random":
        if "content" not in retain.column_names:
            raise ValueError("forget_loss='random' draws answers from `retain_dataset`, which must hold text rows.")
        shared = retain["content"][:]
    elif objective.answers == "refusal":
        shared = REFUSALS if refusal_answers is None else _lines(refusal_answers)
    elif "alternate" not in forget.column_names:
        raise ValueError(
            "forget_loss='altpo' prefers other answers that the model gave itself, and `forget_dataset` has no column "
            "`alternate`: soul_trainer.sampling.add_alternates adds it."
        )
    return Answers(shared, objective.prefers_answers)


def _lines(path: str) -> list[str]:
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    refusals = [line for line in lines if line]
    if not refusals:
        raise ValueError(f"`refusal_answers`={path!r} holds no line of text.")
    return refusals


def warn_of_common_rows(forget: RowDataset, retain: RowDataset) -> None:
    """Warns, with their number, of forget rows that are retain rows too."""
    kept = {tuple(ids) for ids in retain["input_ids"]}
    num_common = sum(tuple(ids) in kept for ids in forget["input_ids"])
    if num_common:
        logger.warning(f"{num_common} rows of `forget_dataset` are rows of `retain_dataset` too: they pull both ways.")
