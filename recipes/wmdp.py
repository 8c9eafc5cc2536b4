"""
Makes a model forget WMDP's biology and cybersecurity, with a first- and a second-order optimizer, and reports what is
left of that and of MMLU.

    accelerate launch recipes/wmdp.py                                            # inventions of our own, two CPU cores
    accelerate launch recipes/wmdp.py --forget_loss rmu
    accelerate launch recipes/wmdp.py --model HuggingFaceH4/zephyr-7b-beta --optim adamw_torch --general wmdp,mmlu

Without `--model`, a small target is trained from scratch on the corpora; the next run finds it. Every flag
of `UnlearnConfig`, and so of `TrainingArguments`, works; settings come from `recipes/configs/wmdp` or `--config FILE`.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets

from soul_eval.console import run_script
from soul_eval.experiment import Experiment, ExperimentArguments, UnlearningTask
from soul_eval.report import Run
from soul_eval.suites import wmdp
from soul_recipes.fictitious_science import CORPORA as OWN
from soul_recipes.fictitious_science import SUBJECTS, WMDP, write_corpora
from soul_recipes.small_llama import SmallModelArguments
from soul_recipes.small_models import small_models
from soul_recipes.wmdp_corpora import CORPORA, in_turns, load_corpus
from soul_trainer import UnlearnConfig


CONFIGS = Path(__file__).parent / "configs"


@dataclass
class WmdpRunArguments(ExperimentArguments):
    """What to forget, what to keep, and what is asked."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "The corpora: a folder of <corpus>.jsonl, as WMDP's own data/, a folder in the layout of "
            f"{CORPORA}, or a hub id; by default {CORPORA} with --model, and inventions of our own without."
        },
    )
    forget_corpora: str = field(
        default="bio-forget-corpus,cyber-forget-corpus", metadata={"help": "Corpora to forget, by commas."}
    )
    retain_corpora: str = field(default="wikitext", metadata={"help": "Corpora to keep, by commas."})
    min_characters: int = field(default=0, metadata={"help": "Texts of no more characters are left out."})
    max_rows: int | None = field(default=None, metadata={"help": "Only the first texts of each corpus."})
    questions: str = field(default="cais/wmdp", metadata={"help": "Hub id or folder of WMDP's questions."})
    subsets: str = field(default=",".join(WMDP), metadata={"help": "Configurations of them, by commas."})
    mmlu: str = field(default="cais/mmlu", metadata={"help": "Hub id or folder of MMLU, or none."})
    mmlu_subjects: str | None = field(default=None, metadata={"help": "Subjects of MMLU, by commas; by default all."})
    entries: int = field(default=8, metadata={"help": "Inventions of a topic of our own."})

    def use_own(self, folder: Path, seed: int, overwrite: bool) -> None:
        """Writes inventions of our own, and turns to them."""
        where = folder / f"data-{self.entries}-{seed}"
        if PartialState().is_main_process:
            write_corpora(where, self.entries, seed, overwrite)
        PartialState().wait_for_everyone()
        self.dataset, self.questions, self.mmlu = (str(where / name) for name in ("corpora", "wmdp", "mmlu"))
        self.mmlu_subjects = ",".join(SUBJECTS)

    def suite_arguments(self) -> wmdp.WmdpArguments:
        """Those of the suite."""
        return wmdp.WmdpArguments(
            dataset=self.questions, subsets=self.subsets, mmlu=self.mmlu, mmlu_subjects=self.mmlu_subjects
        )

    def load(self, corpora: str) -> list[Dataset]:
        """Texts of each of the corpora that are named."""
        names = [name.strip() for name in corpora.split(",")]
        return [load_corpus(name, self.dataset or CORPORA, self.min_characters, self.max_rows) for name in names]


def ordered(topics: list[Dataset], config: UnlearnConfig) -> Dataset:
    """Rows of all topics: in turns, if nothing shuffles them."""
    if config.train_sampling_strategy != "sequential":
        return concatenate_datasets(topics)
    return in_turns(
        topics, config.per_device_train_batch_size * config.world_size * config.gradient_accumulation_steps
    )


def main(command_line: Sequence[str] | None = None) -> list[Run]:
    """Unlearns and reports."""
    experiment = Experiment("wmdp", CONFIGS, WmdpRunArguments, SmallModelArguments, command_line=command_line)
    args, small = experiment.arguments
    config, folder = experiment.config, experiment.folder
    if not args.model:
        args.use_own(folder, config.seed, config.overwrite)
    asked = args.suite_arguments()
    rows = wmdp.load_questions(asked)
    topics, retain = args.load(args.forget_corpora), concatenate_datasets(args.load(args.retain_corpora))
    target = args.model
    if not target:
        named = f"{args.forget_corpora},{args.retain_corpora}".split(",")
        learnt = {name: load_corpus(name, args.dataset) for name in OWN.values() if name not in named}
        learnt |= {"forget": concatenate_datasets(topics), "retain": retain}
        target, _ = small_models(learnt, folder, small, config.seed, use_cpu=config.use_cpu, with_gold=False)
    task = UnlearningTask(
        suite="wmdp",
        title="Unlearning hazardous knowledge",
        target=target,
        forget=ordered(topics, config),
        retain=retain,
        rows=rows,
        asked=asdict(asked),
        names={"forget": args.forget_corpora, "retain": args.retain_corpora},
    )
    return experiment.run(task)


if __name__ == "__main__":
    sys.exit(run_script(main))
