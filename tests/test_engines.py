"""
Every engine against one process: the same losses, weights and Hessian on the same global batches, by numbers.

Each engine runs all jobs of engine_jobs.py in one launch: 12 steps with 4 or 3 refreshes, clipping, an uneven last
batch whose repeated rows must not count, and processes whose rows have different lengths.
"""

import os

import pytest
from engine_jobs import DEEPSPEED, JOBS, differences, run
from engine_table import ENGINES, jobs_of
from engine_worker import train
from filelock import FileLock

from soul_trainer.consolidate import consolidate


# Float32 sums of gradients in another order differ by 1e-7, which 12 steps and a square amplify to 1e-6.
SAME_SUMS = 1e-5
# The inverse of Kronecker factors multiplies their 4e-7 by up to 1 / damping in directions of little curvature. A step
# in a trust region has nothing else: it starts 1.6e-6 apart and ends 9e-6 apart, its logits 1.4e-5.
SAME_INVERSE = 5e-5
# Bfloat16 keeps 8 bits: 4e-3 a rounding, of which each weight's gradient sees several.
SAME_BF16 = {"loss": 1e-2, "weights": 3e-2, "momentum": 1e-1, "hessian": 1e-1}


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory):
    """What an engine's jobs came to; each engine is launched once, whichever test process asks first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "engines"
    known = {}

    def of(engine: str) -> dict[str, dict]:
        if engine in DEEPSPEED:
            pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
        if engine not in known:
            with FileLock(f"{folder}-{engine}.lock"):
                try:
                    known[engine] = run(engine, jobs_of(engine), folder / engine)
                except AssertionError as error:
                    known[engine] = error
        if isinstance(known[engine], AssertionError):
            raise known[engine]
        return known[engine]

    return of


@pytest.mark.parametrize(
    ("engine", "job"),
    [
        pytest.param(engine, job, marks=pytest.mark.xdist_group(engine), id=f"{engine}-{job}")
        for engine in ENGINES
        for job in jobs_of(engine)
    ],
)
def test_an_engine_follows_one_process(outcomes, engine, job):
    """
    Would catch, in any engine: a refresh that is clipped, moves weights or the schedule, is averaged wrongly or misses
    a process; half a gradient lost in the step after it; losses divided by local counts; rows counted twice at an
    uneven end; a reference that moves; states of other parameters; and logs of one process's part alone.
    """
    found, expected = outcomes(engine)[job], outcomes("single")[job]
    assert len(found["weights"]) == len(expected["weights"]) == 12
    changes = JOBS[job].changes
    same = SAME_INVERSE if changes.get("rule") == "kronecker" else SAME_SUMS
    limits = SAME_BF16 if changes.get("bf16") else dict.fromkeys(SAME_BF16, same)
    measured = differences(found, expected)
    assert (found["logits"] - expected["logits"]).norm() <= limits["weights"] * expected["logits"].norm()
    assert not {name: value for name, value in measured.items() if value > limits[name]}
    for entry, wanted in zip(found["history"], expected["history"], strict=True):
        for name in set(entry) - {"curvature/refresh_seconds", "loss"}:
            # Sharded engines count the 3 coordinates of a parameter without gradients, of 2,863, once or twice.
            rel = max(limits["hessian"], 3e-3)
            assert entry[name] == pytest.approx(wanted[name], rel=rel, abs=limits["loss"]), name


@pytest.mark.parametrize("engine", [pytest.param(engine, marks=pytest.mark.xdist_group(engine)) for engine in ENGINES])
def test_a_suite_in_training_finds_what_one_process_finds(outcomes, engine):
    """
    Would catch rows that a process answers twice or not at all, a forward that waits for one that never comes, a model
    that is evaluated with the weights of the step before, and figures of one process's part alone.
    """
    found, expected = outcomes(engine)["asked"], outcomes("single")["asked"]
    steps = [0, 5, 10, 12]
    for outcome in (found, expected):
        assert len(outcome["asked"]) == len(steps)
        assert len(outcome["rows"][0]) == 9
    for entry, wanted in zip(found["asked"], expected["asked"], strict=True):
        assert len(wanted) > 6
        assert entry == pytest.approx(wanted, abs=SAME_SUMS)
    for row, wanted in zip(found["rows"][0], expected["rows"][0], strict=True):
        assert row["generation"] == wanted["generation"]
        assert row["answer_nll"] == pytest.approx(wanted["answer_nll"], abs=SAME_SUMS)


def test_a_suite_in_training_leaves_it_as_it_is(outcomes):
    """Would catch random numbers that an evaluation draws, modes and caches that it leaves behind."""
    asked, plain = (outcomes("single")[job]["weights"] for job in ("asked", "npo"))
    for one, other in zip(asked, plain, strict=True):
        assert all(one[name].equal(other[name]) for name in other)


@pytest.mark.parametrize(
    ("engine", "job"),
    [
        pytest.param(engine, job, marks=pytest.mark.xdist_group(engine), id=f"{engine}-{job}")
        for engine in ("single", *ENGINES)
        for job in jobs_of(engine)
        if JOBS[job].resumes
    ],
)
def test_a_resumed_run_ends_with_the_same_bits_under_every_engine(outcomes, engine, job):
    """
    Would catch a Hessian, a momentum, a schedule or an order of rows that a checkpoint loses, repeated rows that count
    where an epoch is resumed in its middle, and a reference taken from the checkpoint.
    """
    outcome = outcomes(engine)[job]
    resumed, whole = outcome["resumed"], outcome
    assert resumed["steps"] == whole["steps"] == 12 and len(resumed["weights"]) == 7
    assert resumed["logits"].equal(whole["logits"])
    for name, value in whole["hessian"].items():
        assert resumed["hessian"][name].equal(value), name
    for before, after in zip(whole["weights"][-7:], resumed["weights"], strict=True):
        assert all(after[name].equal(value) for name, value in before.items())


@pytest.mark.parametrize(
    ("engine", "job"),
    [
        pytest.param(engine, job, marks=pytest.mark.xdist_group(engine), id=f"{engine}-{job}")
        for engine in ENGINES
        if engine != "ddp"
        for job in ("resumed", "lora", "dora", "wagle", "two_directions", "kronecker")
        if job in jobs_of(engine)
    ],
)
def test_a_checkpoint_of_several_processes_goes_on_in_one(outcomes, tmp_path, engine, job):
    """Would catch weights, momentum or Hessian that are put together wrongly, or an optimizer in another order."""
    folder = outcomes(engine)[job]["folder"]
    consolidate(folder / "checkpoint-5", tmp_path / "checkpoint-5", trust_pickle=True)
    resumed = train("single", JOBS[job], folder.parent, tmp_path, resume=True)
    assert len(resumed["weights"]) == 7
    assert max(differences(resumed, outcomes("single")[job]).values()) < SAME_SUMS
