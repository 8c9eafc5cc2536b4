"""Text that the model itself writes: alternates for AltPO, retain rows, and the draws that both are made of."""

import math

import numpy as np
import pytest
import torch
from test_eval_scoring import byte_tokenizer
from toys import tiny_llama

from soul_trainer.engines import Engine
from soul_trainer.formats import encode, render
from soul_trainer.sampling import SamplingConfig, add_alternates, sample


NAMES = ["Ada", "Bo", "Cy", "Di"]
ROWS = [{"question": f"Who is {name}?", "answer": f"{name} is a poet."} for name in NAMES]
POSITIONS, END_OF_TURN = 256, "<|eot|>"
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def text_tokenizer(chat_template=None, pad=True):
    """A byte-level tokenizer, by default with a pad token and without a chat template."""
    tokenizer = byte_tokenizer([row["question"] + row["answer"] for row in ROWS])
    tokenizer.chat_template, tokenizer.model_max_length = chat_template, POSITIONS
    if not pad:
        tokenizer.pad_token = None
    if chat_template:
        # As Phi's end of a turn: special, but under no name of the tokenizer's.
        tokenizer.add_tokens([END_OF_TURN], special_tokens=True)
        assert END_OF_TURN not in tokenizer.all_special_tokens
    return tokenizer


