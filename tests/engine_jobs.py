"""The jobs that every engine must do alike, and the settings of the engines."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from scenes import NAMES, question_rows, scene_model, scene_tokenizer
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from soul_eval.callback import EvalCallback
from soul_trainer import UnlearnConfig, UnlearnTrainer
from soul_trainer.collator import UnlearnCollator
from soul_trainer.formats import prepare


ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
}
# No small parameter stays gathered: the toy models would be nothing but small parameters.
STAGE_3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
ON_CPU = {"offload_optimizer": {"device": "cpu"}}
DEEPSPEED = {
    "zero1": {**ZERO, "zero_optimization": {"stage": 1}},
    "zero2": {**ZERO, "zero_optimization": {"stage": 2}},
    "zero3": {**ZERO, "zero_optimization": STAGE_3},
    "zero2_offload": {**ZERO, "zero_optimization": {"stage": 2, **ON_CPU}},
    "zero3_offload": {**ZERO, "zero_optimization": {**STAGE_3, **ON_CPU}},
}


def forget_rows() -> list[dict]:
    """11 rows: no batch size divides them."""
    return question_rows(NAMES[:6])[:11]


def retain_rows() -> list[dict]:
    """12 rows."""
    return question_rows(NAMES[6:])


def asked_rows() -> list[dict]:
    """
    Rows as TOFU's: 7 to forget and 2 to retain, so that processes get uneven shares, of prompts with 3 to 5 answers.
    """
    rows = []
    for split, asked in (("forget", forget_rows()[:7]), ("retain", retain_rows()[:2])):
        wrong = [[each["answer"] for each in asked[: 1 + index % 3]] for index in range(len(asked))]
        rows += [
            {
                "split": split,
                "index": index,
                **row,
                "paraphrased_answer": row["answer"] + " .",
                "perturbed_answer": others,
            }
            for index, (row, others) in enumerate(zip(asked, wrong))
        ]
    return rows


@dataclass
class Job:
    """
    A run of 12 steps with at least 3 refreshes.

    `micro_batch` is over all processes. The last batch of an epoch is uneven. `changes` are settings of the run beside
    those that all share.
    """

    changes: dict = field(default_factory=dict)
    micro_batch: int = 4
    is_plain: bool = False
    model: str = "llama"
    prepare: Callable[[PreTrainedModel], object] = lambda model: None
    peft: Callable[[], object] = lambda: None
    layers: tuple = ("LlamaDecoderLayer",)
    resumes: bool = False
    is_asked: bool = False

    @property
    def settings(self) -> dict:
        shared = {
            "optim": "soul",
            "max_steps": 12,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "max_grad_norm": 1.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 0,
        }
        own = {"rule": "sophia", "rho": 10.0, "eps": 1e-3, "hessian_interval": 3, "hessian_batch_size": 5}
        own = {} if self.is_plain or "rule" in self.changes else own
        return {**shared, **own, **self.changes}

    def dtype(self, engine: str) -> torch.dtype:
        return torch.bfloat16 if self.changes.get("bf16") and engine in DEEPSPEED else torch.float32

    def arguments(self, **settings) -> TrainingArguments:
        return (TrainingArguments if self.is_plain else UnlearnConfig)(**settings)

    def trainer(self, model: PreTrainedModel, args: TrainingArguments) -> Trainer:
        tokenizer = scene_tokenizer()
        if not self.is_plain:
            trainer = UnlearnTrainer(model, args, forget_rows(), retain_rows(), tokenizer, peft_config=self.peft())
            if self.is_asked:
                trainer.add_callback(EvalCallback(trainer, rows=asked_rows(), max_new_tokens=9))
            return trainer
        # Even batches: at an uneven end, a plain Trainer on several processes trains on some rows twice.
        rows = prepare(retain_rows(), tokenizer).select_columns(["input_ids", "labels"])
        return Trainer(model, args, UnlearnCollator.for_tokenizer(tokenizer), rows)


def freeze_and_tie(model: PreTrainedModel) -> None:
    """A frozen layer, and a parameter that no loss reaches; the model's head is tied to its embeddings."""
    model.get_submodule("model.layers.0").requires_grad_(False)
    model.unused_bias = torch.nn.Parameter(torch.ones(3))


def lora(**settings) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)


