"""The rows of `unlearn.py`: a user's own, those of a small corpus, and retain rows that the model writes itself."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from soul_eval.experiment import fingerprint
from soul_eval.models import ModelArguments
from soul_recipes.hub_layout import json_lines
from soul_trainer import UnlearnConfig
from soul_trainer.engines import Engine
from soul_trainer.records import OWNER_ONLY, write_whole
from soul_trainer.sampling import SamplingConfig, SelfGenerated, self_generated_rows
from soul_trainer.sources import kind_of


logger = logging.get_logger(__name__)

# Of rows that the model wrote, each so-many-th is never trained on: it says what unlearning costs elsewhere.
HELD_OUT_EVERY = 5
SAMPLED = "retain.self_generated.jsonl", "held_out.self_generated.jsonl"


@dataclass
class SampledRetainArguments:
    """Retain rows that the model writes itself, where there are none."""

    sampled_rows: int = field(default=500, metadata={"help": "Rows that it writes; a fifth of them are held out."})
    sampled_kind: str = field(
        default="auto", metadata={"help": "question, text or, by default, what the rows to forget are."}
    )
    sampled_tokens: int = field(default=512, metadata={"help": "Longest question, answer or text that it writes."})
    temperature: float = field(default=1.0, metadata={"help": "Over 0; 1 is the model's own distribution."})
    forget_terms: str | None = field(
        default=None, metadata={"help": "Words, by commas, that none of its rows may have in it: names, for one."}
    )

    def __post_init__(self):
        if self.sampled_rows < HELD_OUT_EVERY:
            raise ValueError(f"`sampled_rows` must be at least {HELD_OUT_EVERY}, but it is {self.sampled_rows}.")


def without_shared(splits: dict[str, Dataset]) -> tuple[dict[str, Dataset], list[str]]:
    """
    Leaves rows to forget out of the other splits: a retain set is often all data.

    Returns:
        `tuple[dict[str, Dataset], list[str]]`: The splits, and what was left out, in sentences.

    Raises:
        ValueError: If no other row is left.
    """
    keys = {split: _keys(rows, split) for split, rows in splits.items()}
    unwanted, found, notes = set(keys.pop("forget")), dict(splits), []
    for split, own_keys in keys.items():
        places = [place for place, key in enumerate(own_keys) if key not in unwanted]
        if not places:
            raise ValueError(f"All rows of `{split}` (--{split}) are among those to forget.")
        if num_shared := len(splits[split]) - len(places):
            notes.append(
                f"Left out of {split}, because they are among the rows to forget: {num_shared} of {len(own_keys)}."
            )
            found[split] = splits[split].select(places)
    return found, notes


def sampled_retain(
    target: str,
    tokenizer: PreTrainedTokenizerBase,
    forget: Dataset,
    args: SampledRetainArguments,
    config: UnlearnConfig,
    folder: Path,
    loading: ModelArguments | None = None,
) -> tuple[dict[str, str], str]:
    """
    Has the model write retain rows before unlearning, or finds that it has.

    Args:
        target (`str`): Folder or hub id of the model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        forget ([`~datasets.Dataset`]): Rows that must not come back.
        args ([`SampledRetainArguments`]): How many, how long.
        config ([`UnlearnConfig`]): Seed, template and precision.
        folder (`Path`): Where the rows go, for a look at them and for another run.
        loading ([`ModelArguments`], *optional*): How the model is loaded.

    Returns:
        `tuple[dict[str, str], str]`: Paths of `retain` and `held_out`, and what was done, in words.

    Raises:
        ValueError: If the folder holds rows that were written under other settings, and `overwrite` is not set.
    """
    paths, record = [folder / name for name in SAMPLED], folder / "retain.self_generated.json"
    wanted = {**vars(args), "target": target, "seed": config.seed, "prompt_template": config.prompt_template}
    wanted["forget"] = fingerprint({"forget": forget})
    wanted |= loading.loading_settings() if loading else {}
    former = json.loads(record.read_text(encoding="utf-8")) if record.exists() and not config.overwrite else None
    PartialState().wait_for_everyone()  # nobody writes before all have looked
    if former and {key: former.get(key) for key in wanted} != wanted:
        raise ValueError(
            f"{paths[0]} was written by another model or under other settings: use it with --retain, add --overwrite "
            "to replace it, or choose another --output_dir."
        )
    if not former:
        logger.warning(f"There is no retain set (--retain): {target} writes {args.sampled_rows} rows itself.")
        found = _written(target, tokenizer, forget, args, config, loading or ModelArguments())
        former = {**wanted, "num_rows": len(found.rows), "dropped": found.dropped}
        held_out = found.rows[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        retain = [row for place, row in enumerate(found.rows, start=1) if place % HELD_OUT_EVERY]
        if PartialState().is_main_process:
            for path, rows in zip(paths, (retain, held_out)):
                write_whole(path, json_lines(rows), OWNER_ONLY)
            write_whole(record, json.dumps(former, indent=2) + "\n")
        PartialState().wait_for_everyone()
    dropped = "; ".join(f"{count} {reason}" for reason, count in former["dropped"].items())
    note = (
        f"There was no retain set: before unlearning, the model itself wrote {former['num_rows']} rows, of which each "
        f"{HELD_OUT_EVERY}th is held out. They are in {' and '.join(SAMPLED)}: look at them, and use them again with "
        f"--retain and --held_out. Dropped: {dropped or 'none'}."
    )
    return dict(zip(("retain", "held_out"), map(str, paths))), note


def _written(
    target: str, tokenizer, forget: Dataset, args: SampledRetainArguments, config, loading: ModelArguments
) -> SelfGenerated:
    device, model = config.device, loading.load_model(target, config.device).eval()
    asks = tokenizer.chat_template or kind_of(forget, "forget") in (("messages",), ("question", "answer"))
    kind = ("question" if asks else "text") if args.sampled_kind == "auto" else args.sampled_kind
    with torch.autocast(device.type, torch.bfloat16 if config.bf16 else torch.float16, config.bf16 or config.fp16):
        return self_generated_rows(
            model,
            tokenizer,
            args.sampled_rows,
            forget,
            kind=kind,
            terms=(args.forget_terms or "").split(","),
            prompt_template=config.prompt_template,
            config=SamplingConfig(args.temperature, max_new_tokens=args.sampled_tokens, seed=config.seed),
            engine=Engine(PartialState()),
        )


def _keys(rows: Dataset, split: str) -> list[str]:
    return [json.dumps(row, sort_keys=True) for row in rows.select_columns(list(kind_of(rows, split)))]
