"""The summary of a study: rows of families, and verdicts, on numbers worked out by hand."""

import math
import random

import pytest
from study_scenes import curve_of, level_runs, run_of

from soul_eval.study.summary import Kept, difference, summarise, verdicts


def study_runs():
    """Two families, two settings each in the search; three final seeds of the better."""
    runs = []
    for family, gain in (("adamw", 0.0), ("soul", 0.1)):
        runs += [run_of(0.5 + gain, family=family, rate=1.0), run_of(0.3, family=family, rate=2.0)]
        for seed, kept in ((1, 0.4), (2, 0.5), (3, 0.6)):
            extra = {"forget_quality": seed / 10, "seconds_per_step": seed * 1.0, "state_bytes": 8}
            extra |= {"relearned": {"before": 0.1, "after": 0.1 + seed / 10}}
            extra |= {"rounded": {"forget": 0.25, "held_out": 0.05}}
            kept += gain * seed
            runs.append(run_of(kept, family=family, seed=seed, stage="final", rate=1.0, **extra))
    return runs


def test_a_summary_is_worked_out_by_hand():
    """Catches figures of the search in the final ones, a mean for a median, and a difference that is not by seed."""
    adamw, soul = summarise(study_runs(), "adamw")
    assert (adamw.family, soul.family) == ("adamw", "soul")
    assert soul.settings == dict.fromkeys((0.3, 0.2, 0.1), {"learning_rate": 1.0})
    assert (soul.num_settings, soul.landing, soul.seeds, soul.num_failed) == (2, 0.0, (1, 2, 3), 0)
    # At 0.3 the run is 7/8 of the way that it is at 0.2, at 0.1 it is 9/8.
    assert [kept.mean for kept in adamw.kept.values()] == pytest.approx([1 - 0.5 * 7 / 8, 0.5, 1 - 0.5 * 9 / 8])
    assert {level: kept.num_reached for level, kept in adamw.kept.items()} == {0.3: 3, 0.2: 3, 0.1: 3}
    assert adamw.scores[0.2] == pytest.approx({1: 0.4, 2: 0.5, 3: 0.6})
    assert (adamw.forget_quality, adamw.relearned, adamw.seconds_per_step) == (0.2, pytest.approx(0.2), 2.0)
    assert adamw.state_bytes == 8 and adamw.rounded_forget == pytest.approx(0.25)
    # At their ends the three keep 0.25, 0.375 and 0.5 of 0.8.
    assert adamw.rounded_held_out == pytest.approx(0.05 - 0.8 * 0.375)
    # Half of the way and all of it: 0.5 of (1 + end) / 2, and 0.5 of end, with a mean end of 0.375.
    assert adamw.hypervolume == pytest.approx(0.5 * (1 + 0.375) / 2 + 0.5 * 0.375)
    assert (adamw.differences, adamw.mean_difference) == ({}, None)
    margin = 4.302652729911275 * 0.1 / math.sqrt(3)
    # Of what is lost, the levels have 7/8, 1 and 9/8, and so of what is lost less.
    for found, share in ((soul.differences[0.3], 7 / 8), (soul.differences[0.2], 1), (soul.mean_difference, 1)):
        assert (found.mean, found.num_seeds) == (pytest.approx(0.2 * share), 3)
        assert (found.low, found.high) == (
            pytest.approx((0.2 - margin) * share),
            pytest.approx((0.2 + margin) * share),
        )
    assert list(soul.differences) == [0.3, 0.2, 0.1]


