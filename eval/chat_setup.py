"""Which models and rows the page of `soul_eval.chat` shows: those of a recipe's output folder, or named one by one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .rows import FORMAT, read_rows


TARGET, UNLEARNED, GOLD = "target", "unlearned", "gold"
# How a prompt is read: through the template of question/answer rows, as it is, or as a list of messages.
QUESTION, TEXT, CONVERSATION = KINDS = ("question", "text", "conversation")
ROWS_ENDING = ".rows.jsonl"
# Settings of a run that its models are loaded with. That code of a model may run is for whoever runs it to say.
LOADING = ("dtype", "tokenizer", "revision", "attn_implementation")
# Rows of a split that the page offers.
MOST_ROWS = 400


@dataclass(frozen=True)
class OfferedRow:
    """
    A row of the request as the page offers it.

    Attributes:
        split (`str`): `forget`, `retain`, ...
        index (`int`): Its place in the split.
        kind (`str`): One of `KINDS`.
        prompt (`str`): The question, the text before the answer, or the messages before the answer as JSON.
        answer (`str`): The true answer; empty if the row has none.
    """

    split: str
    index: int
    kind: str
    prompt: str
    answer: str


@dataclass
class Setup:
    """
    Which models are asked, and how.

    Attributes:
        models (`list[tuple[str, str, str]]`): Role (`target`, `unlearned`, `gold`), name, and folder or hub id.
        rows (`list[dict]`, *optional*): Rows of an evaluation, which are offered as examples.
        prompt_template (`str`, *optional*): As in training; see [`~formats.render`].
        autocast (`str`, *optional*): The precision of the run's evaluation, `bfloat16` or `float16`, if it was mixed.
        loading (`dict`, *optional*):
            How models are loaded: `dtype`, `tokenizer`, `revision` of the target, `attn_implementation`,
            `trust_remote_code`.
    """

    models: list[tuple[str, str, str]]
    rows: list[dict] = field(default_factory=list)
    prompt_template: str | None = None
    autocast: str | None = None
    loading: dict = field(default_factory=dict)


def find_run(folder: str | Path) -> Setup:
    """
    The models and rows of a recipe's output folder.

    Args:
        folder (`str` or `Path`): The `output_dir` of `recipes/unlearn.py`, `recipes/tofu.py` or another recipe.

    Returns:
        [`Setup`]: With the unlearned model of each optimizer. After requests one after the other, it is the last one.

    Raises:
        ValueError: If the folder holds no finished run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--run {folder}: no such folder.")
    files = {path.name.removesuffix(ROWS_ENDING): path for path in sorted(folder.glob(f"*{ROWS_ENDING}"))}
    for optimizer in sorted(path for path in folder.iterdir() if path.is_dir()):
        if requests := sorted(optimizer.glob(f"request-*{ROWS_ENDING}"), key=_request_number):
            files[optimizer.name] = requests[-1]
    target, gold = files.pop(TARGET, None), files.pop(GOLD, None)
    if target is None or not files:
        raise ValueError(
            f"--run {folder} holds no finished run: a recipe leaves {TARGET}{ROWS_ENDING} and "
            f"<optimizer>{ROWS_ENDING} in its --output_dir. Name the models with --target and --model instead."
        )
    header, rows = read_rows(target)
    models = [(TARGET, TARGET, _moved(header["model"], folder))]
    settings = {}
    for name, path in files.items():
        settings = read_rows(path)[0]["settings"]
        models.append((UNLEARNED, name, str(path).removesuffix(ROWS_ENDING)))
    if gold:
        models.append((GOLD, GOLD, _moved(read_rows(gold)[0]["model"], folder)))
    precision = next((dtype for key, dtype in (("bf16", "bfloat16"), ("fp16", "float16")) if settings.get(key)), None)
    asked = header["settings"]
    loading = {name: asked[name] for name in LOADING if asked.get(name) is not None}
    return Setup(models, rows, asked.get("prompt_template"), precision, loading)


