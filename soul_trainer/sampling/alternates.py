"""Plausible other answers to the questions to forget, by the model itself: what AltPO prefers to the true ones."""

import re

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..engines import Engine
from ..formats import render
from .drawing import ALTERNATE, SamplingConfig, open_ids, room_for, sample, words_of


logger = logging.get_logger(__name__)

# AltPO's instruction for Llama-2 (Mekala et al., 2024), and the words that its answer begins with.
ALTERNATE_PROMPT = (
    "Question: {question}\nAnswer: {answer}\nNow write another version of the answer with some alternate plausible "
    "facts that change answer details."
)
ALTERNATE_LEAD = "Alternate Answer:"
# Where AltPO cuts an answer off: the model asks itself another question.
ALTERNATE_STOPS = ("Question:", "Q:")


def add_alternates(
    dataset: Dataset | list[dict],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_alternates: int = 5,
    prompt: str = ALTERNATE_PROMPT,
    config: SamplingConfig | None = None,
    max_tries: int = 10,
    engine: Engine | None = None,
    name: str = "forget_dataset",
) -> Dataset:
    """
    Adds the column `alternate` to forget rows: other answers, which the model itself writes when it is asked to change
    the facts of the true one. AltPO (Mekala et al., 2024, arXiv 2409.13474) prefers them to the true one.

    Its released code writes 5 for each question at temperature 1, up to 200 tokens, with the prompt that is the
    default here, and trains on TOFU with `beta` 0.1, retain weight 1, learning rate 5e-5, 2 epochs and 5 alternates a
    question. It leaves `top_k` to transformers, which was 50 then, and keeps what repeats the true answer.

    Args:
        dataset ([`~datasets.Dataset`] or `list[dict]`):
            Rows with a prompt: question/answer, prompt/completion or messages.
        model ([`~transformers.PreTrainedModel`]): Before unlearning, in the precision that it is to run in.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's; its chat template is used if it has one.
        num_alternates (`int`, *optional*, defaults to 5): Of each row.
        prompt (`str`, *optional*): What the user says, with `{question}` and, if it is to be seen, `{answer}`.
        config ([`SamplingConfig`], *optional*): How the model writes.
        max_tries (`int`, *optional*, defaults to 10): For each alternate. Empty texts and the true answer are refused.
        engine ([`~engines.Engine`], *optional*): Shares the rows over its processes; all of them get all rows.
        name (`str`, *optional*, defaults to `"forget_dataset"`): What errors call the dataset.

    Returns:
        [`~datasets.Dataset`]: The rows with `alternate`, a list of `num_alternates` strings each.

    Raises:
        ValueError: If rows are texts without a prompt or have `alternate` already, `prompt` has no `{question}`, or
            the model gives nothing else than the true answer; the row is named.
    """
    dataset = Dataset.from_list(dataset) if isinstance(dataset, list) else dataset
    config, columns = config or SamplingConfig(), set(dataset.column_names)
    if not columns & {"messages", "question", "prompt"}:
        raise ValueError(
            f"`{name}` has no prompts, only {sorted(columns)}: an alternate answers a question. Bring rows of "
            "question/answer, prompt/completion or messages, or choose a forget loss without alternates."
        )
    if "alternate" in columns:
        raise ValueError(f"`{name}` has a column `alternate` already: it needs no other, or remove it first.")
    if "{question}" not in prompt:
        raise ValueError(f"`prompt` must hold {{question}}, but it is {prompt!r}.")
    if num_alternates < 1 or max_tries < 1:
        raise ValueError(f"`num_alternates`={num_alternates} and `max_tries`={max_tries} must be at least 1.")
    asked, truths = [], []
    for index, row in enumerate(dataset):
        try:
            truths.append(words_of(render(row, tokenizer).content))
            asked.append(_alternate_prompt(row, tokenizer, prompt))
        except ValueError as error:
            raise ValueError(f"Row {index} of `{name}`: {error}") from error
    found: dict[tuple[int, int], str] = {}
    pending = [(row, place) for row in range(len(dataset)) for place in range(num_alternates)]
    try:
        room, num_refused = room_for(model, tokenizer, asked, config), 0
    except ValueError as error:
        longest = max(range(len(asked)), key=lambda row: len(asked[row]))
        raise ValueError(f"Row {longest} of `{name}`: {error}") from error
    for attempt in range(max_tries):
        draws = [(config.seed, ALTERNATE, *key, attempt) for key in pending]
        prompts = [asked[row] for row, _ in pending]
        said = sample(model, tokenizer, prompts, draws, config, room, ALTERNATE_STOPS, engine, "Alternate answers")
        texts = {key: each.text.strip() for key, each in zip(pending, said)}
        found |= {key: text for key, text in texts.items() if words_of(text) not in ([], truths[key[0]])}
        pending = [key for key in pending if key not in found]
        num_refused += len(pending)
        if not pending:
            break
    if pending:
        row, text = pending[0][0], texts[pending[0]]
        raise ValueError(
            f"Row {row} of `{name}`: in {max_tries} tries the model gave no other answer than the true one, or none "
            f"(the last was {text[:60]!r}). Raise `temperature` or `max_tries`, write another `prompt`, or bring a "
            "column `alternate` of your own."
        )
    if num_refused:
        logger.warning(f"{num_refused} alternates were empty or the true answer, and were sampled again.")
    lists = [[found[row, place] for place in range(num_alternates)] for row in range(len(dataset))]
    return dataset.add_column("alternate", lists)


def _alternate_prompt(row: dict, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    *context, asked, answer = _turns(row)
    values = {"question": asked["content"].strip(), "answer": answer["content"].strip()}
    said = re.sub(r"\{(question|answer)\}", lambda found: values[found[1]], prompt)
    if not tokenizer.chat_template:
        return open_ids(tokenizer, f"{said}\n{ALTERNATE_LEAD}")
    turns = [*context, {"role": "user", "content": said}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return open_ids(tokenizer, text + ALTERNATE_LEAD, is_chat=True)


def _turns(row: dict) -> list[dict]:
    """A row as messages, of which the last is the answer."""
    if "messages" in row:
        return row["messages"]
    prompt, completion = (row["question"], row["answer"]) if "question" in row else (row["prompt"], row["completion"])
    if isinstance(prompt, list):
        return prompt + completion
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
