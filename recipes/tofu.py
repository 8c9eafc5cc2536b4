"""
Makes a model forget TOFU's fictitious authors, with a first- and a second-order optimizer, and reports what is left.

    accelerate launch recipes/tofu.py                                            # a corpus of our own, two CPU cores
    accelerate launch recipes/tofu.py --num_requests 4                           # one author after the other
    accelerate launch recipes/tofu.py --dataset DIR --forget_split forget05      # a small model that learns TOFU first
    accelerate launch recipes/tofu.py --dataset locuslab/TOFU --model HUB_ID --gold HUB_ID --optim soul
    accelerate launch recipes/tofu.py --dataset locuslab/TOFU --model HUB_ID --requests forget01,forget05,forget10

Without `--model`, a small target and a gold standard are trained from scratch; the next run finds them. Every flag of
`UnlearnConfig`, and so of `TrainingArguments`, works; settings come from `recipes/configs/tofu` or `--config FILE`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from soul_eval.console import run_script
from soul_eval.continual import run_requests
from soul_eval.experiment import Experiment, ExperimentArguments, UnlearningTask
from soul_eval.suites import tofu
from soul_recipes.small_llama import SmallModelArguments
from soul_recipes.small_models import small_models
from soul_recipes.tofu_rows import OWN_SPLITS, TofuRows, paired_splits, write_own_corpus


CONFIGS = Path(__file__).parent / "configs"


@dataclass
class TofuArguments(ExperimentArguments):
    """What to forget, and which model must."""

    dataset: str | None = field(
        default=None, metadata={"help": "Hub id or local folder in TOFU's layout; by default a corpus of our own."}
    )
    forget_split: str | None = field(
        default=None, metadata={"help": "What to forget, with --dataset: forget01, forget05 or, by default, forget10."}
    )
    retain_split: str | None = field(
        default=None, metadata={"help": "What to keep, with --dataset; by default retain90 for forget10 and so on."}
    )
    holdout_split: str | None = field(
        default=None,
        metadata={"help": "Rows never seen, for membership inference; by default holdout10 if the dataset has it."},
    )
    requests: str | None = field(
        default=None,
        metadata={"help": "Splits to forget one after the other, with --dataset: forget01,forget05,forget10."},
    )
    num_requests: int | None = field(
        default=None, metadata={"help": "Forget the split in so many parts, author by author, one after the other."}
    )
    max_retain_rows: int | None = field(default=None, metadata={"help": "Only the first rows of the retain split."})
    held_out_rows: int | None = field(default=None, metadata={"help": tofu.HELD_OUT_HELP})
    authors: int = field(default=17, metadata={"help": "Authors in the corpus of our own."})
    max_new_tokens: int = field(default=200, metadata={"help": "Longest generation in the evaluation, in tokens."})
    embedding_model: str | None = field(
        default=None,
        metadata={"help": "Sentence embeddings for SOUL's accuracy: sentence-transformers/paraphrase-MiniLM-L6-v2."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.requests and self.num_requests:
            raise ValueError("`requests` names splits and `num_requests` parts of one: give one of the two.")
        if self.num_requests is not None and self.num_requests < 1:
            raise ValueError(f"`num_requests` must be at least 1, but it is {self.num_requests}.")
        for name in ("forget_split", "retain_split", "holdout_split", "requests"):
            if getattr(self, name) and not self.dataset:
                raise ValueError(
                    f"`{name}` (--{name}) needs `dataset` (--dataset): the corpus of our own has one split."
                )
        if self.requests and not self.forget_split:
            # The last has the most rows: its rows and those of its gold model are those that are asked.
            self.forget_split = self.requests.split(",")[-1]


def load_rows(experiment: Experiment) -> TofuRows:
    """The rows of the dataset, or those of a corpus of our own."""
    args, config = experiment.arguments[0], experiment.config
    dataset, splits = args.dataset, OWN_SPLITS
    if dataset is None:
        dataset = write_own_corpus(experiment.folder, args.authors, config.seed, config.overwrite)
    else:
        splits = paired_splits(args.forget_split, args.retain_split)
    return TofuRows(dataset, *splits, args.held_out_rows, args.max_retain_rows, args.holdout_split)


def make_task(experiment: Experiment, rows: TofuRows) -> UnlearningTask:
    """What to forget, of which model; a small one and its gold standard are trained if none is named."""
    (args, small), config = experiment.arguments, experiment.config
    target, gold = args.model, args.gold
    if not target:
        template = config.prompt_template
        target, gold = small_models(rows.learnt(), experiment.folder, small, config.seed, template, config.use_cpu)
    asked = {"max_new_tokens": args.max_new_tokens, "non_members": rows.holdout_split}
    asked |= {"embedding_model": args.embedding_model} if args.embedding_model else {}
    return UnlearningTask(
        suite="tofu",
        title="Unlearning fictitious authors",
        target=target,
        gold=gold,
        forget=rows.forget,
        retain=rows.retain,
        rows=tofu.unscored_rows(rows.asked),
        asked=asked,
        names=rows.names,
    )


def main(command_line: list[str] | None = None) -> None:
    """Runs the recipe."""
    kinds = (TofuArguments, SmallModelArguments)
    experiment = Experiment("tofu", CONFIGS, *kinds, command_line=command_line, with_control=True)
    args, rows = experiment.arguments[0], load_rows(experiment)
    requests = rows.requests(args.requests.split(",")) if args.requests else None
    if args.num_requests:
        requests = rows.author_requests(args.num_requests)
    task = make_task(experiment, rows)
    if requests:
        # The requests bring their own rows to forget.
        task.rows = [row for row in task.rows if row["split"] != "forget"]
        run_requests(experiment, task, requests)
    else:
        experiment.run(task)


if __name__ == "__main__":
    sys.exit(run_script(main))
