"""
Makes a model forget TOFU's fictitious authors, with a first- and a second-order optimizer, and reports what is left.

    accelerate launch recipes/tofu.py                                            # a corpus of our own, two CPU cores
    accelerate launch recipes/tofu.py --dataset DIR --forget_split forget05 --retain_split retain95
    accelerate launch recipes/tofu.py --dataset locuslab/TOFU --model HUB_ID --gold HUB_ID --optim soul

Without `--model`, a small target and a gold standard are trained from scratch; the next run finds them. Every flag of
`UnlearnConfig`, and so of `TrainingArguments`, works.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from fictitious_authors import make_corpus
from hub_layout import write_hub_layout
from presets import PUBLISHED, SMALL_MODEL
from small_llama import SmallModelArguments
from small_models import small_models
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from soul_eval.comparison import Comparison
from soul_eval.suites import tofu
from soul_eval.suites.sources import load_split
from soul_trainer import UnlearnConfig, UnlearnTrainer
from soul_trainer.config import SOPHIA_NAMES


OPTIMIZERS = {"adamw_torch": "AdamW", "soul": "SOUL"}


@dataclass
class TofuArguments:
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
    model: str | None = field(default=None, metadata={"help": "The model that must forget: hub id or folder."})
    gold: str | None = field(default=None, metadata={"help": "The model that never learnt it, for forget quality."})
    evaluations: int = field(default=4, metadata={"help": "Evaluations after the start of a run, for the curves."})
    max_new_tokens: int = field(default=200, metadata={"help": "Longest generation in the evaluation, in tokens."})


def parse(optimizer: str | None = None) -> tuple[TofuArguments, SmallModelArguments, UnlearnConfig]:
    """The command line, over defaults that depend on the model, the forget loss and the optimizer."""
    # Without abbreviations, which `given` would miss.
    parser = HfArgumentParser((TofuArguments, SmallModelArguments, UnlearnConfig), allow_abbrev=False)
    presets = PUBLISHED if given("model") else SMALL_MODEL
    parser.set_defaults(**presets["common"])
    if optimizer:
        forget_loss = parser.parse_args().forget_loss
        by_loss = presets["soul" if optimizer in SOPHIA_NAMES else "adamw_torch"]
        parser.set_defaults(optim=optimizer, **by_loss.get(forget_loss, by_loss["default"]))
    return parser.parse_args_into_dataclasses()


def given(flag: str) -> bool:
    """Whether the command line has a flag."""
    return any(argument.split("=")[0] == f"--{flag}" for argument in sys.argv[1:])


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


def fingerprint(*parts: dict[str, Dataset]) -> str:
    """A short hash of rows."""
    rows = [{split: dataset.to_list() for split, dataset in part.items()} for part in parts]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def main() -> None:
    args, small, config = parse()
    if args.gold and not args.model:
        raise ValueError("--gold needs --model: without it, both are trained here.")
    _ = config.device  # accelerate's state is made by the first who asks, and must know of --use_cpu
    folder, template = Path(config.output_dir), config.prompt_template
    learnt, asked = load_rows(args, folder, config.seed, config.overwrite)
    if args.model:
        target, gold = args.model, args.gold
    else:
        target, gold = small_models(learnt, folder, small, config.seed, template, config.use_cpu)
    tokenizer = AutoTokenizer.from_pretrained(target)

    settings = {"data": fingerprint(learnt), "prompt_template": template}
    rows, how = tofu.unscored_rows(asked), {"max_new_tokens": args.max_new_tokens}
    comparison = Comparison(folder, target, gold, "tofu", rows, how, settings, config)
    for optimizer in [config.optim.value] if given("optim") else OPTIMIZERS:
        config = parse(optimizer)[2]
        config.output_dir = str(folder / optimizer)

        def make_trainer(config: UnlearnConfig = config) -> UnlearnTrainer:
            model = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
            watched = {"forget": learnt["forget"]}
            return UnlearnTrainer(model, config, learnt["forget"], learnt["retain"], tokenizer, watched)

        comparison.unlearn(OPTIMIZERS.get(optimizer, optimizer), config, make_trainer, args.evaluations)
    comparison.write_report("Unlearning fictitious authors")


if __name__ == "__main__":
    main()
