"""Asks models under attacks: one `rows.jsonl` a model and attack, none of them made twice."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from soul_trainer.loading import default_device

from ..evaluation import ask
from ..models import ModelArguments, setup_digest, weights_digest
from ..rows import make_header, read_rows, write_rows
from ..running import finished_rows, questions_digest
from ..suites.base import Part, Suite
from .prompting import ask_rest, attacked_parts, transforms
from .quantization import load_quantized, rounded_weights
from .relearning import RelearningArguments, relearned_weights, rows_to_relearn


PLAIN, PREFIX = "plain", "prefix"
# On questions that the suite asks; the second trains on something that has nothing to do with what was forgotten.
RELEARNING, RELEARNING_UNRELATED = "relearning", "relearning_unrelated"
QUANTIZATION = {"quantization_8": 8, "quantization_4": 4}
WEIGHT_ATTACKS = (RELEARNING, RELEARNING_UNRELATED, *QUANTIZATION)
PROMPT_ATTACKS = ("paraphrase", "few_shot", "role_play", "role_play_few_shot", PREFIX)
ATTACKS = (*WEIGHT_ATTACKS, *PROMPT_ATTACKS)
ROUNDING, BITSANDBYTES = "rounding", "bitsandbytes"
# Marks the rows that a relearning attack has trained on.
RELEARNT = "relearnt"


@dataclass
class AttackArguments(ModelArguments):
    """The models, the attacks and their settings."""

    model: str = field(metadata={"help": "Folder or hub id of the unlearned model or adapter."})
    target: str = field(metadata={"help": "The model before unlearning."})
    output: str = field(metadata={"help": "Folder: ATTACK/rows.jsonl of each attack, and attacks.json."})
    reference: str | None = field(
        default=None, metadata={"help": "Gold model that never saw the rows: attacked alike, as a control."}
    )
    attacks: str = field(default=",".join(ATTACKS), metadata={"help": "Some of these, by commas."})
    splits: str = field(default="forget", metadata={"help": "Splits to ask, by commas; forget must be one."})
    quantizer: str = field(default=ROUNDING, metadata={"help": "rounding, to nearest and simulated, or bitsandbytes."})
    group_size: int = field(default=128, metadata={"help": "Weights that share a scale, 4 bits, by rounding."})
    num_shots: int = field(default=3, metadata={"help": "Examples of the retain set before a question."})
    prefix_tokens: int = field(default=3, metadata={"help": "Tokens of the true answer given by the prefix attack."})
    unrelated_text: str | None = field(
        default=None,
        metadata={"help": "Text file, passages parted by empty lines, to relearn on; by default, world facts."},
    )
    batch_size: str = field(default="auto", metadata={"help": "Tokens in a batch, padding included, or auto."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda:1, ...; by default a GPU if there is one."})
    limit: int | None = field(default=None, metadata={"help": "Ask the first rows of each split only."})
    prompt_template: str | None = field(
        default=None, metadata={"help": "As in training; by default the tokenizer's chat template, else plain."}
    )
    seed: int = field(default=0, metadata={"help": "Of the examples drawn."})
    target_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of --target on the hub; --revision is that of --model."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace other results in the output folder."})

    def __post_init__(self):
        super().__post_init__()
        unknown = set(self.names) - set(ATTACKS)
        if unknown or not self.names:
            raise ValueError(f"--attacks {self.attacks}: choose some of {', '.join(ATTACKS)}.")
        if "forget" not in self.splits.split(","):
            raise ValueError(f"--splits {self.splits}: without forget there is nothing to recover.")
        if self.quantizer not in (ROUNDING, BITSANDBYTES):
            raise ValueError(f"--quantizer {self.quantizer} is unknown: use {ROUNDING} or {BITSANDBYTES}.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"`limit` must be at least 1, but it is {self.limit}.")

    def revision_of(self, name: str) -> str | None:
        """The revision of the model of this name."""
        return self.target_revision if name == self.target else super().revision_of(name)

    @property
    def names(self) -> list[str]:
        """The attacks, each once, in the order of `ATTACKS`."""
        given = [name.strip() for name in self.attacks.split(",") if name.strip()]
        return [name for name in ATTACKS if name in given] + [name for name in given if name not in ATTACKS]


@dataclass(frozen=True)
class Questions:
    """
    What is asked, whatever the model.

    Attributes:
        suite ([`~suites.base.Suite`]): Whose rows they are.
        own (`Any`): The suite's own settings.
        rows (`list[dict]`): Rows that no model has seen.
        shots (`list[dict]`): Examples to stand before them.
        unrelated (`list[dict]`): Rows to relearn on that have nothing to do with them.
    """

    suite: Suite
    own: Any
    rows: list[dict]
    shots: list[dict]
    unrelated: list[dict]


@dataclass(frozen=True)
class Attacker:
    """
    Asks models under attacks.

    Attributes:
        questions ([`Questions`]): What is asked.
        args ([`AttackArguments`]): How.
        relearning ([`~relearning.RelearningArguments`]): How relearning trains.
    """

    questions: Questions
    args: AttackArguments
    relearning: RelearningArguments

    def ask(
        self,
        name: str,
        attacks: list[str],
        folder_of: Callable[[str], Path],
        role: str = "",
        is_shared: bool = False,
    ) -> dict[str, list[dict]]:
        """
        Asks one model, as it is and under attacks; what is there already is read.

        Args:
            name (`str`): Folder or hub id of a model or an adapter, which is merged.
            attacks (`list[str]`): Of `ATTACKS`, and `"plain"`.
            folder_of (`Callable`): The folder of an attack's `rows.jsonl`.
            role (`str`, *optional*): What progress bars call the model; by default its name.
            is_shared (`bool`, *optional*, defaults to `False`):
                Whether several runs read these folders. Other results there are replaced, and `overwrite` is for those
                of a run alone.

        Returns:
            `dict[str, list[dict]]`: Rows by attack.

        Raises:
            ValueError: If a folder of one run holds other results and `overwrite` is not set.
        """
        args = self.args
        tokenizer = args.load_tokenizer(name)
        set_seed(args.seed)
        model = args.load_model(name, args.device or default_device()).eval()
        if hasattr(model, "merge_and_unload"):
            # An adapter froze what it is merged into, which relearning must be free to change.
            model = model.merge_and_unload().requires_grad_(True)
        headers, found = {}, {}
        weights = weights_digest(model)
        # All are looked at before the first is asked: a folder that is refused must not be found out after hours.
        for attack in attacks:
            headers[attack] = self._header(attack, name, weights, model, tokenizer)
            finished = self._finished(folder_of(attack) / "rows.jsonl", headers[attack], is_shared)
            if finished:
                found[attack] = finished[1]
        for attack in attacks:
            if attack not in found:
                path = folder_of(attack) / "rows.jsonl"
                rows = self._rows(attack, name, model, tokenizer, f"{role or Path(name).name}, {attack}")
                write_rows(path, rows, headers[attack])
                found[attack] = read_rows(path)[1]
        return found

    def _finished(self, path: Path, header: dict, is_shared: bool) -> tuple[dict, list[dict]] | None:
        if not is_shared:
            return finished_rows(path, header, self.args.overwrite)
        try:
            return finished_rows(path, header, overwrite=False)
        except ValueError:  # of another request
            return finished_rows(path, header, overwrite=True)

    def _header(self, attack: str, name: str, weights: str, model, tokenizer) -> dict:
        settings = {
            **{key: getattr(self.args, key) for key in ("prompt_template", "limit", "splits")},
            **asdict(self.questions.own),
            **self.args.loading_settings(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attack": attack,
            **self._settings(attack, tokenizer),
        }
        hashes = {"weights": weights, "setup": setup_digest(model, tokenizer)}
        hashes["questions"] = questions_digest(self.questions.rows)
        header = make_header(name, settings, self.args.seed, self.questions.suite.name, **hashes)
        return {**header, "device": str(model.device), "batch_size": self.args.batch_size}

    def _settings(self, attack: str, tokenizer: PreTrainedTokenizerBase) -> dict:
        """What an attack's rows depend on, besides what all depend on."""
        if attack in (RELEARNING, RELEARNING_UNRELATED):
            return {**asdict(self.relearning), "relearnt": questions_digest(self._relearnt(attack))}
        if attack in QUANTIZATION:
            return {"quantizer": self.args.quantizer, "group_size": self._group_size(attack)}
        if attack == PREFIX:
            return {"prefix_tokens": self.args.prefix_tokens}
        if attack == PLAIN:
            return {}
        parts_of = self._parts_of(attack, tokenizer)
        return {"asked": questions_digest([part.answers for row in self.questions.rows for part in parts_of(row)])}

    def _rows(
        self, attack: str, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, label: str
    ) -> list[dict]:
        rows, args, own = self.questions.rows, self.args, self.questions.own
        asking = {"batch_size": args.batch_size, "prompt_template": args.prompt_template, "name": label}
        if attack == PREFIX:
            return ask_rest(model, tokenizer, rows, args.prefix_tokens, own.generate, own.max_new_tokens, **asking)
        with self._attacked(attack, name, model, tokenizer) as attacked:
            rows = ask(attacked, tokenizer, rows, self._parts_of(attack, tokenizer), **asking)
        if attack == RELEARNING:
            used = {row["index"] for row in self._relearnt(attack)}
            rows = [{**row, RELEARNT: row["split"] == "forget" and row["index"] in used} for row in rows]
        return rows

    @contextmanager
    def _attacked(self, attack: str, name: str, model, tokenizer) -> Iterator[PreTrainedModel]:
        """The model with the weights that an attack gives it."""
        args = self.args
        if attack in (RELEARNING, RELEARNING_UNRELATED):
            learnt = self._relearnt(attack)
            with relearned_weights(model, tokenizer, learnt, self.relearning, args.prompt_template):
                yield model
        elif attack in QUANTIZATION and args.quantizer == ROUNDING:
            with rounded_weights(model, QUANTIZATION[attack], self._group_size(attack)):
                yield model
        elif attack in QUANTIZATION:
            yield load_quantized(name, QUANTIZATION[attack], model.device, args)
        else:
            yield model

    def _relearnt(self, attack: str) -> list[dict]:
        if attack == RELEARNING_UNRELATED:
            return self.questions.unrelated
        return rows_to_relearn([row for row in self.questions.rows if row["split"] == "forget"], self.relearning)

    def _group_size(self, attack: str) -> int | None:
        # With 8 bits, one scale for all inputs of an output is enough, and usual.
        return self.args.group_size if self.args.quantizer == ROUNDING and QUANTIZATION[attack] == 4 else None

    def _parts_of(self, attack: str, tokenizer: PreTrainedTokenizerBase) -> Callable[[dict], list[Part]]:
        suite, own = self.questions.suite, self.questions.own
        transform = transforms(self.questions.shots, tokenizer, self.args.prompt_template).get(attack)

        def parts_of(row: dict) -> list[Part]:
            parts = suite.parts(row, own)
            return attacked_parts(parts, transform, row) if transform else parts

        return parts_of
