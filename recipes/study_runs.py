"""One run of the study: unlearns, asks on the way, and says what came of it."""

import copy
import math
import tempfile
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging

from soul_eval.attacks.quantization import rounded_weights
from soul_eval.attacks.relearning import RelearningArguments, relearned_weights
from soul_eval.metrics.forget_quality.formula import forget_quality
from soul_eval.metrics.truth_ratio.formula import truth_ratios
from soul_eval.scoring import answer_losses
from soul_recipes.study_families import FAMILIES, OBJECTIVES, REFERENCE_LAYERS, REFERENCE_WIDTH
from soul_recipes.study_tasks import Task
from soul_trainer import UnlearnConfig, UnlearnTrainer
from soul_trainer.formats import render


SPLITS = ("forget", "retain", "held_out")
# The depth at which what is relearned is compared.
DEPTH = 0.2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RELEARNING = {"relearn_steps": 20, "relearn_batch_size": 4}


class Curve(TrainerCallback):
    """Asks the model on the way and keeps its weights nearest to a depth."""

    def __init__(self, task: Task, tokenizer, every: int):
        self.task, self.tokenizer, self.every = task, tokenizer, every
        self.points, self.seconds, self.snapshot = [], 0.0, None
        self._distance = float("inf")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        start = time.perf_counter()
        point = {"step": state.global_step, **probabilities(self.task, model, self.tokenizer)}
        if not all(value is None or math.isfinite(value) for value in point.values()):
            raise FloatingPointError(f"The model's probabilities are not finite after step {state.global_step}.")
        self.points.append(point)
        distance = abs(self.points[-1]["forget"] - DEPTH)
        if distance < self._distance:
            self._distance, self.snapshot = distance, copy.deepcopy(model.state_dict())
        self.seconds += time.perf_counter() - start


@torch.inference_mode()
def probabilities(task: Task, model, tokenizer, splits=SPLITS) -> dict[str, float]:
    """The mean probability of the true answers of each split, and nats a token of general text."""
    was_training = model.training
    model.eval()
    found = {split: probability(model, tokenizer, task.asked(split)) for split in splits}
    found["general"] = None
    if task.general:
        examples = [render({"text": text}, tokenizer) for text in task.general]
        losses = answer_losses(model, tokenizer, examples, progress=False)
        found["general"] = round(float(sum(losses) / len(losses)), 5)
    model.train(was_training)
    return found


def probability(model, tokenizer, rows: list[dict]) -> float:
    """The mean probability of the true answers, by the geometric mean of their tokens."""
    examples = [render(row, tokenizer) for row in rows]
    losses = torch.tensor(answer_losses(model, tokenizer, examples, progress=False))
    return round(float((-losses).exp().mean()), 5)


def settings_of(run: dict, task: Task, width: int, num_layers: int = REFERENCE_LAYERS) -> dict:
    """The run's settings of [`UnlearnConfig`]. Learning rates follow the law of SOUL's default."""
    family = FAMILIES[run["family"]]
    settings = {**task.settings, **OBJECTIVES[run["objective"]], **family.fixed, **run["setting"]}
    if "learning_rate" in settings and not run["family"].startswith("forget_"):
        settings["learning_rate"] *= (
            task.rate_factor * REFERENCE_WIDTH / width * (REFERENCE_LAYERS / num_layers) ** 0.5
        )
    return settings


