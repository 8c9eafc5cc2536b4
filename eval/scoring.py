"""
What a model says: the loss of given answers, and the answers that it gives itself.

Both sort their rows by length, so that a batch has next to no padding, and both mask by length, so that padding may be
any token. The result of a row does not depend on the rows that it shares a batch with, nor on the number of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.formats import Example, encode
from soul_trainer.log_probs import shift_labels, token_log_probs
from soul_trainer.reference import eval_mode


logger = logging.get_logger(__name__)


# Not inference_mode: evaluation runs in the middle of training, where tensors that a model caches must stay usable.
@torch.no_grad()
def answer_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    batch_size: int = 32,
    max_length: int | None = None,
    description: str = "Answer losses",
    progress: bool = True,
) -> list[float]:
    """
    Mean negative log-likelihood per answer token, the end of sequence included.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model; it is used on the device that it is on.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        examples (`list[Example]`): From `soul_trainer.formats.render`.
        batch_size (`int`, *optional*, defaults to 32): Examples in a forward.
        max_length (`int`, *optional*):
            Tokens beyond are cut off, and the answers counted in a warning. By default the model's limit.
        description (`str`, *optional*): Name of the progress bar.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `list[float]`: In nats, in the order of `examples`.

    Raises:
        ValueError: If an example has no answer token within `max_length`.
    """
    max_length = max_length or longest_input(model, tokenizer)
    rows = [encode(tokenizer, example) for example in examples]
    too_long = [index for index, row in enumerate(rows) if max_length and len(row["input_ids"]) > max_length]
    for index in too_long:
        rows[index] = encode(tokenizer, examples[index], max_length)
    if too_long:
        logger.warning(f"{len(too_long)} of {len(rows)} answers are cut off at `max_length`={max_length} tokens.")
    losses = [0.0] * len(rows)
    with eval_mode(model), tqdm(total=len(rows), desc=description, unit="answer", disable=not progress) as bar:
        for batch in _batches([len(row["input_ids"]) for row in rows], batch_size):
            input_ids, attention_mask = _pad([rows[index]["input_ids"] for index in batch], side="right")
            labels, _ = _pad([rows[index]["labels"] for index in batch], side="right", value=IGNORE_INDEX)
            targets = shift_labels(labels).to(model.device)
            logits = model(
                input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device), use_cache=False
            ).logits
            log_probs = token_log_probs(logits, targets).double().sum(1)
            means = -log_probs / (targets != IGNORE_INDEX).sum(1)
            for index, loss in zip(batch, means.tolist()):
                losses[index] = loss
            bar.update(len(batch))
    return losses


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    batch_size: int = 64,
    max_new_tokens: int = 200,
    description: str = "Greedy answers",
    progress: bool = True,
) -> list[str]:
    """
    What the model answers when it always takes the most probable token.

    Args:
        model ([`~transformers.PreTrainedModel`]): As in [`answer_losses`]. Sampling settings of its own are ignored.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        examples (`list[Example]`): Their prompts are used, exactly the tokens that come before an answer in training.
        batch_size (`int`, *optional*, defaults to 64): Examples that are answered together.
        max_new_tokens (`int`, *optional*, defaults to 200):
            Where an answer is cut off. Less if the longest prompt leaves no room for it within the model's limit.
        description (`str`, *optional*): Name of the progress bar.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `list[str]`: Without special tokens and outer white space, in the order of `examples`.

    Raises:
        ValueError: If an example has no prompt, or a prompt leaves no room within the model's limit.
    """
    prompts = [_prompt_ids(tokenizer, example) for example in examples]
    settings = _greedy_settings(model, tokenizer, prompts, max_new_tokens)
    answers = [""] * len(prompts)
    with (
        eval_mode(model),
        _generation_settings(model, settings),
        tqdm(total=len(prompts), desc=description, unit="answer", disable=not progress) as bar,
    ):
        for batch in _batches([len(prompt) for prompt in prompts], batch_size):
            input_ids, attention_mask = _pad([prompts[index] for index in batch], side="left")
            tokens = model.generate(
                input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device)
            )
            texts = tokenizer.batch_decode(tokens[:, input_ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(batch, texts):
                answers[index] = text.strip()
            bar.update(len(batch))
    return answers


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of tokens that model and tokenizer both allow, or `None` if neither sets a limit."""
    positions = getattr(model.config, "max_position_embeddings", None)
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit and limit < 2**30]
    return min(limits, default=None)


def _batches(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, the longest first: memory runs out at once or not at all."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, but it is {batch_size}.")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _pad(rows: list[list[int]], side: str, value: int = 0) -> tuple[Tensor, Tensor]:
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


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    encoded = encode(tokenizer, example)
    prompt = [token for token, label in zip(encoded["input_ids"], encoded["labels"]) if label == IGNORE_INDEX]
    if not prompt:
        raise ValueError(f"nothing to answer: there is no prompt before the answer {example.content[:60]!r}.")
    return prompt


def _greedy_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> GenerationConfig:
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, but it is {max_new_tokens}.")
    limit = longest_input(model, tokenizer)
    if limit:
        # One bound for all rows, so that it does not depend on which rows share a batch.
        longest_prompt = max(map(len, prompts), default=0)
        max_new_tokens = min(max_new_tokens, limit - longest_prompt)
        if max_new_tokens < 1:
            raise ValueError(
                f"a prompt of {longest_prompt} tokens leaves no room for an answer within the model's {limit}."
            )
    # A chat model may end its turns with other tokens than its tokenizer's.
    end = model.generation_config.eos_token_id
    end_tokens = {tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])} - {None}
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(end_tokens),
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
    )


@contextmanager
def _generation_settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Replaces the model's own settings as a whole: `generate` fills whatever it is not told from them."""
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = owner.generation_config
    owner.generation_config = settings
    try:
        yield
    finally:
        owner.generation_config = before
