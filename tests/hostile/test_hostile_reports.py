"""Names, texts, settings and numbers from elsewhere, and what the reader of a report then sees."""

import json
from html.parser import HTMLParser

import pytest
from chromium import needs_browser, open_browser
from markdown_it import MarkdownIt

from soul_eval.markdown import markdown_text
from soul_eval.report import Run, model_card_section, write_report
from soul_eval.rows import read_rows, write_rows
from soul_eval.schema import check
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


BAD_FIELDS = [
    ("answer_nll", "NaN", "must be a finite number, but it is nan"),
    ("answer_nll", "1e400", "must be a finite number, but it is inf"),
    ("answer_nll", "-Infinity", "must be a finite number, but it is -inf"),
    ("answer_nll", '"1.0"', "must be a finite number, but it is '1.0'"),
    ("answer_nll", "true", "must be a finite number, but it is True"),
    ("answer_nll", "[1.0]", r"must be a finite number, but it is \[1.0\]"),
    ("rougeL_recall", "1.5", "must be less than or equal to 1"),
    ("rouge1_recall", "-0.1", "must be greater than or equal to"),
    ("toxicity", "7", "must be less than or equal to 1"),
    ("index", "-1", "must be greater than or equal to 0, but it is -1"),
    ("index", "1.5", "must be a valid integer, but it is 1.5"),
    ("index", '"<b>"', "must be a valid integer, but it is '<b>'"),
    ("index", "null", "must be a valid integer, but it is None"),
    ("split", "[]", r"must be a valid string, but it is \[\]"),
    ("split", '""', "at least 1 character"),
    ("question", '{"a": 1}', "must be a valid string"),
    ("generation", "[[[]]]", "must be a valid string"),
    ("generation", "3", "must be a valid string, but it is 3"),
    ("perturbed_nll", "[]", "at least 1 item"),
    ("perturbed_nll", '[1, "2"]', "must be a finite number, but entry 1 is '2'"),
    ("token_log_probs", "[-1, NaN]", "must be a finite number, but entry 1 is nan"),
    ("token_hits", "[0, 2]", "must be less than or equal to 1, but entry 1 is 2"),
    ("is_toxic", '"yes"', "must be a valid boolean, but it is 'yes'"),
    ("elsewhere", "NaN", "must be a finite number, but it is nan"),
    ("elsewhere", "[1e999]", "must be a finite number, but .* is inf"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_FIELDS)
def test_fields_out_of_range_are_named(tmp_path, field, value, message):
    """Would catch a figure, or a traceback far from the file, made of what is no number, count, share or text."""
    fields = {"split": '"forget"', "index": "0", field: value}
    path = tmp_path / "rows.jsonl"
    line = ", ".join(f'"{name}": {text}' for name, text in fields.items())
    path.write_text(f'{{"suite": "tofu"}}\n{{{line}}}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=rf"rows.jsonl, line 2: `{field}` of row .*{message}"):
        read_rows(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\xff\xfe", "line 1: not JSON"),
        (b"[" * 100_000, "line 1: not JSON"),
        (b'{"split": "forget", "index": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
        (b'{"suite": ["tofu"]}', "line 1: `suite` of the header must be a valid string"),
        (b'{"settings": "rho"}', "line 1: `settings` of the header must be a valid dictionary"),
        (b'{"seconds_per_step": -1}', "line 1: `seconds_per_step` of the header must be greater"),
        (b'{"general": {"mmlu": {"value": NaN, "num_rows": 1}}}', "line 1: `general.mmlu.value` of the header must"),
        (
            b'{"general": {"mmlu": {"value": 1, "num_rows": -1}}}',
            "line 1: `general.mmlu.num_rows` of the header must be greater",
        ),
    ],
    ids=["bytes", "deep", "digits", "suite", "settings", "seconds", "nan", "count"],
)
def test_lines_that_are_none_are_named(tmp_path, line, message):
    """Would catch a RecursionError, a UnicodeDecodeError without a file, and a header that nobody has checked."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line + b'\n{"split": "forget", "index": 0}\n')
    with pytest.raises(ValueError, match=rf"rows.jsonl, {message}"):
        read_rows(path)


def test_verdicts_from_elsewhere_are_checked():
    """Would catch a KeyError where `verdict.json` lacks what a request reads of it."""
    verdict = {"run": "a", "kind": "forgotten", "sentence": "Yes.", "reasons": []}
    check({"verdicts": [verdict]}, "verdicts")
    with pytest.raises(ValueError, match="verdict.json: `verdicts.0.reasons` must be a valid list, but it is 'no'"):
        check({"verdicts": [{**verdict, "reasons": "no"}]}, "verdicts", "verdict.json: ")
    with pytest.raises(ValueError, match="`verdicts.0.kind` is missing"):
        check({"verdicts": [{key: verdict[key] for key in verdict if key != "kind"}]}, "verdicts")


def test_text_of_rows_stays_as_it_was(tmp_path, text):
    """Would catch a file of rows that is cleaned when it is read, so that hashes of it no longer fit."""
    row = {"split": "forget", "index": 0, "question": text.replace("\ud800", ""), "answer_nll": 1.0}
    write_rows(tmp_path / "rows.jsonl", [row], {"settings": {"text": json.dumps(text)}})
    assert read_rows(tmp_path / "rows.jsonl")[1] == [row]
