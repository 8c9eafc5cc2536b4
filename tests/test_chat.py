"""Side by side: what models answer, that figures are the evaluation's, and the page in a real browser."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
import torch
from chat_scenes import EVIL, FORGET, HOSTILE, RETAIN, finished_run
from chromium import needs_browser, open_browser
from subprocesses import python, succeeded
from test_sampling import CHAT, text_tokenizer

from soul_eval.chat import answers, load_sides, main, row_of
from soul_eval.chat_setup import MOST_ROWS, Setup, find_run, named_models, offered_rows
from soul_eval.rows import make_header, read_rows, write_rows
from soul_eval.scoring import answer_losses, greedy_answers
from soul_eval.suites import own
from soul_trainer.formats import render


ROLES = ["target", "unlearned", "gold"]
SECRET = "Zanzibar"
# Chromium writes what it would restore after a crash, text in boxes too, a few seconds later.
SAVED_AFTER = 4
# What the process asks the network for, whoever asks, is printed.
WATCHED = """
import sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        print("asks", arguments[0] if event == "socket.getaddrinfo" else arguments[1], file=sys.stderr, flush=True)

sys.addaudithook(watch)
from soul_eval.chat import main
sys.exit(main(sys.argv[1:]))
"""
CARD = "card.querySelector('h3').textContent, card.querySelector('data').value, card.querySelector('data').textContent"
CARDS = f"[...document.querySelectorAll('.side')].map(card => [{CARD}, "
CARDS += "...[...card.querySelectorAll('.said')].map(said => said.textContent)])"
VALUES = "['prompt', 'answer'].map(name => document.querySelector(`#${name} textarea`).value)"
PROBLEM = "(e => e && e.textContent)(document.querySelector('[role=alert]'))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def run_folder(folder):
    return finished_run(folder)


@pytest.fixture(scope="module")
def sides(run_folder):
    return load_sides(find_run(run_folder))


def test_figures_and_answers_are_those_of_the_evaluation(run_folder, sides):
    """Would catch another rendering or scoring than the report's, models in the wrong places, and a lost end token."""
    assert [side.role for side in sides] == ROLES and sides[1].name == "soul"
    files = [run_folder / f"{name}.rows.jsonl" for name in ("target", "soul", "gold")]
    recorded = [read_rows(file)[1] for file in files]
    assert "taken over" in recorded[0][1]["generation"]  # the scene is what it is meant to be
    for place, row in enumerate(FORGET + RETAIN):
        said = list(answers(sides, row["question"], row["answer"], max_new_tokens=100))
        assert [each.side for each in said] == sides
        for found, rows in zip(said, recorded):
            assert found.greedy == rows[place]["generation"]
            assert found.loss == pytest.approx(rows[place]["answer_nll"], abs=1e-5)
            assert found.probability == pytest.approx(math.exp(-rows[place]["answer_nll"]), abs=1e-5)
    assert [each.probability for each in answers(sides, "Who is Ada?", " ")] == [None] * 3


def test_a_prompt_gets_the_same_sampled_answer_again(sides):
    """Would catch draws that depend on what was asked before, and a seed or temperature that changes nothing."""

    def sampled(**settings):
        said = answers(sides, "Who is Zoe?", max_new_tokens=20, **{"seed": 1, **settings})
        return [each.sampled for each in said]

    first = sampled()
    sampled(seed=2)
    assert sampled() == first != sampled(seed=2) and first != sampled(temperature=3.0)
    greedy = [each.greedy for each in answers(sides, "Who is Zoe?", max_new_tokens=20)]
    assert sampled(temperature=1e-4) == greedy


def test_an_answer_that_does_not_fit_is_marked(sides):
    """Would catch the probability of half an answer that looks like that of the whole."""
    said = list(answers(sides[:1], "Who is Ada?", "a poet " * 200, max_new_tokens=1))
    assert said[0].is_cut and not next(answers(sides[:1], "Who is Ada?", "a poet", max_new_tokens=1)).is_cut


