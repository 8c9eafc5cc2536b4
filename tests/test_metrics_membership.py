import json
import math
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from soul_eval.metrics.membership_auc.formula import auc, auc_value, resampled_auc, true_positive_rate
from soul_eval.metrics.membership_scores.formula import (
    gradient_norm_score,
    loss_score,
    lowercase_score,
    membership_scores,
    min_k_plus_plus_score,
    min_k_score,
    reference_score,
    zlib_score,
)
from soul_eval.metrics.privleak.formula import privleak


ROOT = Path(__file__).parents[1]
# Ratios of small integers, and float64 sums of a few hundred numbers in another order.
EXACT = {"rel": 1e-12, "abs": 1e-12}


def normal_scores(seed, num_members=40, num_non_members=30, shift=0.5, decimals=None):
    """Scores of members that lie `shift` deviations above those of non-members; rounded ones have ties."""
    random = np.random.default_rng(seed)
    members, non_members = random.normal(shift, 1, num_members), random.normal(0, 1, num_non_members)
    return (members, non_members) if decimals is None else (members.round(decimals), non_members.round(decimals))


def labelled(members, non_members):
    return np.repeat([1, 0], [len(members), len(non_members)]), np.concatenate([members, non_members])


# Scores of single rows


def test_scores_by_hand():
    """Catches a swapped sign or ratio, a sum for a mean, and characters or raw bytes for compressed ones."""
    assert loss_score([0.5, 2.0]).tolist() == [-0.5, -2.0]
    text = "naïve " * 40
    assert zlib_score([0.5], [text]) == pytest.approx([-0.5 / len(zlib.compress(text.encode()))], **EXACT)
    assert reference_score([1.0, 3.0], [2.5, 2.0]).tolist() == [1.5, -1.0]
    assert lowercase_score([1.0, 2.0], [3.0, 1.0]).tolist() == [3.0, 0.5]
    assert gradient_norm_score([0.0, 4.0]).tolist() == [0.0, -4.0]


def test_lowercase_score_of_a_row_known_by_heart():
    """Catches 0 / 0 as NaN for a text without capitals, whose losses are both 0, which no AUC could take."""
    with np.errstate(all="raise"):
        assert lowercase_score([0.0, 0.0, 2.0], [0.0, 1.0, 0.0]).tolist() == [1.0, math.inf, 0.0]


def test_min_k_takes_the_lowest_tokens():
    """Catches the highest tokens, a share rounded up, the mean over all tokens, and rows in another order."""
    row = [-1.0, -9.0, -2.0, -5.0, -3.0, -0.5, -0.1, -4.0, -0.2, -0.3]
    assert min_k_score([row], k=0.2) == pytest.approx([-7.0])
    assert min_k_score([row], k=0.39) == pytest.approx([-6.0])
    assert min_k_score([row, row[:1]], k=1.0) == pytest.approx([np.mean(row), -1.0])
    assert min_k_plus_plus_score([[2.0, -1.5, 0.5, -0.5, 1.0]], k=0.4) == pytest.approx([-1.0])


def test_min_k_of_short_rows_takes_one_token():
    """Catches the mean of no token: int(3 * 0.2) is 0, for which the papers' code gives NaN."""
    assert min_k_score([[-1.0, -6.0, -2.0], [-4.0]]).tolist() == [-6.0, -4.0]


