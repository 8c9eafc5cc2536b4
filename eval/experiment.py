"""
What recipes share: settings from the command line and from files, a run for each optimizer, the report.

A recipe names its rows and its models; see `recipes/tofu.py`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from soul_trainer import UnlearnConfig, UnlearnTrainer
from soul_trainer.engines import Engine
from soul_trainer.held_folder import hold_folder
from soul_trainer.loading import is_adapter
from soul_trainer.sampling import SamplingConfig, add_alternates
from soul_trainer.soul_settings import SOUL_NAMES

from .adapters import LoraArguments
from .attacks.after import ATTACKS, check_attacks
from .comparison import Comparison
from .evidence.callback import RecordCallback
from .evidence.envelope import load_signing_key
from .general import check_tasks
from .levels import EPOCHS, check_until, lengthen, until_callback
from .models import ModelArguments
from .report import Run
from .settings_files import DEFAULTS_FILE, SettingsParser, settings_file
from .suites.own import load


logger = logging.get_logger(__name__)

# The optimizers of a comparison, as the report calls them.
OPTIMIZERS = {"adamw_torch": "AdamW", "soul": "SOUL"}
# SOUL's control, which has all of it but the curvature, and the settings that make an optimizer of its name.
NO_CURVATURE = "soul_none"
_SETTINGS_OF = {NO_CURVATURE: {"optim": "soul", "rule": "none"}}


def _with_alternates(
    forget: Dataset, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: UnlearnConfig
) -> Dataset:
    if "alternate" in forget.column_names:
        return forget
    sampling = SamplingConfig(seed=config.seed)
    return add_alternates(forget, model, tokenizer, config=sampling, engine=Engine(PartialState()))


# What a forget loss needs besides the rows, made by the model that must forget, before training:
# (forget rows, model, tokenizer, config) -> forget rows.
PREPARATIONS: dict[str, Callable[[Dataset, PreTrainedModel, PreTrainedTokenizerBase, UnlearnConfig], Dataset]] = {
    "altpo": _with_alternates,
}


@dataclass
class ExperimentArguments(LoraArguments, ModelArguments):
    """What every recipe asks. A recipe adds fields, and may give these a help of its own."""

    config: str | None = field(
        default=None,
        metadata={"help": "YAML file of settings; by default the task's for the optimizer and the forget loss."},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id or local folder; by default a corpus of our own."}
    )
    model: str | None = field(default=None, metadata={"help": "The model that must forget: hub id or folder."})
    gold: str | None = field(default=None, metadata={"help": "The model that never learnt it: hub id or folder."})
    limit: int | None = field(default=None, metadata={"help": "Ask the first rows of each split only."})
    general: str = field(
        default="",
        metadata={
            "help": "lm-eval tasks or sets that all models are asked at the end, by commas: soul, wikitext, mmlu, ..."
        },
    )
    include_path: str | None = field(default=None, metadata={"help": "Folder of lm-eval tasks of your own."})
    evaluations: int = field(default=4, metadata={"help": "Evaluations after the start of a run, for the curves."})
    until: str = field(
        default=EPOCHS,
        metadata={
            "help": "When a run ends: epochs (after num_train_epochs), forgotten (when the rows to forget are as "
            "improbable as for the gold model, or as an estimate of it), or a probability of the rows to forget."
        },
    )
    max_utility_loss: float = field(
        default=0.1,
        metadata={
            "help": "With --until: the largest share of the probability of the rows to keep that a run may lose, in "
            "[0, 1]. The best weights within the limit are kept."
        },
    )
    never_learnt: str | None = field(
        default=None,
        metadata={
            "help": "With --until forgotten and no gold model: a file, folder or hub dataset with rows like those to "
            "forget that the model never learnt."
        },
    )
    attacks: str = field(
        default="",
        metadata={
            "help": f"Attacks on each unlearned model, by commas: {', '.join(ATTACKS)}. They end up in the report."
        },
    )
    signing_key: str | None = field(
        default=None,
        metadata={"help": "PEM file of an Ed25519 key, which signs the record of each run (docs/evidence.md)."},
    )
    stop_at_forget_loss: str | None = field(
        default=None, metadata={"help": "Removed: use --until forgotten or --until PROBABILITY."}
    )

    def __post_init__(self):
        super().__post_init__()
        ModelArguments.__post_init__(self)
        for name in ("gold", "tokenizer"):
            if getattr(self, name) and not self.model:
                raise ValueError(
                    f"`{name}` (--{name}) needs `model` (--model): without it, models and a tokenizer are made here."
                )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"`limit` must be at least 1, but it is {self.limit}.")
        if self.evaluations < 1:
            raise ValueError(f"`evaluations` must be at least 1, but it is {self.evaluations}.")
        check_until(self.until)
        check_attacks(self.attack_names)
        if self.signing_key:
            load_signing_key(self.signing_key)  # rather now than after the training
        if not 0 <= self.max_utility_loss <= 1:
            raise ValueError(f"`max_utility_loss` must be between 0 and 1, but it is {self.max_utility_loss}.")
        if self.stop_at_forget_loss is not None:
            raise ValueError(
                "`stop_at_forget_loss` was removed: write `until: forgotten` (--until forgotten) in the place of "
                "'gold', or a probability of the rows to forget in the place of a loss."
            )

    @property
    def attack_names(self) -> list[str]:
        """The attacks, one by one."""
        return _names(self.attacks)

    @property
    def general_tasks(self) -> list[str]:
        """The tasks of lm-eval, one by one."""
        return _names(self.general)

    def training_settings(self) -> dict:
        """What a run depends on besides its [`UnlearnConfig`], if it differs from the default."""
        stop = {}
        if self.until != EPOCHS:
            stop = {name: getattr(self, name) for name in ("until", "max_utility_loss", "never_learnt")}
        return stop | self.lora_settings() | self.loading_settings()


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@dataclass
class UnlearningTask:
    """
    What a recipe hands over to its experiment.

    Attributes:
        suite (`str`): Name of the suite that asks the models.
        title (`str`): Of the report.
        target (`str`): Hub id or folder of the model that must forget.
        forget ([`~datasets.Dataset`]): Rows to forget, in any format of `soul_trainer.formats`.
        retain ([`~datasets.Dataset`]): Rows whose knowledge is to be kept.
        rows (`list[dict]`): The suite's rows, unscored.
        asked (`dict`, *optional*): Fields of the suite's arguments.
        gold (`str`, *optional*): Hub id or folder of the model that never learnt the forget rows.
        held_out ([`~datasets.Dataset`], *optional*): Rows that the target knows and training never sees; with `until`,
            what may be lost is measured on them.
        settings (`dict`, *optional*): What else results depend on: those of other settings are not used again.
        notes (`Sequence[str]`, *optional*): Paragraphs under the title of the report.
        originals (`Mapping[str, Iterable[Mapping]]`, *optional*):
            `forget` and `retain` as their owner has them, for the record, where training takes them in another form.
        names (`Mapping[str, str]`, *optional*):
            What model cards call `forget` and `retain`; see [`~soul_trainer.records.public_name`].
    """

    suite: str
    title: str
    target: str
    forget: Dataset
    retain: Dataset
    rows: list[dict]
    asked: dict = field(default_factory=dict)
    gold: str | None = None
    held_out: Dataset | None = None
    settings: dict = field(default_factory=dict)
    notes: Sequence[str] = ()
    originals: Mapping[str, Iterable[Mapping]] | None = None
    names: Mapping[str, str] = field(default_factory=dict)


class Experiment:
    """
    A recipe's runs. Settings are those of the command line, over those of the file, over the task's defaults:

    1. `<configs>/<task>/defaults.yaml` or, without a `model`, `<configs>/<task>/small/defaults.yaml`;
    2. `--config FILE` or, without it, `<optimizer>_<forget_loss>.yaml` of the same folder, else `<optimizer>.yaml`,
       where the optimizer is `soul` or, for all others, `adamw`;
    3. the command line.

    AdamW and SOUL run one after the other, unless one of these names an optimizer (of 2., only `--config`).

    Args:
        task (`str`): Name of the folder of settings, and of the default `output_dir`, `outputs/<task>`.
        configs (`Path`): The folder of all tasks' settings.
        *dataclasses (`type`): The recipe's settings, first a subclass of [`ExperimentArguments`].
        command_line (`Sequence[str]`, *optional*): By default that of the process.
        with_control (`bool`, *optional*, defaults to `False`): Whether SOUL without curvature runs too.

    Attributes:
        arguments (`tuple`): An instance of each of `dataclasses`.
        config ([`UnlearnConfig`]): That of the first run, but with the `output_dir` of all.
        folder (`Path`): Where rows, runs and the report go: `output_dir`.
        optimizers (`dict[str, str]`): Optimizers that run, and their names in the report.

    Raises:
        ValueError: If a file or a value is unusable; see [`~settings_files.SettingsParser.read`].
    """

    def __init__(
        self,
        task: str,
        configs: Path,
        *dataclasses: type,
        command_line: Sequence[str] | None = None,
        with_control: bool = False,
    ):
        self.task = task
        self._parser = SettingsParser((*dataclasses, UnlearnConfig))
        self._named = self._parser.named(command_line)
        chosen = self._named.get("config")
        self._chosen = None if chosen is None else self._parser.read(chosen)
        given = (self._chosen or {}) | self._named
        self._folder = Path(configs, task) if given.get("model") else Path(configs, task, "small")
        self._defaults = {"output_dir": f"outputs/{task}"}
        if (defaults := self._folder / DEFAULTS_FILE).is_file():
            self._defaults |= self._parser.read(defaults)
        optimizer = (self._defaults | given).get("optim")
        self.optimizers = {optimizer: OPTIMIZERS.get(optimizer, optimizer)} if optimizer else dict(OPTIMIZERS)
        # The published settings are of the published rule, which has no such control.
        if with_control and not optimizer and "rule" not in given and not given.get("model"):
            self.optimizers = {"adamw_torch": "AdamW", NO_CURVATURE: "no curvature", "soul": "SOUL"}
        *arguments, self.config = self._parse(next(iter(self.optimizers)))
        self.arguments = tuple(arguments)
        self.folder = Path(self.config.output_dir)
        self._prepared_rows: dict[tuple, Dataset] = {}
        # accelerate's state is made by the first who asks, and must know of --use_cpu.
        _ = self.config.device

    def settings(self, optimizer: str) -> UnlearnConfig:
        """The settings of an optimizer's run, whose `output_dir` is a folder of the experiment's."""
        *_, config = self._parse(optimizer)
        config.output_dir = str(self.folder / optimizer)
        # Runs that share a name would be one run to a tracker, and one repository on the hub.
        config.run_name = "-".join(filter(None, (config.run_name or self.task, optimizer, config.forget_loss)))
        if config.hub_model_id and len(self.optimizers) > 1:
            config.hub_model_id += f"-{optimizer}"
        elif config.push_to_hub and not config.hub_model_id:
            config.hub_model_id = config.run_name
        return config

    def run(self, task: UnlearningTask) -> list[Run]:
        """
        Unlearns with each optimizer, or finds that done, and writes the report.

        Args:
            task ([`UnlearningTask`]): What to forget.

        Returns:
            `list[Run]`: The unlearned models.
        """
        with self.hold():
            return self._run(task)

    def hold(self) -> AbstractContextManager:
        """A context in which no other command writes to the experiment's folder."""
        return hold_folder(self.folder, Engine(PartialState()))

    def _run(self, task: UnlearningTask) -> list[Run]:
        comparison = self.compare(task)
        for optimizer, name in self.optimizers.items():
            config = self.settings(optimizer)
            self.lengthen(config, task.forget)
            make_trainer = partial(self.make_trainer, task, config)
            comparison.unlearn(name, config, make_trainer, self.arguments[0].evaluations)
            if names := self.arguments[0].attack_names:
                comparison.attack(config, names)
        comparison.write_report(task.title, task.notes)
        return comparison.runs

    def lengthen(self, config: UnlearnConfig, forget: Dataset) -> None:
        """Gives a run that stops by itself enough epochs for that, unless the command line says how many there are."""
        if self.arguments[0].until != EPOCHS and "num_train_epochs" not in self._named:
            lengthen(config, len(forget))

    def compare(self, task: UnlearningTask) -> Comparison:
        """A [`Comparison`] of the task, in which target and gold have been asked."""
        args = self.arguments[0]
        if args.general_tasks:
            check_tasks(args.general_tasks, args.include_path)
        rows = [row for row in task.rows if args.limit is None or row["index"] < args.limit]
        settings = {
            "data": fingerprint({"forget": task.forget, "retain": task.retain}),
            "prompt_template": self.config.prompt_template,
            **args.training_settings(),
            **task.settings,
        }
        return Comparison(
            *(self.folder, task.target, task.gold, task.suite, rows, task.asked, settings, self.config),
            loading=args,
            signing_key=args.signing_key and load_signing_key(args.signing_key),
            general={"tasks": args.general_tasks, "limit": args.limit, "include_path": args.include_path},
        )

    def make_trainer(self, task: UnlearningTask, config: UnlearnConfig, for_search: bool = False) -> UnlearnTrainer:
        """
        The trainer of a run, with the rows as its forget loss needs them.

        Args:
            task ([`UnlearningTask`]): What to forget.
            config ([`UnlearnConfig`]): From [`Experiment.settings`].
            for_search (`bool`, *optional*, defaults to `False`):
                Whether the trainer loads the model anew for each trial of a search for settings.
        """
        args = self.arguments[0]
        tokenizer = args.load_tokenizer(task.target)
        forget = self._prepared(task, tokenizer, config)
        # Adapters of a former request are trained on; the others begin anew.
        load_target = partial(args.load_model, task.target)
        trainer = UnlearnTrainer(
            # A search passes its trial to whatever takes an argument.
            **({"model_init": lambda: load_target()} if for_search else {"model": load_target()}),
            args=config,
            forget_dataset=forget,
            retain_dataset=task.retain,
            processing_class=tokenizer,
            eval_dataset={"forget": forget},
            peft_config=None if is_adapter(task.target) else args.peft_config(),
        )
        trainer.origin = task.target
        trainer.data_names = task.names
        rows = task.originals or {"forget": task.forget, "retain": task.retain}
        trainer.add_callback(RecordCallback(task.target, rows, args.training_settings()))
        if args.until != EPOCHS:
            gold = args.load_model(task.gold) if task.gold else None
            unlearnt = None if args.never_learnt is None else load(args.never_learnt, name="never_learnt")
            trainer.add_callback(
                until_callback(trainer, args.until, forget, gold, unlearnt, task.held_out, args.max_utility_loss)
            )
        return trainer

    def _prepared(self, task: UnlearningTask, tokenizer: PreTrainedTokenizerBase, config: UnlearnConfig) -> Dataset:
        prepare = PREPARATIONS.get(config.forget_loss)
        if prepare is None:
            return task.forget
        key = (config.forget_loss, task.target, config.seed, fingerprint({"forget": task.forget}))
        if key not in self._prepared_rows:
            model = self.arguments[0].load_model(task.target, config.device).eval()
            self._prepared_rows[key] = prepare(task.forget, model, tokenizer, config)
        return self._prepared_rows[key]

    def _parse(self, optimizer: str) -> tuple:
        own = _SETTINGS_OF.get(optimizer, {"optim": optimizer})
        values = self._defaults | own
        if self._chosen is not None:
            return self._parser.build(values | self._chosen | self._named, self._named)
        forget_loss = (self._defaults | self._named).get("forget_loss", UnlearnConfig.forget_loss)
        file = settings_file(self._folder, own["optim"] if own["optim"] in SOUL_NAMES else "adamw", forget_loss)
        found = self._parser.read(file) if file else {}
        if file and not file.stem.endswith(f"_{forget_loss}"):
            logger.warning_once(f"There are no settings of forget_loss={forget_loss} with {optimizer}: {file} it is.")
        return self._parser.build(values | found | own | self._named, self._named)


def fingerprint(*parts: dict[str, Dataset]) -> str:
    """A short hash of rows."""
    rows = [{split: dataset.to_list() for split, dataset in part.items()} for part in parts]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]
