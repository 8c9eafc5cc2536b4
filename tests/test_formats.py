"""Rows to tokens: prompts never carry a loss, answers always do, and bad rows are named."""

import logging

import pytest
from datasets import Dataset
from toys import toy_tokenizer

from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.formats import encode, prepare, render


TEXTS = ["Question : Answer : who wrote it ? Mara did . Bo user assistant", "### plain text here"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


@pytest.fixture
def tokenizer():
    return toy_tokenizer(TEXTS)


def decoded_answer(tokenizer, encoded: dict) -> str:
    return tokenizer.decode([token for token in encoded["labels"] if token != IGNORE_INDEX])


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "who wrote it ?", "answer": "Mara did ."}, "Mara did . </s>"),
        ({"prompt": "who wrote it ?", "completion": " Mara did ."}, "Mara did . </s>"),
        ({"text": "plain text here"}, "plain text here </s>"),
    ],
)
def test_loss_is_on_the_answer_and_its_end_alone(tokenizer, row, answer):
    """Would catch a loss on prompt tokens, or an end of sequence that is never learnt."""
    encoded = encode(tokenizer, render(row, tokenizer))
    assert decoded_answer(tokenizer, encoded) == answer
    assert len(encoded["labels"]) == len(encoded["input_ids"])


def test_chat_rows_go_through_the_template_with_a_loss_on_the_last_turn(tokenizer):
    """Would catch a loss on the user's turn, doubled special tokens, or an earlier answer taken for the last."""
    tokenizer.chat_template = CHAT_TEMPLATE
    messages = [
        {"role": "user", "content": "who ?"},
        {"role": "assistant", "content": "Bo"},
        {"role": "user", "content": "who wrote it ?"},
        {"role": "assistant", "content": "Mara did ."},
    ]
    example = render({"messages": messages}, tokenizer)
    assert example.prompt.endswith("user : who wrote it ? </s> assistant : ")
    assert example.content == "Mara did ."
    encoded = encode(tokenizer, example)
    assert decoded_answer(tokenizer, encoded).split()[:3] == ["Mara", "did", "."]
    assert encoded["input_ids"].count(tokenizer.eos_token_id) == 4


def test_question_rows_use_the_chat_template_unless_told_otherwise(tokenizer):
    """Would catch evaluation in another format than training: a chat model asked without its template."""
    tokenizer.chat_template = CHAT_TEMPLATE
    row = {"question": "who wrote it ?", "answer": "Mara did ."}
    assert render(row, tokenizer).is_chat
    plain = render(row, tokenizer, "### {question} : {answer}")
    assert (plain.prompt, plain.answer, plain.is_chat) == ("### who wrote it ? :", " Mara did .", False)


def test_braces_in_a_question_are_text(tokenizer):
    """Would catch `str.format` on user text, which dies or leaks on braces."""
    row = {"question": "what is {answer} in {0} ?", "answer": "{question}"}
    example = render(row, tokenizer, "Q {question} A {answer}")
    assert (example.prompt, example.answer) == ("Q what is {answer} in {0} ? A", " {question}")


def test_another_answer_keeps_the_white_space_and_the_end_of_turn(tokenizer):
    """Would catch refusals without the end of turn, after which a chat model rambles on."""
    tokenizer.chat_template = CHAT_TEMPLATE
    example = render({"question": "who ?", "answer": "Mara"}, tokenizer).with_content("Bo")
    assert example.answer == "Bo </s>"


@pytest.mark.parametrize("template", ["{question}", "{question} {answer} end", "{answer}"])
def test_a_template_needs_both_placeholders(tokenizer, template):
    """Would catch prompts that leave the question out, or text after the answer that gets no label."""
    with pytest.raises(ValueError, match="prompt_template"):
        render({"question": "who ?", "answer": "Mara"}, tokenizer, template)


def test_an_answer_that_is_empty_or_cut_away_names_its_row(tokenizer):
    """Would catch rows without any label, whose loss is 0 / 0."""
    good = {"question": "who ?", "answer": "Mara"}
    with pytest.raises(ValueError, match="Row 1 of `forget_dataset`.*empty"):
        prepare([good, {"question": "who ?", "answer": "  "}], tokenizer, name="forget_dataset")
    with pytest.raises(ValueError, match="Row 1 of `forget_dataset`.*max_length.*=8"):
        prepare([good, {"question": "who wrote it ? " * 4, "answer": "Mara"}], tokenizer, 8, name="forget_dataset")


def test_empty_sets_and_missing_columns_are_named(tokenizer):
    """Would catch a division by zero rows, or a KeyError from within a worker."""
    with pytest.raises(ValueError, match="`retain_dataset` is empty"):
        prepare([], tokenizer, name="retain_dataset")
    with pytest.raises(ValueError, match=r"`retain_dataset` needs the columns.*\['question', 'reply'\]"):
        prepare([{"question": "who ?", "reply": "Mara"}], tokenizer, name="retain_dataset")


def test_tokenized_rows_are_taken_as_they_are(tokenizer):
    """Would catch a second tokenization, or rows whose number is lost."""
    rows = Dataset.from_list([{"input_ids": [5, 6], "labels": [IGNORE_INDEX, 6], "note": "x"}] * 3)
    prepared = prepare(rows, tokenizer)
    assert prepared["row"][:] == [0, 1, 2]
    assert prepared[2]["input_ids"] == [5, 6]


def test_cut_answers_are_counted(tokenizer, caplog):
    """Would catch silently shortened answers, whose ends are then never unlearnt."""
    with caplog.at_level(logging.WARNING):
        prepare([{"question": "who ?", "answer": "Mara did . " * 5}], tokenizer, 10, name="forget_dataset")
    assert "1 answers of `forget_dataset` are cut off" in caplog.text
