"""What single losses promise, beyond their formulas."""

import math
import re

import pytest
import torch
from slow_objectives import SETTINGS, halves_of, make_batch, outputs_of
from toys import ToyLM

from soul_trainer.halves import split
from soul_trainer.objectives import FORGET_LOSSES, RETAIN_LOSSES, Objectives, l1_norm, parameters_of_layers
from soul_trainer.settings import ObjectiveArguments
from soul_trainer.weighting import RETAIN_WEIGHT_SCHEDULES, dual_step


def gradient_of(objective, batch, **changes):
    model = ToyLM(0)
    outputs, reference = model(batch["input_ids"], output_hidden_states=True), outputs_of(1, batch)
    half = split(batch, outputs.logits, outputs.hidden_states[1], reference.logits.detach())[0]
    objective.function(half, ObjectiveArguments(**changes)).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("name, field", [("npo", "npo_beta"), ("dpo", "dpo_beta"), ("simnpo", "simnpo_beta")])
def test_preference_losses_tend_to_their_linear_parts_as_beta_vanishes(name, field):
    """
    Catches a factor other than 2 / beta or a sum per token: the gradient is 2 sigmoid(beta log ratio) times that of
    the log-ratio: gradient ascent's itself for NPO, with no rescaling, with an error of beta |log ratio| / 2.
    """
    batch = make_batch()
    model = ToyLM(0)
    half = split(batch, model(batch["input_ids"]).logits)[0]
    sums = half.log_probs.sum(1)
    linear = {
        "npo": sums,
        "dpo": sums - half.preferred.log_probs.sum(1),
        "simnpo": sums / half.is_answer.sum(1),
    }[name]
    linear.sum().backward()
    ascent = torch.cat([p.grad.flatten() for p in model.parameters()])
    distances = [
        float((gradient_of(FORGET_LOSSES[name], batch, **{field: beta}) - ascent).norm() / ascent.norm())
        for beta in (1.0, 1e-2, 1e-4)
    ]
    assert distances[0] > 0.1
    assert distances[1] < 0.1
    assert distances[2] < 1e-3


@pytest.mark.parametrize("npo_beta", [0.01, 0.1, 1.0, 5.0])
def test_npo_at_the_reference_is_two_over_beta_log_two(npo_beta):
    """Catches a ratio that is not 1 where the model is its own reference, and a lost constant."""
    batch = make_batch()
    half = halves_of(batch)[0]
    half.reference_log_prob = half.log_probs.sum(1).detach()
    values = FORGET_LOSSES["npo"].function(half, ObjectiveArguments(npo_beta=npo_beta))
    torch.testing.assert_close(values, torch.full((3,), 2 / npo_beta * math.log(2)))


@pytest.mark.parametrize("log_prob", [0.0, -1e4])
@pytest.mark.parametrize("name", ["npo", "simnpo", "dpo"])
def test_preference_losses_are_finite_however_far_the_model_has_gone(name, log_prob):
    """Catches exp of a log-ratio, which overflows on a long answer."""
    half = halves_of(make_batch())[0]
    half.log_probs = torch.full_like(half.log_probs, log_prob).requires_grad_()
    half.reference_log_prob = torch.full((3,), -1e4)
    values = FORGET_LOSSES[name].function(half, ObjectiveArguments(npo_beta=5.0, dpo_beta=5.0))
    values.sum().backward()
    assert values.isfinite().all() and half.log_probs.grad.isfinite().all()


def test_simnpo_ignores_the_reference():
    """Catches a reference that has come back into the loss that was made to do without."""
    batch = make_batch()
    before = FORGET_LOSSES["simnpo"].function(halves_of(batch)[0], SETTINGS)
    batch["reference_log_prob"] = batch["reference_log_prob"] * 3
    assert torch.equal(FORGET_LOSSES["simnpo"].function(halves_of(batch, reference_seed=5)[0], SETTINGS), before)


def test_forgetting_by_kl_moves_off_the_reference_from_the_start():
    """Catches minus KL(reference || model), which is stuck: no gradient where the model is its own reference."""
    batch = make_batch()
    logits = outputs_of(0, batch).logits.detach().requires_grad_()
    FORGET_LOSSES["kl"].function(split(batch, logits, None, logits.detach())[0], SETTINGS).sum().backward()
    assert logits.grad[:3].abs().max() > 1e-2
    assert (logits.grad[3:] == 0).all()


