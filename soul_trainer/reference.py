"""
What the model said before unlearning, at the least cost in memory.

| an objective needs | it gets |
|---|---|
| one number a sequence (NPO) | log-probabilities computed once before training, kept as a column of the forget rows |
| whole distributions (KL) with an adapter of our own | the same model with the adapter switched off |
| whole distributions (KL) else | the weights that training changes, kept, and put in their place for a forward |

The kept weights are this process's part of them, so that they are sharded as the engine shards the model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
        engine ([`~engines.Engine`]): That runs the model.
    """

    def __init__(self, model: torch.nn.Module, is_fresh_adapter: bool, engine: Engine):
        self.model, self.engine = model, engine
        is_silent = is_fresh_adapter and _adds_nothing(model)
        engine.forget_gathered(model)
        self.kept = None if is_silent else [weight.clone() for weight in engine.local_weights(model)]

    @torch.no_grad()
    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """
        Must not come between a forward of the model in training and its backward.

        Args:
            inputs (`dict[str, torch.Tensor]`): The model's arguments, tensors of shape `(rows, tokens)`.

        Returns:
            `torch.FloatTensor` of shape `(rows, tokens, vocabulary)`.
        """
        context = self.model.disable_adapter() if self.kept is None else self._weights_put_back()
        with context, eval_mode(self.model):
            return self.model(**inputs, use_cache=False).logits

    @contextmanager
    def _weights_put_back(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        self.engine.forget_gathered(self.model)
        for weight, kept in zip(self.engine.local_weights(self.model), self.kept):
            now = weight.clone()
            weight.copy_(kept)
            kept.copy_(now)


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
        engine ([`~engines.Engine`]): The rows are shared out over its processes.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        [`~datasets.Dataset`]: `dataset` with the column, float64 numbers of float32 sums, in nats.
    """
    device = engine.accelerator.device if engine.shards else next(model.parameters()).device
    rows = engine.share(list(range(len(dataset))))
    values = []
    with eval_mode(model), engine.autocast():
        starts = range(0, len(rows), batch_size)
        for start in tqdm(starts, desc="Reference log-probabilities", disable=not show_progress):
            items = [{"forget": dataset[row]} for row in rows[start : start + batch_size]]
            batch = {key: tensor.to(device) for key, tensor in collate(items).items()}
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            values += token_log_probs(logits, shift_labels(batch["labels"])).sum(1).tolist()
    engine.forget_gathered(model)
    return dataset.add_column("reference_log_prob", engine.collect(values, len(dataset)))


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """A context without dropout that puts every module's own mode back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        # In evaluation on a CPU, bitsandbytes packs a layer's weights for good, and their product has no gradient.
        module.training = type(module).__name__ == "Linear4bit"
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
