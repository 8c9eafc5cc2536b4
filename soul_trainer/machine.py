"""What is needless on a machine without an accelerator, and warned of there."""

import os

import torch
from transformers import TrainingArguments


def fit_to_machine(args: TrainingArguments) -> None:
    """
    Where there is no accelerator, leaves out pinned memory, which has no effect there, and tells DeepSpeed, which
    accelerate imports wherever it is installed, that it need not look for one. Both would warn.

    Args:
        args ([`~transformers.TrainingArguments`]): Of a Trainer that is to be made; changed in place.
    """
    if not torch.accelerator.is_available():
        args.dataloader_pin_memory = False
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
