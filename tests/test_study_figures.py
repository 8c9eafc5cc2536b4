"""Runs of a study, what they cost, and which setting costs least, on numbers worked out by hand."""

import json
import math
import random

import numpy as np
import pytest
from scipy import stats
from study_scenes import TARGET, curve_of, level_runs, run_of

from soul_eval.study.figures import (
    best_kept,
    best_moment,
    best_setting,
    chosen_runs,
    general_rise,
    hypervolume,
    lands,
    paired_difference,
    score,
    share_landing,
)
from soul_eval.study.records import read_runs


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
    "relearned": {"before": 0.2, "after": 0.6},
    "rounded": {"forget": 0.2, "held_out": 0.5},
    "depth": 0.21,
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
        {**LINE, "setting": {**LINE["setting"], "flag": 1}, "host": "a field of later days"},
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
    assert (runs[1].relearned, runs[1].depth) == ({"before": 0.2, "after": 0.6}, 0.21)


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
        ({"relearned": {"before": 0.2}}, "`after` of `relearned` must be a probability"),
        ({"relearned": {"before": 2, "after": 0.6}}, "`before` of `relearned` must be a probability"),
        ({"depth": "0.2"}, "`depth` must be a number"),
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


# Forgets and loses a great deal in the middle, and regains it by the end while forget rises, as with a decaying rate.
DIP = curve_of((1.0, 0.8), (0.1, 0.4), (0.4, 0.7), (0.3, 0.76))


def test_the_best_moment_counts_and_not_the_first():
    """Catches a run judged by a dip in its middle, crossings on the way up left out, and an end extrapolated."""
    # At 0.4 the end, at 0.3 the end too though the curve has been there at step 70/9.
    assert best_moment(DIP, 0.4) == best_moment(DIP, 0.3) == (30, 0.76)
    # On the way down 0.2 keeps 0.4 + 0.4/9; on the way up, a third of the way from 0.1 to 0.4, 0.4 + 0.3/3.
    assert best_moment(DIP, 0.2) == pytest.approx((10 + 10 / 3, 0.5))
    assert best_moment(DIP, 0.1) == (10, 0.4)
    assert best_moment(DIP, 0.09) is None and best_moment([], 0.3) is None
    assert best_moment(DIP, 1.0) == (0, 0.8)
    run = run_of(curve=DIP)
    assert best_kept(run, 0.2) == pytest.approx(0.5 / 0.8) == score(run, 0.2)
    assert best_kept(run, 0.09) is None and score(run, 0.09) == 0
    assert best_kept(run_of(curve=DIP, failed="diverged"), 0.2) is None


def test_going_below_a_level_may_keep_more_than_the_level():
    """Catches only crossings looked at: a lower point that keeps more is as good at every level above it."""
    curve = curve_of((1.0, 0.8), (0.5, 0.3), (0.05, 0.6))
    assert best_moment(curve, 0.3) == best_moment(curve, 0.05) == (20, 0.6)
    # Of equals, the earliest, whatever it has forgotten.
    assert best_moment(curve_of((1.0, 0.8), (0.2, 0.6), (0.1, 0.6), (0.15, 0.6)), 0.2) == (10, 0.6)
    assert best_moment(curve_of((0.2, 0.5), (0.2, 0.6), (0.2, 0.55)), 0.2) == (10, 0.6)


def test_the_best_moment_agrees_with_a_fine_grid():
    """Catches a maximum that lies inside a segment, on a crossing that is read off the wrong end of it."""
    rng = np.random.default_rng(1)
    curve = curve_of(*rng.uniform(0, 1, (9, 2)).tolist())
    steps = np.linspace(0, 80, 400_001)
    forget, held_out = (
        np.interp(steps, [entry["step"] for entry in curve], [entry[key] for entry in curve])
        for key in ("forget", "held_out")
    )
    for level in (0.1, 0.3, 0.5, 0.7, 0.9):
        found = best_moment(curve, level)
        low = forget <= level
        assert low.any() == (found is not None)
        if found is not None:
            # Points of the grid are 80/400,000 steps apart, and held-out moves by at most 0.1 a step.
            assert 0 <= found[1] - held_out[low].max() <= 0.1 * 80 / 400_000


def test_general_text_is_read_along_the_steps_at_the_best_moment():
    """Catches general text read at the first crossing, at the last step, or as missing where few steps have it."""
    run = run_of(curve=curve_of((1.0, 0.8), (0.1, 0.4), (0.4, 0.7), (0.3, 0.76), general={0: 4.1, 2: 4.5}))
    # Most is kept at step 40/3 of 20.
    assert general_rise(run, 0.2) == pytest.approx(0.1 + 0.4 * 2 / 3)
    # At 0.3 most is kept at step 30, after the last evaluation of general text.
    assert general_rise(run, 0.3) is None and general_rise(run, 0.05) is None
    assert general_rise(run_of(), 0.2) is None
    assert general_rise(run_of(curve=run.curve, target={**TARGET, "general": None}), 0.2) is None
    assert general_rise(run_of(curve=[], target={}, failed="out of memory"), 0.2) is None


