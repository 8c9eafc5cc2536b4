"""Token log-probabilities and divergences against PyTorch's own, in float64 and by autograd."""

import pytest
import torch

from soul_trainer import log_probs
from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.divergences import (
    WholeVocabulary,
    token_cross_entropy,
    token_distillation,
    token_kl,
    token_margin,
    token_suppression,
)
from soul_trainer.log_probs import shift_labels, token_log_probs


# Logits are below 32 in size, where a float32 has a unit in the last place of 1.9e-6; values are sums of three such.
VALUE_TOLERANCE = 6e-6
# Gradients are at most 1 in size times `token_weights`, and an exponential loses a few more units.
GRADIENT_TOLERANCE = 3e-6
# Gradients in bfloat16 are rounded once, to 8 bits.
BF16_RTOL = 2**-8

ROWS, TOKENS, VOCABULARY = 3, 6, 11


def make_inputs(dtype=torch.float32, seed=0):
    """Logits and reference logits with some sharp distributions; targets with a row of none and one of all."""
    random = torch.Generator().manual_seed(seed)
    logits, reference = (3 * torch.randn(ROWS, TOKENS, VOCABULARY, generator=random) for _ in range(2))
    targets = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=random)
    targets[0, :2] = IGNORE_INDEX
    targets[0, -1] = IGNORE_INDEX
    targets[1] = IGNORE_INDEX
    return logits.to(dtype), reference.to(dtype), targets


def token_weights():
    """Different for each token, so that a gradient at the wrong place shows."""
    return torch.linspace(-2, 3, ROWS * TOKENS).view(ROWS, TOKENS)


def plain_log_probs(logits, reference, targets, smoothing):
    log_p = logits.log_softmax(-1)
    value = log_p.gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
    return (1 - smoothing) * value + smoothing * log_p.mean(-1)


def plain_kl(logits, reference, targets, smoothing):
    return torch.nn.functional.kl_div(
        logits.log_softmax(-1), reference.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)


def plain_cross_entropy(logits, reference, targets, smoothing):
    return -(logits.softmax(-1) * reference.log_softmax(-1)).sum(-1)


CASES = {
    "log_probs": (lambda logits, reference, targets, smoothing: token_log_probs(logits, targets), plain_log_probs, 0),
    "smoothed": (
        lambda logits, reference, targets, smoothing: token_log_probs(logits, targets, smoothing),
        plain_log_probs,
        0.3,
    ),
    "kl": (
        lambda logits, reference, targets, smoothing: token_kl(logits, WholeVocabulary(reference), targets),
        plain_kl,
        0,
    ),
    "cross_entropy": (
        lambda logits, reference, targets, smoothing: token_cross_entropy(logits, WholeVocabulary(reference), targets),
        plain_cross_entropy,
        0,
    ),
}


def value_and_gradient(function, logits, reference, targets, smoothing):
    logits = logits.detach().requires_grad_()
    value = function(logits, reference, targets, smoothing)
    (gradient,) = torch.autograd.grad((value * token_weights()).sum(), logits)
    return value.detach(), gradient


def expected(name, logits, reference, targets):
    _, plain, smoothing = CASES[name]
    is_answer = targets != IGNORE_INDEX

    def masked(*arguments):
        return plain(*arguments) * is_answer

    return value_and_gradient(masked, logits.double(), reference.double(), targets, smoothing)


def actual(name, logits, reference, targets):
    function, _, smoothing = CASES[name]
    return value_and_gradient(function, logits, reference, targets, smoothing)


