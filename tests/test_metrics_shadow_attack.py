import math

import numpy as np
import pytest
from sklearn.svm import SVC

from soul_eval.metrics.shadow_attack.formula import row_features, shadow_attack, shadow_attacks


# Ratios of small integers, and float64 sums of a few dozen numbers in another order.
EXACT = {"rel": 1e-12, "abs": 1e-12}


def test_shadow_attack_of_separable_rows():
    """Catches swapped classes: forget rows like those never seen are the good end, 1."""
    random = np.random.default_rng(0)
    kept, unseen = random.normal(-1, 0.2, 50), random.normal(1, 0.2, 50)
    forgotten = shadow_attack(kept, unseen, random.normal(1, 0.2, 40))
    known = shadow_attack(kept, unseen, random.normal(-1, 0.2, 40))
    assert (forgotten.efficacy.value, known.efficacy.value, known.shadow_accuracy) == (1.0, 0.0, 1.0)
    half = shadow_attack(kept, unseen, np.append(np.full(30, 1.0), np.full(10, -1.0)))
    assert (half.efficacy.value, half.efficacy.num_rows) == (0.75, 40)
    assert half.efficacy.low < 0.75 < half.efficacy.high


def test_shadow_attack_of_inseparable_rows():
    """Catches an attack that seems to work where there is nothing to learn."""
    random = np.random.default_rng(0)
    attack = shadow_attack(*(random.normal(0, 1, 400) for _ in range(3)))
    assert attack.shadow_accuracy < 0.62
    assert 0.2 < attack.efficacy.value < 0.8


def test_shadow_attack_is_that_of_soul():
    """Catches other settings of the classifier than SOUL's code has, written down once more."""
    random = np.random.default_rng(1)
    kept, unseen, forget = random.gamma(2, 1, 60), random.gamma(3, 1, 50), random.gamma(2.5, 1, 70)
    classifier = SVC(C=3, gamma="auto", kernel="rbf")
    shadow, labels = np.concatenate([kept, unseen]).reshape(-1, 1), np.concatenate([np.ones(60), np.zeros(50)])
    classifier.fit(shadow, labels)
    attack = shadow_attack(kept, unseen, forget)
    assert attack.efficacy.value == pytest.approx(1 - classifier.predict(forget.reshape(-1, 1)).mean(), **EXACT)
    assert attack.shadow_accuracy == pytest.approx(classifier.score(shadow, labels), **EXACT)


def test_standardised_shadow_attack_knows_no_unit():
    """Catches a scale from the target rows, none, and a division by 0: a loss tells the same in any unit."""
    random = np.random.default_rng(2)
    kept, unseen = random.normal(0, 1, (60, 2)), random.normal(1.5, 1, (60, 2))
    forget = random.normal(0.7, 1, (80, 2))
    kept[:, 1] = unseen[:, 1] = 3.0
    scaled = [rows * np.array([1e-4, 1.0]) for rows in (kept, unseen, forget)]
    plain, tiny = (shadow_attack(*rows, standardise=True) for rows in ((kept, unseen, forget), scaled))
    assert plain == tiny
    assert plain.shadow_accuracy > 0.7
    assert shadow_attack(*scaled) != tiny


def test_shadow_attacks_put_the_most_accurate_first():
    """Catches the best score chosen by what it says of the target rows."""
    random = np.random.default_rng(3)
    kept = {"noise": random.normal(0, 1, 80), "loss": random.normal(-1, 0.3, 80)}
    unseen = {"noise": random.normal(0, 1, 80), "loss": random.normal(1, 0.3, 80)}
    attacks = shadow_attacks(kept, unseen, {"noise": np.full(5, 0.1), "loss": np.full(5, -1.0)})
    assert list(attacks) == ["loss", "noise"]
    assert attacks["loss"].efficacy.value == 0.0
    with pytest.raises(ValueError, match="same features"):
        shadow_attacks(kept, unseen, {"loss": [1.0]})


def test_shadow_attack_refuses_rows_that_do_not_fit():
    """Catches empty groups, features that are not numbers, and targets of other features than the shadow rows."""
    with pytest.raises(ValueError, match="`shadow_non_members`"):
        shadow_attack([1.0], [], [1.0])
    with pytest.raises(ValueError, match="Row 1 of `targets` is not finite"):
        shadow_attack([1.0], [2.0], [1.0, math.inf])
    with pytest.raises(ValueError, match="as many features"):
        shadow_attack([[1.0, 2.0]], [[2.0, 3.0]], [[1.0]])


def test_row_features_by_a_slow_loop():
    """Catches the modified entropy with log p for log(1 - p), as published code has it, and labels of other rows."""
    random = np.random.default_rng(4)
    logits = random.normal(0, 2, (6, 5))
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    labels = [int(row.argmax()) if index % 2 else 3 for index, row in enumerate(logits)]
    entropy, modified = 0.0, 0.0
    for row, label in zip(np.exp(log_probs), labels):
        entropy -= sum(p * math.log(p) for p in row) / 6
        modified -= (1 - row[label]) * math.log(row[label]) / 6
        modified -= sum(p * math.log(1 - p) for token, p in enumerate(row) if token != label) / 6
    own = [row[label] for row, label in zip(np.exp(log_probs), labels)]
    features = row_features(log_probs, labels)
    assert features["correctness"] == np.mean([row.argmax() == label for row, label in zip(logits, labels)])
    assert features["confidence"] == pytest.approx(np.mean(own), **EXACT)
    assert features["entropy"] == pytest.approx(entropy, **EXACT)
    assert features["modified_entropy"] == pytest.approx(modified, **EXACT)
    assert features["probabilities"] == pytest.approx(np.percentile(own, range(0, 101, 10)), **EXACT)


def test_row_features_of_certain_tokens():
    """Catches NaN from 0 log 0 where a token is certain, rightly or wrongly."""
    with np.errstate(divide="ignore"):
        certain = np.log(np.array([[1.0, 0.0, 0.0]]))
    with np.errstate(all="raise", under="ignore"):
        right, wrong = (row_features(certain, [label]) for label in (0, 2))
    assert (right["entropy"], right["modified_entropy"], right["correctness"]) == (0, 0, 1)
    assert (wrong["entropy"], wrong["correctness"]) == (0, 0)
    assert 100 < wrong["modified_entropy"] < math.inf
    with pytest.raises(ValueError, match="a label a token"):
        row_features(certain, [0, 1])
