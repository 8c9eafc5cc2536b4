"""What the benchmark of steps says, on a model of a moment."""

import pytest
from scenes import FORGET, RETAIN

from soul_recipes.step_benchmark import ADAMW, BATCH, OPTIMIZERS, Scene, checks_table, curvature_table, step_table


# The table prints hundredths, and ratios are of seconds before they were rounded.
HALF_A_DIGIT = 0.005
TICK = 1e-6


@pytest.fixture(scope="module")
def scene() -> Scene:
    """A model of width 16 that has 8 rows to forget and 16 to retain."""
    return Scene(16, {"forget": FORGET, "retain": RETAIN})


def test_a_clock_counts_what_it_says(scene):
    """Catches curvature that counts as a step or is not counted, and an epoch of another length."""
    assert scene.epoch == len(RETAIN) // BATCH == 2
    plain, second_order = scene.unlearn(ADAMW, 3), scene.unlearn({"rule": "kronecker"}, 3)
    assert len(plain.steps) == len(second_order.steps) == 2
    assert 0 < sum(plain.steps) < plain.training
    assert 0 < plain.curvature < second_order.curvature
    assert len(scene.finetune(scene.epoch).steps) == scene.epoch - 1


def test_tables_have_a_row_for_each_cost(scene):
    """Catches a table without a row, and ratios that are upside down."""
    rows = [line.strip("| ").split(" | ") for line in step_table(scene, num_steps=2, num_turns=1).splitlines()[2:]]
    assert [row[0] for row in rows] == list(OPTIMIZERS) and rows[0][2] == "1.00"
    assert all(float(cell) > 0 for row in rows for cell in row[1:])
    rows = [line.strip("| ").split(" | ") for line in curvature_table(scene, num_turns=1).splitlines()[2:]]
    curvature, *epochs = [[float(cell) for cell in row[1:]] for row in rows]
    assert len(epochs) == 2 and curvature[1] == 1.0
    for seconds, ratio in epochs:
        lowest = (curvature[0] - HALF_A_DIGIT) / (seconds + HALF_A_DIGIT)
        highest = (curvature[0] + HALF_A_DIGIT) / max(seconds - HALF_A_DIGIT, TICK)
        assert lowest - HALF_A_DIGIT <= ratio <= highest + HALF_A_DIGIT


def test_checks_are_timed_where_they_are_made(scene):
    """Catches a check that moves to another name and counts as nothing, and one that is made twice."""
    rows = [line.strip("| ").split(" | ") for line in checks_table(scene, num_steps=2, num_turns=1).splitlines()[2:]]
    # The loss and the gradients, of a step or of each of its two directions.
    assert [row[1] for row in rows] == ["2", "4", "4"]
    assert all(0 < float(row[2]) and 0 < float(row[3].rstrip("%")) < 100 for row in rows)
