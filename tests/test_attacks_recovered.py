import json
import math

import numpy as np
import pytest

from soul_eval.attacks.recovered import VALUES, recoveries, share_recovered
from soul_eval.statistics import OPEN, Figure


def test_the_share_is_a_quotient_of_means():
    """Catches a mean of quotients, a swapped pair of models, a value that is cut off to [0, 1]."""
    unlearned, target = [0.1, 0.3, 0.2], [0.9, 0.6, 0.9]
    for attacked, share in (
        (unlearned, 0.0),
        (target, 1.0),
        ([0.1, 0.6, 0.8], (0.5 - 0.2) / (0.8 - 0.2)),
        ([0.0, 0.0, 0.0], -0.2 / 0.6),
        ([1.0, 1.0, 1.0], 0.8 / 0.6),
    ):
        found = share_recovered(attacked, unlearned, target)
        assert found.share.value == pytest.approx(share, abs=1e-12) and found.reason is None
        assert found.share.num_rows == 3 and found.unlearned.value == pytest.approx(0.2)
        assert found.share.low <= found.share.value <= found.share.high
    ratios = np.mean([0.0, 1.0, 6 / 7])
    assert abs(share_recovered([0.1, 0.6, 0.8], unlearned, target).share.value - ratios) > 0.05


def test_a_resample_draws_the_same_rows_of_all_models():
    """Catches models that are resampled apart: where each row gives back half, no resample gives anything else."""
    rng = np.random.default_rng(0)
    unlearned = rng.uniform(0, 0.4, 50)
    target = unlearned + rng.uniform(0.1, 0.6, 50)
    found = share_recovered((unlearned + target) / 2, unlearned, target, bounds=OPEN).share
    # Quotients of sums of 50 numbers in float64.
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-12)


def test_an_attack_that_changes_no_row_leaves_doubt_about_the_next():
    """Catches `0.00 [0.00, 0.00]` of four rows, and an interval that does not shrink as rows become more."""
    for num_rows in (4, 40):
        share = share_recovered([0.1] * num_rows, [0.1] * num_rows, [0.9] * num_rows).share
        # One row more has a weight w of Beta(1, n), changes by 1, and adds nothing to the 0.8 that was forgotten.
        weight = 1 - 0.025 ** (1 / num_rows)
        end = weight / (0.8 * (1 - weight))
        assert share.value == 0 and [share.low, share.high] == pytest.approx([-end, end], rel=0.1)


def test_nothing_forgotten_gives_no_share_but_a_reason():
    """Catches a quotient by nearly nothing, an infinite or negative share where the target knows no more, silence."""
    for target, reason in (([0.2, 0.2], "0.2, which leaves less than 0.01"), ([0.1, 0.1], "target has 0.1 and")):
        found = share_recovered([0.9, 0.9], [0.2, 0.2], target)
        assert found.share is None and reason in found.reason and found.attacked.value == pytest.approx(0.9)
        entry = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert entry["share"] is None and entry["reason"] == found.reason and entry["target"]["num_rows"] == 2
    noisy = share_recovered([0.5] * 4, [0.5, 0.5, 0.5, 0.5], [0.9, 0.2, 0.8, 0.3])
    assert noisy.share is None and "not ahead in every resample" in noisy.reason
    alone = share_recovered([0.3], [0.2], [0.4]).share
    assert alone == Figure(pytest.approx(0.5), 1)


def test_bad_values_are_named():
    """Catches rows of different models that are cut to the shorter, and a loss of infinity that becomes a share."""
    with pytest.raises(ValueError, match=r"'attacked': 1, 'unlearned': 2"):
        share_recovered([0.1], [0.1, 0.2], [0.3, 0.4])
    with pytest.raises(ValueError, match="of one at least"):
        share_recovered([], [], [])
    with pytest.raises(ValueError, match="`target` must be finite, but is nan at place 1"):
        share_recovered([0.1, 0.1], [0.1, 0.1], [0.5, math.nan])
    with pytest.raises(ValueError, match="`least_forgotten` must be more than 0"):
        share_recovered([0.1], [0.1], [0.5], least_forgotten=0)


def test_intervals_hold_the_true_share_as_often_as_they_say():
    """Catches an interval that is too narrow, as one of the numerator alone is, or too wide, of unpaired rows."""
    rng = np.random.default_rng(1)
    true, num_runs, held, widths = 0.3, 400, 0, []
    for _ in range(num_runs):
        lost = rng.beta(2, 2, 60)
        gained = true * lost + rng.normal(0, 0.1, 60)
        unlearned = rng.uniform(0, 1, 60)
        share = share_recovered(unlearned + gained, unlearned, unlearned + lost, bounds=OPEN).share
        held += share.low <= true <= share.high
        widths.append(share.high - share.low)
    # 95% of 400 runs is 380, give or take 4.4; plain percentiles of 60 rows hold a little less.
    assert 0.92 <= held / num_runs <= 0.98
    # The delta method: the standard deviation of (gained - true * lost) over the mean of lost.
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.1 / math.sqrt(60) / 0.5, rel=0.1)


def rows_of(values, split="forget", question="Q", **more):
    return [
        {"split": split, "index": index, "question": f"{question}{index}", "answer_nll": -math.log(value), **more}
        for index, value in enumerate(values)
    ]


def test_rows_are_matched_by_index():
    """Catches rows compared in the order of their files, other splits that count, a subset held against all rows."""
    unlearned, target = rows_of([0.1, 0.2, 0.4]), rows_of([0.5, 0.6, 0.8])
    attacked = rows_of([0.3, 0.2, 0.8]) + rows_of([0.9, 0.9], split="retain")
    found = recoveries(attacked, unlearned[::-1], target[1:] + target[:1])
    assert found.keys() == {"probability"}, "no row has a generation"
    assert found["probability"].share.value == pytest.approx((0.2 + 0.0 + 0.4) / 1.2)
    part = recoveries(attacked[1:2], unlearned, target)["probability"]
    assert part.share == Figure(pytest.approx(0, abs=1e-12), 1)
    with_recall = [
        [{**row, "rougeL_recall": 0.25 * factor} for row in rows]
        for factor, rows in enumerate((unlearned, attacked, target))
    ]
    found = recoveries(with_recall[1], with_recall[0], with_recall[2])
    assert found["rougeL_recall"].share.value == pytest.approx(0.5)
    own = {"length": lambda rows: np.array([len(row["question"]) / 10 for row in rows])}
    assert recoveries(attacked, unlearned, target, own)["length"].share is None
    assert list(VALUES) == ["probability", "rougeL_recall"]


def test_rows_of_other_questions_are_refused():
    """Catches a target evaluated on another forget set, or on fewer rows."""
    unlearned, target = rows_of([0.1, 0.2]), rows_of([0.5, 0.6])
    with pytest.raises(ValueError, match="another question in forget row 0"):
        recoveries(rows_of([0.1, 0.2], question="Other"), unlearned, target)
    with pytest.raises(ValueError, match="1 forget rows and the model 2"):
        recoveries(unlearned, unlearned, target[:1])
    with pytest.raises(ValueError, match="no attacked rows of `split`='forget'"):
        recoveries(rows_of([0.1], split="retain"), unlearned, target)
