"""
Unlearning by the input alone: the model stays as it is, and something stands before whatever it is asked.

| `input_method` | what stands there | source |
|---|---|---|
| `system_prompt` | an instruction that names what to avoid | guardrails, Thaker et al., 2024, arXiv 2403.03329 |
| `in_context` | rows to forget with other answers, then rows to retain | Pawelczyk et al., 2023, arXiv 2310.07579 |

In a chat these are a system message and earlier turns, elsewhere text with an empty line in between. They are
baselines: the weights still know, and whoever writes the whole input gets at it.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from random import Random

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from soul_trainer.formats import Example, encode_all

from .attacks.prompting import with_shots
from .suites.own import load


NONE, SYSTEM_PROMPT, IN_CONTEXT = INPUT_METHODS = ("none", "system_prompt", "in_context")
AVOID = "{avoid}"
INSTRUCTION = (
    "You must not reveal anything about {avoid}. When you are asked about it, answer as someone would who has never "
    "heard of it, and say that you do not know. Answer everything else as usual."
)
# Columns with other answers of a row: a text, or a list whose first counts.
OTHER_ANSWERS = ("alternate", "perturbed_answer")
# What an input method makes of a row of `soul_trainer.formats`: another one.
Transform = Callable[[dict], dict]


@dataclass
class InputArguments:
    """
    Unlearning by the input alone, a baseline.

    Raises:
        ValueError: If the method is unknown, or a setting is missing, out of its range, or another method's.
    """

    input_method: str = field(
        default=NONE,
        metadata={"help": f"What stands before each prompt, the model as it is: {', '.join(INPUT_METHODS)}."},
    )
    input_avoid: str | None = field(
        default=None, metadata={"help": "What to avoid, in words: 'the author Jane Doe and her books'."}
    )
    input_instruction: str = field(
        default=INSTRUCTION, metadata={"help": "The system prompt, with {avoid} where that goes."}
    )
    input_examples: str | None = field(
        default=None,
        metadata={
            "help": "Rows to forget, for in_context: a file, a folder, or a hub id, as ID:CONFIG:SPLIT. Their other "
            f"answers are in a column {' or '.join(OTHER_ANSWERS)}, or else those of other rows."
        },
    )
    input_retain_examples: str | None = field(default=None, metadata={"help": "Rows to retain, for in_context."})
    input_num_examples: int | None = field(
        default=None, metadata={"help": "So many of the rows to forget, drawn at random; by default all."}
    )
    input_num_retain_examples: int = field(
        default=4, metadata={"help": "So many of the rows to retain, drawn at random; >= 0."}
    )

    def __post_init__(self):
        if self.input_method not in INPUT_METHODS:
            raise ValueError(
                f"`input_method` must be one of {', '.join(INPUT_METHODS)}, but it is {self.input_method!r}."
            )
        owners = {"input_avoid": SYSTEM_PROMPT, "input_examples": IN_CONTEXT, "input_retain_examples": IN_CONTEXT}
        for name, method in owners.items():
            is_given = bool((getattr(self, name) or "").strip())
            if is_given and self.input_method != method:
                raise ValueError(f"`{name}` is for `input_method={method}`, but the method is {self.input_method!r}.")
            if not is_given and self.input_method == method and name != "input_retain_examples":
                raise ValueError(f"`input_method={method}` needs `{name}`.")
        if AVOID not in self.input_instruction:
            raise ValueError(f"`input_instruction` must hold {AVOID}, but it is {self.input_instruction!r}.")
        if self.input_num_examples is not None and self.input_num_examples < 1:
            raise ValueError(f"`input_num_examples` must be at least 1, but it is {self.input_num_examples}.")
        if self.input_num_retain_examples < 0:
            raise ValueError(f"`input_num_retain_examples` must be >= 0, but it is {self.input_num_retain_examples}.")


@dataclass(frozen=True)
class InputMethod:
    """
    An input method, ready for use.

    Attributes:
        transform (`Callable`): Takes a row of `soul_trainer.formats` and gives the one that is asked instead.
        settings (`dict`): What tells it from others, the examples included.
    """

    transform: Transform
    settings: dict


def load_input_method(
    arguments: InputArguments,
    tokenizer: PreTrainedTokenizerBase,
    prompt_template: str | None = None,
    seed: int = 0,
) -> InputMethod | None:
    """
    Loads what an input method needs.

    Args:
        arguments ([`InputArguments`]): Which.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.
        prompt_template (`str`, *optional*): As in training; see `soul_trainer.formats.render`.
        seed (`int`, *optional*, defaults to 0): Of the examples and of their other answers.

    Returns:
        [`InputMethod`]: `None` for `"none"`.

    Raises:
        ValueError: If examples are not there, too few, have no prompt, or no other answer can be found.
    """
    if arguments.input_method == NONE:
        return None
    if arguments.input_method == SYSTEM_PROMPT:
        # Not a format string: what is to be avoided may hold braces.
        text = arguments.input_instruction.replace(AVOID, arguments.input_avoid)
        own = {"input_instruction": text}
        transform = partial(with_instruction, text=text, tokenizer=tokenizer, prompt_template=prompt_template)
    else:
        examples = _examples(arguments, seed)
        content = json.dumps(examples, sort_keys=True, ensure_ascii=False)
        names = ("input_examples", "input_retain_examples", "input_num_examples", "input_num_retain_examples")
        own = {name: value for name, value in asdict(arguments).items() if name in names}
        own |= {"input_seed": seed, "input_digest": hashlib.sha256(content.encode()).hexdigest()}
        # No example is left out where its own question is asked: it stands there to be contradicted.
        transform = partial(with_shots, row={}, shots=examples, tokenizer=tokenizer, prompt_template=prompt_template)
    return InputMethod(transform, {"input_method": arguments.input_method, **own})


def with_instruction(
    row: dict, text: str, tokenizer: PreTrainedTokenizerBase, prompt_template: str | None = None
) -> dict:
    """
    A row with an instruction before it: in a chat a system message or, where the template takes none, the beginning of
    the first message; elsewhere text with an empty line after it.

    Args:
        row (`dict`): Of a kind of `soul_trainer.formats`.
        text (`str`): The instruction.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its chat template decides.
        prompt_template (`str`, *optional*): As in training; see `soul_trainer.formats.render`.

    Returns:
        `dict`: Of `messages`, or of `prompt` and `completion`.
    """
    asked = with_shots(row, {}, [], tokenizer, prompt_template)
    if "messages" not in asked:
        return {**asked, "prompt": f"{text}\n\n{asked['prompt']}"}
    first, *others = asked["messages"]
    if first["role"] == "system" or not takes_system_message(tokenizer):
        return {"messages": [{**first, "content": f"{text}\n\n{first['content']}"}, *others]}
    return {"messages": [{"role": "system", "content": text}, first, *others]}


def takes_system_message(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template writes out a system message; some refuse it and some leave it out."""
    probe = "an instruction"
    messages = [{"role": "system", "content": probe}, {"role": "user", "content": "a question"}]
    try:
        return probe in tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:
        return False


