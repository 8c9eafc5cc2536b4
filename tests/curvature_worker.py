"""
Measures curvature in processes of their own: through deaths by kill -9, each followed by the same command, and in two
processes together.

    python tests/curvature_worker.py FOLDER

FOLDER holds `model`, `retain.jsonl` and, for two processes, `more.jsonl`. Every process is a fork of this one, which
has imported everything but run nothing. Prints the passes and estimates at which lives died.
"""

import os
import signal
import socket
import sys
from pathlib import Path

from curvature_scenes import command

from soul_trainer.curvature import measure, resumable
from soul_trainer.curvature.command import main


# Of what is called, and the call that the life does not survive: 3 estimates a pass, 2 groups of 2 passes. The model
# runs in the first pass of a group and, in the second, for what the life did not see itself. An estimate of the first
# pass; a progress that is half written, of the second pass, after an estimate that ran and one that was kept; an
# estimate of the second group, when the diagonal is done; the end of a pass; moments of which nothing was kept.
DEATHS = [("estimate_hessian", 2), ("write_tensors", 6), ("estimate_hessian", 3), ("write_tensors", 3)]
DEATHS += [("estimate_hessian", 2)]
# What two processes may keep, in bytes. One of them that keeps nothing must not leave the other alone.
TOGETHER = {"two": (2**30, 2**30), "uneven": (2**30, 1)}
TOGETHER_FLAGS = ("--estimate_size=8", "--layers_at_once=8", "--save_minutes=0")


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


def count_bases(fails: bool) -> list[None]:
    """Something for each factor that this process decomposes from now on; or the last of them fails."""
    whole, found = measure.eigenbasis, []

    def counted(*args):
        found.append(None)
        if fails:
            raise FloatingPointError("A factor is not finite.")
        return whole(*args)

    measure.eigenbasis = counted
    return found


def forked(
    arguments: list[str],
    death: tuple[str, int] | None = None,
    limit: int | None = None,
    fails: bool = False,
    **variables,
) -> int:
    """Begins a life in a process of its own; its id."""
    child = os.fork()
    if child == 0:
        os.environ.update(variables)
        if death:
            die_at(*death)
        if limit is not None:
            measure.KEPT_BYTES = limit
        bases = count_bases(fails)
        status = main(arguments)
        if "RANK" in variables:
            print(f"process {variables['RANK']} decomposed {len(bases)}", flush=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return child


def lives(arguments: list[str], death: tuple[str, int] | None = None) -> int:
    """A life to its end: how it ended, as `waitpid` says."""
    return os.waitpid(forked(arguments, death), 0)[1]


def place_of(output: Path) -> str:
    """Where the progress of a measurement is."""
    place = resumable.read_tensors(Path(f"{output}.progress.safetensors"))[1]["progress"]
    assert not output.exists()
    return f"pass {place['pass']}, estimate {place['position']}"


def measure_through_deaths(folder: Path) -> None:
    """Without interruption, and with all of them."""
    flags = ("--rank=5", "--layers_at_once=8", "--save_minutes=0")
    assert lives(command(folder, folder / "whole.safetensors", *flags)) == 0
    output = folder / "killed.safetensors"
    arguments = command(folder, output, *flags)
    for death in DEATHS:
        assert lives(arguments, death) == signal.SIGKILL
        print(f"killed in {place_of(output)}", flush=True)
    # Another measurement does not go on with it.
    assert lives([*arguments, "--rank=4"]) != 0
    assert lives(arguments) == 0


def measure_together(folder: Path) -> None:
    """One process begins, and two end it. Of two others, one cannot decompose its factor."""
    for name, limits in TOGETHER.items():
        output = folder / f"{name}.safetensors"
        arguments = command(folder, output, *TOGETHER_FLAGS, dataset="more.jsonl")
        assert lives(arguments, ("estimate_hessian", 3)) == signal.SIGKILL
        print(f"alone until {place_of(output)}", flush=True)
        assert both(arguments, limits) == [0, 0]
    arguments = command(folder, folder / "fails.safetensors", *TOGETHER_FLAGS, dataset="more.jsonl")
    assert both(arguments, TOGETHER["two"], fails=True) == [1 << 8, 1 << 8]
    (folder / "fails.safetensors.progress.safetensors").unlink()


def both(arguments: list[str], limits: tuple[int, int], fails: bool = False) -> list[int]:
    """Two lives together, of which the second one may fail: how they ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    children = [
        forked(arguments, limit=limit, fails=fails and own["RANK"] == "1", **launch, **own)
        for limit, own in zip(limits, ranks)
    ]
    return [os.waitpid(child, 0)[1] for child in children]


if __name__ == "__main__":
    measure_through_deaths(Path(sys.argv[1]))
    measure_together(Path(sys.argv[1]))
