"""
Makes a model turn down what it answered harmfully, and reports how toxic its answers are before and after.

    accelerate launch recipes/detox.py                                    # a corpus of our own, two CPU cores
    accelerate launch recipes/detox.py --model facebook/opt-1.3b          # SOUL's run; by --config, LLaMA2-7B's
    accelerate launch recipes/detox.py --model HUB_ID --dataset rows.jsonl --retain_text texts.jsonl

As in Jia et al. (2024, SOUL): 200 unsafe responses of PKU-SafeRLHF are what must be forgotten, refusals take their
place, C4 is what is kept, and toxic-bert judges what the model says to the prompts of the test split. Without
`--model`, a small target learns rude answers from scratch, a gold standard polite ones, and small classifiers judge.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset

from soul_eval.classification import TOXICITY_MODEL
from soul_eval.console import run_script
from soul_eval.experiment import ExperimentArguments, UnlearningTask
from soul_eval.report import Run
from soul_eval.suites import detox as suite
from soul_recipes.hub_layout import json_lines
from soul_recipes.learnt_rows import first_texts
from soul_recipes.refusals import RefusingExperiment
from soul_recipes.rude_townsfolk import make_corpus, write_corpus
from soul_recipes.small_classifier import train_classifier
from soul_recipes.small_llama import SmallModelArguments
from soul_recipes.small_models import small_models
from soul_trainer.records import OWNER_ONLY, public_name, write_whole
from soul_trainer.sources import load_split


CONFIGS = Path(__file__).parent / "configs"
HELD_OUT = 0.1  # of the text to keep: the model is asked about it, and unlearning does not see it
REPEATS = 12
RESPONSES = (("response_0", "is_response_0_safe"), ("response_1", "is_response_1_safe"))


@dataclass
class DetoxTaskArguments(ExperimentArguments):
    """What to forget, what to keep, and who judges."""

    dataset: str | None = field(
        default=None,
        metadata={"help": "Rows in PKU-SafeRLHF's columns; by default those, or a corpus of our own without --model."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of it."})
    forget_rows: int = field(default=200, metadata={"help": "Unsafe responses to forget, drawn from the train split."})
    retain_text: str | None = field(
        default=None, metadata={"help": "Text to keep: a file, a folder, or rows with a `text`; by default C4."}
    )
    retain_config: str | None = field(default=None, metadata={"help": "Configuration of it."})
    max_retain_rows: int = field(default=2000, metadata={"help": "Only its first texts; no more is downloaded."})
    prompts: str = field(default="all", metadata={"help": "What is asked: all prompts of the test split, or unsafe."})
    num_prompts: int | None = field(default=None, metadata={"help": "So many of them, spread evenly."})
    max_new_tokens: int = field(default=200, metadata={"help": "Longest answer, in tokens."})
    classifier: str | None = field(
        default=None, metadata={"help": f"Of toxic text; by default {TOXICITY_MODEL}, or a small one without --model."}
    )
    fluency_classifier: str | None = field(default=None, metadata={"help": "Of gibberish; by default none is asked."})


def responses(rows: Dataset, is_safe: bool) -> Dataset:
    """Prompts with their safe or with their unsafe responses, as questions and answers."""
    return Dataset.from_list(
        [
            {"question": row["prompt"], "answer": row[response]}
            for row in rows
            for response, flag in RESPONSES
            if row[flag] == is_safe
        ]
    )


def small_classifiers(folder: Path, args: DetoxTaskArguments, seed: int, use_cpu: bool) -> None:
    """Names classifiers of toxic and of garbled text, trained on a corpus of other people, where none is named."""
    corpus = make_corpus(240, seed + 1)
    rows = Dataset.from_list(corpus["default"]["train"])
    refusals = (Path(__file__).parent / "refusals" / "detox.txt").read_text(encoding="utf-8").splitlines()
    rude, told = (responses(rows, is_safe)["answer"][:] for is_safe in (False, True))
    # There are few refusals, and much is said in their words: sensible or not.
    polite = told + [row["text"] for row in corpus["text"]["train"]] + REPEATS * refusals
    rng, words = random.Random(seed), " ".join(refusals).split()
    # An answer may end at its limit, which does not make it garbled.
    clean = rude + polite + [text[: len(text) * 2 // 3] for text in rude + polite]
    garbled = [" ".join(rng.choices(text.split(), k=len(text.split()))) for text in rude + polite]
    garbled += [" ".join(rng.choices(words, k=rng.randint(5, 14))) for _ in range(2 * REPEATS * len(refusals))]
    args.classifier = args.classifier or train_classifier(
        {"toxic": rude, "neutral": polite}, folder / "small_toxicity_classifier", seed, use_cpu
    )
    args.fluency_classifier = args.fluency_classifier or train_classifier(
        {"clean": clean, "garbled": garbled}, folder / "small_fluency_classifier", seed, use_cpu
    )


def main(command_line: Sequence[str] | None = None) -> list[Run]:
    """Unlearns and reports."""
    experiment = RefusingExperiment(
        "detox", CONFIGS, DetoxTaskArguments, SmallModelArguments, command_line=command_line
    )
    args, small = experiment.arguments
    config, folder = experiment.config, experiment.folder
    title, kept = "Detoxification", ("allenai/c4", "en")
    if not (args.model or args.dataset):
        corpus = str(folder / f"data-{config.seed}")
        if PartialState().is_main_process:
            write_corpus(corpus, args.forget_rows, config.seed, config.overwrite)
        PartialState().wait_for_everyone()
        args.dataset, args.dataset_config, kept = corpus, "default", (corpus, "text")
        title += "" if args.classifier else ", judged by a small classifier of our own"
        small_classifiers(folder, args, config.seed, config.use_cpu)
    kept = (args.retain_text, args.retain_config) if args.retain_text else kept
    dataset = args.dataset or suite.DetoxArguments.dataset
    rows = load_split(dataset, args.dataset_config, columns=("prompt", *(name for pair in RESPONSES for name in pair)))
    forget = responses(rows, is_safe=False).shuffle(config.seed)
    forget = forget.select(range(min(args.forget_rows, len(forget))))
    texts = first_texts(*kept, "train", args.max_retain_rows, "retain_text")
    if len(texts) < 1 / HELD_OUT:
        raise ValueError(
            f"`retain_text`={kept[0]!r} has {len(texts)} texts, but at least {1 / HELD_OUT:.0f} are needed, a tenth "
            "to ask about: give a `text` to each row."
        )
    retain, held_out = Dataset.from_dict({"text": texts}).train_test_split(HELD_OUT, shuffle=False).values()
    asked_text = folder / "held_out_text.jsonl"
    if PartialState().is_main_process:
        write_whole(asked_text, json_lines(held_out.to_list()), OWNER_ONLY)
    PartialState().wait_for_everyone()
    target, gold = args.model, args.gold
    if not target:
        learnt = {"forget": forget, "retain": retain, "gold": responses(rows, is_safe=True)}
        target, gold = small_models(learnt, folder, small, config.seed, config.prompt_template, config.use_cpu)
    names = ("prompts", "num_prompts", "max_new_tokens", "fluency_classifier")
    asked = suite.DetoxArguments(
        dataset=dataset,
        config=args.dataset_config,
        classifier=args.classifier or TOXICITY_MODEL,
        retain_text=str(asked_text),
        **{name: getattr(args, name) for name in names},
    )
    task = UnlearningTask("detox", title, target, forget, retain, suite.load(asked), vars(asked), gold)
    task.names = {"forget": public_name(dataset), "retain": public_name(kept[0])}
    return experiment.run(task)


if __name__ == "__main__":
    sys.exit(run_script(main))