def other_answers(rows: list[dict], pool: list[dict], seed: int = 0) -> list[dict]:
    """
    Rows with other answers than their own: that of a column of `OTHER_ANSWERS`, or else one drawn from other rows.

    Args:
        rows (`list[dict]`): With a prompt, of a kind of `soul_trainer.formats`.
        pool (`list[dict]`): Rows whose answers may be drawn.
        seed (`int`, *optional*, defaults to 0): Of the draw.

    Returns:
        `list[dict]`: The same kinds, without other columns.

    Raises:
        ValueError: If all answers of `pool` are the row's own; the row's question is named.
    """
    random, found = Random(seed), []
    answers = list(dict.fromkeys(_answer(row) for row in pool))
    for row in rows:
        column = next((row[name] for name in OTHER_ANSWERS if row.get(name)), None)
        if column is None:
            others = [answer for answer in answers if answer != _answer(row)]
            if not others:
                raise ValueError(
                    f"There is no other answer than {_answer(row)[:60]!r}: give the rows of `input_examples` a column "
                    f"{OTHER_ANSWERS[0]!r}."
                )
            column = random.choice(others)
        found.append(_answered(row, column if isinstance(column, str) else column[0]))
    return found


def check_lengths(
    examples: list[list[Example]],
    plain: list[list[Example]],
    names: list[str],
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
) -> None:
    """
    Raises a `ValueError` that names the first row that a model takes, but not after what an input method puts before
    it: answers that are cut off would have other figures.

    Args:
        examples (`list[list[Example]]`): Of each row, as they are asked.
        plain (`list[list[Example]]`): The same without the input method.
        names (`list[str]`): Of the rows.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.
        limit (`int`, *optional*): Tokens that the model takes.
    """
    flat = [(name, *pair) for name, *pairs in zip(names, examples, plain) for pair in zip(*pairs)]
    encoded, before = (encode_all(tokenizer, [entry[place] for entry in flat]) for place in (1, 2))
    for (name, *_), row, plain_row in zip(flat, encoded, before):
        length, plain_length = (len(each["input_ids"]) for each in (row, plain_row))
        if limit is not None and plain_length <= limit < length:
            raise ValueError(
                f"{name}: its {plain_length} tokens are {length} after what `input_method` puts before them, over the "
                f"model's {limit}: shorten `input_avoid`, or lower `input_num_examples` or "
                "`input_num_retain_examples`."
            )


def _examples(arguments: InputArguments, seed: int) -> list[dict]:
    sources = {"input_examples": arguments.input_examples, "input_retain_examples": arguments.input_retain_examples}
    rows = {name: load(source, name=name).to_list() if source else [] for name, source in sources.items()}
    for name, found in rows.items():
        for place, row in enumerate(found):
            if "text" in row and not {"messages", "question", "prompt"} & row.keys():
                raise ValueError(f"Row {place} of `{name}` is a text without a prompt: it can be no example.")
    forget, retain = rows.values()
    chosen = _drawn(forget, arguments.input_num_examples, "input_num_examples", seed)
    kept = _drawn(retain, arguments.input_num_retain_examples, "input_num_retain_examples", seed) if retain else []
    return other_answers(chosen, forget + retain, seed) + [_answered(row, _answer(row)) for row in kept]


def _drawn(rows: list[dict], count: int | None, name: str, seed: int) -> list[dict]:
    if count is None:
        return rows
    if count > len(rows):
        raise ValueError(f"`{name}` must be at most {len(rows)}, all rows, but it is {count}.")
    return Random(seed).sample(rows, count)


def _answer(row: dict) -> str:
    if "messages" in row:
        return row["messages"][-1]["content"]
    answer = row["answer"] if "question" in row else row["completion"]
    return answer if isinstance(answer, str) else answer[-1]["content"]


def _answered(row: dict, answer: str) -> dict:
    """The row with this answer, without further columns."""
    if "messages" in row:
        *before, last = row["messages"]
        return {"messages": [*before, {**last, "content": answer}]}
    if "question" in row:
        return {"question": row["question"], "answer": answer}
    if isinstance(row["completion"], str):
        return {"prompt": row["prompt"], "completion": answer}
    return {"prompt": row["prompt"], "completion": [{**row["completion"][-1], "content": answer}]}
