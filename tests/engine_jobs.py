"""The jobs that every engine must do alike, and the settings of the engines."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from scenes import NAMES, question_rows, scene_model, scene_tokenizer
from transformers import PreTrainedModel, Trainer, TrainingArguments

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
    deepspeed: dict = field(default_factory=dict)
    layers: tuple = ("LlamaDecoderLayer",)
    resumes: bool = False

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
        own = {} if self.is_plain else {"rho": 10.0, "eps": 1e-3, "hessian_interval": 3, "hessian_batch_size": 5}
        return {**shared, **own, **self.changes}

    def dtype(self, engine: str) -> torch.dtype:
        return torch.bfloat16 if self.changes.get("bf16") and engine in DEEPSPEED else torch.float32

    def arguments(self, **settings) -> TrainingArguments:
        return (TrainingArguments if self.is_plain else UnlearnConfig)(**settings)

    def trainer(self, model: PreTrainedModel, args: TrainingArguments) -> Trainer:
        tokenizer = scene_tokenizer()
        if not self.is_plain:
            return UnlearnTrainer(
                model, args, forget_rows(), retain_rows(), tokenizer, peft_config=self.peft()
            )
        # Even batches: at an uneven end, a plain Trainer on several processes trains on some rows twice.
        rows = prepare(retain_rows(), tokenizer).select_columns(["input_ids", "labels"])
        return Trainer(model, args, UnlearnCollator.for_tokenizer(tokenizer), rows)


JOBS = {
    "npo": Job(),
    "accumulated": Job({"gradient_accumulation_steps": 4, "forget_loss": "ga", "hessian_interval": 4}, micro_batch=2),
    "kl": Job({"forget_loss": "ga", "retain_loss": "kl"}),
    "plain": Job({"optim_args": "rho=10,eps=1e-3,hessian_interval=3"}, is_plain=True),
}


def save_models(folder: Path) -> None:
    """The models that the jobs name."""
    scene_model(num_hidden_layers=2).save_pretrained(folder / "llama")
