"""What unlearning does to a Trainer from outside its schedule: it reads its batch size, saves, and stops it."""

from torch import Tensor
from transformers import Trainer

from .base import Engine, GradientError
from .checkpoints import newest_checkpoint


def rows_per_forward(trainer: Trainer) -> int:
    """Pairs of a training batch on one process, which the Trainer's search for a size that fits may have lowered."""
    return trainer._train_batch_size // max(1, trainer.args.n_gpu)


def save_checkpoint(trainer: Trainer) -> str:
    """
    Saves a checkpoint of the last finished step at once, outside the Trainer's schedule.

    Returns:
        `str`: Its folder.
    """
    trial = getattr(trainer, "_trial", None)  # there is one since training began
    trainer._save_checkpoint(trainer.model_wrapped, trial)
    return f"{trainer._get_output_dir(trial)}/checkpoint-{trainer.state.global_step}"


def stop_at_loss(trainer: Trainer, engine: Engine, rows: list[str], loss: Tensor) -> None:
    """
    Stops every process before its step if the loss of one of them is not finite.

    Args:
        trainer ([`UnlearnTrainer`]): That is to take the step.
        engine ([`Engine`]): Of the run.
        rows (`list[str]`): Where it is not.
        loss (`torch.FloatTensor`): The weighted sum of all.

    Raises:
        FloatingPointError: After saving the state before the step. Rows are named, unless it is the weights.
    """
    if not rows and not loss.isfinite():
        rows = ["no row but where losses are weighted and summed (`forget_weight`, `retain_weight`, `l1_weight`)"]
    rows = engine.gather(rows)
    if rows:
        check_weights(trainer, engine)
        checkpoint = save_checkpoint(trainer)
        raise FloatingPointError(
            f"The loss is not finite at {', '.join(rows)}, in step {trainer.state.global_step + 1}, which was not "
            f"taken; {checkpoint} holds the state before it. Usual causes: a learning rate or forget weight that is "
            "too high, or float16 without a scaler."
        )


def stop_at_gradient(trainer: Trainer) -> None:
    """
    Stops every process because the gradient of a step is not finite, which was not taken.

    Raises:
        GradientError: After saving the state before the step.
    """
    raise GradientError(
        f"The gradient is not finite in step {trainer.state.global_step + 1}, which was not taken, while the losses "
        f"are; {save_checkpoint(trainer)} holds the state before it. Usual causes: a learning rate that is too high, "
        "or a loss whose gradient has no bound, such as forget_loss=ga."
    )


def check_weights(trainer: Trainer, engine: Engine) -> None:
    """
    Stops every process if weights are not finite, so that they are neither saved nor called finished.

    Raises:
        FloatingPointError: It names the newest checkpoint, whose weights are finite, as those of all are.
    """
    if engine.has_finite_weights(trainer.model):
        return
    if not trainer.state.global_step:
        raise FloatingPointError("The weights of `model` are not finite before the first step: load another model.")
    newest = newest_checkpoint(trainer._get_output_dir(getattr(trainer, "_trial", None)))
    way_on = f"{newest} has finite weights" if newest else "there is no checkpoint"
    raise FloatingPointError(
        f"The weights are not finite after step {trainer.state.global_step}, and are not saved; {way_on}. Usual "
        "causes: a learning rate that is too high for the dtype of the weights, or an `adam_epsilon` of 0."
    )
