"""What the report says of its figures, on runs whose meaning is known."""

import math

import numpy as np
import pytest
from scipy import stats

from soul_eval.known_figures import COLUMNS
from soul_eval.registry import column_of
from soul_eval.runs import Run
from soul_eval.sentences import KS_CRITICAL, sentence
from soul_eval.statistics import Figure


def said(key, **figures):
    """The sentence on runs that are named after their roles, or else unlearned."""
    roles = ("target", "gold")
    runs = [Run(name, {key: figure}, role=name if name in roles else "unlearned") for name, figure in figures.items()]
    return sentence(column_of(key), runs)


def interval(value, margin=0.02):
    return Figure(value, 400, value - margin, value + margin)


def test_forget_quality_says_who_could_be_the_gold_model():
    """Catches a p-value read the wrong way round, and a pass that is reported without what would have passed too."""
    text = said("forget_quality", SOUL=Figure(0.41, 400), AdamW=Figure(1.2e-9, 400), gold=Figure(1.0, 400))
    assert text == (
        "SOUL's truth ratios could be the gold model's: p = 0.41; AdamW's truth ratios are not the gold model's: "
        "p = 1.2e-09 (of 400 rows each, any distance under about 0.10 would pass)."
    )
    assert said("forget_quality", SOUL=0.05) == "SOUL's truth ratios are not the gold model's: p = 0.05."
    assert said("forget_quality", SOUL=0.0).endswith("p = 0.")
    # scipy's exact p-values turn at that distance; distances of two samples of 400 are multiples of 1 / 400.
    critical = KS_CRITICAL * math.sqrt(2 / 400)
    rows = np.arange(400.0)
    for steps in (-1, 2):
        shift = math.floor(critical * 400) + steps
        assert (stats.ks_2samp(rows, rows + shift).pvalue > 0.05) == (steps < 0)


@pytest.mark.parametrize(
    "value, words",
    [
        (0.11, "no more than a model that never saw them (within each other's intervals)"),
        (0.135, "perhaps more than a model that never saw them (the intervals overlap)"),
        (0.30, "more than a model that never saw them, so something of them is left (the intervals do not meet)"),
        (0.065, "perhaps less than a model that never saw them (the intervals overlap)"),
        (
            0.01,
            "less than a model that never saw them, which is damage and no better forgetting (the intervals do not",
        ),
    ],
)
def test_forgetting_is_measured_by_the_gold_model(value, words):
    """Catches less than the gold model praised as better, and overlap sold as equality or as a difference."""
    text = said("forget_probability", target=interval(0.9), SOUL=interval(value), gold=interval(0.1))
    low, high = value - 0.02, value + 0.02
    assert text.startswith(
        f"SOUL gives the forgotten answers a probability of {value:.3f} [{low:.3f}, {high:.3f}], the "
    )
    assert f"the gold model 0.100 [0.080, 0.120]: {words}" in text and text.endswith(").")


def test_what_is_missing_is_said():
    """Catches a verdict on a gold model or a target that is not there, and one on intervals that are not."""
    assert said("forget_probability", target=0.9, SOUL=0.2) == (
        "SOUL gives the forgotten answers a probability of 0.200, from 0.900 before unlearning: there is no gold "
        "model to say how much a model has that never saw them."
    )
    assert said("model_utility", SOUL=interval(0.6)) == (
        "SOUL has a model utility of 0.600 [0.580, 0.620]: there is no model before unlearning to compare with."
    )
    assert said("model_utility", target=0.63, SOUL=0.6).endswith("down by 0.030 (no intervals to judge it by).")
    assert said("model_utility", target=0.63, SOUL=0.63).endswith("about the same (the same value).")
    assert said("model_utility", target=0.63) == said("model_utility") == ""


def test_what_is_kept_is_measured_by_the_target():
    """Catches a rise called a fall, the gold model taken for the goal, and a difference within the intervals."""
    text = said("model_utility", target=interval(0.63), A=interval(0.62), B=interval(0.5), gold=interval(0.3))
    assert text == (
        "A has a model utility of 0.620, from 0.630 before unlearning: about the same (within each other's "
        "intervals); B 0.500: down by 0.130 (the intervals do not meet)."
    )
    assert "perhaps up by 0.030" in said("retain_probability", target=interval(0.5), A=interval(0.53))
    assert said("seconds_per_step", A=0.5, B=0.25) == "A takes 0.500 s a step; B 0.250."
    assert said("nobody_knows", target=1.0, A=2.0).startswith("A has 2.000, from 1.000 before unlearning: up by 1.000")


@pytest.mark.parametrize(
    "key, figure, words",
    [
        ("mia_loss_auc", interval(0.51), "AUC of 0.510 [0.490, 0.530]: guessing, 0.5, lies within the interval."),
        ("mia_loss_auc", interval(0.6), ": above guessing, 0.5 (the interval does not reach it)."),
        ("mia_loss_auc", 0.4, ": below guessing, 0.5 (no interval to judge it by)."),
        ("mia_loss_auc", 0.5, ": as guessing, 0.5."),
        ("wmdp_bio_accuracy", interval(0.26), ": guessing among four, 0.25, lies within the interval."),
        (
            "relearning_recovered",
            interval(0.3),
            "gives back 0.300 [0.280, 0.320] of what it had forgotten: above 0 (the",
        ),
        ("privleak", Figure(-4.0, 99, -9.0, 1.0), "leakage of -4.000 [-9.000, 1.000]: 0 lies within the interval."),
    ],
)
def test_a_number_can_be_the_goal(key, figure, words):
    """Catches a side taken where the number lies within the interval, or the wrong side."""
    assert words in said(key, A=figure)


