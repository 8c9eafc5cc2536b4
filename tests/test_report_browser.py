"""The page of a report in headless Chromium, driven over its DevTools protocol. Skipped where there is no Chromium."""

import pytest
from chromium import needs_browser, open_browser

from soul_eval.report import Run, write_report
from soul_eval.runs import ROLES


pytestmark = needs_browser
EVIL = (
    "</script><script>document.title = 'taken over'</script><img src=x onerror=\"document.title = 'taken over'\"><!--"
)
NUM_ROWS, PAGE_SIZE = 400, 40


def make_runs():
    """Four models on 400 forget rows and 30 retain rows; every 33rd name has an accent, and one row is hostile."""
    runs = []
    for name, role in [("target", "target"), ("A", "unlearned"), (f"B {EVIL}", "unlearned"), ("gold", "gold")]:
        rows = []
        for index in range(NUM_ROWS):
            author = "Jaime Vásquez" if index % 33 == 5 else f"Author {index}"
            text = f"{name.split()[0]} answers {index}" + (f" {EVIL}" if index == 7 else "")
            rows.append({"index": index, "question": f"Who wrote Book {index}?", "answer": author, "generation": text})
            rows[-1] |= {"split": "forget", "rougeL_recall": (index * 7 % NUM_ROWS) / NUM_ROWS}
        rows += [
            {"split": "retain", "index": index, "question": f"Kept {index}?", "answer": "Yes", "generation": "Yes"}
            for index in range(30)
        ]
        figures = {"forget_quality": 0.3, "model_utility": 0.6, "forget_probability": 0.2, "forget_rougeL_recall": 0.5}
        figures |= {
            key: {"value": 0.5, "num_rows": 99, "low": 0.4, "high": 0.6} for key in ("mia_a_auc", "b_recovered")
        }
        runs.append(Run(name, figures, rows, role=role, settings={"rho": EVIL}))
    assert {run.role for run in runs} == set(ROLES)
    return runs


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("report"), "Title", make_runs(), "A note.").as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def tab(browser, url):
    browser.resize(1280)
    browser.open(url)
    return browser


COUNT = "document.getElementById('count').textContent"
SHOWN = "document.querySelectorAll('#list article').length"
HEADINGS = "[...document.querySelectorAll('#list h3')].map(each => each.textContent)"


def test_the_page_renders_and_asks_for_nothing(tab):
    """Catches an error in the script, a policy that keeps our own style or script out, and any request."""
    assert tab.run("document.title") == "Title" and tab.run(SHOWN) == PAGE_SIZE
    assert tab.run(COUNT) == f"{PAGE_SIZE} of {NUM_ROWS} shown"
    # Style is in force: the numbers are set as a table's, and the dots have the runs' colours.
    assert tab.run("getComputedStyle(document.querySelector('table')).fontVariantNumeric") == "tabular-nums"
    dot = "getComputedStyle(document.querySelector('.run1'), '::before').backgroundColor"
    assert tab.run(dot) == "rgb(0, 114, 178)"
    images = tab.run("[...document.images].map(each => each.complete && each.naturalWidth)")
    assert images and all(images)
    assert tab.complaints() == []
    assert tab.requests() and all(request.startswith(("file:", "data:")) for request in tab.requests())


def test_typing_searches(tab):
    """Catches a search that needs Enter, minds case or accents, joins words with or, or leaves rows in sight."""
    tab.type("vasquez")
    assert tab.run(COUNT) == f"12 of {NUM_ROWS} shown" and tab.run(SHOWN) == 12
    assert tab.run("[...new Set([...document.querySelectorAll('mark')].map(each => each.textContent))]") == ["Vásquez"]
    tab.type("BOOK 71")
    assert tab.run(HEADINGS) == [f"Who wrote Book {index}?" for index in (71, 171, 271, 371)]
    assert tab.run(COUNT) == f"4 of {NUM_ROWS} shown"
    assert tab.run("[...document.querySelectorAll('h3 mark')].map(each => each.textContent)") == ["Book", "71"] * 4
    tab.type("author 1")
    num_matching = sum("1" in str(index) and index % 33 != 5 for index in range(NUM_ROWS))
    assert tab.run(COUNT) == f"{PAGE_SIZE} of {NUM_ROWS} shown, {num_matching} match"
    tab.type("kept")
    assert tab.run(SHOWN) == 0 and tab.run(COUNT) == f"0 of {NUM_ROWS} shown"
    assert "30 of retain" in tab.run("document.getElementById('list').textContent")
    tab.type("")
    assert tab.run(SHOWN) == PAGE_SIZE and tab.run("document.querySelectorAll('mark').length") == 0
    assert tab.complaints() == []