def test_answers_have_the_precision_of_the_run(sides):
    """Would catch a run in mixed precision whose figures come out in another one."""
    side = replace(sides[0], autocast=torch.bfloat16)
    (found,), (exact,) = (
        list(answers([each], "Who is Ada?", "a poet", max_new_tokens=1)) for each in (side, sides[0])
    )
    example = render({"question": "Who is Ada?", "answer": "a poet"}, side.tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        (loss,) = answer_losses(side.model, side.tokenizer, [example], progress=False)
    assert found.loss == pytest.approx(loss, abs=1e-6) and found.loss != exact.loss


ROWS = [
    {"question": "Who is Ada?", "answer": " Ada is a poet."},
    {"prompt": "Ada is ", "completion": " a poet.\n"},
    {"text": "Ada is a poet. Bo is a poet. Cy is a poet."},
    {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Wer ist's?"},
            {"role": "assistant", "content": "Ada."},
        ]
    },
]


@pytest.mark.parametrize("template", [None, "Q: {question} A: {answer}"])
@pytest.mark.parametrize("row", ROWS, ids=["question", "completion", "text", "message", "messages"])
def test_a_row_is_asked_as_in_the_evaluation(row, template, tmp_path):
    """Would catch a system message, white space or a template that is lost on the way through the page."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    tokenizer = text_tokenizer(CHAT)
    arguments = own.OwnArguments(forget=str(file))
    asked = own.unscored_rows(own.load_splits(arguments), tokenizer, arguments)
    *_, generation = own.parts(asked[0], arguments)
    (offered,) = offered_rows(Setup([], asked, template))
    found = render(row_of(offered.kind, offered.prompt, offered.answer), tokenizer, template)
    assert found == render(generation.answers[0], tokenizer, template)


def test_rows_to_forget_come_first_and_a_large_split_is_thinned_out():
    """Would catch a list that no browser can show, and rows without a prompt that are offered."""
    rows = [{"split": "retain", "index": place, "question": f"Who {place}?", "answer": "I"} for place in range(900)]
    rows += [{"split": "forget", "index": 0, "prompt": "Go", "answer": "on"}, {"split": "x", "index": 0, "text": "a"}]
    offered = offered_rows(Setup([], rows))
    assert [row.split for row in offered] == ["forget"] + ["retain"] * MOST_ROWS
    assert offered[-1].index > 890


def test_a_run_is_found_where_it_was_moved_to_and_after_its_last_request(tmp_path):
    """Would catch paths of another machine, and the model after request 2 in the place of that after request 10."""
    row = {"split": "forget", "index": 0, "question": "Who?", "answer": "I"}
    settings = {"prompt_template": "{question} {answer}", "tokenizer": "id", "revision": None, "bf16": True}
    names = {"target": "/gone/target-ab", "gold": "hub/gold", "soul/request-2": "", "soul/request-10": ""}
    for name, model in names.items():
        write_rows(tmp_path / f"{name}.rows.jsonl", [row], make_header(model, settings, 0))
    (tmp_path / "target-ab").mkdir()
    (tmp_path / "target-ab" / "config.json").write_text("{}")
    setup = find_run(tmp_path)
    assert setup.models == [
        ("target", "target", str(tmp_path / "target-ab")),
        ("unlearned", "soul", str(tmp_path / "soul" / "request-10")),
        ("gold", "gold", "hub/gold"),
    ]
    assert (setup.prompt_template, setup.autocast) == ("{question} {answer}", "bfloat16")
    assert setup.loading == {"tokenizer": "id"}


def test_models_and_rows_are_named_one_by_one(folder, run_folder):
    """Would catch rows of an evaluation that are not recognised, and two models that nobody can tell apart."""
    target, rows = str(folder / "target-model"), str(folder / "forget.jsonl")
    setup = named_models(target, ["a/model", "b/model"], rows=rows)
    assert setup.models[1:] == [("unlearned", "a/model", "a/model"), ("unlearned", "b/model", "b/model")]
    assert [(row.prompt, row.answer) for row in offered_rows(setup)] == [(r["question"], r["answer"]) for r in FORGET]
    evaluated = named_models(target, ["a/model"], rows=str(run_folder / "target.rows.jsonl"))
    assert [row.prompt for row in offered_rows(evaluated)] == [row["question"] for row in FORGET + RETAIN]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "--run, or models with --target and --model"),
        (["--target", "a"], "--target and --model go together"),
        (["--run", "a", "--rows", "b"], "--run finds its own"),
        (["--run", "gone"], "--run gone: no such folder"),
        (["--run", "."], "holds no finished run"),
        (["--target", "./gone", "--model", "a"], "--target ./gone: no such folder"),
        (["--run", ".", "--temperature", "0"], "`temperature` must be > 0"),
        (["--run", ".", "--port", "70000"], "--port 70000 is no port"),
        (["--run", ".", "--port", "{taken}"], "cannot be listened at (Address already in use)"),
    ],
)
def test_errors_are_sentences(arguments, sentence, tmp_path, monkeypatch, capsys):
    """Would catch a traceback, and a port that is found to be taken when all models are loaded."""
    pytest.importorskip("gradio", reason="the page needs the extra `chat`")
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main([argument.format(taken=port) for argument in arguments]) == 1
    assert sentence in capsys.readouterr().err


def test_without_gradio_the_extra_is_named_before_models_are_loaded(run_folder, monkeypatch, capsys):
    """Would catch an ImportError that leaves the user to guess."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["--run", str(run_folder)]) == 1
    said = capsys.readouterr()
    assert "pip install soul-trainer[chat]" in said.err and "Loading" not in said.out


