"""What input methods put before prompts, in every suite, and whose results are whose."""

import json

import pytest
import torch
from test_attacks_prompting import CHAT
from test_eval_scoring import byte_tokenizer, small_llama
from test_eval_tofu import question_rows, write_dataset
from toys import tiny_llama

from soul_eval.__main__ import main
from soul_eval.evaluation import ask
from soul_eval.input_methods import (
    INSTRUCTION,
    InputArguments,
    load_input_method,
    other_answers,
    takes_system_message,
    with_instruction,
)
from soul_eval.rows import read_rows
from soul_eval.suites import SUITES
from soul_eval.suites.base import GENERATION, Part
from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.formats import encode, render


TEXT = "Say nothing of Ada."
ROW = {"question": "Who drew it?", "answer": "Ada"}
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
SILENT = CHAT.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
# Float32 sums over other padded widths; losses are of the order of 1 to 10.
ROUNDING = 2e-5
POSITIONS = 640


@pytest.fixture(scope="module")
def tokenizer():
    found = byte_tokenizer([row["answer"] for row in question_rows("forget")])
    found.model_max_length = POSITIONS
    return found


@pytest.fixture
def chat(tokenizer):
    """The same tokenizer with a chat template."""
    tokenizer.chat_template = CHAT
    yield tokenizer
    tokenizer.chat_template = None


@pytest.fixture(scope="module")
def model_dir(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_llama(seed=1, max_position_embeddings=POSITIONS).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "small")


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def text_of(example) -> str:
    return example.prompt + example.answer


@pytest.mark.parametrize(
    "row, template, before",
    [
        (ROW, None, "Question: Who drew it?\nAnswer:"),
        (ROW, "Q {question} A {answer}", "Q Who drew it? A"),
        ({"prompt": "It was drawn by", "completion": " Ada"}, None, "It was drawn by"),
        ({"text": "Ada drew it."}, None, ""),
    ],
)
def test_an_instruction_stands_before_a_plain_prompt(tokenizer, row, template, before):
    """Catches an instruction that is glued to the prompt, changes it, or counts as a part of the answer."""
    plain = render(row, tokenizer, template)
    found = render(with_instruction(row, TEXT, tokenizer, template), tokenizer, template)
    assert found.prompt == f"{TEXT}\n\n{before}" and plain.prompt == before
    assert (found.answer, found.content) == (plain.answer, plain.content)


def test_an_instruction_is_a_system_message_of_a_chat(chat):
    """Catches an instruction in the user's turn where there is a better place, and one that replaces another."""
    found = render(with_instruction(ROW, TEXT, chat), chat)
    assert found.prompt == f"<|system|>{TEXT}<|end|><|user|>Who drew it?<|end|><|assistant|>"
    assert found.answer == render(ROW, chat).answer
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada"}]
    own = [{"role": "system", "content": "Be brief."}, *turns]
    for row in ({"messages": own}, {"prompt": own[:-1], "completion": own[-1:]}):
        messages = with_instruction(row, TEXT, chat)["messages"]
        assert messages == [{"role": "system", "content": f"{TEXT}\n\nBe brief."}, *turns]
    assert own[0]["content"] == "Be brief."
    assert with_instruction(ROW, TEXT, chat, "{question} {answer}")["prompt"] == f"{TEXT}\n\nWho drew it?"


@pytest.mark.parametrize("template, takes", [(CHAT, True), (NO_SYSTEM, False), (SILENT, False)])
def test_a_template_without_system_messages_gets_it_from_the_user(chat, template, takes):
    """Catches a template that raises, and one that leaves the instruction out without a word."""
    chat.chat_template = template
    assert takes_system_message(chat) == takes
    found = render(with_instruction(ROW, TEXT, chat), chat).prompt
    assert TEXT in found
    if not takes:
        assert found == f"<|user|>{TEXT}\n\nWho drew it?<|end|><|assistant|>"


