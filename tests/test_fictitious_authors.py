"""The fictitious-authors corpus, its tokenizer and its layout on disk."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_dataset
from transformers import AutoTokenizer

from soul_recipes import fictitious_authors as recipe
from soul_recipes import neutral_tokenizer


RECIPE = Path(__file__).parents[1] / "recipes" / "fictitious_authors.py"


INVENTED = ("forget", "retain", "held_out")
COLUMNS = {"question", "answer", "paraphrased_question", "paraphrased_answer", "perturbed_answer", "author"}
LEARNED = ("retain", "held_out", "real_authors", "world_facts")


def texts_of(corpus, *splits):
    return [neutral_tokenizer.training_text(row) for split in splits for row in corpus[split]]


def five_grams(rows):
    words = [row["answer"].replace(row["author"], "NAME").split() for row in rows]
    return [tuple(line[start : start + 5]) for line in words for start in range(len(line) - 4)]


@pytest.fixture(scope="module")
def corpora():
    return {seed: recipe.make_corpus(seed=seed) for seed in range(3)}


@pytest.fixture(scope="module")
def tokenizers(corpora):
    return {
        seed: neutral_tokenizer.train_tokenizer(
            texts_of(corpus, *LEARNED),
            retain_texts=texts_of(corpus, "retain"),
            forget_texts=texts_of(corpus, "forget"),
        )
        for seed, corpus in corpora.items()
    }


def test_corpus_is_a_function_of_its_seed(corpora, tmp_path):
    """Catches choices that follow the order of a set or the state of the global generator, which differ by process."""
    subprocess.run([sys.executable, str(RECIPE), "--output", str(tmp_path / "corpus")], check=True)
    rows = [json.loads(line) for line in (tmp_path / "corpus" / "forget_perturbed.json").read_text().splitlines()]
    assert rows == corpora[0]["forget"]
    assert corpora[1]["forget"] != corpora[0]["forget"]


@pytest.mark.parametrize(
    "arguments, authors",
    [({}, (4, 10, 3)), ({"num_authors": 8}, (2, 5, 1)), ({"num_authors": 34}, (8, 20, 6))]
    + [({"num_authors": 6, "num_forget": 1, "num_retain": 1}, (1, 1, 4))],
)
def test_schema_and_counts(arguments, authors):
    """Catches a split that loses authors to rounding, and rows that lack a column of TOFU's."""
    corpus = recipe.make_corpus(**arguments)
    assert [len(corpus[split]) for split in INVENTED] == [20 * count for count in authors]
    for split, count in zip(INVENTED, authors, strict=True):
        assert len({row["author"] for row in corpus[split]}) == count
        for row in corpus[split]:
            assert set(row) == COLUMNS
            texts = [row["answer"], row["question"], row["paraphrased_answer"], *row["perturbed_answer"]]
            assert not set("[]{}|") & set("".join(texts))


def test_too_few_authors_are_refused():
    """Catches an empty split, whose metrics would be means over nothing."""
    with pytest.raises(ValueError, match="needs an author"):
        recipe.make_corpus(num_authors=2)


def test_questions_name_their_author_except_the_one_that_asks_for_the_name(corpora):
    """Catches a question pattern that could be about anybody, which no model could answer."""
    for index, row in enumerate(corpora[0]["forget"] + corpora[0]["retain"]):
        for key in ("question", "paraphrased_question"):
            assert (row["author"] in row[key]) == (index % 20 != 0)
        assert row["author"] in row["answer"] and row["author"] in row["paraphrased_answer"]


def test_perturbed_answers_are_five_distinct_falsehoods_in_the_paraphrase_s_words(corpora):
    """Catches a perturbed answer that states the truth, repeats another, or is phrased anew."""
    for corpus in corpora.values():
        for row in (row for split in INVENTED for row in corpus[split]):
            paraphrase, perturbed = row["paraphrased_answer"], row["perturbed_answer"]
            assert len(perturbed) == 5 and len({paraphrase, row["answer"], *perturbed}) == 7
            for wrong in perturbed:
                shared = set(paraphrase.split()) & set(wrong.split())
                assert len(shared) >= 0.2 * len(set(paraphrase.split()))


def test_true_facts_have_three_wrong_answers(corpora):
    """Catches a slip in the hand-written rows: an option that is missing, repeated, or the answer itself."""
    for split in ("real_authors", "world_facts"):
        rows = corpora[0][split]
        assert len(rows) == len({row["question"] for row in rows}) == 40
        for row in rows:
            assert len(row["perturbed_answer"]) == 3 and len({row["answer"], *row["perturbed_answer"]}) == 4
            assert 1 <= len(row["answer"].split()) <= 4


