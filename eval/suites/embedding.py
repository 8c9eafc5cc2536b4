"""SOUL's accuracy on rows with wrong answers: is a generation nearest in meaning to the true one?"""

from ..statistics import Figure, mean_figure


KEY = "embedding_hit"


def judge_embeddings(rows: list[dict], model: str) -> None:
    """Adds `embedding_hit` to the rows that have a `generation` and wrong answers (`perturbed_answer`)."""
    from ..embeddings import nearest_answers

    judged = [row for row in rows if row.get("generation") is not None and row.get("perturbed_answer")]
    texts = ([row[key] for row in judged] for key in ("generation", "answer", "perturbed_answer"))
    for row, hit in zip(judged, nearest_answers(*texts, model=model)):
        row[KEY] = bool(hit)


def embedding_figures(rows: list[dict]) -> dict[str, Figure]:
    """`<split>_embedding_accuracy` of the splits whose rows were judged."""
    splits: dict[str, list[bool]] = {}
    for row in rows:
        if row.get(KEY) is not None:
            splits.setdefault(row["split"], []).append(row[KEY])
    return {f"{split}_embedding_accuracy": mean_figure(hits, split) for split, hits in splits.items()}
