"""What a suite is: rows, what is asked of a model for each of them, and figures. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..statistics import Figure


@dataclass(frozen=True)
class Part:
    """
    What is asked about a row at once.

    Attributes:
        name (`str`): Of its own among the parts of a row.
        answers (`list[dict]`): Rows in any format of `soul_trainer.formats`: prompts with answers.
        finish (`Callable`):
            Takes what the model said, one [`~scoring.AnswerScore`] an answer or, of a generation, the text; returns
            fields of the row.
        max_new_tokens (`int`, *optional*):
            Makes it a generation after the prompt of the only answer; without, the answers are scored.
        details (`bool`, *optional*, defaults to `False`): Whether scores have hits and z-scores.
    """

    name: str
    answers: list[dict]
    finish: Callable[[Any], dict]
    max_new_tokens: int | None = None
    details: bool = False


@dataclass(frozen=True)
class Suite:
    """
    A benchmark.

    Attributes:
        name (`str`): On the command line.
        arguments (`type`): Dataclass of the settings that are its own, each with its help.
        load (`Callable`): `(arguments, tokenizer) -> rows`, each with `split`, `index` and what is asked.
        parts (`Callable`): `(row, arguments) -> list[Part]`.
        summarise (`Callable`): `(rows, reference rows or None) -> figures`, by name.
        judge (`Callable`, *optional*): `(rows, arguments)`: adds what other models say of the rows' generations.
        check_reference (`Callable`, *optional*): `(rows, reference rows)`: raises if they are of other rows.
    """

    name: str
    arguments: type
    load: Callable[[Any, Any], list[dict]]
    parts: Callable[[dict, Any], list[Part]]
    summarise: Callable[[list[dict], "list[dict] | None"], dict[str, Figure]]
    judge: Callable[[list[dict], Any], None] | None = None
    check_reference: Callable[[list[dict], list[dict]], Any] | None = None