def test_a_model_keeps_to_itself_at_no_cost():
    """Catches a retain loss that is not zero, or pulls, where the model is its own reference."""
    batch = make_batch()
    for name in ("kl", "activations"):
        outputs = outputs_of(0, batch)
        logits, hidden = outputs.logits.detach().requires_grad_(), outputs.hidden_states[1].detach().requires_grad_()
        half = split(batch, logits, hidden, logits.detach(), hidden.detach())[1]
        values = RETAIN_LOSSES[name].function(half, SETTINGS)
        grads = torch.autograd.grad(values.sum(), (logits, hidden), materialize_grads=True)
        assert values.tolist() == [0, 0, 0, 0] and not any(grad.any() for grad in grads)


def test_weighted_ascent_is_ascent_times_a_weight_that_has_no_gradient():
    """Catches a weight that is differentiated: at p near 0 its slope would turn ascent around."""
    batch = make_batch()
    ascent = gradient_of(FORGET_LOSSES["ga"], batch)
    assert torch.equal(gradient_of(FORGET_LOSSES["wga"], batch, wga_power=0.0), ascent)
    free = {"satimp_saturation": 0.0, "satimp_importance": 0.0}
    assert torch.equal(gradient_of(FORGET_LOSSES["satimp"], batch, **free), ascent)
    logits = outputs_of(0, batch).logits.detach().requires_grad_()
    half = split(batch, logits)[0]
    (gradient,) = torch.autograd.grad(FORGET_LOSSES["wga"].function(half, ObjectiveArguments()).sum(), logits)
    half = split(batch, logits)[0]
    weights = half.log_probs.detach().exp()
    (wanted,) = torch.autograd.grad((weights * half.log_probs).sum(), logits)
    torch.testing.assert_close(gradient, wanted)


def test_unlearning_by_cross_entropy_takes_the_label_alone_down():
    """
    Catches a target that is differentiated or not renormalized: where q is p without the label y, scaled up by
    1 / (1 - p_y), the gradient p - q is p_y at the label and -p_v p_y / (1 - p_y) elsewhere.
    """
    batch = make_batch()
    logits = outputs_of(0, batch).logits.detach().requires_grad_()
    half = split(batch, logits)[0]
    (gradient,) = torch.autograd.grad(FORGET_LOSSES["ceu"].function(half, SETTINGS).sum(), logits)
    for row, place in half.is_answer.nonzero().tolist():
        label, p = int(half.targets[row, place]), logits[row, place].detach().softmax(0)
        wanted = -p * p[label] / (1 - p[label])
        wanted[label] = p[label]
        torch.testing.assert_close(gradient[row, place], wanted, rtol=1e-5, atol=1e-7)


def test_undial_without_strength_is_distillation_and_with_much_forgets_the_label():
    """Catches a strength that is added, or taken off another token's logit."""
    batch = make_batch()
    plain = gradient_of(FORGET_LOSSES["undial"], batch, undial_strength=0.0)
    model = ToyLM(0)
    half = split(batch, model(batch["input_ids"]).logits, None, outputs_of(1, batch).logits.detach())[0]
    RETAIN_LOSSES["kl"].function(half, SETTINGS).sum().backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(plain, wanted, rtol=1e-4, atol=1e-6)
    logits = outputs_of(0, batch).logits.detach().requires_grad_()
    half = split(batch, logits, None, outputs_of(1, batch).logits.detach())[0]
    settings = ObjectiveArguments(undial_strength=50.0)
    (gradient,) = torch.autograd.grad(FORGET_LOSSES["undial"].function(half, settings).sum(), logits)
    at_labels = gradient[:3].gather(2, half.targets.clamp_min(0)[..., None]).squeeze(2)[half.is_answer]
    torch.testing.assert_close(at_labels, half.log_probs[half.is_answer].exp().detach())


