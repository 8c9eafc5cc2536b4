"""How many words of an answer a generation has, in any order (ROUGE-1) and in the answer's order (ROUGE-L)."""

from functools import lru_cache


try:
    from rouge_score import rouge_scorer
except ImportError as error:
    raise ImportError("ROUGE needs rouge_score: pip install soul-trainer[eval]") from error


def rouge_scores(reference: str, generation: str, use_stemmer: bool = True) -> dict[str, float]:
    """
    ROUGE-1 and ROUGE-L (Lin, 2004) of one generation.

    Args:
        reference (`str`): The true answer, or the text's own continuation of a prompt.
        generation (`str`): What the model said, without the prompt.
        use_stemmer (`bool`, *optional*, defaults to `True`):
            Whether words count as equal when their Porter stems are. TOFU stems, MUSE does not.

    Returns:
        `dict[str, float]`: `rouge1_recall`, `rouge1_f1`, `rougeL_recall` and `rougeL_f1`, each in [0, 1]; all are 0 if
        either text has no word.
    """
    for name, text in (("reference", reference), ("generation", generation)):
        if not isinstance(text, str):
            raise TypeError(f"`{name}` must be a text, but it is {text!r}.")
    scores = _scorer(use_stemmer).score(reference, generation)
    return {
        "rouge1_recall": float(scores["rouge1"].recall),
        "rouge1_f1": float(scores["rouge1"].fmeasure),
        "rougeL_recall": float(scores["rougeL"].recall),
        "rougeL_f1": float(scores["rougeL"].fmeasure),
    }


@lru_cache(maxsize=2)
def _scorer(use_stemmer: bool) -> "rouge_scorer.RougeScorer":
    return rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=use_stemmer)
