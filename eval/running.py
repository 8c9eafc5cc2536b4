"""Runs a suite on a model: loads both, goes on where an earlier run was stopped, writes rows and figures."""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import set_seed
from transformers.utils import logging

from soul_trainer.engines import Engine
from soul_trainer.held_folder import hold_folder
from soul_trainer.loading import default_device

from .evaluation import ask
from .general import check_tasks, general_ability
from .input_methods import NONE, InputArguments, InputMethod, load_input_method
from .journal import Journal
from .models import ModelArguments, setup_digest, weights_digest
from .rows import make_header, read_rows, write_rows, write_whole
from .scoring import check_batch_size
from .statistics import Figure
from .suites.base import Suite


logger = logging.get_logger(__name__)

# What a row is made of; rows of other values are other rows.
IDENTITY = ("format", "suite", "weights", "setup", "questions", "settings")
GENERAL = ("general", "include_path")
# What a model is told by; others of its rows are another model's.
MODEL = {"weights", "setup"}


@dataclass
class EvalArguments(ModelArguments):
    """The model that is evaluated, and how."""

    model: str = field(metadata={"help": "Folder or hub id of a causal language model or an adapter."})
    output: str = field(metadata={"help": "Folder for rows.jsonl and summary.json."})
    reference: str | None = field(default=None, metadata={"help": "rows.jsonl of the gold model, to compare with."})
    batch_size: str = field(default="auto", metadata={"help": "Tokens in a batch, padding included, or auto."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda:1, ...; by default a GPU if there is one."})
    limit: int | None = field(default=None, metadata={"help": "Evaluate the first rows of each split only."})
    prompt_template: str | None = field(
        default=None, metadata={"help": "As in training; by default the tokenizer's chat template, else plain."}
    )
    general: str | None = field(
        default=None, metadata={"help": "lm-eval tasks or sets besides, by commas: soul, wikitext, mmlu, wmdp, ..."}
    )
    include_path: str | None = field(default=None, metadata={"help": "Folder of lm-eval tasks of your own."})
    seed: int = field(default=0, metadata={"help": "Recorded with the rows; draws the examples of in_context."})
    overwrite: bool = field(default=False, metadata={"help": "Replace other results in the output folder."})

    def __post_init__(self):
        super().__post_init__()
        check_batch_size(self.batch_size)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"`limit` must be at least 1, but it is {self.limit}.")


def run_suite(
    suite: Suite, args: EvalArguments, own: Any, inputs: InputArguments | None = None
) -> tuple[dict, list[dict]] | None:
    """
    Evaluates a model on a suite, or finds that it has been.

    Args:
        suite ([`~suites.base.Suite`]): What to ask.
        args ([`EvalArguments`]): Whom to ask.
        own (`Any`): The suite's own settings.
        inputs ([`~input_methods.InputArguments`], *optional*): What stands before each prompt; by default nothing.

    Returns:
        `tuple[dict, list[dict]]`: Header and rows, as they are in `rows.jsonl`; `None` on other processes than the
        first.

    Raises:
        ValueError: If the folder holds other results and `overwrite` is not set or another command writes to it, or
            the reference is of other rows.
    """
    engine = _engine(args)
    with hold_folder(args.output, engine):
        return _run_suite(suite, args, own, inputs or InputArguments(), engine)


def _run_suite(
    suite: Suite, args: EvalArguments, own: Any, inputs: InputArguments, engine: Engine | None
) -> tuple[dict, list[dict]] | None:
    if args.general:
        if inputs.input_method != NONE:
            raise ValueError("lm-eval asks the model without `input_method`: leave out `general`, or that.")
        check_tasks(args.general.split(","), args.include_path)
    tokenizer = args.load_tokenizer(args.model)
    rows = [row for row in suite.load(own, tokenizer) if args.limit is None or row["index"] < args.limit]
    if not rows:
        raise ValueError(f"The suite {suite.name} has no rows with these settings.")
    if args.reference and suite.check_reference:
        # Before the model runs: a reference of other rows would only be found out afterwards.
        suite.check_reference(rows, read_rows(args.reference)[1])
    method = load_input_method(inputs, tokenizer, args.prompt_template, args.seed)
    set_seed(args.seed)
    device = engine.accelerator.device if engine else args.device or default_device()
    model = args.load_model(args.model, device).eval()
    header = _header(suite, args, own, model, tokenizer, rows, method)
    path = Path(args.output) / "rows.jsonl"
    is_main = engine is None or engine.process_index == 0
    # The first process alone looks and moves: files that are moved while others look would be there for some.
    finished = finished_rows(path, header, args.overwrite) if is_main else None
    if is_main and finished is None:
        (path.parent / "summary.json").unlink(missing_ok=True)
        for piece in path.parent.glob(f"{path.name}.part-*") if args.overwrite else ():
            piece.unlink()
    if engine.gather([finished is not None] if is_main else [])[0] if engine else finished:
        return finished
    identity = json.loads(json.dumps({key: header[key] for key in IDENTITY}))
    # lm-eval comes last, and what was found before it is good for any of its tasks.
    identity["settings"] = {key: identity["settings"][key] for key in identity["settings"] if key not in GENERAL}
    journal = Journal(path, identity, *((engine.process_index, engine.gather) if engine else ()))
    if journal.is_stale and is_main:
        logger.warning(f"{path.parent} held unfinished rows of other weights or settings: it starts anew.")
    if journal.done and is_main:
        logger.warning(f"{path.parent}: going on after {len(journal.done)} findings of a run that was stopped.")

    def parts_of(row: dict) -> list:
        return suite.parts(row, own)

    asking = {"engine": engine, "journal": journal, "transform": method and method.transform}
    asking["name"] = Path(args.model).name
    try:
        rows = ask(model, tokenizer, rows, parts_of, args.batch_size, args.prompt_template, **asking)
    finally:
        journal.close()
    general = _general_ability(args, model, tokenizer, engine)
    if not is_main:
        return None
    if suite.judge:
        suite.judge(rows, own)
    write_rows(path, rows, {**header, "general": general})
    journal.remove()
    return read_rows(path)


def write_summary(folder: Path, figures: dict[str, Figure]) -> None:
    """Writes `summary.json`: each figure's value, number of rows and interval."""
    entries = {name: figure.to_json() for name, figure in figures.items()}
    write_whole(folder / "summary.json", json.dumps(entries, indent=2, allow_nan=False) + "\n")


def questions_digest(rows: list[dict]) -> str:
    """A hash of rows that no model has seen."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def finished_rows(path: Path, header: dict, overwrite: bool) -> tuple[dict, list[dict]] | None:
    """
    Header and rows that are there already, of the same model, questions and settings.

    Args:
        path (`Path`): The rows' file to be.
        header (`dict`): Of what is to be evaluated.
        overwrite (`bool`): Whether what is there is of no interest.

    Returns:
        `tuple[dict, list[dict]]`: `None` if there are none. Rows of other weights are moved out of the way first.

    Raises:
        ValueError: If the file holds rows of other questions or settings, and `overwrite` is not set.
    """
    if not path.exists():
        return None
    found, rows = read_rows(path)
    now = json.loads(json.dumps(header))
    differing = [key for key in IDENTITY if found.get(key) != now[key]]
    if not differing and not overwrite:
        logger.warning(f"{path} holds all rows of these weights already.")
        return found, rows
    if overwrite:
        path.unlink()
    elif set(differing) <= MODEL:
        former = hashlib.sha256(f"{found.get('weights')} {found.get('setup')}".encode()).hexdigest()
        kept = path.with_name(f"rows.{former[:12]}.jsonl")
        os.replace(path, kept)
        logger.warning(
            f"The {' and '.join(differing)} of {header['model']} have changed since {path} was written: it starts "
            f"anew. The former rows are in {kept.name} now."
        )
    else:
        raise ValueError(
            f"{path.parent} holds results of another {' and '.join(differing)}: add --overwrite, or choose another "
            "folder."
        )
    return None


def _engine(args: EvalArguments) -> Engine | None:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    if args.device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device {args.device}: several processes choose their own devices; use cpu or cuda.")
    return Engine(PartialState(cpu=(args.device or default_device()) == "cpu"))


def _header(
    suite: Suite, args: EvalArguments, own: Any, model, tokenizer, rows: list[dict], method: InputMethod | None
) -> dict:
    names = ("prompt_template", "limit", *GENERAL)
    settings = {**{name: getattr(args, name) for name in names}, **asdict(own)}
    if method:  # without one, headers are as they were before there were any
        settings |= method.settings
    # Those that are open have no entry, so that headers are as they were before there were any.
    settings |= {**args.loading_settings(), "dtype": str(model.dtype).removeprefix("torch.")}
    hashes = {"weights": weights_digest(model), "setup": setup_digest(model, tokenizer)}
    hashes["questions"] = questions_digest(rows)
    header = make_header(args.model, settings, args.seed, suite.name, **hashes)
    return {**header, "device": str(model.device), "batch_size": args.batch_size}


def _general_ability(args: EvalArguments, model, tokenizer, engine: Engine | None) -> dict[str, dict]:
    if not args.general:
        return {}
    tasks = args.general.split(",")
    figures = general_ability(model, tokenizer, tasks, args.limit, include_path=args.include_path)
    return {re.sub(r"\W+", "_", name): figure.to_json() for name, figure in figures.items()}