@pytest.mark.parametrize("k", [0.1, 0.2, 0.3, 0.4, 0.7, 1.0])
def test_min_k_is_the_published_code(k):
    """Catches any difference from the released code of Min-K% and Min-K%++, written down once more."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (4, 23, 17))
    logits[..., 0] += 8
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    tokens = random.integers(0, 17, (4, 23))
    own = np.take_along_axis(log_probs, tokens[..., None], 2)[..., 0]
    mean = (np.exp(log_probs) * log_probs).sum(-1)
    deviation = np.sqrt((np.exp(log_probs) * log_probs**2).sum(-1) - mean**2)
    z_scores = (own - mean) / deviation
    for rows, score in ((own, min_k_score), (z_scores, min_k_plus_plus_score)):
        published = [np.mean(np.sort(row)[: int(len(row) * k)]) for row in rows]
        assert score(rows.tolist(), k) == pytest.approx(published, **EXACT)


def test_all_scores_at_once():
    """Catches scores under each other's names, and a score that is made up where its input is missing."""
    rows, norms = [[-1.0, -3.0], [-0.5]], [2.0, 1.0]
    assert membership_scores(rows).keys() == {"loss", "min_k"}
    scores = membership_scores(rows, [[0.5, -1.0], [1.0]], ["Ab", "C"], [3.0, 1.0], [4.0, 0.5], norms, k=0.5)
    sizes = [len(zlib.compress(text)) for text in (b"Ab", b"C")]
    expected = {
        "loss": [-2.0, -0.5],
        "min_k": [-3.0, -0.5],
        "min_k_plus_plus": [-1.0, 1.0],
        "zlib": [-2.0 / sizes[0], -0.5 / sizes[1]],
        "reference": [1.0, 0.5],
        "lowercase": [2.0, 1.0],
        "gradient_norm": [-2.0, -1.0],
    }
    assert {name: values.tolist() for name, values in scores.items()} == expected


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: min_k_score([[-1.0], []]), "Row 1 of `token_log_probs`"),
        (lambda: min_k_plus_plus_score([[0.0, math.nan]]), "Row 0 of `token_z_scores`"),
        (lambda: min_k_score([[-1.0]], k=20), "`k` must be a share"),
        (lambda: min_k_score([[-1.0]], k=0), "`k` must be a share"),
        (lambda: loss_score([0.5, math.nan]), "Row 1 of `nll` is NaN"),
        (lambda: lowercase_score([-0.5], [1.0]), "Row 0 of `nll` is negative"),
        (lambda: reference_score([1.0], [1.0, 2.0]), "same rows"),
        (lambda: zlib_score([1.0], []), "same rows"),
        (lambda: membership_scores([[-1.0]], gradient_norms=[1.0, 2.0]), "same rows"),
    ],
)
def test_rows_that_give_no_score_are_named(call, message):
    """Catches NaN scores that a later AUC would rank somewhere, and percent given for a share."""
    with pytest.raises(ValueError, match=message):
        call()


# AUC


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_auc_is_that_of_every_pair(decimals):
    """Catches the other direction, ties counted as wins, and ranks of one group alone."""
    for seed in range(5):
        members, non_members = normal_scores(seed, decimals=decimals)
        pairs = [(m > n) + (m == n) / 2 for m in members for n in non_members]
        assert auc_value(members, non_members) == pytest.approx(np.mean(pairs), **EXACT)
        assert auc_value(members, non_members) == pytest.approx(
            roc_auc_score(*labelled(members, non_members)), **EXACT
        )


def test_auc_by_hand_and_at_its_ends():
    """Catches a tie for all that is not 0.5, infinite scores, and an interval without rows to vary."""
    assert auc([-1.0, -2.0], [-2.0, -3.0]).value == 0.875
    assert auc([7.0] * 3, [7.0] * 4).value == 0.5
    assert auc([math.inf, 1.0], [-math.inf, 2.0]).value == 0.75
    single = auc([3.0], [1.0, 2.0])
    assert (single.value, single.num_rows, single.low, single.high) == (1.0, 3, None, None)


def test_auc_of_perfect_separation_is_not_certain():
    """Catches an interval of no width at the end: ten pairs in order do not show that no pair is in disorder."""
    certain = auc(np.arange(10.0) + 100, np.arange(25.0))
    # The exact lower bound of a share of which 10 of 10 were seen: p with p ** 10 = 0.025.
    assert (certain.low, certain.high) == (pytest.approx(0.025**0.1, **EXACT), 1.0)
    never = auc(np.arange(10.0), np.arange(25.0) + 100)
    assert (never.value, never.low, never.high) == (0.0, 0.0, pytest.approx(1 - 0.025**0.1, **EXACT))


