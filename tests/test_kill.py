"""Kill -9 at 20 moments: every resume ends with the same bits as the run that was never killed."""

from pathlib import Path

from safetensors.torch import load_file
from subprocesses import python, succeeded


def test_a_run_that_was_killed_twenty_times_ends_with_the_same_bits(tmp_path):
    """
    Would catch a resume from half a checkpoint, or from none because the newest is half; a refresh that is done twice
    or not at all after a resume; and random states, pairs or references that start over.
    """
    done = python(Path(__file__).parent / "kill_worker.py", tmp_path, folder=tmp_path)
    deaths = [line for line in succeeded(done).splitlines() if ", checkpoints " in line]
    assert len(deaths) == 20
    assert [line for line in deaths if not line.startswith("killed at ")] == []
    assert sum("random" in line for line in deaths) == 10 and sum("refresh" in line for line in deaths) == 4
    assert done.stderr.count("is skipped, because it was not written to its end") >= 5
    whole, killed = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "killed"))
    assert all(killed[name].equal(weight) for name, weight in whole.items())
