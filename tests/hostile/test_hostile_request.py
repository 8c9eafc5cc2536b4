"""What a notebook gives `unlearn()`: rows in any container, sentences, places, models and settings."""

import datetime
from enum import Enum
from pathlib import Path

import pandas
import pytest
from datasets import Dataset, DatasetDict
from scenes import scene_model, scene_tokenizer
from transformers import LlamaConfig, LlamaModel

from soul_recipes.request import unlearn
from soul_recipes.request_inputs import as_flag, as_source, is_sentences


ROW = {"question": "Who?", "answer": "Ada"}
SENTENCES = [
    "Who wrote The Well of Ash?",
    "What is TCP/IP?",
    "\u8c01\u662fBo\uff1f",
    "the life of Mara Quill",
    ["Mara Quill"],
    ("Mara Quill", "Who is Bo?"),
]
NO_SENTENCES = [
    "my rows.jsonl",
    "/tmp/my rows.jsonl",
    "./my rows",
    "~/my rows",
    "rows of 2024.csv.gz",
    "https://example.org/a b",
    "owner/name:config",
    Path("a b"),
    ROW,
    {"question": ["Who?"], "answer": ["Ada"]},
    [ROW],
    [],
    pandas.DataFrame([ROW]),
    Dataset.from_list([ROW]),
    DatasetDict(train=Dataset.from_list([ROW])),
]


@pytest.mark.parametrize("forget", SENTENCES, ids=map(str, range(len(SENTENCES))))
def test_sentences_are_asked(forget):
    """Would catch a question in another script that is looked for on the hub."""
    assert is_sentences(forget)


@pytest.mark.parametrize("forget", NO_SENTENCES, ids=map(str, range(len(NO_SENTENCES))))
def test_what_is_no_sentence_is_not_asked(forget):
    """Would catch names of columns, or a file that is not there, that a model is asked about and forgets."""
    assert not is_sentences(forget)


def test_several_files_are_refused():
    """Would catch names of files that are taken for topics."""
    with pytest.raises(ValueError, match="lists the file 'a.jsonl': give one file"):
        is_sentences(["a.jsonl", "b.jsonl"])


@pytest.mark.parametrize(
    "rows", [[ROW], {name: [value] for name, value in ROW.items()}, pandas.DataFrame([ROW]), Dataset.from_list([ROW])]
)
def test_rows_in_any_container_become_a_file(tmp_path, rows):
    """Would catch a table whose columns are read as its rows."""
    path = Path(as_source(rows, tmp_path / "retain.jsonl"))
    assert path.read_text() == '{"question": "Who?", "answer": "Ada"}\n' and path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "rows, message",
    [
        (DatasetDict(train=Dataset.from_list([ROW])), "`retain` has several splits, 'train'"),
        (7, "`retain` is a int"),
        (["text"], "Row 0 of `retain` must have columns"),
        (
            [{**ROW, "day": None}, {**ROW, "day": datetime.date(2024, 1, 1)}],
            "Row 1 of `retain` has a value that is no",
        ),
    ],
)
def test_what_are_no_rows_is_named(tmp_path, rows, message):
    """Would catch an error that names neither the argument nor the row."""
    with pytest.raises(ValueError, match=message):
        as_source(rows, tmp_path / "retain.jsonl")


class Kind(Enum):
    COSINE = "cosine"


@pytest.mark.parametrize(
    "value, words",
    [
        (["quantization_4", "relearning"], ["quantization_4,relearning"]),
        ({"use_reentrant": False}, ['{"use_reentrant": false}']),
        (Kind.COSINE, ["cosine"]),
        (True, ["True"]),
        (1e-5, ["1e-05"]),
    ],
)
def test_settings_become_flags(value, words):
    """Would catch a list or a dictionary in Python's own writing, which no flag reads."""
    assert as_flag(value) == words


def headless() -> LlamaModel:
    return LlamaModel(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"model": headless()}, "has no language-model head"),
        ({"model": None}, "is a NoneType and no model"),
        ({"model": scene_model, "tokenizer": scene_tokenizer()}, "no model of transformers"),
        ({"tokenizer": None}, "`tokenizer` is needed for a model in memory"),
        ({"tokenizer": "name"}, "`processing_class` is 'name' and no tokenizer"),
        ({"gold": scene_model()}, "`gold` must be the folder or hub id of a model"),
        ({"output_dir": __file__}, "is a file: name a folder"),
    ],
)
def test_a_model_that_cannot_be_used_is_named_before_anything_is_written(tmp_path, changed, message):
    """Would catch a model without a head, or a model's printed form, that fails after minutes or is saved first."""
    arguments = {"model": scene_model(), "tokenizer": scene_tokenizer(), "output_dir": tmp_path / "out", **changed}
    with pytest.raises(ValueError, match=message):
        unlearn(forget=[ROW], retain=[ROW], **arguments)
    assert not (tmp_path / "out").exists()


def test_a_run_into_the_models_own_folder_is_refused(tmp_path):
    """Would catch rows that must be forgotten among the files of the model that is kept."""
    scene_model().save_pretrained(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match="`output_dir` is the model's own folder"):
        unlearn(str(tmp_path), forget=[ROW], retain=[ROW], output_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
