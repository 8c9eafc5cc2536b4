"""One file a benchmark: which rows, what is asked about them, which figures."""

from .base import GENERATION, Part, Suite
from .tofu import SUITE as TOFU


SUITES = {suite.name: suite for suite in (TOFU,)}

__all__ = ["GENERATION", "SUITES", "Part", "Suite"]
