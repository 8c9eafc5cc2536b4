"""
What the model said before unlearning, at the least cost in memory.

| an objective needs | it gets |
|---|---|
| one number a sequence (NPO) | log-probabilities computed once before training, kept as a column of the forget rows |
| whole distributions (KL) with an adapter of our own | the same model with the adapter switched off |
| whole distributions (KL) else | a frozen copy, which shares every tensor that training does not change |
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from .engines import Engine
from .log_probs import shift_labels, token_log_probs


class Reference:
    """
    The model before unlearning, for its logits.

    Args:
        model (`torch.nn.Module`): The unwrapped model, before the first step.
        is_fresh_adapter (`bool`): Whether it is a peft model whose adapter has not been trained yet.
    """

    def __init__(self, model: torch.nn.Module, is_fresh_adapter: bool):
        is_silent = is_fresh_adapter and _adds_nothing(model)
        self.model, self.context = (model, model.disable_adapter) if is_silent else (_frozen(model), nullcontext)

    @torch.no_grad()
    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """
        Args:
            inputs (`dict[str, torch.Tensor]`): The model's arguments, tensors of shape `(rows, tokens)`.

        Returns:
            `torch.FloatTensor` of shape `(rows, tokens, vocabulary)`.
        """
        with self.context(), eval_mode(self.model):
            return self.model(**inputs, use_cache=False).logits


@torch.no_grad()
def add_reference_log_prob(
    dataset: Dataset,
    model: torch.nn.Module,
    collate: Callable[[list[dict]], dict[str, Tensor]],
    batch_size: int,
    engine: Engine,
    show_progress: bool = True,
) -> Dataset:
    """
    Adds the column `reference_log_prob`: the log-probability of each row's whole answer under the model as it is.

    Args:
        dataset ([`~datasets.Dataset`]): From [`~formats.prepare`].
        model (`torch.nn.Module`): The unwrapped model, before the first step.
        collate (`Callable`): Makes a padded batch of rows.
        batch_size (`int`): Rows in a forward on one process.
        engine ([`Engine`]): The rows are shared out over its processes.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        [`~datasets.Dataset`]: `dataset` with the column, float64 numbers of float32 sums, in nats.
    """
    device = next(model.parameters()).device
    rows = engine.share(list(range(len(dataset))))
    values = []
    with eval_mode(model), engine.autocast():
        starts = range(0, len(rows), batch_size)
        for start in tqdm(starts, desc="Reference log-probabilities", disable=not show_progress):
            items = [{"forget": dataset[row]} for row in rows[start : start + batch_size]]
            batch = {key: tensor.to(device) for key, tensor in collate(items).items()}
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            values += token_log_probs(logits, shift_labels(batch["labels"])).sum(1).tolist()
    return dataset.add_column("reference_log_prob", engine.collect(values))


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """A context without dropout that puts every module's own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def _adds_nothing(model: torch.nn.Module) -> bool:
    """Whether the adapter is silent: some, as PiSSA, begin with weights that they take out of the model instead."""
    ids = torch.arange(8, device=next(model.parameters()).device)[None]
    with eval_mode(model):
        logits = model(ids, use_cache=False).logits
        with model.disable_adapter():
            return torch.equal(logits, model(ids, use_cache=False).logits)


def _frozen(model: torch.nn.Module) -> torch.nn.Module:
    # deepcopy takes what it finds in its memo as already copied: frozen tensors are shared instead of doubled.
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()] if not tensor.requires_grad}
    return copy.deepcopy(model, memo=shared).requires_grad_(False)
