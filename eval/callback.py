"""A suite in the course of training, through the Trainer's own evaluation."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from soul_trainer.engines import make_engine

from .evaluation import ask
from .statistics import Figure, values
from .suites import SUITES


class EvalCallback(TrainerCallback):
    """
    Asks the model a suite whenever the Trainer evaluates: `eval_strategy="steps"`, `eval_steps`, `eval_on_start`. The
    figures go where all of the Trainer's go, as `eval_<name>_<figure>`, so that trackers and the report draw their
    curves and `metric_for_best_model` can choose by them. Processes share the rows; a sharded model stays sharded, and
    the random state is what it would have been without.

    Args:
        trainer ([`~transformers.Trainer`]): Any, such as [`~soul_trainer.UnlearnTrainer`].
        suite (`str`, *optional*, defaults to `"tofu"`): Name of a suite.
        rows (`list[dict]`, *optional*): Rows to ask; by default the suite's, as `settings` name them.
        reference_rows (`list[dict]`, *optional*): Of the gold model; those that are not asked here are left out.
        limit (`int`, *optional*): Asks the first rows of each split only.
        name (`str`, *optional*): Of this subset in the log; by default the suite's.
        batch_size (`int` or `str`, *optional*, defaults to `"auto"`): Tokens in a batch, padding included.
        first_rows (`list[dict]`, *optional*): What the model says of the rows before it trains, if that is known
            already. It is not asked at step 0 then.
        **settings: Fields of the suite's arguments: `dataset`, `forget_split`, `generate`, ...

    Attributes:
        rows (`list[dict]`): What the model said when it was last asked; before, what it will be asked.
        step (`int`, *optional*): When that was.
        first_step (`int`): Where training began or, after a resume, went on.
        seconds (`float`): How long evaluation took, the Trainer's own included.

    Raises:
        ValueError: If the suite, or one of its settings, is unknown; the known ones are listed.
    """

    def __init__(
        self,
        trainer: Trainer,
        suite: str = "tofu",
        rows: list[dict] | None = None,
        reference_rows: list[dict] | None = None,
        limit: int | None = None,
        name: str | None = None,
        batch_size: int | str = "auto",
        first_rows: list[dict] | None = None,
        **settings: object,
    ):
        if suite not in SUITES:
            raise ValueError(f"`suite` must be one of {', '.join(SUITES)}, but it is {suite!r}.")
        self.suite = SUITES[suite]
        known = [field.name for field in fields(self.suite.arguments)]
        if unknown := settings.keys() - set(known):
            raise ValueError(f"The suite {suite} has no setting {sorted(unknown)}; it has {', '.join(known)}.")
        self.arguments = self.suite.arguments(**settings)
        self.trainer, self.reference_rows, self.batch_size = trainer, reference_rows, batch_size
        self.name = name or suite
        loaded = self.suite.load(self.arguments, trainer.processing_class) if rows is None else rows
        self.rows = self._asked = [row for row in loaded if limit is None or row["index"] < limit]
        if reference_rows is not None and self.suite.check_reference:
            asked = {(row["split"], row["index"]) for row in self._asked}
            self.reference_rows = [row for row in reference_rows if (row["split"], row["index"]) in asked]
            self.suite.check_reference(self._asked, self.reference_rows)
        self.first_rows = first_rows
        self.step: int | None = None
        self._logged: dict[str, float] = {}
        self.first_step = 0
        self.seconds = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Notes where training begins or goes on, and forgets what a former model said."""
        self.first_step, self.step = state.global_step, None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Forgets when the model was asked if it has other weights now, those of its best step."""
        if args.load_best_model_at_end or state.best_global_step not in (None, state.global_step):
            self.step = None

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict, **kwargs
    ) -> None:
        """Asks the model, once a step however many datasets the Trainer evaluates then."""
        self.seconds += sum(value for key, value in metrics.items() if key.endswith("_runtime"))
        if self.step == state.global_step:
            metrics.update(self._logged)
            return
        if state.global_step == 0 and self.first_rows is not None:
            figures = self._figures_of(self.first_rows)
        else:
            figures = self.ask(kwargs["model"])
        self._logged = logged = {f"eval_{self.name}_{key}": value for key, value in values(figures).items()}
        metrics.update(logged)
        self.trainer.log(logged)

    def ask(self, model: PreTrainedModel) -> dict[str, Figure]:
        """
        Asks the model as it is.

        Args:
            model ([`~transformers.PreTrainedModel`]): The Trainer's.

        Returns:
            `dict[str, Figure]`: The suite's figures, on every process.
        """
        start = time.perf_counter()
        engine = make_engine(self.trainer.accelerator, model)
        template = getattr(self.trainer.args, "prompt_template", None)
        with _same_random_state(), engine.autocast():
            rows = ask(
                model,
                self.trainer.processing_class,
                self._asked,
                lambda row: self.suite.parts(row, self.arguments),
                self.batch_size,
                template,
                engine,
                progress=not self.trainer.args.disable_tqdm,
                name=Path(self.trainer.args.output_dir).name,
            )
        engine.forget_gathered(model)
        if self.suite.judge:
            self.suite.judge(rows, self.arguments)
        figures = self._figures_of(rows)
        self.seconds += time.perf_counter() - start
        return figures

    def _figures_of(self, rows: list[dict]) -> dict[str, Figure]:
        self.rows, self.step = rows, self.trainer.state.global_step
        return self.suite.summarise(rows, self.reference_rows)


@contextmanager
def _same_random_state() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