def test_answers_stand_side_by_side_and_in_the_wanted_order(tab):
    """Catches answers under another model's name, a wrong order, and a split that cannot be reached."""
    tab.type("wrote 30")
    assert tab.run(
        "[...document.querySelectorAll('#list article:first-child .answers p')].map(e => e.textContent)"
    ) == [
        "target answers 30",
        "A answers 30",
        "B answers 30",
        "gold answers 30",
    ]
    tops = tab.run(
        "[...document.querySelectorAll('#list article:first-child h4')].map(e => e.getBoundingClientRect().top)"
    )
    assert len(set(tops)) == 1
    tab.type("")
    change = "(([id, value]) => { const e = document.getElementById(id); e.selectedIndex = value; "
    change += "e.dispatchEvent(new Event('change')); })"
    tab.run(f"{change}(['order', 2])")
    scores = {index: index * 7 % NUM_ROWS for index in range(NUM_ROWS)}
    best = sorted(scores, key=scores.get, reverse=True)[:PAGE_SIZE]
    assert tab.run(HEADINGS) == [f"Who wrote Book {index}?" for index in best]
    tab.run(f"{change}(['split', 1])")
    assert tab.run(COUNT) == "30 of 30 shown" and tab.run(HEADINGS)[0] == "Kept 0?"
    assert tab.run("document.getElementById('order-label').hidden") is True


def test_more_rows_come_with_the_keyboard(tab):
    """Catches rows that only a mouse reaches, and a focus that is lost when the button goes."""
    for num_shown in range(2 * PAGE_SIZE, NUM_ROWS + 1, PAGE_SIZE):
        tab.run("document.getElementById('more').focus()")
        tab.press("Enter", 13, text="\r")
        assert tab.run(SHOWN) == num_shown and tab.run(COUNT) == f"{num_shown} of {NUM_ROWS} shown"
        focused = tab.run("document.activeElement.querySelector('h3').textContent")
        assert focused == f"Who wrote Book {num_shown - PAGE_SIZE}?"
    assert tab.run("getComputedStyle(document.getElementById('more')).display") == "none"


def test_hostile_text_stays_text(tab):
    """Catches a generation that ends the block of data, or comes in as HTML."""
    tab.type("taken over")
    assert tab.run("[...document.querySelectorAll('#list .answers p')].map(e => e.textContent)") == [
        f"{name} answers 7 {EVIL}" for name in ("target", "A", "B", "gold")
    ]
    assert tab.run("document.title") == "Title" and tab.run("document.querySelectorAll('#list img').length") == 0
    assert tab.run("document.scripts.length") == 2 and tab.complaints() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_and_all_can_be_read(tab, width, scheme):
    """Catches a page wider than a phone, text in the colour of its ground, and a search that is felt as one types."""
    tab.resize(width, 844, scheme)
    assert tab.run("document.documentElement.scrollWidth") <= width
    # Four models have room side by side.
    assert tab.run("(e => e.scrollWidth - e.clientWidth)(document.querySelector('.scroll'))") == 0
    ink, paper = (tab.run(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    brightness = [sum(map(int, colour[4:-1].split(","))) for colour in (ink, paper)]
    assert (brightness[0] > brightness[1]) == (scheme == "dark") and abs(brightness[0] - brightness[1]) > 500
    search = "const q = document.getElementById('query'); const start = performance.now(); q.value = 'answers 9'; "
    search += "q.dispatchEvent(new Event('input')); return performance.now() - start;"
    # Measured: 20 ms. A second is what nobody would type through.
    assert tab.run(f"(() => {{ {search} }})()") < 1000


def test_without_javascript_there_are_examples(tab, url):
    """Catches a page that is empty where scripts are off."""
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(url)
        root = tab.call("DOM.getDocument")["root"]["nodeId"]
        found = tab.call("DOM.querySelectorAll", nodeId=root, selector="noscript article.example")["nodeIds"]
        assert len(found) == 10 and all(tab.call("DOM.getBoxModel", nodeId=node)["model"]["height"] for node in found)
        assert "gold answers 0" in tab.call("DOM.getOuterHTML", nodeId=found[0])["outerHTML"]
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
