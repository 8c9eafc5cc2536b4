"""The suite `wmdp`: lm-eval's own tasks must give the same figures."""

import json
import math
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from scipy.stats import beta
from test_eval_scoring import byte_tokenizer, small_llama
from tokenizers.processors import TemplateProcessing

from soul_eval.__main__ import main
from soul_eval.rows import read_rows
from soul_eval.suites.wmdp import (
    MMLU_SUBJECTS,
    TOPICS,
    WmdpArguments,
    load_questions,
    match_reference,
    parts,
    question_prompt,
    summarise,
)


# What the issue promises; both sides compute in float32, over other padded widths.
SAME = 1e-4
SUBJECTS = {"anatomy": 5, "college_physics": 2, "philosophy": 4, "econometrics": 3, "virology": 1, "global_facts": 6}


def questions(name, count):
    """Questions whose right answers are spread over the letters, with white space around some."""
    return [
        {
            "question": f"{' ' * (index % 2)}What does {name} {index} do?{chr(10) * (index % 3 == 0)}",
            "choices": [f"{name} {word}{'s' * index}" for word in ("burn", "fall", "grow", "stop")],
            "answer": (7 * index + len(name)) % 4,
        }
        for index in range(count)
    ]


def write_dataset(folder, configs):
    """A dataset in the hub's layout, where each configuration has a split `test`."""
    folder.mkdir()
    for name, rows in configs.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    entries = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}.json\n" for name in configs
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{entries}---\n", encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The settings that name both datasets."""
    folder = tmp_path_factory.mktemp("data")
    wmdp = write_dataset(folder / "wmdp", {name: questions(name, 5 + 3 * place) for place, name in enumerate(TOPICS)})
    mmlu = write_dataset(folder / "mmlu", {name: questions(name, count) for name, count in SUBJECTS.items()})
    return {"dataset": wmdp, "mmlu": mmlu, "mmlu_subjects": ",".join(SUBJECTS)}


def command(data, *arguments):
    return ["wmdp", *(part for name, value in data.items() for part in (f"--{name}", value)), *map(str, arguments)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A model with a tokenizer that begins every text with a token."""
    tokenizer = byte_tokenizer(["Answer: A", "What does biology do?"] * 3)
    tokenizer.model_max_length = 256
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.bos_token_id)]
    )
    folder = tmp_path_factory.mktemp("model")
    # Wide enough that its favourite letter changes from question to question.
    small_llama(vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def evaluated(data, model_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated")
    assert main(command(data, "--model", model_dir, "--output", output, "--device", "cpu")) == 0
    return output


def copied_tasks(folder, data):
    """lm-eval's own task files, of which only the place of the data is changed."""
    tasks = Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"
    for name, source, path in (("wmdp", "wmdp", data["dataset"]), ("mmlu", "mmlu/default", data["mmlu"])):
        (folder / name).mkdir(parents=True)
        for file in (tasks / source).iterdir():
            if file.suffix not in (".yaml", "") or (file.stem.startswith("mmlu_") and file.stem[5:] not in SUBJECTS):
                continue
            text = file.read_text(encoding="utf-8")
            if file.name == "_default_template_yaml":
                assert f"dataset_path: cais/{name}\n" in text
                text = text.replace(f"dataset_path: cais/{name}\n", f"dataset_path: {path}\n")
                # There are no examples in context here, so nothing is taken from another split.
                text = text.replace("fewshot_split: dev\n", "")
            (folder / name / file.name).write_text(text, encoding="utf-8")
    return str(folder)


def test_figures_are_lm_evals(evaluated, data, model_dir, tmp_path, monkeypatch):
    """
    Catches another description, white space or letters without a space, a letter's end of sequence in its likelihood,
    a mean over subjects instead of questions, a category's subject in another, and a prompt in a chat template.
    """
    lm_eval = pytest.importorskip("lm_eval")
    # The library would give lm-eval the rows of any folder of that name.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    manager = pytest.importorskip("lm_eval.tasks").TaskManager(
        include_path=copied_tasks(tmp_path / "tasks", data), include_defaults=False
    )
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": model_dir, "device": "cpu"},
        tasks=["wmdp", "mmlu"],
        task_manager=manager,
        batch_size=3,
        bootstrap_iters=0,
    )
    found = {name: entry["acc,none"] for name, entry in results["results"].items() if "acc,none" in entry}
    header, rows = read_rows(evaluated / "rows.jsonl")
    figures = {name: figure.value for name, figure in summarise(rows).items()}
    expected = {f"{name}_accuracy": value for name, value in found.items() if f"{name}_accuracy" in figures}
    assert figures == pytest.approx(expected, abs=SAME)
    assert len(figures) == 3 + 1 + 4
    assert 0 < figures["mmlu_accuracy"] < 1 and 0 < figures["wmdp_cyber_accuracy"] < 1
    assert header["settings"]["dataset"] == data["dataset"]
    # Accuracies could agree by chance; the likelihoods that they are made of could not.
    own = {row["question"]: row["option_nll"] for row in rows}
    num_compared = 0
    for samples in results["samples"].values():
        for sample in samples:
            theirs = [-float(response[0][0]) for response in sample["resps"]]
            assert own[sample["doc"]["question"]] == pytest.approx(theirs, abs=SAME)
            num_compared += 1
    assert num_compared == len(rows) == sum(5 + 3 * place for place in range(3)) + sum(SUBJECTS.values())


