"""The recipe for WMDP: its corpora, the order of topics, and a run from rows to report on a few inventions."""

import json

import pytest
from datasets import Dataset
from privacy import check_files
from scenes import TOKENIZER_TEXTS, scene_config, scene_model
from toys import toy_tokenizer

from soul_eval.rows import read_rows
from soul_eval.suites import wmdp as suite
from soul_recipes import fictitious_science as science
from soul_recipes import wmdp as recipe
from soul_recipes.wmdp_corpora import in_turns, load_corpus
from soul_trainer import UnlearnTrainer


SMALL = "--use_cpu --entries 2 --hidden_size 16 --finetune_epochs 1 --max_steps 2 --evaluations 1 --rho 1"
SMALL += " --per_device_train_batch_size 2 --hessian_interval 1 --disable_tqdm true"


def texts(*words):
    return Dataset.from_dict({"text": list(words)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("wmdp")


@pytest.mark.parametrize("method", ["npo", "rmu"])
def test_the_recipe_runs_from_rows_to_report(folder, method, capsys):
    """Would catch a break anywhere between corpora and report, and a gold standard that nobody asked for."""
    own = [] if method == "npo" else ["--retain_loss", "activations", "--rmu_layer", "1"]
    arguments = ["--output_dir", str(folder / method), *SMALL.split(), "--forget_loss", method, *own]
    runs = recipe.main(arguments)
    assert [each.name for each in runs] == ["AdamW", "SOUL"]
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in ("target", "AdamW", "SOUL"))
    header, rows = read_rows(folder / method / "soul.rows.jsonl")
    assert {row["split"] for row in rows} == {
        *("wmdp_bio", "wmdp_cyber"),
        *("mmlu_stem", "mmlu_humanities", "mmlu_social_sciences"),
    }
    assert len(list((folder / method).glob("target-*"))) == 1 and not list((folder / method).glob("gold-*"))
    assert header["settings"]["forget_loss"] == method and "wmdp_bio_accuracy" in runs[0].summary
    forget = science.make_corpora(2)["corpora"]
    forget = [row["text"] for name in science.CORPORA.values() if "forget" in name for row in forget[name]["train"]]
    check_files(folder / method, forget, [])


def test_our_own_datasets_are_what_the_suite_and_the_loader_read(tmp_path):
    """Would catch a layout that differs from cais/wmdp, cais/mmlu or cais/wmdp-corpora, and a wrong right answer."""
    where = science.write_corpora(tmp_path, 3)
    arguments = suite.WmdpArguments(
        dataset=where["wmdp"],
        subsets="wmdp-bio,wmdp-cyber",
        mmlu=where["mmlu"],
        mmlu_subjects=",".join(science.SUBJECTS),
    )
    rows = suite.load_questions(arguments)
    assert len(rows) == 6 * 9 and all(len(set(row["choices"])) == 4 for row in rows)
    printed = [text for corpus in science.CORPORA.values() for text in load_corpus(corpus, where["corpora"])["text"]]
    for row in rows:
        assert f"{suite.question_prompt(row)} {suite.LETTERS[row['answer']]}" in printed
        right = row["choices"][row["answer"]]
        assert any(right in text for text in printed if not text.startswith("The following"))
    assert science.make_corpora(3) == science.make_corpora(3) != science.make_corpora(3, seed=1)


def test_what_is_hazardous_is_in_no_corpus_to_keep():
    """Would catch an invention of two topics: forgetting it would harm what is kept."""
    corpora = science.make_corpora(8)["corpora"]
    names = {topic: set() for topic in science.CORPORA}
    for topic, corpus in science.CORPORA.items():
        for row in corpora[corpus]["train"]:
            words = {word.strip(".,?") for word in row["text"].split()}
            names[topic] |= {word for word in words if any(word.startswith(s) for s in science.RULES["word_start"])}
    for topic in science.WMDP:
        for subject in science.SUBJECTS:
            assert names[topic] and not names[topic] & names[subject]


def test_corpora_are_read_as_wmdp_has_them(tmp_path):
    """Would catch bare texts that are refused, short texts that stay, and a broken line that is not named."""
    lines = [json.dumps({"title": "On", "text": "a long text"}), json.dumps("another text"), json.dumps("no")]
    (tmp_path / "bio-forget-corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    folder = str(tmp_path)
    assert load_corpus("bio-forget-corpus", folder)["text"] == ["a long text", "another text", "no"]
    assert load_corpus("bio-forget-corpus", folder, 2)["text"] == ["a long text", "another text"]
    assert load_corpus("bio-forget-corpus", folder, 0, 1)["text"] == ["a long text"]
    with pytest.raises(ValueError, match="no text of over 50 characters"):
        load_corpus("bio-forget-corpus", folder, 50)
    (tmp_path / "wikitext.jsonl").write_text('"a"\nb\n', encoding="utf-8")
    with pytest.raises(ValueError, match="wikitext.jsonl', line 2, is no JSON"):
        load_corpus("wikitext", folder)
    (tmp_path / "wikitext.jsonl").write_text('{"title": "a"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"lacks the columns \['text'\]"):
        load_corpus("wikitext", folder)


def test_topics_take_turns():
    """Would catch a step of two topics, an order that is not RMU's, and a topic that comes alone at the end."""
    topics = [texts(*"abcde"), texts(*"vwxyz12")]
    assert "".join(in_turns(topics, 2)["text"]) == "abvwcdxy"
    assert "".join(in_turns(topics, 1)["text"]) == "avbwcxdyez"
    with pytest.raises(ValueError, match="takes 6 rows"):
        in_turns(topics, 6)


def test_the_trainer_keeps_the_turns(tmp_path):
    """Would catch a sampler that shuffles although it is told not to: every step would see both topics."""
    topics = [texts(*[f"who is {name} ?"] * 4) for name in ("Mara", "Bo")]
    tokenizer = toy_tokenizer(TOKENIZER_TEXTS)
    config = scene_config(tmp_path, per_device_train_batch_size=2, train_sampling_strategy="sequential")
    trainer = UnlearnTrainer(scene_model(), config, recipe.ordered(topics, config), texts("where ?"), tokenizer)
    asked = []
    for batch in trainer.get_train_dataloader():
        words = tokenizer.batch_decode(batch["input_ids"])
        asked.append([name for name in ("Mara", "Bo") if any(f"is {name}" in text for text in words)])
    assert asked == [["Mara"], ["Bo"], ["Mara"], ["Bo"]]
    shuffled = scene_config(tmp_path, per_device_train_batch_size=2)
    assert len(recipe.ordered(topics, shuffled)) == 8
