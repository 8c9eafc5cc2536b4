"""Curvature estimators against exact diagonals, and what an estimate must leave alone."""

import math
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.nn.attention import SDPBackend, sdpa_kernel
from toys import ToyLM, answers_of, tiny_llama, toy_batches

from soul_trainer import Sophia, estimate_hessian
from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.engines import Engine


ESTIMATORS = ("gauss_newton_bartlett", "empirical_fisher", "hutchinson")
# The mean of the draws must lie this many of its standard errors, which are taken from the draws, around the exact
# value. Five rather than three, because rare labels skew the draws and 200 coordinates are looked at.
STANDARD_ERRORS = 5.0
# Where every draw gives the same, there is no standard error, only the rounding of float32.
ROUNDING = 1e-5
# Another split adds up the same float32 terms in another order.
SPLIT_TOLERANCE = 1e-6


def hessian_of(model, batches, estimator, optimizer=None, **arguments):
    """One estimate, as one vector."""
    optimizer = optimizer or Sophia(model.parameters())
    estimate_hessian(model, optimizer, batches, estimator, decay=0.0, **arguments)
    return torch.cat([optimizer.state[p]["hessian"].flatten() for p in model.parameters()]).double()


def estimates_of(model, batches, estimator, num_draws, **arguments):
    optimizer = Sophia(model.parameters())
    draws = [hessian_of(model, batches, estimator, optimizer, draw=draw, **arguments) for draw in range(num_draws)]
    return torch.stack(draws)


def assert_unbiased(draws, exact):
    """Each coordinate, and the trace, whose standard error is the smallest, lie where the exact values say."""
    for found, wanted in ((draws, exact), (draws.sum(1, keepdim=True), exact.sum()[None])):
        bound = STANDARD_ERRORS * found.std(0) / math.sqrt(len(found)) + ROUNDING * exact.abs().max()
        excess = (found.mean(0) - wanted).abs() / bound
        assert excess.max() <= 1, f"{excess.max() * STANDARD_ERRORS:.1f} standard errors at {int(excess.argmax())}"


def squared_gradient(scalar, model):
    gradients = torch.autograd.grad(scalar, list(model.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients]) ** 2


def log_probs_of(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)


def exact_gauss_newton(model, batch):
    """Over tokens the mean, over labels the expectation, of the squared gradient of the label's log-probability."""
    log_p = log_probs_of(model, batch)
    answers = answers_of(batch)
    return sum(
        log_p[row, place, label].exp().detach() * squared_gradient(log_p[row, place, label], model)
        for row, place, _ in answers
        for label in range(log_p.shape[-1])
    ) / len(answers)


def exact_empirical_fisher(model, batch, smoothing):
    """Over tokens the mean of the squared gradient of the true label's loss, smoothed as PyTorch does it."""
    log_p = log_probs_of(model, batch)
    losses = [
        torch.nn.functional.cross_entropy(log_p[row, place], torch.tensor(label), label_smoothing=smoothing)
        for row, place, label in answers_of(batch)
    ]
    return sum(squared_gradient(loss, model) for loss in losses) / len(losses)


def exact_hessian(model, batch):
    """The diagonal of the whole matrix of second derivatives of the mean loss."""
    params, answers = list(model.parameters()), answers_of(batch)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        log_p = log_probs_of(model, batch)
    loss = -sum(log_p[answer] for answer in answers) / len(answers)
    gradients = torch.autograd.grad(loss, params, create_graph=True)
    slopes = torch.cat([gradient.flatten() for gradient in gradients])
    rows = [torch.autograd.grad(slope, params, retain_graph=True, materialize_grads=True) for slope in slopes]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).diagonal()


def exact_of(model, batch, estimator, smoothing=0.0):
    model = model.double()
    if estimator == "hutchinson":
        exact = exact_hessian(model, batch)
    elif estimator == "empirical_fisher":
        exact = exact_empirical_fisher(model, batch, smoothing)
    else:
        exact = exact_gauss_newton(model, batch)
    model.float()
    return exact


