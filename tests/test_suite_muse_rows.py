"""The rows of the suite `muse`: what is read of MUSE's files, and what a model is asked."""

import json

import pytest
from muse_data import DATA, SPLITS, muse_tokenizer, write_hub, write_plain
from test_eval_scoring import byte_tokenizer

from soul_eval.suites.base import GENERATION
from soul_eval.suites.muse import MuseArguments, before_stop, continuation, load_texts, parts
from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.formats import encode, render


@pytest.fixture(scope="module")
def tokenizer():
    return muse_tokenizer()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp("data") / "hub")


def test_prompts_are_tokenized_by_themselves(tokenizer, hub):
    """Catches a last space that goes to the answer: the model would be asked after another prompt than MUSE's."""
    for row in load_texts(MuseArguments(dataset=hub), tokenizer):
        for part in parts(row, MuseArguments()):
            if part.kind == GENERATION:
                encoded = encode(tokenizer, render(part.answers[0], tokenizer))
                prompt = [token for token, label in zip(*encoded.values()) if label == IGNORE_INDEX]
                assert prompt == tokenizer(row["prompt"])["input_ids"]
                # Otherwise this tokenizer could not tell.
                assert (
                    tokenizer(row["prompt"] + "the")["input_ids"][: len(prompt)] != prompt or row["prompt"][-1] != " "
                )


def test_plain_files_are_the_same_rows(tokenizer, hub, tmp_path):
    """Catches MUSE's own files read as other rows than its hub's, and files of JSON lines read as one list."""
    expected = load_texts(MuseArguments(dataset=hub), tokenizer)
    assert load_texts(MuseArguments(dataset=write_plain(tmp_path / "plain")), tokenizer) == expected
    lines = tmp_path / "lines"
    (lines / "verbmem").mkdir(parents=True)
    rows = DATA["verbmem"]["forget"]
    (lines / "verbmem" / "forget.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    entry = (
        "---\nconfigs:\n- config_name: verbmem\n  data_files:\n  - split: forget\n    path: verbmem/forget.json\n---\n"
    )
    (lines / "README.md").write_text(entry, encoding="utf-8")
    alone = MuseArguments(dataset=str(lines), metrics="verbmem")
    assert load_texts(alone, tokenizer) == [row for row in expected if row["split"] == "verbmem_forget"]
    counts = {split: sum(row["split"] == split for row in expected) for split in SPLITS}
    assert counts == SPLITS and len(expected) == sum(SPLITS.values())
    assert [row["index"] for row in expected if row["split"] == "privleak_retain"] == [*range(12)]


def test_a_folder_is_read_as_it_is_now(tokenizer, tmp_path):
    """Catches rows that the library has kept of a folder of the same name, or of this one before it was changed."""
    for folder in ("one", "two"):
        data = {"verbmem": {"forget": [{"prompt": folder, "gt": "a boat"}]}}
        path = write_hub(tmp_path / folder / "same", data)
        [row] = load_texts(MuseArguments(dataset=path, metrics="verbmem"), tokenizer)
        assert row["prompt"] == folder
    (tmp_path / "two" / "same" / "verbmem-forget.json").write_text('{"prompt": "three", "gt": "a hill"}')
    [row] = load_texts(MuseArguments(dataset=path, metrics="verbmem"), tokenizer)
    assert row["prompt"] == "three" and row["answer"] == "a hill"


def test_a_reference_is_cut_by_tokens(tokenizer, hub, tmp_path):
    """Catches a cut by characters, one that forgets the token that begins a text, half of a character at its end."""
    rows = load_texts(MuseArguments(dataset=hub, metrics="verbmem", verbmem_tokens=5), tokenizer)
    for row, whole in zip(rows, DATA["verbmem"]["forget"]):
        assert row["answer"] == tokenizer.decode(tokenizer(whole["gt"])["input_ids"][1:5])
    # Three tokens each without a token that begins a text: the second loses its last.
    folder = write_plain(tmp_path / "plain", {"verbmem": {"forget": [{"prompt": "a", "gt": "€€"}]}})
    [row] = load_texts(MuseArguments(dataset=folder, metrics="verbmem", verbmem_tokens=5), byte_tokenizer(["x"]))
    assert row["answer"] == "€"


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Ada\n\nQuestion: Who", "Ada"),
        ("Ada\nQuestion 2", "Ada"),
        ("Ada Question: Who", "Ada "),
        ("\n\nAda", ""),
        ("Ada\nBo question: no", "Ada\nBo question: no"),
    ],
)
def test_answers_are_cut_where_muse_cuts(text, answer):
    """Catches a cut at a line, at another word, or none where the model asks its own next question."""
    assert before_stop(text) == answer


@pytest.mark.parametrize(
    "prompt, answer, whole",
    [
        ("He said", "no", "He said no"),
        ("He said", ", no", "He said, no"),
        ("He said\n", "no", "He said\nno"),
        ("He said", "\nno", "He said\nno"),
        ("He said", '"no"', 'He said "no"'),
    ],
)
def test_space_between_prompt_and_continuation(prompt, answer, whole):
    """Catches words that are joined, and a space that no text has."""
    row = continuation({"prompt": prompt, "answer": answer})
    assert row["prompt"] == prompt and row["prompt"] + row["completion"] == whole


def test_bad_settings_and_rows_are_named(tokenizer, hub, tmp_path):
    """Catches a metric that is skipped in silence, an empty text, a text whose loss is of no token."""
    with pytest.raises(ValueError, match="`metrics` must be some of .* but it has 'knowmen'"):
        MuseArguments(metrics="verbmem,knowmen")
    with pytest.raises(ValueError, match="`verbmem_tokens` must be at least 1"):
        MuseArguments(verbmem_tokens=0)
    data = json.loads(json.dumps(DATA))
    data["privleak"]["retain"][2]["text"] = " "
    data["knowmem"]["retain_qa"][1]["answer"] = ""
    del data["verbmem"]["forget"][0]["gt"]
    folder = write_plain(tmp_path / "bad", data)
    for metric, message in {
        "privleak": "Row 2 of `privleak_retain`: `text` must be a text, but it is ' '",
        "knowmem": "Row 1 of `knowmem_retain`: `answer` must be a text, but it is ''",
        "verbmem": "Row 0 of the split 'forget' of the configuration 'verbmem' of .* lacks gt; it has prompt",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_texts(MuseArguments(dataset=folder, metrics=metric), tokenizer)
    with pytest.raises(ValueError, match="cannot load the split 'forget_qa' of the configuration 'knowmem'"):
        load_texts(MuseArguments(dataset=write_hub(tmp_path / "hub", {"verbmem": DATA["verbmem"]})), tokenizer)
    bare = byte_tokenizer(["x"])
    texts = {"privleak": {split: [{"text": "xy"}, {"text": "x"}] for split in ("forget", "retain", "holdout")}}
    short = MuseArguments(dataset=write_plain(tmp_path / "short", texts), metrics="privleak")
    with pytest.raises(ValueError, match="Row 1 of `privleak_forget`: 'x' is a single token"):
        load_texts(short, bare)
    bare.eos_token = None
    with pytest.raises(ValueError, match="no `eos_token`"):
        load_texts(short, bare)
