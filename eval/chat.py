"""
Side by side: what the model before unlearning, the unlearned models and the gold model answer to one prompt.

    python -m soul_eval chat --run outputs/unlearn            # the output folder of a recipe
    python -m soul_eval chat --target DIR --model DIR --gold DIR --rows forget.jsonl

Opens a page on this machine (http://127.0.0.1:7860) and prints its address. No prompt and no answer is written to
disk or sent to another host. All models stay in memory: each takes 2 GB for every billion parameters in 16 bits, and
4 GB in 32 bits. Three models of 8B in bfloat16 need 48 GB, on one GPU if there is one.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import console
from .chat_setup import CONVERSATION, KINDS, QUESTION, TARGET, TEXT, Setup, find_run, named_models, offered_rows


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from soul_trainer.formats import Example
    from soul_trainer.sampling import SamplingConfig

# A prompt without a true answer is rendered with this in its place; only what comes before it is used.
PLACEHOLDER = "I"
DTYPES = ("float32", "bfloat16", "float16")
HOST, PORT = "127.0.0.1", 7860


def main(argv: Sequence[str] | None = None) -> int:
    """
    Opens the page and serves it until Ctrl-C.

    Args:
        argv (`Sequence[str]`, *optional*): By default the command line of the process.

    Returns:
        `int`: The exit status: 1 after an error, which is printed as a sentence.
    """
    return console.run("python -m soul_eval chat", run, sys.argv[1:] if argv is None else argv)


def run(argv: Sequence[str]) -> None:
    """
    [`main`] with errors that are raised.

    Args:
        argv (`Sequence[str]`): The command line, without the command.

    Raises:
        ValueError: If a flag or what it names is unusable.
        ImportError: If gradio is not installed; the message names the extra.
    """
    args = _parser().parse_args(argv)
    if bool(args.run) == bool(args.model or args.target):
        raise ValueError("name either a recipe's output folder with --run, or models with --target and --model.")
    if not args.run and not (args.model and args.target):
        raise ValueError("--target and --model go together: the model before unlearning, and the unlearned one.")
    if args.run and (args.gold or args.rows):
        raise ValueError("--gold and --rows go with --target and --model: --run finds its own.")
    from transformers.utils import logging

    from soul_trainer.sampling import SamplingConfig

    from . import chat_page

    # All that may fail comes before models are loaded, which may take minutes.
    chat_page.import_gradio()
    SamplingConfig(args.temperature, max_new_tokens=args.max_new_tokens)
    with chat_page.reserve(args.host, args.port) as place:
        setup = find_run(args.run) if args.run else named_models(args.target, args.model, args.gold, args.rows)
        named = {name: getattr(args, name) for name in ("dtype", "tokenizer", "trust_remote_code")}
        setup.loading |= {name: value for name, value in named.items() if value}
        setup.prompt_template = args.prompt_template or setup.prompt_template
        setup.autocast = None if args.dtype else setup.autocast
        sides = load_sides(setup, args.device)
        logging.disable_progress_bar()  # or each answer would have one
        page = chat_page.make_page(sides, offered_rows(setup), args.max_new_tokens, args.temperature)
        chat_page.serve(page, place, args.host)


@dataclass
class Side:
    """
    A model that is asked.

    Attributes:
        role (`str`): `target`, `unlearned` or `gold`.
        name (`str`): What the page calls it.
        model ([`~transformers.PreTrainedModel`]): On the device where it runs.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its own.
        prompt_template (`str`, *optional*): See [`Setup`].
        autocast (`torch.dtype`, *optional*): See [`Setup`].
    """

    role: str
    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    prompt_template: str | None = None
    autocast: "torch.dtype | None" = None


@dataclass(frozen=True)
class Answer:
    """
    What a model says.

    Attributes:
        side ([`Side`]): The model.
        greedy (`str`): Its most probable token each time, without outer white space.
        sampled (`str`): Tokens drawn from its distribution, without outer white space.
        loss (`float`, *optional*): Mean negative log-likelihood of the true answer per token, in nats, as evaluations
            have it in `answer_nll`; `None` if no answer was given.
        probability (`float`, *optional*): The geometric mean of its tokens' probabilities, `exp(-loss)`.
        is_cut (`bool`): Whether the end of the true answer is beyond what the model takes, and was not scored.
    """

    side: Side
    greedy: str
    sampled: str
    loss: float | None = None
    probability: float | None = None
    is_cut: bool = False


def load_sides(setup: Setup, device: str | None = None) -> list[Side]:
    """
    Loads the models, one after the other, and keeps them all.

    Args:
        setup ([`Setup`]): From [`find_run`] or [`named_models`].
        device (`str`, *optional*): `cpu`, `cuda:1`, ...; by default a GPU if there is one.

    Returns:
        `list[Side]`: The target, the unlearned models and, if there is one, the gold model.

    Raises:
        ValueError: If a folder holds no model.
    """
    import torch

    from soul_trainer.loading import default_device, load_model, load_tokenizer

    loading = {"dtype": "auto", "trust_remote_code": False, **setup.loading}
    tokenizer, revision = loading.pop("tokenizer", None), loading.pop("revision", None)
    autocast = getattr(torch, setup.autocast) if setup.autocast else None
    sides = []
    for role, name, source in setup.models:
        print(f"Loading {source} ({'before unlearning' if role == TARGET else role})", flush=True)
        own = {"revision": revision} if revision and role == TARGET else {}
        found = load_tokenizer(tokenizer or source, loading["trust_remote_code"], **({} if tokenizer else own))
        model = load_model(source, device=device or default_device(), **loading, **own).eval()
        sides.append(Side(role, name, model, found, setup.prompt_template, autocast))
    return sides


def answers(
    sides: Sequence[Side],
    prompt: str,
    answer: str = "",
    kind: str = QUESTION,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[Answer]:
    """
    Asks all models the same. Prompts are rendered and answers scored as in evaluations, so that figures agree.

    Args:
        sides (`Sequence[Side]`): From [`load_sides`].
        prompt (`str`): What is asked.
        answer (`str`, *optional*): The true answer, whose probability is wanted.
        kind (`str`, *optional*, defaults to `"question"`):
            `"question"`: the prompt goes through the chat template or the template of question/answer rows; `"text"`:
            the models go on from the prompt as it is; `"conversation"`: it is a JSON list of messages, which goes
            through the chat template.
        max_new_tokens (`int`, *optional*, defaults to 200): Where answers are cut off, at least 1.
        temperature (`float`, *optional*, defaults to 1.0): Of the sampled answer, over 0.
        seed (`int`, *optional*, defaults to 0):
            Of the sampled answer, at least 0. The same prompt and seed give the same answer again, and all models
            draw by the same random numbers.

    Returns:
        `Iterator[Answer]`: One of each model, as they are done.

    Raises:
        ValueError: If the prompt is empty or leaves no room for an answer, or a setting is out of its range.
    """
    from soul_trainer.sampling import SamplingConfig

    sampling = SamplingConfig(temperature, max_new_tokens=max_new_tokens, seed=seed)
    row = row_of(kind, prompt, answer)
    return (_ask(side, row, bool(answer.strip()), sampling) for side in sides)


def _ask(side: Side, row: dict, is_scored: bool, sampling: "SamplingConfig") -> Answer:
    import torch

    from soul_trainer.formats import encode, render

    from .metrics.answer_probability.formula import answer_probability
    from .scoring import answer_losses, greedy_answers, longest_input

    model, tokenizer = side.model, side.tokenizer
    example = render(row, tokenizer, side.prompt_template)
    with torch.autocast(model.device.type, side.autocast, enabled=side.autocast is not None):
        settings = {"max_new_tokens": sampling.max_new_tokens, "progress": False}
        (greedy,) = greedy_answers(model, tokenizer, [example], **settings)
        sampled = _sampled(model, tokenizer, example, sampling)
        if not is_scored:
            return Answer(side, greedy, sampled)
        (loss,) = answer_losses(model, tokenizer, [example], progress=False)
    limit = longest_input(model, tokenizer)
    is_cut = limit is not None and len(encode(tokenizer, example)["input_ids"]) > limit
    return Answer(side, greedy, sampled, loss, answer_probability([loss]), is_cut)


def _sampled(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", example: "Example", config: "SamplingConfig"
) -> str:
    from soul_trainer.batch import IGNORE_INDEX
    from soul_trainer.formats import encode
    from soul_trainer.sampling.drawing import room_for, sample

    encoded = encode(tokenizer, example)
    prompt = encoded["input_ids"][: encoded["labels"].count(IGNORE_INDEX)]
    room = room_for(model, tokenizer, [prompt], config)
    (said,) = sample(model, tokenizer, [prompt], [(config.seed,)], config, room)
    return said.text.strip()


def row_of(kind: str, prompt: str, answer: str) -> dict:
    """The prompt as a row of `soul_trainer.formats`, with the true answer or, if it is empty, any; see [`answers`]."""
    if not prompt.strip():
        raise ValueError("There is nothing to answer: write a prompt.")
    if not answer.strip():
        answer = f" {PLACEHOLDER}" if kind == TEXT else PLACEHOLDER
    if kind == QUESTION:
        return {"question": prompt, "answer": answer}
    if kind == TEXT:
        return {"prompt": prompt, "completion": answer}
    if kind != CONVERSATION:
        raise ValueError(f"`kind` must be one of {KINDS}, but it is {kind!r}.")
    try:
        messages = json.loads(prompt)
    except json.JSONDecodeError as error:
        raise ValueError(f"A conversation must be a JSON list of messages, and this is no JSON: {error}.") from error
    if not isinstance(messages, list) or not all(
        isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in messages
    ):
        raise ValueError("A conversation must be a JSON list of messages, each with a `role` and a `content`.")
    return {"messages": [*messages, {"role": "assistant", "content": answer}]}


def _parser() -> console.Parser:
    parser = console.Parser(description=__doc__)
    models = parser.add_argument_group("models")
    models.add_argument("--run", metavar="DIR", help="output folder of recipes/unlearn.py, tofu.py or another recipe")
    models.add_argument("--target", metavar="DIR", help="model before unlearning: folder or hub id")
    models.add_argument("--model", metavar="DIR", nargs="+", help="unlearned model or adapter; several are possible")
    models.add_argument("--gold", metavar="DIR", help="model that never saw the rows to forget")
    models.add_argument("--rows", metavar="FILE", help="rows to offer as examples, of any kind, or an evaluation's")
    models.add_argument("--dtype", choices=DTYPES, help="of the weights; by default the run's, or as they were saved")
    models.add_argument("--tokenizer", metavar="DIR", help="tokenizer of all models; by default each has its own")
    models.add_argument("--trust_remote_code", action="store_true", help="let code that comes with a model run")
    models.add_argument("--device", help="cpu, cuda:1, ...; by default a GPU if there is one")
    asked = parser.add_argument_group("answers (the page can change the first two)")
    asked.add_argument("--max_new_tokens", type=int, default=200, help="longest answer in tokens (%(default)s)")
    asked.add_argument("--temperature", type=float, default=1.0, help="of sampled answers, over 0 (%(default)s)")
    asked.add_argument("--prompt_template", help="of questions, as in training; by default the run's own")
    page = parser.add_argument_group("page")
    page.add_argument(
        "--host",
        default=HOST,
        help="address to listen at (%(default)s). At any other than this machine's own, all who reach it can ask the "
        "models and read the rows, without a password.",
    )
    page.add_argument("--port", type=int, default=PORT, help="port to listen at (%(default)s); 0 takes a free one")
    return parser
