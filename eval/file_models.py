"""What files of an evaluation may hold, as pydantic models. [`~schema.check`] imports them when a file is read."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictInt, StrictStr, TypeAdapter

from .statistics import ROUNDING


COUNT = Annotated[StrictInt, Field(ge=0)]
NUMBER = FiniteFloat | None
SHARE = Annotated[FiniteFloat, Field(ge=-ROUNDING, le=1 + ROUNDING)] | None
HITS = list[Annotated[StrictInt, Field(ge=0, le=1)]] | None
LOSSES = Annotated[list[FiniteFloat], Field(min_length=1)] | None
# Fields that no figure is made of may be anything, but a number is a number.
PLAIN = str | int | FiniteFloat | bool | None
OTHER = PLAIN | list[PLAIN | list[Any] | dict[str, Any]] | dict[str, Any]


class Fields(BaseModel):
    """What has fields beside those that are checked."""

    model_config = ConfigDict(strict=True, extra="allow")


class Row(Fields):
    """A row of `rows.jsonl`."""

    __pydantic_extra__: dict[str, OTHER] = Field(init=False)
    split: Annotated[str, Field(min_length=1)]
    index: COUNT = 0
    question: str | None = None
    generation: str | None = None
    paraphrased_generation: str | None = None
    answer_nll: NUMBER = None
    paraphrased_nll: NUMBER = None
    lowercase_nll: NUMBER = None
    perturbed_nll: LOSSES = None
    option_nll: LOSSES = None
    token_log_probs: list[FiniteFloat] | None = None
    token_z_scores: list[FiniteFloat] | None = None
    token_hits: HITS = None
    answer_hits: HITS = None
    rouge1_recall: SHARE = None
    rougeL_recall: SHARE = None
    rougeL_f1: SHARE = None
    toxicity: SHARE = None
    is_toxic: bool | None = None
    is_correct: bool | None = None
    embedding_hit: bool | None = None
    mentions_answer: bool | None = None


class Figure(BaseModel):
    """A figure of [`~statistics.Figure.to_json`]."""

    model_config = ConfigDict(strict=True, extra="forbid")
    value: FiniteFloat
    num_rows: COUNT
    low: NUMBER = None
    high: NUMBER = None


class Header(Fields):
    """The first line of `rows.jsonl`."""

    suite: str | None = None
    model: str | None = None
    settings: dict[str, Any] | None = None
    seed: int | None = None
    seconds_per_step: Annotated[FiniteFloat, Field(ge=0)] | None = None
    general: dict[str, FiniteFloat | Figure] = {}


class Verdict(Fields):
    """A verdict of [`~verdict.Verdict.to_json`]."""

    run: str
    kind: str
    sentence: str
    reasons: list[str]


class Verdicts(Fields):
    """`verdict.json`."""

    verdicts: list[Verdict]


class General(Fields):
    """`*.general.json`."""

    asked: dict[str, Any]
    figures: dict[str, FiniteFloat | Figure]


FINDING = tuple[tuple[StrictStr, COUNT, StrictStr], dict[str, Any]]

# By the names that [`~schema.check`] takes.
ADAPTERS = {
    "row": TypeAdapter(Row),
    "header": TypeAdapter(Header),
    "finding": TypeAdapter(FINDING),
    "verdicts": TypeAdapter(Verdicts),
    "general": TypeAdapter(General),
}
