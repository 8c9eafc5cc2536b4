"""A study's tables, and the picture's curves."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from matplotlib.colors import to_hex
from study_scenes import curve_of, level_runs, run_of

from soul_eval.study.drawing import COLOURS, band, curves_figure, draw_curves
from soul_eval.study.summary import summarise
from soul_eval.study.tables import MISSING, detail_table, difference_table, kept_table, study_tables
from soul_recipes.study_families import FAMILIES, SMALLEST
from soul_recipes.study_report import write_study


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
    table = kept_table(summarise(runs_of(), "adamw"), LABELS, compared_at=0.2).split("\n")
    # Differences at 0.2 are 0.2 and 0.3; Student's quantile with one degree is 12.706, times 0.05 is 0.635.
    assert table[:5] == [
        "| family | npo |",
        "| --- | --- |",
        "| SOUL, as released | 0.91 / 0.90 / 0.89<br>+0.250 [-0.385, +0.885] |",
        "| AdamW | 0.69 / 0.65 / 0.61 |",
        # Not reached counts 0: 0.5 - 0.6 and 0 - 0.7 are -0.1 and -0.7.
        "| lion | 0.78 / 0.50 (1/2) / 0.44 (1/2)<br>-0.400 [-4.212, +3.412] |",
    ]
    assert "at most 0.3 / 0.2 / 0.1, each" in table[-1] and "2 seeds" in table[-1]
    assert "difference from AdamW by seed, at 0.2" in table[-1]
    with pytest.raises(ValueError, match="`compared_at` must be one of"):
        kept_table(summarise(runs_of(), "adamw"), compared_at=0.15)


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


def cells_of(table):
    """The last row of a table by its heads."""
    head, _, *_, line = (line for line in table.split("\n") if line.startswith("|"))
    return dict(zip(*([cell.strip() for cell in each.split("|")[1:-1]] for each in (head, line))))


def test_differences_are_under_their_levels():
    """Catches the mean's difference under a level, the reference against itself, and fewer seeds passed over."""
    runs = [run for run in [*runs_of(), *level_runs("lamb")] if run.family in ("adamw", "lamb")]
    runs = [run for run in runs if (run.seed, run.setting["learning_rate"]) != (2, 3.0)]
    table = difference_table(summarise(runs, "adamw"), LABELS)
    assert table.count("\n") == 2
    # The reference keeps 0.6 and 0.7 at 0.2, and so does the other; at 0.3 it keeps 0.9 against 1 - 0.4 * 7/8.
    same = "+0.000"  # two seeds that do not differ at all are no interval of no width
    assert cells_of(table) == {
        "less AdamW": "lamb",
        "at 0.3": "+0.250 (1 seed)",
        "at 0.2": same,
        "at 0.1": same,
        "mean": f"{0.25 / 3:+.3f} (1 seed)",
    }


def test_details_are_under_their_heads():
    """Catches a figure under another's head, a rise shown as a level, and bytes called megabytes."""
    measured = {"forget_quality": 0.012, "seconds_per_step": 0.0815, "state_bytes": 2_500_000}
    measured |= {"relearned": {"before": 0.21, "after": 0.82}, "rounded": {"forget": 0.125, "held_out": 0.3}}
    half = curve_of((1.0, 0.8), (0.5, 0.7), (0.0, 0.6), general={0: 4.0, 2: 4.5})
    runs = [run_of(0.95), run_of(0.2, rate=2.0), run_of(curve=half, seed=1, stage="final", **measured)]
    runs += [run_of(seed=2, stage="final", failed="diverged")]
    table = detail_table(summarise(runs, "adamw"))
    assert cells_of(table) == {
        "family": "adamw",
        "setting": "learning_rate 0.001",
        "tried": "2",
        "land": "50%",
        "seeds": "2 (1 failed)",
        "hypervolume": f"{(0.5 * 0.875 + 0.5 * 0.75) / 2:.3f}",
        "forget quality": "0.012",
        "relearned": "+0.61",
        "4 bits: forget": "+0.125",
        "4 bits: held-out": "-0.300",
        "general, nats": "+0.400",
        "s/step": "0.0815",
        "state, MB": "2.5",
    }
    assert table.split("\n")[-1].startswith("Of the setting for 0.2, ")


def test_settings_are_told_by_level_where_they_differ():
    """Catches one level's setting shown as if it were all levels', and an empty cell for what was not searched."""
    rows = summarise(level_runs(), "adamw")
    assert cells_of(detail_table(rows))["setting"] == "0.3: learning_rate 3<br>0.2, 0.1: learning_rate 1"
    assert cells_of(detail_table(summarise([run_of(stage="final", setting={})], "adamw")))["setting"] == "defaults"


