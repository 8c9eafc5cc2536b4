import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from soul_eval.metrics.answer_probability.formula import answer_probability, normalised_answer_probability
from soul_eval.metrics.forget_quality.formula import forget_quality
from soul_eval.metrics.model_utility.formula import model_utility
from soul_eval.metrics.truth_ratio.formula import log_truth_ratios, truth_ratio_score, truth_ratios
from soul_eval.statistics import values
from soul_eval.suites.tofu import summarise


ROOT = Path(__file__).parents[1]
# Figures must be the official ones to 1e-9; float64 sums of a few hundred numbers in another order differ by 1e-14.
EXACT = {"rel": 1e-12, "abs": 1e-12}
SPLITS = {"forget": 5, "retain": 5, "held_out": 5, "real_authors": 3, "world_facts": 3}


def random_rows(seed, num_rows=60, scale=1.0, spread=1.0):
    """Rows as a model would give them, with `scale` for the losses and `spread` for their differences."""
    rng = np.random.default_rng(seed)
    rows = []
    for split, num_perturbed in SPLITS.items():
        for index in range(num_rows):
            base = float(rng.gamma(2, scale))
            row = {
                "split": split,
                "index": index,
                "answer_nll": base,
                "paraphrased_nll": abs(base + float(rng.normal(0.3, spread))) if num_perturbed == 5 else base,
                "perturbed_nll": np.abs(base + rng.normal(0.8, spread, num_perturbed)).tolist(),
                "rougeL_recall": float(rng.uniform(0.05, 1)),
            }
            rows.append(row)
    return rows


def official(rows, gold):
    """TOFU's aggregation, written down once more as loops over plain numbers."""
    figures = {}
    for split in SPLITS:
        own = [row for row in rows if row["split"] == split]
        probability, ratio_score, share = 0.0, 0.0, 0.0
        for row in own:
            true = math.exp(-row["answer_nll"])
            if split in ("real_authors", "world_facts"):
                true /= true + sum(math.exp(-nll) for nll in row["perturbed_nll"])
            probability += true / len(own)
            inverse = math.exp(sum(row["perturbed_nll"]) / len(row["perturbed_nll"]) - row["paraphrased_nll"])
            score = min(inverse, 1 / inverse) if split == "forget" else max(0.0, 1 - 1 / inverse)
            ratio_score += score / len(own)
            share += inverse / (inverse + 1) / len(own)
        figures[f"{split}_probability"] = probability
        figures[f"{split}_rougeL_recall"] = sum(row["rougeL_recall"] for row in own) / len(own)
        figures[f"{split}_truth_ratio"] = ratio_score
        figures[f"{split}_truth_share"] = share
    nine = [
        figures[f"{split}_{name}"]
        for split in ("retain", "real_authors", "world_facts")
        for name in ("probability", "rougeL_recall", "truth_ratio")
    ]
    figures["model_utility"] = stats.hmean(nine)
    inverses = [
        [math.exp(np.mean(row["perturbed_nll"]) - row["paraphrased_nll"]) for row in each if row["split"] == "forget"]
        for each in (rows, gold)
    ]
    test = stats.ks_2samp(*inverses)
    figures["forget_quality"], figures["ks_statistic"] = test.pvalue, test.statistic
    return figures


@pytest.mark.parametrize("scale, spread", [(0.1, 0.3), (1.0, 1.0), (20.0, 8.0)])
def test_summary_is_the_official_one(scale, spread):
    """Catches a swapped ratio, a mean of ratios for a ratio of means, probabilities not normalised or too often."""
    for seed in range(3):
        rows, gold = random_rows(seed, scale=scale, spread=spread), random_rows(seed + 50)
        assert values(summarise(rows, gold)) == pytest.approx(official(rows, gold), **EXACT)


