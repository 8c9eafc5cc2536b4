"""What a suite is: rows, what is asked of a model for each of them, and figures. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..statistics import Figure


SCORES, DETAILS, GENERATION, GRADIENT = "scores", "details", "generation", "gradient"
# What progress bars say while parts of a kind are asked.
BARS = {SCORES: "answers", DETAILS: "answers", GENERATION: "greedy answers", GRADIENT: "gradient norms"}


@dataclass(frozen=True)
class Part:
    """
    What is asked about a row at once.

    Attributes:
        name (`str`): Of its own among the parts of a row.
        answers (`list[dict]`): Rows in any format of `soul_trainer.formats`: prompts with answers.
        finish (`Callable`): Takes what the model said, and returns fields of the row.
        kind (`str`, *optional*, defaults to `"scores"`):
            `"scores"`: `finish` gets an [`~scoring.AnswerScore`] of each answer; `"details"`: with hits and z-scores;
            `"generation"`: it gets the text that the model itself gives after the prompt of the only answer;
            `"gradient"`: it gets the norm of the gradient of the only answer's loss.
        max_new_tokens (`int`, *optional*): Longest generation.
    """

    name: str
    answers: list[dict]
    finish: Callable[[Any], dict]
    kind: str = SCORES
    max_new_tokens: int | None = None


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


def column(rows: list[dict], key: str) -> list | None:
    """A key's values, or `None` if no row has it; a `ValueError` that names the row if only some have."""
    values = [row.get(key) for row in rows]
    missing = [row for row, value in zip(rows, values) if value is None]
    if len(missing) == len(rows):
        return None
    if missing:
        raise ValueError(f"Row {missing[0]['index']} of `{missing[0]['split']}` lacks `{key}`, which other rows have.")
    return values


def by_split(rows: list[dict], known: tuple[str, ...]) -> dict[str, list[dict]]:
    """Rows by split; a `ValueError` that names the row if its split is none of the known ones."""
    found: dict[str, list[dict]] = {split: [] for split in known}
    for row in rows:
        if row["split"] not in found:
            raise ValueError(f"`split` must be one of {known}, but row {row['index']} has {row['split']!r}.")
        found[row["split"]].append(row)
    return found


def match_rows(rows: list[dict], reference_rows: list[dict], splits: tuple[str, ...], asked: str) -> list[dict]:
    """
    The rows of a reference, in the order of `rows`, which must be of the same questions.

    Args:
        rows (`list[dict]`): Of the model.
        reference_rows (`list[dict]`): Of the reference.
        splits (`tuple[str, ...]`): Splits that must be the same.
        asked (`str`): Key of what was asked; rows without it pass.

    Raises:
        ValueError: If indices or questions differ.
    """
    matched = []
    advice = "Evaluate both models on the same dataset, splits and limit."
    for split in splits:
        own = {row["index"]: row for row in rows if row["split"] == split}
        reference = {row["index"]: row for row in reference_rows if row["split"] == split}
        if own.keys() != reference.keys():
            num_common = len(own.keys() & reference)
            raise ValueError(
                f"`reference` has {len(reference)} {split} rows and the model {len(own)}, {num_common} of them the "
                f"same. {advice}"
            )
        for index, row in own.items():
            questions = {each[asked] for each in (row, reference[index]) if each.get(asked) is not None}
            if len(questions) > 1:
                raise ValueError(
                    f"`reference` has another {asked} in {split} row {index}: {sorted(questions)}. {advice}"
                )
        matched += [reference[index] for index in own]
    return matched
