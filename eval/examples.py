"""What the models say to the rows of an evaluation, as data for the page's script and its template."""

import json

from .runs import Run
from .templating import visible


NUM_EXAMPLES = 10
# What an answer is scored by: the first of them that a split's rows have.
SCORES = {
    "rougeL_recall": "ROUGE-L recall, the share of the true answer that is in the model's",
    "rougeL_f1": "ROUGE-L F1",
    "toxicity": "the toxicity",
}


def example_data(runs: list[Run]) -> list[dict]:
    """
    The rows to which models have said something, the forget rows first.

    Args:
        runs (`list[Run]`): As in `write_report`.

    Returns:
        `list[dict]`: A split each: `name`; `score`, what its answers are scored by, or `None`; `rows`, each with its
        `index`, `question`, `truth` and `answers`, which for each run are the text and its score, or `None`.
    """
    by_split: dict[str, dict[int, list]] = {}
    for place, run in enumerate(runs):
        for row in run.rows:
            if row.get("generation") is not None:
                split = by_split.setdefault(row["split"], {})
                split.setdefault(row["index"], [None] * len(runs))[place] = row
    names = sorted(by_split, key=lambda name: not name.startswith("forget"))
    return [_split_data(name, by_split[name]) for name in names]


def as_script_data(data: object) -> str:
    """JSON that can stand in a script element: nothing in it ends the element, whatever the texts are."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def few_examples(runs: list[Run], splits: list[dict]) -> list[dict]:
    """
    Rows that are spread over the first split, as the page's template shows them.

    Args:
        runs (`list[Run]`): As in `write_report`.
        splits (`list[dict]`): From [`example_data`]; may be empty.

    Returns:
        `list[dict]`: `index`, `question`, `truth` and `answers`, which for each run are its `place`, its name as
        `run`, `text` and `score` in words, or `None`.
    """
    rows = splits[0]["rows"] if splits else []
    count = min(NUM_EXAMPLES, len(rows))
    return [_example(runs, rows[place * len(rows) // count]) for place in range(count)]


def _example(runs: list[Run], row: dict) -> dict:
    answers: list[dict | None] = []
    for place, (run, answer) in enumerate(zip(runs, row["answers"])):
        if not answer:
            answers.append(None)
            continue
        text, score = answer
        shown = "" if score is None else f"{score:.2f}"
        answers.append({"place": place, "run": run.name, "text": text, "score": shown})
    return {**row, "answers": answers}


def _split_data(name: str, rows: dict[int, list]) -> dict:
    found = [row for row_of_runs in rows.values() for row in row_of_runs if row]
    score = next((key for key in SCORES if any(row.get(key) is not None for row in found)), None)
    return {
        "name": visible(name.replace("_", " ")),
        "score": SCORES.get(score),
        "rows": [_row_data(index, rows[index], score) for index in sorted(rows)],
    }


def _row_data(index: int, row_of_runs: list[dict | None], score: str | None) -> dict:
    known = [row for row in row_of_runs if row]
    answers = [row and [visible(row["generation"]), _rounded(row.get(score))] for row in row_of_runs]
    question, truth = (
        next((row[key] for row in known for key in keys if row.get(key) and isinstance(row[key], str)), "")
        for keys in (("question", "prompt"), ("answer",))
    )
    return {"index": index, "question": visible(question), "truth": visible(truth), "answers": answers}


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 4)
