"""The labels that Gauss-Newton-Bartlett draws from the model."""

import math

import numpy as np
import pytest
import torch
from toys import VOCABULARY, answers_of, toy_batch, toy_batches, toy_rows

from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.curvature import labels
from soul_trainer.curvature.labels import answer_uniforms, sample_labels
from soul_trainer.log_probs import shift_labels


def draw_labels(logits, uniforms):
    """Labels of a single row of logits, one for each uniform number."""
    targets = torch.zeros(1, len(uniforms), dtype=torch.long)
    return sample_labels(logits.expand(1, len(uniforms), -1), targets, uniforms[None])[0]


@pytest.mark.parametrize("chunk_tokens", [997, 1024])
def test_sampled_labels_follow_the_softmax(monkeypatch, chunk_tokens):
    """Catches a distribution that is shifted by one label, sharpened, or cut at the border of a chunk."""
    monkeypatch.setattr(labels, "CHUNK_TOKENS", chunk_tokens)
    logits = torch.tensor([0.3, -2.0, 1.5, -math.inf, 0.0, 2.5, -1.0])
    num_draws = 20_000
    uniforms = torch.from_numpy(np.random.default_rng(0).random(num_draws, dtype=np.float32))
    counts = draw_labels(logits, uniforms).bincount(minlength=len(logits)).double()
    wanted = logits.double().softmax(0) * num_draws
    assert counts[3] == 0
    possible = wanted > 0
    chi_square = float(((counts - wanted)[possible] ** 2 / wanted[possible]).sum())
    degrees = int(possible.sum()) - 1
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


def test_labels_of_half_precision_logits_are_sampled_in_float32():
    """Catches a softmax or a running sum in bfloat16, which is off by whole labels."""
    random = torch.Generator().manual_seed(0)
    logits, uniforms = torch.randn(500, generator=random).bfloat16(), torch.rand(2000, generator=random)
    assert torch.equal(draw_labels(logits, uniforms), draw_labels(logits.float(), uniforms))


def test_rare_labels_together_are_drawn_as_often_as_they_should():
    """Catches a running sum that swallows small probabilities: on a memorised model they are all the curvature."""
    logits = torch.zeros(50_000)
    logits[100] = math.log(50_000 * 999)  # all others together: one in a thousand, each 2e-8
    uniforms = 1 - torch.linspace(2e-3, 0, 401)[:-1]
    labels = draw_labels(logits, uniforms)
    assert abs(int((labels > 100).sum()) - 200) <= 1
    wanted = 50_000 * (1 - (1 - uniforms[labels > 100]) / 1e-3)
    assert (labels[labels > 100] - wanted).abs().max() < 50  # a float32 near 1 steps by six of these labels


@pytest.mark.parametrize("largest", [1 - 2**-24, 1 - 2**-23])
def test_a_label_of_no_probability_is_never_drawn(largest):
    """Catches the first label at a uniform of 0, and the last or one past it at a uniform that rounds to 1."""
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.tensor([0.0, 2**-24, 0.25, 0.5, 0.75, largest])
    for _ in range(300):
        logits = 3 * torch.randn(40, generator=generator)
        logits[torch.rand(40, generator=generator) < 0.5] = -math.inf
        logits[[0, 17, 38, 39]] = torch.tensor([-math.inf, 0.0, -math.inf, -math.inf])
        labels = draw_labels(logits, uniforms)
        assert logits[labels].isfinite().all()
        assert labels[0] == logits.isfinite().nonzero()[0]
    certain = torch.full((5,), -math.inf)
    certain[2] = 0.0
    assert (draw_labels(certain, uniforms) == 2).all()


def test_labels_are_sampled_at_answers_only():
    """Catches prompt or padding positions that get a label, or answers that keep the true one."""
    (batch,) = toy_batches()
    targets = shift_labels(batch["labels"])
    logits = torch.full((*targets.shape, VOCABULARY), -math.inf)
    logits[..., 4] = 0.0
    sampled = sample_labels(logits, targets, torch.rand(targets.shape, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(sampled, torch.where(targets == IGNORE_INDEX, IGNORE_INDEX, 4))
    assert (targets != 4).any(), "the true labels must not have been touched"


def test_uniforms_belong_to_the_row_and_the_place_in_its_answer():
    """Catches draws that follow padding, the place in the batch, or that forget and retain rows share."""
    rows = toy_rows(6)
    (whole,) = toy_batches((6,))
    longest = max(rows, key=lambda row: len(row["input_ids"]))
    short = min(rows, key=lambda row: len(row["input_ids"]))
    alone, padded, as_forget = toy_batch([], [short]), toy_batch([], [longest, short]), toy_batch([short], [])

    def answer(batch, place):
        return answer_uniforms(batch, 1, 2)[place][shift_labels(batch["labels"])[place] != IGNORE_INDEX]

    assert torch.equal(answer(alone, 0), answer(padded, 1))
    assert torch.equal(answer(alone, 0), answer(whole, short["row"]))
    assert not torch.equal(answer(alone, 0), answer(as_forget, 0))
    drawn = torch.cat([answer(whole, place) for place in range(6)])
    assert len(set(drawn.tolist())) == len(drawn) == len(answers_of(whole))
    assert (drawn >= 0).all() and (drawn < 1).all()