def test_the_direction_of_misdirection_is_one_for_all_rows_and_of_its_seed():
    """Catches a direction that is drawn anew at each step or on each process: nothing would be steered anywhere."""
    batch = make_batch()
    first, again, other = (
        FORGET_LOSSES["rmu"].function(halves_of(batch)[0], ObjectiveArguments(rmu_seed=seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.allclose(first, other)


@pytest.mark.parametrize("num_forget, num_retain", [(3, 4), (0, 4), (3, 0)])
def test_split_gives_each_half_its_own_rows(num_forget, num_retain):
    """Catches an off-by-one between halves, or a failure where one has no rows."""
    batch = make_batch(num_forget, num_retain)
    logits, reference = outputs_of(0, batch).logits, outputs_of(1, batch).logits
    forget, retain = split(batch, logits, None, reference)
    end = num_forget + num_retain
    parts = [(forget, slice(0, num_forget)), (retain, slice(num_forget, end))]
    if num_forget:
        parts.append((forget.preferred, slice(end, None)))
    for half, rows in parts:
        assert half.rows.tolist() == batch["row"][rows].tolist()
        assert torch.equal(half.logits, logits[rows]) and torch.equal(half.reference.logits, reference[rows])
        assert torch.equal(half.reference_log_prob, batch["reference_log_prob"][rows])
        assert torch.equal(half.targets[:, :-1], batch["labels"][rows, 1:])
        assert half.logits.data_ptr() == logits[rows].data_ptr(), "logits must not be copied"
    assert (forget.preferred is None) == (num_forget == 0) and retain.preferred is None


def test_any_asks_both_objectives_and_passes_over_none():
    """Catches a need of one half that the other hides, and a failure where a half has no loss."""
    assert Objectives.named("none", "kl").any("needs_reference")
    assert Objectives.named("kl", "none").any("needs_reference")
    assert not Objectives.named("npo", "nll").any("needs_reference")


@pytest.mark.parametrize(
    "name, is_trained",
    [
        ("model.layers.5.mlp.down_proj.weight", True),
        ("model.layers.7.mlp.down_proj.weight", True),
        ("model.layers.4.mlp.down_proj.weight", False),
        ("model.layers.17.mlp.down_proj.weight", False),
        ("model.layers.7.mlp.up_proj.weight", False),
        ("model.layers.7.mlp.down_proj.bias", False),
        ("transformer.h.6.mlp.c_proj.weight", True),
        ("transformer.h.6.attn.c_proj.weight", False),
        ("model.decoder.layers.6.fc2.weight", True),
        ("gpt_neox.layers.6.mlp.dense_4h_to_h.weight", True),
        ("model.layers.6.mlp.experts.down_proj", True),
    ],
)
def test_misdirection_trains_the_down_projections_of_three_layers(name, is_trained):
    """Catches layer 17 taken for 7, and attention's projection, which GPT-2 calls as it calls the MLP's."""
    assert bool(re.search(parameters_of_layers(7), name)) == is_trained


def test_l1_norm_is_the_sum_of_absolute_trainable_weights():
    """Catches frozen weights that count, a mean, or a sum that is kept in bfloat16, to 8 bits."""
    weights = torch.nn.Parameter(torch.tensor([[1.5, -2.0], [0.0, 4.0]]))
    frozen = torch.nn.Parameter(torch.full((3,), 100.0), requires_grad=False)
    norm = l1_norm([weights, frozen])
    norm.backward()
    assert norm.item() == 7.5
    assert weights.grad.tolist() == [[1.0, -1.0], [0.0, 1.0]]
    assert l1_norm([torch.nn.Parameter(torch.ones(4099, dtype=torch.bfloat16))]).item() == 4099


def test_schedules_grow_the_retain_weight_as_the_released_code_does():
    """Catches a schedule that starts at another value, or `epoch` that moves within an epoch."""
    assert set(RETAIN_WEIGHT_SCHEDULES) == {"constant", "epoch", "linear", "primal_dual"}
    progress = (0.0, 0.5, 1.0, 2.9, 4.0)
    assert [RETAIN_WEIGHT_SCHEDULES["constant"](epoch, 5) for epoch in progress] == [1, 1, 1, 1, 1]
    assert [RETAIN_WEIGHT_SCHEDULES["epoch"](epoch, 5) for epoch in progress] == [0, 0, 0.2, 0.4, 0.8]
    assert [RETAIN_WEIGHT_SCHEDULES["linear"](epoch, 5) for epoch in progress] == [0, 0.1, 0.2, 0.58, 0.8]


def test_the_dual_variable_climbs_while_the_constraint_is_broken_and_stays_positive():
    """Catches a step the wrong way, and a weight that rewards a loss on retain rows once it is negative."""
    assert dual_step(1.0, retain_loss=0.8, limit=0.3, step_size=2.0) == pytest.approx(2.0)
    assert dual_step(1.0, retain_loss=0.1, limit=0.3, step_size=2.0) == pytest.approx(0.6)
    assert dual_step(0.1, retain_loss=0.0, limit=1.0, step_size=5.0) == 0.0
