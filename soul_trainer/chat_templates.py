"""
Conversations as text: what a chat template writes before an answer, where the answer stands in it, and where it ends.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .sources import TEMPLATE_COLUMNS


logger = logging.get_logger(__name__)

# Of `apply_chat_template`, and set here.
_OWN_OPTIONS = {"conversation", "messages", "tools", "chat_template", "add_generation_prompt", "tokenize"}
_OWN_OPTIONS |= {"continue_final_message", "return_tensors", "return_dict", "padding", "truncation", "max_length"}
# Stands for an answer where its place is looked for.
_PLACE = "SoulTrainerAnswer"
_OWN_TEMPLATE = "Rows of questions and answers may have a `prompt_template` of their own instead."


class Example(NamedTuple):
    """
    One row as text.

    Attributes:
        prompt (`str`): What the model is given; may be empty.
        answer (`str`): What the model must say, with the white space that parts it from the prompt and, in a chat, the
            end of the turn. What a chat template writes after that, such as ChatML's newline, is in no example.
        content (`str`): The bare answer, a part of `answer`.
        is_chat (`bool`): Whether a chat template wrote it, special tokens included.
        between (`Sequence[Sequence[int]]`): Where a completion has several turns of the assistant's: the parts of
            `answer` between them, from one character to before another, which the model is given. `content` is of the
            first turn.
    """

    prompt: str
    answer: str
    content: str
    is_chat: bool
    between: Sequence[Sequence[int]] = ()

    def with_content(self, content: str) -> "Example":
        """The same prompt with another answer in the place of its own, which ends the conversation."""
        first_turn = self.answer[: self.between[0][0]] if self.between else self.answer
        return self._replace(answer=first_turn.replace(self.content, content, 1), content=content, between=())


def require_text(row: dict, *columns: str) -> None:
    """Raises a `ValueError` that names the first of these columns which holds no text."""
    for column in columns:
        if not isinstance(row[column], str) or not row[column].strip():
            raise ValueError(f"`{column}` is empty or not a string: {row[column]!r}.")


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """
    The special token that the chat template puts right after an answer, such as `<|eot_id|>`. It is where a chat model
    stops, and often another token than the tokenizer's `eos_token`.

    Returns:
        `int`: `None` where there is no chat template, or it puts no special token there.
    """
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    rendered = render_chat(turns, tokenizer).answer
    after = tokenizer(rendered.strip().removeprefix("answer"), add_special_tokens=False)["input_ids"]
    return after[0] if after and after[0] in special_tokens(tokenizer) else None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """
    All special tokens of a tokenizer by their ids. `all_special_ids` leaves out those without a role of their own, as
    is Gemma's `<end_of_turn>`.
    """
    added = {place: token.content for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))


def template_options(row: dict) -> dict[str, Any]:
    """What a row gives its chat template beside the messages: `tools`, and the names in `chat_template_kwargs`."""
    # As datasets keep them, whose columns have one type, either may be JSON.
    tools, others = (json.loads(each) if isinstance(each, str) else each for each in map(row.get, TEMPLATE_COLUMNS))
    if not isinstance(others, (dict, type(None))):
        raise ValueError(f"`chat_template_kwargs` must be a dictionary, but it is {others!r:.60}.")
    others = {name: value for name, value in (others or {}).items() if value is not None}
    if own := sorted(_OWN_OPTIONS & set(others)):
        raise ValueError(f"`chat_template_kwargs` has {own}, which are not the row's to say: remove them.")
    return {"tools": tools or None, **others}


def render_chat(
    messages: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    num_given: int | None = None,
    options: dict[str, Any] | None = None,
) -> Example:
    """
    A conversation whose last turn is the answer, and so are those of the assistant's after the first `num_given`.
    Where one stands is found by rendering the conversation a second time, with a word in its place that stands nowhere
    else: templates put more between the generation prompt and the answer (a scaffold for thinking, the header of a
    channel), or no generation prompt where there is an answer.
    """
    if not tokenizer.chat_template:
        raise ValueError("a row of `messages` needs a tokenizer with a chat template, and this one has none.")
    turns = []
    for message in messages:
        # Datasets fill in what only other rows have, and templates ask whether a key is there.
        turn = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
        if "role" not in turn or not {"content", "tool_calls"} & set(turn):
            raise ValueError(f"each of `messages` needs `role` and `content`, and one is {message!r:.80}.")
        turns.append({"content": "", **turn})
    messages = turns
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("`messages` must hold a prompt and end with the assistant's answer.")
    last = len(messages) - 1
    answers = [place for place in range(num_given or last, last) if messages[place]["role"] == "assistant"] + [last]
    whole = _apply_template(tokenizer, messages, options)
    spans = [_place_of(messages, answer, whole, tokenizer, options) for answer in answers]
    start, end = spans[0][0], spans[-1][1]
    between = [(one[1] - start, other[0] - start) for one, other in pairwise(spans)]
    return Example(whole[:start], whole[start:end], messages[answers[0]]["content"].strip(), True, between)


def _place_of(
    messages: list[dict], turn: int, whole: str, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any] | None
) -> tuple[int, int]:
    """From where to where a turn of the assistant's goes in the text of a conversation, with what ends it."""
    require_text(messages[turn], "content")
    others = [*messages[:turn], {**messages[turn], "content": _PLACE}, *messages[turn + 1 :]]
    framed = _apply_template(tokenizer, others, options)
    if framed.count(_PLACE) != 1:
        raise ValueError(f"the chat template writes the answer {framed.count(_PLACE)} times. {_OWN_TEMPLATE}")
    before, _, after = framed.partition(_PLACE)
    content, end = messages[turn]["content"].strip(), len(whole) - len(after)
    if not whole.startswith(before) or not whole.endswith(after) or whole[len(before) : end].strip() != content:
        raise ValueError(
            f"the chat template changes the assistant's answer, {content[:60]!r}, so that its tokens cannot be told: "
            f"put what it thinks first into `reasoning_content`. {_OWN_TEMPLATE}"
        )
    start, asking = len(before), {**(options or {}), "add_generation_prompt": True}
    asked = _apply_template(tokenizer, messages[:turn], asking)
    if before.startswith(asked) and not before[len(asked) :].strip():
        start = len(asked)  # white space before an answer belongs to its first token in every common tokenizer
    elif asked.startswith(before) and asked != before:
        logger.warning_once(
            f"The chat template's generation prompt goes on with {asked[len(before) :]!r}, which it leaves out where "
            "there is an answer: rows are trained on, and asked, without it."
        )
    return start, end + _end_of_turn_in(after, tokenizer, is_last=turn == len(messages) - 1)


def _end_of_turn_in(after: str, tokenizer: PreTrainedTokenizerBase, is_last: bool) -> int:
    """Where a turn ends in the text after its content: with the first special token, and those right behind it."""
    special = _special_pattern(tokenizer, len(tokenizer), tuple(tokenizer.all_special_ids))
    found = special.search(after)
    if found is None:
        return len(after) if is_last else 0
    end = found.end()
    # Behind a turn in the middle, the next token may begin the next turn.
    while is_last and (found := special.match(after, end)):
        end = found.end()
    return end


@lru_cache(maxsize=4)
def _special_pattern(tokenizer: PreTrainedTokenizerBase, num_tokens: int, ids: tuple[int, ...]) -> re.Pattern:
    """
    What any special token matches. Made once, not once a row: some tokenizers reserve a thousand. The number of tokens
    and the ids are there to tell a tokenizer that has changed.
    """
    return re.compile("|".join(re.escape(text) for text in special_tokens(tokenizer).values() if text) or "$^")


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict], options: dict[str, Any] | None) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **(options or {}))
    except (TemplateError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise ValueError(f"the chat template cannot write turns of {roles}: {error}. {_OWN_TEMPLATE}") from error
