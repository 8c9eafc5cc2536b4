"""Log-probabilities of given answers."""

import copy
from collections import defaultdict
from collections.abc import Collection, Container, Iterator
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.chat_templates import special_tokens
from soul_trainer.engines import Engine
from soul_trainer.formats import Example, encode, encode_all
from soul_trainer.log_probs import shift_labels, token_scores, token_statistics
from soul_trainer.reference import eval_mode

from .batches import (
    AUTO,
    PREFIX_BUDGETS,
    Unit,
    can_continue,
    device_of,
    logits_budget,
    longest_input,
    only_last_logits,
    own_units,
    pad,
    run_batches,
    shortest,
    token_batches,
    unknown_batches,
)


logger = logging.get_logger(__name__)

Result = TypeVar("Result")


class AnswerScore(NamedTuple):
    """
    What a model says of an answer, the end of sequence included.

    Attributes:
        log_probs (`list[float]` of length `answer tokens`): In nats.
        hits (`list[bool]` of length `answer tokens`): Whether each token is the most probable after those before it.
        z_scores (`list[float]`, *optional*):
            Log-probability of each token, less the mean of the log-probabilities under the model's own distribution at
            its place, over their standard deviation.
        num_end (`int`): How many of the last tokens end the sequence or, in a chat, the turn.
    """

    log_probs: list[float]
    hits: list[bool]
    z_scores: list[float] | None = None
    num_end: int = 0

    @property
    def content(self) -> "AnswerScore":
        """The score of the answer alone, without what ends a sequence or a turn."""
        return self.first(len(self.log_probs) - self.num_end)

    def first(self, count: int) -> "AnswerScore":
        """The score of the first tokens."""
        return AnswerScore(self.log_probs[:count], self.hits[:count], self.z_scores and self.z_scores[:count])

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
    known: Collection[int] = (),
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
        details (`bool`, *optional*, defaults to `False`): Whether scores have `z_scores`.
        engine ([`~soul_trainer.engines.Engine`], *optional*): That runs the model, if processes share the examples.
        description (`str`, *optional*): Name of the progress bar.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        known (`Collection[int]`, *optional*):
            Places of `examples` whose scores are known. They are scored only where they share a batch with others, so
            that the others' scores have the same bits as if all were scored.

    Returns:
        `Iterator[tuple[int, AnswerScore]]`: Places of this process's part of `examples`, each at most once, and
        scores, as they are done.

    Raises:
        ValueError: If an example has no answer token within `max_length`.
    """
    rows = _encoded(tokenizer, examples, max_length or longest_input(model, tokenizer))
    budget, device = logits_budget(model, batch_size), device_of(model, engine)
    singles, shared = _groups(rows, can_continue(model))
    measure = token_statistics if details else token_scores

    def score_rows(places: list[int], prefix: _Prefix | None = None) -> tuple[list[int], list[Tensor]]:
        targets, logits = _forward(model, [rows[place] for place in places], device, prefix and prefix.of(places))
        # Rows are done twice where memory ran out, and for nothing where other processes still had some.
        bar.update(min(len(places), bar.total - bar.n))
        return places, [targets != IGNORE_INDEX, *measure(logits, targets)]

    def score_groups(batch: list[int]) -> list[tuple[list[int], list[Tensor]]]:
        prefix = _Prefix(model, [shared[index] for index in batch], rows, device)
        units = [_after_prompt(place, rows[place]) for index in batch for place in shared[index]]
        batches = unknown_batches(token_batches(units, budget), known)
        return [result for _, result in run_batches(batches, lambda b: score_rows(b, prefix), engine, shortest(units))]

    prefixes = [Unit(index, len(rows[group[0]].prompt) - 1, 1, 0) for index, group in enumerate(shared)]
    units = [Unit(place, 0, 1, len(rows[place].prompt) + len(rows[place].answer)) for place in singles]
    known = set(known)
    known_groups = {index for index, group in enumerate(shared) if known and known.issuperset(group)}
    own = [unit.index for unit in own_units(units, engine)]
    own += [place for unit in own_units(prefixes, engine) for place in shared[unit.index]]
    bar_settings = {"total": len(own), "initial": len(known.intersection(own)), "disable": not progress}
    with eval_mode(model), tqdm(desc=description, unit="answer", **bar_settings) as bar:
        batches = token_batches(prefixes, budget * (PREFIX_BUDGETS if batch_size == AUTO else 1), engine)
        groups = run_batches(unknown_batches(batches, known_groups), score_groups, engine, shortest(prefixes))
        batches = unknown_batches(token_batches(units, budget, engine), known)
        alone = run_batches(batches, score_rows, engine, shortest(units))
        results = chain((result for _, several in groups for result in several), (result for _, result in alone))
        for places, tensors in _one_behind(results):
            for place, score in zip(places, _scores(tensors)):
                yield place, score._replace(num_end=rows[place].num_end)


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
    num_end: int = 0


def _encoded(tokenizer: PreTrainedTokenizerBase, examples: list[Example], max_length: int | None) -> list[_Row]:
    rows, num_cut = [], 0
    special = special_tokens(tokenizer)
    for example, encoded in zip(examples, encode_all(tokenizer, examples)):
        if max_length and len(encoded["input_ids"]) > max_length:
            try:
                encoded = encode(tokenizer, example, max_length)
            except ValueError as error:
                raise ValueError(
                    f"The prompt that begins {example.prompt[:60]!r} leaves no room for an answer within the model's "
                    f"{max_length} tokens: shorten it, or leave the row out."
                ) from error
            num_cut += 1
        ids, labels = encoded["input_ids"], encoded["labels"]
        num_prompt = labels.count(IGNORE_INDEX)
        rows.append(_Row(ids[:num_prompt], ids[num_prompt:], _num_end(special, ids[num_prompt:])))
    if num_cut:
        logger.warning(f"{num_cut} of {len(rows)} answers are cut off at `max_length`={max_length} tokens.")
    return rows


def _num_end(special: Container[int], answer: list[int]) -> int:
    """Special tokens at the end; an answer of nothing else has no end."""
    count = 0
    while count < len(answer) and answer[-count - 1] in special:
        count += 1
    return count if count < len(answer) else 0


def _groups(rows: list[_Row], can_share: bool) -> tuple[list[int], list[list[int]]]:
    """
    Places of rows that are alone, and of those that have their prompt in common. It needs two tokens: the last is
    computed with each answer.
    """
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        groups[tuple(row.prompt) if can_share and len(row.prompt) > 1 else (-1, place)].append(place)
    shared = [group for group in groups.values() if len(group) > 1]
    return [group[0] for group in groups.values() if len(group) == 1], shared


def _after_prompt(place: int, row: _Row) -> Unit:
    # The keys of the prompt are in the batch once a row.
    return Unit(place, len(row.prompt) - 1, 1, len(row.answer) + 1)


class _Prefix:
    """Keys and values of prompts but for their last tokens, each of a group of rows."""

    def __init__(self, model: PreTrainedModel, groups: list[list[int]], rows: list[_Row], device: torch.device):
        ids, self.mask = pad([rows[group[0]].prompt[:-1] for group in groups], side="left")
        self.owner = {place: index for index, group in enumerate(groups) for place in group}
        self.cache = model(
            input_ids=ids.to(device),
            attention_mask=self.mask.to(device),
            position_ids=(self.mask.cumsum(1) - 1).clamp(min=0).to(device),
            use_cache=True,
            **only_last_logits(model),
        ).past_key_values
        self.device = device

    def of(self, places: list[int]) -> tuple[Cache, Tensor]:
        """Cache and attention mask for these rows."""
        owners = torch.tensor([self.owner[place] for place in places])
        # To select is to put other tensors into a layer, so that layers are copied and their tensors are not.
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        cache.batch_select_indices(owners.to(self.device))
        return cache, self.mask[owners]


def _forward(
    model: PreTrainedModel, rows: list[_Row], device: torch.device, prefix: tuple[Cache, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Targets `(rows, tokens)` and logits `(rows, tokens, vocabulary)`, after the prefix if there is one."""
    if prefix:
        rows = [_Row(row.prompt[-1:], row.answer) for row in rows]
    ids, mask = pad([row.prompt + row.answer for row in rows], side="right")
    labels, _ = pad([[IGNORE_INDEX] * len(row.prompt) + row.answer for row in rows], "right", IGNORE_INDEX)
    shared = {}
    if prefix:
        cache, prefix_mask = prefix
        # Padding has the position of the last token, since the next may be one that the model does not have.
        positions = prefix_mask.sum(1, keepdim=True) + (mask.cumsum(1) - 1)
        shared = {"past_key_values": cache, "position_ids": positions.to(device)}
        mask = torch.cat([prefix_mask, mask], dim=1)
    logits = model(
        input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=prefix is not None, **shared
    ).logits
    return shift_labels(labels).to(device), logits


def _one_behind(results: Iterator[Result]) -> Iterator[Result]:
    """Gives each result once the next is on its way, so that a GPU need not wait for us to read it."""
    before = next(results, None)
    for result in results:
        yield before
        before = result
    if before is not None:
        yield before


def _scores(tensors: list[Tensor]) -> Iterator[AnswerScore]:
    is_answer, *found = (tensor.cpu() for tensor in tensors)
    for row, kept in enumerate(is_answer):
        yield AnswerScore(*(values[row][kept].tolist() for values in found))
