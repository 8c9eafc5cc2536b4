"""`UnlearnTrainer`: the Hugging Face Trainer with a forget and a retain objective in one forward."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from . import engines
from .batch import ForgetRetainBatch
from .callbacks import InterruptCallback
from .collator import UnlearnCollator
from .config import CURVATURE, UnlearnConfig
from .formats import longest_row, prepare
from .halves import count_answers
from .inputs import check_ids, check_tokenizer
from .objectives import Objectives, l1_norm
from .pairing import make_pairs, warn_of_common_rows
from .reference import Reference, forward_halves, needs_model
from .reference_rows import RowForward, keep_with_rows
from .runs import RunMixin
from .steps import FoldCallback, StepMixin
from .weighting import RETAIN_WEIGHT_SCHEDULES


class UnlearnTrainer(StepMixin, RunMixin, Trainer):
    """
    Makes a causal language model forget some rows and keep others.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model that must forget.
        args ([`UnlearnConfig`] or [`~transformers.TrainingArguments`], *optional*):
            Settings. Plain `TrainingArguments` get the defaults of what unlearning adds.
        forget_dataset ([`~datasets.Dataset`] or `list[dict]`): Rows to forget, in any format of `formats.py`.
        retain_dataset ([`~datasets.Dataset`] or `list[dict]`):
            Rows whose knowledge is to be kept; none with `retain_loss="curvature"` and a file of `curvature`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Rows for `evaluate()`, which gives their loss; by default the forget and the retain rows.
        peft_config ([`~peft.PeftConfig`], *optional*): Trains an adapter of this kind instead of the whole model.
        model_init (`Callable`, *optional*):
            Makes the model that must forget, in the place of `model`: one for each training, and so for each trial of
            `hyperparameter_search`, whose settings are those that `UnlearnConfig` has.
        **kwargs: Further arguments of [`~transformers.Trainer`]: `callbacks`, `compute_metrics`, ...

    Raises:
        ValueError: If a dataset is empty or a row unusable (it is named), a length is over the model's, or the engine
            is not supported.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | None = None,
        args: UnlearnConfig | TrainingArguments | None = None,
        forget_dataset: Dataset | list[dict] | None = None,
        retain_dataset: Dataset | list[dict] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        peft_config: PeftConfig | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        **kwargs,
    ):
        if (model is None) == (model_init is None):
            raise ValueError("UnlearnTrainer needs `model` or `model_init`, one of them.")
        args = UnlearnConfig.from_training_arguments(args or UnlearnConfig())
        # A file knows how the loss on what is to be kept is curved, and no step reads the rows.
        has_file = args.retain_loss == CURVATURE and args.curvature is not None
        if forget_dataset is None or processing_class is None or (retain_dataset is None and not has_file):
            raise ValueError("UnlearnTrainer needs `forget_dataset`, `retain_dataset` and `processing_class`.")
        check_tokenizer(processing_class)
        self.args, self.peft_config, self.model_init = args, peft_config, model_init
        self.reference: Reference | None = None
        model = self.made_ready(model) if model_init is None else self.call_model_init()
        max_length = longest_row(args.max_length, model, processing_class)
        self.objectives = Objectives.named(args.forget_loss, args.retain_loss)
        self._tokenize = partial(
            prepare, tokenizer=processing_class, max_length=max_length, prompt_template=args.prompt_template
        )
        forget = self._tokenize(forget_dataset, name="forget_dataset")
        check_ids(forget, model, "forget_dataset")
        retain = forget.select(()) if retain_dataset is None else self._tokenize(retain_dataset, name="retain_dataset")
        check_ids(retain, model, "retain_dataset")
        warn_of_common_rows(forget, retain)
        with self.resume_allowed(model, args):
            super().__init__(
                model=model,
                args=args,
                data_collator=UnlearnCollator.for_tokenizer(processing_class),
                train_dataset=make_pairs(forget, retain, self.objectives, args, processing_class, max_length),
                eval_dataset=self._tokenized(eval_dataset)
                or {"forget": forget, **({"retain": retain} if len(retain) else {})},
                processing_class=processing_class,
                **kwargs,
            )
        self.model_init = model_init  # the Trainer has not been told, and has made no second model
        # The loss below is already divided by the counts of the whole accumulated batch.
        self.loss_is_scaled_for_ga = True
        self.engine = engines.make_engine(self.accelerator, self.model)
        self.fill_settings()
        engines.check_trainer(self, self.engine)
        self.step_losses: dict[str, torch.Tensor | float] = defaultdict(float)
        self._component_sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self.clear_losses()
        self._interrupt = InterruptCallback(self.engine)
        self.add_callback(self._interrupt)
        self.folds = FoldCallback()
        self.add_callback(self.folds)
        self.renew_callbacks()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """
        Unlearns. See [`~transformers.Trainer.train`].

        Raises:
            ValueError: If `output_dir` holds a finished run, without `overwrite` or `resume_from_checkpoint`, or the
                checkpoint is not whole or of another run.
            FloatingPointError: If a loss is not finite; the state before the step is saved and the rows are named.
            KeyboardInterrupt: After an interrupt, once its checkpoint is written.
        """
        checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        try:
            output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            self._interrupt.restore()
        if self._interrupt.agree():
            # The signal may have come after the last step's turn to save, as in a callback that evaluates.
            if not Path(f"{self.run_folder}/checkpoint-{self.state.global_step}").exists():
                engines.save_checkpoint(self)
            raise KeyboardInterrupt("Training was interrupted; resume_from_checkpoint continues it.")
        self.end_run(output.metrics)
        return output

    def get_batch_samples(
        self, epoch_iterator, num_batches: int, device: torch.device
    ) -> tuple[list[ForgetRetainBatch], torch.Tensor]:
        """
        Returns:
            `tuple[list[ForgetRetainBatch], torch.Tensor]`: The micro-batches of a step, and the counts that their
            losses are divided by, over all processes: an int64 tensor `[[forget tokens, forget rows], [retain tokens,
            retain rows]]`.
        """
        self._steps_since_log += 1
        self.step_losses.clear()
        batches = list(islice(epoch_iterator, num_batches))
        counts = torch.zeros(2, 2, dtype=torch.long, device=device)
        for batch in batches:
            is_last = batch is batches[-1] and not self.args.dataloader_drop_last
            is_repeated = self.engine.is_repeated(batch, is_last, num_pairs=len(self.train_dataset))
            counts += count_answers(batch, is_repeated).to(device)
        counts = self.engine.sum(counts)
        self.begin_step(batches, counts)
        return batches, counts

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: ForgetRetainBatch | dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The weighted sum of the forget and the retain loss; the loss of answer tokens for batches without `is_forget`.

        Each is a sum over its rows divided by `num_items_in_batch`, the counts of [`get_batch_samples`], so that the
        micro-batches of a step and the processes add up to the loss of one large batch.
        """
        if "is_forget" not in inputs:
            return self.evaluated_loss(model, inputs, return_outputs)
        halves, outputs = forward_halves(model, inputs, self.objectives, self.args, self.reference)
        # Directions are weighted where they are added, whatever the size of a gradient.
        weights = (1.0, 1.0) if self.has_two_directions else (self.forget_weight, self.current_retain_weight())
        loss = outputs.logits.new_zeros((), dtype=torch.float32)
        bad_rows = []
        for name, objective, weight, half, counts in (
            ("forget", self.objectives.forget, weights[0], halves[0], num_items_in_batch[0]),
            ("retain", self.objectives.retain, weights[1], halves[1], num_items_in_batch[1]),
        ):
            if objective is None or not len(half.rows):
                continue
            row_losses = objective(half, self.args)
            bad_rows += [f"row {row} of `{name}_dataset`" for row in half.rows[~row_losses.isfinite()].tolist()]
            component = row_losses.sum() / counts[1 if objective.per == "sequence" else 0]
            loss = loss + weight * component
            self.step_losses[f"{name}_loss"] += component.detach()
            self._component_sums[f"{name}_loss"] += component.detach()
        if self.args.l1_weight and (len(halves[1].rows) or not self.has_two_directions):
            # Once a step, whatever the number of micro-batches and processes; weights are to be kept small.
            share = self.current_gradient_accumulation_steps * self.engine.num_processes
            loss = loss + self.args.l1_weight * l1_norm(model.parameters()) / share
        engines.stop_at_loss(self, self.engine, bad_rows, loss)
        loss = loss * self.engine.loss_factor
        return (loss, outputs) if return_outputs else loss

    def current_retain_weight(self) -> float:
        """The weight of the retain loss, or of its direction, at this point of its schedule."""
        num_epochs = self.state.num_train_epochs if self.args.max_steps > 0 else self.args.num_train_epochs
        schedule = RETAIN_WEIGHT_SCHEDULES[self.args.retain_weight_schedule]
        return self.retain_weight * schedule(self.state.epoch or 0.0, num_epochs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds `forget_loss` and `retain_loss`, the means since the last log, to the training loss."""
        if "loss" in logs:
            num_steps = max(self._steps_since_log, 1)
            for name, total in self._component_sums.items():
                logs[name] = float(self.engine.sum(total)) / num_steps
            self.clear_losses()
        super().log(logs, start_time)

    def clear_losses(self) -> None:
        """Forgets the losses since the last log."""
        self._component_sums.clear()
        self._steps_since_log = 0

    def get_eval_dataloader(self, eval_dataset: str | Dataset | list[dict] | None = None) -> DataLoader:
        """As [`~transformers.Trainer`]'s, for rows in any format of `formats.py`."""
        return super().get_eval_dataloader(self._tokenized(eval_dataset))

    def get_test_dataloader(self, test_dataset: Dataset | list[dict]) -> DataLoader:
        """As [`~transformers.Trainer`]'s, for rows in any format of `formats.py`."""
        return super().get_test_dataloader(self._tokenized(test_dataset))

    def _tokenized(self, rows: str | Dataset | list[dict] | dict | None) -> str | Dataset | dict | None:
        if isinstance(rows, dict):
            return {name: self._tokenize(part, name=f"eval_dataset[{name!r}]") for name, part in rows.items()}
        return rows if rows is None or isinstance(rows, str) else self._tokenize(rows, name="eval_dataset")

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As [`~transformers.Trainer`]'s; it comes between the model's preparation and a checkpoint's loading."""
        if optimizer is None and self.engine.shards:
            self.prepare_reference()
        return super().create_scheduler(num_training_steps, optimizer)

    def prepare_reference(self) -> None:
        """Keeps what the objectives need of the model as it is, in the rows or as a [`Reference`]."""
        is_quiet = self.args.disable_tqdm or not self.is_local_process_zero()
        batch_size = 2 * engines.rows_per_forward(self)
        forward = RowForward(self.model, self.data_collator, batch_size, self.engine, not is_quiet)
        keep_with_rows(self.train_dataset, self.objectives, self.args, forward)
        if self.reference is None and needs_model(self.objectives, self.args):
            self.reference = Reference(self.model, self.has_fresh_adapter, self.engine)
