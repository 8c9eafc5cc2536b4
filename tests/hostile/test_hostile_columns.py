"""Columns beside the tokens or the text: each is honoured as a Hugging Face collator would, or refused by name."""

import logging

import pytest
from datasets import Dataset
from scenes import scene_model, scene_tokenizer
from transformers import Trainer, TrainingArguments

from soul_eval.suites import own
from soul_trainer import HessianCallback
from soul_trainer.formats import prepare, render
from soul_trainer.tokenized import read_tokenized


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
    "a picture's name": ({"labels": IDS, "image_id": 7, "video_title": "a", "audio_url": None}, IDS, IDS),
    "no picture": ({"labels": IDS, "pixel_values": None}, IDS, IDS),
    "booleans": ({"completion_mask": [False, False, True, True]}, IDS, LAST_TWO),
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
    "no labels": ({"labels": [-100] * 4}, "no label after the first token"),
    "label of none": ({"labels": [-100, -1, 7, 8]}, "Row 0 of `forget`: the label -1 is no token"),
    "label below": ({"labels": [-101, 6, 7, 8]}, "the label -101 is no token; what has no loss is labelled -100"),
    "short labels": ({"labels": [5]}, "4 `input_ids` but 1 `labels`"),
    "null labels": ({"labels": None}, "4 `input_ids` but no `labels`"),
    "short completion": ({"completion_mask": [1]}, "4 `input_ids` but 1 `completion_mask`"),
    "weights": ({"completion_mask": [0, 0, 1, 2]}, "`completion_mask` must hold 0 and 1, but it holds .2"),
    "negative mask": ({"labels": IDS, "attention_mask": [1, 1, 1, -1]}, "`attention_mask` must be 1"),
    "positions from 1": ({"labels": IDS, "position_ids": [1, 2, 3, 4]}, "`position_ids` do not count from 0"),
    "negative positions": ({"labels": IDS, "position_ids": [-1, 0, 1, 2]}, "`position_ids` do not count from 0"),
    "cumulative lengths": ({"labels": IDS, "cu_seq_lens_q": [0, 4]}, "a value in `cu_seq_lens_q`"),
    "shifted": ({"labels": IDS, "shift_labels": IDS}, "a value in `shift_labels`"),
    "decoder": ({"labels": IDS, "decoder_input_ids": IDS}, "a value in `decoder_input_ids`"),
    **{
        name: ({"labels": IDS, name: [[0.5]]}, f"Row 0 of `forget` has a value in `{name}`")
        for name in ("image_grid_thw", "pixel_values_videos", "audio_features", "video_grid_thw", "image_sizes")
    },
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


def test_the_row_with_a_picture_is_named():
    """Would catch an error that always accuses the first row."""
    rows = [{"input_ids": IDS, "labels": IDS, "pixel_values": value} for value in (None, None, [0.5])]
    with pytest.raises(ValueError, match="Row 2 of `forget` has a value in `pixel_values`"):
        prepare(rows, scene_tokenizer(), name="forget")


OF_TEXT = [
    ("images", ["a.png"]),
    ("image", "a"),
    ("videos", ["a"]),
    ("audio", {"path": "a"}),
    ("input_features", [0.5]),
]
OF_TEXT += [("pixel_values", [[0.5]]), ("image_grid_thw", [1, 2, 3]), ("audio_values", [0.5]), ("images", [])]


@pytest.mark.parametrize("kind", ["text", "question", "prompt", "messages"])
@pytest.mark.parametrize("column, value", OF_TEXT)
def test_columns_of_text_rows_that_change_the_prompt_are_refused(kind, column, value):
    """Would catch a picture that is dropped; a row without a value is taken."""
    row = {
        "text": {"text": "one two"},
        "question": {"question": "one?", "answer": "two"},
        "prompt": {"prompt": "one", "completion": "two"},
        "messages": {"messages": [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]},
    }[kind]
    tokenizer = scene_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = Dataset.from_list([{**row, column: None, "image_id": 3}, {**row, column: value, "image_id": 4}])
    with pytest.raises(ValueError, match=f"Row 1 of `forget` has a value in `{column}`"):
        prepare(rows, tokenizer, name="forget")
    assert len(prepare(rows.select([0]), tokenizer, name="forget")) == 1


TEMPLATE = (
    "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}"
    "{% if enable_thinking is defined and not enable_thinking %}quiet {% endif %}{% endif %}"
)
# As current templates do: a switch changes what stands before the answer.
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' and enable_thinking is defined and not enable_thinking %}"
    "quiet {% endif %}{{ m.content }} {% endfor %}"
)


