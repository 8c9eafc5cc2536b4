"""Unlearning runs from one target, side by side: each is made, or found done, and read from its files."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from soul_trainer import UnlearnConfig, UnlearnTrainer, UntilForgottenCallback
from soul_trainer.engines import Engine, keeper_of_weights
from soul_trainer.precision import choose_precision
from soul_trainer.records import run_settings

from . import report
from .attacks.after import ATTACKED_SUITES, attack_run
from .attacks.command import recovered_figures
from .callback import EvalCallback
from .evaluation import ask
from .evidence.callback import add_attacks, write_run_record
from .evidence.record import remove_record
from .general import kept_general_ability
from .models import ModelArguments, weight_files, weights_digest
from .rows import make_header, read_rows, write_rows
from .running import questions_digest
from .statistics import Figure
from .suites import SUITES


if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

logger = logging.get_logger(__name__)


class Comparison:
    """
    The target, the gold model, and what optimizers make of the target.

    Rows of a run lie beside its folder, not in it: they hold what was to be forgotten, and a model's folder is what
    `push_to_hub` uploads.

    Args:
        folder (`Path`): Where rows and the report go.
        target (`str`): Hub id or folder of the model that must forget.
        gold (`str`, *optional*): That of the model that never learnt it.
        suite (`str`): Name of the suite that asks them.
        rows (`list[dict]`): Its rows, unscored.
        asked (`dict`): Fields of the suite's arguments.
        settings (`dict`):
            What rows depend on besides the model and its training: data, lengths. Results that are there already are
            used again only if these are the same.
        config ([`UnlearnConfig`]):
            Its precision and its prompt template are those of every evaluation; its `overwrite` replaces results.
        loading ([`ModelArguments`], *optional*): How target and gold model are loaded.
        signing_key (`Ed25519PrivateKey`, *optional*): Signs the records of the runs; see [`~evidence.write_record`].
        general (`dict`, *optional*):
            What lm-eval asks all models for the report: `tasks`, `limit` and `include_path`, as
            [`~general.general_ability`] takes them.
    """

    def __init__(
        self,
        folder: Path,
        target: str,
        gold: str | None,
        suite: str,
        rows: list[dict],
        asked: dict,
        settings: dict,
        config: UnlearnConfig,
        loading: ModelArguments | None = None,
        signing_key: "Ed25519PrivateKey | None" = None,
        general: dict | None = None,
    ):
        self.folder, self.target, self.gold, self.config = folder, target, gold, config
        self.loading, self.signing_key = loading or ModelArguments(), signing_key
        self.general = general or {}
        self.suite, self.rows, self.asked = SUITES[suite], rows, asked
        self.settings = {"suite": suite, "questions": questions_digest(rows), **asked, **settings}
        self._weights: dict[str, str | None] = {}
        self._found = {
            role: self._reference_rows(role, name) for role, name in (("target", target), ("gold", gold)) if name
        }
        self.references = self.references_on(rows)
        self.runs: list[report.Run] = []
        self._folders: dict[str, Path] = {}

    @property
    def gold_rows(self) -> list[dict] | None:
        """The gold model's rows, if there is one."""
        return self._found.get("gold")

    def references_on(self, rows: list[dict]) -> dict[str, report.Run]:
        """
        Args:
            rows (`list[dict]`): Some of the comparison's.

        Returns:
            `dict[str, Run]`: `target` and, if there is one, `gold`, with their figures on those rows.
        """
        return {
            role: report.Run(role, self.figures(same_rows(found, rows)), same_rows(found, rows), role=role)
            for role, found in self._found.items()
        }

    def figures(self, rows: list[dict]) -> dict[str, Figure]:
        """The suite's figures of a model's rows, against the gold model's on the same rows if there is one."""
        gold = self.gold_rows
        return self.suite.summarise(rows, None if gold is None else same_rows(gold, rows))

    def unlearn(
        self,
        name: str,
        config: UnlearnConfig,
        make_trainer: Callable[[], UnlearnTrainer],
        num_evaluations: int,
        target: str | None = None,
        rows: list[dict] | None = None,
    ) -> report.Run:
        """
        Adds a run, which is made unless it is there, and puts its figures into its model card.

        Args:
            name (`str`): What the report calls it.
            config ([`UnlearnConfig`]): The trainer's.
            make_trainer (`Callable`): Makes the trainer, if it is needed.
            num_evaluations (`int`): Evaluations after the start, for the curves.
            target (`str`, *optional*): The model that this run starts from, if it is another than the comparison's.
            rows (`list[dict]`, *optional*): Those of the comparison's rows that this run asks; by default all.

        Raises:
            ValueError: If there is a finished run with other settings, and `overwrite` is not set.
        """
        target, rows = target or self.target, self.rows if rows is None else rows
        folder = Path(config.output_dir)
        identity = {"target": target, **self.settings, **run_settings(config)}
        if rows is not self.rows:
            identity["questions"] = questions_digest(rows)
        rows_file = rows_file_of(config)
        if config.overwrite or not rows_file.exists():
            self._train(make_trainer(), rows, identity, num_evaluations)
        elif read_rows(rows_file)[0].get("settings") != identity:
            raise ValueError(
                f"{folder} holds a finished run with other settings or data: add --overwrite to replace it, or choose "
                "another --output_dir."
            )
        self.runs.append(self._read(config, name))
        self._folders[name] = folder
        if PartialState().is_main_process:
            self._complete_card(self.runs[-1], folder)
        return self.runs[-1]

    def attack(self, config: UnlearnConfig, names: list[str]) -> None:
        """
        Attacks the run that was added last, and adds `recovered_<attack>_<figure>` to its figures.

        Args:
            config ([`UnlearnConfig`]): The run's.
            names (`list[str]`): Some of [`~attacks.after.ATTACKS`].

        Raises:
            ValueError: If the suite has no rows that can be attacked.
        """
        if self.suite.name not in ATTACKED_SUITES:
            raise ValueError(f"`attacks` needs rows with answers, and the suite {self.suite.name} has none.")
        if PartialState().num_processes > 1:
            logger.warning("Attacks run in one process: start `python -m soul_eval attack` after this run.")
            return
        run, folder = self.runs[-1], Path(config.output_dir)
        found = attack_run(
            *(str(folder), self.target, self.gold, self.suite.name, self.asked, self.rows, names),
            folder.with_name(f"{folder.name}.attacks"),
            device=str(PartialState().device),
            prompt_template=config.prompt_template,
            overwrite=config.overwrite,
            **_loading_of_attacks(self.loading),
        )
        run.summary.update(recovered_figures(found))
        run.attacks = found
        add_attacks(folder, found, self.signing_key)

    def write_report(self, title: str, notes: str | Sequence[str] = ()) -> None:
        """Writes the report into the folder and prints its table; see [`~report.write_report`]."""
        if self.general.get("tasks"):
            self._ask_general()
        if not PartialState().is_main_process:
            return
        for run in self.runs:  # their verdicts know of attacks now
            self._complete_card(run, self._folders[run.name])
        gold = [self.references["gold"]] if "gold" in self.references else []
        everyone = [self.references["target"], *self.runs, *gold]
        report.write_report(self.folder, title, everyone, notes)
        print(
            f"\n{report.table(everyone)}\n\n{self.folder / 'report.html'} explains the figures and shows the curves."
        )

    def _ask_general(self) -> None:
        """Adds the general ability of all models to their figures."""
        names = {"target": self.target, "gold": self.gold}
        models = [(run, names[role], self.folder / role) for role, run in self.references.items()]
        models += [(run, str(self._folders[run.name]), self._folders[run.name]) for run in self.runs]
        for run, name, place in models:
            path = place.with_name(f"{place.name}.general.json")
            figures = kept_general_ability(path, name, self.loading, overwrite=self.config.overwrite, **self.general)
            run.summary.update(figures)

    def _complete_card(self, run: report.Run, folder: Path) -> None:
        references = self.references_on(run.rows)
        section = report.model_card_section(run, references["target"], references.get("gold"))
        report.add_to_model_card(folder / "README.md", section)

    def _reference_rows(self, role: str, model_name: str) -> list[dict]:
        path = self.folder / f"{role}.rows.jsonl"
        engine = Engine(PartialState())
        header = read_rows(path)[0] if path.exists() and not self.config.overwrite else {}
        engine.gather([])  # nobody writes before all have looked
        files = weight_files(model_name)
        if [header.get(key) for key in ("model", "settings", "files")] != [model_name, self.settings, files]:
            model = self.loading.load_model(model_name, PartialState().device).eval()
            weights = weights_digest(model)
            tokenizer = self.loading.load_tokenizer(model_name)
            arguments = self.suite.arguments(**self.asked)
            with self._precision_of_training(model):
                rows = ask(
                    model,
                    tokenizer,
                    self.rows,
                    lambda row: self.suite.parts(row, arguments),
                    prompt_template=self.config.prompt_template,
                    engine=engine,
                    progress=not self.config.disable_tqdm,
                    name=role,
                )
            if self.suite.judge:
                self.suite.judge(rows, arguments)
            if engine.process_index == 0:
                hashes = {"weights": weights, "questions": self.settings["questions"]}
                header = make_header(model_name, self.settings, 0, self.suite.name, files=files, **hashes)
                write_rows(path, rows, header)
        engine.gather([])
        header, rows = read_rows(path)
        self._weights[role] = header.get("weights")
        return rows

    @contextmanager
    def _precision_of_training(self, model: PreTrainedModel) -> Iterator[None]:
        """As the Trainer runs the unlearned models, so that rounding is no difference between them and the others."""
        config = self.config
        precision = choose_precision(model, config, config.float32_weights, keeper_of_weights(config, model))
        if "lora_rank" not in self.settings:
            precision.widen(model)
        dtype = torch.bfloat16 if precision.bf16 else torch.float16
        with torch.autocast(model.device.type, dtype, enabled=precision.bf16 or config.fp16):
            yield

    def _train(self, trainer: UnlearnTrainer, rows: list[dict], identity: dict, num_evaluations: int) -> None:
        args, rows_file = trainer.args, rows_file_of(trainer.args)
        is_tracked_already = _tracked_run() is not None
        if trainer.is_world_process_zero():
            rows_file.unlink(missing_ok=True)
            remove_record(args.output_dir)
        num_batches = args.num_train_epochs * len(trainer.get_train_dataloader())
        num_steps = args.max_steps if args.max_steps > 0 else math.ceil(num_batches / args.gradient_accumulation_steps)
        args.eval_strategy, args.eval_on_start = IntervalStrategy.STEPS, True
        args.eval_steps = max(1, math.ceil(num_steps / num_evaluations))
        # The target was asked in the precision of training. Below an adapter it may be quantized, and differ.
        is_asked = identity["target"] == self.target and "lora_rank" not in self.settings
        first_rows = self.references_on(rows)["target"].rows if is_asked else None
        curve = EvalCallback(trainer, self.suite.name, rows, self.gold_rows, first_rows=first_rows, **self.asked)
        trainer.add_callback(curve)
        output = trainer.train(resume_from_checkpoint=_checkpoint(args, self.folder))
        num_seconds = output.metrics["train_runtime"] - curve.seconds
        if trainer.objectives.any("is_negated") or trainer.precision.dtypes:
            # A task vector is subtracted, and weights are rounded to 16 bits, after the training's last evaluation.
            curve.step = None
        if curve.step != trainer.state.global_step:
            trainer.evaluate()
        trainer.save_state()
        # No upload yet: the card is not whole.
        trainer.save_model(_internal_call=True)
        if trainer.is_world_process_zero():
            hashes = {"questions": identity["questions"]}
            if not trainer.engine.shards:
                hashes["weights"] = weights_digest(trainer.model)
            header = make_header(args.output_dir, identity, args.seed, self.suite.name, **hashes)
            header["seconds_per_step"] = num_seconds / max(trainer.state.global_step - curve.first_step, 1)
            self._write_record(trainer, header, curve.rows)
            write_rows(rows_file, curve.rows, header)
        # A folder is no model that the hub knows, and it refuses a card that names one.
        origin = None if Path(identity["target"]).is_dir() else identity["target"]
        trainer.create_model_card(finetuned_from=origin)
        if trainer.is_world_process_zero():
            self._complete_card(self._read(args, self.suite.name), Path(args.output_dir))
        if args.push_to_hub:
            trainer.push_to_hub()  # its card keeps what is in this one
        trainer.accelerator.wait_for_everyone()
        # Other trackers end their run by themselves. In this one's, the next model would go on.
        if not is_tracked_already and _tracked_run() is not None:
            sys.modules["wandb"].finish()

    def _write_record(self, trainer: UnlearnTrainer, header: dict, rows: list[dict]) -> None:
        roles = {"target": "before", "gold": "gold"}
        figures = {roles[role]: (self._weights[role], run.summary) for role, run in self.references_on(rows).items()}
        figures["after"] = (header.get("weights"), self.figures(rows))
        is_target = header["settings"]["target"] == self.target
        target_weights = self._weights["target"] if is_target else None
        write_run_record(trainer, self.suite.name, figures, target_weights, self.signing_key)

    def _read(self, config: UnlearnConfig, name: str) -> report.Run:
        header, rows = read_rows(rows_file_of(config))
        state = json.loads(Path(config.output_dir, "trainer_state.json").read_text(encoding="utf-8"))
        settings = {**header["settings"], "seconds_per_step": header["seconds_per_step"]}
        if until := state.get("stateful_callbacks", {}).get(UntilForgottenCallback.__name__):
            settings["forget_level"] = until["args"]["level"]
        return report.Run(name, self.figures(rows), rows, log_history=state["log_history"], settings=settings)