def test_every_level_is_of_its_own_setting():
    """Catches one setting's runs at all levels, details of the wrong one, and a mean over levels of one setting."""
    finals = [run_of(0.5, seed=seed, stage="final") for seed in (1, 2)]
    adamw, lion = summarise([*finals, *level_runs()], "adamw")
    assert lion.settings == {0.3: {"learning_rate": 3.0}, 0.2: {"learning_rate": 1.0}, 0.1: {"learning_rate": 1.0}}
    # Seeds keep 0.9 and 0.8 at 0.3, and 0.6 and 0.7 at 0.2, so that they have lost 9/8 of 0.4 and 0.3 at 0.1.
    assert lion.scores[0.3] == pytest.approx({1: 0.9, 2: 0.8})
    assert lion.scores[0.2] == pytest.approx({1: 0.6, 2: 0.7})
    assert lion.scores[0.1] == pytest.approx({1: 1 - 0.4 * 9 / 8, 2: 1 - 0.3 * 9 / 8})
    assert lion.kept[0.3] == Kept(pytest.approx(0.85), 2, 2)
    # The reference keeps 1 - 0.5 * 7/8 = 0.5625, 0.5 and 0.4375.
    assert lion.differences[0.3].mean == pytest.approx(0.85 - 0.5625)
    by_seed = [(0.9 + 0.6 + 0.55) / 3 - 0.5, (0.8 + 0.7 + 0.6625) / 3 - 0.5]
    assert lion.mean_difference.mean == pytest.approx(sum(by_seed) / 2)
    # Ends at 0.5 and 0.625 of the target; the runs of rate 3 would have 0.7 of 0.9 and 0.8.
    assert lion.hypervolume == pytest.approx((0.5 * 0.75 + 0.5 * 0.5 + 0.5 * 0.8125 + 0.5 * 0.625) / 2)
    other = summarise([*finals, *level_runs()], "adamw", detail_level=0.3)[1]
    assert other.hypervolume == pytest.approx(0.7 * 0.85) and other.scores == lion.scores
    with pytest.raises(ValueError, match="`detail_level` must be one of the levels"):
        summarise(finals, "adamw", levels=(0.3, 0.1))


def test_a_seed_without_runs_at_a_level_is_out_of_the_mean_over_levels():
    """Catches a mean over fewer levels for some seeds, which compares another thing with the reference."""
    finals = [run_of(0.5, seed=seed, stage="final") for seed in (1, 2)]
    lion = [run for run in level_runs() if (run.seed, run.setting["learning_rate"]) != (2, 3.0)]
    found = summarise([*finals, *lion], "adamw")[1]
    assert {level: each.num_seeds for level, each in found.differences.items()} == {0.3: 1, 0.2: 2, 0.1: 2}
    assert found.mean_difference.num_seeds == 1
    assert found.mean_difference.mean == pytest.approx((0.9 + 0.6 + 0.55) / 3 - 0.5)


def test_a_summary_does_not_depend_on_the_order_of_lines():
    """Catches seeds paired by place, and sums whose last digit depends on which run was written first."""
    runs = [*study_runs(), *level_runs()]
    expected = summarise(runs, "adamw")
    for seed in range(5):
        random.Random(seed).shuffle(runs)
        assert summarise(runs, "adamw") == expected


def test_a_summary_counts_what_fails():
    """Catches a family that gains by failing: seeds that stop short or crash must not vanish from its figures."""
    runs = [run for run in study_runs() if (run.family, run.stage) != ("soul", "final")]
    soul = {"family": "soul", "stage": "final", "rate": 1.0}
    general = {0: 4.0, 2: 4.5}
    half = curve_of((1.0, 0.8), (0.5, 0.7), (0.0, 0.6), general=general)
    runs += [
        run_of(seed=1, curve=half, **soul),
        run_of(seed=2, curve=curve_of((1.0, 0.8), (0.25, 0.8), general={0: 4.0, 1: 9.0}), **soul),
        run_of(seed=3, curve=[], target={}, failed="out of memory", **soul),
    ]
    row = summarise(runs, "adamw")[1]
    assert (row.seeds, row.num_failed) == ((1, 2, 3), 1)
    assert [(kept.num_reached, kept.num_seeds) for kept in row.kept.values()] == [(2, 3), (1, 3), (1, 3)]
    # 0.2 is 4/5 of the way, and so of the rise of general text; the second run does not get there.
    assert row.kept[0.2].mean == pytest.approx(0.8) and row.general == pytest.approx(0.4)
    assert row.scores[0.2] == pytest.approx({1: 0.8, 2: 0, 3: 0})
    # 0.8, 0 and 0 against 0.4, 0.5 and 0.6.
    found = row.differences[0.2]
    assert found.mean == pytest.approx(0.8 / 3 - 0.5) and found.num_seeds == 3
    # Ends at 0.75; forgets three quarters for nothing; nothing.
    assert row.hypervolume == pytest.approx((0.5 * 0.875 + 0.5 * 0.75 + 0.75 + 0) / 3)


