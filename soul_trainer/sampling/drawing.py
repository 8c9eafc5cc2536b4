"""
Draws text from a model. Each token is the one on which a number, uniform in [0, 1), falls in the model's cumulative
distribution. The numbers come from the seed, the row and the try alone, so that a row's text depends neither on the
batch that it shares nor on the number of processes: on a CPU, in float32, batches of any size give the same text,
unless a number falls within rounding (about 1e-6) of where one token ends and the next begins. In 16 bits, or on a
GPU, that happens more often.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging

from ..chat_templates import end_of_turn
from ..engines import Engine
from ..formats import longest_row
from ..reference import eval_mode
from ..settings import Count, CountFromZero, Positive, Share, check_ranges


# What numbers are drawn for: the same row draws others for another purpose.
ALTERNATE, QUESTION, ANSWER, TEXT = range(4)


@dataclass
class SamplingConfig:
    """
    How the model writes.

    Args:
        temperature (`float`, *optional*, defaults to 1.0): Over 0. AltPO and Magpie sample at 1.
        top_p (`float`, *optional*, defaults to 1.0): In (0, 1]: the most probable tokens that make up this share.
        max_new_tokens (`int`, *optional*, defaults to 200): Where a text is cut off, as in AltPO.
        batch_size (`int`, *optional*, defaults to 16): Rows of a forward on each process.
        seed (`int`, *optional*, defaults to 0): At least 0.

    Raises:
        ValueError: If a value is out of its range.
    """

    temperature: Positive = field(default=1.0, metadata={"help": "Over 0; 1 is the model's own distribution."})
    top_p: Share = field(default=1.0, metadata={"help": "Only the most probable tokens of this share, in (0, 1]."})
    max_new_tokens: Count = field(default=200, metadata={"help": "Longest text that the model writes, in tokens."})
    batch_size: Count = field(default=16, metadata={"help": "Rows that are written at once."})
    seed: CountFromZero = field(default=0, metadata={"help": "Seed of what is drawn."})

    def __post_init__(self):
        check_ranges(self)


class Sampled(NamedTuple):
    """
    What the model wrote.

    Attributes:
        text (`str`): After the prompt, without special tokens.
        end (`str`, *optional*): The stop that ended it; empty for a token that ends texts; `None` if it was cut off.
    """

    text: str
    end: str | None


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    draws: list[tuple[int, ...]],
    config: SamplingConfig,
    max_new_tokens: int,
    stops: Sequence[str] = (),
    engine: Engine | None = None,
    description: str = "Sampling",
) -> list[Sampled]:
    """
    Goes on from prompts.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model; settings of its own are ignored.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's; it needs no padding token.
        prompts (`list[list[int]]`): Token ids, at least one each; the same on every process.
        draws (`list[tuple[int, ...]]`): What the numbers of each prompt depend on, integers of at least 0.
        config ([`SamplingConfig`]): Temperature, `top_p`, rows of a batch.
        max_new_tokens (`int`): Where a text is cut off.
        stops (`Sequence[str]`, *optional*): A text ends before the first of them.
        engine ([`~engines.Engine`], *optional*): Shares the prompts over its processes.
        description (`str`, *optional*): Name of the progress bar.

    Returns:
        `list[Sampled]`: In the order of `prompts`, on every process.
    """
    engine = engine or Engine()
    rows = engine.share(list(zip(prompts, draws)))
    device = engine.accelerator.device if engine.accelerator else next(model.parameters()).device
    ends = end_tokens(model, tokenizer) | {_as_token(tokenizer, stop) for stop in stops} - {None}
    settings = _settings(tokenizer, ends, max_new_tokens, [s for s in stops if _as_token(tokenizer, s) is None])
    is_shown = logging.is_progress_bar_enabled() and engine.process_index == 0
    said = []
    with eval_mode(model), generation_settings(model, settings):
        for start in tqdm(range(0, len(rows), config.batch_size), desc=description, disable=not is_shown):
            batch = rows[start : start + config.batch_size]
            ids = [torch.tensor(prompt) for prompt, _ in batch]
            mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left")
            ids = pad_sequence(ids, batch_first=True, padding_value=settings.pad_token_id, padding_side="left")
            numbers = torch.tensor(np.stack([np.random.default_rng(draw).random(max_new_tokens) for _, draw in batch]))
            tokens = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                logits_processor=_processors(config, numbers.to(device), ids.shape[1]),
                synced_gpus=engine.shards,
                **({"tokenizer": tokenizer} if settings.stop_strings else {}),
            )
            new = tokens[:, ids.shape[1] :].tolist()
            said += [_sampled(tokenizer, prompt, row, ends, stops) for (prompt, _), row in zip(batch, new)]
    engine.forget_gathered(model)
    return [Sampled(*each) for each in engine.collect(said, len(prompts))]


class _OwnNumbers(LogitsProcessor):
    """Leaves each row the one token on which its own number falls, so that a greedy choice is a draw."""

    def __init__(self, numbers: Tensor, prompt_length: int):
        self.numbers, self.prompt_length = numbers, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        shares = scores.double().softmax(-1).cumsum(-1)
        number = self.numbers[:, input_ids.shape[1] - self.prompt_length, None] * shares[:, -1:]
        chosen = torch.searchsorted(shares, number, right=True).clamp(max=shares.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def open_ids(tokenizer: PreTrainedTokenizerBase, text: str, is_chat: bool = False) -> list[int]:
    """Tokens of a text that goes on; of no text, the token that begins one."""
    ids = tokenizer(text, add_special_tokens=not is_chat)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id and ids != [tokenizer.bos_token_id]:
        ids = ids[:-1]
    if ids:
        return ids
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if begin is None:
        raise ValueError("the tokenizer has neither `bos_token` nor `eos_token` to begin a text with: set one.")
    return [begin]


def room_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    config: SamplingConfig,
    part: int = 1,
) -> int:
    """
    New tokens: `max_new_tokens` or, if that is less, this part of what the longest prompt leaves in the model. It is
    the same for all prompts, so that no row's length depends on its batch.

    Raises:
        ValueError: If the longest prompt leaves none within the limit of model and tokenizer.
    """
    limit, longest = longest_row(None, model, tokenizer), max(map(len, prompts))
    if limit - longest < part:
        raise ValueError(f"a prompt of {longest} tokens leaves no room for text within the model's {limit} positions.")
    return min(config.max_new_tokens, (limit - longest) // part)


def words_of(text: str) -> list[str]:
    """The words of a text, without case and punctuation, for comparing texts."""
    return re.findall(r"\w+", text.casefold())


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text: a chat model may end its turns with others than its tokenizer's."""
    end = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, end_of_turn(tokenizer), *(end if isinstance(end, list) else [end])} - {None}


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Those that decoded texts leave out: a chat's markers need not have a name of the tokenizer's, as `eos_token`."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def _as_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The special token that a text is, if it is one: decoded texts have none in them."""
    return tokenizer.convert_tokens_to_ids(text) if text in special_tokens(tokenizer) else None