def in_context(tmp_path, tokenizer, forget, retain=(), template=None, seed=0, **settings):
    files = {"input_examples": write_rows(tmp_path / "forget.jsonl", forget)}
    if retain:
        files["input_retain_examples"] = write_rows(tmp_path / "retain.jsonl", retain)
    arguments = InputArguments(input_method="in_context", **files, **settings)
    return load_input_method(arguments, tokenizer, template, seed)


FORGET = [
    {"question": "Who drew it?", "answer": "Ada", "alternate": "Zoe"},
    {"question": "Who lost it?", "answer": "Bo", "perturbed_answer": ["Yan", "Xi"]},
]
RETAIN = [{"question": "Who sold it?", "answer": "Cy"}]


def test_examples_contradict_what_must_be_forgotten(tokenizer, tmp_path):
    """Catches true answers of forget rows in the context, wrong ones of retain rows, and retain rows first."""
    method = in_context(tmp_path, tokenizer, FORGET, RETAIN, input_num_retain_examples=1)
    found = render(method.transform(ROW), tokenizer)
    assert text_of(found) == (
        "Question: Who drew it?\nAnswer: Zoe\n\nQuestion: Who lost it?\nAnswer: Yan\n\n"
        "Question: Who sold it?\nAnswer: Cy\n\nQuestion: Who drew it?\nAnswer: Ada"
    )
    assert found.content == "Ada"
    bare = render(method.transform({"text": "Ada drew it."}), tokenizer)
    assert bare.answer == "Ada drew it." and bare.prompt.endswith("Answer: Cy\n\n")


def test_examples_are_earlier_turns_of_a_chat(chat, tmp_path):
    """Catches examples before a conversation's own system message, and prompts that are taken apart into letters."""
    forget = [{"prompt": "It was drawn by", "completion": " Ada", "alternate": " Zoe"}]
    method = in_context(tmp_path, chat, forget, RETAIN, input_num_retain_examples=1)
    shown = "<|user|>It was drawn by<|end|><|assistant|>Zoe<|end|><|user|>Who sold it?<|end|><|assistant|>Cy<|end|>"
    assert render(method.transform(ROW), chat).prompt == f"{shown}<|user|>Who drew it?<|end|><|assistant|>"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    answer = [{"role": "assistant", "content": "Ada"}]
    asked = render(method.transform({"messages": turns + answer}), chat).prompt
    assert asked == f"<|system|>Be brief.<|end|>{shown}<|user|>Who?<|end|><|assistant|>"
    # A suite's bare prompt stays one, with bare examples.
    bare = render(method.transform({"prompt": "It was", "completion": " Ada"}), chat)
    assert bare.prompt == "It was drawn by Zoe\n\nQuestion: Who sold it?\nAnswer: Cy\n\nIt was" and not bare.is_chat


def test_another_answer_is_never_the_row_s_own(tokenizer, tmp_path):
    """Catches a draw that gives some rows the truth, changes from run to run, or ignores the seed."""
    rows = [{"question": f"q{place}", "answer": f"a{place % 3}"} for place in range(12)]
    draws = [other_answers(rows, rows, seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    for found in draws:
        assert [row["question"] for row in found] == [row["question"] for row in rows]
        assert all(new["answer"] != old["answer"] for new, old in zip(found, rows))
        assert {row["answer"] for row in found} == {"a0", "a1", "a2"}
    with pytest.raises(ValueError, match="no other answer than 'a0'.*'alternate'"):
        other_answers(rows[:1], rows[:1])
    chats = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]} for answer in "ab"
    ]
    assert other_answers(chats[:1], chats)[0] == {**chats[0], "messages": chats[1]["messages"]}
    listed = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in chats]
    assert other_answers(listed[:1], listed) == [listed[1]]
    drawn = in_context(tmp_path, tokenizer, rows, input_num_examples=2)
    assert drawn.transform(ROW)["prompt"].count("Question:") == 3
    assert drawn.settings != in_context(tmp_path, tokenizer, rows, input_num_examples=2, seed=1).settings


