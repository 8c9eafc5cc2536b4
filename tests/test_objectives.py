"""Forget and retain losses against loops over rows, tokens and vocabulary."""

import math

import pytest
import torch
from toys import ToyLM, toy_batch, toy_rows

from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.objectives import FORGET_LOSSES, RETAIN_LOSSES, RETAIN_WEIGHT_SCHEDULES, l1_norm, split


# Sums of up to five float32 terms of at most 20 in size, each good to some units of 1e-6.
TOLERANCE = 2e-5
NPO_BETA = 0.3


def log_softmax(scores):
    top = max(scores)
    log_total = top + math.log(sum(math.exp(score - top) for score in scores))
    return [score - log_total for score in scores]


def answer_positions(labels):
    """Pairs of the position whose logits predict an answer token, and the token."""
    return [(place - 1, label) for place, label in enumerate(labels) if place and label != IGNORE_INDEX]


def slow_nll(labels, scores, reference_scores, reference_log_prob):
    return -sum(log_softmax(scores[t])[token] for t, token in answer_positions(labels))


def slow_ga(labels, scores, reference_scores, reference_log_prob):
    return -slow_nll(labels, scores, reference_scores, reference_log_prob)


def slow_kl(labels, scores, reference_scores, reference_log_prob):
    total = 0.0
    for t, _ in answer_positions(labels):
        for log_p, log_q in zip(log_softmax(scores[t]), log_softmax(reference_scores[t])):
            total += math.exp(log_q) * (log_q - log_p)
    return total


def slow_kl_away(labels, scores, reference_scores, reference_log_prob):
    total = 0.0
    for t, _ in answer_positions(labels):
        for log_p, log_q in zip(log_softmax(scores[t]), log_softmax(reference_scores[t])):
            total += math.exp(log_p) * log_q
    return total


def slow_npo(labels, scores, reference_scores, reference_log_prob):
    ratio = math.exp(slow_ga(labels, scores, None, None) - reference_log_prob)
    return 2 / NPO_BETA * math.log(1 + ratio**NPO_BETA)


SLOW_FORGET = {"ga": slow_ga, "kl": slow_kl_away, "refusal": slow_nll, "random": slow_nll, "npo": slow_npo}
SLOW_RETAIN = {"nll": slow_nll, "kl": slow_kl}


def logits_of(seed, batch):
    return ToyLM(seed)(batch["input_ids"]).logits


def make_batch(num_forget=3, num_retain=4):
    rows = toy_rows(num_forget + num_retain, seed=4)
    batch = toy_batch(rows[:num_forget], rows[num_forget:])
    batch["reference_log_prob"] = -torch.linspace(1, 9, num_forget + num_retain)
    return batch


def halves_of(batch):
    return split(batch, logits_of(0, batch), logits_of(1, batch).detach())


def widened(batch, columns):
    """The same batch with more padding, which holds a token of the vocabulary."""
    fill = {"input_ids": 3, "attention_mask": 0, "labels": IGNORE_INDEX}
    return {
        key: torch.nn.functional.pad(tensor, (0, columns), value=fill[key]) if key in fill else tensor
        for key, tensor in batch.items()
    }


def reordered(batch, forget_order, retain_order):
    order = forget_order + [len(forget_order) + place for place in retain_order]
    return {key: tensor[order] for key, tensor in batch.items()}


each_loss = pytest.mark.parametrize(
    "table, slow_table, half, name",
    [
        pytest.param(table, slow_table, half, name, id=f"{half_name}-{name}")
        for half, (half_name, table, slow_table) in enumerate(
            (("forget", FORGET_LOSSES, SLOW_FORGET), ("retain", RETAIN_LOSSES, SLOW_RETAIN))
        )
        for name in table
        if name != "none"
    ],
)


@each_loss
def test_each_loss_is_its_formula_row_by_row(table, slow_table, half, name):
    """Catches a wrong sign, shift, direction of KL, mean instead of sum, prompt or padding tokens that count."""
    batch = make_batch()
    values = table[name].function(halves_of(batch)[half], NPO_BETA)
    rows = (range(3), range(3, 7))[half]
    scores, reference_scores = logits_of(0, batch).double().tolist(), logits_of(1, batch).double().tolist()
    wanted = [
        slow_table[name](
            batch["labels"][row].tolist(), scores[row], reference_scores[row], float(batch["reference_log_prob"][row])
        )
        for row in rows
    ]
    torch.testing.assert_close(values.double(), torch.tensor(wanted, dtype=torch.double), rtol=0, atol=TOLERANCE)


@each_loss
def test_padding_and_the_order_of_rows_change_nothing(table, slow_table, half, name):
    """Catches padding that counts, and references or labels that stay behind when their row moves."""
    batch = make_batch()
    orders = [2, 0, 1], [3, 1, 0, 2]
    moved = widened(reordered(batch, *orders), columns=3)
    before, after = (table[name].function(halves_of(each)[half], NPO_BETA) for each in (batch, moved))
    torch.testing.assert_close(after, before[orders[half]], rtol=0, atol=TOLERANCE)


