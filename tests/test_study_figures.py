"""Runs of a study, what they cost, and which setting costs least, on numbers worked out by hand."""

import json
import math
import random

import numpy as np
import pytest
from scipy import stats
from study_scenes import TARGET, curve_of, run_of

from soul_eval.study.figures import (
    best_setting,
    hypervolume,
    lands,
    mean_kept,
    paired_difference,
    share_landing,
    value_at,
)
from soul_eval.study.records import read_runs
from soul_eval.study.summary import summarise


LINE = {
    "task": "toy",
    "family": "adamw",
    "objective": "npo",
    "setting": {"learning_rate": 8e-4, "retain_weight": 2},
    "seed": 0,
    "stage": "final",
    "target": TARGET,
    "gold": None,
    "curve": curve_of((1.0, 0.8), (0.1, 0.6)),
    "forget_quality": 0.01,
    "seconds_per_step": 0.08,
    "state_bytes": 123,
    "relearned": {"forget": 0.6},
    "rounded": {"forget": 0.2, "held_out": 0.5},
    "failed": None,
}


def write(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def test_the_last_of_a_run_counts(tmp_path):
    """Catches a run that counts twice after it was repeated, and 2 and 2.0 taken for two settings."""
    older = write(tmp_path / "older.jsonl", LINE, {**LINE, "seed": 1})
    newer = write(
        tmp_path / "newer.jsonl",
        {**LINE, "setting": {"retain_weight": 2.0, "learning_rate": 8e-4}, "forget_quality": 0.5},
        {**LINE, "stage": "search"},
        {**LINE, "setting": {**LINE["setting"], "flag": True}},
        {**LINE, "setting": {**LINE["setting"], "flag": 1}},
    )
    runs = read_runs([older, newer])
    assert [(run.seed, run.stage, run.forget_quality) for run in runs[:3]] == [
        (0, "final", 0.5),
        (1, "final", 0.01),
        (0, "search", 0.01),
    ]
    assert len(runs) == 5
    assert read_runs([newer, older])[0].forget_quality == 0.01
    assert runs[1].curve == LINE["curve"] and runs[1].rounded == LINE["rounded"]


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"seed": "0"}, "`seed` must be of type int"),
        ({"seed": True}, "`seed` must be of type int"),
        ({"stage": "test"}, "`stage` must be one of"),
        ({"curve": []}, "`curve` is empty"),
        ({"curve": [{"step": 0, "forget": 1.0, "held_out": None}]}, "`held_out` of `curve at step 0`"),
        ({"curve": [*LINE["curve"], LINE["curve"][1]]}, "must rise"),
        ({"target": {"forget": 98, "held_out": 0.9}}, "`forget` of `target` must be a probability"),
        ({"target": {"forget": 0.9, "held_out": 0.0}}, "above 0"),
        ({"relearned": 0.6}, "`relearned` must be an object"),
        ({"seconds_per_step": "0.1"}, "`seconds_per_step` must be a number"),
        ({"forget_quality": math.nan}, "NaN is no number"),
    ],
)
def test_a_bad_line_is_named(tmp_path, changed, words):
    """Catches a broken run that becomes a figure, and a message that leaves the reader to search the files."""
    path = write(tmp_path / "runs.jsonl", LINE, {**LINE, **changed})
    with pytest.raises(ValueError, match="runs.jsonl, line 2: ") as caught:
        read_runs([path])
    assert words in str(caught.value)


