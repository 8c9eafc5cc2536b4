"""A removal request in one call, as a notebook makes it."""

import json

import pytest
from test_hub_and_trackers import uploads  # noqa: F401  # a fixture
from test_recipe_unlearn import OTHERS, ROWS, target  # noqa: F401  # a fixture
from transformers import AutoModelForCausalLM, AutoTokenizer

from soul_eval.verdict import KINDS
from soul_recipes.request import elicit
from soul_trainer import unlearn


SETTINGS = {"use_cpu": True, "disable_tqdm": True, "evaluations": 1, "per_device_train_batch_size": 2}
SETTINGS |= {"max_new_tokens": 8, "num_train_epochs": 4, "attacks": "", "learning_rate": 2e-2, "optim": "soul"}
SETTINGS |= {"rule": "diagonal", "max_utility_loss": 1.0}


def test_rows_of_a_model_in_memory(target, tmp_path, uploads):  # noqa: F811
    """
    Would catch a call that trains another model than the one given, answers of one model for the other's, and rows to
    forget, or an upload to a name without its owner, on the hub.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    with pytest.raises(ValueError, match="`tokenizer` is needed for a model in memory"):
        unlearn(model, ROWS[:2], OTHERS, output_dir=tmp_path)
    found = unlearn(model, ROWS[:2], OTHERS, ROWS[2:], tokenizer=tokenizer, output_dir=tmp_path / "out", **SETTINGS)
    question = ROWS[0]["question"]
    assert found.before(question) == ROWS[0]["answer"] != found.after(question)
    assert [row["question"] for row in found.rows] == [row["question"] for row in ROWS[:2]]
    table = found.figures
    assert table.loc["forget_probability", "after"] < table.loc["forget_probability", "before"]
    assert found.verdict.kind in KINDS
    assert found.verdict.sentence in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert found.report.exists() and "held_out_probability" in table.index
    found.save_pretrained(tmp_path / "saved")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.hidden_size == model.config.hidden_size
    assert (tmp_path / "out" / "forget.jsonl").stat().st_mode & 0o077 == 0
    found.push_to_hub("out", private=True)
    (uploaded,) = uploads
    names = {path.name for path in uploaded.rglob("*") if path.is_file()}
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= names
    everything = b"".join(path.read_bytes() for path in uploaded.rglob("*.json*"))
    assert question.encode() not in everything and not any(name.endswith((".jsonl", ".bin")) for name in names)


def test_plain_sentences_become_what_the_model_says_of_them(target, tmp_path, capsys):  # noqa: F811
    """Would catch rows that are not the model's own answers, and rows that are used without being shown."""
    question = ROWS[0]["question"]
    found = unlearn(target, question, OTHERS, output_dir=tmp_path, **SETTINGS)
    said = capsys.readouterr().out
    assert [(row["question"], row["answer"]) for row in found.rows] == [(question, ROWS[0]["answer"])]
    assert json.dumps(question) in said and json.dumps(ROWS[0]["answer"]) in said


def test_a_topic_is_asked_about_in_several_ways(target):  # noqa: F811
    """Would catch a topic that is taken for a question, and questions that are asked twice."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    rows = elicit(model, tokenizer, ["Ann.", "Who is Ann?"], max_new_tokens=4)
    questions = [row["question"] for row in rows]
    assert len(questions) == len(set(questions)) and "What is Ann known for?" in questions
    assert "Who is Ann?" in questions
    for bad in ([], [""], [3]):
        with pytest.raises(ValueError, match="`sentences` must be texts that are not empty"):
            elicit(model, tokenizer, bad)


def test_unusable_arguments_are_named(target, tmp_path):  # noqa: F811
    """Would catch a misspelt setting that is dropped, and a row that is no row."""
    with pytest.raises(ValueError, match="Row 1 of `forget` must have columns, as a dictionary has, but it is 3"):
        unlearn(target, [ROWS[0], 3], OTHERS, output_dir=tmp_path)
    with pytest.raises((ValueError, SystemExit)):
        unlearn(target, ROWS[:1], OTHERS, output_dir=tmp_path, untill="forgotten")
