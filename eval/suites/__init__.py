"""One file a benchmark: which rows, what is asked about them, which figures."""

from .base import GENERATION, Part, Suite
from .copyright import SUITE as COPYRIGHT
from .detox import SUITE as DETOX
from .muse import SUITE as MUSE
from .own import SUITE as OWN
from .tofu import SUITE as TOFU
from .wmdp import SUITE as WMDP


SUITES = {suite.name: suite for suite in (TOFU, MUSE, WMDP, COPYRIGHT, DETOX, OWN)}

__all__ = ["GENERATION", "SUITES", "Part", "Suite"]