@pytest.mark.parametrize("options", [{"enable_thinking": False}, '{"enable_thinking": false}'])
@pytest.mark.parametrize("kind", ["messages", "prompt", "question"])
def test_a_switch_of_the_chat_template_is_honoured(kind, options):
    """Would catch a prompt that is trained on, or asked, in another mode than the row says."""
    tokenizer = scene_tokenizer()
    tokenizer.chat_template = THINKING
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]
    row = {
        "messages": {"messages": turns},
        "prompt": {"prompt": turns[:1], "completion": turns[1:]},
        "question": {"question": "one?", "answer": "two"},
    }[kind]
    plain, switched = (render(each, tokenizer) for each in (row, {**row, "chat_template_kwargs": options}))
    assert "quiet" not in plain.prompt and switched.prompt.rstrip().endswith("quiet")
    assert switched.answer.strip() == plain.answer.strip() == "two"
    asked = own.unscored_rows(
        {"forget": Dataset.from_list([{**row, "chat_template_kwargs": options}])}, tokenizer, own.OwnArguments("x")
    )
    (answer, *_) = (each for part in own.parts(asked[0], own.OwnArguments("x")) for each in part.answers)
    assert render(answer, tokenizer).prompt.rstrip().endswith("quiet")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"add_generation_prompt": True}, "has .'add_generation_prompt'., which are not the row's to say"),
        ({"chat_template": "{{ 1 }}"}, "has .'chat_template'."),
        ("[1]", "must be a dictionary, but it is .1."),
    ],
)
def test_options_that_are_not_the_template_s_are_refused(options, message):
    """Would catch a row that brings a template of its own, or changes where its answer is looked for."""
    tokenizer = scene_tokenizer()
    tokenizer.chat_template = TEMPLATE
    row = {"question": "one?", "answer": "two", "chat_template_kwargs": options}
    with pytest.raises(ValueError, match=f"Row 0 of `forget`: `chat_template_kwargs` {message}"):
        prepare([row], tokenizer, name="forget")


END = 9
PADDED = {
    "end": ([5, 6, END], [5, 6, END]),
    "end and padding": ([5, 6, END, END, END], [5, 6, END, -100, -100]),
    "two turns": ([5, END, 6, END], [5, END, 6, END]),
    "left": ([END, END, 5, 6], [-100, -100, 5, 6]),
    "both": ([END, 5, 6, END, END], [-100, 5, 6, END, -100]),
}


@pytest.mark.parametrize("case", PADDED)
def test_padding_with_the_end_of_sequence_leaves_the_end(case):
    """Would catch an end that loses its label because padding has the same id: the model never learns to stop."""
    ids, labels = PADDED[case]
    rows = read_tokenized(Dataset.from_list([{"input_ids": ids}]), END, None, "forget", END)
    assert rows[0]["labels"] == labels
    # Where padding is another token, it is padding wherever it stands, as in transformers' collator.
    rows = read_tokenized(Dataset.from_list([{"input_ids": ids}]), END, None, "forget", 1)
    assert rows[0]["labels"] == [-100 if token == END else token for token in ids]


def test_curvature_takes_tokens_without_labels():
    """Would catch rows that the trainer takes and the refresh of the Hessian refuses."""
    rows = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [6, 7]}]
    trainer = Trainer(
        scene_model(), TrainingArguments(report_to="none", use_cpu=True), processing_class=scene_tokenizer()
    )
    callback = HessianCallback(trainer, Dataset.from_list(rows))
    assert callback.sources["retain"]["labels"] == [row["input_ids"] for row in rows]
    labelled = [{**row, "labels": row["input_ids"]} for row in rows]
    labelled[1]["labels"] = [6, 5000]
    with pytest.raises(ValueError, match="Row 1 of `retain` has the label 5000, and the model knows the tokens 0 to"):
        HessianCallback(trainer, Dataset.from_list(labelled))


def test_columns_that_sound_like_a_prompt_are_named(caplog, monkeypatch):
    """Would catch a `context` that the user takes for part of the prompt, and a warning about ids and sources."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("soul_trainer"), "propagate", True)
    row = {"question": "one?", "answer": "two", "context": "three", "source": "a", "perturbed_answer": ["b"]}
    with caplog.at_level(logging.INFO):
        prepare([{**row, "weight": 0.5}], scene_tokenizer(), name="forget")
    (warning,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert "`forget` has ['context', 'weight'], which are not read" in warning.getMessage()
    assert "`forget` has ['perturbed_answer', 'source'], which are not read" in caplog.text


def test_a_dataset_with_a_format_is_read_alike():
    """Would catch a mask of tensors, whose ones and zeros no set knows."""
    rows = Dataset.from_list([{"input_ids": IDS, "labels": IDS, "attention_mask": [1, 1, 1, 0]}]).with_format("torch")
    assert prepare(rows, scene_tokenizer())[:] == {"input_ids": [IDS[:3]], "labels": [IDS[:3]], "row": [0]}