def measure(run: dict, task: Task) -> dict:
    """
    Args:
        run (`dict`): Of the plan.
        task ([`Task`]): That it names.

    Returns:
        `dict`: The run's line: see `soul_eval.study.records`.
    """
    logging.set_verbosity_error()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(task.target), AutoTokenizer.from_pretrained(task.target)
    model.to(DEVICE)
    settings = settings_of(run, task, model.config.hidden_size, model.config.num_hidden_layers)
    make_optimizer = FAMILIES[run["family"]].optimizer
    own = {} if make_optimizer is None else {"optimizers": (make_optimizer(model, settings), None)}
    target = {"step": 0, **probabilities(task, model, tokenizer)}
    with tempfile.TemporaryDirectory() as folder:
        args = UnlearnConfig(
            output_dir=folder,
            logging_steps=1000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=run["seed"],
            rmu_layer=1,
            **settings,
        )
        trainer = UnlearnTrainer(model, args, task.rows["forget"], task.rows["retain"], tokenizer, **own)
        trainer.pop_callback(PrinterCallback)
        batch = args.per_device_train_batch_size
        num_steps = args.max_steps if args.max_steps > 0 else len(task.rows["forget"]) // batch * args.num_train_epochs
        curve = Curve(task, tokenizer, max(1, round(num_steps / task.num_evaluations)))
        trainer.add_callback(curve)
        line = {**run, "target": target, "curve": [target, *curve.points], "failed": None}
        try:
            output = trainer.train()
        except FloatingPointError as error:
            return {**line, "curve": [target, *curve.points], "failed": str(error)[:200]}
    num_seconds = output.metrics["train_runtime"] - curve.seconds
    line |= {
        "curve": [target, *curve.points],
        "seconds_per_step": round(num_seconds / trainer.state.global_step, 4),
        "state_bytes": _state_bytes(trainer.optimizer),
    }
    if run["stage"] == "final":
        line |= _attacked(task, trainer.model, tokenizer, curve, run["seed"])
    return line


def _state_bytes(optimizer) -> int:
    states = [value for state in optimizer.state.values() for value in state.values()]
    matrices = getattr(getattr(optimizer, "optimizer", optimizer), "matrices", {})
    states += [tensor for matrix in matrices.values() for tensor in matrix.tensors().values()]
    return sum(state.numel() * state.element_size() for state in states if isinstance(state, torch.Tensor))


def _attacked(task: Task, model, tokenizer, curve: Curve, seed: int) -> dict:
    """Forget quality of the last weights, what rounding to 4 bits changes of them, and relearning near the depth."""
    found = {}
    if task.gold:
        gold = AutoModelForCausalLM.from_pretrained(task.gold).to(DEVICE)
        ratios = [forget_truth_ratios(task, each, tokenizer) for each in (model, gold)]
        found["forget_quality"] = float(f"{forget_quality(*ratios)[0]:.4g}")
    with rounded_weights(model, bits=4, group_size=64):
        rounded = probabilities(task, model, tokenizer, ("forget", "held_out"))
    model.load_state_dict(curve.snapshot)
    half = len(task.rows["forget"]) // 2
    learnt, others = task.rows["forget"][:half], task.rows["forget"][half:]
    before = probability(model.eval(), tokenizer, others)
    rate = 3e-4 * REFERENCE_WIDTH / model.config.hidden_size
    arguments = RelearningArguments(relearn_rows=half, relearn_learning_rate=rate, relearn_seed=seed, **RELEARNING)
    with relearned_weights(model, tokenizer, learnt, arguments):
        after = probability(model.eval(), tokenizer, others)
    return {**found, "rounded": rounded, "relearned": {"before": before, "after": after}}


@torch.inference_mode()
def forget_truth_ratios(task: Task, model, tokenizer) -> np.ndarray:
    """TOFU's truth ratio of each row to forget: false answers against the paraphrased true one."""
    rows, losses = task.rows["forget"], []
    for answers in ([[row["paraphrased_answer"]] for row in rows], [row["perturbed_answer"] for row in rows]):
        asked = [{"question": row["question"], "answer": each} for row, many in zip(rows, answers) for each in many]
        found = iter(answer_losses(model.eval(), tokenizer, [render(row, tokenizer) for row in asked], progress=False))
        losses.append([[next(found) for _ in many] for many in answers])
    return truth_ratios([paraphrased for (paraphrased,) in losses[0]], losses[1])