def test_help_needs_no_model_library(tmp_path):
    """Would catch an import that makes `--help` and every other command wait."""
    check = "import soul_eval.chat, sys; print({'torch', 'transformers', 'gradio'} & sys.modules.keys())"
    assert succeeded(python("-c", check, folder=tmp_path)).strip() == "set()"


@pytest.fixture(scope="module")
def server(folder, run_folder):
    """Address and log of the command, whose files all go to a folder of its own."""
    pytest.importorskip("gradio", reason="the page needs the extra `chat`")
    home = folder / "home"
    home.mkdir()
    surroundings = {"OMP_NUM_THREADS": "1", "HOME": str(home), "TMPDIR": str(home), "XDG_CACHE_HOME": str(home)}
    command = [sys.executable, "-c", WATCHED, "--run", str(run_folder), "--port", "0", "--max_new_tokens", "100"]
    with open(folder / "log", "w") as log:
        pipes = {"stdout": subprocess.PIPE, "stderr": log, "encoding": "utf-8"}
        process = subprocess.Popen(command, cwd=home, env={**os.environ, **surroundings}, **pipes)
        lines = iter(process.stdout.readline, "")
        address = next((line.split()[4] for line in lines if line.startswith("The page is at")), None)
        try:
            assert address, (folder / "log").read_text()[-3000:]
            yield address
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.stdout.close()


@pytest.fixture(scope="module")
def browser(folder):
    (folder / "profile").mkdir()
    with open_browser(folder / "profile") as tab:
        yield tab


@pytest.fixture
def tab(server, browser):
    browser.resize(1280)
    browser.open(server)
    browser.wait_for("!!document.querySelector('#ask')")
    return browser


def fill(tab, text, box):
    """Types into a box. Gradio puts back what was there when it has only just shown the box."""
    value = f"new Promise(done => setTimeout(() => done(document.querySelector({box!r}).value), 200))"
    tab.type(text, box)
    while tab.run(value) != text:
        tab.type(text, box)


def ask(tab):
    """Presses the button and waits until all models are done."""
    tab.run("document.querySelector('.sides').dataset.old = 1; document.querySelector('#ask').click()")
    tab.wait_for("(e => e && e.ariaBusy === 'false')(document.querySelector('.sides:not([data-old])'))")


@needs_browser
def test_three_models_answer_beside_each_other(tab, sides):
    """Would catch figures of another prompt, rounding that hides a difference, and answers under the wrong model."""
    prompt, answer = "Who is Bo?", "Bo is a cook."
    fill(tab, prompt, "#prompt textarea")
    fill(tab, answer, "#answer textarea")
    ask(tab)
    cards = tab.run(CARDS)
    assert [card[0] for card in cards] == ["Before unlearning", "After unlearningsoul", "Never saw the rows"]
    drawn = answers(sides, prompt, answer, max_new_tokens=100)
    for (_, value, shown, greedy, sampled), side, said in zip(cards, sides, drawn):
        example = render({"question": prompt, "answer": answer}, side.tokenizer)
        (loss,) = answer_losses(side.model, side.tokenizer, [example], progress=False)
        assert float(value) == pytest.approx(math.exp(-loss), rel=1e-4) and shown == f"{float(value):.3g}"
        options = {"max_new_tokens": 100, "progress": False}
        assert [greedy] == greedy_answers(side.model, side.tokenizer, [example], **options)
        assert sampled == said.sampled
    ask(tab)
    assert tab.run(CARDS) == cards and tab.complaints() == []
    tops = tab.run("[...document.querySelectorAll('.side h4')].map(e => e.getBoundingClientRect().top)")
    assert tops[:3] == tops[3:6] == tops[6:]


