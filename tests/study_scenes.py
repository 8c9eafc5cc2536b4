"""Runs of a study whose figures are known beforehand."""

from soul_eval.study.records import Run


TARGET = {"forget": 1.0, "retain": 1.0, "held_out": 0.8, "general": 4.0}


def curve_of(*points, general=None):
    """A curve of `(forget, held_out)`, 10 steps apart; `general` by place."""
    return [
        {"step": 10 * place, "forget": forget, "retain": 1.0, "held_out": held, "general": (general or {}).get(place)}
        for place, (forget, held) in enumerate(points)
    ]


def run_of(kept=0.9, *, family="adamw", objective="npo", seed=0, stage="search", rate=1e-3, task="toy", **others):
    """A run that forgets everything in two even steps, on the way to `kept` of the held-out probability at 0.2."""
    # At forget 0.2 the run is 4/5 of the way to its end.
    end = 1 - (1 - kept) / 0.8
    curve = curve_of((1.0, 0.8), (0.5, 0.8 * (1 + end) / 2), (0.0, 0.8 * end))
    fields = {"setting": {"learning_rate": rate}, "target": TARGET, "curve": curve, **others}
    return Run(task, family, objective, fields.pop("setting"), seed, stage, **fields)


def level_runs(family="lion", **others):
    """A family whose search chooses rate 3 for 0.3, where it stops, and 1 for 0.2 and 0.1; final seeds 1 and 2."""
    short = curve_of((1.0, 0.8), (0.3, 0.8))
    others["family"] = family
    runs = [run_of(0.6, rate=1.0, **others), run_of(rate=3.0, curve=short, **others)]
    for seed in (1, 2):
        runs.append(run_of(0.5 + seed / 10, rate=1.0, seed=seed, stage="final", **others))
        curve = curve_of((1.0, 0.8), (0.3, 0.8 - 0.08 * seed))
        runs.append(run_of(rate=3.0, seed=seed, stage="final", curve=curve, **others))
    return runs
