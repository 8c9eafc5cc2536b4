"""
Makes a model forget TOFU's fictitious authors, with a first- and a second-order optimizer, and reports what is left.

    accelerate launch recipes/tofu.py                                            # a corpus of our own, two CPU cores
    accelerate launch recipes/tofu.py --dataset DIR --forget_split forget05 --retain_split retain95
    accelerate launch recipes/tofu.py --dataset locuslab/TOFU --model HUB_ID --gold HUB_ID --optim soul

Without `--model`, a small target and a gold standard are trained from scratch; the next run finds them. Every flag of
`UnlearnConfig`, and so of `TrainingArguments`, works.
"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets, load_dataset
from fictitious_authors import make_corpus, write_hub_layout
from finetune import SmallModelArguments, small_models
from presets import PUBLISHED, SMALL_MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from soul_eval import report
from soul_eval.rows import make_header, read_rows, write_rows
from soul_eval.suites import tofu
from soul_eval.trajectory import TRAJECTORY_FILE, TrajectoryCallback
from soul_trainer import UnlearnConfig, UnlearnTrainer
from soul_trainer.records import run_settings


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
    max_new_tokens: int = field(default=96, metadata={"help": "Longest generation in the evaluation, in tokens."})


def parse(optimizer: str | None = None) -> tuple[TofuArguments, SmallModelArguments, UnlearnConfig]:
    """The command line, over defaults that depend on the model, the forget loss and the optimizer."""
    parser = HfArgumentParser((TofuArguments, SmallModelArguments, UnlearnConfig))
    defaults = PUBLISHED if given("model") else SMALL_MODEL
    parser.set_defaults(**defaults["common"])
    if optimizer:
        forget_loss = parser.parse_args().forget_loss
        parser.set_defaults(optim=optimizer, **defaults.get(optimizer, {}).get(forget_loss, {}))
    return parser.parse_args_into_dataclasses()


def given(flag: str) -> bool:
    """Whether the command line has a flag."""
    return any(argument.split("=")[0] == f"--{flag}" for argument in sys.argv[1:])


def load_rows(args: TofuArguments, folder: Path, seed: int) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """The rows that are learnt (`forget`, `retain`, `held_out`, `general`), and those that are asked, by split."""
    dataset, forget_split, retain_split = args.dataset, args.forget_split, args.retain_split
    if dataset is None:
        dataset, forget_split, retain_split = str(folder / f"data-{args.authors}-{seed}"), "forget", "retain"
        if PartialState().is_main_process:
            write_hub_layout(make_corpus(args.authors, seed=seed), dataset)
        PartialState().wait_for_everyone()
    asked = tofu.load_splits(dataset, forget_split, held_out_rows=args.held_out_rows)

    def load(config: str) -> Dataset:
        return load_dataset(dataset, config)["train"].select_columns(["question", "answer"])

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


def reference_run(role: str, model_name: str, folder: Path, ask) -> report.Run:
    """The target or the gold model in the report; its rows are kept for the next time."""
    path = folder / f"{role}-{Path(model_name).name.removeprefix(f'{role}-')}.rows.jsonl"
    if not path.exists():
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto").to(PartialState().device)
        write_rows(path, ask(model), make_header(model_name, {}, seed=0))
    rows = read_rows(path)[1]
    return report.Run(role, tofu.summarise(rows), rows, role=role)


def unlearn(
    args: TofuArguments, config: UnlearnConfig, target: str, learnt: dict[str, Dataset], gold, ask
) -> report.Run:
    """Unlearns with one optimizer, or finds it done with the same settings."""
    folder, name = Path(config.output_dir), OPTIMIZERS.get(config.optim.value, config.optim.value)
    rows_file, identity = folder / "rows.jsonl", {"target": target, **run_settings(config)}
    if rows_file.exists() and read_rows(rows_file)[0]["settings"] == identity and not config.overwrite:
        return read_run(folder, name, gold)
    model = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(target)
    trainer = UnlearnTrainer(model, config, learnt["forget"], learnt["retain"], tokenizer)
    rows: list[dict] = []

    def evaluate(model) -> dict:
        rows[:] = ask(model)
        return tofu.summarise(rows, gold)

    steps = config.max_steps if config.max_steps > 0 else config.num_train_epochs * len(trainer.get_train_dataloader())
    curve = TrajectoryCallback(
        evaluate, max(1, math.ceil(steps / config.gradient_accumulation_steps / args.evaluations))
    )
    trainer.add_callback(curve)
    output = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        seconds = (output.metrics["train_runtime"] - curve.seconds) / max(trainer.state.global_step, 1)
        write_rows(rows_file, rows, {**make_header(str(folder), identity, config.seed), "seconds_per_step": seconds})
    trainer.accelerator.wait_for_everyone()
    return read_run(folder, name, gold)


def read_run(folder: Path, name: str, gold: list[dict] | None) -> report.Run:
    """A finished run, from its files."""
    header, rows = read_rows(folder / "rows.jsonl")
    lines = (folder / TRAJECTORY_FILE).read_text(encoding="utf-8").splitlines()
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    settings = {**header["settings"], "seconds_per_step": header["seconds_per_step"]}
    return report.Run(name, tofu.summarise(rows, gold), rows, [json.loads(line) for line in lines], history, settings)


def main() -> None:
    args, small, config = parse()
    folder = Path(config.output_dir)
    learnt, asked = load_rows(args, folder, config.seed)
    target, gold_name = (args.model, args.gold) if args.model else small_models(learnt, folder, small, config.seed)
    tokenizer = AutoTokenizer.from_pretrained(target)

    def ask(model) -> list[dict]:
        return tofu.evaluate_model(model, tokenizer, asked, 64, config.prompt_template, args.max_new_tokens)

    before = reference_run("target", target, folder, ask)
    gold = reference_run("gold", gold_name, folder, ask) if gold_name else None
    for run in filter(None, [gold and before, gold]):
        run.summary = tofu.summarise(run.rows, gold.rows)
    runs = []
    for optimizer in [config.optim.value] if given("optim") else OPTIMIZERS:
        args, _, config = parse(optimizer)
        config.output_dir = str(folder / optimizer)
        runs.append(unlearn(args, config, target, learnt, gold and gold.rows, ask))
        card = Path(config.output_dir) / "README.md"
        report.add_to_model_card(card, report.model_card_section(runs[-1], before, gold))
    if PartialState().is_main_process:
        everyone = [before, *runs, *([gold] if gold else [])]
        report.write_report(folder, "Unlearning fictitious authors", everyone)
        print(f"\n{report.table(everyone)}\n\n{folder / 'report.html'} explains the figures and shows the curves.")


if __name__ == "__main__":
    main()
