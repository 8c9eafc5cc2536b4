"""
Runs the jobs of tests/test_engines.py under one engine, one after another in one launch, and saves what each came to.

    python -m torch.distributed.run --nproc_per_node=2 tests/engine_worker.py ENGINE FOLDER JOB ...
"""

import copy
import os
import sys
from pathlib import Path

import torch
from engine_jobs import DEEPSPEED, JOBS, Job
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig

from soul_eval.callback import EvalCallback
from soul_trainer.engines import find_soul
from soul_trainer.engines.fsdp import reshard


# Gloo's threads now and then abort a process that tears down the process groups of a trainer that it drops.
_KEPT = []
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def take_the_cpu_for_an_accelerator() -> None:
    """Accelerate offers DeepSpeed and FSDP where it finds an accelerator; both run on the CPU as well."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from transformers import training_args

    os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
    training_args.is_torch_bf16_gpu_available = lambda: True


def engine_arguments(engine: str, job: Job) -> dict:
    """The settings of the Trainer that choose an engine."""
    if engine in DEEPSPEED:
        return {"deepspeed": copy.deepcopy(DEEPSPEED[engine])}
    if engine == "fsdp2_accelerate":
        return {"fsdp": "full_shard", "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": job.layers}}
    return {} if torch.cuda.is_available() else {"use_cpu": True}


def whole(model: torch.nn.Module, optimizer, engine: str, what: str | None) -> dict[str, torch.Tensor]:
    """Weights, or with `what` a state of the optimizer, of trained parameters, whole on each process."""
    if engine in DEEPSPEED:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        zero = optimizer.optimizer
        if what and hasattr(zero, "_hp_optimizer_states_linked"):
            # DeepSpeed links states when the first parameter group has some, and so misses those of the others.
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    found = {}
    if what and not any(what in state for state in find_soul(optimizer).state.values()):
        return found  # the rule keeps no such state
    reshard(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = name.replace("_orig_mod.", "")
        if engine in DEEPSPEED:
            value = safe_get_full_optimizer_state(parameter, what) if what else safe_get_full_fp32_param(parameter)
        else:
            value = parameter if what is None else optimizer.state.get(parameter, {}).get(what)
        if value is not None:
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[name] = value.detach().float().cpu().clone()
    return found


class Watch(TrainerCallback):
    """Keeps the trained weights after each step."""

    def __init__(self, engine: str):
        self.engine, self.weights = engine, []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.weights.append(whole(model, optimizer, self.engine, None))


@torch.no_grad()
def logits_of(trainer) -> torch.Tensor:
    """What the model says of a row once training has ended, when a task vector is subtracted."""
    ids = torch.arange(1, 9, device=trainer.args.device)[None]
    trainer.model_wrapped.eval()
    return trainer.model_wrapped(input_ids=ids, use_cache=False).logits.float().cpu()


def train(engine: str, job: Job, folder: Path, output_dir: Path, resume: bool = False) -> dict:
    """One run; what it came to."""
    batch = {"per_device_train_batch_size": job.micro_batch // WORLD}
    settings = {**job.settings, **batch, **engine_arguments(engine, job), "output_dir": str(output_dir)}
    args = job.arguments(**settings)
    options = {"distributed_config": DistributedConfig(fsdp_size=WORLD)} if engine == "fsdp2" else {}
    model = AutoModelForCausalLM.from_pretrained(folder / "models" / job.model, dtype=job.dtype(engine), **options)
    job.prepare(model)
    trainer = job.trainer(model, args)
    watch = Watch(engine)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=f"{output_dir}/checkpoint-5" if resume else None)
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer") and engine not in DEEPSPEED:
        optimizer = optimizer.optimizer
    history = [
        {key: entry[key] for key in entry if isinstance(entry[key], float)} for entry in trainer.state.log_history
    ]
    result = {
        "weights": watch.weights,
        "hessian": whole(trainer.model, optimizer, engine, "hessian"),
        "exp_avg": whole(trainer.model, optimizer, engine, "exp_avg"),
        "history": [entry for entry in history if "loss" in entry or "curvature/clipped" in entry],
        "asked": [entry for entry in history if any(key.startswith("eval_tofu_") for key in entry)],
        "rows": [
            callback.rows for callback in trainer.callback_handler.callbacks if isinstance(callback, EvalCallback)
        ],
        "steps": trainer.state.global_step,
        "logits": logits_of(trainer),
    }
    _KEPT.append(trainer)
    return result


def main() -> None:
    engine, folder, *names = sys.argv[1:]
    folder = Path(folder)
    if engine in (*DEEPSPEED, "fsdp2_accelerate") and not torch.cuda.is_available():
        take_the_cpu_for_an_accelerator()
    for name in names:
        job, output_dir = JOBS[name], folder / f"{engine}-{name}"
        result = train(engine, job, folder, output_dir)
        if job.resumes:
            result["resumed"] = train(engine, job, folder, output_dir, resume=True)
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(result, f"{output_dir}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch's own threads now and then abort an orderly exit


if __name__ == "__main__":
    main()
