"""Rows in batches that hold so many tokens, padding included, and the forwards that sharded processes do together."""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from soul_trainer.engines import Engine


AUTO = "auto"
LEAST_TOKENS = 64
# On a CPU a forward gains nothing from more tokens, and the logits of these stay within the memory of any machine.
CPU_LOGITS_BYTES, CPU_CACHE_BYTES = 2**28, 2**30
MOST_CPU_TOKENS, MOST_GPU_TOKENS = 2048, 2**17
# Of the free memory of a GPU; the rest is for what the allocator cannot use.
GPU_SHARE = 0.5
# Rows whose keys and values grow by a copy at each new token: on a CPU more than these leave its caches.
MOST_CPU_ROWS, MOST_GPU_ROWS = 256, 512
# Prompts computed together, in budgets: they have no logits, and the more there are, the better their rows sort.
PREFIX_BUDGETS = 4
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

Result = TypeVar("Result")


class Unit(NamedTuple):
    """
    Rows that go into a batch together.

    Attributes:
        index (`int`): What it is called outside.
        prefix (`int`): Tokens that its rows share.
        rows (`int`): Number of its rows.
        suffix (`int`): Tokens of its longest row after the prefix.
    """

    index: int
    prefix: int
    rows: int
    suffix: int


def token_batches(
    units: list[Unit], budget: int, engine: Engine | None = None, most_rows: int = MOST_GPU_ROWS
) -> Iterator[list[int]]:
    """
    This process's units in batches of similar length, the longest first: memory runs out at once or not at all.

    Args:
        units (`list[Unit]`): All processes', in any order.
        budget (`int`): Tokens of a batch, padding included; a unit that is longer is a batch by itself.
        engine ([`~soul_trainer.engines.Engine`], *optional*): That runs the model, if processes share the units.
        most_rows (`int`, *optional*, defaults to 512): Rows of a batch.

    Returns:
        `Iterator[list[int]]`: The units' indices.
    """
    batch: list[Unit] = []
    for unit in own_units(units, engine):
        together = [*batch, unit]
        num_rows = sum(each.rows for each in together)
        padded = len(together) * max(each.prefix for each in together) + num_rows * max(u.suffix for u in together)
        if batch and (padded > budget or num_rows > most_rows):
            yield [each.index for each in batch]
            together = [unit]
        batch = together
    if batch:
        yield [each.index for each in batch]


def unknown_batches(batches: Iterable[list[int]], known: Collection[int]) -> Iterator[list[int]]:
    """
    Batches of which something is not known yet. They are run whole: the numbers of a row depend, in the last digits,
    on the rows beside it, and must not tell where a run was stopped.
    """
    return (batch for batch in batches if not known or not all(index in known for index in batch))


def own_units(units: list[Unit], engine: Engine | None) -> list[Unit]:
    """This process's units, the longest first."""
    order = sorted(units, key=lambda unit: (-unit.suffix, -unit.prefix))
    return order if engine is None else order[engine.process_index :: engine.num_processes]


def shortest(units: list[Unit]) -> list[int]:
    """A batch of the shortest unit, which every process knows of."""
    return [min(units, key=lambda unit: unit.prefix + unit.suffix).index] if units else []


def check_batch_size(batch_size: int | str) -> int | str:
    """
    `batch_size` as a number of tokens, or `"auto"`.

    Raises:
        ValueError: If it is neither, or so small that rows must have been meant.
    """
    if batch_size == AUTO:
        return AUTO
    try:
        tokens = int(batch_size)
    except ValueError:
        raise ValueError(f"`batch_size` must be a number of tokens or {AUTO!r}, but it is {batch_size!r}.") from None
    if tokens < LEAST_TOKENS:
        raise ValueError(
            f"`batch_size` counts tokens, padding included, and must be at least {LEAST_TOKENS}, but it is {tokens}: "
            f"use {AUTO!r}, or as many tokens as your memory takes."
        )
    return tokens


def logits_budget(model: PreTrainedModel, batch_size: int | str) -> int:
    """Tokens of a batch whose every position needs logits."""
    if check_batch_size(batch_size) != AUTO:
        return int(batch_size)
    config = model.config.get_text_config()
    token_bytes = 4 * config.vocab_size + 64 * config.hidden_size
    if model.device.type == "cuda":
        return _clip(GPU_SHARE * torch.cuda.mem_get_info(model.device)[0] / token_bytes, MOST_GPU_TOKENS)
    return _clip(CPU_LOGITS_BYTES / token_bytes, MOST_CPU_TOKENS)


