"""Asks a model what a suite wants to know of its rows: in whole batches, over several processes, and never twice."""

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from soul_trainer.engines import Engine
from soul_trainer.formats import Example, render

from .gradient_norms import gradient_norms
from .input_methods import Transform, check_lengths
from .journal import Journal, Key
from .scoring import AUTO, generate_answers, longest_input, score_answers
from .suites.base import BARS, DETAILS, GENERATION, GRADIENT, Part


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    parts_of: Callable[[dict], list[Part]],
    batch_size: int | str = AUTO,
    prompt_template: str | None = None,
    engine: Engine | None = None,
    journal: Journal | None = None,
    progress: bool = True,
    transform: Transform | None = None,
    name: str = "",
) -> list[dict]:
    """
    Asks all parts of all rows.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, on the device where it is to run.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        rows (`list[dict]`): The same on every process, each with `split` and `index`.
        parts_of (`Callable`): The parts of a row; see [`~suites.base.Suite`].
        batch_size (`int` or `str`, *optional*, defaults to `"auto"`): Tokens in a batch, padding included.
        prompt_template (`str`, *optional*): As in training; see `soul_trainer.formats.render`.
        engine ([`~soul_trainer.engines.Engine`], *optional*): Shares the rows out over its processes.
        journal ([`~journal.Journal`], *optional*): What is in it is not asked again.
        progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.
        transform (`Callable`, *optional*): What is asked instead of a part's answers; see [`~input_methods`].
        name (`str`, *optional*): Of the model, for the progress bars.

    Returns:
        `list[dict]`: On every process, the rows with the fields of their parts.

    Raises:
        ValueError: If a row cannot be rendered (it is named), or a prompt is too long (its beginning is).
    """
    keys_of = []
    parts: dict[Key, Part] = {}
    for row in rows:
        own = {(row["split"], row["index"], part.name): part for part in parts_of(row)}
        keys_of.append(list(own))
        parts |= own
    found = dict(journal.done) if journal else {}
    passes: dict[tuple, dict[Key, Part]] = defaultdict(dict)
    for key, part in parts.items():
        passes[part.kind, part.max_new_tokens][key] = part
    settings = {"engine": engine, "progress": progress and (engine is None or engine.process_index == 0)}
    for (kind, max_new_tokens), members in passes.items():
        known = members.keys() & found.keys()
        if len(known) == len(members):
            continue
        # What is known as well, because the others' batches are the same then.
        examples = {key: _examples(key, part, tokenizer, prompt_template, transform) for key, part in members.items()}
        if transform:
            plain = [_examples(key, part, tokenizer, prompt_template) for key, part in members.items()]
            names = [f"Row {index} of `{split}`" for split, index, _ in members]
            limit = longest_input(model, tokenizer)
            check_lengths(list(examples.values()), plain, names, tokenizer, limit)
        settings["description"] = f"{name}: {BARS[kind]}" if name else BARS[kind].capitalize()
        if kind == GRADIENT:
            unknown = {key: rendered for key, rendered in examples.items() if key not in known}
            answers = _gradient_norms(model, tokenizer, unknown, **settings)
        elif kind == GENERATION:
            prompts = [rendered for (rendered,) in examples.values()]
            places = [place for place, key in enumerate(examples) if key in known]
            texts = generate_answers(model, tokenizer, prompts, batch_size, max_new_tokens, known=places, **settings)
            answers = _with_keys(list(examples), texts)
        else:
            scoring = {"batch_size": batch_size, "details": kind == DETAILS, **settings}
            answers = _whole_parts(model, tokenizer, examples, known, scoring)
        found |= _finished(((key, each) for key, each in answers if key not in known), members, journal, engine)
    merged = []
    for row, keys in zip(rows, keys_of):
        fields = [found[key] for key in keys]
        merged.append({name: value for each in (row, *fields) for name, value in each.items()})
    return merged


def _with_keys(keys: list[Key], answers: Iterator[tuple[int, str]]) -> Iterator[tuple[Key, str]]:
    """Answers under their keys instead of their places."""
    return ((keys[place], answer) for place, answer in answers)


def _gradient_norms(
    model, tokenizer, examples: dict[Key, list[Example]], engine: Engine | None, progress: bool, description: str
) -> Iterator:
    if engine is not None and engine.shards:
        raise ValueError("Norms of gradients need a whole model on each process: evaluate without them here.")
    keys = list(examples)[slice(None) if engine is None else slice(engine.process_index, None, engine.num_processes)]
    limit = longest_input(model, tokenizer)
    for key in tqdm(keys, desc=description, unit="row", disable=not progress):
        try:
            yield key, gradient_norms(model, tokenizer, examples[key], progress=False, max_length=limit)[0]
        except ValueError as error:
            raise ValueError(f"Row {key[1]} of `{key[0]}`: {error}") from error


def _whole_parts(
    model, tokenizer, examples: dict[Key, list[Example]], known: Collection[Key], settings: dict
) -> Iterator:
    """Keys of parts and the scores of all their answers, which may have been given on several processes."""
    flat = [(key, place) for key, rendered in examples.items() for place in range(len(rendered))]
    scores: dict[Key, dict] = defaultdict(dict)
    everything = [example for rendered in examples.values() for example in rendered]
    places = [place for place, (key, _) in enumerate(flat) if key in known]
    for place, score in score_answers(model, tokenizer, everything, known=places, **settings):
        key, answer = flat[place]
        scores[key][answer] = score
        if len(scores[key]) == len(examples[key]):
            yield key, [score for _, score in sorted(scores.pop(key).items())]
    engine = settings["engine"]
    if engine is not None:
        for key, answers in engine.gather(list(scores.items())):
            scores[key] |= answers
        yield from ((key, [score for _, score in sorted(answers.items())]) for key, answers in scores.items())


def _finished(
    answers: Iterator, parts: dict[Key, Part], journal: Journal | None, engine: Engine | None
) -> dict[Key, dict]:
    """The fields of all processes' parts; they are made of answers while the next batch runs."""

    def finish(key: Key, answer) -> tuple[Key, dict]:
        fields = parts[key].finish(answer)
        if journal:
            journal.add(key, fields)
        return key, fields

    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting, finished = deque(), []
        for key, answer in answers:
            waiting.append(pool.submit(finish, key, answer))
            while waiting and waiting[0].done():  # what fails must not wait for all that follows
                finished.append(waiting.popleft().result())
        finished += [each.result() for each in waiting]
    return dict(engine.gather(finished) if engine is not None else finished)


def _examples(
    key: Key,
    part: Part,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    transform: Transform | None = None,
) -> list[Example]:
    try:
        answers = [transform(answer) for answer in part.answers] if transform else part.answers
        return [render(answer, tokenizer, template) for answer in answers]
    except ValueError as error:
        raise ValueError(f"Row {key[1]} of `{key[0]}`: {error}") from error
