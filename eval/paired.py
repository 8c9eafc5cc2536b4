"""Two models on the same rows: by how much they differ, and whether that can be chance."""

from .statistics import LOSS, UNIT, PairedComparison, paired_comparison
from .suites.base import match_rows


# What rows of all suites are compared by, where both have it; the mean of a field is a figure or close to one.
FIELDS = (
    "answer_nll",
    "paraphrased_nll",
    "lowercase_nll",
    "rouge1_recall",
    "rougeL_recall",
    "rougeL_f1",
    "bleu",
    "embedding_hit",
    "mentions_answer",
    "is_correct",
    "toxicity",
    "fluency",
)


ASKED = ("question", "prompt", "text")


def compare_rows(first: list[dict], second: list[dict]) -> dict[str, PairedComparison]:
    """
    Compares two models field by field.

    Args:
        first (`list[dict]`): One model's rows.
        second (`list[dict]`): The other's, of the same questions.

    Returns:
        `dict[str, PairedComparison]`: The second less the first, by `<split>_<field>`.

    Raises:
        ValueError: If the rows are not the same, or have no field in common.
    """
    splits = tuple(dict.fromkeys(row["split"] for row in [*first, *second]))
    compared = {}
    for split in splits:
        own = sorted((row for row in first if row["split"] == split), key=lambda row: row["index"])
        for asked in ASKED:
            others = match_rows(own, second, (split,), asked)
        for field in FIELDS:
            pairs = [(one.get(field), other.get(field)) for one, other in zip(own, others)]
            if all(None not in pair for pair in pairs):
                bounds = LOSS if field.endswith("_nll") else UNIT
                compared[f"{split}_{field}"] = paired_comparison(*zip(*pairs), sample=split, bounds=bounds)
    if not compared:
        raise ValueError("The two models' rows have no field in common that can be compared.")
    return compared


def comparison_table(compared: dict[str, PairedComparison]) -> str:
    """Plain text, one line a field."""
    lines = [f"{'second less first':<34} {'difference':>11} {'95% interval':>20} {'p':>8} {'rows':>6}"]
    for name, each in compared.items():
        interval = "" if each.low is None else f"[{each.low:.4f}, {each.high:.4f}]"
        lines.append(f"{name:<34} {each.difference:>+11.4f} {interval:>20} {each.p_value:>8.2g} {each.num_rows:>6}")
    return "\n".join(lines)
