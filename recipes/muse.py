"""
Makes a model forget MUSE's news or books, with a first- and a second-order optimizer, and reports what is left.

    accelerate launch recipes/muse.py                                      # articles of our own, two CPU cores
    accelerate launch recipes/muse.py --requests sust                      # four requests, one after the other
    accelerate launch recipes/muse.py --dataset muse-bench/MUSE-News --model muse-bench/MUSE-News_target \
        --gold muse-bench/MUSE-News_retrain --tokenizer meta-llama/Llama-2-7b-hf

Without `--model`, a small target and a gold standard are trained from scratch; the next run finds them. Every flag of
`UnlearnConfig`, and so of `TrainingArguments`, works; settings come from `recipes/configs/muse` or `--config FILE`.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from fictitious_news import FOLDS, write_corpus
from small_llama import SmallModelArguments
from small_models import small_models
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from soul_eval.continual import Request, run_requests
from soul_eval.experiment import Experiment, ExperimentArguments, UnlearningTask, fingerprint
from soul_eval.suites import muse
from soul_eval.suites.sources import load_rows
from soul_trainer.chunks import chunk_texts


CONFIGS = Path(__file__).parent / "configs"
REQUESTS = ("once", "scal", "sust")
# What MUSE joins texts with before it cuts them.
SEPARATOR = "\n\n"


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
    revision: str | None = field(default=None, metadata={"help": "Revision of a dataset on the hub."})
    requests: str = field(
        default="once",
        metadata={
            "help": "once: the forget set; scal: forget sets of growing size, each from the target; sust: disjoint "
            "ones in sequence, each from the last model.",
            "choices": REQUESTS,
        },
    )
    retain_split: str = field(default="retain1", metadata={"help": "Split of `raw` that is kept meanwhile."})
    articles: int = field(default=10, metadata={"help": "Articles of a split of our own news."})
    knowmem_tokens: int = field(default=32, metadata={"help": "Longest answer to a question, in tokens."})
    verbmem_tokens: int = field(default=128, metadata={"help": "Longest continuation of a text, in tokens."})
    prompt_tokens: int = field(
        default=200, metadata={"help": "Tokens of a text that it must be continued from, at most a third (sust)."}
    )


class Texts:
    """The texts of a run: MUSE's rows by configuration and split, and what a model trains on of them."""

    def __init__(self, args: MuseRunArguments, folder: Path, seed: int, overwrite: bool):
        self.args, self.dataset = args, args.dataset
        if self.dataset is None:
            self.dataset = str(folder / f"data-{args.articles}-{seed}")
            if PartialState().is_main_process:
                write_corpus(self.dataset, args.articles, seed, overwrite)
            PartialState().wait_for_everyone()

    def load(self, config: str, split: str) -> list[str]:
        """The texts of a split."""
        return [row["text"] for row in load_rows(self.dataset, config, split, ("text",), self.args.revision)]

    def chunks(self, config: str, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
        """The texts of a split as MUSE cuts them."""
        length = max_length or tokenizer.model_max_length
        return chunk_texts(self.load(config, split), tokenizer, length, separator=SEPARATOR)

    def learnt(self) -> dict[str, Dataset]:
        """What small models learn, by split."""
        forget = self.load("raw", "forget")
        parts = {
            "forget": forget,
            "retain": self.load("raw", self.args.retain_split),
            "general": [*self.load("train", "forget")[len(forget) :], *self.load("raw", "retain2")],
        }
        return {split: Dataset.from_dict({"text": texts}) for split, texts in parts.items()}

    def continuations(self, fold: int, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> list[dict]:
        """Rows of verbatim memorization about the longest texts of a fold, which MUSE has only for the first."""
        rows = []
        for text in sorted(self.load("sust", FOLDS[fold]), key=len)[-num_rows:]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            start = min(self.args.prompt_tokens, len(ids) // 3)
            prompt, answer = (
                tokenizer.decode(part) for part in (ids[:start], ids[start : start + self.args.verbmem_tokens])
            )
            place = {"split": muse.VERBMEM, "index": fold * num_rows + len(rows)}
            rows.append({**place, "prompt": prompt, "answer": answer, "end": tokenizer.eos_token})
        return rows


def run_growing(experiment: Experiment, task: UnlearningTask, forget_sets: dict[str, Dataset]) -> None:
    """Unlearns forget sets of growing size, each from the target."""
    comparison = experiment.compare(replace(task, settings={"forget sets": fingerprint(forget_sets)}))
    for optimizer, label in experiment.optimizers.items():
        for name, forget in forget_sets.items():
            config = experiment.settings(optimizer)
            config.output_dir += f"-{name}"
            config.run_name += f"-{name}"
            make_trainer = partial(experiment.make_trainer, replace(task, forget=forget), config)
            comparison.unlearn(f"{label}, {name}", config, make_trainer, experiment.arguments[0].evaluations)
    comparison.write_report(task.title)


def main(command_line: list[str] | None = None) -> None:
    experiment = Experiment("muse", CONFIGS, MuseRunArguments, SmallModelArguments, command_line=command_line)
    args, small = experiment.arguments
    config, folder = experiment.config, experiment.folder
    texts = Texts(args, folder, config.seed, config.overwrite)
    target, gold = args.model, args.gold
    if not target:
        target, gold = small_models(texts.learnt(), folder, small, config.seed, use_cpu=config.use_cpu)
    tokenizer = AutoTokenizer.from_pretrained(target)
    asked = {"dataset": texts.dataset, "revision": args.revision}
    asked |= {"knowmem_tokens": args.knowmem_tokens, "verbmem_tokens": args.verbmem_tokens}
    rows = muse.SUITE.load(muse.MuseArguments(**asked), tokenizer)

    def chunks(source: str, split: str) -> Dataset:
        return texts.chunks(source, split, tokenizer, config.max_length)

    forget, retain = chunks("raw", "forget"), chunks("raw", args.retain_split)
    task = UnlearningTask("muse", "Unlearning news", target, forget, retain, rows, asked, gold)
    if args.requests == "scal":
        run_growing(experiment, task, {fold: chunks("scal", fold) for fold in FOLDS})
    elif args.requests == "sust":
        of_first = [row for row in rows if row["split"].endswith("_forget")]
        num_rows = sum(row["split"] == muse.VERBMEM for row in rows)
        requests = [Request(FOLDS[0], forget, of_first)]
        for place, fold in enumerate(FOLDS[1:], 1):
            requests.append(Request(fold, chunks("sust", fold), texts.continuations(place, tokenizer, num_rows)))
        run_requests(experiment, replace(task, rows=[row for row in rows if row not in of_first]), requests)
    else:
        experiment.run(task)


if __name__ == "__main__":
    main()
