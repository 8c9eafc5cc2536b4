"""Intervals: against closed forms, within their range, and as wide as few rows demand."""

import math

import numpy as np
import pytest
from scipy import stats

from soul_eval.statistics import (
    LOSS,
    OPEN,
    UNIT,
    Figure,
    interval_figure,
    mean_figure,
    paired_comparison,
    resampled_means,
    share_bounds,
)


# 2,000 draws put a quantile of 2.5% within 0.35 points of it, which is so much of the beta distributions below.
DRAWN = 0.01


def ends(figure):
    return [figure.low, figure.high]


@pytest.mark.parametrize("hits, num_rows", [(0, 1), (4, 4), (0, 20), (1, 3), (37, 400), (399, 400)])
def test_shares_have_the_exact_interval(hits, num_rows):
    """Catches a bootstrap of hits, which gives `1.000 [1.000, 1.000]` of four rows, and ends beyond 0 and 1."""
    exact = stats.binomtest(hits, num_rows).proportion_ci(0.95)
    figure = mean_figure([1] * hits + [0] * (num_rows - hits))
    assert ends(figure) == pytest.approx([exact.low, exact.high], abs=1e-9) and figure.num_rows == num_rows
    assert share_bounds(hits, num_rows) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_rows_that_are_all_alike_leave_doubt_about_the_next():
    """Catches an interval of no width, and one that does not shrink as rows become more."""
    for num_rows in (1, 4, 50):
        assert ends(mean_figure([1.0] * num_rows)) == pytest.approx([0.025 ** (1 / num_rows), 1.0])
        # One row more at an end has a weight of Beta(1, n), the 97.5% point of which is 1 - 0.025 ** (1 / n).
        weight = 1 - 0.025 ** (1 / num_rows)
        expected = [0.3 * (1 - weight), 0.3 + 0.7 * weight]
        assert ends(mean_figure([0.3] * num_rows)) == pytest.approx(expected, abs=DRAWN)


def test_other_ranges_are_the_unit_interval_stretched():
    """Catches an interval of differences or of percents that is cut off at 0 and 1."""
    values = np.random.default_rng(0).beta(0.5, 2, 12)
    unit, stretched = mean_figure(values), mean_figure(100 * values - 50, bounds=(-50, 50))
    assert ends(stretched) == pytest.approx([100 * end - 50 for end in ends(unit)])
    assert ends(mean_figure([-1.0, 1.0, 1.0], bounds=(-1, 1))) == pytest.approx(
        [2 * end - 1 for end in ends(mean_figure([0, 1, 1]))]
    )


def test_values_beyond_their_range_are_refused():
    """Catches a loss taken for a share, which would get an interval that does not hold it."""
    with pytest.raises(ValueError, match=r"from 0.5 to 2.5, but `bounds` is \(0.0, 1.0\)"):
        mean_figure([0.5, 2.5])
    with pytest.raises(ValueError, match="from -0.5 to 2"):
        mean_figure([-0.5, 2.0], bounds=LOSS)
    with pytest.raises(ValueError, match="no row"):
        mean_figure([])
    # Roundings of a classifier in float32 and of BLEU are no other range.
    assert mean_figure([1 + 1e-7, 1.0]).high == pytest.approx(1, abs=1e-6)


def test_open_ranges_have_students_interval():
    """Catches a normal quantile for few rows, a loss below 0, and an interval of rows that are all alike."""
    values = np.array([0.1, 0.2, 3.0])
    student = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    assert student[0] < 0
    assert ends(mean_figure(values, bounds=LOSS)) == pytest.approx([0.0, student[1]])
    assert ends(mean_figure(values, bounds=OPEN)) == pytest.approx(student)
    assert mean_figure([2.0] * 9, bounds=LOSS) == Figure(2.0, 9) and mean_figure([2.0], bounds=LOSS) == Figure(2.0, 1)


def test_percentiles_are_expanded_for_few_rows():
    """Catches plain percentiles, which of four rows hold two thirds of what they should, and no width."""
    draws = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    for num_rows in (4, 30):
        # Resampled means of n normal values have a standard deviation of s * sqrt((n - 1) / n) / sqrt(n).
        figure = interval_figure(0.0, num_rows, draws * math.sqrt((num_rows - 1) / num_rows) / math.sqrt(num_rows))
        margin = stats.t.ppf(0.975, num_rows - 1) / math.sqrt(num_rows)
        assert ends(figure) == pytest.approx([-margin, margin], rel=0.02)
    assert interval_figure(0.5, 100, draws, num_drawn=4) == Figure(0.5, 100, *ends(interval_figure(0.5, 4, draws)))
    assert interval_figure(0.5, 9, np.full(10, 0.5)) == Figure(0.5, 9)


def test_rows_of_one_name_are_weighed_alike():
    """Catches figures of the same rows that are drawn apart, and weights that depend on anything but the name."""
    values = np.random.default_rng(1).uniform(0, 1, 30)
    assert resampled_means(values, "forget") == pytest.approx(1 - resampled_means(1 - values, "forget"), abs=1e-12)
    assert not np.allclose(resampled_means(values, "forget"), resampled_means(values, "retain"))
    assert resampled_means(values, "forget", 1.0).mean() > resampled_means(values, "forget", 0.0).mean()
    assert mean_figure(values, "forget") == mean_figure(values, "forget")


DISTRIBUTIONS = {
    "shares of an answer": (lambda rng, n: rng.beta(0.3, 3, n), 0.3 / 3.3),
    "known by heart but for a few": (lambda rng, n: np.where(rng.random(n) < 0.02, rng.random(n) / 2, 1.0), 0.985),
    "uniform": (lambda rng, n: rng.random(n), 0.5),
}


@pytest.mark.parametrize("num_rows", [4, 10, 40])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_intervals_hold_the_mean_as_often_as_they_say(name, num_rows):
    """Catches percentiles of a bootstrap: of four rows known by heart but for a few they hold the mean in 7 of 100."""
    draw, mean = DISTRIBUTIONS[name]
    rng = np.random.default_rng(2)
    figures = [mean_figure(draw(rng, num_rows), "coverage") for _ in range(200)]
    held = np.mean([figure.low <= mean <= figure.high for figure in figures])
    # 95% of 200 are 190, give or take 3.1: so few as 181 come once in 400 times.
    assert held >= 0.905
    assert all(0 <= figure.low <= figure.value <= figure.high <= 1 for figure in figures)


def test_intervals_of_many_rows_are_no_wider_than_they_must_be():
    """Catches a bound for the worst case, as Hoeffding's, which of 1,000 rows like these is four times as wide."""
    values = np.random.default_rng(3).beta(2, 18, 1000)
    figure = mean_figure(values)
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(1000), rel=0.25)


def test_differences_of_two_models_have_a_range_too():
    """Catches models that differ in no row and are given a difference of exactly 0, and losses with a range of 1."""
    same = paired_comparison([0.5] * 10, [0.5] * 10)
    weight = 1 - 0.025 ** (1 / 10)
    assert [same.low, same.high] == pytest.approx([-weight, weight], abs=2 * DRAWN) and same.p_value == 1
    turned = paired_comparison([0, 0, 0], [1, 1, 1], bounds=UNIT)
    assert turned.difference == turned.high == 1 and turned.low == pytest.approx(2 * 0.025 ** (1 / 3) - 1)
    losses = paired_comparison([1.0, 2.0, 4.0], [3.0, 3.0, 9.0], bounds=LOSS)
    assert [losses.low, losses.high] == pytest.approx(stats.t.interval(0.95, 2, 8 / 3, stats.sem([2.0, 1.0, 5.0])))
