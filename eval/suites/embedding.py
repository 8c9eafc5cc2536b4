"""
The accuracy that SOUL reports: does an answer mean the true one rather than a wrong one?

Where there are paraphrases, the paraphrased question is asked and the answer's sentence embedding must be nearest to
that of the paraphrased true answer. Where there are none, on real authors and world facts, the answer must mention the
true one.
"""

from ..statistics import Figure, mean_figure


KINDS = {"embedding_hit": "embedding_accuracy", "mentions_answer": "mention_accuracy"}


def judge_embeddings(rows: list[dict], model: str) -> None:
    """Adds `embedding_hit` to the rows that have an answer to a paraphrased question."""
    from ..embeddings import nearest_answers

    judged = [row for row in rows if row.get("paraphrased_generation") is not None]
    texts = (
        [row[key] for row in judged] for key in ("paraphrased_generation", "paraphrased_answer", "perturbed_answer")
    )
    for row, hit in zip(judged, nearest_answers(*texts, model=model)):
        row["embedding_hit"] = bool(hit)


def accuracy_figures(rows: list[dict]) -> dict[str, Figure]:
    """`<split>_embedding_accuracy` and `<split>_mention_accuracy` of the splits whose rows have them."""
    hits: dict[str, list[bool]] = {}
    for row in rows:
        for key, figure in KINDS.items():
            if row.get(key) is not None:
                hits.setdefault(f"{row['split']}_{figure}", []).append(row[key])
    return {name: mean_figure(values, name.rsplit("_", 2)[0]) for name, values in hits.items()}