def _loading_of_attacks(loading: ModelArguments) -> dict[str, Any]:
    """Further fields of [`~attacks.running.AttackArguments`]: the target is the model here."""
    settings = loading.loading_settings()
    return {{"revision": "target_revision"}.get(name, name): value for name, value in settings.items()}


def rows_file_of(config: UnlearnConfig) -> Path:
    """Where the rows of a run lie: beside its folder."""
    folder = Path(config.output_dir)
    return folder.with_name(f"{folder.name}.rows.jsonl")


def same_rows(found: list[dict], rows: list[dict]) -> list[dict]:
    """Those of `found` that are of the same split and index as one of `rows`."""
    wanted = {(row["split"], row["index"]) for row in rows}
    return [row for row in found if (row["split"], row["index"]) in wanted]


def _tracked_run() -> object | None:
    """The run of Weights & Biases that is being written, if any."""
    return getattr(sys.modules.get("wandb"), "run", None)


def _checkpoint(args: UnlearnConfig, comparison: Path) -> str | bool | None:
    """
    Where a run resumes: `--resume_from_checkpoint` names a checkpoint, maybe that of another run of the comparison, or
    says True. A run that has no checkpoint begins.
    """
    wanted, folder = args.resume_from_checkpoint, Path(args.output_dir)
    if not wanted:
        return None
    if wanted is True or wanted.lower() == "true":
        return any(folder.glob("checkpoint-*")) or None
    if not Path(wanted).is_dir():
        raise ValueError(f"`resume_from_checkpoint`={wanted!r}: no such folder.")
    if not Path(wanted).resolve().is_relative_to(comparison.resolve()):
        raise ValueError(
            f"`resume_from_checkpoint`={wanted!r} is of no run in {comparison}: name one of its checkpoints, or the "
            "folder of its comparison as `output_dir`."
        )
    return wanted if Path(wanted).resolve().parent == folder.resolve() else None