def test_resampled_auc_is_the_auc_of_resamples():
    """Catches wrong ties, pairs drawn together, and draws of ranks for rows: of another model that is another row."""
    members, non_members = normal_scores(1, 7, 5, decimals=0)
    name = "rows"
    areas = resampled_auc(members, non_members, name)
    draws = []
    for group, scores in (("members", members), ("non-members", non_members)):
        random = np.random.default_rng(zlib.crc32(f"{name}/{group}".encode()))
        draws.append(random.multinomial(len(scores), np.full(len(scores), 1 / len(scores)), 2000))
    for row in range(0, 2000, 97):
        drawn = [np.repeat(scores, counts[row]) for scores, counts in zip((members, non_members), draws)]
        assert areas[row] == pytest.approx(roc_auc_score(*labelled(*drawn)), **EXACT)
    assert np.array_equal(areas, resampled_auc(members, non_members, name))
    assert not np.array_equal(areas, resampled_auc(members, non_members, "others"))


def test_auc_interval_covers():
    """Catches an interval that is too narrow or of the wrong thing: of 300 samples 95% must hold the true AUC."""
    true = stats.norm.cdf(0.8 / math.sqrt(2))
    hits = 0
    for seed in range(300):
        figure = auc(*normal_scores(seed, 60, 80, shift=0.8), sample=str(seed))
        hits += figure.low <= true <= figure.high
    # Three standard errors of a share of 0.95 are 0.038; a percentile interval of 60 rows lacks about a percent.
    assert 0.90 <= hits / 300 <= 0.99


def test_auc_interval_takes_no_time():
    """Catches a loop over resamples: 2,000 of 500 + 500 rows must take less than 2 seconds, best of three."""
    members, non_members = normal_scores(0, 500, 500)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        auc(members, non_members)
        times.append(time.perf_counter() - start)
    assert min(times) < 2


@pytest.mark.parametrize(
    "members, non_members, message",
    [
        ([], [1.0], "`member_scores` must be"),
        ([1.0], [], "`non_member_scores` must be"),
        ([1.0, math.nan], [1.0], "Row 1 of `member_scores` is NaN"),
        ([1.0], [math.nan], "Row 0 of `non_member_scores` is NaN"),
    ],
)
def test_auc_refuses_what_has_no_rank(members, non_members, message):
    """Catches NaN, which numpy sorts above every number, so that a broken row would count as a sure member."""
    with pytest.raises(ValueError, match=message):
        auc(members, non_members)
    with pytest.raises(ValueError, match=message):
        true_positive_rate(members, non_members, 0.01)


# True positive rate at a false positive rate


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.01, 0.07, 0.1, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_true_positive_rate_is_on_the_curve(rate, decimals):
    """Catches a threshold that is one row off, ties cut in two, and 0.07 * 100 > 7 or 0.29 * 100 < 29 rows."""
    for seed in range(5):
        members, non_members = normal_scores(seed, 80, 100, shift=1, decimals=decimals)
        # sklearn leaves points out by default, and interpolating between points would need half a row.
        false, true, _ = roc_curve(*labelled(members, non_members), drop_intermediate=False)
        figure = true_positive_rate(members, non_members, rate)
        assert figure.value == true[false <= rate].max()
        assert figure.low <= figure.value <= figure.high


def test_true_positive_rate_of_too_few_non_members():
    """Catches a figure at 0.1% that 30 non-members cannot give, without an interval that says so."""
    members, non_members = np.arange(10.0), np.append(np.arange(29.0) - 25, 5.5)
    figure = true_positive_rate(members, non_members, 0.001)
    assert figure.value == true_positive_rate(members, non_members, 0.0).value == 0.4
    assert figure.low == 0
    assert figure.high > 0.7


