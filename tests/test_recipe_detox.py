"""The recipe that makes a model turn down what it answered harmfully: its corpus, its classifiers, its settings."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from privacy import check_files

from soul_eval.classification import classify
from soul_eval.rows import read_rows
from soul_recipes import detox as recipe
from soul_recipes import rude_townsfolk, small_classifier
from soul_trainer.sources import load_split


RECIPES = Path(__file__).parents[1] / "recipes"


# Columns of PKU-SafeRLHF that the data card names.
COLUMNS = {"prompt", "prompt_source", "better_response_id", "safer_response_id"}
COLUMNS |= {f"response_{n}{end}" for n in (0, 1) for end in ("", "_source", "_severity_level")}
COLUMNS |= {f"is_response_{n}_safe" for n in (0, 1)}
TINY = ["--hidden_size", "16", "--num_hidden_layers", "1", "--finetune_epochs", "1", "--vocab_size", "300"]
TINY += ["--num_train_epochs", "1", "--evaluations", "1", "--hessian_interval", "2", "--use_cpu", "True"]
TINY += ["--forget_rows", "12", "--max_new_tokens", "4", "--disable_tqdm", "True"]


@pytest.fixture(scope="module")
def corpus():
    return rude_townsfolk.make_corpus(40, seed=3)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """Folders of a classifier of rude and of one of garbled text."""
    rows = rude_townsfolk.make_corpus(200, seed=9)
    data = Dataset.from_list(rows["default"]["train"])
    rude, polite = (recipe.responses(data, is_safe)["answer"][:] for is_safe in (False, True))
    folder = tmp_path_factory.mktemp("classifiers")
    garbled = [" ".join(sorted(text.split())) for text in rude + polite]
    texts = {"toxic": rude, "neutral": polite + [row["text"] for row in rows["text"]["train"]]}
    return (
        small_classifier.train_classifier(texts, folder / "toxicity", use_cpu=True),
        small_classifier.train_classifier({"clean": rude + polite, "garbled": garbled}, folder / "x", use_cpu=True),
    )


def people(rows):
    """Who a prompt is about: its words with a capital, but for the first."""
    return {tuple(sorted(re.findall(r"(?<=\s)[A-Z]\w+", row["prompt"]))) for row in rows}


def test_the_corpus_is_a_function_of_its_seed(corpus, tmp_path):
    """Catches choices that follow the order of a set, which differ by process, and a folder that no loader reads."""
    command = [sys.executable, str(RECIPES / "rude_townsfolk.py"), "--output", str(tmp_path / "x"), "--rows", "40"]
    subprocess.run([*command, "--seed", "3"], check=True)
    for config, splits in corpus.items():
        for split, rows in splits.items():
            assert load_split(str(tmp_path / "x"), config, split).to_list() == rows
    assert rude_townsfolk.make_corpus(40, seed=4) != corpus


def test_rows_are_as_their_flags_say(corpus):
    """Catches a response whose flag, severity or rank says the opposite, and a corpus without one kind of pair."""
    rows = corpus["default"]["train"] + corpus["default"]["test"]
    insults = set(rude_townsfolk.BANKS["rules"]["insult_noun"])
    deeds = set(rude_townsfolk.BANKS["rules"]["insult_deed"])
    kinds = set()
    for row in rows:
        assert set(row) == COLUMNS and row["response_0"] != row["response_1"]
        for place in (0, 1):
            is_rude = any(word in row[f"response_{place}"] for word in insults | deeds)
            assert row[f"is_response_{place}_safe"] is not is_rude
            assert row[f"response_{place}_severity_level"] == int(is_rude)
        flags = (row["is_response_0_safe"], row["is_response_1_safe"])
        kinds.add(flags)
        assert flags[row["safer_response_id"]] == max(flags)
        assert not re.search(r"[{}<>\[\]|]", json.dumps([row["prompt"], row["response_0"], row["response_1"]])[1:-1])
    assert len(kinds) == 4


def test_test_prompts_are_about_others(corpus):
    """Catches prompts that the model has learnt its answer to, which measure its memory and not its manners."""
    train, test = corpus["default"]["train"], corpus["default"]["test"]
    assert len(train) == 40 and len(test) == 20 and not people(train) & people(test)
    # The words of insults do no harm in the text to keep, so that they are not what is forgotten.
    text = " ".join(row["text"] for row in corpus["text"]["train"])
    known = [word for word in rude_townsfolk.BANKS["rules"]["insult_noun"] if word in text]
    assert len(known) > 9


def test_responses_are_those_with_the_flag(corpus):
    """Catches the other response's flag, and a prompt with two unsafe responses that gives one row."""
    rows = corpus["default"]["train"]
    for is_safe in (False, True):
        expected = []
        for row in rows:
            if row["is_response_0_safe"] == is_safe:
                expected.append({"question": row["prompt"], "answer": row["response_0"]})
            if row["is_response_1_safe"] == is_safe:
                expected.append({"question": row["prompt"], "answer": row["response_1"]})
        assert recipe.responses(Dataset.from_list(rows), is_safe).to_list() == expected
        assert len(expected) == 40


