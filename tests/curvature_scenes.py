"""Measurements of the curvature command in small, for its tests: a model, rows, flags, and how results compare."""

import json
from pathlib import Path

import pytest
import torch
from scenes import RETAIN, scene_model, scene_tokenizer

from soul_trainer.curvature import load_curvature, resumable
from soul_trainer.curvature.command import main


# Sums of float32 in another order, as a share of the largest entry.
ROUNDING = 1e-5
# Estimates of 6 rows: 3 of 16 rows, the last one smaller, and batches that do not divide them.
SIZES = ("--estimate_size=6", "--batch_size=4")
NUM_ESTIMATES = 3


def write_scene(folder: Path, rows: list[dict] = RETAIN) -> None:
    """A model with dropout, and rows."""
    scene_model(num_hidden_layers=2, attention_dropout=0.2).save_pretrained(folder / "model")
    scene_tokenizer().save_pretrained(folder / "model")
    (folder / "retain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(folder, output, *flags, dataset="retain.jsonl") -> list[str]:
    """The arguments of a measurement."""
    names = [f"--model={folder / 'model'}", f"--dataset={folder / dataset}", f"--output={output}"]
    return [*names, "--device=cpu", *SIZES, *flags]


def measured(folder, output, *flags, **options):
    """What a measurement gives that goes through."""
    assert main(command(folder, output, *flags, **options)) == 0
    assert not Path(f"{output}.progress.safetensors").exists()
    return load_curvature(output)


def stopped(arguments) -> tuple[int, int]:
    """Leaves the progress of a measurement behind, that met an error in its third estimate: pass and estimate."""
    whole, calls = resumable.estimate_hessian, []

    def estimate(*args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise FloatingPointError("The loss is not finite.")
        return whole(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resumable, "estimate_hessian", estimate)
        assert main(arguments) == 1
    path = Path(f"{arguments[2].removeprefix('--output=')}.progress.safetensors")
    with pytest.raises(ValueError, match="half a measurement"):
        load_curvature(path)
    place = resumable.read_tensors(path)[1]["progress"]
    return place["pass"], place["position"]


def assert_close(found, wanted, tolerance=ROUNDING):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


def assert_alike(found, wanted, tolerance=ROUNDING):
    """The same diagonals and matrices, as maps: eigenvectors may turn within an eigenspace."""
    assert found.diagonals.keys() == wanted.diagonals.keys() and found.matrices.keys() == wanted.matrices.keys()
    for name, diagonal in wanted.diagonals.items():
        assert_close(found.diagonals[name], diagonal, tolerance)
    for name, matrix in wanted.matrices.items():
        assert found.matrices[name].trace == pytest.approx(matrix.trace, rel=10 * tolerance)
        assert_close(found.matrices[name].values, matrix.values, 10 * tolerance)
