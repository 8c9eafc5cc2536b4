"""Long texts cut into rows of tokens."""

import pytest
from muse_data import muse_tokenizer
from toys import toy_tokenizer

from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.chunks import chunk_texts, text_start
from soul_trainer.formats import prepare


WORDS = "one two three four five six seven eight nine ten eleven"
TEXTS = [WORDS, "two four six", "eleven"]


@pytest.fixture(scope="module")
def plain():
    return toy_tokenizer(TEXTS)


@pytest.fixture(scope="module")
def started():
    """A tokenizer that begins every text with a token."""
    return muse_tokenizer()


def counted(rows):
    """The tokens that have a loss, in order."""
    return [label for row in rows for label in row["labels"] if label != IGNORE_INDEX]


def plain_ids(tokenizer, texts):
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("max_length", [2, 3, 4, 7, 64])
@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize("name", ["plain", "started"])
def test_every_token_counts_once_and_stands_after_its_own_past(name, overlap, max_length, request):
    """
    Would catch a last chunk that is dropped or filled up, an overlap that counts twice, a start that takes the room of
    a token, and a chunk whose context is not what came before.
    """
    tokenizer = request.getfixturevalue(name)
    start = text_start(tokenizer)
    if overlap >= max_length - len(start):
        with pytest.raises(ValueError, match="`overlap`"):
            chunk_texts(TEXTS, tokenizer, max_length, overlap)
        return
    rows = chunk_texts(TEXTS, tokenizer, max_length, overlap).to_list()
    expected = [ids + [tokenizer.eos_token_id] for ids in plain_ids(tokenizer, TEXTS)]
    assert counted(rows) == [token for ids in expected for token in ids]
    everything, done = [token for ids in expected for token in ids], 0
    for row in rows:
        assert 2 <= len(row["input_ids"]) == len(row["labels"]) <= max_length
        assert row["input_ids"][: len(start)] == start
        body, new = row["input_ids"][len(start) :], sum(label != IGNORE_INDEX for label in row["labels"])
        assert new and body == everything[done + new - len(body) : done + new]
        # At least one label has a token before it.
        assert any(label != IGNORE_INDEX for label in row["labels"][1:])
        done += new


def test_overlap_lets_something_predict_every_token_but_the_first(plain):
    """Would catch context without which the first token of a chunk has no loss, though a label says so."""
    rows = chunk_texts([WORDS], plain, 4, overlap=1).to_list()
    assert [row["labels"][0] == IGNORE_INDEX for row in rows] == [False] + [True] * (len(rows) - 1)
    assert sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:]) == len(WORDS.split())


def test_joined_texts_are_cut_as_muse_cuts_them(started):
    """Would catch chunks that end with a document, an end of sequence between, and tokens made text by text."""
    texts = ["Ada painted the old map.", "Bo lost a boat."]
    (ids,) = plain_ids(started, ["\n\n".join(texts)])
    rows = chunk_texts(texts, started, 6, separator="\n\n").to_list()
    assert [row["input_ids"] for row in rows] == [
        [started.bos_token_id] + ids[begin : begin + 5] for begin in range(0, len(ids), 5)
    ]
    assert started.eos_token_id not in counted(rows)


def test_chunks_are_rows_that_training_takes(plain):
    """Would catch columns that `prepare` refuses, and a chunk longer than it is told."""
    prepared = prepare(chunk_texts(TEXTS, plain, 4), plain, 4)
    assert prepared[1]["row"] == 1 and len(prepared) == 3 + 1 + 1
    with pytest.raises(ValueError, match="longest row may have 3"):
        prepare(chunk_texts(TEXTS, plain, 4), plain, 3)


def test_what_cannot_be_cut_is_refused(plain):
    """Would catch an empty text that becomes an empty row, and a length that leaves no room, both far from here."""
    with pytest.raises(ValueError, match="`texts` is empty"):
        chunk_texts([], plain, 4)
    with pytest.raises(ValueError, match="Row 1 of `texts`"):
        chunk_texts(["one", " "], plain, 4)
    with pytest.raises(ValueError, match="`max_length`=1"):
        chunk_texts(TEXTS, plain, 1)
    with pytest.raises(ValueError, match="Row 0 of `texts` is a single token"):
        chunk_texts(["one"], plain, 4, separator="\n")
    endless = toy_tokenizer(TEXTS)
    endless.eos_token = None
    with pytest.raises(ValueError, match="no `eos_token`"):
        chunk_texts(TEXTS, endless, 4)
