"""
Makes a model forget TOFU's fictitious authors, with a first- and a second-order optimizer, and reports what is left.

    accelerate launch recipes/tofu.py                                            # a corpus of our own, two CPU cores
    accelerate launch recipes/tofu.py --dataset DIR --forget_split forget05 --retain_split retain95
    accelerate launch recipes/tofu.py --dataset locuslab/TOFU --model HUB_ID --gold HUB_ID --optim soul

Without `--model`, a small target and a gold standard are trained from scratch; the next run finds them. Every flag of
`UnlearnConfig`, and so of `TrainingArguments`, works; settings come from `recipes/configs/tofu` or `--config FILE`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from fictitious_authors import make_corpus
from hub_layout import write_hub_layout
from small_llama import SmallModelArguments
from small_models import small_models

from soul_eval.experiment import Experiment, ExperimentArguments, UnlearningTask
from soul_eval.suites import tofu
from soul_eval.suites.sources import load_split


CONFIGS = Path(__file__).parent / "configs"


@dataclass
class TofuArguments(ExperimentArguments):
    """What to forget, and which model must."""

    dataset: str | None = field(
        default=None, metadata={"help": "Hub id or local folder in TOFU's layout; by default a corpus of our own."}
    )
    forget_split: str = field(default="forget10", metadata={"help": "What to forget (with --dataset)."})
    retain_split: str = field(default="retain90", metadata={"help": "What to keep (with --dataset)."})
    max_retain_rows: int | None = field(default=None, metadata={"help": "Only the first rows of the retain split."})
    held_out_rows: int = field(
        default=100,
        metadata={"help": "Rows at the end of retain_perturbed that unlearning never sees; 0 is TOFU as published."},
    )
    authors: int = field(default=17, metadata={"help": "Authors in the corpus of our own."})
    max_new_tokens: int = field(default=200, metadata={"help": "Longest generation in the evaluation, in tokens."})


def load_rows(
    args: TofuArguments, folder: Path, seed: int, overwrite: bool
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """The rows that are learnt (`forget`, `retain`, `held_out`, `general`), and those that are asked, by split."""
    dataset, forget_split, retain_split = args.dataset, args.forget_split, args.retain_split
    if dataset is None:
        dataset, forget_split, retain_split = str(folder / f"data-{args.authors}-{seed}"), "forget", "retain"
        if PartialState().is_main_process:
            write_hub_layout(make_corpus(args.authors, seed=seed), dataset, overwrite)
        PartialState().wait_for_everyone()
    asked = tofu.load_splits(dataset, forget_split, held_out_rows=args.held_out_rows)

    def load(config: str) -> Dataset:
        return load_split(dataset, config).select_columns(["question", "answer"])

    retain = load(retain_split)
    retain = retain.select(range(min(args.max_retain_rows or len(retain), len(retain))))
    learnt = {
        "forget": load(forget_split),
        "general": concatenate_datasets([load("real_authors"), load("world_facts")]),
    }
    if "held_out" in asked:
        learnt["held_out"] = asked["held_out"].select_columns(["question", "answer"])
        unseen = set(learnt["held_out"]["question"])
        retain = retain.filter(lambda row: row["question"] not in unseen)
    return {**learnt, "retain": retain}, asked


def main() -> None:
    experiment = Experiment("tofu", CONFIGS, TofuArguments, SmallModelArguments)
    args, small = experiment.arguments
    config, folder = experiment.config, experiment.folder
    learnt, asked = load_rows(args, folder, config.seed, config.overwrite)
    target, gold = args.model, args.gold
    if not target:
        target, gold = small_models(learnt, folder, small, config.seed, config.prompt_template, config.use_cpu)
    task = UnlearningTask(
        suite="tofu",
        title="Unlearning fictitious authors",
        target=target,
        gold=gold,
        forget=learnt["forget"],
        retain=learnt["retain"],
        rows=tofu.unscored_rows(asked),
        asked={"max_new_tokens": args.max_new_tokens},
    )
    experiment.run(task)


if __name__ == "__main__":
    main()
