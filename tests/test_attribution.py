"""WAGLE's scores against slow loops, the share that is selected against a sort, and masks that hold weights still."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from toys import ToyLM, answers_of, toy_batch, toy_rows

from soul_trainer import Sophia
from soul_trainer.attribution import MASK_FILE, WeightMask, select_top_share, weight_scores
from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.engines import Engine


# Sums of the same float32 terms in another order.
ROUNDING = 1e-5
CURVATURE = 1e-2


def batches_of(num_rows, sizes, half, seed=0):
    """Rows of one half in batches of these sizes."""
    rows = toy_rows(num_rows, seed)
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    parts = [rows[start : start + size] for start, size in zip(starts, sizes)]
    return [toy_batch(part, []) if half == "forget" else toy_batch([], part) for part in parts]


def scores_of(model, sizes=((6,), (5,)), curvature=CURVATURE, engine=None):
    forget, retain = batches_of(6, sizes[0], "forget"), batches_of(5, sizes[1], "retain", seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return weight_scores(model, optimizer, forget, retain, curvature, engine)


def slow_gradient(model, batch):
    """The mean over answer tokens of the gradient of each token's own cross-entropy."""
    log_p = model(batch["input_ids"]).logits.log_softmax(-1)
    answers = answers_of(batch)
    sums = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for row, place, label in answers:
        gradients = torch.autograd.grad(-log_p[row, place, label], list(model.parameters()), retain_graph=True)
        sums = [total + gradient for total, gradient in zip(sums, gradients)]
    return [total / len(answers) for total in sums]


def test_scores_are_the_formula():
    """Would catch a sign, a curvature that multiplies, gradients of sums instead of means, and halves exchanged."""
    model = ToyLM()
    forget = slow_gradient(model, *batches_of(6, (6,), "forget"))
    retain = slow_gradient(model, *batches_of(5, (5,), "retain", seed=1))
    for weight, g_f, g_r, found in zip(model.parameters(), forget, retain, scores_of(model), strict=True):
        expected = (weight * g_f - g_r * g_f / CURVATURE).detach().abs()
        torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING * float(expected.max()))


def test_scores_do_not_depend_on_micro_batches():
    """Would catch means of means, which weigh a short row of a small batch more."""
    whole, split = scores_of(ToyLM()), scores_of(ToyLM(), ((1, 3, 2), (2, 3)))
    for one, other in zip(whole, split, strict=True):
        torch.testing.assert_close(one, other, rtol=ROUNDING, atol=ROUNDING * float(one.max()))


def test_scores_leave_the_model_as_it_was():
    """Would catch gradients that are left behind or lost in an accumulation, and weights that a step moved."""
    model = ToyLM()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.embed.grad = torch.ones_like(model.embed)
    scores_of(model)
    assert (model.embed.grad == 1).all() and model.lm_head.grad is None
    assert all(now.equal(then) for now, then in zip(model.parameters(), before))


def test_a_parameter_that_is_frozen_has_no_score_and_one_without_a_gradient_has_zero():
    """Would catch masks that belong to the parameter before or after theirs."""
    model = ToyLM()
    model.unused = torch.nn.Parameter(torch.ones(3))
    model.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    scores = scores_of(model)
    assert [score.shape for score in scores] == [model.embed.shape, model.lm_head.shape, (3,)]
    assert (scores[2] == 0).all() and (scores[1] > 0).any()


def steep_model():
    """A model whose gradients are in the tens, so that a loss scale at float32's end overflows."""
    model = ToyLM()
    with torch.no_grad():
        model.lm_head.mul_(100)
    return model


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True, gradient_accumulation_steps=4)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.mark.parametrize("scale", [None, 2.0**12, 2.0**127])
def test_neither_accelerate_nor_the_loss_scale_of_float16_changes_scores(accelerator, scale):
    """Would catch gradients divided by accelerate's accumulation or left scaled, and scores of overflowed ones."""
    if scale:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    plain, found = scores_of(steep_model()), scores_of(steep_model(), engine=Engine(accelerator))
    for one, other in zip(plain, found, strict=True):
        torch.testing.assert_close(one, other, rtol=ROUNDING, atol=ROUNDING * float(one.max()))
    assert scale != 2.0**127 or accelerator.scaler.get_scale() < scale


def test_scores_that_are_not_finite_are_refused():
    """Would catch a mask of NaNs, which trains nothing, and one of infinities, which trains what overflowed."""
    model = ToyLM()
    with pytest.raises(FloatingPointError, match="1 / `wagle_curvature`=1e-45, over float32. Raise"):
        scores_of(model, curvature=1e-45)
    with torch.no_grad():
        model.embed[int(toy_rows(6)[2]["input_ids"][0])] = float("nan")
    with pytest.raises(FloatingPointError, match=r"not finite at .*row 2 of `forget_dataset`"):
        scores_of(model)


