"""What a run leaves behind besides weights: its settings, its end, its model card. Files are written whole."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import TrainingArguments

from .config import UnlearnConfig
from .markdown import markdown_code
from .objectives import Objectives
from .settings import ObjectiveArguments
from .soul_settings import SOUL_NAMES, SoulArguments


RUN_FILE = "unlearning.json"
OWNER_ONLY = 0o600  # of files with rows
_TAGS = ("machine-unlearning", "soul-trainer")
# In a model card, what follows was written after training, and stays.
_SECTION_END = "<!-- soul-trainer: end -->"
# What the Trainer writes of a model whose origin and data it does not know.
_FIRST_SENTENCE = re.compile(r"^This model (?:was trained from scratch|is a fine-tuned version of .+?) on .+\.$", re.M)
_HUB_ID = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")

# The settings of TrainingArguments that decide what a run learns; the others say how it is run.
_TRAINING_SETTINGS = (
    *("optim", "optim_args", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "bf16", "fp16", "seed", "data_seed"),
)


def write_whole(path: Path, text: str, mode: int = 0o644) -> None:
    """
    Writes a text file under another name and renames it, so that no reader meets half of it.

    Args:
        path (`Path`): The file.
        text (`str`): What goes in.
        mode (`int`, *optional*, defaults to `0o644`): Permissions, less the umask: `OWNER_ONLY` for rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def make_tokenizer_portable(folder: str | Path) -> None:
    """
    Has a saved tokenizer name a class that transformers before version 5 knows too: `TokenizersBackend` is that class
    under a later name, which older versions refuse.

    Args:
        folder (`str` or `Path`): Where a tokenizer may have been saved.
    """
    path = Path(folder) / "tokenizer_config.json"
    if not path.exists():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        write_whole(path, json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def training_settings(args: TrainingArguments) -> dict:
    """The settings of any training that another must repeat to get the same model."""
    return _plain({name: getattr(args, name) for name in _TRAINING_SETTINGS})


def run_settings(args: UnlearnConfig) -> dict:
    """The settings that another run must repeat to get the same model."""
    inherited = {setting.name for setting in fields(TrainingArguments)}
    objectives = Objectives.named(args.forget_loss, args.retain_loss)
    idle = {setting.name for setting in fields(ObjectiveArguments)}
    idle -= {name for objective in objectives if objective for name in objective.settings}
    if not objectives.any("needs_reference"):
        idle |= {"reference", "reference_topk"}
    if args.optim not in SOUL_NAMES:
        idle |= {setting.name for setting in fields(SoulArguments)}
    own = [
        setting.name
        for setting in fields(args)
        if setting.name not in inherited | idle | {"overwrite", "allow_other_run"}
    ]
    values = {name: getattr(args, name) for name in own}
    if args.optim in SOUL_NAMES:
        values |= asdict(args.resolved())
    return _plain(values) | training_settings(args)


def _plain(values: dict) -> dict:
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


def make_way(folder: str, overwrite: bool, is_main_process: bool) -> None:
    """
    Makes way for a new run in its folder: with `overwrite`, removes a finished run's mark and its checkpoints, which a
    later resume would take for those of the new run.

    Raises:
        ValueError: If a finished run is there and `overwrite` is not set.
    """
    folder = Path(folder)
    if not overwrite and (folder / RUN_FILE).exists():
        raise ValueError(
            f"`output_dir`={str(folder)!r} holds a finished run: set `overwrite=True` (--overwrite) to replace it, or "
            "choose another folder."
        )
    if overwrite and is_main_process:
        (folder / RUN_FILE).unlink(missing_ok=True)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def record_run(folder: str, args: UnlearnConfig, metrics: dict[str, float]) -> None:
    """Marks the run in a folder as finished, with its settings and the Trainer's metrics."""
    record = {"settings": run_settings(args), "metrics": metrics}
    write_whole(Path(folder) / RUN_FILE, json.dumps(record, indent=2) + "\n")


def read_model_card(folder: str) -> ModelCard | None:
    """The model card in a folder, before the Trainer writes its own in its place."""
    path = Path(folder) / "README.md"
    return ModelCard.load(path) if path.exists() else None


@dataclass(frozen=True)
class Provenance:
    """
    What a model card says of where a model comes from: names and numbers, never paths or texts.

    Attributes:
        base (`str`, *optional*): Hub id or folder of the model that was made to forget.
        num_rows (`Mapping[str, int]`): Rows that training used, by `forget` and `retain`.
        names (`Mapping[str, str]`): What these are called, by the same keys: hub ids, file names.
    """

    base: str | None = None
    num_rows: Mapping[str, int] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def hub_id(self) -> str | None:
        """The model on the hub that this one comes from, if need be by way of a local model's own card."""
        if self.base is None or not is_local(self.base):
            return self.base
        card = read_model_card(self.base)
        parent = card.data.get("base_model") if card else None
        return parent if isinstance(parent, str) and not is_local(parent) else None

    def __str__(self) -> str:
        link = f"[{self.hub_id}](https://huggingface.co/{self.hub_id})" if self.hub_id else ""
        origin = link
        if self.base and is_local(self.base):
            origin = f"the local model {markdown_code(public_name(self.base))}" + (
                f", which comes from {link}," if link else ""
            )
        verbs = {"forget": "{} were to be forgotten", "retain": "{} to be kept"}
        parts = [verbs[part].format(self._rows(part)) for part in verbs if self.num_rows.get(part)]
        made = f"This model was made{f' from {origin}' if origin else ''} by machine unlearning"
        return f"{made}{': ' if parts else ''}{', and '.join(parts)}."

    def _rows(self, part: str) -> str:
        number, name = self.num_rows[part], self.names.get(part)
        return f"{number} row{'' if number == 1 else 's'}" + (f" of {markdown_code(name)}" if name else "")


def is_local(name: str) -> bool:
    """Whether a model or dataset is a folder or a file of this machine, and no id on the hub."""
    return Path(name).exists() or _HUB_ID.fullmatch(name) is None


def public_name(source: str) -> str:
    """What a card calls a source: a hub id as it is, with configuration and split if it has any; of a path its end."""
    name, colon, rest = source.partition(":")
    if colon and len(name) > 1 and not Path(source).exists():
        return public_name(name) + colon + rest
    return Path(source).name if is_local(source) else source


def complete_model_card(args: UnlearnConfig, before: ModelCard | None, provenance: Provenance | None = None) -> None:
    """
    Adds to the model card that the Trainer wrote to `output_dir` where the model comes from, the method, its settings
    and tags, and what the card before had and the Trainer does not know: metadata, such as base model and datasets,
    and what comes after the settings, such as the figures of an evaluation.

    Args:
        args ([`UnlearnConfig`]): Of the run.
        before ([`~huggingface_hub.ModelCard`], *optional*): The card that was there before the Trainer's.
        provenance ([`Provenance`], *optional*): Of the model. Without it, the Trainer's sentence stays.
    """
    path = Path(args.output_dir) / "README.md"
    card = ModelCard.load(path)
    known = before.data.to_dict() if before else {}
    tags = [*(card.data.tags or []), *_TAGS, *(known.get("tags") or [])]
    # peft names the base model by where it was loaded from.
    card.data.tags = [tag for tag in dict.fromkeys(tags) if not (tag.startswith("base_model:") and _has_path(tag))]
    base = card.data.get("base_model")
    if provenance:
        card.data["base_model"] = provenance.hub_id
        card.text = _FIRST_SENTENCE.sub(lambda _: str(provenance), card.text, count=1)
    elif isinstance(base, str) and is_local(base):
        card.data["base_model"] = None
    for name, value in known.items():
        if card.data.get(name) is None and not (name == "base_model" and isinstance(value, str) and is_local(value)):
            card.data[name] = value
    settings = {name: _public_value(value) for name, value in run_settings(args).items()}
    rows = "\n".join(f"| {markdown_code(name)} | {markdown_code(value)} |" for name, value in settings.items())
    section = f"## Unlearning\n\nMade to forget with soul-trainer.\n\n| setting | value |\n|---|---|\n{rows}\n"
    after = before.text.partition(_SECTION_END)[2].strip() if before else ""
    card.text = f"{card.text.rstrip()}\n\n{section}\n{_SECTION_END}\n" + (f"\n{after}\n" if after else "")
    write_whole(path, str(card))


def _public_value(value: object) -> object:
    """A setting, but of a file only its name."""
    is_path = isinstance(value, str) and os.sep in value and Path(value).exists()
    return public_name(value) if is_path else value


def _has_path(tag: str) -> bool:
    return is_local(tag.rpartition(":")[2])