SAVING = {"save_strategy": "steps", "save_steps": 5}
SHARPNESS_AWARE = {"sam_radius": 0.1}
MASKED = {"weight_mask": "wagle", "weight_mask_share": 0.5, "wagle_curvature": 1e-3}
TWO_DIRECTIONS = {"rule": "diagonal", "forget_loss": "ga", "hessian_batch_size": 5}
# DeepSpeed gives out no gradients between two steps.
NOT_UNDER_DEEPSPEED = ("sam", "sam_lora", "wagle", "wagle_lora")
JOBS = {
    "npo": Job(),
    "accumulated": Job({"gradient_accumulation_steps": 4, "forget_loss": "ga", "hessian_interval": 4}, micro_batch=2),
    "kl": Job({"forget_loss": "ga", "retain_loss": "kl"}),
    "plain": Job({"optim_args": "rho=10,eps=1e-3,hessian_interval=3"}, is_plain=True),
    "reentrant": Job({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "non_reentrant": Job({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    # With labels that are sampled, a rounding now and then draws another one, and the Hessian jumps.
    "bf16": Job({"bf16": True, "hessian_estimator": "empirical_fisher"}),
    "lora": Job({**SAVING, "forget_loss": "ga", "retain_loss": "kl"}, peft=lora, resumes=True),
    "dora": Job(SAVING, peft=lambda: lora(use_dora=True), resumes=True),
    "frozen": Job(
        {**SAVING, "forget_loss": "ga", "retain_loss": "kl", "eval_strategy": "steps", "eval_steps": 5},
        model="tied",
        prepare=freeze_and_tie,
        resumes=True,
    ),
    "asked": Job({"eval_strategy": "steps", "eval_steps": 5, "eval_on_start": True}, is_asked=True),
    "experts": Job(model="experts", layers=("MixtralDecoderLayer",)),
    "resumed": Job({**SAVING, "forget_loss": "ga", "retain_loss": "kl"}, resumes=True),
    "resumed_npo": Job({**SAVING, "gradient_accumulation_steps": 2}, micro_batch=2, resumes=True),
    "dpo": Job(
        {**SAVING, "forget_loss": "dpo", "retain_weight_schedule": "primal_dual", "retain_loss_limit": 2.0},
        resumes=True,
    ),
    "cached": Job({"forget_loss": "undial", "retain_loss": "kl", "reference": "cached_topk", "reference_topk": 9}),
    "rmu": Job({"forget_loss": "rmu", "retain_loss": "activations", "rmu_layer": 0, "rmu_coefficient": 3.0}),
    "negated": Job(
        {**SAVING, "forget_loss": "task_vector", "retain_loss": "none"},
        resumes=True,
    ),
    "sam": Job({**SHARPNESS_AWARE, "retain_loss": "kl", "gradient_accumulation_steps": 2}, micro_batch=2),
    "sam_lora": Job({**SHARPNESS_AWARE, **SAVING}, peft=lora, resumes=True),
    "wagle": Job({**SAVING, **MASKED, "weight_decay": 0.1}, resumes=True),
    "wagle_lora": Job({**SAVING, **MASKED, "gradient_accumulation_steps": 2}, micro_batch=2, peft=lora, resumes=True),
    "two_directions": Job({**TWO_DIRECTIONS, **SAVING, "gradient_accumulation_steps": 2}, micro_batch=2, resumes=True),
    "two_lora": Job({**TWO_DIRECTIONS, "rule": "none", "forget_loss": "dpo"}, peft=lora),
    "kronecker": Job({**TWO_DIRECTIONS, **SAVING, "rule": "kronecker"}, resumes=True),
    "trust_region": Job({**TWO_DIRECTIONS, "rule": "kronecker", "retain_loss": "curvature", "weight_decay": 0.0}),
    "pattern": Job({"trainable_parameters": "mlp|norm", "frozen_parameters": r"layers\.0\."}),
}


def world_size(engine: str) -> int:
    """Processes of an engine: two, or one on a machine with one GPU, which two cannot share."""
    return 1 if engine == "single" else min(2, torch.cuda.device_count() or 2)


def run(engine: str, jobs: tuple[str, ...], folder: Path) -> dict[str, dict]:
    """Runs jobs under an engine, in one launch, unless another process of the tests has; what each came to."""
    results = {job: folder / f"{engine}-{job}.pt" for job in jobs}
    if not all(path.exists() for path in results.values()):
        save_models(folder / "models")
        script = Path(__file__).parent / "engine_worker.py"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size(engine)}"]
        command = [sys.executable, *([] if engine == "single" else launcher), str(script), engine, str(folder), *jobs]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": device}
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-10000:]
    return {
        job: torch.load(path, weights_only=True) | {"folder": path.with_suffix("")} for job, path in results.items()
    }


def differences(found: dict, expected: dict) -> dict[str, float]:
    """
    The largest relative differences between two runs: of the loss over the trajectory, and in norm, of any tensor, of
    the weights after any step (those after a refresh among them; where a run was resumed, those since), the final
    momentum and the final Hessian.
    """
    losses = [[entry["loss"] for entry in result["history"] if "loss" in entry] for result in (found, expected)]
    assert len(losses[0]) == len(losses[1]) == found["steps"] == expected["steps"]
    largest_loss = max(abs(loss) for loss in losses[1])
    return {
        "loss": max(abs(a - b) for a, b in zip(*losses)) / largest_loss,
        "weights": max(_difference(a, b) for a, b in zip(found["weights"][::-1], expected["weights"][::-1])),
        "momentum": _difference(found["exp_avg"], expected["exp_avg"]),
        "hessian": _difference(found["hessian"], expected["hessian"]),
    }


def _difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    # ZeRO keeps a state, of zeros, for parameters that never had a gradient.
    assert set(expected) <= set(found) and not any(found[name].any() for name in set(found) - set(expected))
    distances = {
        name: (found[name] - value).norm() / value.norm().clamp_min(1e-30) for name, value in expected.items()
    }
    return max(map(float, distances.values()), default=0.0)


def save_models(folder: Path) -> None:
    """The models that the jobs name."""
    scene_model(num_hidden_layers=2).save_pretrained(folder / "llama")
    scene_model(num_hidden_layers=2, tie_word_embeddings=True).save_pretrained(folder / "tied")
    config = MixtralConfig(
        vocab_size=len(scene_tokenizer()),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MixtralForCausalLM(config).save_pretrained(folder / "experts")