def named_models(target: str, models: Sequence[str], gold: str | None = None, rows: str | None = None) -> Setup:
    """
    Models that are named one by one.

    Args:
        target (`str`): Hub id or folder of the model before unlearning.
        models (`Sequence[str]`): Those of the unlearned models.
        gold (`str`, *optional*): That of the model that never saw the rows.
        rows (`str`, *optional*):
            Rows to offer: a `rows.jsonl` of an evaluation, or a file, folder or dataset of rows of any kind of
            `soul_trainer.formats`.

    Raises:
        ValueError: If there is no such folder or file, or its columns make no row.
    """
    short = [Path(name).name for name in models]
    shown = short if len(set(short)) == len(models) else models
    found = [(TARGET, TARGET, target), *((UNLEARNED, *each) for each in zip(shown, models))]
    if gold:
        found.append((GOLD, GOLD, gold))
    for flag, name in (("--target", target), *(("--model", name) for name in models), ("--gold", gold)):
        if name and (Path(name).is_absolute() or name.startswith(".")) and not Path(name).is_dir():
            raise ValueError(f"{flag} {name}: no such folder.")
    if rows is None:
        return Setup(found)
    if _is_evaluated(rows):
        header, offered = read_rows(rows)
        return Setup(found, offered, header.get("settings", {}).get("prompt_template"))
    from .models import load_tokenizer
    from .suites import own

    arguments = own.OwnArguments(forget=rows)
    splits = {"forget": own.load(rows, name="rows")}
    return Setup(found, own.unscored_rows(splits, load_tokenizer(target), arguments))


def offered_rows(setup: Setup) -> list[OfferedRow]:
    """The rows of a setup that have a prompt, those to forget first; of a large split, some that are evenly spread."""
    from .suites.sources import spread

    by_split: dict[str, list[OfferedRow]] = {}
    for row in setup.rows:
        if asked := _asked(row, setup.prompt_template):
            by_split.setdefault(row["split"], []).append(OfferedRow(row["split"], row["index"], *asked))
    offered = []
    for split in sorted(by_split, key=lambda name: not name.startswith("forget")):
        offered += [by_split[split][place] for place in spread(len(by_split[split]), MOST_ROWS)]
    return offered


def _asked(row: dict, prompt_template: str | None) -> tuple[str, str, str] | None:
    """Kind, prompt and answer of a row of an evaluation; `None` if it has no prompt."""
    if row.get("messages"):
        *before, last = row["messages"]
        answer = str(last.get("content") or "")
        if prompt_template is None and [turn["role"] for turn in before] == ["user"]:
            return QUESTION, before[0]["content"], answer  # the chat template makes the same of both
        return CONVERSATION, json.dumps(before, ensure_ascii=False, indent=1), answer
    kind, key = (TEXT, "prompt") if "prompt" in row else (QUESTION, "question")
    if not isinstance(row.get(key), str) or not row[key].strip():
        return None
    answer = row.get("completion", row.get("answer"))
    return kind, row[key], answer if isinstance(answer, str) else ""


def _request_number(path: Path) -> int:
    number = path.name.removeprefix("request-").removesuffix(ROWS_ENDING)
    return int(number) if number.isdecimal() else -1


def _moved(name: str, folder: Path) -> str:
    """Where a model of a run is: a run that was moved, or is looked at from elsewhere, has its small models in it."""
    inside = folder / Path(name).name
    return str(inside) if not Path(name).exists() and (inside / "config.json").exists() else name


def _is_evaluated(path: str) -> bool:
    """Whether a file is a `rows.jsonl` of an evaluation, with its header."""
    if not Path(path).is_file() or Path(path).suffix != ".jsonl":
        return False
    with open(path, encoding="utf-8") as file:
        return f'"format": "{FORMAT.split("/")[0]}' in file.readline()
