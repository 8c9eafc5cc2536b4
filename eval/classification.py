"""
What a text classifier thinks of texts: toxicity and fluency of generations start here.

The classifier is one of transformers' sequence classifiers and is read as transformers' own pipeline reads it.
Libraries that only a model needs are imported where one is used.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch
    from transformers import TextClassificationPipeline


TOXICITY_MODEL = "unitary/toxic-bert"
FLUENCY_MODEL = "madhurjindal/autonlp-Gibberish-Detector-492513457"
# The label of each of the two, whatever the name of the folder that holds a copy.
DEFAULT_LABELS = ("toxic", "clean")


def classify(
    texts: Sequence[str],
    model: str = TOXICITY_MODEL,
    label: str | None = None,
    batch_size: int = 32,
    device: "int | str | torch.device | None" = None,
    progress: bool = True,
) -> list[float]:
    """
    The probability of a label, by transformers' text-classification pipeline: a sigmoid of the label's own logit where
    the model is a multi-label one (`config.problem_type`) or has a single label, a softmax over its labels otherwise.

    Args:
        texts (`Sequence[str]`):
            Any, the empty one too. Those beyond the model's limit are cut off, and counted in a warning.
        model (`str`, *optional*, defaults to `"unitary/toxic-bert"`): Hub id or folder of a sequence classifier.
        label (`str`, *optional*):
            Name of the label, as in the model's `config.id2label`. By default that of `DEFAULT_LABELS` which the model
            has.
        batch_size (`int`, *optional*, defaults to 32): Texts in a forward; texts of similar length share one.
        device (`int`, `str` or `torch.device`, *optional*): By default the first accelerator, or else the CPU.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `list[float]`: In [0, 1], in the order of `texts`.

    Raises:
        TypeError: If a text is none.
        ValueError: If the model has no such label, or gives no probabilities.
    """
    from tqdm.auto import tqdm
    from transformers import pipeline

    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, but it is {batch_size}.")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"Row {row} of `texts` must be a text, but it is {text!r}.")
    if not len(texts):
        return []
    classifier = pipeline("text-classification", model=model, device=device, top_k=None)
    label = _label(classifier, model, label)
    texts, lengths, limit = _readable(classifier, texts)
    order = sorted(range(len(texts)), key=lambda row: -lengths[row])
    # A generator: given a list, the pipeline would hold all outputs back until the last one, and no bar could move.
    in_order = (texts[row] for row in order)
    outputs = classifier(in_order, batch_size=batch_size, truncation=limit is not None, max_length=limit)
    probabilities = [0.0] * len(texts)
    for row, scores in zip(order, tqdm(outputs, total=len(texts), desc=label, unit="text", disable=not progress)):
        probabilities[row] = next(score["score"] for score in scores if score["label"] == label)
    return probabilities


def _label(classifier: "TextClassificationPipeline", model: str, label: str | None) -> str:
    config = classifier.model.config
    labels = list(config.id2label.values())
    if config.problem_type == "regression":
        raise ValueError(f"`model`={model!r} gives numbers (problem_type 'regression'), not probabilities of labels.")
    found = [each for each in (DEFAULT_LABELS if label is None else [label]) if each in labels]
    if len(found) != 1:
        asked = f"one of {DEFAULT_LABELS}, so name its `label`" if label is None else f"the label {label!r}"
        raise ValueError(f"`model`={model!r} does not have {asked}; its labels are {labels}.")
    return found[0]


def _readable(
    classifier: "TextClassificationPipeline", texts: Sequence[str]
) -> tuple[list[str], list[int], int | None]:
    """The texts, their lengths in tokens, and the length that the model can read, `None` if there is no limit."""
    from transformers.utils import logging

    tokenizer, limit = classifier.tokenizer, _longest_input(classifier)
    lengths = [len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
    if 0 in lengths:
        # A tokenizer that adds no special tokens makes nothing of an empty text, and no model can read nothing.
        blank = tokenizer.bos_token or tokenizer.eos_token or tokenizer.unk_token
        if not blank:
            raise ValueError(f"Row {lengths.index(0)} of `texts` has no token that the model could read.")
        texts = [text if length else blank for text, length in zip(texts, lengths)]
    num_cut = sum(length > limit for length in lengths) if limit else 0
    if num_cut:
        logging.get_logger(__name__).warning(f"{num_cut} of {len(texts)} texts are cut off at {limit} tokens.")
    return texts, lengths, limit


def _longest_input(classifier: "TextClassificationPipeline") -> int | None:
    """The number of tokens that model and tokenizer both allow."""
    from torch import nn

    positions = getattr(classifier.model.config, "max_position_embeddings", None)
    # RoBERTa and its kin count positions from behind the padding index: 514 of them are enough for 512 tokens.
    for module in classifier.model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == positions and module.padding_idx is not None:
            positions -= module.padding_idx + 1
            break
    limits = [limit for limit in (positions, classifier.tokenizer.model_max_length) if limit and limit < 2**30]
    return min(limits, default=None)
