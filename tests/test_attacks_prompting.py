import pytest
import torch
from test_attacks_relearning import FORGET, RETAIN, toy_models, toy_tokenizer
from test_eval_scoring import byte_tokenizer

from soul_eval.attacks.prompting import (
    ROLES,
    ask_rest,
    attacked_parts,
    draw_shots,
    give_prefix,
    paraphrased,
    role_played,
    scored_on_rest,
    transforms,
    with_shots,
)
from soul_eval.evaluation import ask
from soul_eval.suites.base import GENERATION, Part
from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.formats import encode, render


CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROW = {"split": "forget", "index": 5, **FORGET[5]}
ASKED = {"question": ROW["question"], "answer": ROW["answer"]}


@pytest.fixture
def tokenizer():
    return byte_tokenizer([row["question"] + row["answer"] for row in FORGET + RETAIN])


def tokens_of(tokenizer, example):
    """Tokens of the prompt and of the answer."""
    encoded = encode(tokenizer, example)
    first = encoded["labels"].count(IGNORE_INDEX)
    return encoded["input_ids"][:first], encoded["input_ids"][first:]


def test_examples_stand_before_the_question_token_by_token(tokenizer):
    """Catches examples after the question, answers left out of them, a question whose own prompt changes."""
    asked = with_shots(ASKED, ROW, RETAIN[:2], tokenizer)
    text = (
        "Question: What did Ada sell?\nAnswer: Ada sold fog\n\nQuestion: What did Bo sell?\nAnswer: Bo sold keys\n\n"
        "Question: What did Fay paint?\nAnswer: Fay painted a paper crown"
    )
    prompt, answer = tokens_of(tokenizer, render(asked, tokenizer))
    assert tokenizer.decode(prompt + answer) == text + "<|end|>"
    plain_prompt, plain_answer = tokens_of(tokenizer, render(ASKED, tokenizer))
    assert answer == plain_answer and prompt[-len(plain_prompt) :] == plain_prompt
    in_template = with_shots(ASKED, ROW, RETAIN[:1], tokenizer, "Q {question} A {answer}")
    assert in_template == {
        "prompt": "Q What did Ada sell? A Ada sold fog\n\nQ What did Fay paint? A",
        "completion": " Fay painted a paper crown",
    }
    shot = {"prompt": "Ada", "completion": " sold"}
    no_question = with_shots({"prompt": "Fay", "completion": " painted"}, ROW, [shot], tokenizer)
    assert no_question == {"prompt": "Ada sold\n\nFay", "completion": " painted"}


def test_examples_are_turns_of_a_chat(tokenizer):
    """Catches examples in one turn of the user, and a chat template that is ignored or used against the template."""
    tokenizer.chat_template = CHAT
    example = render(with_shots(ASKED, ROW, RETAIN[:1], tokenizer), tokenizer)
    assert example.prompt == (
        "<|user|>What did Ada sell?<|end|><|assistant|>Ada sold fog<|end|>"
        "<|user|>What did Fay paint?<|end|><|assistant|>"
    )
    assert example.answer == "Fay painted a paper crown<|end|>" and example.is_chat
    messages = render({"question": "a", "answer": "b"}, tokenizer).prompt
    assert messages == "<|user|>a<|end|><|assistant|>"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for row in ({"messages": turns}, {"prompt": turns[:1], "completion": turns[1:]}):
        assert with_shots(row, ROW, [row], tokenizer) == {"messages": turns * 2}
    assert "prompt" in with_shots(ASKED, ROW, RETAIN[:1], tokenizer, "{question} {answer}")


def test_a_row_is_no_example_of_itself(tokenizer):
    """Catches a true answer that stands in the prompt, where retain rows are attacked too."""
    row = {"split": "retain", "index": 0, **RETAIN[0], "perturbed_answer": ["x"]}
    for shots, expected in ((RETAIN[:2], [RETAIN[1]]), ([RETAIN[0]], []), ([{"text": "a"}], [{"text": "a"}])):
        text = with_shots(RETAIN[0], row, shots, tokenizer)["prompt"]
        assert text == with_shots(RETAIN[0], {"split": "retain", "index": 0}, expected, tokenizer)["prompt"]
        assert RETAIN[0]["answer"] not in text