def test_every_task_and_objective_has_its_tables():
    """Catches tasks that share a table, and lines of a table that a bar in a name breaks."""
    runs = [*runs_of(), *runs_of("ga"), *runs_of("npo", "tofu")]
    rows = summarise(runs, "adamw")
    text = study_tables(rows, {"soul": "SOUL | released"})
    titles = [line for line in text.split("\n") if line.startswith("#")]
    assert titles == ["## tofu", "### tofu, npo", "## toy", "### toy, ga", "### toy, npo"]
    assert "| SOUL \\| released |" in text
    assert study_tables(rows[::-1], LABELS) == study_tables(rows, LABELS)
    for bad in (kept_table, detail_table, difference_table):
        with pytest.raises(ValueError, match="`rows` must be of one task"):
            bad(rows)
    for bad in (detail_table, difference_table):
        with pytest.raises(ValueError, match="one objective"):
            bad([row for row in rows if row.task == "toy" and row.family == "soul"])


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
    # A dip counts for nothing once the curve is back: from 0.3 on the end counts, until the start has lost less.
    dip = run_of(curve=curve_of((1.0, 0.8), (0.1, 0.4), (0.4, 0.7), (0.3, 0.76)))
    np.testing.assert_allclose(band([dip], [0.955, 0.4, 0.3, 0.2]).mean * 0.8, [0.78, 0.76, 0.76, 0.5])
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
    alone = curves_figure([run_of(stage="final")], LABELS).axes[0].lines[0]
    assert to_hex(alone.get_color()) == colours[1]["adamw"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["SOUL, as released", "AdamW", "lion"]
    heavy = next(line for line in npo.lines if line.get_label() == "lion")
    drawn = heavy.get_xdata()[np.isfinite(heavy.get_ydata())]
    assert drawn.min() == pytest.approx(0.25, abs=1 / 200)
    assert npo.get_ylim() == (0, 1.05)
    better = run_of(curve=curve_of((1.0, 0.8), (0.1, 1.0)), stage="final")
    assert curves_figure([better]).axes[0].get_ylim()[1] > 1.25
    draw_curves(runs, tmp_path / "curves.png", LABELS)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def drawn(figure, panel=0):
    """Lines by family."""
    return {line.get_label(): line for line in figure.axes[panel].lines if line.get_label()[0] != "_"}


def test_a_picture_is_of_the_final_runs_of_the_setting_for_a_level():
    """Catches the search drawn among the final runs, and a line over the seeds of two settings."""
    for level, lowest, kept in ((0.2, 0.0, (1 - 0.4 / 0.8 + 1 - 0.3 / 0.8) / 2), (0.3, 0.3, 0.85)):
        line = drawn(curves_figure(level_runs(), level=level))["lion"]
        reached = np.isfinite(line.get_ydata())
        # The grid has 200 steps, over which the line loses at most as much.
        assert line.get_xdata()[reached].min() == pytest.approx(lowest, abs=1.01 / 200)
        assert line.get_ydata()[reached][-1] == pytest.approx(kept, abs=1.01 / 200)
    # A family without final runs has no line and no place in the legend.
    figure = curves_figure([*level_runs(), run_of(family="soul")], LABELS)
    assert set(drawn(figure)) == {"lion"} and len(figure.legends[0].get_texts()) == 1


def test_the_grid_starts_at_the_target():
    """Catches an axis from 1 where models knew less, or from the first evaluation, which may be after steps."""
    run = run_of(stage="final", target={"forget": 0.9, "held_out": 0.8}, curve=curve_of((0.7, 0.8), (0.1, 0.8)))
    assert curves_figure([run]).axes[0].get_xlim() == (0.9, 0.0)


def test_families_that_are_drawn_keep_their_colours():
    """Catches colours that change with the choice of families, and families that were not chosen in the legend."""
    runs = [*runs_of(), *level_runs("lamb")]
    everyone = drawn(curves_figure(runs, LABELS))
    figure = curves_figure(runs, LABELS, families=["lion", "adamw"])
    assert set(everyone) == {"soul", "adamw", "lamb", "lion"} and set(drawn(figure)) == {"adamw", "lion"}
    for family, line in drawn(figure).items():
        assert line.get_color() == everyone[family].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["AdamW", "lion"]


def test_a_picture_is_of_one_task_and_of_one_run_a_seed():
    """Catches a mean over two settings, or over a run that is there twice, drawn as if it were over seeds."""
    final = run_of(stage="final")
    with pytest.raises(ValueError, match="one task"):
        curves_figure([final, run_of(stage="final", task="tofu")])
    with pytest.raises(ValueError, match="one run for"):
        curves_figure([final, final])
    with pytest.raises(ValueError, match="final runs of 2 settings"):
        curves_figure([final, run_of(stage="final", rate=2.0)])
    for bad in ([], [run_of()]):
        with pytest.raises(ValueError, match="must have final runs"):
            curves_figure(bad)


def test_a_task_without_a_search_is_reported_by_the_smallest_ones(tmp_path):
    """Would catch a searched family that is missing from a larger model's table, whose setting another task found."""
    searched = [run_of(0.6, rate=1.0, task=SMALLEST), run_of(0.5, rate=3.0, task=SMALLEST)]
    finals = [run_of(0.6, rate=1.0, task="larger", seed=seed, stage="final") for seed in (1, 2)]
    finals += [run_of(0.7, family="soul", setting={}, task="larger", seed=seed, stage="final") for seed in (1, 2)]
    lines = [json.dumps(asdict(run)) for run in (*searched, *finals)]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_study(tmp_path)
    tables = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "## larger, npo" in tables
    assert FAMILIES["adamw"].label in tables and FAMILIES["soul"].label in tables