def test_extreme_losses_give_finite_figures():
    """Catches overflow of exp and 0 / 0, which a model that gradient ascent has wrecked brings about."""
    rows = random_rows(0)
    for place, row in enumerate(rows):
        row["answer_nll"] = row["paraphrased_nll"] = 1000.0 if place % 2 else 0.0
        row["perturbed_nll"] = [5000.0 if place % 3 else 2500.0] * len(row["perturbed_nll"])
    with np.errstate(all="raise", under="ignore"):
        summary = summarise(rows, random_rows(1))
        assert all(math.isfinite(value) for value in values(summary).values())
        assert normalised_answer_probability([5000.0, 1000.0], [[1000.0], [1000.0] * 3]) == pytest.approx(0.125)
        assert truth_ratios([5000.0, 0.0], [[0.0], [5000.0]]).tolist() == [math.inf, 0.0]
        assert truth_ratio_score(log_truth_ratios([5000.0, 0.0], [[0.0], [5000.0]]), "retain") == 0.5


def test_formulas_by_hand():
    """Catches what the reimplementation above may share with the code: a handful of numbers worked out on paper."""
    assert answer_probability([0.0, math.log(4)]) == pytest.approx(0.625)
    # p = 1/2 against 1/4 and 1/4; p = 1/8 against 1/4 and 1/8
    losses, options = [math.log(2), math.log(8)], [[math.log(4)] * 2, [math.log(4), math.log(8)]]
    assert normalised_answer_probability(losses, options) == pytest.approx((1 / 2 + 1 / 4) / 2)
    ratios = log_truth_ratios([math.log(2), math.log(8)], [[math.log(4)] * 2, [math.log(2)] * 3])
    assert np.exp(ratios) == pytest.approx([1 / 2, 4])
    assert truth_ratio_score(ratios, "forget") == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert truth_ratio_score(ratios, "retain") == pytest.approx((1 / 2 + 0) / 2)
    assert model_utility([1.0, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert model_utility([1.0, 0.0]) == 0.0
    assert forget_quality([1.0, 2.0], [1.0, 2.0]) == (1.0, 0.0)
    with pytest.raises(ValueError, match="negative"):
        model_utility([0.5, -0.1])
    with pytest.raises(ValueError, match="side"):
        truth_ratio_score(ratios, "both")


def test_evaluate_loads_the_metrics_without_a_network(tmp_path):
    """Catches a module that evaluate cannot copy and import by itself, and keys or values other than promised."""
    code = """
import evaluate, json
load = lambda name: evaluate.load(f"eval/metrics/{name}")
results = [
    load("forget_quality").compute(predictions=[0.1, 0.2, 0.9], references=[0.8, 0.95, 1.1]),
    load("answer_probability").compute(predictions=[0.0, 2.0]),
    load("answer_probability").compute(predictions=[2.0], references=[[2.0, 2.0, 2.0]]),
    load("truth_ratio").compute(predictions=[1.0, 2.0], references=[[2.0, 2.0], [1.0]], side="retain"),
    load("model_utility").compute(predictions=[0.5] * 8 + [0.25]),
    bool(load("truth_ratio").description and load("truth_ratio").inputs_description),
]
print(json.dumps(results))
"""
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    quality, plain, normalised, ratio, utility, is_described = json.loads(done.stdout.splitlines()[-1])
    test = stats.ks_2samp([0.1, 0.2, 0.9], [0.8, 0.95, 1.1])
    assert quality == {"forget_quality": test.pvalue, "ks_statistic": test.statistic}
    assert plain == {"answer_probability": pytest.approx((1 + math.exp(-2)) / 2)}
    assert normalised == {"answer_probability": pytest.approx(0.25)}
    assert ratio["truth_ratios"] == pytest.approx([math.exp(-1), math.e])
    assert ratio["truth_share"] == pytest.approx((1 / (1 + math.exp(-1)) + 1 / (1 + math.e)) / 2)
    assert ratio["truth_ratio"] == pytest.approx((1 - math.exp(-1)) / 2)
    assert utility == {"model_utility": pytest.approx(stats.hmean([0.5] * 8 + [0.25]))}
    assert is_described