def test_bad_calls_are_refused_by_name():
    """Would catch a division by zero, a share in percent, and rows without an answer."""
    model, batches = ToyLM(), batches_of(6, (6,), "forget")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`wagle_curvature` must be > 0, but it is 0"):
        weight_scores(model, optimizer, batches, batches, 0)
    for share in (0, 1.5):
        with pytest.raises(ValueError, match=r"`weight_mask_share` must be in \(0, 1\], but it is"):
            select_top_share([torch.ones(3)], share, model)
    blank = batches_of(5, (5,), "retain")
    blank[0]["labels"].fill_(IGNORE_INDEX)
    with pytest.raises(ValueError, match="`retain_dataset` hold no answer token"):
        weight_scores(model, optimizer, batches, blank, 1.0)


def model_of(*shapes):
    """A model whose parameters have these shapes, for scores that are made up."""
    return torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes])


@pytest.mark.parametrize("share", [0.001, 0.1, 0.29, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("scale", [1e-38, 1.0, 1e30])
def test_the_share_is_that_of_a_sort(share, scale):
    """Would catch a share of each tensor instead of all, a threshold that is off by one, and lost small numbers."""
    random = torch.Generator().manual_seed(0)
    scores = [scale * torch.rand(shape, generator=random) for shape in ((40, 7), (13,), (5, 3, 2))]
    trains = select_top_share(scores, share, model_of((40, 7), (13,), (5, 3, 2)))
    flat, chosen = torch.cat([s.flatten() for s in scores]), torch.cat([t.flatten() for t in trains])
    wanted = max(1, round(share * len(flat)))
    assert set(chosen.nonzero().flatten().tolist()) == set(flat.argsort(descending=True)[:wanted].tolist())


def test_ties_and_scores_of_zero():
    """Would catch a bisection that never ends at ties, and weights that train though nothing reaches them."""
    scores = [torch.tensor([3.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 2.0])]
    model = model_of(4, 3)

    def chosen(share):
        return [part.tolist() for part in select_top_share(scores, share, model)]

    assert chosen(1 / 7) == [[True, False, False, False], [False, False, False]]
    assert chosen(2 / 7) == [[True, False, False, False], [False, False, True]]
    for share in (3 / 7, 5 / 7, 6 / 7, 1):
        assert chosen(share) == [[True, True, True, False], [True, False, True]]
    assert not any(part.any() for part in select_top_share([torch.zeros(4), torch.zeros(3)], 1, model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["soul", "adamw", "sgd"])
def test_a_mask_holds_weights_bit_for_bit(name, dtype):
    """Would catch momentum and weight decay that move masked weights, and a mask that also holds the others."""
    model = ToyLM().to(dtype)
    make = {"soul": Sophia, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    optimizer = make(model.parameters(), lr=0.1, weight_decay=0.3)
    trains = select_top_share(scores_of(model), 0.4, model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    mask = WeightMask(model, trains)
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, step + 1.0)
        optimizer.step()
        mask.apply()
    for parameter, then, part in zip(model.parameters(), before, trains):
        assert parameter[~part].equal(then[~part]) and (parameter != then)[part].all()
    assert 0.39 < sum(int(part.sum()) for part in trains) / 63 < 0.41


def test_a_mask_goes_on_from_a_file(tmp_path):
    """Would catch bits that are packed in another order than they are read, and values of before the checkpoint."""
    model = ToyLM()
    trains = select_top_share(scores_of(model), 0.4, model)
    WeightMask(model, trains).save(tmp_path, {"share": "0.4"})
    other = ToyLM(seed=1)
    mask = WeightMask.load(tmp_path, {"share": "0.4"}, other)
    for frozen, part in zip(mask.frozen, trains, strict=True):
        assert frozen.equal(~part)
    before = [parameter.detach().clone() for parameter in other.parameters()]
    with torch.no_grad():
        other.embed.mul_(2)
    mask.apply()
    assert other.embed.equal(torch.where(trains[0], 2 * before[0], before[0]))
    assert (tmp_path / MASK_FILE).stat().st_size < 400


def test_a_mask_of_another_run_is_refused(tmp_path):
    """Would catch a resumed run that trains other weights than it began with."""
    model = ToyLM()
    with pytest.raises(ValueError, match="was saved without `weight_mask`"):
        WeightMask.load(tmp_path, {}, model)
    WeightMask(model, select_top_share(scores_of(model), 0.4, model)).save(tmp_path, {"share": "0.4"})
    with pytest.raises(ValueError, match=r"is of \{'share': '0.4'\}, and this run of \{'share': '0.5'\}"):
        WeightMask.load(tmp_path, {"share": "0.5"}, model)
    model.embed.requires_grad_(False)
    with pytest.raises(ValueError, match="masks other parameters"):
        WeightMask.load(tmp_path, {"share": "0.4"}, model)