def test_rows_are_those_of_a_slow_loop(evaluated, model_dir):
    """Catches options in another order, a margin of the wrong sign, ties that count as right for the last."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (each.from_pretrained(model_dir) for each in (AutoModelForCausalLM, AutoTokenizer))
    _, rows = read_rows(evaluated / "rows.jsonl")
    for row in rows[::4]:
        ids = tokenizer(question_prompt(row), return_tensors="pt")["input_ids"]
        letters = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"] for letter in "ABCD"]
        nll = []
        for letter in letters:
            whole = torch.cat([ids, torch.tensor([letter])], dim=1)
            with torch.no_grad():
                log_probs = model(whole).logits[0].log_softmax(-1)
            nll.append(-sum(log_probs[ids.shape[1] + place - 1, token].item() for place, token in enumerate(letter)))
        assert row["option_nll"] == pytest.approx(nll, abs=SAME)
        right = nll[row["answer"]]
        others = [value for place, value in enumerate(nll) if place != row["answer"]]
        assert row["margin"] == pytest.approx(min(others) - right, abs=2 * SAME)
        assert row["is_correct"] == (right < min(others)) == (row["margin"] > 0)


class Score:
    def __init__(self, *log_probs):
        self.log_probs = list(log_probs)


@pytest.mark.parametrize("answer, is_correct", [(1, True), (2, False)])
def test_of_equal_options_the_first_counts(answer, is_correct):
    """Catches a tie that makes a model right which prefers nothing, as one that has collapsed does."""
    row = {**questions("a", 1)[0], "split": "wmdp_bio", "index": 0, "subject": "biology", "answer": answer}
    [part] = parts(row, WmdpArguments())
    scores = [Score(-3.0, -0.1), Score(-1.0, -9.0), Score(-0.5, -0.5, -0.1), Score(-2.0, -0.1)]
    found = part.finish(scores)
    assert found == {"option_nll": [3.0, 1.0, 1.0, 2.0], "is_correct": is_correct, "margin": 0.0}
    with pytest.raises(ValueError, match="Row 0 of `wmdp_bio`: the question is too long"):
        part.finish([Score(-1.0)] * 4)


def test_subjects_are_lm_evals():
    """Catches a subject that is missing or in another category than lm-eval has it in, and another description."""
    tasks = Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"
    categories, descriptions = {}, {}
    for file in (tasks / "mmlu" / "default").glob("mmlu_*.yaml"):
        task = yaml.safe_load(file.read_text(encoding="utf-8"))
        categories[task["dataset_name"]] = task["tag"].removeprefix("mmlu_").removesuffix("_tasks")
        descriptions[task["dataset_name"]] = task["description"]
    for name in ("bio", "cyber", "chem"):
        task = yaml.safe_load((tasks / "wmdp" / f"wmdp_{name}.yaml").read_text(encoding="utf-8"))
        descriptions[TOPICS[task["dataset_name"]]] = task["description"]
    assert {subject: category for category, found in MMLU_SUBJECTS.items() for subject in found} == categories
    assert len(categories) == 57
    for subject, description in descriptions.items():
        row = {"subject": subject, "question": "Q", "choices": "abcd"}
        assert question_prompt(row) == f"{description}Q\nA. a\nB. b\nC. c\nD. d\nAnswer:"


def test_a_limit_keeps_some_of_each_subject(data, model_dir, tmp_path):
    """Catches a limit that keeps one subject of a category alone, an order that changes, MMLU in spite of `none`."""
    rows = load_questions(WmdpArguments(**data))
    other = [row["subject"] for row in rows if row["split"] == "mmlu_other"]
    assert other == ["global_facts", "virology"] + ["global_facts"] * 5
    stem = [row["question"].strip() for row in rows if row["split"] == "mmlu_stem"]
    assert stem[:3] == ["What does anatomy 0 do?", "What does college_physics 0 do?", "What does anatomy 1 do?"]
    settings = {**data, "mmlu": "none", "subsets": "wmdp-chem"}
    assert main(command(settings, "--model", model_dir, "--output", tmp_path, "--limit", 4)) == 0
    _, rows = read_rows(tmp_path / "rows.jsonl")
    assert [(row["split"], row["index"]) for row in rows] == [("wmdp_chem", index) for index in range(4)]
    assert [row["question"] for row in rows] == [row["question"] for row in questions("wmdp-chem", 4)]


def test_figures_by_hand():
    """Catches a mean of means, an interval that is a point where all answers are right, a category left in."""
    rows = [{"split": "mmlu_stem", "index": index, "is_correct": index < 3} for index in range(9)]
    rows += [{"split": "mmlu_other", "index": 0, "is_correct": True}]
    rows += [{"split": "wmdp_bio", "index": index, "is_correct": True} for index in range(5)]
    figures = summarise(rows)
    assert {name: (figure.value, figure.num_rows) for name, figure in figures.items()} == {
        "wmdp_bio_accuracy": (1, 5),
        "mmlu_accuracy": (0.4, 10),
        "mmlu_stem_accuracy": (1 / 3, 9),
        "mmlu_other_accuracy": (1, 1),
    }
    # Five of five: the share p at which that happens in 2.5% of all samples.
    assert figures["wmdp_bio_accuracy"].low == pytest.approx(0.025 ** (1 / 5))
    assert figures["wmdp_bio_accuracy"].high == 1
    assert figures["mmlu_accuracy"].low == pytest.approx(beta.ppf(0.025, 4, 7))
    assert figures["mmlu_accuracy"].high == pytest.approx(beta.ppf(0.975, 5, 6))
    with pytest.raises(ValueError, match="Row 4 of `wmdp_bio` lacks `is_correct`"):
        summarise([*rows[:-1], {"split": "wmdp_bio", "index": 4}])
    with pytest.raises(ValueError, match="`split` must be one of"):
        summarise([{"split": "forget", "index": 0, "is_correct": True}])


def test_a_reference_of_other_questions_is_refused(evaluated, data, model_dir, tmp_path, capsys):
    """Catches two models that are compared on different questions, and one that runs before anyone looks."""
    header, rows = read_rows(evaluated / "rows.jsonl")
    assert match_reference(rows, rows[::-1]) == rows
    other = tmp_path / "other.jsonl"
    rows[1]["question"] = "What else?"
    other.write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]), encoding="utf-8")
    arguments = command(data, "--model", model_dir, "--output", tmp_path / "out", "--reference", other)
    assert main(arguments) == 1
    assert "`reference` has another question in wmdp_bio row 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="`reference` has 4 wmdp_bio rows and the model 5"):
        summarise(rows, rows[1:])
    assert all(math.isfinite(figure.low) for figure in summarise(rows, rows).values())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"choices": ["a", "b", "c"]}, "Row 1 of `wmdp_bio`: `choices` must be 4 texts"),
        ({"answer": 4}, "Row 1 of `wmdp_bio`: `answer` must be in 0 to 3, but it is 4"),
        ({"question": " "}, "Row 1 of `wmdp_bio`: `question` must be a text"),
        ({"answer": None}, "Row 1 of the split 'test' of the configuration 'wmdp-bio' of .* lacks answer"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message):
    """Catches a row that is asked with an option too few, or that can never be answered rightly."""
    rows = questions("bio", 3)
    rows[1] |= change
    (tmp_path / "wmdp-bio").mkdir()
    (tmp_path / "wmdp-bio" / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_questions(WmdpArguments(dataset=str(tmp_path), subsets="wmdp-bio", mmlu=None))


def test_unknown_names_are_refused(data):
    """Catches a subset that is skipped in silence."""
    with pytest.raises(ValueError, match="`subsets` must be some of wmdp-bio, .* but it has 'bio'"):
        load_questions(WmdpArguments(**{**data, "subsets": "wmdp-bio,bio"}))
    with pytest.raises(ValueError, match="`mmlu_subjects` must be some of .* but it has 'alchemy'"):
        load_questions(WmdpArguments(**{**data, "mmlu_subjects": "anatomy,alchemy"}))
    with pytest.raises(ValueError, match="`dataset`: cannot load the split 'test' of the configuration 'marketing'"):
        load_questions(WmdpArguments(**{**data, "mmlu_subjects": "marketing"}))
