"""
Runs jobs of engine_jobs.py whose forget loss has a gradient of NaN from the third step on, on one process alone, and
writes down what each process was told and whether its weights are those before that step.

    python -m torch.distributed.run --nproc_per_node=2 tests/hostile/number_worker.py ENGINE FOLDER JOB ...
"""

import dataclasses
import json
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from engine_jobs import DEEPSPEED, JOBS, save_models
from engine_worker import Watch, engine_arguments, take_the_cpu_for_an_accelerator, whole
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig


_KEPT = []


class Spoil(torch.autograd.Function):
    """Changes no loss, and makes NaN of its gradient."""

    @staticmethod
    def forward(context, losses):
        return losses.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("nan")


def stopped(engine: str, name: str, folder: Path) -> dict:
    """A run that must stop before its third step."""
    job, output_dir = JOBS[name], folder / f"{engine}-{name}"
    settings = {**job.settings, **engine_arguments(engine, job), "output_dir": str(output_dir)}
    options = {"distributed_config": DistributedConfig(fsdp_size=2)} if engine == "fsdp2" else {}
    model = AutoModelForCausalLM.from_pretrained(folder / "models" / job.model, dtype=job.dtype(engine), **options)
    trainer = job.trainer(model, job.arguments(**settings))
    original = trainer.objectives.forget.function

    def spoilt(*arguments, **keywords):
        losses = original(*arguments, **keywords)
        is_here = trainer.state.global_step == 2 and trainer.args.process_index == 1
        return Spoil.apply(losses) if is_here else losses

    trainer.objectives = trainer.objectives._replace(
        forget=dataclasses.replace(trainer.objectives.forget, function=spoilt)
    )
    watch = Watch(engine)
    trainer.add_callback(watch)
    _KEPT.append(trainer)
    try:
        trainer.train()
    except FloatingPointError as error:
        now = whole(trainer.model, trainer.optimizer, engine, None)
        same = all(now[key].equal(value) for key, value in watch.weights[-1].items())
        return {"error": str(error), "same": same, "steps": len(watch.weights)}
    return {"error": None}


def main() -> None:
    engine, folder, *names = sys.argv[1:]
    if engine in (*DEEPSPEED, "fsdp2_accelerate") and not torch.cuda.is_available():
        take_the_cpu_for_an_accelerator()
    if not (Path(folder) / "models").exists():
        save_models(Path(folder) / "models")
    for name in names:
        found = stopped(engine, name, Path(folder))
        Path(folder, f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.barrier()
    os._exit(0)  # torch's own threads now and then abort an orderly exit


if __name__ == "__main__":
    main()
