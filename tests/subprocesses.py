"""Scripts in processes of their own, for the tests of the runner and of scripts that do not know us."""

import os
import subprocess
import sys
from pathlib import Path


RUNNER = ("-m", "soul_trainer")
# CPU processes under `accelerate launch` come from its multi-GPU launcher: with `--cpu` it starts one process, or MPI.
TWO_PROCESSES = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1")
TWO_PROCESSES += ("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0")


def python(*arguments: str | Path, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs `python ARGUMENT...` in `folder`: one thread, no network, the caches of datasets in that folder."""
    surroundings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **surroundings, **variables},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def succeeded(done: subprocess.CompletedProcess) -> str:
    """What a process that must have succeeded printed."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