@pytest.mark.parametrize("make_model", [ToyLM, tiny_llama])
@pytest.mark.parametrize(
    "estimator, smoothing",
    [("gauss_newton_bartlett", 0.0), ("empirical_fisher", 0.0), ("empirical_fisher", 0.3), ("hutchinson", 0.0)],
)
def test_the_mean_estimate_is_the_exact_diagonal(make_model, estimator, smoothing):
    """
    Catches every wrong factor (of the token count, above all), labels that are not drawn from the softmax, cross terms
    between tokens that do not cancel, smoothing of another mass, signs that are not of mean zero, prompt or padding
    tokens that count.
    """
    model = make_model()
    (batch,) = batches = toy_batches()
    exact = exact_of(model, batch, estimator, smoothing)
    num_draws = 600 if make_model is ToyLM else 300
    draws = estimates_of(model, batches, estimator, num_draws, label_smoothing=smoothing)
    assert_unbiased(draws, exact)


def test_the_exact_diagonals_are_far_enough_apart_to_be_told_apart():
    """Catches a toy model on which one estimator would pass for another; a Hessian without negative entries, too."""
    model = ToyLM()
    (batch,) = toy_batches()
    diagonals = [exact_of(model, batch, estimator) for estimator in ESTIMATORS]
    diagonals.append(exact_of(model, batch, "empirical_fisher", smoothing=0.3))
    for index, left in enumerate(diagonals):
        for right in diagonals[:index]:
            assert (left - right).norm() > 0.2 * left.norm()
    assert (exact_of(model, batch, "hutchinson") < 0).any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("sizes", [(1,) * 6, (2, 4), (5, 1)])
@pytest.mark.parametrize("make_model", [ToyLM, tiny_llama])
def test_an_estimate_does_not_depend_on_how_its_rows_are_split(make_model, sizes, estimator):
    """Catches a mean of means, draws that follow the place in the batch, gradients lost between micro-batches."""
    model = make_model()
    smoothing = 0.1 if estimator == "empirical_fisher" else 0.0
    whole, parts = (
        hessian_of(model, toy_batches(each, num_forget=2), estimator, label_smoothing=smoothing, seed=3, draw=5)
        for each in ((6,), sizes)
    )
    assert whole.abs().max() > 0
    torch.testing.assert_close(parts, whole, rtol=0, atol=SPLIT_TOLERANCE * float(whole.abs().max()))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_estimate_is_a_function_of_seed_and_draw(estimator):
    """Catches draws that repeat (their mean would not converge), and ones that a resumed run could not repeat."""
    model, batches = ToyLM(), toy_batches((4, 2))
    first = hessian_of(model, batches, estimator, seed=1, draw=2)
    torch.rand(3)
    again = hessian_of(model, batches, estimator, seed=1, draw=2)
    assert torch.equal(first, again)
    for other in ({"seed": 1, "draw": 3}, {"seed": 2, "draw": 2}, {"seed": 2, "draw": 1}):
        assert not torch.allclose(hessian_of(model, batches, estimator, **other), first)


def random_states():
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), (name, keys.tolist(), *rest)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_global_random_state_weights_and_gradients_stay_as_they_were(estimator):
    """Catches a refresh that changes the run around it: the next dropout mask, half an accumulated gradient."""
    model, batches = ToyLM(), toy_batches((4, 2))
    optimizer = Sophia(model.parameters(), lr=0.1, weight_decay=0.5)
    model.embed.grad = torch.ones_like(model.embed)
    gradients, values = [p.grad for p in model.parameters()], [p.detach().clone() for p in model.parameters()]
    states = random_states()
    estimate_hessian(model, optimizer, batches, estimator)
    assert random_states() == states
    for param, gradient, value in zip(model.parameters(), gradients, values):
        assert param.grad is gradient and torch.equal(param.detach(), value)
        assert (optimizer.state[param]["exp_avg"] == 0).all() and optimizer.state[param]["step"] == 0
    assert (model.embed.grad == 1).all()


