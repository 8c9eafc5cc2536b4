"""What libraries say of damaged files, as a command's user reads it: a sentence with the file, and no traceback."""

import json
import re
import shutil

import pytest
from scenes import FORGET, RETAIN, question_rows, scene_model, scene_tokenizer, scene_trainer
from transformers import AutoTokenizer

from soul_eval.console import FOREIGN, run
from soul_eval.journal import Journal
from soul_eval.rows import read_rows
from soul_recipes.command import main
from soul_trainer.records import make_tokenizer_portable


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


def garbled(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def unlike(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))


def half_a_config(folder):
    (folder / "config.json").write_text("{")


def half_a_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


DAMAGES = {
    cut: "The model .*bad' cannot be read \\(SafetensorError: .*damaged, not whole",
    garbled: "The model .*bad' cannot be read \\(SafetensorError: .*damaged, not whole",
    unlike: "The model .*bad' cannot be read \\(RuntimeError: .*of another model",
    half_a_tokenizer: "The tokenizer of .*bad' cannot be read \\(JSONDecodeError: .*damaged",
    half_a_config: "config file at .*bad/config.json' is not a valid JSON file",
    no_weights: "no file named model.safetensors.*bad",
}
COMMANDS = {
    "eval own": "eval own --forget {rows} --model {bad} --output {out}",
    "unlearn": "unlearn --forget {rows} --retain {others} --model {bad} --output_dir {out} --use_cpu",
    "finetune": "finetune --dataset {rows} --model {bad} --model_dir {out} --use_cpu",
    "influence": "influence --forget {rows} --retain {others} --model {bad} --output {out}",
}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a model and rows."""
    folder = tmp_path_factory.mktemp("given")
    scene_model().save_pretrained(folder / "good")
    scene_tokenizer().save_pretrained(folder / "good")
    for name, rows in (("rows", FORGET), ("others", RETAIN)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("command", COMMANDS)
def test_damaged_models_are_named(given, tmp_path, capsys, command, damage):
    """Would catch a traceback of a library's, or a sentence that does not say which of several models it is about."""
    bad = shutil.copytree(given / "good", tmp_path / "bad")
    damage(bad)
    paths = {"rows": given / "rows.jsonl", "others": given / "others.jsonl", "bad": bad, "out": tmp_path / "out"}
    assert main(COMMANDS[command].format(**paths).split()) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert re.search(f"error: .*{DAMAGES[damage]}", printed, re.DOTALL), printed


@pytest.mark.parametrize("command", ["difference save --before {bad} --after {good} --output {out}"])
def test_damaged_weights_that_are_read_by_themselves_are_named(given, tmp_path, capsys, command):
    """Would catch a traceback where no model is made of the weights."""
    bad = shutil.copytree(given / "good", tmp_path / "bad")
    cut(bad)
    assert main(command.format(bad=bad, good=given / "good", out=tmp_path / "out.safetensors").split()) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed and "model.safetensors' cannot be read (SafetensorError" in printed


@pytest.mark.parametrize("name", FOREIGN)
def test_errors_of_libraries_are_sentences(capsys, name):
    """Would catch a traceback at an error that a library raises far from where a file was given."""
    kind = type(name, (Exception,), {})

    def fails(arguments):
        try:
            raise KeyError("row 3")
        except KeyError as error:
            raise kind("It went wrong.\nAt length.") from error

    assert run("soul toy", fails, []) == 1
    printed = capsys.readouterr().err
    assert printed == f"soul toy: error: {name}: It went wrong., by KeyError: 'row 3'. --debug shows where.\n"


def test_saved_tokenizers_name_a_class_that_older_versions_know(tmp_path):
    """Would catch a saved model whose tokenizer transformers 4 refuses, and a tokenizer that changes by it."""
    trainer = scene_trainer(tmp_path / "out", max_steps=1)
    trainer.save_model()
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    texts = [row["question"] for row in question_rows(["Mara", "Omar"])]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(texts) == scene_tokenizer()(texts)
    other = tmp_path / "other"
    other.mkdir()
    make_tokenizer_portable(other)
    (other / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    make_tokenizer_portable(other)
    assert json.loads((other / "tokenizer_config.json").read_text()) == {"tokenizer_class": "LlamaTokenizer"}


BAD_LINES = {
    "no JSON": "{",
    "no list": '{"a": 1}',
    "no key": '["forget", {}]',
    "an index that is none": '[["forget", "one", "answer"], {}]',
    "no fields": '[["forget", 1, "answer"], 3]',
    "too many parts": '[["forget", 1, "answer"], {}, {}]',
    "empty": "",
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_of_a_journal_is_asked_again(tmp_path, caplog, line):
    """Would catch an evaluation that dies of one line on a disk that was full, and findings of no row."""
    path = tmp_path / "rows.jsonl"
    journal = Journal(path, {"model": "a"})
    journal.add(("forget", 0, "answer"), {"answer_nll": 1.0})
    journal.add(("forget", 2, "answer"), {"answer_nll": 2.0})
    journal.close()
    piece = tmp_path / "rows.jsonl.part-0"
    first, one, other = piece.read_text().splitlines()
    piece.write_text("\n".join([first, one, line, other, ""]))
    resumed = Journal(path, {"model": "a"})
    resumed.close()
    assert set(resumed.done) == {("forget", 0, "answer"), ("forget", 2, "answer")}
    assert "rows.jsonl.part-0, line 3 is skipped" in caplog.text and "asked again" in caplog.text


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("soul_eval.rows/3", "of a later version than this one.*update soul-trainer"),
        ("soul_eval.rows/x", "and rows of an evaluation have 'soul_eval.rows/2'"),
        ("lm_eval/1", "and rows of an evaluation have"),
    ],
)
def test_rows_of_another_format_are_refused(tmp_path, format, message):
    """Would catch rows whose columns mean something else, made into figures."""
    path = tmp_path / "rows.jsonl"
    row = {"split": "forget", "index": 0, "answer_nll": 1.0}
    path.write_text(json.dumps({"format": format}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"rows.jsonl, line 1: `format` is .*{message}"):
        read_rows(path)
    path.write_text(json.dumps({"format": "soul_eval.rows/1"}) + "\n" + json.dumps(row) + "\n")
    assert read_rows(path)[1] == [row]
