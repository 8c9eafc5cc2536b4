"""The answers that a model gives when it always takes the most probable token."""

from collections.abc import Callable, Collection, Iterator

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.engines import Engine
from soul_trainer.formats import Example, encode_all
from soul_trainer.reference import eval_mode
from soul_trainer.sampling.drawing import end_tokens, generation_settings

from .batches import (
    AUTO,
    Unit,
    any_process,
    cache_budget,
    can_continue,
    device_of,
    longest_input,
    most_rows,
    only_last_logits,
    pad,
    run_batches,
    shortest,
    token_batches,
    unknown_batches,
)


logger = logging.get_logger(__name__)

# Rows that are done leave a batch once they are this share of it: to move the others costs a copy of their keys.
DONE_SHARE = 8
# Of tqdm, with whole rows: a row that is half done is half a row.
BAR = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    batch_size: int | str = AUTO,
    max_new_tokens: int = 200,
    engine: Engine | None = None,
    description: str = "Greedy answers",
    progress: bool = True,
    known: Collection[int] = (),
) -> Iterator[tuple[int, str]]:
    """
    Answers prompts greedily, the longest first. A row leaves its batch when it is done.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model, on the device that it is on. Sampling settings of its own are ignored.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        examples (`list[Example]`): Their prompts are used, exactly the tokens that come before an answer in training.
        batch_size (`int` or `str`, *optional*, defaults to `"auto"`):
            Tokens whose keys and values are kept at once, new ones included; by default what the memory allows.
        max_new_tokens (`int`, *optional*, defaults to 200):
            Where an answer is cut off; earlier, with a warning, where its prompt leaves less room in the model.
        engine ([`~soul_trainer.engines.Engine`], *optional*): That runs the model, if processes share the examples.
        description (`str`, *optional*): Name of the progress bar.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        known (`Collection[int]`, *optional*): As of [`score_answers`].

    Returns:
        `Iterator[tuple[int, str]]`: Places of this process's part of `examples`, each at most once, and answers
        without special tokens, as they are done.

    Raises:
        ValueError: If an example has no prompt, or a prompt leaves no room within the model's limit.
    """
    prompts = _prompt_ids(tokenizer, examples)
    bounds = _bounds(model, tokenizer, prompts, max_new_tokens)
    settings = _greedy_settings(model, tokenizer, max_new_tokens)
    units = [Unit(place, len(prompt), 1, bounds[place]) for place, prompt in enumerate(prompts)]
    batches = list(token_batches(units, cache_budget(model, batch_size), engine, most_rows(model)))
    todo = list(unknown_batches(batches, known))
    decode = _decode if can_continue(model) else _generate
    spare, total = shortest(units), sum(map(len, batches))
    num_done = total - sum(map(len, todo))
    bar_settings = {"total": total, "initial": num_done, "bar_format": BAR, "disable": not progress}

    def run(batch: list[int]) -> list[list[int]]:
        rows = [prompts[place] for place in batch], [bounds[place] for place in batch]
        bar.update(num_done - bar.n)  # back, where memory ran out within a batch
        return decode(model, *rows, settings, engine, (lambda share: None) if batch is spare else bar.update)

    with (
        eval_mode(model),
        generation_settings(model, settings),
        tqdm(desc=description, unit="answer", **bar_settings) as bar,
    ):
        for batch, answers in run_batches(todo, run, engine, spare):
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            yield from zip(batch, texts)
            num_done += len(batch)
            bar.update(num_done - bar.n)


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    batch_size: int | str = AUTO,
    max_new_tokens: int = 200,
    description: str = "Greedy answers",
    progress: bool = True,
) -> list[str]:
    """
    What the model answers. Arguments are those of [`generate_answers`].

    Returns:
        `list[str]`: In the order of `examples`, without outer white space.
    """
    answers = [""] * len(examples)
    for place, answer in generate_answers(
        model, tokenizer, examples, batch_size, max_new_tokens, description=description, progress=progress
    ):
        answers[place] = answer.strip()
    return answers


def _decode(
    model: PreTrainedModel,
    prompts: list[list[int]],
    bounds: list[int],
    settings: GenerationConfig,
    engine: Engine | None,
    advance: Callable[[float], object],
) -> list[list[int]]:
    """
    At most as many new tokens of each prompt as its bound, without the end of sequence; `advance` is told, in rows,
    how much more of them is done.
    """
    device = device_of(model, engine)
    answers: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    is_done = [False] * len(prompts)
    end_tokens = set(settings.eos_token_id)
    ids, mask = (tensor.to(device) for tensor in pad(prompts, side="left"))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # A row that is done goes on for nothing until it leaves, and must not leave the model's positions meanwhile.
    last_position = max(len(prompt) + bound for prompt, bound in zip(prompts, bounds)) - 1
    cache, num_done = None, 0.0
    while True:
        outputs = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **only_last_logits(model),
        )
        cache = outputs.past_key_values
        ids = outputs.logits[:, -1:].argmax(-1)
        for place, token in zip(alive, ids[:, 0].tolist()):
            is_done[place] = is_done[place] or token in end_tokens
            if not is_done[place]:
                answers[place].append(token)
                is_done[place] = len(answers[place]) == bounds[place]
        shares = [1 if done else len(answer) / bound for done, answer, bound in zip(is_done, answers, bounds)]
        advance(sum(shares) - num_done)
        num_done = sum(shares)
        kept = [row for row, place in enumerate(alive) if not is_done[place]]
        if not any_process(bool(kept), engine):
            return answers
        if kept and len(alive) - len(kept) > len(alive) // DONE_SHARE:
            rows = torch.tensor(kept, device=device)
            cache.batch_select_indices(rows)
            ids, mask, positions = ids[rows], mask[rows], positions[rows]
            alive = [alive[row] for row in kept]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = (positions[:, -1:] + 1).clamp(max=last_position)


def _generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    bounds: list[int],
    settings: GenerationConfig,
    engine: Engine | None,
    advance: Callable[[float], object],
) -> list[list[int]]:
    """The same by transformers' own loop, for models whose state is not keys and values."""
    device = device_of(model, engine)
    ids, mask = pad(prompts, side="left", value=settings.pad_token_id)
    in_step = engine is not None and engine.shards
    tokens = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), synced_gpus=in_step)
    return [row[:bound] for row, bound in zip(tokens[:, ids.shape[1] :].tolist(), bounds)]


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> list[list[int]]:
    prompts = []
    for example, row in zip(examples, encode_all(tokenizer, examples)):
        prompts.append(row["input_ids"][: row["labels"].count(IGNORE_INDEX)])
        if not prompts[-1]:
            raise ValueError(f"nothing to answer: there is no prompt before the answer {example.content[:60]!r}.")
    return prompts


def _bounds(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[int]:
    """New tokens of each prompt, which depend on no other prompt."""
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, but it is {max_new_tokens}.")
    limit = longest_input(model, tokenizer) or 2**30
    bounds = [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
    if min(bounds, default=1) < 1:
        longest = max(map(len, prompts))
        raise ValueError(f"a prompt of {longest} tokens leaves no room for an answer within the model's {limit}.")
    if num_short := sum(bound < max_new_tokens for bound in bounds):
        logger.warning(
            f"{num_short} of {len(prompts)} prompts leave less than {max_new_tokens} new tokens in the model."
        )
    return bounds


def _greedy_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    pad_token = tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(end_tokens(model, tokenizer)),
        pad_token_id=tokenizer.eos_token_id if pad_token is None else pad_token,
    )
