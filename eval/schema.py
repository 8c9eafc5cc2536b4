"""
What the files of an evaluation may hold: types, ranges, and what is said of a violation. They are read again, and also
come from elsewhere. Fields that are not named here may hold anything, but their numbers are finite.
"""

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .statistics import ROUNDING


# A token's log-probability is the difference of two float32 numbers, which can end a rounding above zero.
LOSS_ROUNDING = 1e-3
LARGEST_SHOWN = 80

Loss = Annotated[float, Field(ge=-LOSS_ROUNDING)]
Share = Annotated[float, Field(ge=-ROUNDING, le=1 + ROUNDING)]
Hit = Annotated[int, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
LogProb = Annotated[float, Field(le=LOSS_ROUNDING)]


class _Strict(BaseModel):
    """Numbers are numbers and no strings or booleans, and finite, in whatever a field holds."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_others(cls, fields: Any) -> Any:
        if isinstance(fields, dict):
            for name, value in fields.items():
                if name not in cls.model_fields and not _is_finite(value):
                    raise ValueError(name)
        return fields


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return all(map(_is_finite, value)) if isinstance(value, list) else True


def _text_or_place(answer: Any) -> Any:
    """An answer is a text or, of a question with choices, the place of one."""
    return "" if isinstance(answer, int) and not isinstance(answer, bool) and answer >= 0 else answer


class Findings(_Strict):
    """What a model said and gave, of a row or of a part of one."""

    generation: str | None = None
    paraphrased_generation: str | None = None
    answer_nll: Loss | None = None
    paraphrased_nll: Loss | None = None
    lowercase_nll: Loss | None = None
    perturbed_nll: Annotated[list[Loss], Field(min_length=1)] | None = None
    option_nll: Annotated[list[Loss], Field(min_length=2)] | None = None
    margin: float | None = None
    gradient_norm: Loss | None = None
    answer_hits: list[Hit] | None = None
    token_hits: list[Hit] | None = None
    token_log_probs: list[LogProb] | None = None
    token_z_scores: list[float] | None = None
    rouge1_recall: Share | None = None
    rouge1_f1: Share | None = None
    rougeL_recall: Share | None = None
    rougeL_f1: Share | None = None
    bleu: Share | None = None
    verbatim_overlap: Share | None = None
    toxicity: Share | None = None
    fluency: Share | None = None
    is_toxic: bool | None = None
    is_correct: bool | None = None
    embedding_hit: bool | None = None
    mentions_answer: bool | None = None


class Row(Findings):
    """A line of `rows.jsonl`."""

    split: Annotated[str, Field(min_length=1)]
    index: Count | None = None
    row: Count | None = None
    question: str | None = None
    text: str | None = None
    answer: Annotated[str | None, BeforeValidator(_text_or_place)] = None
    prompt_tokens: Count | None = None
    continuation_tokens: Count | None = None


class FigureEntry(_Strict):
    """A figure, as [`~statistics.Figure.to_json`] gives it, or a bare number."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _of_number(cls, entry: Any) -> Any:
        is_number = isinstance(entry, (int, float)) and not isinstance(entry, bool)
        return {"value": entry, "num_rows": 0} if is_number else entry

    value: float
    num_rows: Count
    low: float | None = None
    high: float | None = None


class RecoveryEntry(_Strict):
    """What an attack brought back, as [`~attacks.recovered.Recovery.to_json`] gives it."""

    attacked: FigureEntry
    unlearned: FigureEntry
    target: FigureEntry
    share: FigureEntry | None = None
    reason: str | None = None


class AttacksFile(_Strict):
    """`attacks.json`: recoveries by attack, model and figure."""

    attacks: dict[str, dict[str, dict[str, RecoveryEntry]]]


class GeneralFile(_Strict):
    """`*.general.json`: what lm-eval found of a model, and what it was asked."""

    asked: dict[str, Any]
    figures: dict[str, FigureEntry]


class VerdictEntry(_Strict):
    """A verdict, as [`~verdict.Verdict.to_json`] gives it."""

    run: str
    kind: str
    sentence: str
    reasons: list[str]


class VerdictFile(_Strict):
    """`verdict.json`."""

    verdicts: list[VerdictEntry]


class Header(_Strict):
    """The first line of `rows.jsonl`; [`~rows.make_header`] makes it."""

    format: str | None = None
    suite: str | None = None
    model: str | None = None
    weights: str | None = None
    setup: str | None = None
    questions: str | None = None
    settings: dict[str, Any] | None = None
    seed: int | None = None
    commit: str | None = None
    libraries: dict[str, str] | None = None
    time: str | None = None
    device: str | None = None
    seconds_per_step: Annotated[float, Field(ge=0)] | None = None
    general: dict[str, FigureEntry] | None = None


def check_fields(model: type[BaseModel], fields: Any, where: str = "") -> None:
    """
    Checks what was read.

    Args:
        model (`type[BaseModel]`): Of this file: [`Row`], [`Header`], [`Findings`], ...
        fields (`Any`): From JSON.
        where (`str`, *optional*): What the message begins with, such as file and line and a colon.

    Raises:
        ValueError: If a field is missing, of another type or out of its range: `where`, the field, what it must be,
            and what it is.
    """
    try:
        model.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"{where}{_problem(fields, error)}") from None


def _problem(fields: Any, error: ValidationError) -> str:
    """The first field that is wrong, as the start of a sentence on it."""
    first = error.errors(include_url=False, include_context=False)[0]
    split = fields.get("split") if isinstance(fields, dict) else None
    of = f" of row {fields.get('index')} of `{split}`" if isinstance(split, str) else ""
    if not isinstance(fields, dict):
        return f"an object is wanted, but it is {repr(fields)[:LARGEST_SHOWN]}."
    if not first["loc"]:
        return f"`{first['msg'].removeprefix('Value error, ')}`{of} must hold finite numbers."
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    name = f"`{place}`{of}"
    if first["type"] == "missing":
        return f"{name} is missing."
    if first["type"] == "extra_forbidden":
        return f"{name} is unknown."
    shown = repr(first["input"])
    shown = shown if len(shown) <= LARGEST_SHOWN else f"{shown[:LARGEST_SHOWN]}..."
    said = first["msg"].removeprefix("Input should ").removeprefix("List should ").partition(" after validation")[0]
    hint = ""
    if first["type"] == "finite_number":
        hint = " Has the model diverged? Then unlearn with a lower learning rate or forget weight."
    return f"{name} must {said}, but it is {shown}.{hint}"