@each_loss
def test_each_loss_says_what_it_needs(table, slow_table, half, name):
    """Catches a loss that reads a reference which, by its line in the table, the trainer does not prepare."""
    batch = make_batch()
    needs = table[name]
    if not needs.needs_reference_log_prob:
        del batch["reference_log_prob"]
    reference = logits_of(1, batch).detach() if needs.needs_reference_logits else None
    values = needs.function(split(batch, logits_of(0, batch), reference)[half], NPO_BETA)
    assert values.shape == (len(halves_of(batch)[half].rows),)
    assert (needs.per == "sequence") == (name == "npo")
    assert needs.answers == {"refusal": "refusal", "random": "random"}.get(name, "own")


def test_every_loss_has_a_slow_formula():
    """Catches a line added to a table without a formula that checks it."""
    assert set(FORGET_LOSSES) == {*SLOW_FORGET, "none"} and FORGET_LOSSES["none"] is None
    assert set(RETAIN_LOSSES) == {*SLOW_RETAIN, "none"} and RETAIN_LOSSES["none"] is None


def gradient_of(objective, batch, npo_beta):
    model = ToyLM(0)
    half = split(batch, model(batch["input_ids"]).logits, logits_of(1, batch).detach())[0]
    objective.function(half, npo_beta).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_npo_tends_to_gradient_ascent_as_beta_vanishes():
    """
    Catches a factor other than 2 / beta or a sum per token: the gradient is 2 sigmoid(beta log ratio) times gradient
    ascent's, so that it tends to gradient ascent's itself, with no rescaling, with an error of beta |log ratio| / 2.
    """
    batch = make_batch()
    ascent = gradient_of(FORGET_LOSSES["ga"], batch, NPO_BETA)
    distances = [
        float((gradient_of(FORGET_LOSSES["npo"], batch, beta) - ascent).norm() / ascent.norm())
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
    values = FORGET_LOSSES["npo"].function(half, npo_beta)
    torch.testing.assert_close(values, torch.full((3,), 2 / npo_beta * math.log(2)))


@pytest.mark.parametrize("log_prob", [0.0, -1e4])
def test_npo_is_finite_however_far_the_model_has_gone(log_prob):
    """Catches exp of a log-ratio, which overflows on a long answer."""
    half = halves_of(make_batch())[0]
    half.log_probs = torch.full_like(half.log_probs, log_prob).requires_grad_()
    half.reference_log_prob = torch.full((3,), -1e4)
    values = FORGET_LOSSES["npo"].function(half, 5.0)
    values.sum().backward()
    assert values.isfinite().all() and half.log_probs.grad.isfinite().all()


def test_forgetting_by_kl_moves_off_the_reference_from_the_start():
    """Catches minus KL(reference || model), which is stuck: no gradient where the model is its own reference."""
    batch = make_batch()
    logits = logits_of(0, batch).detach().requires_grad_()
    FORGET_LOSSES["kl"].function(split(batch, logits, logits.detach())[0], NPO_BETA).sum().backward()
    assert logits.grad[:3].abs().max() > 1e-2
    assert (logits.grad[3:] == 0).all()


@pytest.mark.parametrize("num_forget, num_retain", [(3, 4), (0, 4), (3, 0)])
def test_split_gives_each_half_its_own_rows(num_forget, num_retain):
    """Catches an off-by-one between halves, or a failure where one has no rows."""
    batch = make_batch(num_forget, num_retain)
    logits, reference = logits_of(0, batch), logits_of(1, batch)
    forget, retain = split(batch, logits, reference)
    for half, rows in ((forget, slice(0, num_forget)), (retain, slice(num_forget, None))):
        assert half.rows.tolist() == batch["row"][rows].tolist()
        assert torch.equal(half.logits, logits[rows]) and torch.equal(half.reference_logits, reference[rows])
        assert torch.equal(half.reference_log_prob, batch["reference_log_prob"][rows])
        assert torch.equal(half.targets[:, :-1], batch["labels"][rows, 1:])
        assert half.logits.data_ptr() == logits[rows].data_ptr(), "logits must not be copied"


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
    assert set(RETAIN_WEIGHT_SCHEDULES) == {"constant", "epoch", "linear"}
    progress = (0.0, 0.5, 1.0, 2.9, 4.0)
    assert [RETAIN_WEIGHT_SCHEDULES["constant"](epoch, 5) for epoch in progress] == [1, 1, 1, 1, 1]
    assert [RETAIN_WEIGHT_SCHEDULES["epoch"](epoch, 5) for epoch in progress] == [0, 0, 0.2, 0.4, 0.8]
    assert [RETAIN_WEIGHT_SCHEDULES["linear"](epoch, 5) for epoch in progress] == [0, 0.1, 0.2, 0.58, 0.8]