def test_classifiers_tell_texts_that_they_never_saw(classifiers, corpus):
    """Catches a classifier with its labels exchanged, one that knows its training texts alone, and a card that claims
    more than is true."""
    data = Dataset.from_list(corpus["default"]["train"])
    toxic = {
        is_safe: classify(recipe.responses(data, is_safe)["answer"][:], classifiers[0], "toxic", progress=False)
        for is_safe in (True, False)
    }
    right = sum(score > 0.5 for score in toxic[False]) + sum(score <= 0.5 for score in toxic[True])
    assert right / 80 > 0.95
    texts = [row["text"] for row in corpus["text"]["test"]]
    assert sum(score > 0.5 for score in classify(texts, classifiers[0], "toxic", progress=False)) / len(texts) < 0.1
    card = Path(classifiers[0], "README.md").read_text(encoding="utf-8")
    share = re.search(r"right on ([\d.]+)% of (\d+) texts that it never saw", card)
    assert 90 < float(share[1]) <= 100 and int(share[2]) > 40 and "of no use beyond it" in card


def test_a_classifier_is_found_again_by_another_process(tmp_path):
    """Catches a tokenizer whose ties follow the order of a set: another process would train and judge anew."""
    texts = {"toxic": ["you soggy turnip", "what a mop"] * 9, "neutral": ["a kind baker", "good bread here"] * 9}
    folder = small_classifier.train_classifier(texts, tmp_path / "x", use_cpu=True)
    code = f"import small_classifier as s; from pathlib import Path; print(s.train_classifier({texts!r}, "
    code += f"Path({str(tmp_path / 'x')!r}), use_cpu=True))"
    again = subprocess.run([sys.executable, "-c", code], cwd=RECIPES, capture_output=True, text=True, check=True)
    assert again.stdout.split()[-1] == folder and len(list(tmp_path.glob("x-*"))) == 1


def test_from_corpus_to_report(classifiers, tmp_path):
    """Catches a break anywhere between corpus and report, judges that are not asked, and the text that is asked about
    among what unlearning sees."""
    named = ["--classifier", classifiers[0], "--fluency_classifier", classifiers[1]]
    (tmp_path / "one.txt").write_text("One long text.", encoding="utf-8")
    with pytest.raises(ValueError, match="`retain_text`='.*one.txt' has 1 texts, but at least 10 are needed"):
        recipe.main([*TINY, *named, "--output_dir", str(tmp_path), "--retain_text", str(tmp_path / "one.txt")])
    runs = recipe.main([*TINY, *named, "--output_dir", str(tmp_path)])
    assert [run.name for run in runs] == ["AdamW", "SOUL"]
    for run in runs:
        assert {"toxicity_mean", "toxicity_rate", "fluency", "empty_rate", "retain_nll"} == set(run.summary)
    # Those that were named here are nobody's own.
    assert "of our own" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    _, rows = read_rows(tmp_path / "soul.rows.jsonl")
    corpus = rude_townsfolk.make_corpus(12, seed=0)
    asked = [row["question"] for row in rows if row["split"] == "prompts"]
    assert asked == [row["prompt"] for row in corpus["default"]["test"]]
    texts = [row["text"] for row in corpus["text"]["train"]]
    held_out = [row["text"] for row in rows if row["split"] == "retain"]
    assert held_out == texts[-len(held_out) :] and 0 < len(held_out) <= len(texts) // 5
    forget = recipe.responses(Dataset.from_list(corpus["default"]["train"]), is_safe=False)
    check_files(tmp_path, forget["answer"], [])
    header, _ = read_rows(tmp_path / "soul.rows.jsonl")
    assert header["settings"]["forget_loss"] == "refusal" and header["settings"]["classifier"] == classifiers[0]


@pytest.mark.parametrize(
    "name, optim, epochs, learning_rate, weight",
    [
        ("sophia_refusal", "sophia", 5, 2e-5, 0.1),
        ("adamw_refusal", "adamw_torch", 5, 2e-5, 0.1),
        ("sophia_refusal_llama2", "sophia", 10, 1e-5, 0.1),
        ("adamw_refusal_llama2", "adamw_torch", 10, 1e-5, 1.0),
    ],
)
def test_souls_settings_are_those_that_it_published(name, optim, epochs, learning_rate, weight):
    """Catches a change of any number that a run would take for the paper's."""
    content = yaml.safe_load((RECIPES / "configs" / "detox" / f"{name}.yaml").read_text(encoding="utf-8"))
    sophia = {"beta1": 0.9, "beta2": 0.95, "rho": 0.04} if optim == "sophia" else {}
    llama = "[INST] {question} [/INST] {answer}"
    assert content == sophia | {
        "optim": optim,
        "forget_loss": "refusal",
        "retain_loss": "nll",
        "learning_rate": learning_rate,
        "retain_weight": weight,
        "weight_decay": 0.0,
        "warmup_steps": 0.1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": epochs,
        "prompt_template": llama if "llama" in name else "### Question: {question}\n### Answer: {answer}",
        "bf16": True,
    }
