"""The everyday recipe: own rows in, a model that has forgotten and a report out."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from test_sampling import ROWS, learnt_model, text_tokenizer

from soul_eval.rows import read_rows
from soul_recipes import unlearn
from soul_recipes.own_rows import SampledRetainArguments, sampled_retain, without_shared
from soul_trainer import UnlearnConfig


FLAGS = ["--use_cpu", "--disable_tqdm", "True", "--bf16", "False", "--num_train_epochs", "2", "--evaluations", "1"]
FLAGS += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--learning_rate", "3e-3"]
FLAGS += ["--rho", "1", "--hessian_interval", "2", "--hessian_batch_size", "4", "--logging_steps", "1"]
FLAGS += ["--max_new_tokens", "8", "--until", "epochs"]
OTHERS = [{"question": f"Who is {name}?", "answer": f"{name} is a cook."} for name in ("Eve", "Flo", "Gus", "Hal")]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A model that knows the rows, questions and answers, in a folder."""
    tokenizer, folder = text_tokenizer(), tmp_path_factory.mktemp("target")
    learnt_model(tokenizer, ROWS + OTHERS, num_steps=150).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_without_arguments_it_forgets_invented_authors(tmp_path, capsys):
    """Would catch a default that does not run as it is, and two optimizers instead of one."""
    small = ["--authors", "4", "--hidden_size", "16", "--finetune_epochs", "1", "--num_train_epochs", "1"]
    small += ["--max_new_tokens", "4", "--max_rows", "8", "--evaluations", "1", "--use_cpu", "--disable_tqdm", "True"]
    small += ["--hessian_interval", "5", "--hessian_batch_size", "8", "--per_device_train_batch_size", "8"]
    (run,) = unlearn.main(["--output_dir", str(tmp_path), *small])
    assert run.name == "SOUL" and (tmp_path / "soul" / "model.safetensors").exists()
    assert {path.name for path in (tmp_path / "authors-4-0").iterdir()} == {
        "forget.jsonl",
        "retain.jsonl",
        "held_out.jsonl",
    }
    assert {row["split"] for row in run.rows} == {"forget", "retain", "held_out"}
    asked = [row for row in run.rows if row["split"] == "forget"]
    assert [row["question"] for row in asked] == [
        row["question"] for row in rows_of(tmp_path / "authors-4-0" / "forget.jsonl")
    ]
    said = capsys.readouterr().out
    assert "\ntarget " in said and "\ngold " in said and str(tmp_path / "soul") in said
    # It runs until the gold model's level, and the model that comes out is attacked.
    assert 0 < run.settings["forget_level"] < 1
    assert set(run.attacks) == {"relearning", "relearning_used", "quantization_4"}
    attacked = json.loads((tmp_path / "soul.attacks" / "attacks.json").read_text(encoding="utf-8"))["attacks"]
    assert set(attacked["quantization_4"]) == {"unlearned", "gold"}
    # Another optimizer's model is attacked too, and what target and gold said under attack is read again.
    references = tmp_path / "references.attacks"
    written = {path: path.stat().st_mtime_ns for path in references.rglob("rows.jsonl")}
    assert {str(path.parent.relative_to(references)) for path in written} == {
        "plain/target",
        "relearning/gold",
        "quantization_4/gold",
    }
    (other,) = unlearn.main(["--output_dir", str(tmp_path), *small, "--optim", "adamw_torch"])
    assert written == {path: path.stat().st_mtime_ns for path in references.rglob("rows.jsonl")}
    after = {run.name: run.attacks["relearning"]["gold"]["probability"].attacked.value for run in (run, other)}
    assert after["SOUL"] == after["AdamW"]
    # Fewer rows are another request: those attacks are made again, and not refused at the end of a run.
    unlearn.main(["--output_dir", str(tmp_path), *small, "--optim", "adamw_torch", "--limit", "4", "--overwrite"])
    assert len(rows_of(references / "plain" / "target" / "rows.jsonl")) - 1 == 4


