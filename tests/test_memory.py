"""What a forget loss takes in memory beside gradient difference, by counts of every allocation of a whole training."""

import pytest
import torch
from transformers import LlamaForCausalLM

from soul_recipes.memory_benchmark import OPTIMIZERS, MemoryBenchmarkArguments, make_rows, training_peak
from soul_recipes.memory_plan import allocated_peak
from soul_trainer.optim import Soul


ARGUMENTS = MemoryBenchmarkArguments(hidden_size=256, num_hidden_layers=2, vocab_size=1024, batch_size=1)
# The requirement: peak memory of NPO stays within this share of gradient difference's.
ALLOWED = 0.05
NUM_STATES = {"AdamW": 2, "SOUL, diagonal": 3}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_npo_takes_no_more_than_gradient_difference(optimizer):
    """
    Would catch a second model for the reference, or one that stays in memory after the pass that asked it, for one
    number a row and for its most probable tokens; and, by the retain loss that keeps a copy of the weights, a
    measurement that does not see such a thing.
    """
    config, (tokenizer, rows) = ARGUMENTS.model_config(), make_rows(2)
    weights = 4 * LlamaForCausalLM(config).num_parameters()
    shared = {"per_device_train_batch_size": 1, "max_steps": 2, "use_cpu": True, **OPTIMIZERS[optimizer]}

    def peak(**losses) -> int:
        return training_peak(config, tokenizer, rows, {**shared, **losses})

    gradient_difference = peak(forget_loss="ga")
    # Weights, gradients, states of the optimizer and the temporaries of its step: the model dominates.
    held = 2 + NUM_STATES[optimizer]
    assert held * weights < gradient_difference < (held + 3) * weights
    assert peak(forget_loss="npo") == pytest.approx(gradient_difference, rel=ALLOWED)
    assert peak(forget_loss="ga", retain_loss="kl") > gradient_difference + 0.99 * weights
    cached = peak(forget_loss="ga", retain_loss="kl", reference="cached_topk")
    assert cached == pytest.approx(gradient_difference, rel=ALLOWED)


@pytest.mark.parametrize("rule", ["none", "diagonal", "sophia"])
def test_a_step_holds_temporaries_of_a_few_tensors(rule):
    """Would catch a step, or a refresh, whose temporaries are as large as the whole model, or several times that."""
    params = [torch.nn.Parameter(torch.randn(1024, 1024)) for _ in range(12)]
    for param in params:
        param.grad = torch.randn_like(param)
    is_published = rule == "sophia"
    scaling = {"scaling": "none"} if is_published else {"scaling": "tensor", "two_directions": True}
    optimizer = Soul(params, lr=1e-4, rule=rule, **scaling)

    def step():
        if rule != "none":
            optimizer.update_hessian(1.0, 0.0)
        if not is_published:
            optimizer.update_forget_momentum()
        optimizer.step()

    step()  # makes the states
    weights = sum(4 * param.numel() for param in params)
    assert allocated_peak(step) < weights / 2