def learnt_model(tokenizer, rows, num_steps=60):
    """A Llama that has half learnt the whole text of rows, prompts included, so that it goes on as they do."""
    ids = [torch.tensor(encode(tokenizer, render(row, tokenizer))["input_ids"]) for row in rows]
    batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=0)
    labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
    size = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_position_embeddings": POSITIONS,
    }
    model = tiny_llama(**size, initializer_range=0.2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(num_steps):
        model(input_ids=batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if tokenizer.chat_template:
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids([tokenizer.eos_token, END_OF_TURN])
    return model.eval()


@pytest.fixture(scope="module")
def plain():
    tokenizer = text_tokenizer()
    return learnt_model(tokenizer, ROWS), tokenizer


@pytest.fixture(scope="module")
def chat():
    tokenizer = text_tokenizer(CHAT)
    return learnt_model(tokenizer, ROWS), tokenizer


class HalfEngine(Engine):
    """One of two processes without a launcher: it has its part of the rows, and what the other had found."""

    def __init__(self, process_index, others=None):
        super().__init__()
        self.num_processes, self.process_index, self.others, self.own = 2, process_index, others, None

    def collect(self, values, num_rows):
        self.own = values
        both = [values, self.others if self.others is not None else values]
        both = both[:: -1 if self.process_index else 1]
        return [value for there in zip(*both) for value in there][:num_rows]


def slow_draw(logits, number, temperature=1.0, top_p=1.0):
    """The token on which a number falls, by a loop over probabilities."""
    weights = [math.exp(value / temperature) for value in (logits - logits.max()).double().tolist()]
    total = sum(weights)
    shares = [weight / total for weight in weights]
    if top_p < 1:
        kept, mass = set(), 0.0
        for token in sorted(range(len(shares)), key=lambda token: -shares[token]):
            kept.add(token)
            mass += shares[token]
            if mass >= top_p:
                break
        shares = [share if token in kept else 0.0 for token, share in enumerate(shares)]
    place = number * sum(shares)
    for token, share in enumerate(shares):
        place -= share
        if place < 0:
            return token
    raise AssertionError("the numbers are below 1")


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
def test_a_row_is_drawn_from_the_models_distribution_token_by_token(plain, temperature, top_p):
    """Would catch a draw at another temperature or position, or by settings of the model's own."""
    model, tokenizer = plain
    model.generation_config.temperature, model.generation_config.top_k = 0.1, 1
    config = SamplingConfig(temperature=temperature, top_p=top_p, batch_size=2)
    prompts = [tokenizer(f"Question: Who is {name}?\nAnswer:")["input_ids"] for name in ("Ada", "Bo and Cy")]
    draws = [(3, 0), (3, 1)]
    found = sample(model, tokenizer, prompts, draws, config, 12)
    assert model.generation_config.top_k == 1, "the model's own settings are put back"
    for prompt, draw, sampled in zip(prompts, draws, found):
        ids = list(prompt)
        for number in np.random.default_rng(draw).random(12):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            ids.append(slow_draw(logits, number, temperature, top_p))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert sampled.text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        assert (sampled.end == "") == (ids[-1] == tokenizer.eos_token_id)


def test_frequencies_are_the_models_probabilities(plain):
    """Would catch draws that depend on each other over rows, or that leave out the most or the least probable."""
    model, tokenizer = plain
    prompt = tokenizer("Question: Who is")["input_ids"]
    with torch.no_grad():
        shares = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    num_rows, config = 800, SamplingConfig(batch_size=200)
    drawn = sample(model, tokenizer, [prompt] * num_rows, [(0, row) for row in range(num_rows)], config, 1)
    texts = [each.text.strip() for each in drawn]
    for token in shares.topk(3).indices.tolist():
        text, share = tokenizer.decode([token]).strip(), float(shares[token])
        # Tokens that differ by a space alone count as one.
        alike = [i for i in range(len(shares)) if tokenizer.decode([i], skip_special_tokens=True).strip() == text]
        share = float(shares[alike].sum())
        # Four standard deviations of a count: passes by chance but once in 16,000 seeds, and the seed is fixed.
        assert abs(texts.count(text) / num_rows - share) < 4 * math.sqrt(share * (1 - share) / num_rows)


def test_a_row_does_not_depend_on_batch_or_processes(plain):
    """Would catch a shared generator, padding that counts, and processes that mix up their rows."""
    model, tokenizer = plain
    prompts = [tokenizer(f"Question: {'very ' * (row % 4)}who?")["input_ids"] for row in range(7)]
    draws = [(5, row) for row in range(7)]
    alone = [sample(model, tokenizer, [p], [d], SamplingConfig(), 10)[0] for p, d in zip(prompts, draws)]
    for batch_size in (1, 3, 7):
        config = SamplingConfig(batch_size=batch_size)
        assert sample(model, tokenizer, prompts, draws, config, 10) == alone
    assert len({each.text for each in alone}) > 3, "rows draw their own numbers"
    first = HalfEngine(0)
    sample(model, tokenizer, prompts, draws, SamplingConfig(), 10, engine=first)
    second = HalfEngine(1, first.own)
    assert sample(model, tokenizer, prompts, draws, SamplingConfig(), 10, engine=second) == alone
    assert first.own == alone[::2] and second.own[:3] == alone[1::2]


def test_a_tokenizer_without_pad_and_a_model_in_bfloat16_write_too(plain):
    """Would catch a pad token that is taken for granted, and probabilities that are summed up in 16 bits."""
    model, tokenizer = plain
    prompts = [tokenizer("Question:")["input_ids"], tokenizer("Question: Who is Ada?")["input_ids"]]
    same = sample(model, text_tokenizer(pad=False), prompts, [(0, 0), (0, 1)], SamplingConfig(), 8)
    assert same == sample(model, tokenizer, prompts, [(0, 0), (0, 1)], SamplingConfig(), 8)
    half = learnt_model(tokenizer, ROWS, num_steps=1).bfloat16()
    assert all(each.text for each in sample(half, tokenizer, prompts, [(0, 0), (0, 1)], SamplingConfig(), 8))


def test_stops_end_a_text_before_them(plain):
    """Would catch a stop that stays in the text, and a text that was cut off and looks whole."""
    model, tokenizer = plain
    prompt = tokenizer("Question: Who is Ada?\nAnswer:")["input_ids"]
    free = sample(model, tokenizer, [prompt], [(0, 0)], SamplingConfig(), 20)[0].text
    stop = free[3:6]
    stopped = sample(model, tokenizer, [prompt], [(0, 0)], SamplingConfig(), 20, stops=[stop])[0]
    assert stopped.text == free.partition(stop)[0] and stopped.end == stop
    assert sample(model, tokenizer, [prompt], [(0, 0)], SamplingConfig(), 1)[0].end is None


def test_alternates_are_new_answers_and_the_same_whatever_the_batch(plain):
    """Would catch alternates that are the true answer, empty, alike for all rows, or other ones in other batches."""
    model, tokenizer = plain
    rows = [{**row, "id": index} for index, row in enumerate(ROWS)]
    config = SamplingConfig(max_new_tokens=16, batch_size=3)
    found = add_alternates(rows, model, tokenizer, num_alternates=3, config=config)
    assert found.column_names == ["question", "answer", "id", "alternate"]
    assert [row["id"] for row in found] == [0, 1, 2, 3]
    for row in found:
        assert len(row["alternate"]) == 3
        assert all(text.strip() and text.strip() != row["answer"] for text in row["alternate"])
        assert not any("Question:" in text for text in row["alternate"])
    assert len({text for row in found for text in row["alternate"]}) > 4
    again = add_alternates(rows, model, tokenizer, 3, config=SamplingConfig(max_new_tokens=16, batch_size=12))
    assert again["alternate"] == found["alternate"]
    other = add_alternates(rows, model, tokenizer, 3, config=SamplingConfig(max_new_tokens=16, seed=1))
    assert other["alternate"] != found["alternate"]


def test_the_model_is_asked_as_altpo_asks(chat, monkeypatch):
    """Would catch a prompt without question, answer or turns of a chat, and braces of a row that are filled."""
    model, tokenizer = chat
    asked = []

    def spy(model, tokenizer, prompts, *arguments, **settings):
        asked.extend(tokenizer.decode(prompt) for prompt in prompts)
        return sample(model, tokenizer, prompts, *arguments, **settings)

    monkeypatch.setattr("soul_trainer.sampling.alternates.sample", spy)
    turns = [{"role": "user", "content": "Who is {answer}?"}, {"role": "assistant", "content": "Ada."}]
    system = [{"role": "system", "content": "Be brief."}]
    config = SamplingConfig(max_new_tokens=4)
    add_alternates([{"messages": system + turns}], model, tokenizer, 1, "{question} -> {answer}?", config)
    expected = "<|system|>Be brief.<|eot|><|user|>Who is {answer}? -> Ada.?<|eot|><|assistant|>Alternate Answer:"
    assert asked[0] == expected
    asked.clear()
    pair = {"prompt": "Who is Bo?", "completion": " Bo is a poet."}
    add_alternates([pair], model, text_tokenizer(), 1, "{question} {answer}", config)
    assert asked[0] == "Who is Bo? Bo is a poet.\nAlternate Answer:"


def test_what_alternates_refuse(plain):
    """Would catch a text row that trains on nothing, a second column, and a model that only knows the true answer."""
    model, tokenizer = plain
    with pytest.raises(ValueError, match="`forget_dataset` has no prompts, only \\['text'\\]"):
        add_alternates([{"text": "Ada is a poet."}], model, tokenizer)
    with pytest.raises(ValueError, match="a column `alternate` already"):
        add_alternates([{**ROWS[0], "alternate": "She is a cook."}], model, tokenizer)
    with pytest.raises(ValueError, match="must hold {question}"):
        add_alternates(ROWS, model, tokenizer, prompt="Again!")
    with pytest.raises(ValueError, match="Row 1 of `rows`: `answer` is empty"):
        add_alternates([ROWS[0], {"question": "Who?", "answer": " "}], model, tokenizer, name="rows")
    # Asked in the words that it learnt, and nearly greedily, it says the true answer.
    known = learnt_model(tokenizer, ROWS, num_steps=300)
    sure = {"config": SamplingConfig(temperature=0.05, max_new_tokens=16), "max_tries": 3}
    truth = sample_after(known, tokenizer, "Question: Who is Ada?\nAlternate Answer:")
    with pytest.raises(ValueError, match="Row 1 of `forget_dataset`: in 3 tries the model gave no other answer"):
        rows = [
            {"question": "Who is Bo?", "answer": "Something else entirely."},
            {"question": "Who is Ada?", "answer": truth},
        ]
        add_alternates(rows, known, tokenizer, 1, prompt="Question: {question}", **sure)


def sample_after(model, tokenizer, prompt):
    """What a model says after a prompt at a low temperature."""
    config = SamplingConfig(temperature=0.05)
    return sample(model, tokenizer, [tokenizer(prompt)["input_ids"]], [(0, 0)], config, 16)[0].text.strip()


@pytest.mark.parametrize(
    "bad", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"batch_size": 0}, {"seed": -1}]
)
def test_settings_have_ranges(bad):
    """Would catch a temperature of 0, which divides by it."""
    (name,) = bad
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        SamplingConfig(**bad)


def test_a_prompt_that_fills_the_model_is_named(plain):
    """Would catch positions that the model has not."""
    model, tokenizer = plain
    rows = [ROWS[0], {"question": "why " * 100, "answer": "So."}]
    with pytest.raises(
        ValueError,
        match="Row 1 of `forget_dataset`: a prompt of .* leaves no room for text within the model's 256 positions",
    ):
        add_alternates(rows, model, tokenizer)
