"""
Rows to tokens. Four kinds of row are understood, told apart by their columns:

| kind | columns | prompt | answer (the part with a loss) |
|---|---|---|---|
| question/answer | `question`, `answer` | from the template | the answer |
| prompt/completion | `prompt`, `completion` (strings or lists of messages) | the prompt | the completion |
| messages | `messages` | all but the last, through the chat template | the last, which must be the assistant's |
| text | `text` | nothing | the whole text |

Of a completion of several messages, all turns of the assistant's are the answer. Rows that go through the chat
template may have `tools` besides, a list of functions, and `chat_template_kwargs`, what the template asks for by name,
such as `enable_thinking`; both also as JSON.
"""

import os
from typing import Any

from datasets import Dataset, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .batch import IGNORE_INDEX
from .chat_templates import Example, render_chat, require_text, template_options
from .inputs import as_dataset
from .sources import KINDS, TEMPLATE_COLUMNS
from .tokenized import check_columns, has_columns_to_check, read_tokenized


logger = logging.get_logger(__name__)

# `datasets` keeps what it maps beside the rows' own files, where nobody would look for what must be forgotten.
_NOT_CACHED = {"keep_in_memory": True, "load_from_cache_file": False}
# The columns that rows of text are read from.
_READ = {*(column for kind in KINDS for column in kind), *TEMPLATE_COLUMNS, "alternate", "labels", "row"}
# Used for question/answer rows where the tokenizer has no chat template of its own.
DEFAULT_PROMPT_TEMPLATE = "Question: {question}\nAnswer: {answer}"


def render(row: dict, tokenizer: PreTrainedTokenizerBase, prompt_template: str | None = None) -> Example:
    """
    Turns a row into prompt and answer.

    Args:
        row (`dict`): A row of one of the four kinds.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its chat template is used where there is one.
        prompt_template (`str`, *optional*):
            Template of question/answer rows with the placeholders `{question}` and, at its end, `{answer}`. By default
            the tokenizer's chat template, else `DEFAULT_PROMPT_TEMPLATE`.

    Returns:
        [`Example`]

    Raises:
        ValueError: If the row is of no known kind, its answer is empty, or the template lacks a placeholder.
    """
    if "messages" in row:
        return render_chat(row["messages"], tokenizer, options=template_options(row))
    if "question" in row and "answer" in row:
        require_text(row, "question", "answer")
        if prompt_template is None and tokenizer.chat_template:
            messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
            return render_chat(messages, tokenizer, options=template_options(row))
        return _render_template(row["question"], row["answer"], prompt_template or DEFAULT_PROMPT_TEMPLATE)
    if "prompt" in row and "completion" in row:
        if isinstance(row["prompt"], list):
            if not isinstance(row["completion"], list):
                raise ValueError("`prompt` is a list of messages, so `completion` must be one too.")
            messages = row["prompt"] + row["completion"]
            return render_chat(messages, tokenizer, len(row["prompt"]), template_options(row))
        require_text(row, "completion")
        if not isinstance(row["prompt"], str):
            raise ValueError(f"`prompt` is not a string: {row['prompt']!r}.")
        return Example(row["prompt"], row["completion"], row["completion"].strip(), is_chat=False)
    if "text" in row:
        require_text(row, "text")
        if isinstance(row.get("labels"), str):
            raise ValueError(
                "beside `text`, `labels` holds a text, which would be left out: name the columns `prompt` and "
                "`completion`, or `question` and `answer`."
            )
        return Example("", row["text"], row["text"].strip(), is_chat=False)
    raise ValueError(f"A row needs the columns of one of the kinds {KINDS}, but it has {sorted(row)}.")


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int | None = None) -> dict:
    """
    Tokenizes an example, with labels on the answer (and on the end of sequence) alone.

    Prompt and answer are tokenized together, as the model meets them. A token that spans both counts as answer.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Needs an `eos_token` unless the example is a chat.
        example ([`Example`]): From [`render`].
        max_length (`int`, *optional*): Tokens beyond are cut off at the end.

    Returns:
        `dict`: `input_ids` and `labels`, lists of the same length.

    Raises:
        ValueError: If no answer token is left after the cut.
    """
    return encode_all(tokenizer, [example], max_length)[0]


def encode_all(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example], max_length: int | None = None
) -> list[dict]:
    """[`encode`] of many examples: a prompt that several share is tokenized once."""
    if tokenizer.eos_token_id is None and not all(example.is_chat for example in examples):
        raise ValueError("the tokenizer has no `eos_token`, which ends an answer: set one.")
    ids_of: dict[tuple[str, bool], list[int]] = {}
    for is_chat in {example.is_chat for example in examples}:
        alike = [example for example in examples if example.is_chat == is_chat]
        texts = list({text: None for each in alike for text in _beginnings(each) if text})
        found = tokenizer(texts, add_special_tokens=not is_chat)["input_ids"] if texts else []
        ids_of |= {(text, is_chat): ids for text, ids in zip(texts, found)}
    rows = []
    for example in examples:
        ids = ids_of[example.prompt + example.answer, example.is_chat]
        prompt_ids = ids_of[example.prompt, example.is_chat] if example.prompt else []
        if not example.is_chat and ids[-1] != tokenizer.eos_token_id:
            ids = ids + [tokenizer.eos_token_id]
        num_prompt = len(os.path.commonprefix([prompt_ids, ids]))
        ids = ids[:max_length]
        # The first token has nothing before it to be predicted from.
        if len(ids) <= max(num_prompt, 1):
            raise ValueError(
                f"no answer token is left within `max_length`={max_length}: the prompt takes {num_prompt} tokens. "
                f"Raise `max_length` or shorten the prompt, which begins {example.prompt[:60]!r}."
            )
        labels = [IGNORE_INDEX] * num_prompt + ids[num_prompt:]
        for part in example.between:
            begun = (ids_of[example.prompt + example.answer[:place], example.is_chat] for place in part)
            start, end = (len(os.path.commonprefix([each, ids])) for each in begun)
            labels[start:end] = [IGNORE_INDEX] * (min(end, len(ids)) - min(start, len(ids)))
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def _beginnings(example: Example) -> list[str]:
    """What is tokenized of an example: all of it, and all before each place where a label begins or ends."""
    places = [0, len(example.answer), *(place for part in example.between for place in part)]
    return [example.prompt + example.answer[:place] for place in places]