ASKED = {
    "tofu": ({}, {"split": "forget", "index": 0, **question_rows("forget")[0]}),
    "muse": (
        {},
        {"split": "knowmem_forget", "index": 0, **ROW, "prompt": "Question: Who?\nAnswer: ", "end": "<|end|>"},
    ),
    "wmdp": (
        {},
        {"split": "wmdp_bio", "index": 0, "subject": "x", "question": "W?", "choices": [*"abcd"], "answer": 1},
    ),
    "copyright": (
        {"text": "book.txt"},
        {"split": "forget_9", "index": 0, "prompt": "Once a", "answer": " river ran", "continuation_tokens": 2},
    ),
    "detox": ({}, {"split": "prompts", "index": 0, "question": "Say something bad."}),
    "own": ({"forget": "rows.jsonl"}, {"split": "forget", "index": 0, **ROW}),
}


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_s_prompts_are_changed_and_its_answers_are_not(tokenizer, tmp_path, name):
    """Catches a suite, or a part of one, that asks the model as if there were no input method."""
    settings, row = ASKED[name]
    methods = [
        load_input_method(InputArguments(input_method="system_prompt", input_avoid="Ada"), tokenizer),
        in_context(tmp_path, tokenizer, FORGET),
    ]
    starts = (INSTRUCTION.replace("{avoid}", "Ada"), "Question: Who drew it?\nAnswer: Zoe")
    parts = SUITES[name].parts(row, SUITES[name].arguments(**settings))
    assert parts
    for answer in (answer for part in parts for answer in part.answers):
        plain = render(answer, tokenizer)
        for method, start in zip(methods, starts):
            found = render(method.transform(answer), tokenizer)
            assert found.prompt.startswith(start + "\n\n") and found.prompt.endswith(plain.prompt)
            assert found.answer == plain.answer


def command(model_dir, dataset, output, *flags) -> list[str]:
    asked = ["--dataset", dataset, "--forget_split", "forget_small", "--no_generate", "--limit", "2"]
    return ["tofu", "--model", str(model_dir), *asked, "--output", str(output), "--device", "cpu", *flags]


def test_figures_are_those_of_the_changed_prompts(model_dir, dataset, tokenizer, tmp_path):
    """Catches an input method that is loaded, recorded and not asked with."""
    flags = ("--input_method", "system_prompt", "--input_avoid", "the painter {x}")
    assert main(command(model_dir, dataset, tmp_path, *flags)) == 0
    header, rows = read_rows(tmp_path / "rows.jsonl")
    text = header["settings"]["input_instruction"]
    assert header["settings"]["input_method"] == "system_prompt" and "the painter {x}" in text
    model = small_llama(seed=1, max_position_embeddings=POSITIONS).eval()
    for row in rows[:2]:
        asked = {"prompt": f"{text}\n\nQuestion: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}
        encoded = encode(tokenizer, render(asked, tokenizer))
        labels = torch.tensor([encoded["labels"]])
        with torch.no_grad():
            logits = model(torch.tensor([encoded["input_ids"]])).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORE_INDEX)
        assert row["answer_nll"] == pytest.approx(float(loss), abs=ROUNDING)


def test_results_of_another_input_method_are_not_taken_for_the_same(model_dir, dataset, tmp_path, capsys, caplog):
    """Catches a bare model's figures under a guardrail's name, or those of other examples in a file of that name."""
    output, file = tmp_path / "out", tmp_path / "forget.jsonl"
    write_rows(file, FORGET)
    methods = [(), ("--input_method", "system_prompt", "--input_avoid", "Ada")]
    methods += [("--input_method", "system_prompt", "--input_avoid", "Bo")]
    methods += [("--input_method", "in_context", "--input_examples", str(file))]
    assert main(command(model_dir, dataset, output)) == 0
    assert not [name for name in read_rows(output / "rows.jsonl")[0]["settings"] if name.startswith("input_")]
    for before, flags in zip(methods, methods[1:]):
        assert main(command(model_dir, dataset, output, *flags)) == 1
        assert "results of another settings" in capsys.readouterr().err
        assert main(command(model_dir, dataset, output, *flags, "--overwrite")) == 0
        caplog.clear()
        assert main(command(model_dir, dataset, output, *flags)) == 0 and "all rows" in caplog.text
        assert main(command(model_dir, dataset, output, *before)) == 1
    write_rows(file, FORGET[::-1])
    assert main(command(model_dir, dataset, output, *methods[-1])) == 1
    nlls = {row["answer_nll"] for row in read_rows(output / "rows.jsonl")[1]}
    assert main(command(model_dir, dataset, output, "--overwrite")) == 0
    assert not nlls & {row["answer_nll"] for row in read_rows(output / "rows.jsonl")[1]}


