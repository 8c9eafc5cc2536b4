"""`UnlearnTrainer`: the Hugging Face Trainer with a forget and a retain objective in one forward."""

from collections import defaultdict
from itertools import islice

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from .batch import IGNORE_INDEX, ForgetRetainBatch
from .callbacks import HessianCallback, InterruptCallback, PairingCallback
from .collator import UnlearnCollator
from .config import SOPHIA_NAMES, UnlearnConfig
from .engines import Engine, save_checkpoint
from .formats import prepare
from .log_probs import shift_labels
from .objectives import FORGET_LOSSES, RETAIN_LOSSES, RETAIN_WEIGHT_SCHEDULES, l1_norm, split
from .pairing import PairedDataset, substitute_answers, warn_of_common_rows
from .records import add_to_model_card, check_unfinished, record_run
from .reference import Reference, add_reference_log_prob


class UnlearnTrainer(Trainer):
    """
    Makes a causal language model forget some rows and keep others.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model that must forget.
        args ([`UnlearnConfig`] or [`~transformers.TrainingArguments`], *optional*):
            Settings. Plain `TrainingArguments` get the defaults of what unlearning adds.
        forget_dataset ([`~datasets.Dataset`] or `list[dict]`): Rows to forget, in any format of `formats.py`.
        retain_dataset ([`~datasets.Dataset`] or `list[dict]`): Rows whose knowledge is to be kept.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Rows for `evaluate()`, which gives their loss; by default the forget and the retain rows.
        peft_config ([`~peft.PeftConfig`], *optional*): Trains an adapter of this kind instead of the whole model.
        **kwargs: Further arguments of [`~transformers.Trainer`]: `callbacks`, `compute_metrics`, ...

    Raises:
        ValueError: If a dataset is empty or a row unusable (it is named), a length is over the model's, or the engine
            is not supported.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: UnlearnConfig | TrainingArguments | None = None,
        forget_dataset: Dataset | list[dict] | None = None,
        retain_dataset: Dataset | list[dict] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs,
    ):
        for name, value in (
            ("forget_dataset", forget_dataset),
            ("retain_dataset", retain_dataset),
            ("processing_class", processing_class),
        ):
            if value is None:
                raise ValueError(f"UnlearnTrainer needs `{name}`.")
        args = UnlearnConfig.from_training_arguments(args or UnlearnConfig())
        max_length = _checked_max_length(args.max_length, model, processing_class)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        self.has_fresh_adapter = peft_config is not None

        def tokenize(dataset: Dataset | list[dict], name: str) -> Dataset:
            return prepare(dataset, processing_class, max_length, args.prompt_template, name)

        forget, retain = tokenize(forget_dataset, "forget_dataset"), tokenize(retain_dataset, "retain_dataset")
        warn_of_common_rows(forget, retain)
        if eval_dataset is None:
            eval_dataset = {"forget": forget, "retain": retain}
        elif isinstance(eval_dataset, dict):
            eval_dataset = {name: tokenize(rows, f"eval_dataset[{name!r}]") for name, rows in eval_dataset.items()}
        else:
            eval_dataset = tokenize(eval_dataset, "eval_dataset")
        self.forget_objective = FORGET_LOSSES[args.forget_loss]
        self.retain_objective = RETAIN_LOSSES[args.retain_loss]
        pad_token_id = processing_class.pad_token_id
        super().__init__(
            model=model,
            args=args,
            data_collator=UnlearnCollator(processing_class.eos_token_id if pad_token_id is None else pad_token_id),
            train_dataset=PairedDataset(
                forget,
                retain,
                seed=args.data_seed if args.data_seed is not None else args.seed,
                answers=substitute_answers(self.forget_objective, args.refusal_answers, retain),
                tokenizer=processing_class,
                max_length=max_length,
                with_forget=self.forget_objective is not None,
                with_retain=self.retain_objective is not None,
            ),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        # The loss below is already divided by the counts of the whole accumulated batch.
        self.loss_is_scaled_for_ga = True
        self.engine = Engine(self.accelerator)
        self.reference: Reference | None = None
        self._component_sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self._last_logged_step = 0
        self._interrupt = InterruptCallback()
        self.add_callback(self._interrupt)
        self.add_callback(PairingCallback(self.train_dataset))
        if args.optim in SOPHIA_NAMES and args.hessian_data != "training":
            self.add_callback(HessianCallback(self, retain, forget))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """
        Unlearns. See [`~transformers.Trainer.train`].

        Raises:
            ValueError: If `output_dir` holds a finished run, without `overwrite` or `resume_from_checkpoint`.
            FloatingPointError: If a loss is not finite; the state before the step is saved and the rows are named.
            KeyboardInterrupt: After an interrupt, once its checkpoint is written.
        """
        if not resume_from_checkpoint:
            check_unfinished(self.args)
        # Before a checkpoint is loaded: the reference is the model that training began with.
        self._prepare_reference()
        try:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._interrupt.restore()
        if self._interrupt.is_interrupted:
            raise KeyboardInterrupt("Training was interrupted; resume_from_checkpoint continues it.")
        if self.is_world_process_zero():
            record_run(self.args, output.metrics)
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
        batches = list(islice(epoch_iterator, num_batches))
        counts = torch.zeros(2, 2, dtype=torch.long, device=device)
        for batch in batches:
            num_tokens = (shift_labels(batch["labels"]) != IGNORE_INDEX).sum(1)
            for half, rows in enumerate((batch["is_forget"], ~batch["is_forget"])):
                counts[half] += torch.stack([num_tokens[rows].sum(), rows.sum()]).to(device)
        return batches, self.engine.sum(counts)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: ForgetRetainBatch | dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The weighted sum of the forget and the retain loss; the model's own loss for batches without `is_forget`.

        Each is a sum over its rows divided by `num_items_in_batch`, the counts of [`get_batch_samples`], so that the
        micro-batches of a step and the processes add up to the loss of one large batch.
        """
        if "is_forget" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        arguments = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        outputs = model(**arguments, use_cache=False)
        halves = split(inputs, outputs.logits, self.reference.logits(arguments) if self.reference else None)
        schedule = RETAIN_WEIGHT_SCHEDULES[self.args.retain_weight_schedule]
        retain_weight = self.args.retain_weight * schedule(self.state.epoch or 0.0, self.args.num_train_epochs)
        loss = outputs.logits.new_zeros((), dtype=torch.float32)
        for name, objective, weight, half, counts in (
            ("forget", self.forget_objective, self.args.forget_weight, halves[0], num_items_in_batch[0]),
            ("retain", self.retain_objective, retain_weight, halves[1], num_items_in_batch[1]),
        ):
            if objective is None:
                continue
            row_losses = objective.function(half, self.args.npo_beta)
            self._check_finite(name, row_losses, half.rows)
            component = row_losses.sum() / counts[1 if objective.per == "sequence" else 0]
            loss = loss + weight * component
            self._component_sums[f"{name}_loss"] += component.detach()
        if self.args.l1_weight:
            # Once a step, whatever the number of micro-batches and processes.
            share = self.current_gradient_accumulation_steps * self.engine.num_processes
            loss = loss + self.args.l1_weight * l1_norm(model.parameters()) / share
        loss = loss * self.engine.loss_factor
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds `forget_loss` and `retain_loss`, the means since the last log, to the training loss."""
        if "loss" in logs:
            num_steps = max(self.state.global_step - self._last_logged_step, 1)
            for name, total in self._component_sums.items():
                logs[name] = float(self.engine.sum(total)) / num_steps
            self._component_sums.clear()
            self._last_logged_step = self.state.global_step
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes the Trainer's model card, with the method and its settings; see [`~transformers.Trainer`]."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_model_card(self.args)

    def _prepare_reference(self) -> None:
        objectives = [objective for objective in (self.forget_objective, self.retain_objective) if objective]
        dataset = self.train_dataset
        if any(o.needs_reference_log_prob for o in objectives) and (
            "reference_log_prob" not in dataset.forget.column_names
        ):
            model = self.model.to(self.args.device)
            dataset.forget = add_reference_log_prob(
                dataset.forget,
                model,
                self.data_collator,
                2 * self.args.per_device_train_batch_size,
                self.engine,
                show_progress=not self.args.disable_tqdm and self.is_local_process_zero(),
            )
        if self.reference is None and any(o.needs_reference_logits for o in objectives):
            self.reference = Reference(self.model.to(self.args.device), self.has_fresh_adapter)

    def _check_finite(self, name: str, row_losses: torch.Tensor, rows: torch.Tensor) -> None:
        is_bad = ~row_losses.detach().isfinite()
        if is_bad.any():
            checkpoint = save_checkpoint(self)
            raise FloatingPointError(
                f"The {name} loss is not finite at row {rows[is_bad].tolist()} of `{name}_dataset`, in step "
                f"{self.state.global_step + 1}, which was not taken; {checkpoint} holds the state before it. Usual "
                "causes: a learning rate or forget weight that is too high, or float16 without a scaler."
            )


def _checked_max_length(max_length: int | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    longest = min(getattr(model.config, "max_position_embeddings", None) or 2**30, tokenizer.model_max_length)
    if max_length is not None and max_length > longest:
        raise ValueError(f"`max_length`={max_length} is over the model's {longest} positions: lower it.")
    return max_length or longest