def _settings(tokenizer, ends: set[int], max_new_tokens: int, stop_strings: list[str]) -> GenerationConfig:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    return GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        stop_strings=stop_strings or None,
    )


def _processors(config: SamplingConfig, numbers: Tensor, prompt_length: int) -> LogitsProcessorList:
    warpers = [] if config.temperature == 1 else [TemperatureLogitsWarper(float(config.temperature))]
    warpers += [] if config.top_p == 1 else [TopPLogitsWarper(config.top_p)]
    return LogitsProcessorList([*warpers, _OwnNumbers(numbers, prompt_length)])


def _sampled(
    tokenizer, prompt: list[int], tokens: list[int], ends: set[int], stops: Sequence[str]
) -> tuple[str, str | None]:
    """What comes before the first token that ends a text and before the first stop, and which of the two it was."""
    place = next((place for place, token in enumerate(tokens) if token in ends), None)
    # Together with the prompt: by itself, a text may lose the space that it begins with.
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + tokens[:place]))
    text, end = whole[len(before) :], None if place is None else ""
    for stop in stops:
        before, found, _ = text.partition(stop)
        text, end = (before, stop) if found else (text, end)
    return text, end


@contextmanager
def generation_settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Replaces the model's own settings as a whole: `generate` fills whatever it is not told from them."""
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = owner.generation_config
    owner.generation_config = settings
    try:
        yield
    finally:
        owner.generation_config = before
