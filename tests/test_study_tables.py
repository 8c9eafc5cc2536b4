"""A study's tables, and the picture's curves."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from study_scenes import curve_of, run_of

from soul_eval.study.drawing import COLOURS, band, curves_figure, draw_curves
from soul_eval.study.summary import summarise
from soul_eval.study.tables import MISSING, detail_table, kept_table, study_tables


LABELS = {"soul": "SOUL, as released", "adamw": "AdamW"}


def runs_of(objective="npo", task="toy"):
    """Three families; seeds 1 and 2; the last family stops short on one of them."""
    where = {"objective": objective, "task": task, "stage": "final"}
    runs = [run_of(0.5 + seed / 10, seed=seed, **where) for seed in (1, 2)]
    runs += [run_of(0.6 + seed / 5, seed=seed, family="soul", **where) for seed in (1, 2)]
    runs += [run_of(0.5, seed=1, family="lion", **where)]
    runs += [run_of(seed=2, family="lion", curve=curve_of((1.0, 0.8), (0.25, 0.8)), **where)]
    return runs


def test_a_cell_has_the_levels_and_the_paired_interval():
    """Catches levels in another order than the caption, and a difference that stands beside the wrong family."""
    table = kept_table(summarise(runs_of(), "adamw", compared_at=0.2), LABELS).split("\n")
    # Differences at 0.2 are 0.2 and 0.3; Student's quantile with one degree is 12.706, times 0.05 is 0.635.
    assert table[:5] == [
        "| family | npo |",
        "| --- | --- |",
        "| SOUL, as released | 0.91 / 0.90 / 0.89<br>+0.250 [-0.385, +0.885] |",
        "| AdamW | 0.69 / 0.65 / 0.61 |",
        # Not reached counts 0: 0.5 - 0.6 and 0 - 0.7 are -0.1 and -0.7.
        "| lion | 0.78 / 0.50 (1/2) / 0.44 (1/2)<br>-0.400 [-4.212, +3.412] |",
    ]
    assert "of 0.3 / 0.2 / 0.1:" in table[-1] and "2 seeds" in table[-1]
    assert "difference from AdamW by seed, at 0.2" in table[-1]


def test_a_single_seed_has_no_interval_and_no_run_no_figure():
    """Catches an interval made of one seed, and a cell of another objective where there is none."""
    runs = [
        run for run in [*runs_of(), *runs_of("ga")] if run.seed == 1 and (run.family, run.objective) != ("lion", "ga")
    ]
    table = kept_table(summarise(runs, "adamw"), objectives=["npo", "ga"]).split("\n")
    assert table[0] == "| family | npo | ga |"
    assert table[3] == f"| lion | 0.56 / 0.50 / 0.44<br>-0.100 | {MISSING} |"
    assert "1 seed." in table[-1] and "averaged over these levels" in table[-1]
    search = [run_of(family="lion")]
    assert f"| lion | {MISSING} |" in kept_table(summarise(search, "adamw"))


def test_levels_that_nobody_reaches_are_missing():
    """Catches an unreached level shown as 0, which would be a model that has lost everything."""
    run = run_of(stage="final", curve=curve_of((1.0, 0.8), (0.25, 0.8)))
    assert f"| adamw | 1.00 / {MISSING} / {MISSING} |" in kept_table(summarise([run], "adamw"))


def test_details_are_under_their_heads():
    """Catches a figure under another's head, and bytes called megabytes."""
    measured = {"forget_quality": 0.012, "seconds_per_step": 0.0815, "state_bytes": 2_500_000}
    measured |= {"relearned": {"forget": 0.61}, "rounded": {"forget": 0.125, "held_out": 0.3}}
    runs = [run_of(0.95), run_of(0.2, rate=2.0), run_of(0.8, seed=1, stage="final", **measured)]
    runs += [run_of(seed=2, stage="final", failed="diverged")]
    head, _, line = detail_table(summarise(runs, "adamw")).split("\n")
    cells = dict(zip(*([cell.strip() for cell in each.split("|")[1:-1]] for each in (head, line))))
    assert cells == {
        "family": "adamw",
        "setting": "learning_rate 0.001",
        "tried": "2",
        "land": "50%",
        "seeds": "2 (1 failed)",
        "hypervolume": f"{(0.5 * 0.875 + 0.5 * 0.75) / 2:.3f}",
        "forget quality": "0.012",
        "relearned": "0.61",
        "4 bits: forget": "+0.125",
        "4 bits: held-out": "-0.300",
        "s/step": "0.0815",
        "state, MB": "2.5",
    }