def test_estimates_are_averaged_by_beta2_unless_a_decay_is_given():
    """Catches a decay that does not reach the optimizer."""
    model, batches = ToyLM(), toy_batches()
    draws = estimates_of(model, batches, "gauss_newton_bartlett", 3)
    optimizer = Sophia(model.parameters(), betas=(0.9, 0.8))
    for draw in range(2):
        estimate_hessian(model, optimizer, batches, draw=draw)
    found = torch.cat([optimizer.state[p]["hessian"].flatten() for p in model.parameters()]).double()
    torch.testing.assert_close(found, 0.8 * 0.2 * draws[0] + 0.2 * draws[1])
    for draw in range(3):
        estimate_hessian(model, optimizer, batches, draw=draw, decay=draw / (draw + 1))
    found = torch.cat([optimizer.state[p]["hessian"].flatten() for p in model.parameters()]).double()
    torch.testing.assert_close(found, draws.mean(0))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_parameters_that_take_no_part_are_left_alone(estimator):
    """Catches an estimator that fails on a frozen parameter, or on one that this model does not use."""
    model, batches = ToyLM(), toy_batches()
    whole = hessian_of(model, batches, estimator)
    model.spare = torch.nn.Parameter(torch.ones(2))
    model.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = Sophia(model.parameters())
    estimate_hessian(model, optimizer, batches, estimator, decay=0.0)
    found = torch.cat([optimizer.state[p]["hessian"].flatten() for p in (model.embed, model.lm_head)]).double()
    if estimator != "hutchinson":  # its signs follow the list of parameters
        assert torch.equal(found, whole)
    for param in (model.spare, model.frozen):
        assert (optimizer.state[param]["hessian"] == 0).all() if optimizer.state[param] else True


@pytest.fixture
def make_accelerator():
    yield lambda **settings: Accelerator(cpu=True, **settings)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def assert_same_estimate_under(accelerator, estimator):
    batches, model = toy_batches((4, 2)), ToyLM()
    plain = hessian_of(ToyLM(), batches, estimator)
    optimizer = AcceleratedOptimizer(Sophia(model.parameters()), scaler=accelerator.scaler)
    estimate_hessian(model, optimizer, batches, estimator, decay=0.0, engine=Engine(accelerator))
    found = torch.cat([optimizer.optimizer.state[p]["hessian"].flatten() for p in model.parameters()]).double()
    torch.testing.assert_close(found, plain, rtol=0, atol=SPLIT_TOLERANCE * float(plain.abs().max()))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("sync_gradients", [True, False])
def test_a_refresh_amid_an_accumulation_is_taken_and_leaves_it_going_on(make_accelerator, estimator, sync_gradients):
    """Catches a refresh that Accelerate skips, and a next micro-batch that takes an optimizer step alone."""
    accelerator = make_accelerator()
    accelerator.gradient_state._set_sync_gradients(sync_gradients)
    assert_same_estimate_under(accelerator, estimator)
    assert accelerator.gradient_state.sync_gradients == sync_gradients


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_accelerate_does_not_divide_an_estimate_by_the_accumulation(make_accelerator, estimator):
    """Catches a Hessian that is too small by the square of the number of accumulated micro-batches."""
    assert_same_estimate_under(make_accelerator(gradient_accumulation_steps=4), estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("is_first", [True, False])
def test_the_loss_scale_of_float16_does_not_scale_an_estimate(make_accelerator, estimator, is_first):
    """Catches a Hessian of scaled gradients, and gradients that were never scaled and yet are unscaled."""
    accelerator = make_accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    if not is_first:  # the scaler makes its scale at the first loss, and the first refresh comes before the first step
        accelerator.scaler.scale(torch.ones(()))
    assert_same_estimate_under(accelerator, estimator)


def test_bad_calls_are_refused_by_name():
    """Catches a division by zero, an unknown estimator, an optimizer without a Hessian, that fail obscurely."""
    model, batches = ToyLM(), toy_batches()
    optimizer = Sophia(model.parameters())
    with pytest.raises(ValueError, match="AdamW"):
        estimate_hessian(model, torch.optim.AdamW(model.parameters()), batches)
    batches[0]["labels"].fill_(IGNORE_INDEX)
    for none in (batches, []):
        with pytest.raises(ValueError, match="no answer token"):
            estimate_hessian(model, optimizer, none)


def test_an_unknown_estimator_is_refused_by_name_and_costs_no_gradient():
    """Catches a bare KeyError that leaves the accumulated gradients thrown away."""
    model = ToyLM()
    model.embed.grad = torch.ones_like(model.embed)
    with pytest.raises(ValueError, match="gauss_newton_bartlett, empirical_fisher, hutchinson"):
        estimate_hessian(model, Sophia(model.parameters()), toy_batches(), "fisher")
    assert model.embed.grad is not None
