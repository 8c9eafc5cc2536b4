"""Files of an evaluation that come from elsewhere: each violation of their schema names file, line and field."""

import json
import math

import pytest

from soul_eval.__main__ import main
from soul_eval.evidence.command import read_attacks
from soul_eval.journal import Journal
from soul_eval.rows import FORMAT, make_header, read_rows, write_rows
from soul_eval.schema import GeneralFile, VerdictFile, check_fields


GOOD = {"split": "forget", "index": 0, "question": "Who?", "answer": "Ada", "answer_nll": 0.5, "generation": "Bo"}
HEADER = {"format": FORMAT, "suite": "own", "model": "m", "settings": {}, "seed": 0}
SHARES = (
    "rouge1_recall",
    "rouge1_f1",
    "rougeL_recall",
    "rougeL_f1",
    "bleu",
    "verbatim_overlap",
    "toxicity",
    "fluency",
)
LOSSES = ("answer_nll", "paraphrased_nll", "lowercase_nll", "gradient_norm")
FLAGS = ("is_toxic", "is_correct", "embedding_hit", "mentions_answer")
LISTS = ("perturbed_nll", "option_nll", "answer_hits", "token_hits", "token_log_probs", "token_z_scores")
TEXTS = ("generation", "paraphrased_generation", "question", "text", "answer")
ROWS = [
    *((name, value, said) for name in SHARES for value, said in ((1.5, "less than or equal"), (-0.5, "greater than"))),
    *((name, -1.0, "greater than or equal to -0.001") for name in LOSSES),
    *((name, value, "a valid number") for name in (*LOSSES, *SHARES) for value in ("1.0", True, [0.5])),
    *((name, math.nan, "a finite number, but it is nan. Has the model diverged") for name in (*LOSSES, *SHARES)),
    *((name, 1, "a valid boolean") for name in FLAGS),
    *((name, 0.5, "a valid list") for name in LISTS),
    *((f"{name}[1]", [-1 if name == "token_log_probs" else 1, "2"], "a valid") for name in LISTS),
    *((name, 7.5, "a valid string") for name in TEXTS),
    ("perturbed_nll", [], "have at least 1 item"),
    ("option_nll", [1.0], "have at least 2 items"),
    ("answer_hits[0]", [2], "less than or equal to 1"),
    ("answer_hits[0]", [True], "a valid integer"),
    ("token_log_probs[2]", [-1.0, -0.0, 0.5], "less than or equal to 0.001"),
    ("perturbed_nll[1]", [1.0, 1e400], "a finite number, but it is inf"),
    ("margin", -math.inf, "a finite number"),
    ("index", -1, "greater than or equal to 0"),
    ("index", 1.5, "a valid integer"),
    ("index", "0", "a valid integer"),
    ("row", -3, "greater than or equal to 0"),
    ("split", "", "have at least 1 character"),
    ("split", ["forget"], "a valid string"),
    ("answer", -1, "a valid string"),
    ("answer", True, "a valid string"),
    ("my_score", math.nan, "hold finite numbers"),
    ("my_scores", {"deep": [0.5, [math.inf]]}, "hold finite numbers"),
]


@pytest.mark.parametrize("name, value, said", ROWS)
def test_a_row_that_breaks_its_schema_is_named(tmp_path, name, value, said):
    """Would catch a number that is none, or a share of 1.5, in a figure that somebody trusts."""
    field = name.partition("[")[0]
    path = tmp_path / "rows.jsonl"
    lines = [HEADER, GOOD, {**GOOD, "index": 1, field: value}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}, line 3: `{name}`") and " must " in str(error.value)
    assert said in str(error.value)


HEADERS = [
    ({"format": "other/1"}, "`format` is 'other/1'"),
    ({"format": "soul_eval.rows/99"}, "of a later version than this one"),
    ({"format": 2}, "`format` must be a valid string"),
    ({"settings": ["a"]}, "`settings` must be a valid dictionary"),
    ({"seed": "0"}, "`seed` must be a valid integer"),
    ({"libraries": {"torch": 2.13}}, "`libraries.torch` must be a valid string"),
    ({"seconds_per_step": -1.0}, "`seconds_per_step` must be greater than or equal to 0"),
    ({"seconds_per_step": math.nan}, "`seconds_per_step` must be a finite number"),
    ({"general": {"wikitext": {"value": 1.0}}}, "`general.wikitext.num_rows` is missing"),
    ({"general": {"wikitext": {"value": "<b>", "num_rows": 1}}}, "`general.wikitext.value` must be a valid number"),
    (
        {"general": {"wikitext": {"value": 1.0, "num_rows": 1, "html": "<script>"}}},
        "`general.wikitext.html` is unknown",
    ),
    ({"other": {"deep": math.inf}}, "`other` must hold finite numbers"),
]