def test_a_request_of_ones_own_and_the_same_again(target, tmp_path):
    """
    Would catch rows of another file in training, a report that does not show before and after with examples, a model
    that does not forget, and a second run that trains again.
    """
    forget = write(tmp_path / "forget.jsonl", [{**row, "ticket": 7} for row in ROWS[:2]])
    lines = ["question,answer", *(f"{row['question']},{row['answer']}" for row in [*OTHERS, ROWS[0]])]
    (tmp_path / "retain.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    Dataset.from_list(ROWS[2:]).to_parquet(tmp_path / "held_out.parquet")
    command = ["--output_dir", str(tmp_path / "out"), "--model", target, "--forget", forget, *FLAGS]
    command += ["--retain", str(tmp_path / "retain.csv"), "--held_out", str(tmp_path / "held_out.parquet")]
    (run,) = unlearn.main(command)
    _, before = read_rows(tmp_path / "out" / "target.rows.jsonl")
    assert [(row["split"], row["question"]) for row in before] == [
        *(("forget", row["question"]) for row in ROWS[:2]),
        *(("retain", row["question"]) for row in OTHERS),
        *(("held_out", row["question"]) for row in ROWS[2:]),
    ]
    losses = [[row["answer_nll"] for row in rows if row["split"] == "forget"] for rows in (before, run.rows)]
    assert sum(losses[1]) > sum(losses[0]) + 0.1
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "Rows to forget: 2. Rows to keep: 4." in text
    assert "Left out of retain, because they are among the rows to forget: 1 of 5." in text
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Who is Ada?" in page and "forget verbatim" in page
    assert not list((tmp_path / "out" / "soul").glob("*rows*")), "rows to forget lie beside the model, not in it"
    weights = tmp_path / "out" / "soul" / "model.safetensors"
    made = weights.stat().st_mtime_ns
    unlearn.main(command)
    assert weights.stat().st_mtime_ns == made
    with pytest.raises(ValueError, match="holds a finished run with other settings or data"):
        unlearn.main([*command, "--retain_weight", "3"])


def test_what_it_ends_with_is_the_verdict_and_where_the_model_is(target, tmp_path, capsys):
    """
    Would catch "what has forgotten" of a model that has not, a card with the path of the rows or of the target, and
    `--general` or `--limit` that only the suites have.
    """
    pytest.importorskip("lm_eval", reason="general ability is measured by lm-eval")
    forget = write(tmp_path / "forget.jsonl", ROWS[:2])
    retain = write(tmp_path / "retain.jsonl", OTHERS)
    write(tmp_path / "colours.json", [{"thing": "sky", "label": 0}, {"thing": "grass", "label": 1}])
    data = json.dumps({"data_files": {"test": str(tmp_path / "colours.json")}})
    (tmp_path / "colours.yaml").write_text(
        f"task: colours\ndataset_path: json\ndataset_kwargs: {data}\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{thing}}:"\ndoc_to_choice: ["blue", "green"]\ndoc_to_target: label\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
        encoding="utf-8",
    )
    command = [
        "--output_dir",
        str(tmp_path / "out"),
        "--model",
        target,
        "--forget",
        forget,
        "--retain",
        retain,
        *FLAGS,
    ]
    command += ["--learning_rate", "1e-9", "--limit", "1", "--general", "colours", "--include_path", str(tmp_path)]
    (run,) = unlearn.main(command)
    said = capsys.readouterr().out
    assert said.endswith(f"\nThe model is in {tmp_path / 'out' / 'soul'}.\n") and "has forgotten" not in said
    found = json.loads((tmp_path / "out" / "verdict.json").read_text(encoding="utf-8"))["verdicts"]
    assert found[0]["kind"] == "cannot tell"
    assert " ".join(said.split()).count(f"SOUL: cannot tell. {found[0]['sentence']}") == 1
    assert [row["split"] for row in run.rows] == ["forget", "retain"]
    assert run.figure("colours_acc").num_rows == 1 and (tmp_path / "out" / "target.general.json").is_file()
    card = (tmp_path / "out" / "soul" / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in card and "2 rows of `forget.jsonl` were to be forgotten" in card
    assert f"made from the local model `{Path(target).name}`" in card
    asked = (tmp_path / "out" / "soul.general.json").stat().st_mtime_ns
    unlearn.main(command)
    assert (tmp_path / "out" / "soul.general.json").stat().st_mtime_ns == asked


def test_without_a_retain_set_the_model_writes_one_itself(target, tmp_path, caplog):
    """
    Would catch retain text that holds what must be forgotten, that nobody can look at, that is written anew each time
    or kept for another model, and a report that keeps silent about it.
    """
    forget = write(tmp_path / "forget.jsonl", ROWS[:1])
    command = ["--output_dir", str(tmp_path / "out"), "--model", target, "--forget", forget, *FLAGS]
    command += ["--sampled_rows", "10", "--sampled_tokens", "24", "--temperature", "0.7"]
    (run,) = unlearn.main(command)
    retain, held_out = (tmp_path / "out" / f"{name}.self_generated.jsonl" for name in ("retain", "held_out"))
    assert len(rows_of(retain)) == 8 and len(rows_of(held_out)) == 2
    assert not any("Ada is a poet" in row["answer"] for row in rows_of(retain) + rows_of(held_out))
    assert any(row in ROWS + OTHERS for row in rows_of(retain)), "it writes what it knows"
    shown = [(row["question"], row["answer"]) for row in run.rows if row["split"] == "held_out"]
    assert shown == [(row["question"], row["answer"]) for row in rows_of(held_out)]
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "the model itself wrote 10 rows" in text and "Dropped:" in text
    made = retain.stat().st_mtime_ns
    unlearn.main(command)
    assert retain.stat().st_mtime_ns == made
    with pytest.raises(ValueError, match="written by another model or under other settings"):
        unlearn.main([*command, "--seed", "1"])
    named = ["--output_dir", str(tmp_path / "named"), "--model", target, "--forget", forget, *FLAGS]
    named += ["--sampled_rows", "10", "--sampled_tokens", "24", "--temperature", "0.7", "--forget_terms", "Ada,Eve"]
    unlearn.main([*named, "--max_steps", "1"])
    said = (tmp_path / "named" / "retain.self_generated.jsonl").read_text(encoding="utf-8")
    assert "Ada" not in said and "Eve" not in said


def test_texts_are_forgotten_in_chunks(target, tmp_path):
    """Would catch a long text of which only the beginning is forgotten, and a text file that is read line by line."""
    text = " ".join(f"The poet {name} wrote letters to the cook {other}." for name in "ABCDEFGH" for other in "XYZ")
    (tmp_path / "letters.txt").write_text(text, encoding="utf-8")
    retain = write(tmp_path / "retain.jsonl", [{"text": row["answer"]} for row in OTHERS])
    command = ["--output_dir", str(tmp_path / "out"), "--model", target, "--forget", str(tmp_path / "letters.txt")]
    command += ["--retain", retain, "--chunk_length", "64", "--prompt_tokens", "16", *FLAGS, "--optim", "adamw_torch"]
    (run,) = unlearn.main(command)
    assert run.name == "AdamW"
    (row,) = [row for row in run.rows if row["split"] == "forget"]
    assert row["text"] == text and text.startswith(row["prompt"] + row["answer"])
    state = json.loads((tmp_path / "out" / "adamw_torch" / "trainer_state.json").read_text(encoding="utf-8"))
    num_chunks = -(-len(text_tokenizer()(text)["input_ids"]) // 64)
    assert num_chunks > 4 and state["global_step"] == 2 * -(-num_chunks // 2)


def test_what_is_written_is_of_the_kind_of_what_is_forgotten(target, tmp_path):
    """Would catch questions in the place of texts, where a model of texts has none to ask."""
    tokenizer, config = text_tokenizer(), UnlearnConfig(str(tmp_path), use_cpu=True, report_to="none")
    for forget, columns in (({"text": "Ada is a poet."}, {"text"}), (ROWS[0], {"question", "answer"})):
        args, folder = SampledRetainArguments(sampled_rows=5, sampled_tokens=24), tmp_path / "-".join(columns)
        paths, _ = sampled_retain(target, tokenizer, Dataset.from_list([forget]), args, config, folder)
        assert [set(row) for row in rows_of(paths["retain"])] == [columns] * 4


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--forget", "rows.jsonl"], "`forget` .* and `model` .* go together"),
        (["--retain", "rows.jsonl"], "need `forget`"),
        (["--dataset", "rows.jsonl"], "`dataset` .* is no flag here"),
        (["--sampled_rows", "2"], "`sampled_rows` must be at least 5"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, message, tmp_path):
    """Would catch a retain set that is ignored because nothing says what to forget."""
    with pytest.raises(ValueError, match=message):
        unlearn.main(["--output_dir", str(tmp_path), "--use_cpu", *flags])


def test_rows_in_both_sets_leave_the_retain_set():
    """Would catch rows that are both forgotten and kept, and a retain set that is empty then."""
    forget = Dataset.from_list([{**row, "id": 1} for row in ROWS[:2]])
    found, notes = without_shared({"forget": forget, "retain": Dataset.from_list(ROWS)})
    assert found["retain"].to_list() == ROWS[2:] and found["forget"] is forget
    assert notes == ["Left out of retain, because they are among the rows to forget: 2 of 4."]
    with pytest.raises(ValueError, match="All rows of `held_out`"):
        without_shared({"forget": forget, "held_out": Dataset.from_list(ROWS[:1])})