def test_true_positive_rate_interval_by_hand():
    """Catches a bound taken from the wrong tail, or only one of the two uncertainties."""
    members, non_members = np.arange(500) - 0.5, np.arange(500.0)
    figure = true_positive_rate(members, non_members, 0.1)
    # Of 2.5% a side, 2% for the number of non-members above the true threshold, by summing binomial probabilities.
    weights = [math.comb(500, count) * 0.1**count * 0.9 ** (500 - count) for count in range(501)]
    few = max(j for j in range(501) if sum(weights[: j + 1]) <= 0.02)
    many = min(j for j in range(501) if sum(weights[: j + 1]) >= 0.98)
    # The k-th highest non-member is 500 - k, over which k - 1 members lie; k is one more than lie above.
    bounds = [stats.binomtest(count, 500).proportion_ci(0.99, "exact") for count in (few, many)]
    assert figure.value == 50 / 500
    assert (figure.low, figure.high) == (pytest.approx(bounds[0].low), pytest.approx(bounds[1].high))


@pytest.mark.parametrize("rate, num_non_members", [(0.01, 60), (0.01, 400), (0.1, 100)])
def test_true_positive_rate_interval_covers(rate, num_non_members):
    """Catches an interval that vouches for less than 95%, above all where the rate is finer than the rows."""
    true = stats.norm.sf(stats.norm.isf(rate) - 1.5)
    hits = 0
    for seed in range(300):
        figure = true_positive_rate(*normal_scores(seed, 150, num_non_members, shift=1.5), rate)
        hits += figure.low <= true <= figure.high
    # The interval is exact, so never below; two standard errors of a share of 0.95 are 0.025.
    assert hits / 300 >= 0.925


def test_true_positive_rate_refuses_percent():
    """Catches 1 for 1%, which gives 1.0 for every model, and anything above."""
    with pytest.raises(ValueError, match="false_positive_rate"):
        true_positive_rate([1.0], [0.0], 5)


# PrivLeak


def test_privleak_is_that_of_muse():
    """Catches the other direction of the AUC: MUSE's code labels held-out rows 1 and ranks by minus the loss."""
    for seed in range(5):
        members, non_members = normal_scores(seed, 30, 40, shift=1.0)
        gold_members, gold_non_members = normal_scores(seed + 50, 30, 40, shift=0.1)
        # As in metrics/privleak.py: `ppl` is minus the score, forget rows are 0, held-out rows 1.
        areas = [
            roc_auc_score(np.repeat([0, 1], [30, 40]), -np.concatenate([-forget, -holdout]))
            for forget, holdout in ((members, non_members), (gold_members, gold_non_members))
        ]
        official = (areas[0] - areas[1]) / areas[1] * 100
        figure = privleak(members, non_members, gold_members, gold_non_members)
        assert figure.value == pytest.approx(official, **EXACT)
        assert figure.low <= figure.value <= figure.high


def test_privleak_by_hand():
    """Catches the gold AUC in the wrong place: the target model is at -100, as MUSE has -99.8 for it on news."""
    known, unseen = [5.0, 6.0], [1.0, 2.0]
    assert privleak(known, unseen).value == -100
    assert privleak(unseen, known).value == 100
    assert privleak([1.0, 2.0], [1.0, 2.0]).value == 0
    # AUC 0.75 against 0.25: 1 - 0.75 = 0.25 is two thirds less than 1 - 0.25 = 0.75.
    figure = privleak([4.0, 2.0], [3.0, 1.0], [3.0, 1.0], [4.0, 2.0])
    assert (figure.value, figure.num_rows) == (pytest.approx(-200 / 3), 4)
    # Some resamples of so few rows have a gold AUC of 1, for which PrivLeak is not defined: no interval.
    assert figure.low is figure.high is None
    assert privleak(unseen, known, [4.0, 2.0], [3.0, 1.0]).value == pytest.approx(300)


