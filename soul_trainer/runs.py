"""A run of a trainer: its model, what a former run has left, its folder and its model card. A search makes many."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed
from transformers.modeling_outputs import ModelOutput
from transformers.trainer_utils import BestRun, EvalLoopOutput, TrainOutput
from transformers.utils import logging

from . import engines
from .batch import IGNORE_INDEX
from .callbacks import FingerprintCallback, callbacks_for
from .curvature import linear_layers, num_kronecker_numbers
from .fingerprint import rows_digest
from .freezing import freeze_parameters, freeze_what_text_does_not_reach
from .held_folder import check_alike, hold_folder
from .inputs import check_model
from .log_probs import shift_labels, token_log_probs
from .lora import adapter_reach
from .objectives import check_one_stack, parameters_of_layers
from .precision import choose_precision
from .records import Provenance, complete_model_card, make_way, read_model_card, record_run, run_settings
from .reference_rows import drop_from_rows


logger = logging.get_logger(__name__)

# Settings whose default depends on the model and the engine.
OPEN_SETTINGS = ("rule", "learning_rate", "retain_weight")


class RunMixin(engines.TrialMixin, engines.SavedDtypeMixin, engines.ShardedCheckpointMixin, Trainer):
    """
    The runs of an [`UnlearnTrainer`]. With `model_init` each has a model of its own, and so an engine, a reference and
    callbacks of its own.

    Attributes:
        forget_weight (`float`): Of the next step; callbacks may move it.
        retain_weight (`float`): Likewise.
        origin (`str`, *optional*): For the model card: hub id or folder of the model that training starts from.
        data_names (`dict[str, str]`): For the model card: names of the rows, by `forget` and `retain`.
    """

    # Of these the trainer and its rows are made or, before a trial draws its settings, the model.
    fixed_settings = (
        *("forget_loss", "retain_loss", "trainable_parameters", "frozen_parameters", "rmu_layer"),
        *("max_length", "prompt_template", "refusal_answers", "seed", "data_seed"),
        *("bf16", "fp16", "float32_weights"),
    )

    origin: str | None = None
    data_names: Mapping[str, str] = MappingProxyType({})
    own_callbacks: Sequence[TrainerCallback] = ()
    open_settings: frozenset[str] = frozenset()

    @property
    def has_fresh_adapter(self) -> bool:
        """Whether the adapter that is trained is of our own making."""
        return self.peft_config is not None

    def begin_run(self) -> None:
        """Makes way in the folder, takes the settings up, and asks the model what must be known of it."""
        self.args.check()
        if self.engine.num_processes > 1:
            check_alike(self.engine, self._facts())
        if not self.is_resumed:
            make_way(self.run_folder, self.args.overwrite, self.is_world_process_zero())
            self.accelerator.wait_for_everyone()
        if not self.is_resumed:  # else a checkpoint brings others
            engines.check_weights(self, self.engine)
        self.precision.widen(self.model)  # which a former run has turned back
        if self.model_init is not None:
            self.engine = self._interrupt.engine = engines.make_engine(self.accelerator, self.model)
            self.fill_settings()
            engines.check_trainer(self, self.engine)
            drop_from_rows(self.train_dataset)
            self.renew_callbacks()
        self.forget_weight, self.retain_weight = self.args.forget_weight, self.args.retain_weight
        self.clear_losses()
        # Before a checkpoint is loaded: the reference is the model that training began with.
        if not self.engine.shards:
            self.prepare_reference()

    def checkpoint_to_resume(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The checkpoint that a run goes on from, which is whole and its own."""
        wanted = {"true": True, "false": None}.get(str(resume_from_checkpoint).lower(), resume_from_checkpoint)
        (own,) = [callback for callback in self.own_callbacks if isinstance(callback, FingerprintCallback)]
        self.is_resumed = bool(wanted)
        if not wanted:
            own.warn_of_half_unlearned()
            return None
        return engines.whole_checkpoint(wanted, self.args, None if self.args.allow_other_run else own.difference_from)

    def _facts(self) -> dict[str, object]:
        """What all processes must have alike."""
        pairs = {"forget_dataset": self.train_dataset.forget, "retain_dataset": self.train_dataset.retain}
        rows = {name: rows_digest(half) for name, half in pairs.items() if half is not None}
        return {**run_settings(self.args), **rows, "model": self.model.config.to_json_string()}

    def train(self, *args, **kwargs) -> TrainOutput:
        """As [`~transformers.Trainer`]'s, with the output folder to itself."""
        with hold_folder(self.args.output_dir, self.engine):
            return super().train(*args, **kwargs)

    def end_run(self, metrics: dict[str, float]) -> None:
        """Finishes the weights, turns them back to the dtype that they came in, and marks the run as finished."""
        if self.objectives.any("is_negated"):
            self.reference.negate(self.args.task_vector_scale)
        engines.check_weights(self, self.engine)
        if not self.engine.shards:
            self.precision.narrow(self.model)
        if self.is_world_process_zero():
            record_run(self.run_folder, self.args, metrics)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As [`~transformers.Trainer`]'s, and computed as in training also after it."""
        is_narrow = self.precision.is_narrow(self.model)
        self.precision.widen(self.model)
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            if is_narrow:
                self.precision.narrow(self.model)

    def evaluated_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, ModelOutput]:
        """The mean loss of a batch's answer tokens, without what a model adds to it, as a router's loss."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        targets = shift_labels(inputs["labels"])
        sums = -token_log_probs(outputs.logits, targets).sum(1)
        self.row_losses = torch.stack([sums, (targets != IGNORE_INDEX).sum(1)], dim=1)
        loss = self.row_losses[:, 0].sum() / self.row_losses[:, 1].sum()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, *args, **kwargs) -> tuple:
        """As [`~transformers.Trainer`]'s, which keeps the rows' losses for the mean over all of them."""
        found = super().prediction_step(*args, **kwargs)
        self.evaluated_rows.append(self.accelerator.gather_for_metrics(self.row_losses))
        return found

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        """As [`~transformers.Trainer`]'s, whose own mean over batches depends on their size."""
        self.evaluated_rows = []
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if f"{prefix}_loss" in output.metrics:
            output.metrics[f"{prefix}_loss"] = self.mean_evaluated_loss()
        return output

    def mean_evaluated_loss(self) -> float:
        """The mean loss per answer token of the rows that were evaluated last, over all processes."""
        total, num_tokens = torch.cat(self.evaluated_rows).double().sum(0).tolist()
        return total / num_tokens

    def fill_settings(self) -> None:
        """Gives the settings that are open the values that fit the model and its engine."""
        self.open_settings |= {name for name in OPEN_SETTINGS if getattr(self.args, name) is None}
        reach = adapter_reach(self.model)
        if self.args.rule is None:
            layers = linear_layers(self.model)
            self.args.fill_rule(num_kronecker_numbers(layers.values()), self.engine.shards, reach is not None)
        self.args.fill_retain_weight()
        config = self.model.config.get_text_config()
        size = [getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers")]
        self.args.fill_learning_rate(*size, reach)

    def hyperparameter_search(self, *args, **kwargs) -> BestRun | list[BestRun]:
        """As [`~transformers.Trainer`]'s; what was open is open in each trial that does not draw it."""
        for name in self.open_settings:
            setattr(self.args, name, None)
        return super().hyperparameter_search(*args, **kwargs)

    def renew_callbacks(self) -> None:
        """Adds the callbacks that the settings ask for, in the place of those of a former run."""
        self.callback_handler.callbacks = [
            callback for callback in self.callback_handler.callbacks if callback not in self.own_callbacks
        ]
        rows = self.train_dataset
        self.own_callbacks = callbacks_for(self, rows.retain, rows.forget)
        for callback in self.own_callbacks:
            self.add_callback(callback)

    def call_model_init(self, trial=None) -> PreTrainedModel | PeftModel:
        """A model from `model_init`, with an adapter and frozen as the settings say."""
        self.reference = self.perturbation = None  # hold the model before, for which there may be no room
        set_seed(self.args.seed)
        return self.made_ready(super().call_model_init(trial))

    def made_ready(self, model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
        """The model with the adapter of `peft_config`, frozen and in a precision as the settings say."""
        args = self.args
        check_model(model)
        if self.peft_config is not None:
            if isinstance(model, PeftModel):
                raise ValueError(
                    "`model` has an adapter already: leave `peft_config` out, which trains that one, or merge it "
                    "(`merge_and_unload`) first."
                )
            set_seed(args.seed)
            model = get_peft_model(model, self.peft_config)
        if (unreached := freeze_what_text_does_not_reach(model)) and args.should_log:
            parts = ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name in unreached))
            logger.warning(f"Rows of text do not reach {parts}: they stay as they are.")
        trainable = args.trainable_parameters
        is_default = args.forget_loss == "rmu" and trainable is None and not isinstance(model, PeftModel)
        if is_default:
            trainable = parameters_of_layers(args.rmu_layer)
        try:
            trained = freeze_parameters(model, trainable, args.frozen_parameters)
        except ValueError as error:
            if not is_default:
                raise
            raise ValueError(
                f"forget_loss='rmu' trains down projections of `rmu_layer`={args.rmu_layer} and the two before it, "
                f"unless `trainable_parameters` says otherwise: {error}"
            ) from None
        if is_default:
            check_one_stack(trained, args.rmu_layer)
        self._take_precision(model)
        return model

    def _take_precision(self, model: PreTrainedModel | PeftModel) -> None:
        keeper = engines.keeper_of_weights(self.args, model)
        precision = choose_precision(model, self.args, self.args.float32_weights, keeper)
        if self.precision is None:  # else the accelerator is there already
            engines.set_bf16(self.args, precision.bf16)
            if precision.message and self.args.should_log:
                logger.warning(precision.message)
        self.precision = precision
        precision.widen(model)

    def create_model_card(self, *args, **kwargs) -> None:
        """
        Writes the Trainer's model card, with the method and its settings; see [`~transformers.Trainer`]. What a card
        that is there has besides, as an evaluation, stays.
        """
        if self.is_world_process_zero():
            before = read_model_card(self.args.output_dir)
            super().create_model_card(*args, **kwargs)
            base = kwargs.get("finetuned_from") or self.origin or getattr(self.model.config, "_name_or_path", None)
            halves = {"forget": self.train_dataset.forget, "retain": self.train_dataset.retain}
            num_rows = {half: len(rows) for half, rows in halves.items() if rows is not None}
            complete_model_card(self.args, before, Provenance(base or None, num_rows, self.data_names))
