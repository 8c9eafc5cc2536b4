"""
Prints the table of docs/engines.md: how far each engine's runs end from those of one process.

    python tests/engine_table.py
"""

import tempfile
from pathlib import Path

from engine_jobs import DEEPSPEED, JOBS, NOT_UNDER_DEEPSPEED, differences, run


ENGINES = ("ddp", "fsdp2", "fsdp2_accelerate", *DEEPSPEED)
# DoRA asks for the norm of whole weights, which transformers' own sharding does not give it.
REFUSED = {("fsdp2", "dora"), *((engine, job) for engine in DEEPSPEED for job in NOT_UNDER_DEEPSPEED)}
# Where losses, references and matrices are concerned, stages 2 and 3 stand for the others.
LEFT_OUT = REFUSED | {
    (engine, job)
    for engine in ("zero1", "zero2_offload", "zero3_offload")
    for job in ("dpo", "cached", "rmu", "negated", "pattern", "two_lora", "kronecker", "trust_region")
}


def jobs_of(engine: str) -> tuple[str, ...]:
    """The jobs that an engine is held to."""
    return tuple(job for job in JOBS if (engine, job) not in LEFT_OUT)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = {engine: run(engine, jobs_of(engine), Path(scratch) / engine) for engine in ("single", *ENGINES)}
    print("| job | " + " | ".join(ENGINES) + " |")
    print("|---|" + "---|" * len(ENGINES))
    for job in JOBS:
        cells = []
        for engine in ENGINES:
            if job not in outcomes[engine]:
                cells.append("refused" if (engine, job) in REFUSED else "")
                continue
            found = differences(outcomes[engine][job], outcomes["single"][job])
            cells.append(f"{max(found['loss'], found['weights']):.0e} / {found['hessian']:.0e}")
        print(f"| {job} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
