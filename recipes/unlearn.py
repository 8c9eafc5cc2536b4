"""
Makes a model forget rows of your own, and reports what it said before and what it says now: a removal request.

    accelerate launch recipes/unlearn.py --model DIR --forget forget.jsonl --retain retain.jsonl
    accelerate launch recipes/unlearn.py --model DIR --forget forget.csv       # the model writes retain rows itself
    accelerate launch recipes/unlearn.py --model HUB_ID --forget ID:CONFIG:SPLIT --retain ID --held_out DIR
    accelerate launch recipes/unlearn.py                                       # invented authors, two CPU cores

Rows are question/answer, prompt/completion, messages or text, in JSON, JSON lines, CSV, Parquet or text files, a
folder or a dataset of the hub. SOUL is the optimizer, unless `--optim` names another. Every flag of `UnlearnConfig`,
and so of `TrainingArguments`, works; settings come from `recipes/configs/unlearn` or `--config FILE`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset

from soul_eval.console import run_script
from soul_eval.experiment import Experiment, ExperimentArguments, UnlearningTask
from soul_eval.levels import OTHER_ANSWERS
from soul_eval.report import Run
from soul_eval.suites import own
from soul_recipes.fictitious_authors import make_corpus
from soul_recipes.hub_layout import json_lines
from soul_recipes.learnt_rows import ChunkArguments, tokenized
from soul_recipes.own_rows import SampledRetainArguments, sampled_retain, without_shared
from soul_recipes.small_llama import SmallModelArguments
from soul_recipes.small_models import small_models
from soul_trainer.records import OWNER_ONLY, public_name, write_whole
from soul_trainer.sources import row_columns


CONFIGS = Path(__file__).parent / "configs"
# What a small model learns before it must forget.
LEARNT = (own.FORGET, own.RETAIN, own.HELD_OUT)


@dataclass
class UnlearnArguments(ExperimentArguments):
    """What to forget, what to keep, and what is asked."""

    forget: str | None = field(
        default=None, metadata={"help": "Rows to forget: file, folder or hub id; by default invented authors."}
    )
    retain: str | None = field(
        default=None, metadata={"help": "Rows to keep; by default the model writes some itself, before unlearning."}
    )
    held_out: str | None = field(
        default=None, metadata={"help": "Rows that the model knows and unlearning never sees: its cost elsewhere."}
    )
    general_text: str | None = field(
        default=None, metadata={"help": "Texts that no training has seen: what unlearning costs the language itself."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of datasets on the hub."})
    authors: int = field(default=17, metadata={"help": "Authors in the corpus of our own."})
    max_rows: int = field(default=400, metadata={"help": "Rows of retain and held_out that are asked; forget: all."})
    prompt_tokens: int = field(default=100, metadata={"help": "Tokens of a text that the model goes on from."})
    max_new_tokens: int = field(default=200, metadata={"help": "Longest answer in the evaluation, in tokens."})
    embedding_model: str | None = field(
        default=None,
        metadata={"help": "Sentence embeddings for the accuracy of rows to forget with a column perturbed_answer."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.dataset:
            raise ValueError("`dataset` (--dataset) is no flag here: name the rows with --forget and --retain.")
        if (self.forget is None) != (self.model is None):
            raise ValueError("`forget` (--forget) and `model` (--model) go together: give both, or none for a look.")
        if not self.forget and (self.retain or self.held_out or self.general_text):
            raise ValueError("`retain`, `held_out` and `general_text` need `forget` (--forget): which rows must go?")

    def suite_arguments(self, sources: dict[str, str]) -> own.OwnArguments:
        """Those of the suite."""
        names = ("dataset_revision", "max_rows", "prompt_tokens", "max_new_tokens", "embedding_model")
        asked = {name: getattr(self, name) for name in names}
        return own.OwnArguments(**sources, **asked)


def write_small_corpus(folder: Path, num_authors: int, seed: int) -> dict[str, str]:
    """Writes invented authors as a user's files would be, and returns their paths by split."""
    paths = {split: folder / f"authors-{num_authors}-{seed}" / f"{split}.jsonl" for split in LEARNT}
    if PartialState().is_main_process:
        corpus = make_corpus(num_authors, seed=seed)
        for split, path in paths.items():
            rows = [{"question": row["question"], "answer": row["answer"]} for row in corpus[split]]
            write_whole(path, json_lines(rows), OWNER_ONLY)
    PartialState().wait_for_everyone()
    return {split: str(path) for split, path in paths.items()}


def learnt(rows: Dataset, tokenizer, chunks: ChunkArguments, longest: int, split: str) -> Dataset:
    """Rows as training takes them: long texts in chunks, so that nothing of them is cut off."""
    columns = row_columns(rows, split)
    if columns == ["text"]:
        return tokenized(rows, tokenizer, chunks, longest, name=split)
    kept = {"alternate", *OTHER_ANSWERS}.intersection(rows.column_names)
    return rows.select_columns([*columns, *sorted(kept)])


def main(command_line: Sequence[str] | None = None) -> list[Run]:
    """Unlearns and reports."""
    dataclasses = (UnlearnArguments, SampledRetainArguments, ChunkArguments, SmallModelArguments)
    experiment = Experiment("unlearn", CONFIGS, *dataclasses, command_line=command_line)
    args, sampling, chunks, small = experiment.arguments
    config, folder, notes = experiment.config, experiment.folder, []
    if args.forget:
        target, gold = args.model, args.gold
        named = {split: getattr(args, split) for split in own.SPLITS}
        sources = {split: source for split, source in named.items() if source}
    else:
        sources = write_small_corpus(folder, args.authors, config.seed)
        corpus = own.load_splits(own.OwnArguments(**sources))
        target, gold = small_models(corpus, folder, small, config.seed, config.prompt_template, config.use_cpu)
    tokenizer = args.load_tokenizer(target)
    if "retain" not in sources:
        forget = own.load(sources["forget"], args.dataset_revision, "forget")
        written, note = sampled_retain(target, tokenizer, forget, sampling, config, folder, args)
        sources, notes = written | sources, [note]
    asked = args.suite_arguments(sources)
    splits, left_out = without_shared(own.load_splits(asked))
    longest = min(config.max_length or tokenizer.model_max_length, tokenizer.model_max_length)
    train = {split: learnt(splits[split], tokenizer, chunks, longest, split) for split in ("forget", "retain")}
    task = UnlearningTask(
        suite="own",
        title="Unlearning on request",
        target=target,
        gold=gold,
        **train,
        held_out=splits.get("held_out"),
        rows=own.unscored_rows(splits, tokenizer, asked),
        asked=vars(asked),
        originals={split: splits[split] for split in train},
        names={split: public_name(sources[split]) for split in train},
        notes=[f"Rows to forget: {len(splits['forget'])}. Rows to keep: {len(splits['retain'])}.", *notes, *left_out],
    )
    runs = experiment.run(task)
    if PartialState().is_main_process:
        print("\n".join(f"The model is in {folder / optimizer}." for optimizer in experiment.optimizers))
    return runs


if __name__ == "__main__":
    sys.exit(run_script(main))