def test_a_line_cut_off_is_named_and_a_failed_run_is_read(tmp_path):
    """Catches half a line that is skipped in silence, and a run without figures that stops the whole study."""
    path = write(tmp_path / "runs.jsonl", {**LINE, "curve": [], "target": {}, "failed": "diverged"})
    assert read_runs([path])[0].failed == "diverged"
    path.write_text("\n" + json.dumps(LINE)[:-9], encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: "):
        read_runs([path])
    with pytest.raises(ValueError, match="list of paths"):
        read_runs(path)


def test_values_are_read_at_the_first_moment():
    """Catches the last crossing taken for the first, interpolation the wrong way round, and an end extrapolated."""
    curve = curve_of((1.0, 0.8), (0.4, 0.7), (0.2, 0.3), (0.6, 0.1), (0.1, 0.0))
    assert value_at(curve, 0.3) == pytest.approx(0.5)
    assert value_at(curve, 0.25) == pytest.approx(0.4)
    # At an evaluation its own value, and the first of those that are that low.
    assert value_at(curve, 0.2) == pytest.approx(0.3)
    # 0.6 to 0.1 passes 0.15 after nine tenths.
    assert value_at(curve, 0.15) == pytest.approx(0.01)
    assert value_at(curve, 0.05) is None and value_at([], 0.3) is None
    assert value_at(curve, 1.0) == 0.8
    assert value_at(curve, 0.3, "retain") == 1.0
    assert value_at(curve, 0.3, relative_to=TARGET) == pytest.approx(0.5 / 0.8)


def test_a_figure_evaluated_seldom_is_read_along_the_steps():
    """Catches a general text that counts as missing, or as 0, because the evaluations around the level left it out."""
    curve = curve_of((1.0, 0.8), (0.4, 0.7), (0.2, 0.3), (0.1, 0.0), general={0: 4.0, 2: 4.4})
    # 0.3 is passed at step 15.
    assert value_at(curve, 0.3, "general") == pytest.approx(4.0 + 0.4 * 15 / 20)
    assert value_at(curve, 0.3, "general", relative_to={**TARGET, "general": None}) is None
    assert value_at(curve, 0.1, "general") is None


def test_a_run_lands_by_what_it_keeps_when_it_gets_there():
    """Catches a share of 1 in place of the target's value, and a failed run that lands."""
    run = run_of(0.9, target={**TARGET, "held_out": 0.8})
    assert lands(run, 0.2, 0.899) and not lands(run, 0.2, 0.901)
    assert not lands(run_of(0.9, target={**TARGET, "held_out": 0.9}), 0.2, 0.899)
    assert not lands(run_of(0.9, curve=curve_of((1.0, 0.8), (0.21, 0.8))), 0.2, 0.5)
    assert not lands(run_of(0.9, failed="out of memory"), 0.2, 0.1)


def test_hypervolume_is_the_area_that_is_dominated():
    """Catches overlaps counted twice, dominated points that add area, and points outside the square."""
    target = {"forget": 0.5, "held_out": 0.8}
    point = curve_of((0.25, 0.6))
    assert hypervolume(point, target) == pytest.approx(0.5 * 0.75)
    # The target itself has forgotten nothing.
    assert hypervolume(curve_of((0.5, 0.8)), target) == 0
    both = curve_of((0.25, 0.6), (0.0, 0.4))
    assert hypervolume(both, target) == pytest.approx(0.5 * 0.75 + 0.5 * 0.5)
    assert hypervolume([*both, *curve_of((0.3, 0.5))], target) == pytest.approx(hypervolume(both, target))
    assert hypervolume(curve_of((0.0, 0.9)), target) == 1
    assert hypervolume(curve_of((0.6, 0.9)), target) == 0


def test_hypervolume_agrees_with_counting_points():
    """Catches an area that depends on the order of the evaluations or misses a strip between two of them."""
    rng = np.random.default_rng(0)
    curve = curve_of(*rng.uniform(0, 1, (12, 2)).tolist())
    target = {"forget": 0.9, "held_out": 0.9}
    probes = rng.uniform(0, 1, (200_000, 2))
    dominated = np.zeros(len(probes), dtype=bool)
    for entry in curve:
        dominated |= (probes[:, 0] <= 1 - entry["forget"] / 0.9) & (probes[:, 1] <= entry["held_out"] / 0.9)
    area = hypervolume(curve, target)
    # Four standard errors of a share of so many.
    assert area == pytest.approx(dominated.mean(), abs=4 * 0.5 / math.sqrt(len(probes)))
    assert hypervolume(curve[::-1], target) == area
    # A curve along the diagonal, in the limit, covers half the square: n steps of it (n - 1) / 2n.
    diagonal = curve_of(*((1 - share, 1 - share) for share in np.linspace(0, 1, 101).tolist()))
    assert hypervolume(diagonal, {"forget": 1.0, "held_out": 1.0}) == pytest.approx(99 / 200)


def test_the_best_setting_keeps_most_over_levels_and_seeds():
    """Catches a choice by one level or one seed, runs that stop short left out of the mean, and ties by order."""
    short = curve_of((1.0, 0.8), (0.25, 0.8))
    runs = [
        run_of(0.7, rate=1.0, seed=0),
        run_of(0.7, rate=1.0, seed=1),
        run_of(0.9, rate=2.0, seed=0),
        run_of(0.3, rate=2.0, seed=1),
        # Nothing lost, but only 0.3 of the three levels is reached.
        run_of(rate=3.0, curve=short),
        run_of(0.99, rate=4.0, failed="diverged"),
    ]
    # At 0.2 it keeps 0.7, and at 0.3 and 0.1 as much more and less.
    assert mean_kept(runs[0]) == pytest.approx(0.7) and mean_kept(runs[4]) == pytest.approx(1 / 3)
    for seed in range(5):
        random.Random(seed).shuffle(runs)
        assert best_setting(runs) == {"learning_rate": 1.0}
        assert best_setting(runs, levels=(0.3,)) == {"learning_rate": 3.0}


def test_ties_go_to_the_larger_hypervolume_then_to_no_order():
    """Catches a winner among equals that depends on which line of the file came first."""
    wide = curve_of((1.0, 0.8), (0.3, 0.4), (0.2, 0.4), (0.1, 0.4), (0.0, 0.4))
    less = wide[:4]
    runs = [run_of(rate=1.0, curve=less), run_of(rate=2.0, curve=wide), run_of(rate=3.0, curve=less)]
    assert mean_kept(runs[0]) == mean_kept(runs[1]) == pytest.approx(0.5)
    assert best_setting(runs) == best_setting(runs[::-1]) == {"learning_rate": 2.0}
    assert best_setting([runs[0], runs[2]]) == best_setting([runs[2], runs[0]])


def test_a_search_is_of_one_family_and_has_no_final_runs():
    """Catches a setting that is chosen by the runs that are to judge it, or by another family's."""
    for other in (run_of(stage="final"), run_of(family="soul"), run_of(objective="ga"), run_of(task="tofu")):
        with pytest.raises(ValueError, match="`runs` must be"):
            best_setting([run_of(), other])
    with pytest.raises(ValueError, match="`runs` must be"):
        share_landing([])


def test_settings_land_and_not_runs():
    """Catches a setting that counts more because more seeds of it were run."""
    runs = [run_of(0.95, rate=1.0, seed=seed) for seed in range(3)]
    runs += [run_of(0.95, rate=2.0), run_of(0.5, rate=2.0, seed=1), run_of(0.5, rate=3.0), run_of(0.1, rate=4.0)]
    assert share_landing(runs) == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert share_landing(runs, keep=0.4) == pytest.approx(3 / 4)


def test_differences_are_paired_by_seed():
    """Catches seeds matched by place, the sign turned over, and the normal's interval for Student's."""
    first = {3: 0.5, 1: 0.1, 2: 0.2}
    second = {1: 0.2, 2: 0.4, 3: 0.8, 9: 5.0}
    found = paired_difference(first, second)
    # Differences 0.1, 0.2, 0.3: standard deviation 0.1, and Student's 0.975 quantile with 2 degrees is 4.3027.
    margin = 4.302652729911275 * 0.1 / math.sqrt(3)
    assert (found.mean, found.num_seeds) == (pytest.approx(0.2), 3)
    assert (found.low, found.high) == (pytest.approx(0.2 - margin), pytest.approx(0.2 + margin))
    expected = stats.ttest_rel([0.2, 0.4, 0.8], [0.1, 0.2, 0.5]).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    back = paired_difference(second, first)
    assert (back.mean, back.low) == (pytest.approx(-found.mean), pytest.approx(-found.high))
    single = paired_difference({1: 0.1}, second)
    assert (single.mean, single.low, single.high, single.num_seeds) == (pytest.approx(0.1), None, None, 1)
    with pytest.raises(ValueError, match="No seed"):
        paired_difference({1: 0.1}, {2: 0.1})


def study_runs():
    """Two families, two settings each in the search; three final seeds of the better."""
    runs = []
    for family, gain in (("adamw", 0.0), ("soul", 0.1)):
        runs += [run_of(0.5 + gain, family=family, rate=1.0), run_of(0.3, family=family, rate=2.0)]
        for seed, kept in ((1, 0.4), (2, 0.5), (3, 0.6)):
            extra = {"forget_quality": seed / 10, "seconds_per_step": seed * 1.0, "state_bytes": 8}
            extra |= {"relearned": {"forget": seed / 10}, "rounded": {"forget": 0.25, "held_out": 0.05}}
            kept += gain * seed
            runs.append(run_of(kept, family=family, seed=seed, stage="final", rate=1.0, **extra))
    return runs


def test_a_summary_is_worked_out_by_hand():
    """Catches figures of the search in the final ones, a mean for a median, and a difference that is not by seed."""
    adamw, soul = summarise(study_runs(), "adamw")
    assert (adamw.family, soul.family, soul.setting) == ("adamw", "soul", {"learning_rate": 1.0})
    assert (soul.num_settings, soul.landing, soul.seeds, soul.num_failed) == (2, 0.0, (1, 2, 3), 0)
    # At 0.3 the run is 7/8 of the way that it is at 0.2, at 0.1 it is 9/8.
    assert [kept.mean for kept in adamw.kept] == pytest.approx([1 - 0.5 * 7 / 8, 0.5, 1 - 0.5 * 9 / 8])
    assert [(kept.level, kept.num_reached) for kept in adamw.kept] == [(0.3, 3), (0.2, 3), (0.1, 3)]
    assert (adamw.forget_quality, adamw.relearned, adamw.seconds_per_step) == (0.2, pytest.approx(0.2), 2.0)
    assert adamw.state_bytes == 8 and adamw.rounded_forget == pytest.approx(0.25)
    # At their ends the three keep 0.25, 0.375 and 0.5 of 0.8.
    assert adamw.rounded_held_out == pytest.approx(0.05 - 0.8 * 0.375)
    # Half of the way and all of it: 0.5 of (1 + end) / 2, and 0.5 of end, with a mean end of 0.375.
    assert adamw.hypervolume == pytest.approx(0.5 * (1 + 0.375) / 2 + 0.5 * 0.375)
    assert adamw.difference is None
    margin = 4.302652729911275 * 0.1 / math.sqrt(3)
    for at in (None, 0.2):
        difference = summarise(study_runs(), "adamw", compared_at=at)[1].difference
        assert (difference.mean, difference.num_seeds) == (pytest.approx(0.2), 3)
        assert difference.high == pytest.approx(0.2 + margin)


def test_a_summary_does_not_depend_on_the_order_of_lines():
    """Catches seeds paired by place, and sums whose last digit depends on which run was written first."""
    runs = study_runs()
    expected = summarise(runs, "adamw")
    for seed in range(5):
        random.Random(seed).shuffle(runs)
        assert summarise(runs, "adamw") == expected


def test_a_summary_counts_what_fails():
    """Catches a family that gains by failing: seeds that stop short or crash must not vanish from its figures."""
    runs = [run for run in study_runs() if (run.family, run.stage) != ("soul", "final")]
    soul = {"family": "soul", "stage": "final", "rate": 1.0}
    runs += [
        run_of(0.8, seed=1, **soul),
        run_of(seed=2, curve=curve_of((1.0, 0.8), (0.25, 0.8)), **soul),
        run_of(seed=3, curve=[], target={}, failed="out of memory", **soul),
    ]
    row = summarise(runs, "adamw", compared_at=0.2)[1]
    assert (row.seeds, row.num_failed) == ((1, 2, 3), 1)
    assert [(kept.num_reached, kept.num_seeds) for kept in row.kept] == [(2, 3), (1, 3), (1, 3)]
    assert row.kept[1].mean == pytest.approx(0.8)
    # 0.8, 0 and 0 against 0.4, 0.5 and 0.6.
    assert row.difference.mean == pytest.approx(0.8 / 3 - 0.5) and row.difference.num_seeds == 3
    # Ends at 0.75; forgets three quarters for nothing; nothing.
    assert row.hypervolume == pytest.approx((0.5 * 0.875 + 0.5 * 0.75 + 0.75 + 0) / 3)


def test_a_study_under_way_has_rows():
    """Catches a table that can only be made once all runs are there, and a reference that must be among them."""
    search, final = (
        [run for run in study_runs() if run.stage == stage and run.family == family]
        for stage, family in (("search", "adamw"), ("final", "soul"))
    )
    adamw, soul = summarise(search + final, "adamw")
    assert (adamw.seeds, adamw.kept, adamw.hypervolume, adamw.num_settings) == ((), (), None, 2)
    assert (soul.num_settings, soul.landing, soul.setting) == (0, None, {"learning_rate": 1.0})
    assert adamw.difference is None and soul.difference is None
    assert summarise([], "adamw") == []


def test_final_runs_are_of_new_seeds_and_of_the_chosen_setting():
    """Catches figures on the very seeds that chose the setting, and final runs of a setting that was not chosen."""
    runs = study_runs()
    with pytest.raises(ValueError, match=r"seeds of their own, but the search had \[2\]"):
        summarise([*runs, run_of(0.1, family="soul", objective="ga", seed=2)], "adamw")
    summarise([*runs, run_of(0.1, family="soul", objective="ga", seed=2, task="other")], "adamw")
    with pytest.raises(ValueError, match="'soul' on 'npo' of 'toy' has no final run of the setting"):
        summarise([*runs, run_of(0.9, family="soul", rate=9.0)], "adamw")
    finals = [run_of(0.5, stage="final", rate=rate) for rate in (1.0, 2.0)]
    with pytest.raises(ValueError, match="final runs of 2 settings"):
        summarise(finals, "adamw")
