"""
Curvature on disk: safetensors, written whole, with the settings and the hash of the weights that it is of.

| key of the metadata | JSON |
|---|---|
| `transposed` | names of the matrices that are stored `(in, out)` |
| `weights` | hash of the weights ([`~weights.weights_digest`]) that it was measured of |
| `kind` | `diagonal` or `kronecker` |
| `estimator` | of [`estimators.ESTIMATORS`] |
| `dataset`, `rows` | name of the rows, and a hash of their tokens and labels |
| `num_rows`, `num_tokens` | how many they were, and their tokens that have a loss |
| `settings` | all that another measurement must repeat to get the same numbers |
| `kept_share`, `truncation_error` | by matrix, each from 0 to 1: what truncation kept of the trace, and what it cost |
| `version` | of this package |

`python -m soul_trainer.curvature` writes all of them, and only `transposed` is needed. A file with the key `progress`
is that of a measurement which has not ended (`resumable.py`).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .kronecker import KroneckerCurvature


_DIAGONAL, _MATRIX, _TRANSPOSED = "diagonal:", "matrix:", "transposed"
PROGRESS = "progress"


@dataclass
class Curvature:
    """
    The curvature of a model's loss on some rows.

    Args:
        diagonals (`dict[str, torch.Tensor]`): Of each parameter, by name, of its shape, >= 0.
        matrices (`dict[str, KroneckerCurvature]`): Of linear layers' weights, by name.
        metadata (`dict`): What it was measured of, and how.
    """

    diagonals: dict[str, Tensor]
    matrices: dict[str, KroneckerCurvature] = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)


def save_curvature(path: str | Path, curvature: Curvature) -> None:
    """Writes a file, whole or not at all."""
    write_tensors(Path(path), *to_tensors(curvature))


def load_curvature(path: str | Path, rank: int | None = None) -> Curvature:
    """
    Reads a file of [`save_curvature`].

    Args:
        path (`str` or `Path`): The file.
        rank (`int`, *optional*): Eigenvectors that are kept of each factor, if the file has more.

    Raises:
        ValueError: If there is no such file, or it is another one.
    """
    tensors, metadata = read_tensors(Path(path))
    if PROGRESS in metadata:
        raise ValueError(f"{str(path)!r} is half a measurement: repeat the command that began it, which goes on.")
    curvature = from_tensors(tensors, metadata)
    curvature.matrices = {name: found.truncated(rank) for name, found in curvature.matrices.items()}
    return curvature


def check_model(curvature: Curvature, digest: str) -> None:
    """
    Checks that curvature is of a model's weights as they are.

    Args:
        curvature ([`Curvature`]): From a file.
        digest (`str`): Of [`~weights.weights_digest`]: of the model before its first step.

    Raises:
        ValueError: If it is of other weights. Curvature whose metadata names no weights is taken for what it is.
    """
    measured = curvature.metadata.get("weights")
    if measured is not None and measured != digest:
        dtype = curvature.metadata.get("settings", {}).get("dtype", "its own")
        raise ValueError(
            f"The curvature is of weights with the hash {measured}, and the model's is {digest}: load the model that "
            f"it was measured of, in the same dtype ({dtype}; a trainer turns 16 bits to float32 unless "
            "`float32_weights` is False), or measure this one by `python -m soul_trainer.curvature`."
        )


def save_matrices(path: str | Path, matrices: Mapping[str, KroneckerCurvature]) -> None:
    """Writes the curvature of matrices alone."""
    write_tensors(Path(path), _matrix_tensors(matrices), {_TRANSPOSED: _transposed(matrices)})


def load_matrices(path: str | Path) -> dict[str, KroneckerCurvature]:
    """Reads a file of [`save_matrices`]."""
    tensors, metadata = read_tensors(Path(path))
    return _matrices(tensors, metadata[_TRANSPOSED])


def to_tensors(curvature: Curvature) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the metadata of a file."""
    tensors = {_DIAGONAL + name: tensor for name, tensor in curvature.diagonals.items()}
    tensors |= _matrix_tensors(curvature.matrices)
    return tensors, {**curvature.metadata, _TRANSPOSED: _transposed(curvature.matrices)}


def from_tensors(tensors: Mapping[str, Tensor], metadata: dict) -> Curvature:
    """What [`to_tensors`] was given; other tensors are left aside."""
    diagonals = {name[len(_DIAGONAL) :]: tensor for name, tensor in tensors.items() if name.startswith(_DIAGONAL)}
    rest = {key: value for key, value in metadata.items() if key != _TRANSPOSED}
    return Curvature(diagonals, _matrices(tensors, metadata[_TRANSPOSED]), rest)


def _matrix_tensors(matrices: Mapping[str, KroneckerCurvature]) -> dict[str, Tensor]:
    return {
        f"{_MATRIX}{name}:{key}": tensor
        for name, matrix in matrices.items()
        for key, tensor in matrix.tensors().items()
    }


def _transposed(matrices: Mapping[str, KroneckerCurvature]) -> list[str]:
    return sorted(name for name, matrix in matrices.items() if matrix.transposed)


def _matrices(tensors: Mapping[str, Tensor], transposed: list[str]) -> dict[str, KroneckerCurvature]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(_MATRIX):
            name, _, part = key[len(_MATRIX) :].rpartition(":")
            parts.setdefault(name, {})[part] = tensor
    return {name: KroneckerCurvature.from_tensors(found, name in transposed) for name, found in parts.items()}


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    """Writes tensors, and metadata as JSON, under another name and renames the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    # Names may share a tensor, which a file must hold once each.
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, temporary, metadata={key: json.dumps(value, sort_keys=True) for key, value in metadata.items()})
    os.replace(temporary, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Reads a file of [`write_tensors`]; a `ValueError` if it is none of curvature."""
    try:
        with safe_open(path, "pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} is no file of curvature: {error}.") from None
    if _TRANSPOSED not in metadata:
        raise ValueError(f"{str(path)!r} is no file of curvature: `python -m soul_trainer.curvature` makes one.")
    return tensors, metadata
