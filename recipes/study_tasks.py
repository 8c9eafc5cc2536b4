"""Where the study's runs happen: rows, and a target that has learnt them."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from filelock import FileLock

from soul_recipes import real_model
from soul_recipes.fictitious_authors import make_corpus
from soul_recipes.small_llama import SmallModelArguments
from soul_recipes.small_models import small_models


LEARNT = ("forget", "retain", "held_out")
# Rows that are asked at every evaluation; of the others, the first so many.
MOST_ASKED = 80


@dataclass
class Task:
    """
    Args:
        name (`str`): Of the corpus and the model.
        rows (`dict[str, list[dict]]`): `forget`, `retain`, `held_out`.
        target (`str`): Folder of the model that must forget.
        gold (`str`, *optional*): Folder of the model that never learnt the rows to forget.
        settings (`dict`): Of every run on it: rows of a step, passes.
        general (`list[str]`): Text of no training, for nats a token.
        num_evaluations (`int`): In the course of a run.
        rate_factor (`float`): Multiplies every learning rate of a search, so that the best lies within the grid.
    """

    name: str
    rows: dict[str, list[dict]]
    target: str
    settings: dict
    general: list[str] = field(default_factory=list)
    num_evaluations: int = 10
    gold: str | None = None
    rate_factor: float = 1.0

    def asked(self, split: str) -> list[dict]:
        """The rows of a split that evaluations ask."""
        return self.rows[split][:MOST_ASKED]


_SMALL = {"per_device_train_batch_size": 8, "num_train_epochs": 6}
_WIDTHS = {"embedded-0.3M": 96, "embedded-2M": 256, "embedded-10M": 576}


def embedded(name: str, seed: int, folder: Path, with_gold: bool) -> Task:
    """The corpus of invented authors, for a model of a size."""
    corpus = make_corpus(seed=seed)
    rows = {split: Dataset.from_list(members) for split, members in corpus.items()}
    general = Dataset.from_list(corpus["real_authors"] + corpus["world_facts"])
    learnt = {split: rows[split].select_columns(["question", "answer"]) for split in LEARNT}
    learnt["general"] = general.select_columns(["question", "answer"])
    size = SmallModelArguments(hidden_size=_WIDTHS[name])
    target, gold = small_models(learnt, folder / name / f"seed-{seed}", size, seed, with_gold=with_gold)
    return Task(name, {split: corpus[split] for split in LEARNT}, target, _SMALL, gold=gold)


def tofu_rows(dataset: Path, seed: int) -> dict[str, list[dict]]:
    """Four authors of forget10 to forget, the last for seed 0, 10 of retain90 to retain, 3 held out; seeds 0 to 4."""
    forget, retain = (_lines(dataset / f"{split}.json") for split in ("forget10", "retain90"))
    each, start = 20, 13 * 20 * seed
    return {
        "forget": forget[len(forget) - 4 * each * (seed + 1) : len(forget) - 4 * each * seed],
        "retain": retain[start : start + 10 * each],
        "held_out": retain[start + 10 * each : start + 13 * each],
    }


def tofu(name: str, seed: int, folder: Path, dataset: Path) -> Task:
    """Real TOFU: forget01's authors, or others of forget10 by the seed."""
    rows = tofu_rows(dataset, seed)
    learnt = {split: Dataset.from_list(members) for split, members in rows.items()}
    target, _ = small_models(learnt, folder / name / f"seed-{seed}", SmallModelArguments(), seed, with_gold=False)
    return Task(name, rows, target, _SMALL)


def smollm2(name: str, seed: int, folder: Path, dataset: Path) -> Task:
    """SmolLM2-135M-Instruct that has learnt 52 rows of TOFU; `real_model.py` says which."""
    rows = real_model.request_rows(dataset, seed)
    base = real_model.convert_smollm2(folder / "SmolLM2-135M-Instruct")
    everything = [row for split in LEARNT for row in rows[split]]
    target = real_model.taught(
        base, everything, folder / name / f"seed-{seed}" / "target", real_model.TARGET_EPOCHS, seed
    )
    settings = {"per_device_train_batch_size": 4, "max_steps": 40}
    # What is pretrained needs smaller steps than what learnt the rows alone.
    return Task(name, rows, str(target), settings, real_model.general_text(), rate_factor=0.5)


def make_task(name: str, seed: int, folder: Path, dataset: Path, with_gold: bool = False) -> Task:
    """The task of a name; models that are not there are trained. The 0.3M model alone has a gold model to train."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}-{seed}.lock"):  # two processes would train the same model into one folder
        if name in _WIDTHS:
            return embedded(name, seed, folder, with_gold and name == "embedded-0.3M")
        return {"tofu": tofu, "smollm2": smollm2}[name](name, seed, folder, dataset)


TASKS = (*_WIDTHS, "tofu", "smollm2")


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
