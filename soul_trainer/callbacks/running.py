"""What keeps a run in order: the epoch of its pairing, the stop at an interrupt or at what is not finite."""

import signal
import threading

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..engines import Engine, stop_at_gradient
from ..pairing import PairedDataset


logger = logging.get_logger(__name__)


class PairingCallback(TrainerCallback):
    """
    Tells the training rows which epoch it is. Accelerate's loader does so too, but not on several processes, where it
    tells its sampler instead.

    Args:
        dataset ([`~pairing.PairedDataset`]): The training rows.
    """

    def __init__(self, dataset: PairedDataset):
        self.dataset = dataset

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Chooses the pairing of the epoch that begins or, after a resume, goes on."""
        self.dataset.set_epoch(int(state.epoch or 0))


class FiniteCallback(TrainerCallback):
    """
    Stops training before a step whose gradient is not finite.

    Args:
        trainer ([`UnlearnTrainer`]): The trainer that it is added to.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs
    ) -> None:
        """Looks at the gradients that the step would be of."""
        if not self.trainer.engine.has_finite_gradients(optimizer):
            stop_at_gradient(self.trainer)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        """Looks whether an engine with its own way of finding them has left the step out."""
        if self.trainer.engine.step_was_lost():
            stop_at_gradient(self.trainer)


class InterruptCallback(TrainerCallback):
    """
    Turns the first Ctrl-C during training into a checkpoint after the current step and a clean stop, on every process
    if one of them got it. A second one stops at once.

    Args:
        engine ([`~engines.Engine`]): Of the trainer.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.is_interrupted = False
        self._previous = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Takes the signal, which only the main thread can."""
        self.is_interrupted = False
        # Training may begin more than once: the Trainer starts anew when a batch does not fit into memory.
        if self._previous is None and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._interrupt)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Asks the Trainer to save and stop."""
        if self.agree():
            control.should_save = True
            control.should_training_stop = True

    def agree(self) -> bool:
        """Whether any process was interrupted: a checkpoint, or a stop, needs them all at the same step."""
        self.is_interrupted = bool(self.engine.gather([True] if self.is_interrupted else []))
        return self.is_interrupted

    def restore(self) -> None:
        """Gives the signal back to whoever had it."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _interrupt(self, signal_number: int, frame: object) -> None:
        self.is_interrupted = True
        self.restore()
        logger.warning("Interrupted: a checkpoint follows after this step. Press Ctrl-C again to stop without one.")
