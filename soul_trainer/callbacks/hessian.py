"""When the Hessian is refreshed. How it is estimated is in `curvature/`."""

import itertools
import time
from pathlib import Path

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..curvature import KroneckerCurvature, estimate_hessian, linear_layers, measure_matrices, update_shares
from ..curvature.file import check_model, load_curvature, load_matrices, save_matrices
from ..curvature.layers import LayerStatistics
from ..curvature.measure import can_keep
from ..engines import MOST_OVERFLOWS, KeptWithCheckpoint, check_estimator, find_soul, make_engine, save_checkpoint
from ..inputs import check_ids, check_tokenized
from ..optim import RULES
from ..random_state import forked_rng
from ..soul_settings import SoulArguments, parse_optim_args
from ..tokenized import has_columns_to_check, read_tokenized
from ..weights import weights_digest
from .rows import micro_batches


logger = logging.get_logger(__name__)

MATRICES_FILE = "matrix_curvature.safetensors"


class HessianCallback(KeptWithCheckpoint, ExportableState):
    """
    Refreshes the Hessian before the first step and then every `hessian_interval` steps, or reads it from a file of
    `curvature`, and logs what it does:

    - `curvature/clipped`: share of coordinates at the clip, in [0, 1]; 1 is sign descent, 0 is a Newton-like step.
    - `curvature/hessian_mean`: mean of the Hessian's diagonal.
    - `curvature/refresh_seconds`: duration of the last refresh.
    - `curvature/update_share/{embeddings,head,attention,mlp,other}`: where the squared update goes; they sum to 1.

    [`UnlearnTrainer`] adds it by itself. With a plain Trainer, `trainer.add_callback(HessianCallback(trainer, rows))`
    replaces Sophia's refresh from training gradients. Settings come from the Trainer's arguments; with
    `hessian_data="training"` that refresh stays, and the callback logs alone.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer that it is added to.
        retain ([`~datasets.Dataset`]): Tokenized rows, from [`~formats.prepare`].
        forget ([`~datasets.Dataset`], *optional*): Tokenized rows; needed for `hessian_data="forget"` or `"both"`.
    """

    def __init__(self, trainer: Trainer, retain: Dataset, forget: Dataset | None = None):
        args = trainer.args
        is_configured = isinstance(args, SoulArguments)
        settings = args if is_configured else SoulArguments(**parse_optim_args(args.optim_args))
        settings.check()
        self.settings = settings.resolved()
        sources = {"retain": {"retain": retain}, "forget": {"forget": forget}, "training": {}}
        sources["both"] = sources["retain"] | sources["forget"]
        self.sources = sources[self.settings.hessian_data]
        if None in self.sources.values():
            raise ValueError(f"`hessian_data={self.settings.hessian_data!r}` needs the argument `forget`.")
        for half, rows in list(self.sources.items()):
            check_tokenized(rows.column_names, half)
            if "labels" not in rows.column_names or has_columns_to_check(rows.column_names):
                tokenizer = trainer.processing_class
                pad, eos = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos"))
                self.sources[half] = rows = read_tokenized(rows, pad, None, half, eos)
            check_ids(rows, trainer.model, half)
        self.trainer = trainer
        self.engine = make_engine(trainer.accelerator, trainer.model)
        check_estimator(self.settings.hessian_estimator, self.engine, args)
        if self.settings.rule == "kronecker" and args.fp16 and not self.settings.curvature:
            raise ValueError(
                "`rule='kronecker'` sums gradients of layers, which float16 scales: set `bf16`, or read a file of "
                "`curvature`."
            )
        if self.settings.curvature and not Path(self.settings.curvature).is_file():
            raise ValueError(
                f"`curvature`={self.settings.curvature!r}: there is no such file. `python -m soul_trainer.curvature` "
                "measures one."
            )
        is_checked = self.settings.curvature and self.engine.holds_whole(trainer.model)
        self._digest = weights_digest(trainer.model) if is_checked else None
        if self.settings.curvature and not is_checked:
            logger.warning(
                f"Whether {self.settings.curvature} is of this model is not checked: no process has its weights whole."
            )
        self.refresh_seconds = 0.0
        self.last_refresh: int | None = None
        self.learning_rates: list[float] = []
        self.has_warned = False

    def state(self) -> dict:
        """What a checkpoint keeps: one that was saved between a refresh and its step must not refresh again."""
        return {"args": {}, "attributes": {"last_refresh": self.last_refresh}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Takes the refresh over from the optimizer."""
        sophia = find_soul(self.trainer.optimizer)
        if sophia is None:
            raise ValueError(f"HessianCallback needs `optim='soul'`, but the optimizer is {args.optim}.")
        sophia.partition = self.engine.partition(self.trainer.model, self.trainer.optimizer)
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        self.last_refresh = saved.get("attributes", {}).get("last_refresh")
        if self.settings.hessian_data == "training":
            return
        for group in sophia.param_groups:
            group["hessian_interval"] = None
        if state.is_world_process_zero:
            logger.warning(self._announcement())

    def _announcement(self) -> str:
        settings = self.settings
        if not RULES[settings.rule].has_hessian:
            return "Two directions without curvature." if settings.two_directions else "A step without curvature."
        if settings.curvature:
            return f"The Hessian ({settings.rule}): {settings.curvature}."
        interval = settings.hessian_interval
        name = "Sophia's Hessian" if settings.rule == "sophia" else f"The Hessian ({settings.rule})"
        return f"{name}: {settings.hessian_estimator} on {settings.hessian_data} rows, " + (
            f"every {interval} step(s)." if interval else "once."
        )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Refreshes if this step is due."""
        interval, step = self.settings.hessian_interval, state.global_step
        has_hessian = self.sources and RULES[self.settings.rule].has_hessian
        if not has_hessian or step == self.last_refresh or (step % interval if interval else step):
            return
        start = time.perf_counter()
        try:
            with forked_rng():
                if self.settings.curvature:
                    self._read_curvature()
                elif interval and self.settings.rule != "kronecker":
                    self._estimate(draw=step, rows=self._sample(step), decay=None)
                else:
                    self._estimate_once()
        except FloatingPointError as error:
            checkpoint = save_checkpoint(self.trainer)
            raise FloatingPointError(f"{error} {checkpoint} holds the state before it.") from None
        self._warn_of_kept_out()
        self.last_refresh = step
        self.refresh_seconds = time.perf_counter() - start

    def _warn_of_kept_out(self) -> None:
        soul = find_soul(self.trainer.optimizer)
        num_here, soul.num_kept_out = int(soul.num_kept_out), 0
        if num_here:
            logger.warning(
                f"The estimate of the Hessian is not finite at {num_here} weights of this process, which keep the "
                "Hessian that they had: their gradient is too large to be squared. Look at the rows of "
                f"`hessian_data`={self.settings.hessian_data!r}."
            )

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Remembers the learning rates of the step, which the scheduler changes before the step is logged."""
        self.learning_rates = [group["lr"] for group in find_soul(self.trainer.optimizer).param_groups]

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Forgets the last refresh, whose step another training would take for one of its own."""
        self.last_refresh = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs
    ) -> None:
        """Logs the curvature after each training loss (earlier, the Trainer would take its own log for done)."""
        if "loss" in logs:
            self.trainer.log(self.curvature())

    def curvature(self) -> dict[str, float]:
        """The figures of the last step that the class lists."""
        figures = find_soul(self.trainer.optimizer).describe(self.learning_rates)
        totals = {key: sum(row[key] for row in figures.values()) for key in ("count", "clipped", "hessian")}
        squares = {name: row["squared"] for name, row in figures.items()}
        shares = update_shares(squares)
        if shares.pop("largest_tensor") > 0.95 and not self.has_warned:
            logger.warning(
                f"Over 95% of the squared update goes to one tensor, {max(squares, key=squares.get)}: unlearning "
                "edits it, not the model. Often rho does not fit the Hessian's scale, or tokens of the forget rows "
                "never occur elsewhere."
            )
            self.has_warned = True
        return {
            "curvature/clipped": totals["clipped"] / max(totals["count"], 1),
            "curvature/hessian_mean": totals["hessian"] / max(totals["count"], 1),
            "curvature/refresh_seconds": self.refresh_seconds,
            **{f"curvature/update_share/{part}": share for part, share in shares.items()},
        }

    def _all_rows(self) -> list[tuple[str, int]]:
        return [(half, row) for half, dataset in self.sources.items() for row in range(len(dataset))]

    def _sample(self, draw: int, num_rows: int | None = None) -> list[tuple[str, int]]:
        rows = self._all_rows()
        size = min(num_rows or self.settings.hessian_batch_size, len(rows))
        chosen = np.random.default_rng((self.trainer.args.seed, draw)).choice(len(rows), size, replace=False)
        return [rows[index] for index in chosen]

    def _estimate_once(self) -> None:
        """The plain mean of estimates over one pass, or over two where matrices need other labels; anew."""
        size, keeps = self.settings.hessian_batch_size, can_keep(self.settings.hessian_estimator)
        rows = self._sample(draw=0, num_rows=self.settings.hessian_rows or len(self._all_rows()))
        starts, args = range(0, len(rows), size), self.trainer.args
        first_draws = itertools.count(0, 0 if keeps else len(starts))

        def estimate(statistics: LayerStatistics | None = None) -> None:
            is_quiet = args.disable_tqdm or not self.trainer.is_local_process_zero()
            bar = tqdm(starts, desc="Curvature", unit="estimate", leave=False, disable=is_quiet)
            for draw, start in enumerate(bar, next(first_draws)):
                self._estimate(draw, rows[start : start + size], draw / (draw + 1), statistics)

        if self.settings.rule != "kronecker":
            estimate()
            return
        find_soul(self.trainer.optimizer).matrices = {}  # whose memory the new ones take
        layers = linear_layers(self.trainer.model)
        matrices = measure_matrices(layers, estimate, self.engine, self.settings.curvature_rank, keeps=keeps)
        find_soul(self.trainer.optimizer).matrices = matrices

    def _read_curvature(self) -> None:
        found = load_curvature(self.settings.curvature, self.settings.curvature_rank)
        if self._digest is not None:
            check_model(found, self._digest)
        soul = find_soul(self.trainer.optimizer)
        soul.set_hessian(found.diagonals)
        if self.settings.rule == "kronecker":
            soul.matrices = self._beside_weights(found.matrices)

    def save_to(self, folder: str | Path) -> None:
        """Keeps the curvature of matrices with a checkpoint, whose weights are no longer those that it is of."""
        matrices = find_soul(self.trainer.optimizer).matrices
        if matrices and self.trainer.is_world_process_zero():
            save_matrices(Path(folder) / MATRICES_FILE, matrices)

    def load_from(self, folder: str | Path) -> None:
        """Takes it up."""
        if self.settings.rule == "kronecker":
            # A checkpoint from before the first step has none yet.
            path = Path(folder) / MATRICES_FILE
            found = load_matrices(path) if path.exists() else {}
            find_soul(self.trainer.optimizer).matrices = self._beside_weights(found)

    def _beside_weights(self, matrices: dict[str, KroneckerCurvature]) -> dict[str, KroneckerCurvature]:
        """Those of the weights that train, on the devices of their states."""
        layers = linear_layers(self.trainer.model)
        return {name: matrix.to(layers[name].device) for name, matrix in matrices.items() if name in layers}

    def _estimate(
        self,
        draw: int,
        rows: list[tuple[str, int]],
        decay: float | None,
        statistics: LayerStatistics | None = None,
    ) -> None:
        trainer = self.trainer
        items = [{half: self.sources[half][row]} for half, row in rows]
        items.sort(key=lambda item: max(len(row["input_ids"]) for row in item.values()))  # for less padding
        batches = micro_batches(trainer, self.engine, items)
        trainer.model_wrapped.train()
        for _ in range(MOST_OVERFLOWS):
            is_done = estimate_hessian(
                trainer.model_wrapped,
                trainer.optimizer,
                batches,
                self.settings.hessian_estimator,
                self.settings.hessian_label_smoothing,
                seed=trainer.args.seed,
                draw=draw,
                decay=decay,
                engine=self.engine,
                statistics=statistics,
            )
            if is_done:
                return
        raise FloatingPointError("The gradient of the Hessian refresh overflows float16 at every loss scale.")