def test_every_task_and_objective_has_its_tables():
    """Catches tasks that share a table, and lines of a table that a bar in a name breaks."""
    runs = [*runs_of(), *runs_of("ga"), *runs_of("npo", "tofu")]
    rows = summarise(runs, "adamw")
    text = study_tables(rows, {"soul": "SOUL | released"})
    titles = [line for line in text.split("\n") if line.startswith("#")]
    assert titles == ["## tofu", "### tofu, npo", "## toy", "### toy, ga", "### toy, npo"]
    assert "| SOUL \\| released |" in text
    assert study_tables(rows[::-1], LABELS) == study_tables(rows, LABELS)
    for bad in (kept_table, detail_table):
        with pytest.raises(ValueError, match="`rows` must be of one task"):
            bad(rows)
    with pytest.raises(ValueError, match="one objective"):
        detail_table([row for row in rows if row.task == "toy" and row.family == "soul"])


def test_a_band_is_the_mean_least_and_most_at_each_level():
    """Catches curves averaged over steps and not over levels, and seeds that drop out unnoticed."""
    runs = [run for run in runs_of() if run.family == "lion"]
    found = band([*runs, run_of(seed=3, failed="diverged")], [0.6, 0.25, 0.2, 0.0])
    # The first loses 0.625 of what it forgets; the second nothing, down to 0.25.
    first = [1 - 0.625 * (1 - level) for level in (0.6, 0.25, 0.2, 0.0)]
    assert found.num_reached.tolist() == [2, 2, 1, 1] and found.num_seeds == 3 and not found.is_whole.any()
    np.testing.assert_allclose(found.low, first)
    np.testing.assert_allclose(found.high, [1, 1, *first[2:]])
    np.testing.assert_allclose(found.mean, [(1 + first[0]) / 2, (1 + first[1]) / 2, *first[2:]])
    nowhere = band([run_of(failed="diverged")], [0.5, 0.1])
    assert np.isnan(nowhere.mean).all() and nowhere.num_reached.tolist() == [0, 0]


def test_a_picture_reads_to_the_right_and_families_keep_their_colours(tmp_path):
    """Catches an axis that is not turned, a colour that moves when a family is missing, a heavy line over a gap."""
    runs = [*runs_of(), *(run for run in runs_of("ga") if run.family != "adamw")]
    figure = curves_figure(runs, LABELS)
    ga, npo = [axes for axes in figure.axes if axes.get_visible()]
    assert (ga.get_title(loc="left"), npo.get_title(loc="left")) == ("ga", "npo")
    assert npo.get_xlim() == (1.0, 0.0)
    colours = [
        {line.get_label(): to_hex(line.get_color()) for line in axes.lines if line.get_label()[0] != "_"}
        for axes in (ga, npo)
    ]
    assert colours[1] == {"soul": COLOURS[0].lower(), "adamw": COLOURS[1].lower(), "lion": COLOURS[2].lower()}
    assert colours[0] == {name: colour for name, colour in colours[1].items() if name != "adamw"}
    alone = curves_figure([run_of()], LABELS).axes[0].lines[0]
    assert to_hex(alone.get_color()) == colours[1]["adamw"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["SOUL, as released", "AdamW", "lion"]
    heavy = next(line for line in npo.lines if line.get_label() == "lion")
    drawn = heavy.get_xdata()[np.isfinite(heavy.get_ydata())]
    assert drawn.min() == pytest.approx(0.25, abs=1 / 200)
    assert npo.get_ylim() == (0, 1.05)
    better = run_of(curve=curve_of((1.0, 0.8), (0.1, 1.0)))
    assert curves_figure([better]).axes[0].get_ylim()[1] > 1.25
    draw_curves(runs, tmp_path / "curves.png", LABELS)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_is_of_one_task_and_of_one_run_a_seed():
    """Catches a mean over two settings, or over search and final runs, drawn as if it were over seeds."""
    with pytest.raises(ValueError, match="one task"):
        curves_figure([run_of(), run_of(task="tofu")])
    with pytest.raises(ValueError, match="one run for"):
        curves_figure([run_of(), run_of(rate=2.0)])