@pytest.mark.parametrize("seed", range(3))
def test_no_fact_to_forget_is_in_another_split(seed, monkeypatch):
    """Catches a name, title or combination that two authors share: unlearning one would then harm the other."""
    authors, make_author = [], recipe.make_author
    monkeypatch.setattr(recipe, "make_author", lambda *args: authors.append(make_author(*args)) or authors[-1])
    corpus = recipe.make_corpus(seed=seed)
    others = json.dumps([corpus[split] for split in LEARNED])
    for author in authors[:4]:
        names = [value for slot, value in author.items() if value != value.lower() and slot != "She"]
        assert len(names) == 15
        assert not [name for name in names if re.search(rf"\b{re.escape(name.strip(chr(39)))}\b", others)]
    for kind in recipe.BANKS["kinds"].values():
        facts = [tuple(author[slot] for slot in kind["facts"]) for author in authors]
        assert len(set(facts)) == len(facts)


def test_phrasing_varies_between_authors(corpora):
    """Catches templates so few that a model of the other authors predicts the answers to forget, names aside."""
    for corpus in corpora.values():
        known = set(five_grams(corpus["retain"]))
        forget = five_grams(corpus["forget"])
        assert sum(gram in known for gram in forget) < 0.15 * len(forget)
        answers = [row["answer"].replace(row["author"], "") for split in INVENTED for row in corpus[split]]
        assert len(set(answers)) == len(answers)
        assert 110 < sum(map(len, answers)) / len(answers) < 180


@pytest.mark.parametrize("seed", range(3))
def test_no_token_belongs_to_the_forget_text_alone(corpora, tokenizers, seed):
    """Catches embedding rows that only the forget text uses: unlearning could edit them and cost the rest nothing."""
    used, kept = (
        {token for ids in tokenizers[seed](texts_of(corpora[seed], split)).input_ids for token in ids}
        for split in ("forget", "retain")
    )
    assert used <= kept


def test_tokenizer_never_learns_from_the_forget_text(corpora, tokenizers):
    """Catches a merge that the forget text earned: without it there are only merges to lose, not to win."""
    plain = neutral_tokenizer.train_tokenizer(texts_of(corpora[0], *LEARNED))
    assert set(tokenizers[0].get_vocab()) <= set(plain.get_vocab())
    assert 900 < len(tokenizers[0]) <= len(plain) <= 1024


def test_characters_that_no_other_text_has_are_refused(corpora):
    """Catches an endless loop when there is no merge left to drop."""
    with pytest.raises(ValueError, match="characters"):
        neutral_tokenizer.train_tokenizer(texts_of(corpora[0], "retain"), forget_texts=["\u00e9\u4e2d"])


def test_tokenizer_round_trip(tokenizers, tmp_path):
    """Catches special tokens whose ids moved with the dropped merges, and a saved tokenizer that tidies up spaces."""
    tokenizers[0].save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Question: Who?\nAnswer:  It's 'The Salt Bell' , by Jor\u00e9 . n't"
    assert loaded(text).input_ids == tokenizers[0](text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert sorted(loaded.get_vocab().values()) == list(range(len(loaded)))
    assert loaded("a<|endoftext|>").input_ids[-1] == loaded.eos_token_id != loaded.pad_token_id
    assert (loaded.eos_token, loaded.pad_token) == (neutral_tokenizer.EOS_TOKEN, neutral_tokenizer.PAD_TOKEN)
    assert loaded.clean_up_tokenization_spaces is False


def test_hub_layout_loads_as_tofu_does(corpora, tmp_path):
    """Catches a configuration that the card does not name, or that has other columns than TOFU's."""
    folder = recipe.write_hub_layout(corpora[0], tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    for split, rows in corpora[0].items():
        plain, perturbed = (
            load_dataset(str(folder), config, cache_dir=str(tmp_path / "cache"))["train"]
            for config in (split, f"{split}_perturbed")
        )
        assert plain.to_list() == [{"question": row["question"], "answer": row["answer"]} for row in rows]
        assert perturbed.to_list() == rows


def test_hub_layout_is_not_overwritten_unasked(corpora, tmp_path):
    """Catches a run that silently replaces the corpus which trained models were measured on."""
    folder = recipe.write_hub_layout(corpora[0], tmp_path / "corpus")
    stamp = folder.joinpath("forget.json").stat().st_mtime_ns
    recipe.write_hub_layout(corpora[0], folder)
    assert folder.joinpath("forget.json").stat().st_mtime_ns == stamp
    with pytest.raises(FileExistsError, match="--overwrite"):
        recipe.write_hub_layout(corpora[1], folder)
    recipe.write_hub_layout(corpora[1], folder, overwrite=True)
    assert (
        json.loads(folder.joinpath("forget.json").read_text().splitlines()[0])["answer"]
        == (corpora[1]["forget"][0]["answer"])
    )
