"""What tells one run from another, so that a checkpoint is resumed by its own run alone."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow
import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor

from .config import UnlearnConfig
from .records import run_settings


FINGERPRINT_FILE = "fingerprint.json"
# How long a run goes on, and in which precision a machine computes it, may change when it is resumed.
_MAY_CHANGE = {"num_train_epochs", "max_steps", "bf16", "fp16", "float32_weights", "allow_other_run"}
# So may the way in which the rows of a step are divided.
_STEP_SIZE = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
# Of each tensor: a step moves nearly all of them.
NUM_SAMPLES = 256


def rows_digest(rows: Dataset) -> str:
    """A hash of the tokens and labels of all rows together, in their order."""
    digest = hashlib.sha256()
    table = rows.select_columns(["input_ids", "labels"]).with_format("arrow")[:]
    for name in ("input_ids", "labels"):
        column = pyarrow.compute.cast(table[name].combine_chunks(), pyarrow.large_list(pyarrow.int64()))
        digest.update(pyarrow.compute.list_value_length(column).to_numpy(zero_copy_only=False).tobytes())
        digest.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def weights_sample_digest(model: torch.nn.Module) -> str | None:
    """
    A hash of some weights of each tensor, which takes no time where the hash of all takes minutes.

    Args:
        model (`torch.nn.Module`): In any dtype; 16 bits and the float32 that they are widened to have the same hash.

    Returns:
        `str`: `None` if the weights are not whole on this process.
    """
    samples = []
    for _, weights in sorted(model.named_parameters()):
        if isinstance(weights, DTensor) or not weights.numel() or weights.is_meta:
            return None
        flat = weights.detach().reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // NUM_SAMPLES)][:NUM_SAMPLES].float())
    return hashlib.sha256(torch.cat([sample.cpu() for sample in samples]).numpy().tobytes()).hexdigest()


def fingerprint(args: UnlearnConfig, rows: Mapping[str, Dataset | None], weights: str | None) -> dict[str, object]:
    """
    What two runs must have alike for one to go on from the other's checkpoint.

    Args:
        args ([`UnlearnConfig`]): The settings.
        rows (`Mapping[str, Dataset]`): Tokenized rows, by what errors call them.
        weights (`str`, *optional*): The [`weights_sample_digest`] of the model before the run.

    Returns:
        `dict`: By the name of what it is; as it is read back from JSON.
    """
    settings = run_settings(args)
    batch_size = 1
    for name in _STEP_SIZE:
        batch_size *= settings.pop(name)
    facts = {name: value for name, value in settings.items() if name not in _MAY_CHANGE}
    facts["rows of a step"] = batch_size
    facts |= {name: rows_digest(part) for name, part in rows.items() if part is not None}
    return json.loads(json.dumps({**facts, "model": weights}))


def read_fingerprint(checkpoint: str | Path) -> dict[str, object] | None:
    """
    The fingerprint in a checkpoint.

    Returns:
        `dict`: `None` if the checkpoint has none, as those of former versions.

    Raises:
        ValueError: If the file cannot be read.
    """
    path = Path(checkpoint) / FINGERPRINT_FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): resume from another checkpoint.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no fingerprint but {found!r:.60}: resume from another checkpoint.")
    return found


def difference(saved: Mapping[str, object], own: Mapping[str, object]) -> str | None:
    """
    How a checkpoint's run differs from another one.

    Args:
        saved (`Mapping[str, object]`): The checkpoint's [`fingerprint`].
        own (`Mapping[str, object]`): That of the run that would resume it.

    Returns:
        `str`: For a message; `None` if there is no difference.
    """
    parts = []
    for name in own:
        if name not in saved or saved[name] == own[name]:
            continue  # a setting that a former version did not have is at its default
        if name.endswith("_dataset"):
            parts.append(f"`{name}` holds other rows")
        elif name == "model":
            if saved[name] and own[name]:
                parts.append("`model` has other weights than the model that the run began with")
        else:
            parts.append(f"`{name}` was {saved[name]!r:.60} and is {own[name]!r:.60} now")
    return "; ".join(parts) or None
