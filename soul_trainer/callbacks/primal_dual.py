"""When the retain weight of a primal-dual run moves. By how much is in `weighting.py`."""

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..weighting import dual_step


class PrimalDualCallback(TrainerCallback, ExportableState):
    """
    Moves the retain weight after each step (PDU; Entesari et al., 2025), once `dual_warmup_epochs` are over, and logs
    it as `retain_weight`. A resumed run goes on with the weight that it had come to.

    Args:
        trainer ([`UnlearnTrainer`]): The trainer that it is added to.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"retain_weight": self.trainer.retain_weight}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Takes up the weight of the checkpoint, if there is one."""
        saved = state.stateful_callbacks.get(type(self).__name__, {}) if state.global_step else {}
        self.trainer.retain_weight = saved.get("attributes", {}).get("retain_weight", args.retain_weight)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Moves the weight by the retain loss of the step, over all processes."""
        if state.epoch > args.dual_warmup_epochs:
            trainer = self.trainer
            retain_loss = float(trainer.engine.sum(trainer.step_losses["retain_loss"]))
            trainer.retain_weight = dual_step(
                trainer.retain_weight, retain_loss, args.retain_loss_limit, args.dual_step_size
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs
    ) -> None:
        """Logs the weight after each training loss."""
        if "loss" in logs:
            self.trainer.log({"retain_weight": self.trainer.retain_weight})