@pytest.mark.parametrize("entry, said", HEADERS)
def test_a_header_that_breaks_its_schema_is_named(tmp_path, capsys, entry, said):
    """Would catch a header whose fields turn up as a TypeError in a report, far from the file."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in ({**HEADER, **entry}, GOOD)))
    with pytest.raises(ValueError) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}, line 1: ") and said in str(error.value)
    for command in (["summarise", str(path)], ["report", f"A={path}", "--output", str(tmp_path / "page")]):
        assert main(command) == 1
        assert said in capsys.readouterr().err and not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe", b"[" * 100_000, b'{"split": "forget", "index": ' + b"9" * 5000 + b"}", b'{"split": "forget", "ind'],
    ids=["bytes", "depth", "digits", "cut"],
)
def test_a_line_that_is_no_json_is_named(tmp_path, line):
    """Would catch a RecursionError, and a UnicodeDecodeError that names no file."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(HEADER).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=f"{path}, line 2: not JSON"):
        read_rows(path)


def test_what_our_own_suites_write_is_read(tmp_path):
    """Would catch a schema that is stricter than what is written: a rounding over 1, an open field."""
    rows = [
        {**GOOD, "rougeL_recall": 1.0000001, "answer_nll": -1e-7, "note": {"any": [1, "two", None]}},
        {"split": "wmdp_bio", "index": 0, "question": "Which?", "answer": 3, "choices": ["a"] * 4, "margin": -0.5},
        {**GOOD, "index": 1, "prompt": [{"role": "user", "content": "Who?"}], "generation": None, "answer_nll": None},
    ]
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows, make_header("m", {"limit": None}, 0))
    assert read_rows(path)[1] == rows


def test_findings_that_break_the_schema_are_asked_again(tmp_path, caplog):
    """Would catch a journal that brings numbers back which no model gave."""
    journal = Journal(tmp_path / "rows.jsonl", {"weights": "a"})
    journal.add(("forget", 0, "losses"), {"answer_nll": 0.5})
    journal.add(("forget", 1, "losses"), {"answer_nll": "0.5"})
    journal.add(("forget", 2, "losses"), {"answer_nll": math.nan})
    journal.add(("forget", 3, "rouge"), {"rougeL_recall": 7.0})
    journal.close()
    assert Journal(tmp_path / "rows.jsonl", {"weights": "a"}).done == {("forget", 0, "losses"): {"answer_nll": 0.5}}
    assert caplog.text.count("is asked again") == 3 and "line 5" in caplog.text


FIGURE = {"value": 0.5, "num_rows": 4}
RECOVERY = {"attacked": FIGURE, "unlearned": FIGURE, "target": FIGURE, "share": None, "reason": None}
ATTACKS = [
    ("[]", "an object is wanted"),
    ("{}", "`attacks` is missing"),
    ('{"attacks": 3}', "`attacks` must be a valid dictionary"),
    (
        '{"attacks": {"prefix": {"unlearned": {"forget": {}}}}}',
        "`attacks.prefix.unlearned.forget.attacked` is missing",
    ),
    (json.dumps({"attacks": {"p": {"u": {"f": {**RECOVERY, "target": "0.5"}}}}}), "`attacks.p.u.f.target` must be"),
    (
        json.dumps({"attacks": {"p": {"u": {"f": {**RECOVERY, "share": {**FIGURE, "low": "0"}}}}}}),
        "f.share.low` must be",
    ),
    ('{"attacks": ', "Expecting value"),
]


VERDICT = {"run": "a", "kind": "forgotten", "sentence": "Yes.", "reasons": ["because"], "findings": []}
OTHERS = [
    (VerdictFile, {"verdicts": [{**VERDICT, "reasons": "no"}]}, "`verdicts[0].reasons` must be a valid list"),
    (VerdictFile, {"verdicts": [{"run": "a"}]}, "`verdicts[0].kind` is missing"),
    (VerdictFile, {"verdicts": {}}, "`verdicts` must be a valid list"),
    (VerdictFile, [], "an object is wanted"),
    (GeneralFile, {"asked": {}, "figures": {"a": {"value": math.inf, "num_rows": 1}}}, "`figures.a.value` must be"),
    (GeneralFile, {"asked": {}, "figures": {"a": "1"}}, "`figures.a`"),
    (GeneralFile, {"asked": "mmlu", "figures": {}}, "`asked` must be a valid dictionary"),
    (GeneralFile, {"figures": {}}, "`asked` is missing"),
]


@pytest.mark.parametrize("model, fields, said", OTHERS)
def test_other_files_that_break_the_schema_are_named(model, fields, said):
    """Would catch a KeyError where `verdict.json` or figures of general ability lack what is read of them."""
    with pytest.raises(ValueError) as error:
        check_fields(model, fields, "the file: ")
    assert str(error.value).startswith(f"the file: {said}")


def test_other_files_that_are_ours_are_read():
    """Would catch a schema that refuses a bare number or a field that this version does not know."""
    check_fields(VerdictFile, {"verdicts": [VERDICT], "later": 1})
    check_fields(GeneralFile, {"asked": {"tasks": ["mmlu"]}, "figures": {"a": 0.5, "b": FIGURE}})


@pytest.mark.parametrize("text, said", ATTACKS)
def test_attacks_that_break_the_schema_are_named(tmp_path, text, said):
    """Would catch figures of any shape in a record that is then signed."""
    path = tmp_path / "attacks.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_attacks(str(path), str(tmp_path / "no.record.json"))
    assert f"{str(path)!r} is no attacks.json: " in str(error.value) and said in str(error.value)
