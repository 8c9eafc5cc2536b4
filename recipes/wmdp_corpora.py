"""The corpora of WMDP: where they are, and how the topics take turns in training."""

from pathlib import Path

from datasets import Dataset, concatenate_datasets
from transformers.utils import logging

from soul_eval.suites.sources import require_texts
from soul_trainer.sources import load_split


logger = logging.get_logger(__name__)

CORPORA = "cais/wmdp-corpora"
# Corpora that are not in `CORPORA`: dataset, configuration and split. The first is only given out on request.
ELSEWHERE = {
    "bio-forget-corpus": ("cais/wmdp-bio-forget-corpus", None, "train"),
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
}


def load_corpus(name: str, dataset: str = CORPORA, min_characters: int = 0, max_rows: int | None = None) -> Dataset:
    """
    Loads a corpus.

    Args:
        name (`str`): `bio-forget-corpus`, `bio-retain-corpus`, `cyber-forget-corpus`, `cyber-retain-corpus`,
            `wikitext`, or another of the dataset.
        dataset (`str`, *optional*, defaults to `CORPORA`):
            Hub id, a folder in its layout, or a folder of `<name>.jsonl`, as WMDP's own `data/`.
        min_characters (`int`, *optional*, defaults to 0): Texts of no more are left out, as by RMU's `min_len`.
        max_rows (`int`, *optional*): Only the first texts.

    Returns:
        [`~datasets.Dataset`]: Rows with a `text`.

    Raises:
        ValueError: If there is no such corpus, or it holds no text that is long enough.
    """
    file = Path(dataset, f"{name}.jsonl")
    if file.is_file():
        rows = load_split(str(file), columns=("text",), name=name)
        require_texts(rows.to_list(), name, "text")
    elif name in ELSEWHERE and not Path(dataset).exists():
        source, config, split = ELSEWHERE[name]
        rows = load_split(source, config, split, columns=("text",), name=name)
    else:
        rows = load_split(dataset, name, columns=("text",))
    texts = (text for text in rows["text"] if len(text.strip()) > min_characters)
    chosen = [text for text, _ in zip(texts, range(len(rows) if max_rows is None else max_rows))]
    if not chosen:
        raise ValueError(f"The corpus {name!r} of {dataset!r} has no text of over {min_characters} characters.")
    return Dataset.from_dict({"text": chosen})


def in_turns(topics: list[Dataset], num_rows: int) -> Dataset:
    """
    Rows of several topics in such an order that each optimizer step, if no sampler shuffles them, is of one topic, and
    the topics take turns, as in RMU's released code.

    Args:
        topics (`list[Dataset]`): The rows of each.
        num_rows (`int`): Rows of a step.

    Returns:
        [`~datasets.Dataset`]: As many steps of each topic as the smallest one has; what is over is left out.

    Raises:
        ValueError: If a topic has fewer rows than a step.
    """
    smallest = min(map(len, topics))
    num_turns = smallest // num_rows
    if not num_turns:
        raise ValueError(
            f"A step takes {num_rows} rows of one topic, but the smallest has {smallest}: lower the batch."
        )
    if left_out := sum(map(len, topics)) - len(topics) * num_turns * num_rows:
        logger.warning(f"{left_out} rows are left out, so that each topic has {num_turns} steps of {num_rows} rows.")
    return concatenate_datasets(
        [topic.select(range(turn * num_rows, (turn + 1) * num_rows)) for turn in range(num_turns) for topic in topics]
    )
