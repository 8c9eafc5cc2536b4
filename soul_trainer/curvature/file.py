"""Curvature on disk: safetensors, written whole, with the settings and the hash of the weights that it is of."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .kronecker import KroneckerCurvature


_DIAGONAL, _MATRIX, _TRANSPOSED = "diagonal:", "matrix:", "transposed"


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
    tensors = {_DIAGONAL + name: tensor for name, tensor in curvature.diagonals.items()}
    tensors |= _matrix_tensors(curvature.matrices)
    _write(Path(path), tensors, {**curvature.metadata, _TRANSPOSED: _transposed(curvature.matrices)})


def load_curvature(path: str | Path, rank: int | None = None) -> Curvature:
    """
    Reads a file of [`save_curvature`].

    Args:
        path (`str` or `Path`): The file.
        rank (`int`, *optional*): Eigenvectors that are kept of each factor, if the file has more.

    Raises:
        ValueError: If there is no such file, or it is another one.
    """
    tensors, metadata = _read(Path(path))
    diagonals = {name[len(_DIAGONAL) :]: tensor for name, tensor in tensors.items() if name.startswith(_DIAGONAL)}
    transposed = metadata.pop(_TRANSPOSED)
    matrices = {name: found.truncated(rank) for name, found in _matrices(tensors, transposed).items()}
    return Curvature(diagonals, matrices, metadata)


def save_matrices(path: str | Path, matrices: Mapping[str, KroneckerCurvature]) -> None:
    """Writes the curvature of matrices alone."""
    _write(Path(path), _matrix_tensors(matrices), {_TRANSPOSED: _transposed(matrices)})


def load_matrices(path: str | Path) -> dict[str, KroneckerCurvature]:
    """Reads a file of [`save_matrices`]."""
    tensors, metadata = _read(Path(path))
    return _matrices(tensors, metadata[_TRANSPOSED])


def _matrix_tensors(matrices: Mapping[str, KroneckerCurvature]) -> dict[str, Tensor]:
    return {
        f"{_MATRIX}{name}:{key}": tensor
        for name, matrix in matrices.items()
        for key, tensor in matrix.tensors().items()
    }


def _transposed(matrices: Mapping[str, KroneckerCurvature]) -> list[str]:
    return [name for name, matrix in matrices.items() if matrix.transposed]


def _matrices(tensors: Mapping[str, Tensor], transposed: list[str]) -> dict[str, KroneckerCurvature]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(_MATRIX):
            name, _, part = key[len(_MATRIX) :].rpartition(":")
            parts.setdefault(name, {})[part] = tensor
    return {name: KroneckerCurvature.from_tensors(found, name in transposed) for name, found in parts.items()}


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    # Names may share a tensor, which a file must hold once each.
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, temporary, metadata={key: json.dumps(value) for key, value in metadata.items()})
    os.replace(temporary, path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    try:
        with safe_open(path, "pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} is no file of curvature: {error}.") from None
    if _TRANSPOSED not in metadata:
        raise ValueError(f"{str(path)!r} is no file of curvature: `python -m soul_trainer.curvature` makes one.")
    return tensors, metadata
