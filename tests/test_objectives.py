"""Forget and retain losses against loops over rows, tokens and vocabulary."""

import pytest
import torch
from slow_objectives import (
    SETTINGS,
    SLOW_FORGET,
    SLOW_RETAIN,
    halves_of,
    make_batch,
    outputs_of,
    reordered,
    rows_of,
    widened,
)

from soul_trainer.halves import split
from soul_trainer.objectives import FORGET_LOSSES, RETAIN_LOSSES
from soul_trainer.settings import ObjectiveArguments


# Sums of up to five float32 terms of at most 20 in size, each good to some units of 1e-6.
TOLERANCE = 2e-5

CASES = [
    pytest.param(table[name], slow[name], half, id=f"{half_name}-{name}")
    for half, (half_name, table, slow) in enumerate(
        (("forget", FORGET_LOSSES, SLOW_FORGET), ("retain", RETAIN_LOSSES, SLOW_RETAIN))
    )
    for name in slow
]
each_loss = pytest.mark.parametrize("objective, slow, half", CASES)
# A part of their values is a constant to the gradient, of which they have tests of their own.
HAS_CONSTANTS = {"wga", "satimp", "ceu"}


@each_loss
def test_each_loss_is_its_formula_row_by_row(objective, slow, half):
    """Catches a wrong sign, shift, direction of KL, mean instead of sum, prompt or padding tokens that count."""
    batch = make_batch()
    values = objective.function(halves_of(batch)[half], SETTINGS)
    wanted = [slow(row) for row in rows_of(batch, half)]
    torch.testing.assert_close(values.double(), torch.tensor(wanted, dtype=torch.double), rtol=2e-6, atol=TOLERANCE)


@each_loss
def test_padding_and_the_order_of_rows_change_nothing(objective, slow, half):
    """Catches padding that counts, and references or labels that stay behind when their row moves."""
    batch = make_batch()
    orders = [2, 0, 1], [3, 1, 0, 2]
    moved = widened(reordered(batch, *orders), columns=3)
    before, after = (objective.function(halves_of(each)[half], SETTINGS) for each in (batch, moved))
    torch.testing.assert_close(after, before[orders[half]], rtol=2e-6, atol=TOLERANCE)


@each_loss
def test_a_batch_is_the_sum_of_its_rows(objective, slow, half):
    """Catches a loss that depends on which other rows are in its batch: a split into micro-batches would change it."""
    batch = make_batch()
    whole = objective.function(halves_of(batch)[half], SETTINGS)
    for place in range(len(whole)):
        others = [0, 1, 2], [0, 1, 2, 3]
        others[half][:] = [place]
        picked = [*others[0], *(3 + row for row in others[1]), *(7 + row for row in others[0])]
        alone = {key: tensor[picked] for key, tensor in batch.items()}
        value = objective.function(halves_of(alone)[half], SETTINGS)
        torch.testing.assert_close(value, whole[place : place + 1], rtol=2e-6, atol=TOLERANCE)


@each_loss
def test_each_loss_says_what_it_needs(objective, slow, half):
    """Catches a loss that reads what, by its line in the table, the trainer does not prepare, or settings it hides."""
    batch = make_batch(with_preferred=objective.prefers_answers)
    if not objective.needs_reference_log_prob:
        del batch["reference_log_prob"]
    outputs, reference = outputs_of(0, batch), outputs_of(1, batch)
    halves = split(
        batch,
        outputs.logits,
        outputs.hidden_states[1] if objective.needs_hidden_states else None,
        reference.logits.detach() if objective.needs_reference else None,
        reference.hidden_states[1].detach() if objective.needs_reference_hidden_states else None,
    )

    class Watched(ObjectiveArguments):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    settings, read = Watched(), set()
    read.clear()
    assert objective.function(halves[half], settings).shape == (len(halves[half].rows),)
    # The trainer reads the layer, and the scale of a task vector when all is over.
    assert read - {"__class__"} == set(objective.settings) - {"rmu_layer", "task_vector_scale"}


@pytest.mark.parametrize(
    "objective, slow, half", [case for case in CASES if not HAS_CONSTANTS & set(case.id.split("-"))]
)
def test_gradients_are_those_of_autograd_on_plain_operations(objective, slow, half):
    """Catches a hand-written derivative that differs from the value's own, seen as a slope between two points."""
    batch = make_batch()
    outputs, reference = outputs_of(0, batch), outputs_of(1, batch)
    logits, hidden = (each.detach().double() for each in (outputs.logits, outputs.hidden_states[1]))
    random = torch.Generator().manual_seed(0)
    step_logits, step_hidden = (torch.randn(each.shape, generator=random).double() for each in (logits, hidden))

    def value(size, with_gradient=False):
        moved = (logits + size * step_logits).float().requires_grad_(with_gradient)
        moved_hidden = (hidden + size * step_hidden).float().requires_grad_(with_gradient)
        halves = split(batch, moved, moved_hidden, reference.logits.detach(), reference.hidden_states[1].detach())
        total = objective.function(halves[half], SETTINGS).sum()
        if not with_gradient:
            return float(total)
        grads = torch.autograd.grad(total, (moved, moved_hidden), materialize_grads=True)
        return sum(float((grad * step).sum()) for grad, step in zip(grads, (step_logits, step_hidden)))

    if objective.function.__name__ in (
        "weighted_gradient_ascent",
        "saturation_importance",
        "cross_entropy_unlearning",
    ):
        pytest.skip("part of the value is a constant to the gradient: see the tests of its own")
    size = 1e-2  # a central difference: an error of size^2 times the third derivative, and 1e-5 of rounding
    slope = (value(size) - value(-size)) / (2 * size)
    assert value(0.0, with_gradient=True) == pytest.approx(slope, rel=2e-3, abs=5e-3)


def test_every_loss_has_a_slow_formula():
    """Catches a line added to a table without a formula that checks it."""
    assert set(FORGET_LOSSES) == {*SLOW_FORGET, "none"} and FORGET_LOSSES["none"] is None
    assert set(RETAIN_LOSSES) == {*SLOW_RETAIN, "curvature", "none"}
    assert RETAIN_LOSSES["curvature"] is None and RETAIN_LOSSES["none"] is None


def test_reductions_and_answers_are_those_of_the_papers():
    """Catches preference losses divided by tokens, and other answers where a loss is about the rows' own."""
    assert {name for name, each in FORGET_LOSSES.items() if each and each.per == "sequence"} == {
        *("npo", "simnpo", "dpo", "altpo")
    }
    answers = {name: each.answers for name, each in FORGET_LOSSES.items() if each and each.answers != "own"}
    assert answers == {"refusal": "refusal", "random": "random", "dpo": "refusal", "altpo": "alternate"}
    assert [name for name, each in FORGET_LOSSES.items() if each and each.prefers_answers] == ["dpo", "altpo"]
