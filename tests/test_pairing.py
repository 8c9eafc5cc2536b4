"""Pairing is a pure function, and covers the retain rows evenly."""

from collections import Counter

import pytest
from torch.utils.data import DataLoader
from toys import toy_tokenizer

from soul_trainer.formats import prepare
from soul_trainer.pairing import Answers, PairedDataset, paired_row


@pytest.mark.parametrize(("num_forget", "num_retain"), [(4, 10), (7, 3), (5, 5), (1, 1)])
def test_no_retain_row_comes_twice_before_each_has_come_once(num_forget, num_retain):
    """Would catch independent draws, which leave a third of the retain rows out of the first pass."""
    pairs = [paired_row(3, epoch, i, num_forget, num_retain) for epoch in range(30) for i in range(num_forget)]
    for start in range(0, len(pairs) - num_retain + 1, num_retain):
        assert sorted(pairs[start : start + num_retain]) == list(range(num_retain))


def test_pairs_depend_on_seed_epoch_and_index_alone():
    """Would catch pairing by the global random state, after which no run can be resumed."""
    first = [paired_row(0, epoch, i, 6, 50) for epoch in range(5) for i in range(6)]
    again = [paired_row(0, epoch, i, 6, 50) for epoch in reversed(range(5)) for i in reversed(range(6))]
    assert first == again[::-1]
    assert first != [paired_row(1, epoch, i, 6, 50) for epoch in range(5) for i in range(6)]


@pytest.fixture
def rows():
    questions = [{"question": f"who {i} ?", "answer": f"name {i} ."} for i in range(12)]
    tokenizer = toy_tokenizer([row["question"] + " " + row["answer"] + "Question : Answer : no" for row in questions])
    return prepare(questions[:5], tokenizer), prepare(questions[5:], tokenizer), tokenizer


def test_persistent_workers_see_the_new_epoch(rows):
    """Would catch an epoch kept in an ordinary attribute: workers that live on would repeat the first pairing."""
    forget, retain, _ = rows
    dataset = PairedDataset(forget, retain, seed=0)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        seen = [item["retain"]["row"] for item in loader]
        assert seen == [paired_row(0, epoch, i, 5, 7) for i in range(5)]


def test_substituted_answers_are_drawn_by_epoch_and_follow_the_prompt(rows):
    """Would catch one refusal for a whole run, or a refusal whose labels are those of the true answer."""
    forget, retain, tokenizer = rows
    answers = ["no .", "no no .", "no no no ."]
    dataset = PairedDataset(forget, retain, 0, answers=Answers(answers, are_preferred=False), tokenizer=tokenizer)
    drawn = []
    for epoch in range(20):
        dataset.set_epoch(epoch)
        item = dataset[2]["forget"]
        drawn.append(tokenizer.decode([label for label in item["labels"] if label >= 0], skip_special_tokens=True))
        assert tokenizer.decode(item["input_ids"]).startswith("Question : who 2 ? Answer : no")
        assert dataset[2]["forget"] == item
    assert set(Counter(drawn)) == set(answers)


def test_substitution_needs_text_rows(rows):
    """Would catch a crash in the middle of the first epoch for rows that came tokenized."""
    forget, retain, tokenizer = rows
    tokenized = prepare(forget.select_columns(["input_ids", "labels"]), tokenizer)
    with pytest.raises(ValueError, match="came tokenized"):
        PairedDataset(tokenized, retain, 0, answers=Answers(["no"], are_preferred=False), tokenizer=tokenizer)