def assert_close(actual_pair, expected_pair, gradient_rtol=0.0):
    for found, wanted, tolerance, rtol in zip(
        actual_pair, expected_pair, (VALUE_TOLERANCE, GRADIENT_TOLERANCE), (0, gradient_rtol)
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 1024])
def test_values_and_gradients_are_those_of_float64_autograd(monkeypatch, name, chunk_tokens):
    """Catches a wrong formula or gradient, smoothing of the wrong mass, tokens lost at the border of a chunk."""
    monkeypatch.setattr(log_probs, "CHUNK_TOKENS", chunk_tokens)
    inputs = make_inputs()
    found, wanted = actual(name, *inputs), expected(name, *inputs)
    assert_close(found, wanted)
    is_answer = inputs[2] != IGNORE_INDEX
    assert (found[0][~is_answer] == 0).all() and (found[1][~is_answer] == 0).all()
    assert (found[1][is_answer].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_slopes_of_the_values(name):
    """Catches a backward that fits another function than its own forward, autograd aside."""
    logits, reference, targets = make_inputs()
    function, _, smoothing = CASES[name]
    random = torch.Generator().manual_seed(5)
    step = 2.0**-6  # truncation errs by step^2, rounding by 1e-6 / step: both some 1e-4
    gradient = actual(name, logits, reference, targets)[1]
    for _ in range(4):
        way = torch.randn(logits.shape, generator=random)
        ends = [
            (function(logits + sign * step * way, reference, targets, smoothing) * token_weights()).double().sum()
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close((gradient * way).double().sum(), slope, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_read_in_float32(name, dtype):
    """Catches a softmax in half precision: values must be those of the rounded logits, in float32."""
    inputs = make_inputs(dtype)
    found = actual(name, *inputs)
    assert (found[0].dtype, found[1].dtype) == (torch.float32, dtype)
    assert_close(found, expected(name, *inputs), gradient_rtol=BF16_RTOL)


def transposed(logits):
    return logits.transpose(0, 1).contiguous().transpose(0, 1)


def vocabulary_first(logits):
    return logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def sliced(logits):
    wide = torch.full((ROWS + 2, TOKENS + 1, VOCABULARY + 3), 100.0, dtype=logits.dtype)
    view = wide[1:-1, :-1, 2:-1]
    view.copy_(logits)
    return view


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", [transposed, vocabulary_first, sliced])
def test_the_layout_in_memory_does_not_matter(name, layout):
    """Catches a flattened view, or a gradient, that takes strides for granted (a slice of padded logits, say)."""
    logits, reference, targets = make_inputs()
    strided = layout(logits)
    assert not strided.is_contiguous()
    found = actual(name, strided, layout(reference), transposed(targets))
    assert_close(found, expected(name, logits, reference, targets))
    assert found[1].shape == logits.shape


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_flows_into_what_the_logits_came_from(name):
    """Catches a gradient that ignores the one that flows in, or goes on in the wrong shape through a slice."""
    logits, reference, targets = make_inputs()
    whole = torch.cat([logits, logits]).requires_grad_()
    function, _, smoothing = CASES[name]
    (function(whole[ROWS:] * 1.0, reference, targets, smoothing) * token_weights()).sum().backward()
    assert (whole.grad[:ROWS] == 0).all()
    wanted = expected(name, logits, reference, targets)[1]
    torch.testing.assert_close(whole.grad[ROWS:].double(), wanted, rtol=0, atol=GRADIENT_TOLERANCE)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [0, ROWS])
def test_no_answer_tokens_give_zeros(name, rows):
    """Catches a failure where a half of a batch has no rows, or a micro-batch no labels."""
    logits, reference, targets = (tensor[:rows] for tensor in make_inputs())
    function, _, smoothing = CASES[name]
    logits.requires_grad_()
    value = function(logits, reference, torch.full_like(targets, IGNORE_INDEX), smoothing)
    value.sum().backward()
    assert value.shape == (rows, TOKENS) and (value == 0).all() and (logits.grad == 0).all()


def test_large_logits_neither_overflow_nor_cancel():
    """Catches exp without its maximum taken off."""
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    value = token_log_probs(logits, torch.tensor([[1]]))
    value.sum().backward()
    assert value.item() == -2e4
    assert logits.grad.tolist() == [[[-1.0, 1.0, 0.0]]]


def test_a_model_has_no_divergence_from_itself_and_no_gradient_there():
    """Catches KL the wrong way round in its gradient, which would still pull a model off its own reference."""
    logits, _, targets = make_inputs()
    value, gradient = actual("kl", logits, logits.clone(), targets)
    assert value.abs().max() <= VALUE_TOLERANCE
    assert gradient.abs().max() <= GRADIENT_TOLERANCE
    same_bits = actual("kl", logits, logits, targets)
    assert (same_bits[0] == 0).all() and (same_bits[1] == 0).all()


def test_no_gradient_flows_into_the_reference():
    """Catches a reference that is trained, when it is the same model with its adapter off."""
    logits, reference, targets = make_inputs()
    for function in (token_kl, token_cross_entropy):
        reference.requires_grad_()
        function(logits.requires_grad_(), WholeVocabulary(reference), targets).sum().backward()
        assert reference.grad is None


def test_the_logits_are_kept_for_the_backward_themselves_and_not_a_copy():
    """Catches a vocabulary-wide copy, in any precision, that lives from forward to backward."""
    logits, reference, targets = make_inputs(torch.bfloat16)
    logits.requires_grad_()
    kept = token_log_probs(logits, targets).grad_fn.saved_tensors
    assert [t.data_ptr() for t in kept] == [logits.data_ptr(), targets.data_ptr()]
    kept = token_kl(logits, WholeVocabulary(reference), targets).grad_fn.saved_tensors
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (logits, targets, reference)]
    kept = token_margin(logits, targets).grad_fn.saved_tensors
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (logits, targets)]


FORBIDDEN = {
    "kl": token_kl,
    "cross_entropy": token_cross_entropy,
    "distillation": lambda *inputs: token_distillation(*inputs, strength=2.0),
    "suppression": lambda logits, reference, targets: token_suppression(logits, targets),
}


@pytest.mark.parametrize("function", FORBIDDEN.values(), ids=FORBIDDEN)
def test_a_token_that_the_model_forbids_is_as_if_it_were_not_there(function):
    """Catches 0 * -inf: no number at every position, and a run that ends at its first row."""
    logits, reference, targets = make_inputs()
    wanted_logits = logits.clone().requires_grad_()
    wanted = function(wanted_logits, WholeVocabulary(reference), targets)
    wanted.sum().backward()
    with_one_more = [torch.nn.functional.pad(each, (0, 1), value=float("-inf")) for each in (logits, reference)]
    found_logits = with_one_more[0].requires_grad_()
    found = function(found_logits, WholeVocabulary(with_one_more[1]), targets)
    found.sum().backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found_logits.grad, torch.nn.functional.pad(wanted_logits.grad, (0, 1)))


def test_labels_move_to_the_position_that_predicts_them():
    """Catches a shift the wrong way, and a last position that predicts the first token."""
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 5, 6], [1, 2, 3, IGNORE_INDEX]])
    assert shift_labels(labels).tolist() == [
        [IGNORE_INDEX, 5, 6, IGNORE_INDEX],
        [2, 3, IGNORE_INDEX, IGNORE_INDEX],
    ]
