"""
Saves what unlearning changed in a model, and applies it again to a later version of that model.

    python -m soul_trainer.difference save --before DIR --after DIR --output difference.safetensors
    python -m soul_trainer.difference apply --model LATER --difference difference.safetensors --output DIR

Folders are read and written one tensor at a time, so that no model has to fit into memory as a whole.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import logging

from .command_line import PlainParser
from .held_folder import hold_output
from .records import RUN_FILE, write_whole
from .stored_weights import StoredWeights, rewrite_tensors, stored_weights, weight_files, whole_file, write_tensors
from .weights import update_digest


logger = logging.get_logger(__name__)

FORMAT = "soul_trainer.difference/1"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Files of a model's folder that say how it was made, and its weights, also in other formats.
_LEFT_BEHIND = (RUN_FILE, "README.md", "trainer_state.json", ".gitattributes")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf")


@dataclass(frozen=True)
class AppliedDifference:
    """
    What applying a difference did.

    Attributes:
        num_tensors (`int`): Tensors that changed.
        norm (`float`): Euclidean norm of what was added to the weights, before it was rounded to their dtype.
        is_same_base (`bool`): Whether the model had the very weights that the difference was taken from.
    """

    num_tensors: int
    norm: float
    is_same_base: bool


def save_difference(
    before: str | Path | torch.nn.Module,
    after: str | Path | torch.nn.Module,
    output: str | Path,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Path:
    """
    Writes the weights of `after` minus those of `before`. Tensors that did not change are left out.

    Args:
        before (`str`, `Path` or `torch.nn.Module`): Model before unlearning: a folder, a hub id or a model in memory.
        after (`str`, `Path` or `torch.nn.Module`): Model after unlearning, likewise.
        output (`str` or `Path`): Safetensors file to write.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Of the difference: `float64`, `float32`, `bfloat16` or `float16`. Added to float32 weights of `before`, a
            float32 difference gives those of `after` to within `2**-22` of the larger of the two, and a float64
            difference gives them to the bit unless they differ by a factor of more than `2**28`. `bfloat16` and
            `float16` take half the space and keep 8 and 11 significant bits of each change.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace a file that exists.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If the file exists, the models are the same or have different tensors (the error names one), one of
            them is an adapter or sharded, or the difference is not finite.
    """
    output = Path(output)
    if dtype not in DTYPES:
        raise ValueError(f"`dtype`={dtype!r} is unknown: use {', '.join(DTYPES)}.")
    if output.exists() and not overwrite:
        raise ValueError(
            f"`output`={str(output)!r} exists: set `overwrite=True` (--overwrite) or choose another file."
        )
    first, second = stored_weights(before, "before"), stored_weights(after, "after")
    names, digests = _changed(first, second)
    if not names:
        raise ValueError("`before` and `after` have the same weights: there is no difference to save.")
    entries = [(name, DTYPES[dtype], tuple(first.read(name).shape)) for name in names]
    changes = (_change(name, first.read(name), second.read(name), DTYPES[dtype]) for name in names)
    metadata = {"format": "pt", "soul_trainer": FORMAT, "tied": json.dumps(first.tied, sort_keys=True), **digests}
    with hold_output(output), whole_file(output) as temporary:
        write_tensors(temporary, entries, changes, metadata)
    return output


def apply_difference(
    model: str | Path | torch.nn.Module,
    difference: str | Path,
    scale: float = 1.0,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> AppliedDifference:
    """
    Adds a saved difference to the model that it was taken from, or to a later version that has the same tensors.

    Args:
        model (`str`, `Path` or `torch.nn.Module`):
            A folder or a hub id, which is left as it is, or a model in memory, which is changed in place.
        difference (`str` or `Path`): File written by [`save_difference`].
        scale (`float`, *optional*, defaults to 1.0): Factor of the difference, finite and not 0; -1 takes it back.
        output (`str` or `Path`, *optional*): Folder of the new model; needed, and allowed, with a folder or a hub id.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace a model that this function wrote.

    Returns:
        [`AppliedDifference`]

    Raises:
        ValueError: If a tensor of the difference is not in the model or has another shape there (the error names it),
            the model is an adapter or sharded, `output` holds something else, or the file is no difference.
    """
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"`scale` must be a finite number other than 0, but it is {scale}.")
    is_in_memory = isinstance(model, torch.nn.Module)
    if is_in_memory != (output is None):
        raise ValueError(
            f"`output`={output!r}: name the folder of the new model if `model` is a folder or a hub id, and none if "
            "it is a model in memory, which is changed in place (save it with `save_pretrained`)."
        )
    weights = stored_weights(model)
    if not is_in_memory:
        _check_output(Path(output), weights.folder, overwrite)
    with _opened(difference) as file:
        adding = _Adding(weights, file, scale)
        if not adding.is_same_base:
            logger.warning(
                f"{difference} was taken from a model with other weights than {weights.label}. If this is a later "
                "version of that model, compare the figures before and after: `python -m soul_eval reapply`."
            )
        if not is_in_memory:
            with hold_output(output):
                return _write_model(Path(output), adding, adding.settings(model, difference))
        with torch.no_grad():
            for name in adding.sources:
                weights.read(name).copy_(adding.sum(name))
        return adding.report()


def planned_difference(model: str | Path, difference: str | Path, scale: float = 1.0) -> dict:
    """
    What [`apply_difference`] writes as settings to `unlearning.json`, without applying anything.

    Args:
        model (`str` or `Path`): Folder or hub id.
        difference (`str` or `Path`): File written by [`save_difference`].
        scale (`float`, *optional*, defaults to 1.0): Factor of the difference.

    Returns:
        `dict`: Names, scale, and the hashes of all three models.

    Raises:
        ValueError: As [`apply_difference`].
    """
    with _opened(difference) as file:
        return _Adding(stored_weights(model), file, scale).settings(model, difference)


class _Adding:
    """A difference that fits a model, and the sums of both, tensor by tensor."""

    def __init__(self, weights: StoredWeights, file: safe_open, scale: float):
        self.weights, self._file, self._scale = weights, file, scale
        metadata = file.metadata()
        self.sources = _sources(weights, file, json.loads(metadata["tied"]))
        self.digests = {"weights": weights.digest(), "before": metadata["before"], "after": metadata["after"]}
        self.is_same_base = self.digests["weights"] == self.digests["before"]
        self._squares: dict[str, float] = {}

    def settings(self, model: str | Path, difference: str | Path) -> dict:
        named = {"model": str(model), "difference": str(difference), "scale": self._scale}
        return {"method": "difference", **named, **self.digests}

    def sum(self, name: str) -> Tensor:
        name = self.weights.tied.get(name, name)
        weight = self.weights.read(name)
        if name not in self.sources:
            return weight
        change = self._file.get_tensor(self.sources[name]).to(weight.device)
        wide = torch.float64 if torch.float64 in (weight.dtype, change.dtype) else torch.float32
        change = change.to(wide) * self._scale
        self._squares[name] = float(change.square().sum(dtype=torch.float64))
        return (weight.to(wide) + change).to(weight.dtype)

    def report(self) -> AppliedDifference:
        return AppliedDifference(len(self.sources), math.sqrt(math.fsum(self._squares.values())), self.is_same_base)


@contextmanager
def _opened(path: str | Path) -> Iterator[safe_open]:
    try:
        file = safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"`difference`={str(path)!r} cannot be read: {error}.") from None
    with file:
        found = (file.metadata() or {}).get("soul_trainer")
        if found != FORMAT:
            raise ValueError(
                f"`difference`={str(path)!r} has the format {found!r} and not {FORMAT!r}: write it with `python -m "
                "soul_trainer.difference save`."
            )
        yield file


def _changed(before: StoredWeights, after: StoredWeights) -> tuple[list[str], dict[str, str]]:
    """Names of the tensors that differ, and the hashes of both models."""
    names = {"before": {*before.names, *before.tied}, "after": {*after.names, *after.tied}}
    for has, lacks in (("before", "after"), ("after", "before")):
        if extra := sorted(names[has] - names[lacks]):
            raise ValueError(
                f"`{has}` has the tensor {extra[0]!r} and `{lacks}` does not: give two versions of one model."
            )
    if untied := sorted(before.tied.keys() ^ after.tied.keys()):
        where = "before" if untied[0] in before.tied else "after"
        raise ValueError(f"{untied[0]!r} is tied to another tensor in `{where}` alone: tie or untie it in both.")
    first, second, changed = hashlib.sha256(), hashlib.sha256(), []
    for (name, old), (_, new) in zip(before.tensors(), after.tensors()):
        if old.shape != new.shape:
            raise ValueError(f"{name!r} has the shape {tuple(old.shape)} before and {tuple(new.shape)} after.")
        update_digest(first, name, old)
        update_digest(second, name, new)
        if name in before.tied or torch.equal(old.cpu(), new.cpu()):
            continue
        if not (old.is_floating_point() and new.is_floating_point()):
            raise ValueError(
                f"{name!r} has changed and is {old.dtype} before and {new.dtype} after. Only floating-point weights "
                "have a difference: dequantize both models first."
            )
        changed.append(name)
    return changed, {"before": first.hexdigest(), "after": second.hexdigest()}


def _change(name: str, before: Tensor, after: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if torch.float64 in (before.dtype, after.dtype, dtype) else torch.float32
    change = (after.cpu().to(wide) - before.cpu().to(wide)).to(dtype)
    if not torch.isfinite(change).all():
        raise ValueError(
            f"The difference of {name!r} is not finite in {dtype}: choose another `dtype`, or check `after`."
        )
    return change


def _sources(weights: StoredWeights, file: safe_open, tied: dict[str, str]) -> dict[str, str]:
    """For each tensor of the model that changes, the name of its difference."""
    sources = {}
    for name in file.keys():
        if name in weights.tied:
            raise ValueError(
                f"{name!r} is tied to {weights.tied[name]!r} in {weights.label}, but has a difference of its own: "
                "untie it in the model first."
            )
        if name not in weights.names:
            raise ValueError(f"The difference changes {name!r}, which is no tensor of {weights.label}.")
        # What was tied then and is not now changes as the tied tensor did.
        loosened = (each for each, owner in tied.items() if owner == name and each in weights.names)
        sources |= dict.fromkeys((name, *loosened), name)
    for each, name in sources.items():
        weight, shape = weights.read(each), tuple(file.get_slice(name).get_shape())
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"{each!r} has the shape {tuple(weight.shape)} in {weights.label}, and its difference {shape}: a "
                "difference fits models of the same size and vocabulary."
            )
        if not weight.is_floating_point():
            raise ValueError(f"{each!r} is {weight.dtype} in {weights.label}: dequantize the model first.")
    return sources


def _check_output(output: Path, folder: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / RUN_FILE).exists() or output.resolve() == folder.resolve():
        raise ValueError(f"`output`={str(output)!r} holds something else: choose another folder.")
    if not overwrite:
        raise ValueError(f"`output`={str(output)!r} holds a model: set `overwrite=True` (--overwrite) to replace it.")


def _write_model(output: Path, adding: _Adding, settings: dict) -> AppliedDifference:
    folder, temporary = adding.weights.folder, output.with_name(output.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for path in folder.iterdir():
            if path.is_file() and path.name not in _LEFT_BEHIND and path.suffix not in _WEIGHTS:
                shutil.copyfile(path, temporary / path.name)
        for path in weight_files(folder):
            rewrite_tensors(path, temporary / path.name, adding.sum)
        report = adding.report()
        record = {"settings": settings, "metrics": asdict(report)}
        write_whole(temporary / RUN_FILE, json.dumps(record, indent=2) + "\n")
        if output.exists():
            shutil.rmtree(output)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _parser() -> PlainParser:
    parser = PlainParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    save = commands.add_parser("save", help="write the difference of two models")
    save.add_argument("--before", required=True, metavar="MODEL", help="model before unlearning: folder or hub id")
    save.add_argument("--after", required=True, metavar="MODEL", help="model after unlearning")
    save.add_argument("--output", required=True, metavar="FILE", help="safetensors file to write")
    save.add_argument("--dtype", default="float32", choices=DTYPES, help="of the difference (%(default)s)")
    apply = commands.add_parser("apply", help="add a difference to a model, which is written to a new folder")
    apply.add_argument(
        "--model", required=True, metavar="MODEL", help="the model or a later version: folder or hub id"
    )
    apply.add_argument("--difference", required=True, metavar="FILE", help="file written by `save`")
    apply.add_argument("--output", required=True, metavar="DIR", help="folder of the new model")
    apply.add_argument(
        "--scale", type=float, default=1.0, help="factor of the difference; -1 takes it back (%(default)s)"
    )
    for command in (save, apply):
        command.add_argument("--overwrite", action="store_true", help="replace what a former run wrote")
    return parser


def command(arguments: list[str] | None = None) -> None:
    """Runs the command line; errors are raised."""
    args = _parser().parse_args(arguments)
    if args.command == "save":
        path = save_difference(args.before, args.after, args.output, args.dtype, args.overwrite)
        print(f"The difference is in {path}.")
        return
    done = apply_difference(args.model, args.difference, args.scale, args.output, args.overwrite)
    base = "the model that it was taken from" if done.is_same_base else "another version of that model"
    print(f"{done.num_tensors} tensors changed by a norm of {done.norm:.4g}, on {base}: {args.output}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        command(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