def test_a_run_lands_by_what_it_keeps_at_its_best_moment():
    """Catches a share of 1 in place of the target's value, a dip that counts as a crash, a failed run that lands."""
    run = run_of(0.9, target={**TARGET, "held_out": 0.8})
    assert lands(run, 0.2, 0.899) and not lands(run, 0.2, 0.901)
    assert not lands(run_of(0.9, target={**TARGET, "held_out": 0.9}), 0.2, 0.899)
    assert lands(run_of(curve=DIP), 0.3, 0.94)
    assert not lands(run_of(0.9, curve=curve_of((1.0, 0.8), (0.21, 0.8))), 0.2, 0.0)
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


def test_the_best_setting_of_a_level_keeps_most_over_seeds():
    """Catches one setting for all levels, a choice by one seed, and runs that stop short left out of the mean."""
    short = curve_of((1.0, 0.8), (0.25, 0.8))
    runs = [
        run_of(0.7, rate=1.0, seed=0),
        run_of(0.7, rate=1.0, seed=1),
        run_of(0.9, rate=2.0, seed=0),
        run_of(0.3, rate=2.0, seed=1),
        # Nothing lost, but of the three levels only 0.3 is reached.
        run_of(rate=3.0, curve=short),
        run_of(0.99, rate=4.0, failed="diverged"),
        # 0.95 at 0.2, but only in one seed of three: 0.32 on the mean.
        run_of(0.95, rate=5.0, seed=0),
        *(run_of(rate=5.0, seed=seed, curve=short) for seed in (1, 2)),
    ]
    for seed in range(5):
        random.Random(seed).shuffle(runs)
        assert best_setting(runs, 0.2) == best_setting(runs, 0.1) == {"learning_rate": 1.0}
        assert best_setting(runs, 0.3) == {"learning_rate": 3.0}


def test_ties_go_to_the_larger_hypervolume_then_to_no_order():
    """Catches a winner among equals that depends on which line of the file came first."""
    wide = curve_of((1.0, 0.8), (0.3, 0.4), (0.2, 0.4), (0.1, 0.4), (0.0, 0.4))
    less = wide[:4]
    runs = [run_of(rate=1.0, curve=less), run_of(rate=2.0, curve=wide), run_of(rate=3.0, curve=less)]
    assert score(runs[0], 0.2) == score(runs[1], 0.2) == pytest.approx(0.5)
    assert best_setting(runs, 0.2) == best_setting(runs[::-1], 0.2) == {"learning_rate": 2.0}
    assert best_setting([runs[0], runs[2]], 0.2) == best_setting([runs[2], runs[0]], 0.2)


def test_a_search_is_of_one_family_and_has_no_final_runs():
    """Catches a setting that is chosen by the runs that are to judge it, or by another family's."""
    for other in (run_of(stage="final"), run_of(family="soul"), run_of(objective="ga"), run_of(task="tofu")):
        with pytest.raises(ValueError, match="`runs` must be"):
            best_setting([run_of(), other], 0.2)
    for choose in (share_landing, lambda runs: chosen_runs(runs, 0.2)):
        with pytest.raises(ValueError, match="`runs` must be of one family"):
            choose([])
    with pytest.raises(ValueError, match="`runs` must be of one family"):
        chosen_runs([run_of(stage="final"), run_of(stage="final", family="soul")], 0.2)


def test_final_runs_are_those_of_the_setting_for_the_level():
    """Catches finals of another level's setting, of the search's seeds, or in the order in which they were written."""
    runs = level_runs()
    for level, rate in ((0.3, 3.0), (0.2, 1.0), (0.1, 1.0)):
        setting, finals = chosen_runs(runs[::-1], level)
        assert setting == {"learning_rate": rate}
        assert [(run.seed, run.stage, run.setting["learning_rate"]) for run in finals] == [
            (1, "final", rate),
            (2, "final", rate),
        ]
    # Defaults that were not searched are the setting of each level.
    defaults = [run_of(stage="final", rate=7.0, seed=seed) for seed in (2, 1)]
    assert chosen_runs(defaults, 0.3) == chosen_runs(defaults, 0.1) == ({"learning_rate": 7.0}, defaults[::-1])
    assert chosen_runs([run_of(rate=7.0)], 0.2) == ({"learning_rate": 7.0}, [])


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
