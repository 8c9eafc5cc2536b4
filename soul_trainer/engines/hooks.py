"""What unlearning does to a Trainer from outside its schedule: it reads its batch size, saves, and stops it."""

from transformers import Trainer

from .base import Engine


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


def stop_at_rows(trainer: Trainer, engine: Engine, rows: list[str]) -> None:
    """
    Stops every process before its step if the loss of one of them is not finite at some rows.

    Raises:
        FloatingPointError: After saving the state before the step; the rows are named.
    """
    rows = engine.gather(rows)
    if rows:
        checkpoint = save_checkpoint(trainer)
        raise FloatingPointError(
            f"The loss is not finite at {', '.join(rows)}, in step {trainer.state.global_step + 1}, which was not "
            f"taken; {checkpoint} holds the state before it. Usual causes: a learning rate or forget weight that is "
            "too high, or float16 without a scaler."
        )
