"""The page of `soul_eval.chat`, made with Gradio: a form, and under it what each model says. It asks no other host."""

import os
import socket
from collections.abc import Iterator, Sequence
from importlib.resources import files
from types import ModuleType
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from .chat import Answer, Side, answers
from .chat_setup import CONVERSATION, GOLD, KINDS, QUESTION, TARGET, TEXT, UNLEARNED, OfferedRow
from .extras import require
from .runs import ROLE_COLOURS, RUN_COLOURS
from .templating import render


if TYPE_CHECKING:
    import gradio

logger = logging.get_logger(__name__)

TITLE = "Side by side"
ROLE_WORDS = {TARGET: "Before unlearning", UNLEARNED: "After unlearning", GOLD: "Never saw the rows"}
KIND_WORDS = {QUESTION: "a question", TEXT: "a text to go on with", CONVERSATION: "a conversation (JSON)"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# The browser loads things from this server alone, asks no other, and keeps nothing: the page has the rows to forget.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
}
LONGEST_LABEL = 90


def import_gradio() -> ModuleType:
    """Gradio without its analytics; an `ImportError` that names the extra if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    return require("gradio", "chat")


def make_page(
    sides: Sequence[Side], offered: Sequence[OfferedRow], max_new_tokens: int = 200, temperature: float = 1.0
) -> "gradio.Blocks":
    """
    Args:
        sides (`Sequence[Side]`): From [`~chat.load_sides`].
        offered (`Sequence[OfferedRow]`): From [`~chat_setup.offered_rows`]; the first is filled in.
        max_new_tokens (`int`, *optional*, defaults to 200): Where answers are cut off, at first.
        temperature (`float`, *optional*, defaults to 1.0): Of sampled answers, at first.

    Returns:
        [`~gradio.Blocks`]

    Raises:
        ImportError: If gradio is not installed; the message names the extra.
    """
    gr = import_gradio()
    first = offered[0] if offered else OfferedRow("", 0, QUESTION, "", "")
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.HTML(render("chat_introduction.html", title=TITLE), apply_default_css=False)
        if offered:
            labels = [(_label(row), place) for place, row in enumerate(offered)]
            row = gr.Dropdown(labels, value=0, label="Row of the request", elem_id="row", num_choices_shown=None)
        with gr.Row():
            # Browsers save what is in a box, to restore it, and some send it to a service that checks the spelling.
            private = gr.InputHTMLAttributes(autocomplete="off", spellcheck=False)
            box = {"lines": 3, "max_lines": 12, "min_width": 280, "html_attributes": private}
            prompt = gr.Textbox(first.prompt, label="Prompt", elem_id="prompt", scale=3, **box)
            answer = gr.Textbox(first.answer, label="True answer", elem_id="answer", scale=2, **box)
        with gr.Accordion("Settings", open=False, elem_id="settings"), gr.Row():
            kinds = [(KIND_WORDS[kind], kind) for kind in KINDS]
            kind = gr.Dropdown(kinds, value=first.kind, label="The prompt is", elem_id="kind", filterable=False)
            tokens = gr.Number(max_new_tokens, label="Longest answer, in tokens", precision=0, elem_id="tokens")
            warmth = gr.Number(temperature, label="Temperature of the sampled answer", step=0.1, elem_id="temperature")
            seed = gr.Number(0, label="Seed of the sampled answer", precision=0, elem_id="seed")
        button = gr.Button("Ask", variant="primary", elem_id="ask")
        results = gr.HTML(_cards(sides, []), elem_id="results", apply_default_css=False)
        gr.HTML(render("chat_warning.html"), apply_default_css=False)
        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        if offered:

            def fill_in(place: int) -> tuple[str, str, str]:
                chosen = offered[place]
                return chosen.prompt, chosen.answer, chosen.kind

            row.input(fill_in, row, [prompt, answer, kind], **hidden)

        def ask(*asked: Any) -> Iterator[str]:
            yield from _results(sides, *asked)

        # One at a time: to generate is to change a model's settings for a while.
        inputs = [prompt, answer, kind, tokens, warmth, seed]
        gr.on([button.click, prompt.submit, answer.submit], ask, inputs, results, concurrency_limit=1, **hidden)
    return page


def reserve(host: str, port: int) -> socket.socket:
    """
    Takes the port before models are loaded.

    Args:
        host (`str`): Address to listen at.
        port (`int`): 0 takes a free one.

    Raises:
        ValueError: If the port is taken, or there is no such address.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port} is no port: take one from 1 to {2**16 - 1}, or 0 for a free one.")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno)
        raise ValueError(f"--host {host} --port {port} cannot be listened at ({reason}): choose another.") from error


