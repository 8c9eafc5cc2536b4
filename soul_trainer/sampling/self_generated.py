"""Retain rows that the model itself writes, for who has no retain set."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..batch import IGNORE_INDEX
from ..engines import Engine
from ..formats import encode, render
from ..settings import check_at_least, check_choice
from .drawing import (
    ANSWER,
    QUESTION,
    TEXT,
    Sampled,
    SamplingConfig,
    open_ids,
    room_for,
    sample,
    special_tokens,
    words_of,
)


logger = logging.get_logger(__name__)

KINDS = ("auto", "question", "text")
_PLACE = "QUESTIONPLACE"
# A model that gives no row in so many texts gives none: one that learnt answers alone cannot ask, for instance.
_HOPELESS = 100


class SelfGenerated(NamedTuple):
    """
    Retain rows of the model's own.

    Attributes:
        rows (`list[dict]`): Question/answer or text rows of [`~formats`].
        dropped (`dict[str, int]`): How many texts were dropped, by the reason in words.
    """

    rows: list[dict]
    dropped: dict[str, int]


def self_generated_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_rows: int,
    forget_rows: Dataset | list[dict] = (),
    kind: str = "auto",
    prompts: Sequence[str] = (),
    terms: Sequence[str] = (),
    ngram: int = 8,
    prompt_template: str | None = None,
    config: SamplingConfig | None = None,
    max_tries: int = 10,
    engine: Engine | None = None,
) -> SelfGenerated:
    """
    Retain rows that the model itself writes, for who has no retain set.

    Questions are had as Magpie has them (Xu et al., 2024, arXiv 2406.08464): the model goes on from what comes before
    a question in its chat template, or in the template of question/answer rows, and then answers what it asked. Magpie
    answers greedily; here answers are sampled as questions are, from the distribution that is to be kept. Texts go on
    from the token that begins a text, or from `prompts`.

    Questions and answers that were cut off are dropped; texts are as long as they may be, and no end of theirs counts.
    What shares `ngram` words in a row with a row to forget, or has one of `terms` in it, is dropped and drawn again:
    it is what must be forgotten. A forget row of fewer words is looked for as a whole.

    Args:
        model ([`~transformers.PreTrainedModel`]): Before unlearning, in the precision that it is to run in.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.
        num_rows (`int`): Rows that are wanted.
        forget_rows ([`~datasets.Dataset`] or `list[dict]`, *optional*): Of any kind of [`~formats`], or tokenized.
        kind (`str`, *optional*, defaults to `"auto"`):
            `"question"`, `"text"`, or `"auto"`: questions if the tokenizer has a chat template or `prompt_template` is
            given, else texts.
        prompts (`Sequence[str]`, *optional*): Beginnings of texts, taken in turn.
        terms (`Sequence[str]`, *optional*): Words, such as names, that no row may have in it; case does not matter.
        ngram (`int`, *optional*, defaults to 8): At least 1.
        prompt_template (`str`, *optional*): As in training; see [`~formats.render`].
        config ([`SamplingConfig`], *optional*): How the model writes.
        max_tries (`int`, *optional*, defaults to 10): For each row.
        engine ([`~engines.Engine`], *optional*): Shares the rows over its processes; all of them get all rows.

    Returns:
        [`SelfGenerated`]: With fewer rows than asked for, and a warning that says why, if tries run out.

    Raises:
        ValueError: If an argument is out of its range, no text can begin or no question end, or no row is left.
    """
    config = config or SamplingConfig()
    check_choice("kind", kind, KINDS)
    check_at_least(1, num_rows=num_rows, ngram=ngram, max_tries=max_tries)
    if kind == "auto":
        kind = "question" if tokenizer.chat_template or prompt_template else "text"
    if kind == "question" and prompts:
        raise ValueError("`prompts` begin texts: use kind='text', or leave them out.")
    writer = _Writer(model, tokenizer, config, engine, prompt_template, tuple(prompts))
    forbidden = _Forbidden((_text_of(row, tokenizer) for row in forget_rows), terms, ngram)
    found: dict[int, dict] = {}
    dropped, pending = Counter(), list(range(num_rows))
    for attempt in range(max_tries):
        rows = (writer.questions if kind == "question" else writer.texts)(pending, attempt)
        for place, row in zip(pending, rows):
            reason = forbidden.reason(_text_of(row, tokenizer)) if row else "empty or cut off"
            if reason:
                dropped[reason] += 1
            else:
                found[place] = row
        pending = [place for place in pending if place not in found]
        if not pending or (not found and sum(dropped.values()) >= _HOPELESS):
            break
    reasons = "; ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not found:
        raise ValueError(
            f"None of {sum(dropped.values())} texts of the model's own can be retain text: {reasons}. Bring a retain "
            "set, sample another `kind`, or raise `max_new_tokens` or `ngram`."
        )
    if dropped:
        missing = f"; {len(pending)} of {num_rows} rows are missing after {max_tries} tries" if pending else ""
        logger.warning(f"Texts of the model's own that were dropped: {reasons}{missing}.")
    return SelfGenerated([found[place] for place in sorted(found)], dict(dropped))


class _Writer:
    """Questions with answers, or texts, by their places and tries."""

    def __init__(self, model, tokenizer, config: SamplingConfig, engine, prompt_template: str | None, prompts: tuple):
        self.model, self.tokenizer, self.config, self.engine = model, tokenizer, config, engine
        self.prompt_template, self.prompts = prompt_template, prompts

    def texts(self, places: list[int], attempt: int) -> list[dict | None]:
        begun = [self.prompts[place % len(self.prompts)] if self.prompts else "" for place in places]
        ids = {text: open_ids(self.tokenizer, text) for text in set(begun)}
        said = self._sample([ids[text] for text in begun], TEXT, places, attempt, (), "Texts of the model's own")
        return [{"text": text + each.text} if each.text.strip() else None for text, each in zip(begun, said)]

    def questions(self, places: list[int], attempt: int) -> list[dict | None]:
        before, stop, is_chat = self._frame()
        ids = open_ids(self.tokenizer, before, is_chat)
        said = self._sample([ids] * len(places), QUESTION, places, attempt, (stop,), "Questions of the model's own")
        ends = (stop, "") if stop in special_tokens(self.tokenizer) else (stop,)
        kept = [(place, text) for place, each in zip(places, said) if each.end in ends and (text := each.text.strip())]
        prompts = [_prompt_ids(self.tokenizer, self._row(question, "a"), self.prompt_template) for _, question in kept]
        answered = self._sample(prompts, ANSWER, [place for place, _ in kept], attempt, (), "Their answers")
        # An answer that was cut off would teach the model to end in the midst of one.
        answers = ["" if each.end is None else each.text.strip() for each in answered]
        rows = {place: self._row(question, answer) for (place, question), answer in zip(kept, answers) if answer}
        return [rows.get(place) for place in places]

    @staticmethod
    def _row(question: str, answer: str) -> dict:
        return {"question": question, "answer": answer}

    def _sample(self, prompts, purpose: int, places: list[int], attempt: int, stops, description) -> list[Sampled]:
        if not prompts:
            return []
        # A question leaves as much room to its answer as it may take.
        room = room_for(self.model, self.tokenizer, prompts, self.config, 2 if purpose == QUESTION else 1)
        draws = [(self.config.seed, purpose, place, attempt) for place in places]
        return sample(self.model, self.tokenizer, prompts, draws, self.config, room, stops, self.engine, description)

    def _frame(self) -> tuple[str, str, bool]:
        """What comes before a question, what ends it, and whether a chat template says so."""
        example = render(self._row(_PLACE, "a"), self.tokenizer, self.prompt_template)
        before, _, after = example.prompt.partition(_PLACE)
        line = next(iter(after.strip().splitlines()), "")
        special = [token for token in special_tokens(self.tokenizer) if token in line]
        first = min(special, key=line.index, default="")
        # Decoded texts have no special tokens in them: such a stop must be the token itself.
        stop = line.partition(first)[0].strip() or first if first else line
        if not stop:
            raise ValueError(
                "the template does not say where a question ends: put a word between {question} and {answer}, or use "
                "kind='text'."
            )
        return before.rstrip(" "), stop, example.is_chat


class _Forbidden:
    """What retain text must not have in it."""

    def __init__(self, texts: Iterable[str], terms: Sequence[str], ngram: int):
        self.ngram, self.terms = ngram, [words_of(term) for term in terms if words_of(term)]
        self.grams: dict[int, set[tuple]] = {}
        for words in filter(None, map(words_of, texts)):
            size = min(ngram, len(words))
            self.grams.setdefault(size, set()).update(_runs(words, size))

    def reason(self, text: str) -> str | None:
        """Why a text is dropped; `None` if it is not."""
        words = words_of(text)
        if any(tuple(term) in set(_runs(words, len(term))) for term in self.terms):
            return "with a term to be forgotten"
        if any(not grams.isdisjoint(_runs(words, size)) for size, grams in self.grams.items()):
            return "that repeat rows to forget"
        return None


def _runs(words: list[str], size: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(size)))


def _text_of(row: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    """All that a row says."""
    if "input_ids" in row:
        return tokenizer.decode(row["input_ids"], skip_special_tokens=True)
    parts = [row[key] for key in ("messages", "question", "answer", "prompt", "completion", "text") if row.get(key)]
    messages = [part if isinstance(part, list) else [{"content": part}] for part in parts]
    return " ".join(message["content"] for several in messages for message in several)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, row: dict, prompt_template: str | None) -> list[int]:
    example = render(row, tokenizer, prompt_template)
    encoded = encode(tokenizer, example)
    return encoded["input_ids"][: encoded["labels"].count(IGNORE_INDEX)]
