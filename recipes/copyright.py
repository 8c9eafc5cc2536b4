"""
Makes a model forget a text that it knows by heart, and reports how much of it still leaks after a prompt.

    accelerate launch recipes/copyright.py                                        # a tale of our own, two CPU cores
    python recipes/finetune.py --config recipes/configs/finetune/copyright.yaml \
        --dataset book.txt other.txt --model HUB_ID --model_dir target            # makes the model that knows it
    accelerate launch recipes/copyright.py --dataset book.txt --retain_text other.txt --model target-... --gold HUB_ID

As in Jia et al. (2024, SOUL): the model goes on after prompts of 100 and 300 tokens of the text. Without `--model`, a
small target learns both texts from scratch, and a gold standard the one that is kept; prompts are shorter then.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from soul_eval.console import run_script
from soul_eval.experiment import ExperimentArguments, UnlearningTask
from soul_eval.report import Run
from soul_eval.suites import copyright as suite
from soul_recipes.hub_layout import json_lines
from soul_recipes.learnt_rows import ChunkArguments, first_texts
from soul_recipes.refusals import RefusingExperiment
from soul_recipes.small_llama import SmallModelArguments
from soul_recipes.small_models import small_models
from soul_trainer.chunks import chunk_texts
from soul_trainer.objectives import FORGET_LOSSES
from soul_trainer.records import OWNER_ONLY, public_name, write_whole
from soul_trainer.sources import load_texts


CONFIGS, TALES = Path(__file__).parent / "configs", Path(__file__).parent / "tales"
# The small models read each text three times a pass, without so many words at its start: cut at other places, it is
# known from any place on, as a text is that a large model has met in many forms.
LEFT_OUT = (0, 7, 14)


@dataclass
class CopyrightTaskArguments(ExperimentArguments):
    """What to forget, what to keep, and what is asked."""

    dataset: str | None = field(
        default=None,
        metadata={"help": "The text to forget: a file, a folder of .txt files, or rows with a `text`; or our own."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset."})
    split: str = field(default="train", metadata={"help": "Split of a dataset."})
    retain_text: str | None = field(
        default=None, metadata={"help": "Text to keep, the same; needed with --dataset. SOUL has C4: allenai/c4."}
    )
    retain_config: str | None = field(default=None, metadata={"help": "Its configuration: en for C4."})
    retain_split: str = field(default="train", metadata={"help": "Its split."})
    max_retain_rows: int | None = field(
        default=None, metadata={"help": "Only its first texts; of a hub dataset, no more is downloaded."}
    )
    prompt_tokens: str = field(default="100,300", metadata={"help": "Lengths of prompts in tokens, by commas."})
    continuation_tokens: int = field(default=200, metadata={"help": "Tokens that are compared after a prompt."})
    num_samples: int = field(default=200, metadata={"help": "Passages that are asked of each text."})

    def __post_init__(self):
        super().__post_init__()
        if (self.dataset is None) != (self.retain_text is None):
            raise ValueError("`dataset` (--dataset) and `retain_text` (--retain_text) go together: give both or none.")
        if self.dataset is None:
            self.dataset = str(TALES / "the_lamp_on_harrow_point.txt")
            self.retain_text = str(TALES / "the_orchard_beyond_the_bridge.txt")

    def suite_arguments(self, retain_text: str | None = None, **changes) -> suite.CopyrightArguments:
        """Those of the suite."""
        asked = {
            name: getattr(self, name) for name in ("prompt_tokens", "continuation_tokens", "num_samples", "split")
        }
        texts = {"text": self.dataset, "config": self.dataset_config, "retain_text": retain_text}
        return suite.CopyrightArguments(**{**texts, **asked, **changes})


def training_rows(
    args: CopyrightTaskArguments,
    kept: str,
    chunks: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    forget_loss: str,
) -> dict[str, Dataset]:
    """
    Chunks of both texts or, for a loss that puts an answer of its own after a prompt, passages as they are asked: of
    the text to forget and, where it is the answers of the text to keep, of that as well.
    """
    if (objective := FORGET_LOSSES[forget_loss]) is None or objective.answers == "own":
        return chunks
    longest = max(args.suite_arguments().prompt_lengths())
    all_of_them = {"prompt_tokens": str(longest), "num_samples": max(map(len, chunks.values())) * 10**6}
    found, retain_text = dict(chunks), kept if objective.answers == "random" else None
    rows = suite.load(args.suite_arguments(retain_text, **all_of_them), tokenizer)
    for side in ("forget", "retain") if retain_text else ("forget",):
        passages = [row for row in rows if row["split"] == f"{side}_{longest}"]
        found[side] = Dataset.from_list([{"prompt": row["prompt"], "completion": row["answer"]} for row in passages])
    return found


def main(command_line: Sequence[str] | None = None) -> list[Run]:
    """Unlearns and reports."""
    dataclasses = (CopyrightTaskArguments, ChunkArguments, SmallModelArguments)
    experiment = RefusingExperiment("copyright", CONFIGS, *dataclasses, command_line=command_line)
    args, chunks, small = experiment.arguments
    config, folder = experiment.config, experiment.folder
    texts = {
        "forget": load_texts(args.dataset, args.dataset_config, args.split),
        "retain": first_texts(
            args.retain_text, args.retain_config, args.retain_split, args.max_retain_rows, "retain_text"
        ),
    }
    target, gold = args.model, args.gold
    if not target:
        learnt = {
            split: Dataset.from_dict({"text": [text.split(" ", n)[-1] for text in members for n in LEFT_OUT]})
            for split, members in texts.items()
        }
        target, gold = small_models(learnt, folder, small, config.seed, use_cpu=config.use_cpu, chunks=chunks)
    tokenizer = args.load_tokenizer(target)
    length = min(chunks.chunk_length, tokenizer.model_max_length)
    parts = {split: chunk_texts(members, tokenizer, length, chunks.chunk_overlap) for split, members in texts.items()}
    # What is asked of the text to keep is what is kept, and no other part of a large dataset.
    kept = folder / "retain_text.jsonl"
    if PartialState().is_main_process:
        write_whole(kept, json_lines([{"text": text} for text in texts["retain"]]), OWNER_ONLY)
    PartialState().wait_for_everyone()
    asked = args.suite_arguments(str(kept))
    task = UnlearningTask(
        suite="copyright",
        title="Unlearning a text",
        target=target,
        gold=gold,
        **training_rows(args, str(kept), parts, tokenizer, config.forget_loss),
        rows=suite.load(asked, tokenizer),
        asked=vars(asked),
        originals={split: [{"text": text} for text in members] for split, members in texts.items()},
        names={"forget": public_name(args.dataset), "retain": public_name(args.retain_text)},
    )
    return experiment.run(task)


if __name__ == "__main__":
    sys.exit(run_script(main))
