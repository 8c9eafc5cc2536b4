"""TOFU's rows as its recipe needs them: what is learnt, what is asked, and requests to forget one after the other."""

import re
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets, get_dataset_config_names

from soul_eval.continual import Request
from soul_eval.suites import tofu
from soul_recipes.fictitious_authors import make_corpus
from soul_recipes.hub_layout import write_hub_layout
from soul_trainer.records import public_name
from soul_trainer.sources import load_split


# Of each author, one after the other, in TOFU and in the corpus of our own.
ROWS_PER_AUTHOR = 20
OWN_SPLITS = ("forget", "retain")
DEFAULT_SPLITS = ("forget10", "retain90")


def write_own_corpus(folder: Path, num_authors: int, seed: int, overwrite: bool) -> str:
    """Writes the corpus of our own into a folder, on one process; returns the folder's path."""
    dataset = str(folder / f"data-{num_authors}-{seed}")
    if PartialState().is_main_process:
        write_hub_layout(make_corpus(num_authors, seed=seed), dataset, overwrite)
    PartialState().wait_for_everyone()
    return dataset


def paired_splits(forget: str | None, retain: str | None) -> tuple[str, str]:
    """
    Splits to forget and to retain: `forget05` goes with `retain95`, and the other way round.

    Raises:
        ValueError: If only one is given and its name does not say which the other is.
    """
    if forget is None and retain is None:
        return DEFAULT_SPLITS
    if forget and retain:
        return forget, retain
    other = _other_split(forget or retain)
    if other is None:
        raise ValueError(
            f"{forget or retain!r} is not named as forget01 or retain99 are: name both --forget_split and "
            "--retain_split."
        )
    return (forget, other) if forget else (other, retain)


def _other_split(name: str) -> str | None:
    found = re.fullmatch(r"(forget|retain)(\d\d)", name)
    if found is None or found[2] == "00":
        return None
    return f"{'retain' if found[1] == 'forget' else 'forget'}{100 - int(found[2]):02}"


class TofuRows:
    """
    The rows of a dataset in TOFU's layout.

    Args:
        dataset (`str`): Folder or hub id.
        forget_split (`str`): What to forget.
        retain_split (`str`): What to keep.
        held_out_rows (`int`, *optional*): See [`~soul_eval.suites.tofu.load_splits`].
        max_retain_rows (`int`, *optional*): Only the first rows of what to keep.
        holdout_split (`str`, *optional*):
            Rows that no model has seen, for membership inference; by default `holdout05` for `forget05` and so on,
            if the dataset has it.

    Attributes:
        asked (`dict[str, Dataset]`): What models are asked, by split of the suite.
        forget, general ([`~datasets.Dataset`]): Question/answer rows.
        held_out ([`~datasets.Dataset`], *optional*): Question/answer rows that unlearning never sees.
        retain ([`~datasets.Dataset`]): The others.
        holdout_split (`str`, *optional*): The split that is asked.
        names (`dict[str, str]`): What model cards call the rows to forget and to retain.
    """

    def __init__(
        self,
        dataset: str,
        forget_split: str,
        retain_split: str,
        held_out_rows: int | None = None,
        max_retain_rows: int | None = None,
        holdout_split: str | None = None,
    ):
        self.dataset, self.max_retain_rows = dataset, max_retain_rows
        name = public_name(dataset)
        self.names = {"forget": f"{name} {forget_split}", "retain": f"{name} {retain_split}"}
        self.asked = tofu.load_splits(dataset, forget_split, held_out_rows=held_out_rows)
        held_out = self.asked.get("held_out")
        self.held_out = None if held_out is None else held_out.select_columns(["question", "answer"])
        self.forget, self.retain = self.load(forget_split), self.load_retain(retain_split)
        self.general = concatenate_datasets([self.load("real_authors"), self.load("world_facts")])
        paired = forget_split.replace("forget", "holdout")
        known = get_dataset_config_names(dataset)
        self.holdout_split = holdout_split or (paired if paired != forget_split and paired in known else None)
        if self.holdout_split:
            self.asked[tofu.NON_MEMBERS] = self.load(self.holdout_split)

    def load(self, config: str) -> Dataset:
        """Question/answer rows of a configuration."""
        return load_split(self.dataset, config, columns=("question", "answer")).select_columns(["question", "answer"])

    def load_retain(self, config: str) -> Dataset:
        """The same without the held-out rows, and not more than `max_retain_rows`."""
        rows = self.load(config)
        rows = rows.select(range(min(self.max_retain_rows or len(rows), len(rows))))
        return self._without(rows, set(self.held_out["question"])) if self.held_out else rows

    def learnt(self) -> dict[str, Dataset]:
        """What a target learns, by name; all but `forget` is what a gold model learns."""
        rows = {"forget": self.forget, "general": self.general, "retain": self.retain}
        return rows | ({"held_out": self.held_out} if self.held_out else {})

    def requests(self, splits: list[str]) -> list[Request]:
        """A request for each split, of the rows that no earlier one has, with the retain split that goes with it."""
        requests: list[Request] = []
        taken: set[str] = set()
        for split in splits:
            asked = self._without(tofu.load_splits(self.dataset, split)["forget"], taken)
            forget = self._without(self.load(split), taken)
            if not len(forget):
                raise ValueError(
                    f"`requests`: the rows of {split!r} are all in earlier requests: smaller ones go first."
                )
            start = sum(len(request.rows) for request in requests)
            rows = [{**row, "index": start + row["index"]} for row in tofu.unscored_rows({"forget": asked})]
            requests.append(Request(split, forget, rows, self.load_retain(paired_splits(split, None)[1])))
            taken |= set(forget["question"])
        return requests

    @staticmethod
    def _without(rows: Dataset, questions: set[str]) -> Dataset:
        return rows.filter(lambda row: row["question"] not in questions, keep_in_memory=True)

    def author_requests(self, num_requests: int) -> list[Request]:
        """The split to forget in so many parts of whole authors, which differ by one author at most."""
        num_authors, rest = divmod(len(self.forget), ROWS_PER_AUTHOR)
        if rest or not 1 <= num_requests <= num_authors:
            raise ValueError(
                f"`num_requests` must be between 1 and {num_authors}, the number of authors to forget, each with "
                f"{ROWS_PER_AUTHOR} rows, but it is {num_requests}, and there are {len(self.forget)} rows."
            )
        asked = tofu.unscored_rows({"forget": self.asked["forget"]})
        bounds = [ROWS_PER_AUTHOR * (place * num_authors // num_requests) for place in range(num_requests + 1)]
        return [
            Request(f"part {number}", self.forget.select(range(start, end)), asked[start:end])
            for number, (start, end) in enumerate(zip(bounds, bounds[1:]), 1)
        ]
