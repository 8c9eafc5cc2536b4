import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_dataset
from test_eval_metrics import random_rows
from test_eval_scoring import byte_tokenizer, small_llama

from soul_eval.__main__ import main
from soul_eval.rows import make_header, read_rows, write_rows
from soul_eval.scoring import answer_losses, greedy_answers
from soul_eval.statistics import Figure
from soul_eval.suites.tofu import TofuArguments, evaluate_model, load_splits, parts, summarise, unscored_rows
from soul_trainer.formats import render


TOFU = Path(__file__).parents[2] / "shared" / "tofu"


def question_rows(split, num_rows=6, num_perturbed=5):
    return [
        {
            "question": f"What did {split} {index} paint?",
            "answer": f"A {'long ' * (index % 3)}river",
            "paraphrased_answer": f"It was a {'long ' * (index % 3)}river",
            "paraphrased_question": f"What is painted by {split} {index}?",
            "perturbed_answer": [f"It was a {word} river" for word in "red blue green black white".split()][
                :num_perturbed
            ],
        }
        for index in range(num_rows)
    ]


def write_dataset(folder, with_held_out=True):
    """A dataset in the hub's layout, with the columns that TOFU's own files have."""
    configs = {"forget_small_perturbed": question_rows("forget"), "retain_perturbed": question_rows("retain")}
    if with_held_out:
        configs["held_out_perturbed"] = question_rows("held_out")
    for split in ("real_authors", "world_facts"):
        kept = ("question", "answer", "perturbed_answer")
        rows = question_rows(split, num_perturbed=3)
        configs[f"{split}_perturbed"] = [{key: row[key] for key in kept} for row in rows]
    folder.mkdir()
    for name, rows in configs.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    entries = "".join(f"- config_name: {name}\n  data_files: {name}.json\n" for name in configs)
    (folder / "README.md").write_text(f"---\nconfigs:\n{entries}---\n", encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "small")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer([row["answer"] for row in question_rows("forget")])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    small_llama(seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_splits_are_the_datasets_own(dataset, tmp_path):
    """Catches a forget split that is ignored, a limit that takes other rows, held-out rows kept twice."""
    splits = load_splits(dataset, "forget_small")
    assert {split: len(rows) for split, rows in splits.items()} == dict.fromkeys(
        ("forget", "retain", "held_out", "real_authors", "world_facts"), 6
    )
    assert splits["forget"][:] == load_dataset(dataset, "forget_small_perturbed")["train"][:]
    assert load_splits(dataset, "forget_small", limit=2)["retain"]["question"][:] == splits["retain"]["question"][:2]
    without = load_splits(write_dataset(tmp_path / "without", with_held_out=False), "forget_small")
    assert "held_out" not in without and len(without) == 4
    own_held_out = load_splits(str(tmp_path / "without"), "forget_small", held_out_rows=2)
    retain = splits["retain"]["question"][:]
    assert own_held_out["retain"]["question"][:] == retain[:4]
    assert own_held_out["held_out"]["question"][:] == retain[4:]
    with pytest.raises(ValueError, match="`held_out_rows` must be less than 6"):
        load_splits(str(tmp_path / "without"), "forget_small", held_out_rows=6)
    with pytest.raises(ValueError, match="no configuration 'forget10_perturbed'.*forget_small_perturbed"):
        load_splits(dataset)
    with pytest.raises(ValueError, match="`limit` must be at least 1"):
        load_splits(dataset, "forget_small", limit=0)


def test_rows_hold_what_the_model_says_of_each_answer(dataset, tokenizer):
    """Catches losses handed to the wrong row or answer, and a paraphrase of the question instead of the answer."""
    splits = load_splits(dataset, "forget_small")
    model = small_llama().eval()
    rows = evaluate_model(model, tokenizer, splits, 150, max_new_tokens=8, progress=False)
    assert [(row["split"], row["index"]) for row in rows] == [(s, i) for s in splits for i in range(6)]
    for row in rows[::5]:
        item = splits[row["split"]][row["index"]]
        has_options = row["split"] in ("real_authors", "world_facts")
        answers = [item["answer"], item["answer" if has_options else "paraphrased_answer"], *item["perturbed_answer"]]
        examples = [render({"question": item["question"], "answer": answer}, tokenizer) for answer in answers]
        losses = [row["answer_nll"], row["paraphrased_nll"], *row["perturbed_nll"]]
        alone = [answer_losses(model, tokenizer, [example], progress=False)[0] for example in examples]
        assert losses == pytest.approx(alone, abs=1e-5)  # float32 sums over other padded widths
        assert row["generation"] == greedy_answers(model, tokenizer, examples[:1], "auto", 8, progress=False)[0]
    without = evaluate_model(model, tokenizer, splits, generate=False, progress=False)
    assert "generation" not in without[0] and "model_utility" not in summarise(without)
    with pytest.raises(ValueError, match=r"'forget' lacks the columns \['perturbed_answer'\]"):
        evaluate_model(model, tokenizer, {"forget": splits["forget"].remove_columns("perturbed_answer")})


def test_rouge_is_recall_of_the_true_answer():
    """Catches precision for recall, swapped arguments, and scoring without the stemmer."""
    rows = []
    for answer, text in (("She was painting rivers", "rivers painted she saw, and many other things"), ("A map", "")):
        row = {"split": "world_facts", "index": 0, "question": "What?", "answer": answer, "perturbed_answer": ["B"]}
        rows.append(parts(row, TofuArguments())[1].finish(text))
    assert rows[0]["rouge1_recall"] == 3 / 4 and rows[0]["rougeL_recall"] == 1 / 4
    assert rows[1]["rougeL_recall"] == 0 and rows[1]["generation"] == ""


def test_rows_survive_a_round_trip(tmp_path):
    """Catches figures rounded on the way to the file, and text that is not ASCII."""
    rows = random_rows(0, num_rows=3)
    rows[0]["generation"] = 'Señor "Ö"\nsaid\u2028so'
    header = make_header("some/model", {"limit": None}, seed=3)
    assert {"format", "model", "settings", "seed", "commit", "libraries", "time"} <= header.keys()
    write_rows(tmp_path / "new" / "rows.jsonl", rows, header)
    assert read_rows(tmp_path / "new" / "rows.jsonl") == (header, rows)
    assert os.listdir(tmp_path / "new") == ["rows.jsonl"]


def test_rows_of_others_are_read_too(tmp_path):
    """Catches a reader that demands a header, an index, text, held-out rows, or a paraphrase where none exists."""
    rows = random_rows(0, num_rows=4)
    expected = summarise(rows)
    bare = [{key: value for key, value in row.items() if key != "index"} for row in rows]
    for place, row in enumerate(bare):
        if row["split"] in ("real_authors", "world_facts"):
            row["paraphrased_nll"] = None
            if place % 2:
                del row["paraphrased_nll"]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in bare) + "\n\n", encoding="utf-8")
    header, read = read_rows(path)
    assert header == {} and [row["index"] for row in read[:5]] == [0, 1, 2, 3, 0]
    assert summarise(read) == expected
    given = [{**row, "paraphrased_nll": 0.1} for row in rows]
    assert summarise(given)["world_facts_truth_ratio"] != expected["world_facts_truth_ratio"]


