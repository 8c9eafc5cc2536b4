"""Models that learn rows: trained once, found again."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.utils import logging

from soul_eval.adapters import LoraArguments
from soul_trainer.collator import UnlearnCollator
from soul_trainer.engines import Engine, SavedDtypeMixin, keeper_of_weights, set_bf16, whole_checkpoint
from soul_trainer.held_folder import hold_output
from soul_trainer.machine import fit_to_machine
from soul_trainer.precision import choose_precision
from soul_trainer.records import make_tokenizer_portable, training_settings


logger = logging.get_logger(__name__)

ADAPTER = "adapter"


def train_once(
    make_model: Callable[[], PreTrainedModel],
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    args: TrainingArguments,
    identity: list,
    lora: LoraArguments | None = None,
    collator: Callable | None = None,
) -> Path:
    """
    Trains a model on rows, or finds it trained.

    Args:
        make_model (`Callable`): Makes the model, if it is to be trained.
        rows ([`~datasets.Dataset`]): `input_ids` and `labels`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Saved with the model.
        folder (`Path`): Where the model goes; a hash of all that it depends on is added to its name.
        args ([`~transformers.TrainingArguments`]): The Trainer's; its `output_dir` is chosen here.
        identity (`list`): What the model depends on besides the rows, `args` and `lora`.
        lora ([`LoraArguments`], *optional*): Adapters; what is saved is the whole model, with them merged into it.
        collator (`Callable`, *optional*): Makes batches, by default of tokens with a label each.

    Returns:
        `Path`: The model's folder, which appears whole or not at all.
    """
    lora = lora or LoraArguments()
    settings = training_settings(args)
    # A batch is the same on any number of processes.
    settings["per_device_train_batch_size"] *= settings.pop("world_size")
    tokens = [rows["input_ids"][:], rows["labels"][:]]
    parts = [tokens, settings, lora.lora_settings(), identity]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
    folder = folder.with_name(f"{folder.name}-{digest}")
    if (folder / "config.json").exists():
        return folder
    with hold_output(folder, Engine(PartialState())):
        return _train(make_model, rows, tokenizer, folder, args, lora, collator)


def _train(
    make_model: Callable[[], PreTrainedModel],
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    args: TrainingArguments,
    lora: LoraArguments,
    collator: Callable | None,
) -> Path:
    part = folder.with_name(folder.name + ".part")
    fit_to_machine(args)
    args.output_dir, args.remove_unused_columns = str(part), False
    model = make_model()
    if lora.lora_rank:
        model = get_peft_model(model, lora.peft_config())
    args.bf16 = args.bf16 or None
    precision = choose_precision(model, args, keeps_weights=keeper_of_weights(args, model))
    set_bf16(args, precision.bf16)
    precision.widen(model)
    if precision.message:
        logger.warning(precision.message)
    trainer = _Trainer(
        model,
        args,
        data_collator=collator or UnlearnCollator.for_tokenizer(tokenizer),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.precision = precision
    trainer.train(resume_from_checkpoint=_checkpoint(args))
    trainer.save_model(str(part / ADAPTER) if lora.lora_rank else None)
    if trainer.is_world_process_zero():
        if lora.lora_rank:
            # Not in the trained model, whose weights an engine may have in shards.
            whole = PeftModel.from_pretrained(make_model(), str(part / ADAPTER)).merge_and_unload()
            whole.save_pretrained(part)
            tokenizer.save_pretrained(part)
            make_tokenizer_portable(part)
            shutil.rmtree(part / ADAPTER)
        for checkpoint in part.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    trainer.accelerator.wait_for_everyone()
    return folder


class _Trainer(SavedDtypeMixin, Trainer):
    """Trains a model that comes in 16 bits in float32, and saves it in 16 bits."""


def _checkpoint(args: TrainingArguments) -> str | None:
    """
    Where training goes on: `--resume_from_checkpoint` names a checkpoint, or says True. The folder's name has a hash
    of the run, so that all its checkpoints are of this one. A run that has none begins.
    """
    wanted = args.resume_from_checkpoint
    if wanted and str(wanted).lower() == "true":
        wanted = any(Path(args.output_dir).glob("checkpoint-*"))
    return whole_checkpoint(wanted, args) if wanted else None
