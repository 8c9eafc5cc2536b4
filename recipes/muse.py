"""
Makes a model forget MUSE's news or books, with a first- and a second-order optimizer, and reports what is left.

    accelerate launch recipes/muse.py                                      # articles of our own, two CPU cores
    accelerate launch recipes/muse.py --requests sust                      # four requests, one after the other
    accelerate launch recipes/muse.py --dataset muse-bench/MUSE-News --model muse-bench/MUSE-News_target \
        --gold muse-bench/MUSE-News_retrain

Without `--model`, a small target and a gold standard are trained from scratch; the next run finds them. Every flag of
`UnlearnConfig`, and so of `TrainingArguments`, works; settings come from `recipes/configs/muse` or `--config FILE`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset

from soul_eval.console import run_script
from soul_eval.continual import Request, run_requests
from soul_eval.experiment import Experiment, ExperimentArguments, UnlearningTask, fingerprint
from soul_eval.report import Run
from soul_eval.suites import muse
from soul_recipes.fictitious_news import FOLDS, write_corpus
from soul_recipes.muse_texts import MuseTexts
from soul_recipes.small_llama import SmallModelArguments
from soul_recipes.small_models import small_models
from soul_trainer.records import public_name
from soul_trainer.settings import check_choice


CONFIGS = Path(__file__).parent / "configs"
TITLES = {
    "once": "Unlearning texts",
    "scal": "Unlearning forget sets of growing size",
    "sust": "Unlearning one request after the other",
}


@dataclass
class MuseRunArguments(ExperimentArguments):
    """What to forget, and which model must."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Hub id (muse-bench/MUSE-News, muse-bench/MUSE-Books), a folder in its layout, or MUSE's own "
            "data/news; by default articles of our own."
        },
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a dataset on the hub."})
    requests: str = field(
        default="once",
        metadata={
            "help": "once: the forget set; scal: forget sets of growing size, each from the target; sust: disjoint "
            "ones in sequence, each from the last model.",
        },
    )
    retain_split: str = field(default="retain1", metadata={"help": "Split of `raw` that is kept meanwhile."})
    articles: int = field(default=10, metadata={"help": "Articles of a split of our own news."})
    knowmem_tokens: int = field(default=32, metadata={"help": "Longest answer to a question, in tokens."})
    verbmem_tokens: int = field(default=128, metadata={"help": "Longest continuation of a text, in tokens."})
    prompt_tokens: int = field(
        default=200, metadata={"help": "Tokens of a text that it must be continued from, at most a third (sust)."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_choice("requests", self.requests, TITLES)


def make_texts(args: MuseRunArguments, folder: Path, seed: int, overwrite: bool) -> MuseTexts:
    """The texts that are named or, without, articles of our own."""
    if args.dataset:
        return MuseTexts(args.dataset, args.dataset_revision)
    dataset = str(folder / f"data-{args.articles}-{seed}")
    if PartialState().is_main_process:
        write_corpus(dataset, args.articles, seed, overwrite)
    PartialState().wait_for_everyone()
    return MuseTexts(dataset)


def run_growing(experiment: Experiment, task: UnlearningTask, forget_sets: dict[str, Dataset]) -> list[Run]:
    """Unlearns forget sets of growing size, each from the target."""
    with experiment.hold():
        return _run_growing(experiment, task, forget_sets)


def _run_growing(experiment: Experiment, task: UnlearningTask, forget_sets: dict[str, Dataset]) -> list[Run]:
    comparison = experiment.compare(replace(task, settings={"forget sets": fingerprint(forget_sets)}))
    for optimizer, label in experiment.optimizers.items():
        for name, forget in forget_sets.items():
            config = experiment.settings(optimizer)
            config.output_dir += f"-{name}"
            config.run_name += f"-{name}"
            if config.hub_model_id:
                config.hub_model_id += f"-{name}"
            make_trainer = partial(experiment.make_trainer, replace(task, forget=forget), config)
            comparison.unlearn(f"{label} {name}", config, make_trainer, experiment.arguments[0].evaluations)
    comparison.write_report(task.title)
    return comparison.runs


def main(command_line: Sequence[str] | None = None) -> list[Run]:
    """Unlearns and reports."""
    experiment = Experiment("muse", CONFIGS, MuseRunArguments, SmallModelArguments, command_line=command_line)
    args, small = experiment.arguments
    config, folder = experiment.config, experiment.folder
    texts = make_texts(args, folder, config.seed, config.overwrite)
    target, gold = args.model, args.gold
    if not target:
        target, gold = small_models(
            texts.learnt(args.retain_split), folder, small, config.seed, use_cpu=config.use_cpu
        )
    tokenizer = args.load_tokenizer(target)
    asked = {"dataset": texts.dataset, "dataset_revision": texts.revision}
    asked |= {"knowmem_tokens": args.knowmem_tokens, "verbmem_tokens": args.verbmem_tokens}
    rows = muse.SUITE.load(muse.MuseArguments(**asked), tokenizer)

    def chunks(source: str, split: str) -> Dataset:
        return texts.chunks(source, split, tokenizer, config.max_length)

    forget, retain = chunks("raw", "forget"), chunks("raw", args.retain_split)
    task = UnlearningTask("muse", TITLES[args.requests], target, forget, retain, rows, asked, gold)
    name = public_name(texts.dataset)
    task.names = {"forget": f"{name} forget", "retain": f"{name} {args.retain_split}"}
    if args.requests == "once":
        return experiment.run(task)
    if args.requests == "scal":
        return run_growing(experiment, task, {fold: chunks("scal", fold) for fold in FOLDS})
    of_first = [row for row in rows if row["split"].endswith("_forget")]
    num_rows = sum(row["split"] == muse.VERBMEM for row in rows)
    requests = [Request(FOLDS[0], chunks("sust", FOLDS[0]), of_first)]
    for fold, name in enumerate(FOLDS[1:], 1):
        asked_of = texts.continuations(fold, num_rows, tokenizer, args.prompt_tokens, args.verbmem_tokens)
        requests.append(Request(name, chunks("sust", name), asked_of))
    kept = [row for row in rows if not row["split"].endswith("_forget")]
    return [stage.run for stage in run_requests(experiment, replace(task, rows=kept), requests)]


if __name__ == "__main__":
    sys.exit(run_script(main))
