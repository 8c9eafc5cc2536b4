"""
Measures curvature once without interruption, and once through deaths by kill -9, each followed by the same command.

    python tests/curvature_worker.py FOLDER

FOLDER holds `model` and `retain.jsonl`. Every life is a fork of this process, which has imported everything but run
nothing. Prints the names of the passes and estimates at which each life died.
"""

import os
import signal
import sys
from pathlib import Path

from soul_trainer.curvature import resumable
from soul_trainer.curvature.command import main


# Of what is called, and the call that the life does not survive: 3 estimates a pass, 2 groups of 2 passes. A progress
# that is half written; an estimate of the second group, when the diagonal is done; the end of a pass; moments.
DEATHS = [("estimate_hessian", 2), ("write_tensors", 4), ("estimate_hessian", 5), ("write_tensors", 3)]
DEATHS += [("estimate_hessian", 2)]


def die_at(name: str, call: int) -> None:
    """Makes this process die in the middle of a call."""
    whole, left = getattr(resumable, name), [call]

    def cut(*args, **kwargs):
        left[0] -= 1
        if left[0]:
            return whole(*args, **kwargs)
        if name == "write_tensors":
            path = args[0]
            path.with_name(path.name + ".part").write_bytes(b"half")
        else:
            whole(*args, **kwargs)  # its sums are in memory, and lost
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(resumable, name, cut)


def lives(arguments: list[str], death: tuple[str, int] | None = None) -> int:
    """A life in a process of its own: how it ended, as `waitpid` says."""
    child = os.fork()
    if child == 0:
        if death:
            die_at(*death)
        status = main(arguments)
        sys.stderr.flush()
        os._exit(status)
    return os.waitpid(child, 0)[1]


def measure_all(folder: Path) -> None:
    """Both measurements."""
    shared = [f"--model={folder / 'model'}", f"--dataset={folder / 'retain.jsonl'}", "--device=cpu", "--rank=5"]
    shared += ["--estimate_size=6", "--layers_at_once=8", "--save_minutes=0"]
    assert lives([*shared, f"--output={folder / 'whole.safetensors'}"]) == 0
    arguments = [*shared, f"--output={folder / 'killed.safetensors'}"]
    progress = folder / "killed.safetensors.progress.safetensors"
    for death in DEATHS:
        assert lives(arguments, death) == signal.SIGKILL
        place = resumable.read_tensors(progress)[1]["progress"]
        print(f"killed in pass {place['pass']}, estimate {place['position']}", flush=True)
        assert not (folder / "killed.safetensors").exists()
    # Another measurement does not go on with it.
    assert lives([*arguments, "--rank=4"]) != 0
    assert lives(arguments) == 0


if __name__ == "__main__":
    measure_all(Path(sys.argv[1]))
