"""
Text that the model itself writes before unlearning.

| who needs it | what is written | by |
|---|---|---|
| AltPO (`forget_loss="altpo"`) | plausible other answers to the questions to forget | [`add_alternates`] |
| unlearning without a retain set | questions with answers, or texts, of the model's own | [`self_generated_rows`] |

`drawing.py` draws: a row's text depends neither on its batch nor on the number of processes.
"""

from .alternates import add_alternates
from .drawing import SamplingConfig, sample
from .self_generated import SelfGenerated, self_generated_rows


__all__ = ["SamplingConfig", "SelfGenerated", "add_alternates", "sample", "self_generated_rows"]
