"""Names, texts, settings and numbers from elsewhere, and what the reader of a report then sees."""

import json
from html.parser import HTMLParser

import pytest
from chromium import needs_browser, open_browser
from markdown_it import MarkdownIt

from soul_eval.markdown import markdown_text
from soul_eval.report import Run, model_card_section, table, write_report
from soul_eval.rows import read_rows, write_rows
from soul_eval.templating import visible
from soul_trainer.markdown import markdown_code
from soul_trainer.records import Provenance


TEXTS = {
    "script": "<script>window.ran = 1</script>",
    "closed script": "</script><script>window.ran = 1</script>",
    "closed style": "</style><script>window.ran = 1</script>",
    "closed title": "</title><script>window.ran = 1</script>",
    "closed cell": "</td></tr></table><h1>Forgotten</h1>",
    "closed noscript": "</noscript><p>Forgotten",
    "handler": "<img src=x onerror='window.ran = 1'>",
    "attribute": '" onmouseover="window.ran = 1" x="',
    "single quotes": "' autofocus onfocus='window.ran = 1",
    "svg": "<svg onload=window.ran=1>",
    "frame": "<iframe src='javascript:window.ran=1'></iframe>",
    "redirect": '<meta http-equiv="refresh" content="0;url=https://example.org">',
    "base": "<base href='https://example.org/'>",
    "form": "<form action=https://example.org><button>Sign in</button></form>",
    "style": "<style>body { display: none }</style>",
    "comment": "<!-- the rest is hidden",
    "instruction": "<?xml version='1.0'?>",
    "cdata": "<![CDATA[ hidden ]]>",
    "entity": "&lt;b&gt; &#60;script&#62; &amp;",
    "template": "{{ 7 * 7 }} {% raw %} {# hidden #}",
    "script link": "[click](javascript:window.ran=1)",
    "data image": "![x](data:image/svg+xml;base64,PHN2Zz4=)",
    "image": "![x](https://example.org/beacon.png)",
    "number link": "[1](https://example.org)",
    "number image": "![1](https://example.org)",
    "definition": "[x]: https://example.org",
    "reference": "[x][x] and [x]",
    "autolink": "<https://example.org>",
    "mail": "<someone@example.org>",
    "bare address": "see https://example.org and www.example.org",
    "pipe": "a | b || c",
    "escaped pipe": r"a \| b \\| c",
    "line breaks": "a\n\n# b\r\n| c |\u2028d",
    "heading": "# Verdict: forgotten",
    "underline": "=====",
    "rule": "---",
    "quote": "> quoted",
    "item": "- item",
    "number": "1. item",
    "fence": "```\ncode",
    "code": "`code` and ``more``",
    "emphasis": "**bold** _more_ ~~gone~~ __x__",
    "backslashes": "\\",
    "table": "a\n| --- | --- |\n| 1 | 2 |",
    "directions": "safe\u202egnp.exe\u2066",
    "controls": "a\x00b\x07c\x1b[31md",
    "half a character": "a\ud800b",
    "long": "x" * 3000,
    "spaces": "    indented",
    "math": "$x$ and $$y$$",
}
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
FORBIDDEN = {"link_open", "image", "html_inline", "html_block", "heading_open", "code_inline", "fence", "code_block"}
FORBIDDEN |= {"em_open", "strong_open", "s_open", "hr", "blockquote_open", "bullet_list_open", "ordered_list_open"}


def seen(text):
    """What a reader sees of a text: one line, and control characters spelled out."""
    return visible(" ".join(text.split()))


def tokens_of(text):
    """All tokens of Markdown, those within lines too."""
    return [each for token in MARKDOWN.parse(text) for each in (token, *(token.children or ()))]


def runs_of(text):
    """Target, gold and an unlearned model, in which everything that can be a text is this one."""
    rows = [
        {"split": "forget", "index": 0, "question": text, "answer": text, "generation": text, "answer_nll": 1.0},
        {"split": "retain", "index": 0, "question": text, "answer": text, "generation": text, "answer_nll": 1.0},
    ]
    figures = {"forget_probability": 0.5, "model_utility": 0.5}
    return [
        Run("target", figures, rows, role="target"),
        Run("gold", figures, rows, role="gold"),
        Run(text, figures, rows, settings={text: text, "list": [text, {text: [text]}]}),
        Run("other", figures, rows, settings={"rho": float("nan")}),
    ]


