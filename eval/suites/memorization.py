"""How much of rows a model says by itself, as suites have it of the hits under teacher forcing."""

import numpy as np

from ..metrics.exact_memorization.formula import exact_memorization
from ..metrics.extraction_strength.formula import extraction_strength
from .base import column


def memorization_values(rows: list[dict], key: str) -> dict[str, np.ndarray]:
    """`exact_memorization` and `extraction_strength` of each row, from hits under `key`; empty if no row has them."""
    hits = [np.asarray(row, dtype=bool) for row in column(rows, key) or []]
    if not hits:
        return {}
    return {"exact_memorization": exact_memorization(hits), "extraction_strength": extraction_strength(hits)}
