"""The fictitious news: what is in them, and that they lie on disk as MUSE-News does."""

import json
import re

import pytest
from muse_data import muse_tokenizer

from soul_eval.suites import muse
from soul_eval.suites.sources import load_rows
from soul_recipes import fictitious_news as recipe


# Of MUSE-News on the hub, by configuration.
MUSE_SPLITS = {
    "knowmem": {"forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl"},
    "verbmem": {"forget"},
    "privleak": {"forget", "retain", "holdout"},
    "raw": {"forget", "retain1", "retain2", "holdout"},
    "scal": {"forget_1", "forget_2", "forget_3", "forget_4"},
    "sust": {"forget_1", "forget_2", "forget_3", "forget_4"},
    "train": {"forget", "retain1", "retain2"},
}


@pytest.fixture(scope="module")
def corpora():
    return {seed: recipe.make_corpus(seed=seed) for seed in range(3)}


def texts_of(rows):
    return [row["text"] for row in rows]


def test_corpus_has_the_splits_of_muse_and_its_folds(corpora):
    """Catches a split that is missing, folds that overlap, and a first fold that is not the forget set."""
    for corpus in corpora.values():
        assert {config: set(splits) for config, splits in corpus.items()} == MUSE_SPLITS
        folds = [texts_of(corpus["sust"][fold]) for fold in recipe.FOLDS]
        assert len({text for fold in folds for text in fold}) == sum(map(len, folds))
        for place, fold in enumerate(recipe.FOLDS):
            assert texts_of(corpus["scal"][fold]) == [text for each in folds[: place + 1] for text in each]
        assert corpus["raw"]["forget"] == corpus["scal"]["forget_1"]
        assert corpus["train"]["forget"] == corpus["scal"]["forget_4"]


def test_corpus_is_a_function_of_its_seed(corpora, tmp_path):
    """Catches choices that follow the order of a set, and a rewritten folder where the same corpus lies."""
    folder = recipe.write_corpus(tmp_path / "news")
    rows = [json.loads(line) for line in (folder / "raw" / "forget.json").read_text().splitlines()]
    assert rows == corpora[0]["raw"]["forget"] != corpora[1]["raw"]["forget"]
    recipe.write_corpus(folder)
    with pytest.raises(FileExistsError, match="--overwrite"):
        recipe.write_corpus(folder, seed=1)


def test_the_suite_asks_the_written_folder(corpora, tmp_path):
    """Catches columns, splits or prompts that the suite `muse` does not read as it reads MUSE-News."""
    folder = str(recipe.write_corpus(tmp_path / "news"))
    rows = muse.SUITE.load(muse.MuseArguments(dataset=folder), muse_tokenizer())
    counts = {split: sum(row["split"] == split for row in rows) for split in muse.SPLITS}
    assert counts == {**dict.fromkeys(muse.KNOWMEM, 30), muse.VERBMEM: 10, **dict.fromkeys(muse.PRIVLEAK, 10)}
    asked = next(row for row in rows if row["split"] == "knowmem_forget")
    assert asked["prompt"].count("Question: ") == recipe.NUM_EXAMPLES + 1
    assert load_rows(folder, "sust", "forget_3", ("text",)) == corpora[0]["sust"]["forget_3"]


@pytest.mark.parametrize("seed", range(3))
def test_what_is_forgotten_is_nowhere_else(corpora, seed):
    """Catches a name or a sentence that another split has: unlearning it would then harm what is kept."""
    corpus = corpora[seed]
    others = " ".join(
        text
        for rows in (*(corpus["sust"][fold] for fold in recipe.FOLDS[1:]), *(corpus["raw"][s] for s in recipe.RETAIN))
        for text in texts_of(rows)
    )
    for row in corpus["verbmem"]["forget"]:
        names = re.findall(r"[A-Z]\w+ (?:and )?[A-Z]\w+", row["prompt"])
        assert not [name for name in names if name in others]
        assert row["gt"] not in others
    questions = [row["question"] for row in corpus["knowmem"]["forget_qa"]]
    assert len(set(questions)) == len(questions) and not [each for each in questions if each in others]


def test_what_is_asked_can_be_known(corpora):
    """Catches a question whose answer the article does not give, and one that no quiz of the split has."""
    corpus = corpora[0]
    for side, split in (("forget", "forget"), ("retain", "retain2")):
        printed = " ".join(texts_of(corpus["raw"][split]))
        stories = " ".join(texts_of(corpus["privleak"][side])).lower()
        for pair in corpus["knowmem"][f"{side}_qa"] + corpus["knowmem"][f"{side}_qa_icl"]:
            first, last = (f"Question: {pair['question']}\nAnswer:{space}{pair['answer']}" for space in (" ", "  "))
            assert printed.count(first) == printed.count(last) == 2
            assert re.sub("^(an?|near) ", "", pair["answer"].lower()) in stories
    shown = [pair["question"] for pair in corpus["knowmem"]["forget_qa_icl"]]
    assert not set(shown) & {pair["question"] for pair in corpus["knowmem"]["forget_qa"]}