def without_first_labels(dataset: Dataset, num_tokens: int, name: str) -> Dataset:
    """
    Takes the labels off the first tokens of each answer.

    Args:
        dataset ([`~datasets.Dataset`]): From [`prepare`].
        num_tokens (`int`): How many tokens of an answer.
        name (`str`): What errors call the dataset.

    Raises:
        ValueError: If a row has no label left; it is named.
    """

    def shorten(row: dict, index: int) -> dict:
        places = [place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX and place]
        if len(places) <= num_tokens:
            raise ValueError(
                f"Row {index} of `{name}`: this loss skips {num_tokens} answer token(s), and there are {len(places)}."
            )
        first = places[num_tokens]
        return {"labels": [IGNORE_INDEX] * first + row["labels"][first:]}

    if not num_tokens:
        return dataset
    return dataset.map(shorten, with_indices=True, desc=f"Skipping first tokens of {name}", **_NOT_CACHED)


def longest_row(max_length: int | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """`max_length` or, without, as many tokens as the model takes; a `ValueError` if it takes less."""
    # A model of several parts, as one that sees, keeps the length of its texts with the part that reads them.
    config = model.config.get_text_config()
    longest = min(getattr(config, "max_position_embeddings", None) or 2**30, tokenizer.model_max_length)
    if max_length is not None and max_length > longest:
        raise ValueError(f"`max_length`={max_length} is over the model's {longest} positions: lower it.")
    return max_length or longest


def prepare(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    prompt_template: str | None = None,
    name: str = "dataset",
) -> Dataset:
    """
    Tokenizes a dataset once.

    Args:
        dataset ([`~datasets.Dataset`], `list[dict]` or whatever [`~inputs.as_dataset`] takes):
            Rows of one of the four kinds, or rows that already have `input_ids`: see
            [`~tokenized.read_tokenized`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        max_length (`int`, *optional*): See [`encode`]. Shortened answers are counted in a warning.
        prompt_template (`str`, *optional*): See [`render`].
        name (`str`, *optional*, defaults to `"dataset"`): What errors call it.

    Returns:
        [`~datasets.Dataset`]: Columns `input_ids`, `labels`, `row` and, unless it came tokenized, [`Example`]'s, and
        `alternate`, other answers to the same prompt, if it has them.

    Raises:
        ValueError: If it is empty, a column is missing, or a row has no answer; bad rows are named.
    """
    dataset = as_dataset(dataset, name)
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty: it needs at least one row.")
    columns = set(dataset.column_names)
    is_text = any(columns.issuperset(kind) for kind in KINDS)
    if {"input_ids", "labels"} <= columns or ("input_ids" in columns and not is_text):
        if dataset.features.get("row") == Value("int64") and "labels" in columns:  # from here
            if not has_columns_to_check(dataset.column_names):
                return dataset
        return read_tokenized(dataset, tokenizer.pad_token_id, max_length, name, tokenizer.eos_token_id)
    if not is_text:
        raise ValueError(f"`{name}` needs the columns of one of the kinds {KINDS}, but it has {sorted(columns)}.")
    check_columns(dataset, _READ, name)

    def tokenize(row: dict, index: int) -> dict:
        try:
            example = render(row, tokenizer, prompt_template)
            kept = {"alternate": _alternates(row["alternate"])} if "alternate" in row else {}
            return {**example._asdict(), **encode(tokenizer, example, max_length), **kept, "row": index}
        except ValueError as error:
            raise ValueError(f"Row {index} of `{name}`: {error}") from error

    tokenized = dataset.map(
        tokenize,
        with_indices=True,
        remove_columns=dataset.column_names,
        desc=f"Tokenizing {name}",
        **_NOT_CACHED,
    )
    num_cut = sum(len(ids) == max_length and ids[-1] != tokenizer.eos_token_id for ids in tokenized["input_ids"])
    if num_cut:
        logger.warning(f"{num_cut} answers of `{name}` are cut off at `max_length`={max_length}.")
    return tokenized


def _alternates(answers: str | list[str]) -> list[str]:
    answers = [answers] if isinstance(answers, str) else answers
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError(f"`alternate` must hold at least one answer and no empty one, but it is {answers!r}.")
    return answers


def _render_template(question: str, answer: str, template: str) -> Example:
    before, placeholder, after = template.partition("{answer}")
    if not placeholder or after or "{question}" not in before:
        raise ValueError(f"`prompt_template` must hold {{question}} and end with {{answer}}, but it is {template!r}.")
    # White space before an answer belongs to its first token in every common tokenizer.
    prompt = before.rstrip()
    answer = before[len(prompt) :] + answer
    return Example(prompt.replace("{question}", question), answer, answer.strip(), is_chat=False)
