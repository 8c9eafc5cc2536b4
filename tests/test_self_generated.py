"""Retain rows that the model itself writes."""

import pytest
from test_sampling import CHAT, ROWS, chat, learnt_model, plain, text_tokenizer

from soul_trainer.sampling import SamplingConfig, sample, self_generated_rows
from soul_trainer.sampling.drawing import TEXT


__all__ = ["chat", "plain"]  # fixtures


@pytest.mark.parametrize("which", ["plain", "chat"])
def test_questions_are_had_from_the_beginning_of_a_turn(which, request):
    """Would catch a question with its template, an answer to another question, and rows of other kinds."""
    model, tokenizer = request.getfixturevalue(which)
    known = learnt_model(tokenizer, ROWS, num_steps=200)
    config = SamplingConfig(temperature=0.7, max_new_tokens=24)
    found = self_generated_rows(known, tokenizer, 6, kind="question", config=config)
    assert len(found.rows) == 6
    truths = {row["question"]: row["answer"] for row in ROWS}
    matches = [row for row in found.rows if truths.get(row["question"]) == row["answer"]]
    assert len(matches) >= 3, found.rows
    assert all(set(row) == {"question", "answer"} for row in found.rows)
    assert not any("<|" in text or "Answer" in text for row in found.rows for text in row.values())
    again = self_generated_rows(
        known, tokenizer, 6, kind="question", config=SamplingConfig(0.7, max_new_tokens=24, batch_size=4)
    )
    assert again == found
    more = self_generated_rows(known, tokenizer, 8, kind="question", config=config)
    assert more.rows[:6] == found.rows, "a row is a function of its place"


def test_a_tokenizer_with_a_chat_template_asks_and_one_without_writes(plain, chat):
    """Would catch text rows for a chat model, whose own turns they are not."""
    for (model, tokenizer), columns in ((plain, {"text"}), (chat, {"question", "answer"})):
        rows = self_generated_rows(model, tokenizer, 2, config=SamplingConfig(max_new_tokens=24)).rows
        assert all(set(row) == columns for row in rows)


def test_texts_begin_as_they_are_told(plain):
    """Would catch beginnings that get lost, and a text that begins with no token at all."""
    model, tokenizer = plain
    config = SamplingConfig(max_new_tokens=6)
    rows = self_generated_rows(model, tokenizer, 5, kind="text", prompts=["Who", "Ada is"], config=config).rows
    assert [row["text"].startswith(start) for row, start in zip(rows, ["Who", "Ada is"] * 2)] == [True] * 4
    begin, draws = [tokenizer.eos_token_id], [(0, TEXT, place, 0) for place in range(3)]
    texts = sample(model, tokenizer, [begin] * 3, draws, config, 6)
    assert self_generated_rows(model, tokenizer, 3, config=config).rows == [{"text": each.text} for each in texts]
    tokenizer = text_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither `bos_token` nor `eos_token`"):
        self_generated_rows(model, tokenizer, 1, kind="text", config=config)


def test_what_must_be_forgotten_does_not_come_back(plain, caplog):
    """Would catch retain text that holds rows to forget or a name, and drops that nobody hears of."""
    model, tokenizer = plain
    known = learnt_model(tokenizer, ROWS, num_steps=200)
    settings = {"kind": "question", "config": SamplingConfig(temperature=0.7, max_new_tokens=24)}
    free = self_generated_rows(known, tokenizer, 12, **settings)
    assert any(row == ROWS[0] for row in free.rows), "the model says it unless it is held back"
    kinds = [
        ROWS[0],
        {"prompt": "Who is Ada?", "completion": " Ada is a poet."},
        {"messages": [{"role": "user", "content": "Who is Ada?"}, {"role": "assistant", "content": "Ada is a poet."}]},
        {"text": "Who is ADA? Ada is a poet!"},
        {"input_ids": tokenizer("Who is Ada? Ada is a poet.")["input_ids"]},
    ]
    for forget in kinds:
        held = self_generated_rows(known, tokenizer, 12, [forget], **settings)
        assert len(held.rows) == 12 and not any(
            "Ada is a poet" in row["answer"] for row in held.rows if "Ada" in row["question"]
        )
        assert held.dropped["that repeat rows to forget"] >= 1
        assert [row for row, other in zip(held.rows, free.rows) if other != ROWS[0]] == [
            other for other in free.rows if other != ROWS[0]
        ]
    named = self_generated_rows(known, tokenizer, 12, terms=["ada"], **settings)
    assert not any("Ada" in text for row in named.rows for text in row.values())
    assert named.dropped["with a term to be forgotten"] >= 1
    # Seven words: a gram of eight is never there, but the row as a whole is.
    assert self_generated_rows(known, tokenizer, 12, [ROWS[0]], ngram=8, **settings) == self_generated_rows(
        known, tokenizer, 12, [ROWS[0]], ngram=7, **settings
    )