def test_figures_without_their_rows_are_left_out():
    """Catches a crash, or a utility of fewer than nine numbers, where a split or a column is missing."""
    rows = random_rows(0, num_rows=4)
    no_facts = summarise([row for row in rows if row["split"] != "world_facts"])
    assert (
        "model_utility" not in no_facts
        and "world_facts_probability" not in no_facts
        and "retain_probability" in no_facts
    )
    no_held_out = summarise([row for row in rows if row["split"] != "held_out"])
    assert no_held_out["model_utility"] == summarise(rows)["model_utility"]
    no_rouge = summarise([{key: value for key, value in row.items() if key != "rougeL_recall"} for row in rows])
    assert "model_utility" not in no_rouge and "forget_rougeL_recall" not in no_rouge
    assert no_rouge["forget_truth_ratio"] == summarise(rows)["forget_truth_ratio"]
    del rows[5]["rougeL_recall"]
    with pytest.raises(ValueError, match="Row 1 of `retain` lacks `rougeL_recall`"):
        summarise(rows)
    with pytest.raises(ValueError, match="`split` must be one of"):
        summarise([{**rows[0], "split": "retained"}])


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"split": "forget", "index": 9', "line 3: not JSON"),
        ("[1, 2]", "line 3: a row must be an object"),
        ('{"index": 1}', "line 3: a row needs a `split`"),
        ('{"split": "forget", "index": 0}', "line 3: row 0 of `forget` is in line 2 already"),
        ('{"split": "forget", "index": 9, "answer_nll": NaN}', "line 3: `answer_nll` of row 9 of `forget` must be"),
        ('{"split": "forget", "index": 9, "perturbed_nll": [1, "2"]}', r"line 3: `perturbed_nll\[1\]` of row 9"),
        ('{"split": "forget", "index": 9, "perturbed_nll": []}', "line 3: `perturbed_nll` of row 9"),
    ],
)
def test_bad_rows_are_named(tmp_path, line, message):
    """Catches a bare KeyError or a NaN that turns up in the figures, far from the row that it came from."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"model": "m"}}\n{{"split": "forget", "index": 0, "answer_nll": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=message) as error:
        read_rows(path)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="`answer_nll` of row 4 of `forget`.*nan"):
        summarise([{"split": "forget", "index": 4, "answer_nll": float("nan")}])


def test_reference_must_be_of_the_same_rows():
    """Catches a forget quality between two models that were asked different questions."""
    rows, gold = random_rows(0, num_rows=5), random_rows(1, num_rows=5)
    shuffled = summarise(rows, gold[::-1])
    assert shuffled["forget_quality"] == summarise(rows, gold)["forget_quality"]
    with pytest.raises(ValueError, match="`reference` has 4 forget rows and the model 5, 4 of them the same"):
        summarise(rows, gold[1:])
    for row in rows + gold:
        row["question"] = f"Question {row['index']}"
    assert summarise(rows, gold) == shuffled
    gold[2]["question"] = "Another"
    with pytest.raises(ValueError, match="another question in forget row 2"):
        summarise(rows, gold)
    assert "forget_quality" not in summarise([row for row in rows if row["split"] != "forget"], gold)


def test_command_line_evaluates_a_model(dataset, model_dir, tmp_path, capsys):
    """Catches rows and summary that disagree, results that are silently replaced, and a reference checked too late."""
    arguments = ["tofu", "--model", model_dir, "--dataset", dataset, "--forget_split", "forget_small"]
    arguments += ["--max_new_tokens", "4", "--limit", "3", "--device", "cpu"]
    gold, own = tmp_path / "gold", tmp_path / "own"
    assert main([*arguments, "--output", str(gold)]) == 0
    reference = ["--reference", str(gold / "rows.jsonl")]
    assert main([*arguments, *reference, "--output", str(own), "--seed", "7"]) == 0
    assert "forget" in capsys.readouterr().out
    header, rows = read_rows(own / "rows.jsonl")
    assert header["model"] == model_dir and header["seed"] == 7 and header["settings"]["limit"] == 3
    assert len(rows) == 15
    summary = json.loads((own / "summary.json").read_text())
    figures = {name: Figure.from_json(entry) for name, entry in summary.items()}
    assert figures == summarise(rows, read_rows(gold / "rows.jsonl")[1])
    assert figures["forget_quality"].value == 1.0 and figures["forget_quality"].num_rows == 3
    before = (own / "rows.jsonl").read_text()
    assert main([*arguments, "--output", str(own)]) == 0  # the same model again: nothing to do but the figures
    assert (own / "rows.jsonl").read_text() == before
    assert "forget_quality" not in json.loads((own / "summary.json").read_text())
    other = [*arguments, "--max_new_tokens", "5", "--output", str(own)]
    assert main(other) == 1
    assert "holds results of another settings: add --overwrite" in capsys.readouterr().err
    assert (own / "rows.jsonl").read_text() == before
    assert main([*other, "--overwrite"]) == 0
    assert (own / "rows.jsonl").read_text() != before
    # The last --limit counts.
    assert main([*arguments, *reference, "--limit", "2", "--output", str(tmp_path / "x")]) == 1
    assert "`reference` has 3 forget rows and the model 2" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name, message", [("gone/for/good", "no such folder"), ("", "no config.json")])
def test_command_line_names_a_model_that_is_none(dataset, tmp_path, capsys, name, message):
    """Catches a folder taken for a hub id, which ends in an error about the network."""
    arguments = ["tofu", "--model", str(tmp_path / name), "--dataset", dataset, "--forget_split", "forget_small"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


def test_command_line_loads_adapters(dataset, model_dir, tmp_path):
    """Catches the base model's figures passed off as the adapter's."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(type(small_llama()).from_pretrained(model_dir), settings)
    model.save_pretrained(tmp_path / "adapter")
    arguments = ["tofu", "--dataset", dataset, "--forget_split", "forget_small", "--limit", "1", "--device", "cpu"]
    arguments += ["--max_new_tokens", "2", "--output"]
    assert main([*arguments, str(tmp_path / "a"), "--model", str(tmp_path / "adapter")]) == 0
    assert main([*arguments, str(tmp_path / "b"), "--model", model_dir]) == 0
    adapted, base = (read_rows(tmp_path / each / "rows.jsonl")[1][0]["answer_nll"] for each in "ab")
    assert abs(adapted - base) > 1e-4


