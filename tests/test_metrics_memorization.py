import random

import numpy as np
import pytest
import torch
from test_eval_scoring import small_llama

from soul_eval.metrics.exact_memorization.formula import exact_memorization
from soul_eval.metrics.extraction_strength.formula import extraction_strength
from soul_eval.metrics.fluency.formula import fluency
from soul_eval.metrics.toxicity.formula import mean_toxicity, toxicity_rate


def random_hits(num_rows=200, seed=0):
    """Rows of 1 to 12 booleans, of all shares of hits."""
    draw = random.Random(seed)
    shares = [row / (num_rows - 1) for row in range(num_rows)]
    return [[draw.random() < share for _ in range(draw.randint(1, 12))] for share in shares]


def slow_extraction_strength(hits):
    """The definition as a search: the shortest beginning after which everything hits."""
    beginning = next(k for k in range(len(hits) + 1) if all(hits[k:]))
    return 1 - beginning / len(hits)


def open_unlearning_extraction_strength(hits):
    """The loop of OpenUnlearning's code, which never looks at the empty rest of an answer."""
    for k in range(len(hits)):
        if all(hits[k:]):
            break
    return 1 - k / len(hits)


def test_memorization_by_its_definitions():
    """Catches a run of hits at the start for one at the end, an index off by one, and rows of unequal length."""
    rows = random_hits()
    # The shares differ from the search by the rounding of 1 - k / n and (n - k) / n.
    assert extraction_strength(rows) == pytest.approx([slow_extraction_strength(row) for row in rows], abs=1e-15)
    assert exact_memorization(rows).tolist() == [sum(row) / len(row) for row in rows]
    assert len(set(extraction_strength(rows).tolist())) > 20  # or else most cases would be the same one


def test_open_unlearning_s_strength_is_ours_with_a_floor():
    """Catches the card's recipe for comparing with published figures going wrong."""
    rows = random_hits(seed=1)
    floored = np.maximum(extraction_strength(rows), [1 / len(row) for row in rows])
    assert floored == pytest.approx([open_unlearning_extraction_strength(row) for row in rows], abs=1e-15)


def test_memorization_at_the_ends_of_its_range():
    """Catches a floor of one token, and a miss at the very end that goes unseen."""
    rows = [[True], [False], [True] * 5, [True] * 4 + [False], [False] + [True] * 4, [False] * 5]
    assert extraction_strength(rows).tolist() == [1, 0, 1, 0, 0.8, 0]
    assert exact_memorization(rows).tolist() == [1, 0, 1, 0.8, 0.8, 0]
    assert extraction_strength([]).shape == exact_memorization([]).shape == (0,)
    assert exact_memorization([np.array([True, False])]).tolist() == [0.5]


@pytest.mark.parametrize("function", [exact_memorization, extraction_strength])
@pytest.mark.parametrize("row", [[], [0.9, 0.1], [1, 0], [True, None], True])
def test_a_bad_row_of_hits_is_named(function, row):
    """Catches an empty answer counted as forgotten, and probabilities or token ids taken for hits."""
    with pytest.raises(ValueError, match=r"Row 1 of `token_hits`"):
        function([[True], row])


@torch.no_grad()
def test_strength_under_teacher_forcing_is_that_of_free_generation():
    """Catches a definition that real greedy decoding does not bear out: the model must say the rest, and no more."""
    model = small_llama(seed=3).eval()
    draw, rows, strengths = random.Random(0), [], []
    for num_random in (0, 1, 3, 6):
        prompt = [draw.randrange(2, 300) for _ in range(3)]
        answer = [draw.randrange(2, 300) for _ in range(num_random)]
        ids = model.generate(torch.tensor([prompt + answer]), max_new_tokens=8, do_sample=False, pad_token_id=1)[0]
        answer, length = ids[3:], len(ids) - 3
        rows.append((model(ids[None]).logits[0, 2:-1].argmax(-1) == answer).tolist())
        free = []
        for k in range(length):
            said = model.generate(ids[None, : 3 + k], max_new_tokens=length - k, do_sample=False, pad_token_id=1)[0]
            free.append(said.tolist() == ids.tolist())
        strengths.append(1 - (free.index(True) if any(free) else length) / length)
    assert extraction_strength(rows) == pytest.approx(strengths, abs=1e-15)
    assert len(set(strengths)) > 2 and max(strengths) == 1


def test_toxicity_and_fluency_by_hand():
    """Catches a rate that counts what equals the threshold, a mean of the rate, and a threshold that is not used."""
    scores = [0.5, 0.75, 0.25, 1.0]
    assert mean_toxicity(scores) == fluency(scores) == 0.625
    assert toxicity_rate(scores) == 0.5
    assert toxicity_rate(scores, threshold=0.8) == 0.25
    assert toxicity_rate([0.0, 0.0], threshold=0.0) == 0
    assert [mean_toxicity([1.0]), toxicity_rate([1.0]), fluency([0.0])] == [1, 1, 0]


@pytest.mark.parametrize("function", [mean_toxicity, toxicity_rate, fluency])
def test_what_is_no_probability_is_named(function):
    """Catches logits and NaN averaged into a figure, and an aggregate of nothing."""
    for wrong in (1.5, -0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="row 2"):
            function([0.0, 1.0, wrong])
    with pytest.raises(ValueError, match="at least one"):
        function([])
    with pytest.raises(ValueError, match="threshold"):
        toxicity_rate([0.5], threshold=1.0)
