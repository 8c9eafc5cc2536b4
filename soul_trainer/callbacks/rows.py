"""Rows for passes between two steps, shared out over processes."""

import torch
from transformers import Trainer

from ..batch import IGNORE_INDEX
from ..collator import UnlearnCollator
from ..engines import Engine, rows_per_forward


def micro_batches(trainer: Trainer, engine: Engine, items: list[dict[str, dict]]) -> list[dict[str, torch.Tensor]]:
    """
    This process's micro-batches of some rows; every process gets as many, filled up with rows that have no label.

    Args:
        trainer ([`~transformers.Trainer`]): Whose tokenizer, device and batch size count.
        engine ([`~engines.Engine`]): Of the trainer.
        items (`list[dict[str, dict]]`): Tokenized rows, each under `"forget"` or `"retain"`.

    Returns:
        `list[dict[str, torch.Tensor]]`: [`~batch.ForgetRetainBatch`]es on the trainer's device.
    """
    num_items = -(-len(items) // engine.num_processes)
    own = items[engine.process_index :: engine.num_processes]
    ((half, row),) = items[0].items()
    own += [{half: {**row, "labels": [IGNORE_INDEX] * len(row["labels"])}}] * (num_items - len(own))
    size = 2 * rows_per_forward(trainer)  # a training batch holds as many rows of each half
    collate = UnlearnCollator.for_tokenizer(trainer.processing_class)
    batches = [collate(own[start : start + size]) for start in range(0, num_items, size)]
    return [{key: tensor.to(trainer.args.device) for key, tensor in batch.items()} for batch in batches]
