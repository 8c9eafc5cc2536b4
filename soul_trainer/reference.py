"""
The model before unlearning, without a second model in memory. What a number, or a few, a token can say is computed
once and kept with the rows (`reference_rows.py`); for the rest:

| an objective needs | it gets |
|---|---|
| whole distributions, activations, with an adapter of our own | the same model with the adapter switched off |
| whole distributions, activations, else | the weights that training changes, kept, put in their place for a forward |

The kept weights are this process's part of them, so that they are sharded as the engine shards the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from .batch import ForgetRetainBatch
from .config import UnlearnConfig
from .engines import Engine
from .halves import Half, split
from .objectives import Objectives


class Reference:
    """
    The model before unlearning.

    Args:
        model (`torch.nn.Module`): The unwrapped model, before the first step.
        is_fresh_adapter (`bool`): Whether it is a peft model whose adapter has not been trained yet.
        engine ([`~engines.Engine`]): That runs the model.
    """

    def __init__(self, model: torch.nn.Module, is_fresh_adapter: bool, engine: Engine):
        self.model, self.engine = model, engine
        with engine.autocast():
            is_silent = is_fresh_adapter and _adds_nothing(model)
        engine.forget_gathered(model)
        self.kept = None if is_silent else [weight.clone() for weight in engine.local_weights(model)]

    @torch.no_grad()
    def outputs(self, inputs: dict[str, Tensor], hidden_states: bool = False) -> CausalLMOutputWithPast:
        """
        Must not come between a forward of the model in training and its backward.

        Args:
            inputs (`dict[str, torch.Tensor]`): The model's arguments, tensors of shape `(rows, tokens)`.
            hidden_states (`bool`, *optional*, defaults to `False`): Whether to give the layers' outputs too.

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutputWithPast`]: With `logits` of shape `(rows, tokens,
            vocabulary)`.
        """
        context = self.model.disable_adapter() if self.kept is None else self._weights_put_back()
        with context, eval_mode(self.model):
            return self.model(**inputs, use_cache=False, output_hidden_states=hidden_states)

    @torch.no_grad()
    def negate(self, scale: float) -> None:
        """
        Puts the weights on the other side of where they began, `theta <- theta_0 - scale (theta - theta_0)` (task
        arithmetic; Ilharco et al., 2023, arXiv 2212.04089). A LoRA adapter begins at nothing; its product is negated.
        """
        self.engine.forget_gathered(self.model)
        if self.kept is None:
            names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
            for name, weight in zip(names, self.engine.local_weights(self.model)):
                if "lora_B" in name or "lora_embedding_B" in name:
                    weight.mul_(-scale)
            return
        for weight, kept in zip(self.engine.local_weights(self.model), self.kept):
            weight.copy_(kept - scale * (weight - kept))

    @contextmanager
    def _weights_put_back(self) -> Iterator[None]:
        self.engine.swap_weights(self.model, self.kept)
        try:
            yield
        finally:
            self.engine.swap_weights(self.model, self.kept)


def needs_model(objectives: Objectives, args: UnlearnConfig) -> bool:
    """Whether the objectives need the model before unlearning itself, rather than numbers that rows keep."""
    needs_distributions = objectives.any("needs_reference") and args.reference == "auto"
    return needs_distributions or objectives.any("needs_reference_hidden_states") or objectives.any("is_negated")


def forward_halves(
    model: torch.nn.Module,
    batch: ForgetRetainBatch,
    objectives: Objectives,
    args: UnlearnConfig,
    reference: Reference | None = None,
) -> tuple[tuple[Half, Half], CausalLMOutputWithPast]:
    """
    Both halves of a batch in one forward of the model and, where the objectives ask for it, one of the reference.

    Args:
        model (`torch.nn.Module`): As it is trained.
        batch ([`~batch.ForgetRetainBatch`]): On its device.
        objectives ([`~objectives.Objectives`]): What is asked of the halves.
        args ([`UnlearnConfig`]): Names the layer whose output is a hidden state, and the kind of reference.
        reference ([`Reference`], *optional*): The model before unlearning.

    Returns:
        `tuple`: The forget and the retain half, and the model's outputs.
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    needs_logits = objectives.any("needs_reference") and args.reference == "auto"
    needs_layer = objectives.any("needs_reference_hidden_states")

    def layer_of(found: CausalLMOutputWithPast) -> Tensor | None:
        states = getattr(found, "hidden_states", None)
        return None if states is None else states[args.rmu_layer + 1]

    reference_logits = reference_layer = None
    if reference is not None and (needs_logits or needs_layer):
        before = reference.outputs(inputs, hidden_states=needs_layer)
        reference_logits, reference_layer = before.logits if needs_logits else None, layer_of(before)
        del before  # all other layers, for which there may be no room beside those of the model in training
    outputs = model(**inputs, use_cache=False, output_hidden_states=objectives.any("needs_hidden_states"))
    return split(batch, outputs.logits, layer_of(outputs), reference_logits, reference_layer), outputs


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
