"""The global random state, and who may draw from it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def forked_rng(seed: int | None = None) -> Iterator[None]:
    """
    A context that leaves the global random state as it was, so that what is done in it does not change a run.

    Args:
        seed (`int`, *optional*): Where the state begins in the context; by default it goes on from what it was.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield
