"""Columns beside the tokens or the text: each is honoured as a Hugging Face collator would, or refused by name."""

import logging

import pytest
from datasets import Dataset
from scenes import scene_tokenizer

from soul_trainer.formats import prepare


IDS = [5, 6, 7, 8]
LAST_TWO = [-100, -100, 7, 8]
HONOURED = {
    "right padding": ({"labels": IDS, "attention_mask": [1, 1, 1, 0]}, IDS[:3], IDS[:3]),
    "left padding": ({"labels": LAST_TWO, "attention_mask": [0, 1, 1, 1]}, IDS[1:], LAST_TWO[1:]),
    "tokens alone": ({}, IDS, IDS),
    "tokens and mask": ({"attention_mask": [0, 1, 1, 0]}, IDS[1:3], IDS[1:3]),
    "completion": ({"completion_mask": [0, 0, 1, 1]}, IDS, LAST_TWO),
    "assistant": ({"assistant_masks": [0, 0, 1, 1]}, IDS, LAST_TWO),
    "both masks": ({"assistant_masks": [0, 1, 1, 1], "completion_mask": [0, 0, 1, 1]}, IDS, LAST_TWO),
    "agreeing": ({"labels": LAST_TWO, "completion_mask": [0, 0, 1, 1]}, IDS, LAST_TWO),
    "positions": ({"position_ids": [0, 0, 1, 2], "attention_mask": [0, 1, 1, 1]}, IDS[1:], IDS[1:]),
    "one sequence": ({"labels": IDS, "seq_lengths": [4]}, IDS, IDS),
    "types": ({"labels": IDS, "token_type_ids": [0, 0, 0, 0]}, IDS, IDS),
    "a source": ({"labels": IDS, "source": "book"}, IDS, IDS),
    "a row column": ({"labels": IDS, "row": 3, "attention_mask": [1, 1, 1, 0]}, IDS[:3], IDS[:3]),
}
REFUSED = {
    "hole": ({"labels": IDS, "attention_mask": [1, 0, 1, 1]}, "Row 0 of `forget`: `attention_mask` must be 1"),
    "all masked": ({"labels": IDS, "attention_mask": [0] * 4}, "`attention_mask` is 0 everywhere"),
    "short mask": ({"labels": IDS, "attention_mask": [1]}, "4 `input_ids` but 1 `attention_mask`"),
    "disagreeing": ({"labels": IDS, "completion_mask": [0, 0, 1, 1]}, "`completion_mask` disagree at token 1"),
    "packed positions": ({"labels": IDS, "position_ids": [0, 1, 0, 1]}, "`position_ids` do not count from 0"),
    "packed lengths": ({"labels": IDS, "seq_lengths": [2, 2]}, "`seq_lengths` is"),
    "types": ({"labels": IDS, "token_type_ids": [0, 0, 1, 1]}, "`token_type_ids` are not all 0"),
    "embeddings": ({"labels": IDS, "inputs_embeds": [[0.5]]}, "inputs_embeds"),
    "pixels": ({"labels": IDS, "pixel_values": [[0.5]]}, "pixel_values"),
    "sound": ({"labels": IDS, "input_features": [[0.5]]}, "input_features"),
    "no label": ({"completion_mask": [0] * 4}, "no label after the first token"),
}


@pytest.mark.parametrize("case", HONOURED)
def test_columns_of_tokenized_rows_are_honoured(case):
    """Would catch padding that is trained on, and masks of TRL's that are dropped."""
    columns, ids, labels = HONOURED[case]
    rows = prepare([{"input_ids": IDS, **columns}], scene_tokenizer(), name="forget")
    assert rows[:] == {"input_ids": [ids], "labels": [labels], "row": [0]}


@pytest.mark.parametrize("case", REFUSED)
def test_columns_of_tokenized_rows_that_cannot_be_honoured_are_refused(case):
    """Would catch a packed row read as one text, and a picture that is dropped."""
    columns, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        prepare([{"input_ids": IDS, **columns}], scene_tokenizer(), name="forget")


@pytest.mark.parametrize(
    "column, value",
    [("chat_template_kwargs", {"enable_thinking": False}), ("images", ["a.png"]), ("image", "a"), ("videos", ["a"])],
)
def test_columns_of_text_rows_that_change_the_prompt_are_refused(column, value):
    """Would catch a picture, or a switch of the chat template, that is dropped; a row without a value is taken."""
    rows = Dataset.from_list([{"text": "one two", column: None}, {"text": "three", column: value}])
    with pytest.raises(ValueError, match=f"Row 1 of `forget` has a value in `{column}`"):
        prepare(rows, scene_tokenizer(), name="forget")
    assert len(prepare(rows.select([0]), scene_tokenizer(), name="forget")) == 1


def test_columns_that_sound_like_a_prompt_are_named(caplog, monkeypatch):
    """Would catch a `context` that the user takes for part of the prompt, and a warning about ids and sources."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("soul_trainer"), "propagate", True)
    row = {"question": "one?", "answer": "two", "context": "three", "source": "a", "perturbed_answer": ["b"]}
    prepare([row], scene_tokenizer(), name="forget")
    assert "`forget` has ['context'], which are not read" in caplog.text


def test_a_dataset_with_a_format_is_read_alike():
    """Would catch a mask of tensors, whose ones and zeros no set knows."""
    rows = Dataset.from_list([{"input_ids": IDS, "labels": IDS, "attention_mask": [1, 1, 1, 0]}]).with_format("torch")
    assert prepare(rows, scene_tokenizer())[:] == {"input_ids": [IDS[:3]], "labels": [IDS[:3]], "row": [0]}
