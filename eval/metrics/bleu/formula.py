"""How many runs of one to four words of an answer a generation has."""

from collections.abc import Sequence
from functools import lru_cache


try:
    from sacrebleu.metrics import BLEU
except ImportError as error:
    raise ImportError("BLEU needs sacrebleu: pip install soul-trainer[eval]") from error


def sentence_bleu(reference: str, generation: str) -> float:
    """
    BLEU (Papineni et al., 2002) of one generation, as sacrebleu defines it (Post, 2018): 13a tokenization, exponential
    smoothing, and n-grams no longer than the generation (effective order), so that a short answer can score 1.

    Args:
        reference (`str`): The true answer, or the text's own continuation of a prompt.
        generation (`str`): What the model said, without the prompt.

    Returns:
        `float`: In [0, 1], a hundredth of sacrebleu's score.
    """
    for name, text in (("reference", reference), ("generation", generation)):
        if not isinstance(text, str):
            raise TypeError(f"`{name}` must be a text, but it is {text!r}.")
    return _share(_bleu(effective_order=True).sentence_score(generation, [reference]).score)


def corpus_bleu(references: Sequence[str], generations: Sequence[str]) -> float:
    """
    BLEU of all rows together: their n-gram counts are summed before any ratio is taken, so that long rows weigh more.

    Args:
        references (`Sequence[str]` of length `rows`): As in [`sentence_bleu`], one a row.
        generations (`Sequence[str]` of length `rows`): As in [`sentence_bleu`], one a row.

    Returns:
        `float`: In [0, 1]; 0 if no row has four words, for which `mean(sentence_bleu)` is the better figure.

    Raises:
        ValueError: If there is no row, or not as many references as generations.
    """
    if len(references) != len(generations) or not len(references):
        raise ValueError(
            f"`references` and `generations` must be of the same rows, at least one, but they have {len(references)} "
            f"and {len(generations)}."
        )
    return _share(_bleu(effective_order=False).corpus_score(list(generations), [list(references)]).score)


@lru_cache(maxsize=2)
def _bleu(effective_order: bool) -> BLEU:
    return BLEU(effective_order=effective_order)


def _share(score: float) -> float:
    # exp(mean(log(100))) is a little over 100.
    return min(score / 100, 1.0)
