"""
Sentence embeddings of texts, and which answer a generation is nearest to.

sentence-transformers and what it needs are imported where a model is used.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .extras import require
from .metrics.embedding_accuracy.formula import embedding_hits


if TYPE_CHECKING:
    import torch


EMBEDDING_MODEL = "sentence-transformers/paraphrase-MiniLM-L6-v2"


def embed(
    texts: Sequence[str],
    model: str = EMBEDDING_MODEL,
    batch_size: int = 64,
    device: "str | torch.device | None" = None,
    progress: bool = True,
) -> np.ndarray:
    """
    Embeds texts with a sentence-transformers model. Equal texts are embedded once and get equal embeddings.

    Args:
        texts (`Sequence[str]`): Any, the empty one too. What exceeds the model's limit is cut off.
        model (`str`, *optional*, defaults to `"sentence-transformers/paraphrase-MiniLM-L6-v2"`):
            Hub id or folder of a sentence-transformers model; the default is SOUL's.
        batch_size (`int`, *optional*, defaults to 64): Texts in a forward; texts of similar length share one.
        device (`str` or `torch.device`, *optional*): By default the first accelerator, or else the CPU.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `np.ndarray` of shape `(texts, dimension)`: Float32, in the order of `texts`; not normalised.

    Raises:
        ImportError: If sentence-transformers is not installed.
        TypeError: If a text is none.
    """
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"Row {row} of `texts` must be a text, but it is {text!r}.")
    encoder = require("sentence_transformers", "embedding").SentenceTransformer(
        model, device=None if device is None else str(device)
    )
    # Without texts, one is embedded for the number of dimensions alone.
    places = {text: place for place, text in enumerate(dict.fromkeys(texts if len(texts) else [""]))}
    embeddings = encoder.encode(list(places), batch_size=batch_size, show_progress_bar=progress)
    return np.asarray(embeddings, dtype=np.float32)[[places[text] for text in texts]]


def nearest_answers(
    generations: Sequence[str],
    answers: Sequence[str],
    wrong_answers: Sequence[Sequence[str]],
    model: str = EMBEDDING_MODEL,
    batch_size: int = 64,
    device: "str | torch.device | None" = None,
    progress: bool = True,
) -> list[bool]:
    """
    Of each row, whether the generation means the true answer rather than a wrong one; their share is SOUL's accuracy.

    Args:
        generations (`Sequence[str]` of length `rows`): What the model said.
        answers (`Sequence[str]` of length `rows`): The true answers. SOUL asks and compares with TOFU's paraphrases.
        wrong_answers (`Sequence[Sequence[str]]` of length `rows`): At least one a row.
        model (`str`, *optional*): As in [`embed`], like the arguments after it.

    Returns:
        `list[bool]`: From [`embedding_hits`].

    Raises:
        TypeError: If a row's wrong answers are one text instead of several.
        ValueError: If there are not as many of each, or a row has no wrong answer.
    """
    counts = {len(generations), len(answers), len(wrong_answers)}
    if len(counts) > 1:
        raise ValueError(
            "`generations`, `answers` and `wrong_answers` must be of the same rows, but they have "
            f"{len(generations)}, {len(answers)} and {len(wrong_answers)}."
        )
    for row, wrong in enumerate(wrong_answers):
        if isinstance(wrong, str):
            raise TypeError(f"Row {row} of `wrong_answers` must be a list of texts, but it is {wrong!r}.")
    if not len(generations):
        return []
    rows = [[generation, answer, *wrong] for generation, answer, wrong in zip(generations, answers, wrong_answers)]
    vectors = embed([text for row in rows for text in row], model, batch_size, device, progress)
    rows = np.split(vectors, np.cumsum([len(row) for row in rows])[:-1])
    return embedding_hits([row[0] for row in rows], [row[1:] for row in rows]).tolist()