class Page(HTMLParser):
    """Tags, their attributes, cells of each line of a table, and the text outside of scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.lines, self.texts, self.inside = [], [], [], [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attributes]
        self.inside = tag
        if tag == "tr":
            self.lines.append(0)
        elif tag in ("td", "th"):
            self.lines[-1] += 1

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.texts.append(data)

    def handle_endtag(self, tag):
        self.inside = None
        self.tags.append(f"/{tag}")


@pytest.fixture(scope="module")
def harmless(tmp_path_factory):
    """The folder of a report whose texts are words."""
    return write_report(tmp_path_factory.mktemp("harmless"), "word", runs_of("word"), ["word"]).parent


@pytest.fixture(params=TEXTS.values(), ids=TEXTS.keys())
def text(request):
    return request.param


def test_page_shows_a_text_and_nothing_else(tmp_path, harmless, text):
    """Would catch a text that adds a tag, an attribute or a cell, ends a script, or is not what the reader sees."""
    page = Page(write_report(tmp_path, text, runs_of(text), [text]).read_bytes().decode("utf-8"))
    plain = Page((harmless / "report.html").read_text(encoding="utf-8"))
    assert (page.tags, page.attributes, page.lines) == (plain.tags, plain.attributes, plain.lines)
    shown = [each for each in plain.texts if each == "word"]
    assert len(shown) > 5 and page.texts.count(visible(text)) == len(shown)


def test_markdown_shows_a_text_and_nothing_else(tmp_path, harmless, text):
    """Would catch a name or a note that is a link, an image, HTML or a heading in report.md, or breaks its table."""
    write_report(tmp_path, text, runs_of(text), [text])
    found, plain = ((folder / "report.md").read_text(encoding="utf-8") for folder in (tmp_path, harmless))
    assert [each.type for each in tokens_of(found) if each.type not in ("text", "text_special")] == [
        each.type for each in tokens_of(plain) if each.type not in ("text", "text_special")
    ]
    cells = [each.content for each in MARKDOWN.parse(found) if each.type == "inline"]
    assert markdown_text(text) in cells


def test_text_in_markdown_is_read_as_it_was_written(text):
    """Would catch an escape that is forgotten, or one that the reader sees."""
    paragraph = tokens_of(markdown_text(text))
    assert not FORBIDDEN & {each.type for each in paragraph}
    (inline,) = (each for each in paragraph if each.type == "inline")
    assert "".join(each.content for each in inline.children) == seen(text)


def test_model_card_shows_a_text_and_nothing_else(text):
    """Would catch a setting, a base model's name or a verdict that breaks the table of a card."""
    target, gold, run, _ = runs_of(text)
    section = tokens_of(model_card_section(run, target, gold))
    plain = runs_of("word")
    assert [each.type for each in section] == [
        each.type for each in tokens_of(model_card_section(plain[2], plain[0], plain[1]))
    ]
    table = tokens_of(f"| setting | value |\n|---|---|\n| {markdown_code(text)} | {markdown_code(text)} |\n")
    codes = [each.content for each in table if each.type == "code_inline"]
    assert sum(each.type == "td_open" for each in table) == 2
    assert codes == [seen(text).replace("\\|", "\\ |")] * 2


def test_card_names_rows_and_nothing_else(text):
    """Would catch a file of rows whose name is a link, or ends the span of code that it stands in."""
    sentence = tokens_of(str(Provenance(num_rows={"forget": 2}, names={"forget": text})))
    codes = [each.content for each in sentence if each.type == "code_inline"]
    assert not (FORBIDDEN - {"code_inline"}) & {each.type for each in sentence}
    assert [code.replace("\\", "").replace(" ", "") for code in codes] == [
        seen(text).replace("\\", "").replace(" ", "")
    ]


def test_the_terminal_obeys_no_text(text):
    """Would catch colours, a bell or a turned line that the name of a run or of a figure brings into the table."""
    printed = table([Run(text, {f"{text}_accuracy": 0.5, "forget_probability": 0.2}, role="unlearned")])
    assert all(each == "\n" or each == visible(each) for each in printed)


@needs_browser
def test_browser_runs_nothing_of_a_text(tmp_path_factory, harmless):
    """Would catch a script that runs, a redirect, a request or a broken table."""
    count = "Array.from(document.querySelectorAll('tr'), line => line.cells.length)"
    with open_browser(tmp_path_factory.mktemp("profile")) as tab:
        tab.open((harmless / "report.html").as_uri())
        cells = tab.run(count)
        assert len(cells) > 5 and cells[0] == 5
        for number, (name, text) in enumerate(TEXTS.items()):
            path = write_report(tmp_path_factory.mktemp(f"page{number}"), text, runs_of(text), [text])
            tab.open(path.as_uri())
            assert tab.run("window.ran") is None, name
            assert tab.run("location.href") == path.as_uri(), name
            assert [each for each in tab.requests() if not each.startswith(("file:", "data:"))] == [], name
            assert tab.run(count) == cells, name


def test_text_of_rows_stays_as_it_was(tmp_path, text):
    """Would catch a file of rows that is cleaned when it is read, so that hashes of it no longer fit."""
    row = {"split": "forget", "index": 0, "question": text.replace("\ud800", ""), "answer_nll": 1.0}
    write_rows(tmp_path / "rows.jsonl", [row], {"settings": {"text": json.dumps(text)}})
    assert read_rows(tmp_path / "rows.jsonl")[1] == [row]
