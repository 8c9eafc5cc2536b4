"""What a forget loss takes in memory beside gradient difference, by counts of every allocation of a whole training."""

import pytest
from transformers import LlamaForCausalLM

from soul_recipes.memory_benchmark import OPTIMIZERS, MemoryBenchmarkArguments, make_rows, training_peak


ARGUMENTS = MemoryBenchmarkArguments(hidden_size=256, num_hidden_layers=2, vocab_size=1024, batch_size=1)
# The requirement: peak memory of NPO stays within this share of gradient difference's.
ALLOWED = 0.05


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
    # Weights, gradients, two states of the optimizer and the temporaries of its step: the model dominates.
    assert 4 * weights < gradient_difference < 7 * weights
    assert peak(forget_loss="npo") == pytest.approx(gradient_difference, rel=ALLOWED)
    assert peak(forget_loss="ga", retain_loss="kl") > gradient_difference + 0.99 * weights
    cached = peak(forget_loss="ga", retain_loss="kl", reference="cached_topk")
    assert cached == pytest.approx(gradient_difference, rel=ALLOWED)
