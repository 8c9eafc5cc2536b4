"""
A little training. If a few of the rows to forget, or text that has nothing to do with them, bring the others back,
they were hidden and not gone (Lynch et al., 2024, arXiv 2402.16835; Hu et al., 2024, arXiv 2406.13356).

It is a plain loop and not a Trainer, which would move the model to a device of its choice and split it over all GPUs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.collator import UnlearnCollator
from soul_trainer.formats import longest_row, prepare
from soul_trainer.log_probs import shift_labels, token_log_probs


FIRST, DRAWN = "first", "drawn"


@dataclass
class RelearningArguments:
    """What the attacker trains on, and how: AdamW without weight decay, a constant rate, gradients clipped at 1."""

    relearn_rows: int = field(default=20, metadata={"help": "So many rows to forget are trained on."})
    relearn_draw: str = field(default=FIRST, metadata={"help": "first rows, or drawn at random."})
    relearn_steps: int = field(default=50, metadata={"help": "Optimizer steps."})
    relearn_batch_size: int = field(default=4, metadata={"help": "Rows in a step."})
    relearn_learning_rate: float = field(default=1e-5, metadata={"help": "Constant."})
    relearn_lora_rank: int = field(
        default=0, metadata={"help": "Trains LoRA adapters of this rank instead of all weights, to save memory."}
    )
    relearn_seed: int = field(default=0, metadata={"help": "Of the rows drawn, their order, dropout, adapters."})
    relearn_max_length: int | None = field(default=None, metadata={"help": "Longest row in tokens."})

    def __post_init__(self):
        for name in ("relearn_rows", "relearn_steps", "relearn_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but it is {getattr(self, name)}.")
        if self.relearn_lora_rank < 0:
            raise ValueError(f"`relearn_lora_rank` must be at least 0, but it is {self.relearn_lora_rank}.")
        if not self.relearn_learning_rate > 0:
            raise ValueError(f"`relearn_learning_rate` must be more than 0, but it is {self.relearn_learning_rate}.")
        if self.relearn_draw not in (FIRST, DRAWN):
            raise ValueError(f"`relearn_draw` must be {FIRST!r} or {DRAWN!r}, but it is {self.relearn_draw!r}.")


def rows_to_relearn(rows: list[dict], arguments: RelearningArguments) -> list[dict]:
    """
    The rows that the attacker has.

    Args:
        rows (`list[dict]`): All rows to forget.
        arguments ([`RelearningArguments`]): How many, and which.

    Returns:
        `list[dict]`: Some of `rows`, in their order.

    Raises:
        ValueError: If no row would be left that was not trained on, which is what the attack is about.
    """
    if arguments.relearn_rows >= len(rows):
        raise ValueError(
            f"`relearn_rows` must be less than {len(rows)}, all rows to forget, but it is {arguments.relearn_rows}: "
            "what counts is whether the others come back."
        )
    if arguments.relearn_draw == FIRST:
        return rows[: arguments.relearn_rows]
    generator = torch.Generator().manual_seed(arguments.relearn_seed)
    chosen = torch.randperm(len(rows), generator=generator)[: arguments.relearn_rows].tolist()
    return [rows[place] for place in sorted(chosen)]


@contextmanager
def relearned_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset | list[dict],
    arguments: RelearningArguments,
    prompt_template: str | None = None,
    progress: bool = True,
) -> Iterator[PreTrainedModel]:
    """
    A context in which the model has been trained on rows. Afterwards its weights are what they were, bit for bit.

        with relearned_weights(model, tokenizer, rows[:20], RelearningArguments()):
            rows = ask(model, ...)

    Within, all weights that are trained are float32: with 16 bits, most of what a small learning rate adds to a weight
    is rounded away, and the attack would seem to fail.

    Args:
        model ([`~transformers.PreTrainedModel`]): Not sharded; weights that need no gradient stay.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        rows ([`~datasets.Dataset`] or `list[dict]`): In a format of `soul_trainer.formats`; unrelated `text` too.
        arguments ([`RelearningArguments`]): How to train.
        prompt_template (`str`, *optional*): As in training; see `soul_trainer.formats.render`.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `Iterator[PreTrainedModel]`: The model itself, in evaluation mode.

    Raises:
        ValueError: If no weight needs a gradient and there is no `relearn_lora_rank`, the loss is not finite, or a row
            cannot be tokenized.
    """
    longest = longest_row(arguments.relearn_max_length, model, tokenizer)
    dataset = prepare(rows, tokenizer, longest, prompt_template, name="rows to relearn")
    items = dataset.select_columns(["input_ids", "labels"]).to_list()
    modes = {module: module.training for module in model.modules()}
    rank = arguments.relearn_lora_rank
    try:
        with _adapter(model, rank, arguments.relearn_seed) if rank else _own_weights(model):
            with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), torch.enable_grad():
                torch.manual_seed(arguments.relearn_seed)
                _train(model, items, UnlearnCollator.for_tokenizer(tokenizer), arguments, progress)
            yield model.eval()
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _own_weights(model: PreTrainedModel) -> Iterator[None]:
    """All weights are float32 copies, and are put back."""
    weights = list(model.parameters())
    if not any(weight.requires_grad for weight in weights):
        raise ValueError(
            "`model` has no weight that needs a gradient: set `relearn_lora_rank`, or load it without quantizing."
        )
    gradients = [weight.grad for weight in weights]
    tensors = [*weights, *model.buffers()]
    kept = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    try:
        for weight in weights:
            weight.data, weight.grad = weight.data.float(), None
        yield
    finally:
        for tensor, before in zip(tensors, kept):
            tensor.data = before.to(tensor.device)
        for weight, gradient in zip(weights, gradients):
            weight.grad = gradient


@contextmanager
def _adapter(model: PreTrainedModel, rank: int, seed: int) -> Iterator[None]:
    """Linear layers have a LoRA adapter (Hu et al., 2021, arXiv 2106.09685) in float32, and lose it."""
    from peft import LoraConfig, get_peft_model

    if hasattr(model, "merge_and_unload"):
        raise ValueError("`model` has an adapter already: `merge_and_unload` it first.")
    needed = {weight: weight.requires_grad for weight in model.parameters()}
    # peft draws the first factor at random.
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
    try:
        yield
    finally:
        adapted.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config
        for weight, was_needed in needed.items():
            weight.requires_grad_(was_needed)


def _train(
    model: PreTrainedModel,
    items: list[dict],
    collate: UnlearnCollator,
    arguments: RelearningArguments,
    progress: bool,
) -> None:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=arguments.relearn_learning_rate, weight_decay=0.0)
    model.train()
    batches = _batches(items, arguments)
    for step in tqdm(range(arguments.relearn_steps), desc="Relearning", disable=not progress):
        batch = {key: tensor.to(model.device) for key, tensor in collate(next(batches)).items()}
        targets = shift_labels(batch["labels"])
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        loss = -token_log_probs(logits, targets).sum() / (targets != IGNORE_INDEX).sum()
        if not loss.isfinite():
            raise ValueError(f"The loss of relearning is {loss.item()} in step {step}: lower `relearn_learning_rate`.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _batches(items: list[dict], arguments: RelearningArguments) -> Iterator[list[dict]]:
    """Epoch after epoch in a new order, without end."""
    generator = torch.Generator().manual_seed(arguments.relearn_seed)
    while True:
        order = torch.randperm(len(items), generator=generator).tolist()
        for start in range(0, len(order), arguments.relearn_batch_size):
            yield [items[place] for place in order[start : start + arguments.relearn_batch_size]]