def test_privleak_interval_without_a_gold_model():
    """Catches ends in the wrong order: a higher AUC is a lower PrivLeak."""
    members, non_members = normal_scores(3)
    area, figure = auc(members, non_members, "s"), privleak(members, non_members, sample="s")
    ends = [(0.5 - end) / 0.5 * 100 for end in (area.high, area.low)]
    assert [figure.low, figure.high] == pytest.approx(ends, **EXACT)


def test_privleak_interval_is_joint():
    """Catches models that are resampled apart: the gold model itself differs from it in no resample."""
    members, non_members = normal_scores(4)
    same = privleak(members, non_members, members, non_members)
    assert (same.value, same.low, same.high) == (0, None, None), "of resamples that are all alike there is no interval"
    known = privleak(members + 100, non_members, members, non_members)
    assert known.value == known.low == -100
    assert -100 < known.high < -50


def test_privleak_refuses_a_gold_model_of_other_rows():
    """Catches a gold model that has seen the forget rows, half a gold model, and one of another --limit."""
    with pytest.raises(ValueError, match="not defined"):
        privleak([1.0, 2.0], [1.0, 2.0], [5.0, 6.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="same rows"):
        privleak([1.0, 2.0], [1.0, 2.0], [5.0, 6.0])
    with pytest.raises(ValueError, match="same rows"):
        privleak([1.0, 2.0], [1.0, 2.0], [5.0, 6.0, 7.0], [1.0, 2.0])


# As evaluate modules


def test_evaluate_loads_the_metrics_without_a_network(tmp_path):
    """Catches a module that evaluate cannot copy and import by itself, and keys or values other than promised."""
    code = """
import evaluate, json
load = lambda name: evaluate.load(f"eval/metrics/{name}")
scores, labels = [4.0, 2.0, 3.0, 1.0], [1, 1, 0, 0]
results = [
    load("membership_scores").compute(predictions=[[-1.0, -3.0], [-2.0]], k=0.5),
    load("membership_scores").compute(predictions=[[-1.0], [-2.0]], reference_nll=[3.0, 1.0]),
    load("membership_auc").compute(predictions=scores, references=labels),
    load("privleak").compute(predictions=scores, references=labels),
    load("privleak").compute(predictions=scores, references=labels, gold_predictions=[3.0, 1.0, 4.0, 2.0]),
    load("shadow_attack").compute(predictions=[[0.0], [0.1], [3.0], [3.2], [0.1]], references=[1, 1, 0, -1, -1]),
    [bool(load(name).description and load(name).inputs_description)
     for name in ("membership_scores", "membership_auc", "privleak", "shadow_attack")],
]
for name in ("membership_auc", "privleak", "shadow_attack"):
    try:
        load(name).compute(predictions=[[1.0]] if name == "shadow_attack" else [1.0], references=[2])
    except ValueError as error:
        results.append(str(error))
print(json.dumps(results))
"""
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    single, several, area, leak, gold_leak, shadow, described, *errors = json.loads(done.stdout.splitlines()[-1])
    assert single == {"loss": [-2.0, -2.0], "min_k": [-3.0, -2.0]}
    assert several == {"loss": [-1.0, -2.0], "min_k": [-1.0, -2.0], "reference": [2.0, -1.0]}
    figure = auc([4.0, 2.0], [3.0, 1.0])
    assert [area["auc"], area["auc_low"], area["auc_high"]] == [0.75, figure.low, figure.high]
    assert (area["tpr_at_fpr_0.01"], area["tpr_at_fpr_0.001_low"]) == (0.5, 0.0)
    assert area["tpr_at_fpr_0.001_high"] > 0.9
    assert (leak["privleak"], gold_leak["privleak"]) == (-50.0, pytest.approx(-200 / 3))
    assert leak["privleak_low"] <= -50 <= leak["privleak_high"]
    assert (shadow["mia_efficacy"], shadow["shadow_accuracy"]) == (0.5, 1.0)
    assert all(described)
    assert len(errors) == 3 and all("[2]" in error for error in errors)
