"""Log-probabilities of given answers."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.engines import Engine
from soul_trainer.formats import Example, encode
from soul_trainer.log_probs import shift_labels, token_log_probs, token_statistics
from soul_trainer.reference import eval_mode

from .batches import (
    AUTO,
    Unit,
    can_continue,
    device_of,
    logits_budget,
    longest_input,
    only_last_logits,
    pad,
    run_batches,
)


logger = logging.get_logger(__name__)


class AnswerScore(NamedTuple):
    """
    What a model says of an answer, the end of sequence included.

    Attributes:
        log_probs (`list[float]` of length `answer tokens`): In nats.
        hits (`list[bool]`, *optional*): Whether each token is the most probable one after those before it.
        z_scores (`list[float]`, *optional*):
            Log-probability of each token, less the mean of the log-probabilities under the model's own distribution at
            its place, over their standard deviation.
    """

    log_probs: list[float]
    hits: list[bool] | None = None
    z_scores: list[float] | None = None

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood per token, in nats."""
        return -sum(self.log_probs) / len(self.log_probs)


# Not inference_mode: evaluation runs in the middle of training, where tensors that a model caches must stay usable.
@torch.no_grad()
def score_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    batch_size: int | str = AUTO,
    max_length: int | None = None,
    details: bool = False,
    engine: Engine | None = None,
    description: str = "Answers",
    progress: bool = True,
) -> Iterator[tuple[int, AnswerScore]]:
    """
    Scores answers, those of the longest rows first. A prompt that several answers share is computed once.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model; it is used on the device that it is on.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        examples (`list[Example]`): From `soul_trainer.formats.render`.
        batch_size (`int` or `str`, *optional*, defaults to `"auto"`):
            Tokens in a forward, padding included; by default what the memory allows.
        max_length (`int`, *optional*):
            Tokens beyond are cut off, and the answers counted in a warning. By default the model's limit.
        details (`bool`, *optional*, defaults to `False`): Whether scores have `hits` and `z_scores`.
        engine ([`~soul_trainer.engines.Engine`], *optional*): That runs the model, if processes share the examples.
        description (`str`, *optional*): Name of the progress bar.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `Iterator[tuple[int, AnswerScore]]`: Places of this process's part of `examples`, each once, and scores, as
        they are done.

    Raises:
        ValueError: If an example has no answer token within `max_length`.
    """
    rows = _encoded(tokenizer, examples, max_length or longest_input(model, tokenizer))
    groups = _groups(rows, can_continue(model))
    units = [_unit(index, [rows[place] for place in group]) for index, group in enumerate(groups)]
    budget, device = logits_budget(model, batch_size), device_of(model, engine)

    def run(batch: list[int]) -> tuple[list[int], list[Tensor]]:
        places = [groups[index] for index in batch]
        targets, logits = _forward(model, [[rows[place] for place in group] for group in places], device)
        found = [token_log_probs(logits, targets)] if not details else token_statistics(logits, targets)
        return [place for group in places for place in group], [targets != IGNORE_INDEX, *found]

    with eval_mode(model), tqdm(total=len(rows), desc=description, unit="answer", disable=not progress) as bar:
        before: tuple[list[int], list[Tensor]] = ([], [])
        for is_shared in (True, False):
            alike = [unit for unit in units if (unit.rows > 1) == is_shared]
            for _, result in run_batches(alike, budget, run, engine):
                # A batch is read once the next is on its way, so that a GPU need not wait for us.
                yield from _read(*before)
                bar.update(len(before[0]))
                before = result
        yield from _read(*before)
        bar.update(len(before[0]))


def answer_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    batch_size: int | str = AUTO,
    max_length: int | None = None,
    description: str = "Answer losses",
    progress: bool = True,
) -> list[float]:
    """
    Mean negative log-likelihood per answer token, the end of sequence included. Arguments are those of
    [`score_answers`].

    Returns:
        `list[float]`: In nats, in the order of `examples`.
    """
    losses = [0.0] * len(examples)
    for place, score in score_answers(
        model, tokenizer, examples, batch_size, max_length, description=description, progress=progress
    ):
        losses[place] = score.nll
    return losses


class _Row(NamedTuple):
    prompt: list[int]
    answer: list[int]


def _encoded(tokenizer: PreTrainedTokenizerBase, examples: list[Example], max_length: int | None) -> list[_Row]:
    rows, num_cut = [], 0
    for example in examples:
        encoded = encode(tokenizer, example)
        if max_length and len(encoded["input_ids"]) > max_length:
            encoded = encode(tokenizer, example, max_length)
            num_cut += 1
        ids, labels = encoded["input_ids"], encoded["labels"]
        num_prompt = labels.count(IGNORE_INDEX)
        rows.append(_Row(ids[:num_prompt], ids[num_prompt:]))
    if num_cut:
        logger.warning(f"{num_cut} of {len(rows)} answers are cut off at `max_length`={max_length} tokens.")
    return rows


def _groups(rows: list[_Row], is_shared: bool) -> list[list[int]]:
    """Places of rows with the same prompt, which needs two tokens: the last is computed with each answer."""
    groups: dict[tuple, list[int]] = {}
    for place, row in enumerate(rows):
        key = tuple(row.prompt) if is_shared and len(row.prompt) > 1 else (None, place)
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def _unit(index: int, rows: list[_Row]) -> Unit:
    longest = max(len(row.answer) for row in rows)
    if len(rows) == 1:
        return Unit(index, 0, 1, len(rows[0].prompt) + longest)
    return Unit(index, len(rows[0].prompt) - 1, len(rows), longest + 1)


def _forward(model: PreTrainedModel, groups: list[list[_Row]], device: torch.device) -> tuple[Tensor, Tensor]:
    """
    Targets `(rows, tokens)` and logits `(rows, tokens, vocabulary)`; prompts shared within every group or in none.
    """
    is_shared = all(len(group) > 1 for group in groups)
    rows = [row for group in groups for row in group]
    shared = {}
    if is_shared:
        ids, mask = pad([group[0].prompt[:-1] for group in groups], side="left")
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        outputs = model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            use_cache=True,
            **only_last_logits(model),
        )
        owners = torch.tensor([index for index, group in enumerate(groups) for _ in group])
        outputs.past_key_values.batch_select_indices(owners.to(device))
        shared = {"past_key_values": outputs.past_key_values}
        rows = [_Row(row.prompt[-1:], row.answer) for row in rows]
    input_ids, attention_mask = pad([row.prompt + row.answer for row in rows], side="right")
    labels, _ = pad([[IGNORE_INDEX] * len(row.prompt) + row.answer for row in rows], "right", IGNORE_INDEX)
    if is_shared:
        starts = mask.sum(1)[owners, None]
        shared["position_ids"] = (starts + torch.arange(input_ids.shape[1])).to(device)
        attention_mask = torch.cat([mask[owners], attention_mask], dim=1)
    logits = model(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        use_cache=is_shared,
        **shared,
    ).logits
    return shift_labels(labels).to(device), logits


def _read(places: list[int], tensors: list[Tensor]) -> Iterator[tuple[int, AnswerScore]]:
    if not places:
        return
    is_answer, *found = (tensor.cpu() for tensor in tensors)
    for index, place in enumerate(places):
        yield place, AnswerScore(*(values[index][is_answer[index]].tolist() for values in found))