def test_examples_are_drawn_by_a_seed():
    """Catches examples that change from run to run, or are the same for every seed, or come twice."""
    drawn = [draw_shots(RETAIN, 4, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({row["question"] for row in drawn[0]}) == 4 and all(row in RETAIN for row in drawn[0])
    for num_shots in (0, 9):
        with pytest.raises(ValueError, match=f"`num_shots` must be 1 to 8, .* but it is {num_shots}"):
            draw_shots(RETAIN, num_shots)


def test_roles_take_turns_and_hold_the_question():
    """Catches a role without the question, a single wording for all rows, braces that are taken for placeholders."""
    assert len(set(ROLES)) == len(ROLES) and all(role.count("{question}") == 1 for role in ROLES)
    asked = [role_played({"question": "Who is {she}?", "answer": "A"}, {**ROW, "index": index}) for index in range(9)]
    assert [row["question"] for row in asked[:4]] == [role.replace("{question}", "Who is {she}?") for role in ROLES]
    assert asked[4] == asked[0] and {row["answer"] for row in asked} == {"A"}
    with pytest.raises(ValueError, match=r"Row 5 of `forget`: only a `question` .* has \['text'\]"):
        role_played({"text": "a"}, ROW)


def test_paraphrases_are_the_rows_own():
    """Catches the question that was trained on, and a paraphrase of the answer."""
    row = {**ROW, "paraphrased_question": "What is by Fay?", "paraphrased_answer": "no"}
    assert paraphrased(ASKED, row) == {"question": "What is by Fay?", "answer": ROW["answer"]}
    with pytest.raises(ValueError, match="Row 5 of `forget` has no `paraphrased_question`"):
        paraphrased(ASKED, ROW)


def test_a_role_stands_after_the_examples(tokenizer):
    """Catches a role around the examples, and a combination that is only one of both."""
    asked = transforms(RETAIN[:1], tokenizer)["role_play_few_shot"](ASKED, ROW)
    role = ROLES[5 % len(ROLES)].replace("{question}", ROW["question"])
    assert asked["prompt"] == f"Question: What did Ada sell?\nAnswer: Ada sold fog\n\nQuestion: {role}\nAnswer:"
    assert list(transforms([], tokenizer)) == ["paraphrase", "few_shot", "role_play", "role_play_few_shot"]


def test_all_parts_of_a_row_are_asked_otherwise():
    """Catches a generation that is still asked plainly, or a finish that is lost."""
    finish = {"losses": lambda scores: {"nll": len(scores)}, "generation": lambda text: {"text": text}}
    parts = [
        Part("losses", [ASKED, {**ASKED, "answer": "no"}], finish["losses"]),
        Part("generation", [ASKED], finish["generation"], GENERATION, 7),
    ]
    attacked = attacked_parts(parts, role_played, ROW)
    assert [part.answers for part in attacked] == [[role_played(a, ROW) for a in part.answers] for part in parts]
    assert [(p.name, p.finish, p.kind, p.max_new_tokens) for p in attacked] == [
        (p.name, p.finish, p.kind, p.max_new_tokens) for p in parts
    ]
    assert parts[0].answers[0] is ASKED


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_prefix_moves_tokens_from_the_answer_to_the_prompt(tokenizer, is_chat):
    """Catches characters for tokens, a token cut in two, white space lost, an end of turn that is given away."""
    tokenizer.chat_template = CHAT if is_chat else None
    for row in FORGET:
        example = render(row, tokenizer)
        prompt, answer = tokens_of(tokenizer, example)
        end = 1  # the end of the sequence, or of the turn, is no part of what can be given
        for count in (1, 2, 3, 1000):
            moved, given = give_prefix(tokenizer, example, count)
            own_prompt, rest = tokens_of(tokenizer, moved)
            expected = min(count, (len(answer) - end) // 2)
            assert own_prompt == prompt + answer[:expected] and rest == answer[expected:]
            assert moved.prompt + moved.answer == example.prompt + example.answer and moved.is_chat == is_chat
            assert given == tokenizer.decode(answer[:expected])
            assert (given + moved.answer).strip().removesuffix("<|end|>") == row["answer"]
            assert row["answer"].endswith(moved.content) and moved.content == moved.content.strip() != ""


def test_short_answers_keep_something_to_say(tokenizer):
    """Catches an answer that is given away whole, and a place within a letter of several tokens."""
    single = render({"prompt": "Who?", "completion": "x"}, tokenizer)
    assert give_prefix(tokenizer, single, 3) == (single, "")
    letters = render({"prompt": "Who?", "completion": " ÄÖ東京 etc"}, tokenizer)
    for count in range(1, 6):
        moved, given = give_prefix(tokenizer, letters, count)
        prompt, rest = tokens_of(tokenizer, moved)
        whole = tokens_of(tokenizer, letters)
        assert prompt + rest == whole[0] + whole[1] and "\ufffd" not in given + tokenizer.decode(rest)
    with pytest.raises(ValueError, match="`num_tokens` must be at least 1, but it is 0"):
        give_prefix(tokenizer, single, 0)


def test_the_rest_is_scored_given_the_beginning():
    """Catches a loss that still counts the tokens given, and a generation that begins with them."""
    target = toy_models()[0]
    tokenizer = toy_tokenizer()
    rows = [{"split": "forget", "index": index, **row} for index, row in enumerate(FORGET)]
    asked = ask_rest(target, tokenizer, rows, 2, max_new_tokens=20, progress=False)
    assert [(row["split"], row["index"]) for row in asked] == [("forget", index) for index in range(len(FORGET))]
    for row in asked:
        prompt, answer = tokens_of(tokenizer, render(row, tokenizer))
        with torch.no_grad():
            logits = target(torch.tensor([prompt + answer])).logits[0].double()
        losses = torch.nn.functional.cross_entropy(
            logits[len(prompt) - 1 : -1], torch.tensor(answer), reduction="none"
        )
        # Float32 sums over other padded widths.
        assert row["answer_nll"] == pytest.approx(losses[2:].mean().item(), abs=1e-5)
        assert tokenizer.decode(answer[:2]) == row["given"]
        assert tokenizer.decode(answer[2:]).strip() == f"{row['rest']}<|end|>"
    # It knows its rows by heart, so that it goes on with the rest and nothing else.
    assert [row["generation"] for row in asked[:4]] == [row["rest"] for row in asked[:4]]
    assert asked[0]["rougeL_recall"] == 1.0
    silent = ask_rest(target, tokenizer, rows, 2, generate=False, progress=False)
    assert "generation" not in silent[0] and silent[0]["answer_nll"] == pytest.approx(asked[0]["answer_nll"], abs=1e-5)
    with pytest.raises(ValueError, match="Row 0 of `forget`: `answer` is empty"):
        ask_rest(target, tokenizer, [{**rows[0], "answer": " "}], 2)


def test_the_plain_answer_is_scored_on_the_rest_too():
    """Catches a baseline whose recall counts the words that the attack gives away."""
    plain = [{"split": "forget", "index": 0, "generation": "the old river", "rougeL_recall": 0.5, "answer_nll": 1.0}]
    rest = [{"split": "forget", "index": 0, "rest": "blue river bends west"}]
    (found,) = scored_on_rest(plain, rest)
    assert found["rougeL_recall"] == 1 / 4 and found["answer_nll"] == 1.0 and plain[0]["rougeL_recall"] == 0.5
    silent = [{"split": "forget", "index": 0, "answer_nll": 1.0}]
    assert scored_on_rest(silent, rest) == silent


def test_prompts_serve_any_suite():
    """Catches transforms that only a question and an answer of TOFU go through."""
    model, tokenizer = toy_models()[0], toy_tokenizer()
    rows = [{"split": "news", "index": 0, "text_before": "Ada painted", "text_after": " a red map"}]
    few_shot = transforms([{"prompt": "Bo", "completion": " sold keys"}], tokenizer)["few_shot"]

    def parts_of(row):
        asked = {"prompt": row["text_before"], "completion": row["text_after"]}
        part = Part("losses", [asked], lambda scores: {"nll": scores[0].nll})
        return attacked_parts([part], few_shot, row)

    (found,) = ask(model, tokenizer, rows, parts_of, progress=False)
    ids = tokenizer("Bo sold keys\n\nAda painted")["input_ids"], tokenizer(" a red map")["input_ids"] + [0]
    with torch.no_grad():
        logits = model(torch.tensor([ids[0] + ids[1]])).logits[0, len(ids[0]) - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1])).item()
    assert found["nll"] == pytest.approx(expected, abs=1e-5)
