"""When the fingerprint of a run is written and compared. What is in it is in `fingerprint.py`."""

import json
from pathlib import Path

from datasets import Dataset
from transformers import Trainer
from transformers.utils import logging

from ..engines import KeptWithCheckpoint
from ..fingerprint import FINGERPRINT_FILE, difference, fingerprint, read_fingerprint, weights_sample_digest
from ..records import write_whole


logger = logging.get_logger(__name__)


class FingerprintCallback(KeptWithCheckpoint):
    """
    Writes into each checkpoint which run it is of.

    Args:
        trainer ([`UnlearnTrainer`]): The trainer that it is added to, with the model as it is before the run.
        retain ([`~datasets.Dataset`]): Tokenized rows, from [`~formats.prepare`].
        forget ([`~datasets.Dataset`]): Likewise.
    """

    def __init__(self, trainer: Trainer, retain: Dataset, forget: Dataset):
        self.trainer = trainer
        self.rows = {"forget_dataset": forget, "retain_dataset": retain}
        self._weights = weights_sample_digest(trainer.model)
        self._source = getattr(trainer.model.config, "_name_or_path", None)

    def fingerprint(self) -> dict[str, object]:
        """That of the run."""
        # Other objectives look at the weights of the checkpoint alone.
        weights = self._weights if self.trainer.objectives.look_back else None
        return fingerprint(self.trainer.args, self.rows, weights)

    def save_to(self, folder: str | Path) -> None:
        """Adds the fingerprint to a checkpoint."""
        if self.trainer.is_world_process_zero():
            write_whole(Path(folder) / FINGERPRINT_FILE, json.dumps(self.fingerprint(), indent=1) + "\n")

    def load_from(self, folder: str | Path) -> None:
        """Has nothing to take up."""

    def difference_from(self, folder: str | Path) -> str | None:
        """What shows that a checkpoint is of another run, for a message; `None` if nothing does."""
        saved = read_fingerprint(folder)
        if saved is None:
            logger.warning(f"{folder} does not say which run it is of, so that nothing is compared.")
            return None
        return difference(saved, self.fingerprint())

    def warn_of_half_unlearned(self) -> None:
        """Warns if the model that a run begins with is a checkpoint of another run, and the objectives look back."""
        if self._source and self.trainer.objectives.look_back and read_fingerprint(self._source) is not None:
            logger.warning(
                f"`model` comes from {self._source}, a checkpoint of an unlearning run, and what the losses compare "
                "with is this half-unlearned model. To go on with that run, load the model that it began with, and "
                "give the checkpoint to `resume_from_checkpoint`."
            )