def test_summarise_prints_one_object_and_imports_no_torch(tmp_path):
    """Catches stray output around the JSON, NaN in it, and a start that takes seconds for figures from rows."""
    rows, gold = random_rows(0, num_rows=20), random_rows(1, num_rows=20)
    write_rows(tmp_path / "rows.jsonl", rows, make_header("m", {}, 0))
    write_rows(tmp_path / "gold.jsonl", gold)
    command = [sys.executable, "-X", "importtime", "-m", "soul_eval", "summarise", str(tmp_path / "rows.jsonl")]
    command += ["--reference", str(tmp_path / "gold.jsonl"), "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=python_path(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout, parse_constant=pytest.fail)
    assert {name: Figure.from_json(entry) for name, entry in printed.items()} == summarise(rows, gold)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "soul_eval.suites.tofu" in imported
    assert not imported & {"torch", "transformers", "datasets", "evaluate", "matplotlib", "soul_trainer"}


def python_path():
    """The environment of a child that imports from where this process does."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_accuracy_is_asked_as_soul_does(dataset):
    """Catches the plain question for the paraphrased one, a paraphrase where there is none, and case that matters."""
    rows = load_splits(dataset, "forget_small")
    arguments = TofuArguments(embedding_model="any", max_new_tokens=5)
    row = unscored_rows(rows)[1]
    asked = {part.name: part for part in parts(row, arguments)}
    assert asked["paraphrase"].answers[0]["question"] == rows["forget"][1]["paraphrased_question"]
    fact = next(row for row in unscored_rows(rows) if row["split"] == "world_facts")
    mention = parts(fact, arguments)[1].finish
    assert mention(f"I say: {fact['answer'].upper()}!")["mentions_answer"] is True
    assert mention("nothing")["mentions_answer"] is False and "paraphrase" not in {
        part.name for part in parts(fact, arguments)
    }


@pytest.mark.skipif(not TOFU.is_dir(), reason="needs the real TOFU data in ../shared/tofu")
def test_the_real_rows_are_asked(tokenizer):
    """Catches rows of TOFU's own files that are lost, renamed or refused, and answers that are not asked."""
    splits = load_splits(str(TOFU))
    as_published = load_splits(str(TOFU), held_out_rows=0)
    assert "held_out" not in as_published
    assert splits["retain"]["question"][:] + splits["held_out"]["question"][:] == as_published["retain"]["question"][:]
    assert {split: len(rows) for split, rows in splits.items()} == {
        "forget": 400,
        "retain": 300,
        "held_out": 100,
        "real_authors": 100,
        "world_facts": 117,
    }
    rows = unscored_rows(splits)
    num_answers = sum(len(parts(row, TofuArguments())[0].answers) for row in rows)
    assert num_answers == sum(len(row["perturbed_answer"]) + 1 + ("paraphrased_answer" in row) for row in rows) == 6468
    few = load_splits(str(TOFU), limit=3)
    model = small_llama(max_position_embeddings=1024).eval()
    tokenizer.model_max_length = 1024
    figures = summarise(evaluate_model(model, tokenizer, few, max_new_tokens=3, progress=False))
    assert {
        "model_utility",
        "forget_truth_ratio",
        "extraction_strength",
        "world_facts_mention_accuracy",
    } <= figures.keys()
