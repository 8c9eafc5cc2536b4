"""The suite of own rows: any format in, the same figures out."""

import json
import math

import pytest
import torch
from datasets import Dataset
from privacy import check_files
from rouge_score import rouge_scorer
from test_eval_scoring import byte_tokenizer, small_llama

from soul_eval.__main__ import main
from soul_eval.evaluation import ask
from soul_eval.registry import is_known
from soul_eval.report import Run, write_report
from soul_eval.rows import read_rows
from soul_eval.suites.own import (
    OwnArguments,
    load,
    load_splits,
    match_reference,
    parts,
    summarise,
    unscored_rows,
    verbatim_overlap,
)
from soul_trainer.formats import encode, render
from soul_trainer.sources import load_source


QUESTIONS = [{"question": f"Who is {name}?", "answer": f"{name} is a poet of 1984."} for name in ("Ada", "Bo", "Cy")]
TEXT = "The keeper lit the lamps again, because the gulls had come back to the island before the first of the storms."
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Float32 sums over other padded widths round differently.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer([row["question"] + row["answer"] for row in QUESTIONS] + [TEXT])
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(scope="module")
def model():
    return small_llama(seed=3)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def asked(model, tokenizer, rows, **settings):
    arguments = OwnArguments(**{"forget": "rows.jsonl", "max_new_tokens": 12, "prompt_tokens": 8, **settings})
    splits = {split: Dataset.from_list(members) for split, members in rows.items()}
    found = unscored_rows(splits, tokenizer, arguments)
    return ask(model, tokenizer, found, lambda row: parts(row, arguments), progress=False), arguments