def cache_budget(model: PreTrainedModel, batch_size: int | str) -> int:
    """Tokens of a batch whose keys and values are kept."""
    if check_batch_size(batch_size) != AUTO:
        return int(batch_size)
    config = model.config.get_text_config()
    # An upper bound: models with grouped heads keep less.
    token_bytes = 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    if model.device.type == "cuda":
        return _clip(GPU_SHARE * torch.cuda.mem_get_info(model.device)[0] / token_bytes, 2 * MOST_GPU_TOKENS)
    return _clip(CPU_CACHE_BYTES / token_bytes, 2 * MOST_GPU_TOKENS)


def _clip(tokens: float, most: int) -> int:
    return int(max(LEAST_TOKENS, min(tokens, most)))


def run_batches(
    batches: Iterable[list[int]], run: Callable[[list[int]], Result], engine: Engine | None, spare: list[int]
) -> Iterator[tuple[list[int], Result]]:
    """
    Runs this process's batches one after the other. One that does not fit into memory is halved.

    A forward of a sharded model needs all processes: one that has no batch left runs `spare`, for nothing.

    Args:
        batches (`Iterable[list[int]]`): From [`token_batches`].
        run (`Callable`): Takes a batch; does as many forwards as on all other processes at this time.
        engine ([`~soul_trainer.engines.Engine`], *optional*): As in [`token_batches`].
        spare (`list[int]`): A batch of one, as short as there is.

    Returns:
        `Iterator[tuple[list[int], Result]]`: Batches and what came of them.

    Raises:
        torch.OutOfMemoryError: If a single row does not fit, or a process of a sharded model cannot halve alone.
    """
    waiting = list(batches)[::-1]
    in_step = engine is not None and engine.shards
    while any_process(bool(waiting), engine):
        batch = waiting.pop() if waiting else None
        try:
            result = run(spare if batch is None else batch)
        except torch.OutOfMemoryError:
            if in_step or len(batch) == 1:
                raise
            result = None
        if result is None:
            # Outside of the handler, whose traceback holds the tensors that did not fit.
            torch.cuda.empty_cache()
            half = len(batch) // 2
            waiting += [batch[half:], batch[:half]]
        elif batch is not None:
            yield batch, result


def most_rows(model: PreTrainedModel) -> int:
    """Rows that are best generated together."""
    return MOST_GPU_ROWS if model.device.type == "cuda" else MOST_CPU_ROWS


def device_of(model: PreTrainedModel, engine: Engine | None) -> torch.device:
    """Where inputs go: parameters that an engine has moved out of the way lie elsewhere."""
    return engine.accelerator.device if engine is not None and engine.shards else model.device


def any_process(busy: bool, engine: Engine | None) -> bool:
    """Whether this process is busy or, where the model is sharded, any is."""
    if engine is None or not engine.shards or engine.num_processes == 1:
        return busy
    return bool(engine.sum(torch.tensor(int(busy), device=engine.accelerator.device)))


def pad(rows: list[list[int]], side: str, value: int = 0) -> tuple[Tensor, Tensor]:
    """
    Returns:
        `tuple[torch.LongTensor, torch.LongTensor]` of shape `(rows, tokens)`: The rows, and their attention mask.
    """
    width = max(map(len, rows))
    padded = torch.full((len(rows), width), value)
    mask = torch.zeros_like(padded)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(len(row))
        padded[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return padded, mask


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of tokens that model and tokenizer both allow, or `None` if neither sets a limit."""
    positions = getattr(model.config, "max_position_embeddings", None)
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit and limit < 2**30]
    return min(limits, default=None)


def can_continue(model: PreTrainedModel) -> bool:
    """
    Whether a forward can go on from the keys and values of another, at given positions. Recurrent models keep a state
    instead, those without position ids take no gaps, and learnt prompts are themselves keys and values.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return False
    known = inspect.signature(forward_of(model)).parameters
    layers = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return {"past_key_values", "position_ids"} <= known.keys() and set(layers) <= ATTENTION_LAYERS


def forward_of(model: PreTrainedModel) -> Callable:
    """The forward of the model inside its adapter, which takes the arguments that it names."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).forward


def only_last_logits(model: PreTrainedModel) -> dict[str, int]:
    """The argument for logits at the last position alone, where a model knows it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(forward_of(model)).parameters else {}
