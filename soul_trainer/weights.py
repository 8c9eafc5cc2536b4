"""Telling the weights of one model from those of all others."""

import hashlib

import torch


def weights_digest(model: torch.nn.Module) -> str:
    """
    A hash of the weights as they are in memory: names, dtypes, shapes and bytes.

    Args:
        model (`torch.nn.Module`): Not sharded.

    Returns:
        `str`: Hexadecimal SHA-256.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            update_digest(digest, name, tensor)
    return digest.hexdigest()


def update_digest(digest: "hashlib._Hash", name: str, tensor: torch.Tensor) -> None:
    """Adds one tensor to the hash that [`weights_digest`] makes of all of them, in the order of their names."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy())