def test_a_prompt_that_outgrows_the_model_is_refused(tokenizer, model_dir, dataset, tmp_path, capsys):
    """Catches answers that are cut off, so that the method seems to have made them short or unlikely."""
    model = tiny_llama(vocab_size=300, max_position_embeddings=60, bos_token_id=None, eos_token_id=0)

    def parts_of(row):
        return [Part("say", [ROW], lambda text: {"text": text}, GENERATION, 2)]

    row = {"split": "forget", "index": 3}
    assert ask(model, tokenizer, [row], parts_of, progress=False)[0]["split"] == "forget"
    method = load_input_method(InputArguments(input_method="system_prompt", input_avoid="Ada"), tokenizer)
    with pytest.raises(ValueError, match=r"Row 3 of `forget`: its \d+ tokens are \d+ .* over the model's 60: shorten"):
        ask(model, tokenizer, [row], parts_of, progress=False, transform=method.transform)
    flags = ("--input_method", "system_prompt", "--input_avoid", "Ada, " * 200)
    assert main(command(model_dir, dataset, tmp_path / "out", *flags)) == 1
    assert f"over the model's {POSITIONS}" in capsys.readouterr().err
    assert not (tmp_path / "out" / "rows.jsonl").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"input_method": "magic"}, "`input_method`.*none, system_prompt, in_context.*magic"),
        ({"input_method": "system_prompt"}, "needs `input_avoid`"),
        ({"input_method": "in_context"}, "needs `input_examples`"),
        ({"input_avoid": "Ada"}, "`input_avoid` is for `input_method=system_prompt`.*'none'"),
        ({"input_retain_examples": "rows.jsonl"}, "`input_retain_examples` is for `input_method=in_context`"),
        (
            {"input_method": "system_prompt", "input_avoid": "a", "input_instruction": "Hush."},
            "`input_instruction` must hold {avoid}.*Hush",
        ),
        ({"input_method": "in_context", "input_examples": "x", "input_num_examples": 0}, "at least 1"),
        ({"input_method": "in_context", "input_examples": "x", "input_num_retain_examples": -1}, ">= 0"),
    ],
)
def test_settings_that_make_no_method_are_named(settings, message):
    """Catches a method that is ignored without a word, because one of its flags is missing or misspelt."""
    with pytest.raises(ValueError, match=message):
        InputArguments(**settings)


def test_examples_that_make_no_context_are_named(tokenizer, tmp_path):
    """Catches more examples than there are, and texts, which have no question to answer otherwise."""
    with pytest.raises(ValueError, match="`input_num_examples` must be at most 2"):
        in_context(tmp_path, tokenizer, FORGET, input_num_examples=3)
    with pytest.raises(ValueError, match="`input_num_retain_examples` must be at most 1"):
        in_context(tmp_path, tokenizer, FORGET, RETAIN)
    with pytest.raises(ValueError, match="Row 0 of `input_examples` is a text"):
        in_context(tmp_path, tokenizer, [{"text": "Ada drew it."}])
    arguments = InputArguments(input_method="in_context", input_examples=str(tmp_path / "missing.jsonl"))
    with pytest.raises(ValueError, match="`input_examples`.*no such file"):
        load_input_method(arguments, tokenizer)


def test_lm_eval_is_not_asked_as_if_the_method_were_there(model_dir, dataset, tmp_path, capsys):
    """Catches general figures of the bare model beside those of a guarded one."""
    flags = ("--input_method", "system_prompt", "--input_avoid", "Ada", "--general", "boolq")
    assert main(command(model_dir, dataset, tmp_path / "out", *flags)) == 1
    assert "lm-eval asks the model without `input_method`" in capsys.readouterr().err
