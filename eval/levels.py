"""How improbable the rows to forget should become: the level at which they count as forgotten, and its source."""

import math
from collections.abc import Sequence
from functools import partial

from datasets import Dataset
from transformers import PreTrainedModel
from transformers.utils import logging

from soul_trainer import UnlearnConfig, UnlearnTrainer, UntilForgottenCallback
from soul_trainer.callbacks.forgotten import answer_probabilities, spread
from soul_trainer.engines import Engine, rows_per_forward
from soul_trainer.formats import longest_row, prepare
from soul_trainer.reference_rows import RowForward


logger = logging.get_logger(__name__)

EPOCHS, FORGOTTEN = "epochs", "forgotten"
# Without anything to compare with, rows count as forgotten when the geometric mean of their answer tokens'
# probabilities is a tenth: the model then hardly ever says the answer. Gold models give such rows 0.004 to 0.07.
FORGOTTEN_PROBABILITY = 0.1
# Columns of other answers to the same question, by TOFU's names. Paraphrased answers are as true as the answer, which
# makes them the better standard of the two.
OTHER_ANSWERS = {"paraphrased_answer": "paraphrased answers", "perturbed_answer": "perturbed answers"}
# Fewer steps than this say little about a learning rate, and a warm-up takes a good part of them.
FEWEST_STEPS = 60
MOST_LOOKS = 40


def check_until(until: str) -> None:
    """
    Args:
        until (`str`): `"epochs"`, `"forgotten"` or a probability.

    Raises:
        ValueError: If it is none of these.
    """
    if until in (EPOCHS, FORGOTTEN):
        return
    try:
        is_probability = 0 < float(until) < 1
    except ValueError:
        is_probability = False
    if not is_probability:
        raise ValueError(
            f"`until` must be {EPOCHS!r}, {FORGOTTEN!r} or a probability between 0 and 1, but it is {until!r}."
        )


def lengthen(config: UnlearnConfig, num_rows: int) -> None:
    """
    Raises `num_train_epochs` so that a run which stops by itself can take [`FEWEST_STEPS`] steps.

    Args:
        config ([`UnlearnConfig`]): Changed in place, unless it sets `max_steps`.
        num_rows (`int`): Rows to forget.
    """
    rows_per_step = config.train_batch_size * config.world_size * config.gradient_accumulation_steps
    if config.max_steps <= 0:
        steps_per_epoch = math.ceil(num_rows / rows_per_step)
        config.num_train_epochs = max(config.num_train_epochs, math.ceil(FEWEST_STEPS / steps_per_epoch))


def until_callback(
    trainer: UnlearnTrainer,
    until: str,
    forget: Dataset,
    gold: PreTrainedModel | None = None,
    never_learnt: Dataset | None = None,
    kept: Dataset | None = None,
    max_utility_loss: float = 0.1,
) -> UntilForgottenCallback:
    """
    Makes the callback that stops a run, with the level from the best evidence that there is: the gold model's
    probability of the rows; else the target's of rows of the same kind that it never learnt; else the target's of
    paraphrased or perturbed answers to the same questions; else [`FORGOTTEN_PROBABILITY`].

    Args:
        trainer ([`UnlearnTrainer`]): The trainer of the run.
        until (`str`): `"forgotten"`, or the level itself, a probability.
        forget ([`~datasets.Dataset`]): Rows to forget, with the columns that the user gave.
        gold ([`~transformers.PreTrainedModel`], *optional*): A model that never learnt the rows.
        never_learnt ([`~datasets.Dataset`], *optional*): Rows of the same kind that the target never learnt.
        kept ([`~datasets.Dataset`], *optional*): Rows that must stay probable; by default the retain rows.
        max_utility_loss (`float`, *optional*, defaults to 0.1): See [`UntilForgottenCallback`].
    """
    args, tokenizer = trainer.args, trainer.processing_class
    tokenized = partial(
        prepare,
        tokenizer=tokenizer,
        max_length=longest_row(args.max_length, trainer.model, tokenizer),
        prompt_template=args.prompt_template,
    )
    rows, level, like = trainer.train_dataset.forget, None, None
    others = {column: other_answers(forget, column) for column in OTHER_ANSWERS}
    column = next((column for column in OTHER_ANSWERS if others[column]), None)
    if until != FORGOTTEN:
        level, source = float(until), "that of `until`"
    elif gold is not None:
        level, source = gold_probability(gold, trainer, rows), "the gold model's probability of the same rows"
    elif never_learnt is not None:
        like = tokenized(never_learnt, name="never_learnt")
        source = "the target's probability of rows of the same kind that it never learnt"
    elif column:
        like = tokenized(Dataset.from_list(others[column]), name=column)
        source = f"the target's probability of {OTHER_ANSWERS[column]} to the same questions"
    else:
        level = FORGOTTEN_PROBABILITY
        source = "the default, as there is no gold model, `never_learnt` or paraphrased answer to compare with"
    if trainer.is_world_process_zero():
        number = "" if level is None else f"{level:.3g}: "
        logger.warning(f"The level at which rows count as forgotten is {number}{source}.")
    if kept is not None:
        kept = tokenized(kept, name="kept")
    elif trainer.train_dataset.retain is not None and len(trainer.train_dataset.retain):
        kept = trainer.train_dataset.retain
    rows_per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    num_steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * len(forget) / rows_per_step
    every = max(1, round(num_steps / MOST_LOOKS))
    return UntilForgottenCallback(trainer, rows, level, like, kept, max_utility_loss, every)


def gold_probability(gold: PreTrainedModel, trainer: UnlearnTrainer, rows: Sequence[dict]) -> float:
    """
    The gold model's probability of the rows that [`UntilForgottenCallback`] looks at.

    Args:
        gold ([`~transformers.PreTrainedModel`]): Each process holds it whole.
        trainer ([`UnlearnTrainer`]): Its collator, batch size and device are used.
        rows (`Sequence[dict]`): Tokenized rows.

    Returns:
        `float`: In (0, 1), on every process.
    """
    engine = Engine(trainer.accelerator)
    gold.to(trainer.args.device)
    forward = RowForward(gold, trainer.data_collator, 2 * rows_per_forward(trainer), engine, show_progress=False)
    found = answer_probabilities(spread(rows), forward)
    return min(max(sum(found) / len(found), 1e-6), 1 - 1e-6)


def other_answers(rows: Dataset, column: str) -> list[dict]:
    """Rows of question and answer with each of the answers of a column, which holds one text or several a row."""
    if column not in rows.column_names or "question" not in rows.column_names:
        return []
    found = []
    for row in rows:
        answers = row[column] or []
        answers = [answers] if isinstance(answers, str) else answers
        found += [{"question": row["question"], "answer": answer} for answer in answers]
    return found