def paired_runs(shift, spread):
    """A target and a model whose rows are all a bit worse, with figures whose intervals hold each other."""
    rng = np.random.default_rng(0)
    runs = []
    nlls = rng.uniform(0.1, 3, 200)
    for name, losses in (("target", nlls), ("A", nlls + shift + rng.normal(0, spread, 200))):
        rows = [
            {"split": "retain", "index": index, "answer_nll": nll, "perturbed_nll": [9.0]}
            for index, nll in enumerate(losses)
        ]
        value = float(np.exp(-losses).mean())
        role = "target" if name == "target" else "unlearned"
        runs.append(Run(name, {"retain_probability": Figure(value, 200, value - 0.04, value + 0.04)}, rows, role=role))
    return runs


def test_rows_decide_where_they_are_at_hand():
    """Catches intervals that hide what a paired test sees, rows paired by place, and rows of another figure."""
    column = column_of("retain_probability")
    runs = paired_runs(0.02, 0.001)
    assert "down by" in sentence(column, runs) and "(paired test, p < 0.001)" in sentence(column, runs)
    runs[1].rows.reverse()
    assert "(paired test, p < 0.001)" in sentence(column, runs)
    noisy = paired_runs(0.0, 0.05)
    assert "about the same (paired test, p = 0." in sentence(column, noisy)
    # Fewer rows, or a figure that is not these rows' mean: only the intervals are left.
    fewer = paired_runs(0.02, 0.001)
    fewer[1].rows.pop()
    assert "(within each other's intervals)" in sentence(column, fewer)
    runs[1].summary["retain_probability"] = Figure(0.37, 200, 0.3, 0.44)
    assert "paired" not in sentence(column, runs)


def test_options_and_truth_ratios_are_paired_by_their_own_values():
    """Catches the probability of an answer taken for its share among the options, and a side of the ratio mixed up."""
    rng = np.random.default_rng(1)
    for key, split in (("world_facts_probability", "world_facts"), ("forget_truth_ratio", "forget")):
        runs = []
        for role in ("target", "gold", "unlearned"):
            rows, row_values = [], []
            for index in range(20):
                nll, options = rng.uniform(0.1, 3), rng.uniform(0.1, 3, 3)
                rows.append({"split": split, "index": index, "answer_nll": nll, "paraphrased_nll": nll})
                rows[-1]["perturbed_nll"] = options.tolist()
                share = math.exp(-nll) / (math.exp(-nll) + sum(map(math.exp, -options)))
                ratio = math.exp(nll - options.mean())
                row_values.append(share if split == "world_facts" else min(ratio, 1 / ratio))
            runs.append(Run(role, {key: float(np.mean(row_values))}, rows, role=role))
        assert "(paired test, p = " in sentence(column_of(key), runs)


@pytest.mark.parametrize(
    "key, split, field",
    [
        ("knowmem_retain_rougeL", "knowmem_retain", "rougeL_f1"),
        ("mmlu_accuracy", "mmlu", "is_correct"),
        ("retain_embedding_accuracy", "retain", "embedding_hit"),
        ("toxicity_rate", "prompts", "is_toxic"),
        ("fluency", "prompts", "fluency"),
    ],
)
def test_rows_of_other_suites_are_paired(key, split, field):
    """Catches a suite whose rows are at hand and whose intervals decide all the same."""
    runs = []
    for name, role in (("target", "target"), ("A", "unlearned")):
        hits = [place % 5 > (role == "target") for place in range(40)]
        rows = [{"split": split, "index": place, field: hit} for place, hit in enumerate(hits)]
        runs.append(Run(name, {key: float(np.mean(hits))}, rows, role=role))
    assert "up by 0.200 (paired test, p = " in sentence(column_of(key), runs)


def test_many_models_are_sorted_by_what_holds():
    """Catches a sentence as long as a page, a model left out, and models under another's verdict."""
    values = {f"M{place}": interval(0.1 + 0.3 * (place % 2)) for place in range(6)}
    text = said("forget_probability", **values, gold=interval(0.1))
    assert text == (
        "The gold model 0.100; no more than a model that never saw them: M0 (0.100), M2 (0.100), M4 (0.100); more "
        "than a model that never saw them, so something of them is left: M1 (0.400), M3 (0.400), M5 (0.400)."
    )
    assert said("seconds_per_step", **{f"M{place}": place / 2 for place in range(1, 5)}).count("; ") == 0


def test_every_known_figure_gives_a_sentence():
    """Catches a phrase that cannot be filled in, and text that runs on without its full stop."""
    for column in COLUMNS:
        key = column.key.replace("*", "x")
        text = said(key, target=interval(0.5), A=interval(0.4), B=interval(0.3), gold=interval(0.2))
        assert text.startswith("A") and "B" in text and text.endswith(".") and "{" not in text and "  " not in text