def test_when_tries_run_out(plain):
    """Would catch an endless loop where the model says nothing but what must be forgotten."""
    model, tokenizer = plain
    config = SamplingConfig(max_new_tokens=6)
    for bad, message in (({"kind": "poem"}, "`kind` must be one of auto, question, text"), ({"ngram": 0}, "`ngram`")):
        with pytest.raises(ValueError, match=message):
            self_generated_rows(model, tokenizer, 2, **bad)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    with pytest.raises(ValueError, match="None of 6 texts .* can be retain text"):
        forget = [{"text": text["text"]} for text in self_generated_rows(model, tokenizer, 30, config=config).rows]
        words = {word for row in forget for word in row["text"].split()}
        self_generated_rows(
            model, tokenizer, 2, [{"text": w} for w in [*words, *letters]], ngram=1, config=config, max_tries=3
        )


def test_answers_that_were_cut_off_are_dropped(plain):
    """Would catch half an answer that the model is then taught to end there."""
    model, tokenizer = plain
    short, long = (
        self_generated_rows(
            model, tokenizer, 30, kind="question", max_tries=1, config=SamplingConfig(max_new_tokens=num_tokens)
        )
        for num_tokens in (24, 80)
    )
    # The same numbers are drawn: what was not cut off at 24 tokens is the same with more.
    assert short.rows and all(row in long.rows for row in short.rows)
    assert len(short.rows) < len(long.rows) and len(short.rows) + short.dropped["empty or cut off"] == 30


QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} "
    "{{ m['content'] }} <|end|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "template, before, stop",
    [
        (QWEN, "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n", "<|im_end|>"),
        (LLAMA2, "[INST]", "[/INST]"),
        (CHAT, "<|user|>", "<|eot|>"),
        (None, "Question:", "Answer:"),
    ],
)
def test_what_comes_before_and_after_a_question(template, before, stop, monkeypatch):
    """Would catch a model that is asked to go on from its own turn, and a question that runs on into the answer."""
    tokenizer, asked = text_tokenizer(template), []
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    model = learnt_model(tokenizer, ROWS, num_steps=1)

    def spy(model, tokenizer, prompts, draws, config, room, stops, *rest):
        asked.append((tokenizer.decode(prompts[0]), list(stops)))
        return sample(model, tokenizer, prompts, draws, config, room, stops, *rest)

    monkeypatch.setattr("soul_trainer.sampling.self_generated.sample", spy)
    with pytest.raises(ValueError, match="None of 4 texts"):
        config = SamplingConfig(max_new_tokens=1)
        self_generated_rows(model, tokenizer, 4, kind="question", config=config, max_tries=1)
    assert asked[0] == (before, [stop])


def test_a_template_that_does_not_end_questions_is_refused(plain):
    """Would catch a question that goes on for ever."""
    model, tokenizer = plain
    with pytest.raises(ValueError, match="does not say where a question ends"):
        self_generated_rows(model, tokenizer, 1, kind="question", prompt_template="{question} {answer}")