@needs_browser
def test_a_row_is_filled_in_and_html_shows_as_text(tab):
    """Would catch a row's answer that stays behind, and a question or an answer of a model that runs as HTML."""
    assert tab.run(VALUES) == [FORGET[0]["question"], FORGET[0]["answer"]]
    tab.type("bold", "#row input")
    tab.press("Enter", 13, text="\r")
    tab.wait_for(f"{VALUES}[0] === {json.dumps(HOSTILE['question'])}")
    assert tab.run(VALUES) == [HOSTILE["question"], HOSTILE["answer"]]
    ask(tab)
    before = tab.run(CARDS)[0]
    assert before[3] == HOSTILE["answer"] and float(before[1]) > 0.5
    assert tab.run("document.title") == "Side by side"
    assert tab.run("document.querySelectorAll('.gradio-container img').length") == 0 and tab.complaints() == []
    fill(tab, f"${{document.title = 'taken over'}}{{{{value}}}}{EVIL}", "#prompt textarea")
    ask(tab)
    assert tab.run("document.title") == "Side by side" and tab.complaints() == []


@needs_browser
@pytest.mark.parametrize(
    "box, text, sentence",
    [
        ("#prompt textarea", "", "There is nothing to answer: write a prompt."),
        ("#prompt textarea", "very " * 300, "leaves no room for an answer within the model's 256."),
        ("#temperature input", "0", "`temperature` must be > 0, but it is 0"),
        ("#seed input", "", "A setting is empty: seed needs a number."),
        ("#tokens input", "0", "`max_new_tokens` must be >= 1, but it is 0."),
    ],
)
def test_errors_appear_on_the_page(tab, box, text, sentence):
    """Would catch a page that stays silent, and one that goes on working as if nothing had been asked."""
    tab.run("document.querySelector('#settings button').click()")
    fill(tab, text, box)
    ask(tab)
    assert sentence in tab.run(PROBLEM)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_sticks_out_and_all_can_be_read(tab, width, scheme):
    """Would catch a page wider than a phone, models one below the other on a desk, and text in its ground's colour."""
    tab.resize(width, 900, scheme)
    tab.open(tab.run("location.href"))
    tab.wait_for("!!document.querySelector('#ask')")
    ask(tab)
    assert tab.run("document.documentElement.scrollWidth") <= width
    lefts = tab.run("[...document.querySelectorAll('.side')].map(e => e.getBoundingClientRect().left)")
    assert len(set(lefts)) == (1 if width == 400 else 3)
    ink = tab.run("getComputedStyle(document.querySelector('.said')).color")
    paper = tab.run("getComputedStyle(document.querySelector('.side')).backgroundColor")
    brightness = [sum(map(int, colour[4:-1].split(","))) for colour in (ink, paper)]
    assert (brightness[0] > brightness[1]) == (scheme == "dark") and abs(brightness[0] - brightness[1]) > 450


@needs_browser
def test_nothing_is_written_and_no_other_host_is_asked(tab, server, folder):
    """Would catch analytics, fonts, a history of prompts in the browser or on disk, and a page for other sites."""
    fill(tab, f"Who is from {SECRET}?", "#prompt textarea")
    fill(tab, f"Ada is from {SECRET}.", "#answer textarea")
    ask(tab)
    assert all(request.startswith((server, "data:")) for request in tab.requests()) and tab.complaints() == []
    asked = {line.split("asks ")[1] for line in (folder / "log").read_text().splitlines() if "asks " in line}
    assert all("127.0.0.1" in each for each in asked)
    tab.open("about:blank")  # the browser keeps what it knows of the page that it leaves
    time.sleep(SAVED_AFTER)
    for secret, place in ((SECRET, folder), (FORGET[0]["question"], folder / "profile")):
        forms = (secret.encode(), secret.encode("utf-16le"))
        files = [path for path in place.rglob("*") if path.is_file()]
        assert [path for path in files if any(form in path.read_bytes() for form in forms)] == []
    with urllib.request.urlopen(server) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(server, headers={"Host": "elsewhere.example"}))