def serve(page: "gradio.Blocks", place: socket.socket, host: str) -> None:
    """
    Prints the page's address and serves it until Ctrl-C, without a public link and without a history.

    Args:
        page ([`~gradio.Blocks`]): From [`make_page`].
        place (`socket.socket`): From [`reserve`].
        host (`str`): Address to listen at. The page of this machine's own answers to no other name.
    """
    # Gradio's own `launch` can open a public link, and asks itself for the page, through a proxy if one is set.
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    gr = import_gradio()
    app = FastAPI(openapi_url=None)
    app.add_middleware(_WithHeaders)
    if host in LOOPBACK:
        # Or else a web site whose name points to this address (DNS rebinding) could read the page.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    app = gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,  # prompts and answers would be kept in the browser's profile
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        theme=_theme(gr),
        css=files(__package__).joinpath("chat.css").read_text(encoding="utf-8"),
    )
    number = place.getsockname()[1]
    name = f"[{host}]" if ":" in host else host
    print(f"The page is at http://{name}:{number} until you press Ctrl-C.", flush=True)
    # A browser keeps a connection open as long as it shows the page.
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    try:
        uvicorn.Server(config).run(sockets=[place])
    except KeyboardInterrupt:
        pass


def _theme(gr: ModuleType) -> "gradio.themes.Base":
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.sky,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_lg,
        # Fonts of the system: there is nothing to load.
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_600",
        block_title_text_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
    )


class _WithHeaders:
    """Sends `HEADERS` with every response, in the place of others of their names."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                kept = [(name, value) for name, value in message.get("headers", ()) if name.lower() not in HEADERS]
                message["headers"] = [*kept, *HEADERS.items()]
            await send(message)

        await self.app(scope, receive, send_with_headers)


def _results(sides: Sequence[Side], prompt: str, answer: str, kind: str, *settings: Any) -> Iterator[str]:
    """What models say, one after the other. An error is a sentence under what is there already."""
    found: list[Answer] = []
    yield _cards(sides, found, is_waiting=True)
    try:
        names = ("max_new_tokens", "temperature", "seed")
        if None in settings:
            raise ValueError(f"A setting is empty: {names[settings.index(None)]} needs a number.")
        for said in answers(sides, prompt or "", answer or "", kind, **dict(zip(names, settings))):
            found.append(said)
            yield _cards(sides, found, is_waiting=True)
    except ValueError as error:
        yield _cards(sides, found, problem=str(error))
    except Exception as error:
        logger.exception("An answer failed.")
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        yield _cards(sides, found, problem=f"The model did not answer ({reason}). The terminal has the traceback.")
    else:
        yield _cards(sides, found)


def _cards(sides: Sequence[Side], found: list[Answer], is_waiting: bool = False, problem: str = "") -> str:
    cards, number = [], 0
    for place, side in enumerate(sides):
        colour = ROLE_COLOURS.get(side.role, RUN_COLOURS[number % len(RUN_COLOURS)])
        number += side.role == UNLEARNED
        name = side.name if side.name != side.role else ""
        said = found[place] if place < len(found) else None
        is_asked = is_waiting and place == len(found)
        card = {"role": ROLE_WORDS[side.role], "name": name, "colour": colour, "said": said, "is_asked": is_asked}
        cards.append(card)
    problem = problem[:1].upper() + problem[1:]
    return render("chat_cards.html", cards=cards, is_waiting=is_waiting, problem=problem)


def _label(row: OfferedRow) -> str:
    text = " ".join(row.prompt.split())
    text = text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1].rstrip() + "…"
    return f"{row.split.replace('_', ' ')} {row.index}: {text}"