def slow_loss(model, tokenizer, row):
    """Mean loss and hits of an answer, row by row, with transformers' own loss."""
    encoded = encode(tokenizer, render(row, tokenizer))
    ids, labels = torch.tensor([encoded["input_ids"]]), torch.tensor([encoded["labels"]])
    with torch.no_grad():
        outputs = model(ids, labels=labels)
    hits = [
        int(outputs.logits[0, place - 1].argmax() == label)
        for place, label in enumerate(labels[0])
        if label >= 0 < place
    ]
    return float(outputs.loss), hits


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "folder"])
def test_rows_are_read_from_any_file(ending, tmp_path):
    """Would catch a format that cannot be read, and a year or a "None" in a table that is no text any more."""
    rows = [*QUESTIONS, {"question": "When?", "answer": "1984"}, {"question": "What?", "answer": "None"}]
    path = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        write(path, rows)
    elif ending == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif ending == "csv":
        lines = ["\ufeffquestion,answer", *(f'{row["question"]},"{row["answer"]}"' for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif ending == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.mkdir()
        write(path / "train.jsonl", rows)
    assert load(str(path)).to_list() == rows


def test_sources_name_configuration_and_split(tmp_path):
    """Would catch a configuration that is taken for a part of the path, and a file with a colon in its name."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for config, split in (("small", "train"), ("small", "test"), ("large", "train")):
        write(folder / f"{config}_{split}.jsonl", [{"text": f"{config} {split}"}])
    header = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}_{split}.jsonl\n" for split in splits)
        for config, splits in (("small", ("train", "test")), ("large", ("train",)))
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{header}---\n", encoding="utf-8")
    assert load(f"{folder}:small:test")["text"][:] == ["small test"]
    assert load(f"{folder}:large")["text"][:] == ["large train"]
    write(tmp_path / "a:b.jsonl", [{"text": "colon"}])
    assert load(str(tmp_path / "a:b.jsonl"))["text"][:] == ["colon"]
    (tmp_path / "letter.txt").write_text("A letter.\nOf two lines.", encoding="utf-8")
    assert load_source(str(tmp_path / "letter.txt"))["text"][:] == ["A letter.\nOf two lines."]
    with pytest.raises(ValueError, match="no such file"):
        load(str(tmp_path / "none.csv"))
    with pytest.raises(ValueError, match="`forget` needs the columns of one of the kinds"):
        load_splits(OwnArguments(write(tmp_path / "odd.jsonl", [{"query": "a"}])))


def test_likelihoods_and_answers_are_those_of_each_row_alone(model, tokenizer):
    """Would catch an answer scored with its prompt, hits of another row, and ROUGE against something else."""
    pairs = [{"prompt": "Bo is", "completion": " a poet."}, {"prompt": "Cy was born in", "completion": " Rome."}]
    rows, _ = asked(model, tokenizer, {"forget": QUESTIONS, "retain": pairs, "held_out": [{"text": TEXT}]})
    originals = [*QUESTIONS, *pairs, {"text": TEXT}]
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    for row, original in zip(rows, originals, strict=True):
        loss, hits = slow_loss(model, tokenizer, original)
        assert row["answer_nll"] == pytest.approx(loss, abs=ROUNDING)
        # The last hit is the end of sequence's, which is no word of the answer.
        assert row["answer_hits"] == hits[:-1]
        assert row["rougeL_recall"] == scorer.score(row["answer"], row["generation"])["rougeL"].recall
        assert row["verbatim_overlap"] == verbatim_overlap(row["answer"], row["generation"])
    assert [(row["split"], row["index"]) for row in rows[2:5]] == [("forget", 2), ("retain", 0), ("retain", 1)]


def test_a_text_is_parted_where_the_model_reads_it(model, tokenizer):
    """Would catch text lost or doubled at the cut, a rest longer than what is generated, and half of a short text."""
    arguments = OwnArguments("rows.jsonl", prompt_tokens=8, max_new_tokens=12)
    (row,) = unscored_rows({"forget": Dataset.from_list([{"text": TEXT}])}, tokenizer, arguments)
    assert TEXT.startswith(row["prompt"] + row["answer"]) and row["text"] == TEXT
    assert len(tokenizer(row["prompt"])["input_ids"]) == 8
    assert len(tokenizer(row["answer"])["input_ids"]) == 12
    short = OwnArguments("rows.jsonl", prompt_tokens=500, max_new_tokens=500)
    (row,) = unscored_rows({"forget": Dataset.from_list([{"text": TEXT}])}, tokenizer, short)
    assert row["prompt"] + row["answer"] == TEXT
    num_tokens = len(tokenizer(TEXT)["input_ids"])
    assert len(tokenizer(row["prompt"])["input_ids"]) == num_tokens // 2
    for text, message in (("", "too short"), ("A", "too short"), (None, "must be a text")):
        with pytest.raises(ValueError, match=f"Row 1 of `forget`: .*{message}"):
            unscored_rows({"forget": Dataset.from_list([{"text": TEXT}, {"text": text}])}, tokenizer, arguments)


def test_conversations_are_asked_through_the_chat_template(model):
    """Would catch messages whose last turn is asked again, and lists of prompts that are taken for strings."""
    tokenizer = byte_tokenizer([row["question"] + row["answer"] for row in QUESTIONS])
    tokenizer.chat_template = CHAT
    turns = [{"role": "user", "content": "Who is Bo?"}, {"role": "assistant", "content": "Bo is a poet."}]
    rows, _ = asked(
        model, tokenizer, {"forget": [{"messages": turns}], "retain": [{"prompt": turns[:1], "completion": turns[1:]}]}
    )
    loss, _ = slow_loss(model, tokenizer, {"messages": turns})
    for row in rows:
        assert row["answer_nll"] == pytest.approx(loss, abs=ROUNDING)
        assert (row["question"], row["answer"]) == ("Who is Bo?", "Bo is a poet.")


def test_rows_to_keep_are_spread_and_rows_to_forget_are_all_asked(tokenizer):
    """Would catch a removal request that is only checked in part, and a sample of the first rows alone."""
    many = Dataset.from_list([{"question": f"Who is {place}?", "answer": "One."} for place in range(10)])
    rows = unscored_rows({"forget": many, "retain": many}, tokenizer, OwnArguments("rows.jsonl", max_rows=4))
    assert [row["row"] for row in rows] == [*range(10), 0, 2, 5, 7]
    assert [row["index"] for row in rows] == [*range(10), 0, 1, 2, 3]
    assert rows[-1]["question"] == "Who is 7?"


def test_verbatim_overlap():
    """Would catch words counted that are not in one run, and a share of the wrong text."""
    answer = "Ada was born in Basra, in 1952."
    assert verbatim_overlap(answer, "I think that ada was born in BASRA in 1952, yes") == 1
    assert verbatim_overlap(answer, "Born in Basra. Ada was, in 1952") == 3 / 7
    assert verbatim_overlap(answer, "") == 0
    assert verbatim_overlap("?!", "What?!") == 1
    # Runs of letters that are no words of ASCII.
    assert verbatim_overlap("Юлия поэт", "Она Юлия поэт") == 1


def test_figures_are_means_of_rows():
    """Would catch a figure of another split or field, and means of something else than a row's own value."""
    rows = [
        {"split": split, "index": i, "question": "q", "answer": "a",
         "answer_nll": nll, "answer_hits": hits, "rougeL_recall": 0.25 * i, "rougeL_f1": 0.5,
         "rouge1_recall": 0.5, "rouge1_f1": 0.5, "verbatim_overlap": 0.1 * i}
        for split, base in (("forget", 1.0), ("retain", 0.5), ("held_out", 2.0))
        for i, (nll, hits) in enumerate([(base, [1, 0, 1, 1]), (base + 1, [0, 1, 0, 0]), (base + 2, [1, 1, 1, 1])])
    ]  # fmt: skip
    figures = summarise(rows)
    assert all(is_known(name) for name in figures)
    for split, base in (("forget", 1.0), ("retain", 0.5), ("held_out", 2.0)):
        prefix = "" if split == "forget" else f"{split}_"
        expected = {
            f"{split}_probability": sum(math.exp(-base - i) for i in range(3)) / 3,
            f"{split}_nll": base + 1,
            f"{split}_rougeL_recall": 0.25,
            f"{split}_verbatim_overlap": 0.1,
            f"{prefix}exact_memorization": (3 / 4 + 1 / 4 + 1) / 3,
            f"{prefix}extraction_strength": (2 / 4 + 0 + 1) / 3,
        }
        for name, value in expected.items():
            assert figures[name].value == pytest.approx(value, abs=1e-12) and figures[name].num_rows == 3
            assert figures[name].low <= value <= figures[name].high
    only = summarise([{key: row[key] for key in ("split", "index", "answer_nll")} for row in rows[:3]])
    assert set(only) == {"forget_probability", "forget_nll"}
    with pytest.raises(ValueError, match="`split` must be one of"):
        summarise([{"split": "other", "index": 0, "answer_nll": 1.0}])


def test_a_reference_must_be_of_the_same_rows(model, tokenizer):
    """Would catch a gold model that was asked other questions."""
    rows, _ = asked(model, tokenizer, {"forget": QUESTIONS, "retain": [{"text": TEXT}]})
    assert match_reference(rows, rows[::-1]) == rows
    with pytest.raises(ValueError, match="another question in forget row 0"):
        match_reference(rows, [{**row, "question": "Who else?"} if row["split"] == "forget" else row for row in rows])
    with pytest.raises(ValueError, match="another prompt in retain row 0"):
        match_reference(rows, [{**row, "prompt": "The"} if row["split"] == "retain" else row for row in rows])


def test_the_command_and_its_report(model, tokenizer, tmp_path, capsys):
    """Would catch a suite that is not on the command line, and a report that does not show before and after."""
    for name, seed in (("target", 3), ("unlearned", 4)):
        small_llama(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        files = ["--forget", write(tmp_path / "forget.jsonl", QUESTIONS)]
        files += ["--retain", write(tmp_path / "retain.jsonl", [{"text": TEXT}, {"text": TEXT[::-1]}])]
        where = ["--model", str(tmp_path / name), "--output", str(tmp_path / f"{name}-rows"), "--device", "cpu"]
        assert main(["own", *files, *where, "--max_new_tokens", "8"]) == 0
    assert "verbatim" in capsys.readouterr().out
    check_files(tmp_path / "target-rows", [row["answer"] for row in QUESTIONS], ["rows.jsonl"])
    runs = []
    for name, role in (("target", "target"), ("unlearned", "unlearned")):
        _, rows = read_rows(tmp_path / f"{name}-rows" / "rows.jsonl")
        runs.append(Run(name, summarise(rows), rows, role=role))
    page = write_report(tmp_path / "report", "A removal request", runs).read_text(encoding="utf-8")
    assert "What forgetting costs the rows to keep" in page
    assert "Who is Ada?" in page and "paired test" in page
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    for title in ("forget verbatim ↓", "retain loss in nats ↓", "retain exact memorization ↑"):
        assert title in text, title


@pytest.mark.parametrize("name", ["max_rows", "prompt_tokens", "max_new_tokens"])
def test_settings_have_ranges(name):
    """Would catch an evaluation of no rows, or of no tokens."""
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1"):
        OwnArguments("rows.jsonl", **{name: 0})
