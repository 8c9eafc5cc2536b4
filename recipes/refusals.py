"""
What a model says instead, by task. The package's own refusals are those of somebody who does not know; a text that is
not to be copied, or a request that does harm, is declined for another reason.
"""

import os
from pathlib import Path

from soul_eval.experiment import Experiment
from soul_trainer import UnlearnConfig


class RefusingExperiment(Experiment):
    """An [`Experiment`] whose refusals are those of `recipes/refusals/<task>.txt`, unless others are named."""

    def settings(self, optimizer: str) -> UnlearnConfig:
        """See [`Experiment.settings`]."""
        config = super().settings(optimizer)
        config.refusal_answers = config.refusal_answers or os.path.relpath(
            Path(__file__).with_suffix("") / f"{self.task}.txt"
        )
        return config