def test_a_study_under_way_has_rows():
    """Catches a table that can only be made once all runs are there, and a reference that must be among them."""
    search, final = (
        [run for run in study_runs() if run.stage == stage and run.family == family]
        for stage, family in (("search", "adamw"), ("final", "soul"))
    )
    adamw, soul = summarise(search + final, "adamw")
    assert (adamw.seeds, adamw.kept, adamw.hypervolume, adamw.num_settings) == ((), {}, None, 2)
    assert (soul.num_settings, soul.landing, soul.settings[0.1]) == (0, None, {"learning_rate": 1.0})
    assert (soul.differences, soul.mean_difference, adamw.differences) == ({}, None, {})
    assert verdicts([adamw, soul], "soul", "adamw") == {"npo": None}
    assert summarise([], "adamw") == []


def test_final_runs_are_of_new_seeds_and_of_the_chosen_setting():
    """Catches figures on the very seeds that chose the setting, and final runs of a setting that was not chosen."""
    runs = study_runs()
    with pytest.raises(ValueError, match=r"seeds of their own, but the search had \[2\]"):
        summarise([*runs, run_of(0.1, family="soul", objective="ga", seed=2)], "adamw")
    summarise([*runs, run_of(0.1, family="soul", objective="ga", seed=2, task="other")], "adamw")
    with pytest.raises(ValueError, match="'soul' on 'npo' of 'toy' has no final run of the setting"):
        summarise([*runs, run_of(0.9, family="soul", rate=9.0)], "adamw")
    # A setting that is the best at one level only must have final runs too.
    lion = [run for run in level_runs() if (run.stage, run.setting["learning_rate"]) != ("final", 3.0)]
    with pytest.raises(ValueError, match="'lion' on 'npo' of 'toy' has no final run .* chose for 0.3: "):
        summarise(lion, "adamw")
    finals = [run_of(0.5, stage="final", rate=rate) for rate in (1.0, 2.0)]
    with pytest.raises(ValueError, match="final runs of 2 settings"):
        summarise(finals, "adamw")


def test_verdicts_need_the_whole_interval_above_zero():
    """Catches a verdict by the mean alone, without seeds, of the wrong level, or with the families turned over."""
    runs = []
    # Gains of 0.2 and 0.21; of 0.2 and 0.4, whose interval is 0.3 -+ 12.706 * 0.1; of a single seed.
    for objective, gains in (("ga", (0.2, 0.21)), ("npo", (0.2, 0.4)), ("rmu", (0.2,))):
        for seed, gain in enumerate(gains, start=1):
            where = {"objective": objective, "seed": seed, "stage": "final"}
            runs += [run_of(0.5, **where), run_of(0.5 + gain, family="soul", **where)]
    runs.append(run_of(0.5, objective="alone", family="soul", stage="final"))
    # The reference of the rows is another than the verdict's.
    rows = summarise(runs, "lion")
    for level in (None, 0.2, 0.1):
        assert verdicts(rows, "soul", "adamw", level) == {"ga": True, "npo": False, "rmu": None}
        assert verdicts(rows, "adamw", "soul", level) == {"ga": False, "npo": False, "rmu": None}
    with pytest.raises(ValueError, match="`level` must be one of"):
        verdicts(rows, "soul", "adamw", 0.15)
    with pytest.raises(ValueError, match="both 'soul' and 'lion'"):
        verdicts(rows, "soul", "lion")
    with pytest.raises(ValueError, match="one task"):
        verdicts([*rows, *summarise([run_of(task="tofu")], "adamw")], "soul", "adamw")
    with pytest.raises(ValueError, match="one task and objective"):
        difference(rows[0], rows[-1])


def test_a_verdict_is_of_its_level():
    """Catches a verdict over the mean where a level was asked for: lion is better at 0.3 and lost below."""
    runs = [run_of(0.5 + seed / 1000, seed=seed, stage="final") for seed in (1, 2)]
    runs += [
        run_of(family="lion", seed=seed, stage="final", curve=curve_of((1.0, 0.8), (0.3, 0.8 - seed / 1000)))
        for seed in (1, 2)
    ]
    rows = summarise(runs, "adamw")
    assert [verdicts(rows, "lion", "adamw", level)["npo"] for level in (0.3, 0.2, None)] == [True, False, False]
    assert verdicts(rows, "adamw", "lion", 0.2) == {"npo": True}
