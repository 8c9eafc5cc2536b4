import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_eval_scoring import ANSWERS, QUESTIONS, ROWS, byte_tokenizer, small_llama

from soul_eval.gradient_norms import gradient_norms
from soul_trainer.formats import Example, encode, render


# Float32 gradients through two matrix products a layer; another order of summation differs by about 1e-6.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(QUESTIONS + ANSWERS)


@pytest.fixture(scope="module")
def examples(tokenizer):
    return [render(row, tokenizer) for row in ROWS]


def row_loss(model, tokenizer, example):
    """transformers' own loss of one row: the mean over its answer tokens."""
    row = encode(tokenizer, example)
    return model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss


def slow_norm(model, tokenizer, example):
    """The norm of one row's gradient, by backward on a copy of the model."""
    model = copy.deepcopy(model).eval()
    model.zero_grad()
    row_loss(model, tokenizer, example).backward()
    squares = [weight.grad.double().square().sum() for weight in model.parameters() if weight.grad is not None]
    return math.sqrt(sum(squares))


def test_norms_are_those_of_backward(tokenizer, examples):
    """Catches a sum for a mean over tokens, gradients that pile up over rows, and a mean of norms of parameters."""
    model = small_llama()
    norms = gradient_norms(model, tokenizer, examples, progress=False)
    expected = [slow_norm(model, tokenizer, example) for example in examples]
    assert norms == pytest.approx(expected, rel=ROUNDING)
    assert len({round(norm, 3) for norm in norms}) == len(examples)


def test_norm_is_the_steepest_slope(tokenizer, examples):
    """Catches a gradient of anything but the loss: along its own direction the loss grows by the norm."""
    model = small_llama()
    (norm,) = gradient_norms(model, tokenizer, examples[:1], progress=False)
    weights = list(model.parameters())
    gradients = torch.autograd.grad(row_loss(model, tokenizer, examples[0]), weights)
    step = 1e-3
    losses = []
    for sign in (1, -2):
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients):
                weight += sign * step * gradient / norm
            losses.append(float(row_loss(model, tokenizer, examples[0])))
    # Float32 rounding of a loss near 6 is 5e-7, over a step of 1e-3 to either side 2e-5 of a norm near 12.
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(norm, rel=1e-3)


def test_model_is_left_as_it_was(tokenizer, examples):
    """Catches gradients zeroed or added to between a backward and its step, and modes or frozen weights changed."""
    model = small_llama(attention_dropout=0.5).train()
    model.model.layers[0].mlp.eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.randn(weight.shape, generator=random)
    model.lm_head.weight.grad = None
    before = [(None if weight.grad is None else weight.grad.clone(), weight.clone()) for weight in model.parameters()]
    modes = [module.training for module in model.modules()]
    trainable = [weight.requires_grad for weight in model.parameters()]
    with torch.no_grad():
        norms = gradient_norms(model, tokenizer, examples[:2], progress=False)
        again = gradient_norms(model, tokenizer, examples[:2], progress=False)
    assert norms == again, "dropout"
    assert modes == [module.training for module in model.modules()]
    assert trainable == [weight.requires_grad for weight in model.parameters()]
    for (gradient, value), weight in zip(before, model.parameters()):
        assert torch.equal(value, weight)
        assert weight.grad is None if gradient is None else torch.equal(gradient, weight.grad)


def test_frozen_parameters_do_not_count(tokenizer, examples):
    """Catches the norm over the whole model where an adapter alone is trained."""
    model = get_peft_model(small_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    norms = gradient_norms(model, tokenizer, examples[:2], progress=False)
    expected = [slow_norm(model, tokenizer, example) for example in examples[:2]]
    assert norms == pytest.approx(expected, rel=ROUNDING)
    whole = gradient_norms(model.requires_grad_(True), tokenizer, examples[:2], progress=False)
    assert all(norm < 0.99 * more for norm, more in zip(norms, whole))


def test_parameter_without_a_gradient_is_left_out(tokenizer, examples):
    """Catches a crash on a parameter that a row does not reach, such as an expert to which no token goes."""
    model = small_llama()
    expected = gradient_norms(model, tokenizer, examples[:1], progress=False)
    model.unused = torch.nn.Linear(3, 3)
    assert gradient_norms(model, tokenizer, examples[:1], progress=False) == expected


def test_norm_in_other_precisions(tokenizer, examples):
    """Catches squares in bfloat16, whose sum over thousands of numbers stops growing, and a float64 model refused."""
    model = small_llama()
    (norm,) = gradient_norms(model, tokenizer, examples[:1], progress=False)
    (half,) = gradient_norms(model.bfloat16(), tokenizer, examples[:1], progress=False)
    assert gradient_norms(small_llama().double(), tokenizer, examples[:1], progress=False) == pytest.approx(
        [norm], rel=ROUNDING
    )
    # bfloat16 keeps 8 bits: the weights themselves are off by up to 0.4%, and each activation again.
    assert half == pytest.approx(norm, rel=0.02)


def test_what_has_no_gradient_is_refused(tokenizer, examples):
    """Catches norms of 0 of a frozen model, which make every row a sure member, and a bad row without a number."""
    frozen = small_llama().requires_grad_(False)
    with pytest.raises(ValueError, match="is frozen"):
        gradient_norms(frozen, tokenizer, examples, progress=False)
    long = Example("Who drew the old map of the north? " * 3, " Ada", "Ada", is_chat=False)
    with pytest.raises(ValueError, match="Row 1: no answer token"):
        gradient_norms(small_llama(), tokenizer, [examples[0], long], progress=False, max_length=24)
    assert gradient_norms(small_llama(), tokenizer, [], progress=False) == []
