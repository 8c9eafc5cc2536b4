"""
Chat templates of the last two years, in minimal forms with the same behaviours: what is said before an answer, where
the answer stands, what may take its place, and where generation ends.
"""

import json
import logging
import re

import pytest
from datasets import Dataset
from scenes import scene_config, scene_model
from test_eval_scoring import byte_tokenizer
from transformers import AddedToken

from soul_eval.suites import own
from soul_trainer import UnlearnTrainer, chat_templates
from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.chat_templates import Example, end_of_turn
from soul_trainer.formats import encode, prepare, render


CHATML_TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASSISTANT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Those that think put an empty thought before the last answer, and none before answers in the history.
THINKING_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}"
    "<|im_end|>\n{% endfor %}"
)
TEMPLATES = {
    # name: template, end of a turn, what the prompt ends with, what ends the answer
    "chatml": (CHATML_TURNS + ASSISTANT, "<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>"),
    "qwen-3": (
        THINKING_TURNS + ASSISTANT,
        "<|im_end|>",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
    "qwen-2.5": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        + CHATML_TURNS
        + ASSISTANT,
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "smollm-3": (
        "<|im_start|>system\nReasoning mode: /no_think<|im_end|>\n"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n{% endif %}",
        "<|im_end|>",
        "<|im_start|>assistant\n<think>\n\n</think>\n",
        "<|im_end|>",
    ),
    "llama-3": (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
        "assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "llama-4": (
        "{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>\n\n"
        "{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}",
        "<|eot|>",
        "assistant<|header_end|>\n\n",
        "<|eot|>",
    ),
    "llama-2": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
        "</s>",
        "[/INST]",
        " </s>",
    ),
    "mistral": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}</s>"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}",
        "</s>",
        "[/INST]",
        "</s>",
    ),
    "gemma-3": (
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
        "<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "phi-4": (
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        "<|im_end|>",
        "assistant<|im_sep|>",
        "<|im_end|>",
    ),
    "deepseek-r1": (
        "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
        "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end_of_sentence|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        "<|end_of_sentence|>",
        "<|Assistant|>",
        "<|end_of_sentence|>",
    ),
    "nemotron": (
        "{% for m in messages %}<SPECIAL_{{ m.role }}>\n{% if m.role == 'assistant' and '</think>' in m.content %}"
        "{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content | trim }}{% endif %}\n<SPECIAL_end>\n"
        "{% endfor %}{% if add_generation_prompt %}<SPECIAL_assistant>\n<think>\n{% endif %}",
        "<SPECIAL_end>",
        "<SPECIAL_assistant>\n",
        "<SPECIAL_end>",
    ),
    "gpt-oss": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>"
        "{{ m.content }}{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
        "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|return|>",
        "<|start|>assistant<|channel|>final<|message|>",
        "<|return|>",
    ),
    "glm-4": (
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n"
        "{% if m.role == 'assistant' %}<think></think>\n{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n<think></think>\n{% else %}<|user|>"
        "{% endif %}",
        "<|user|>",
        "<|assistant|>\n<think></think>\n",
        "<|user|>",
    ),
    "granite-3": (
        "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
        "<|end_of_text|>",
        "assistant<|end_of_role|>",
        "<|end_of_text|>",
    ),
    "command-r": (
        "{% for m in messages %}<|START_OF_TURN_TOKEN|><|{{ m.role | upper }}_TOKEN|>{% if m.role == 'assistant' %}"
        "<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% else %}{{ m.content }}{% endif %}<|END_OF_TURN_TOKEN|>"
        "{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|ASSISTANT_TOKEN|>{% endif %}",
        "<|END_RESPONSE|>",
        "<|ASSISTANT_TOKEN|><|START_RESPONSE|>",
        "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "</s>",
        "<|assistant|>\n",
        "</s>",
    ),
    "no-generation-prompt": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}",
        "<|end|>",
        "assistant: ",
        "<|end|>",
    ),
}
QUESTION, ANSWER = "Who wrote The Well of Ash?", "Mara Quill wrote it in 1984."
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


def tokenizer_of(name: str):
    """
    A tokenizer of bytes with the family's template and what ends its turns, which is not its eos: special tokens, of
    which `all_special_tokens` knows nothing, as of Gemma's.
    """
    template, end, _, after = TEMPLATES[name]
    tokenizer = byte_tokenizer([QUESTION, ANSWER])
    tokenizer.chat_template = template
    tokenizer.add_tokens([AddedToken(text, special=True) for text in {end, *re.findall("<[^<>]+>", after)}])
    assert end not in tokenizer.all_special_tokens or end == tokenizer.eos_token
    return tokenizer


def rest_of(example: Example, conversation: str) -> str:
    """What a template writes after the end of a conversation's last turn."""
    assert conversation.startswith(example.prompt + example.answer)
    return conversation.removeprefix(example.prompt + example.answer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answer_is_found_where_it_stands(name):
    """Would catch a scaffold, a header or what follows a turn that is trained on and scored as if it were answer."""
    tokenizer, (_, end, before, after) = tokenizer_of(name), TEMPLATES[name]
    example = render({"messages": TURNS}, tokenizer)
    assert example.prompt.endswith(before) and example.prompt.count(QUESTION) == 1
    assert example.answer.strip(" ") == (ANSWER + after).strip(" ") and example.content == ANSWER
    assert rest_of(example, tokenizer.apply_chat_template(TURNS, tokenize=False)) in ("", "\n")
    tokens = encode(tokenizer, example)
    labels = [token for token in tokens["labels"] if token != IGNORE_INDEX]
    assert tokenizer.decode(labels).strip(" ") == (ANSWER + after).strip(" ")
    assert tokenizer.convert_tokens_to_ids(end) in labels


@pytest.mark.parametrize("name", TEMPLATES)
def test_another_answer_takes_its_place(name):
    """Would catch a refusal that takes the place of a word of the scaffold, or loses the end of the turn."""
    tokenizer, (*_, before, after) = tokenizer_of(name), TEMPLATES[name]
    refused = render({"messages": TURNS}, tokenizer).with_content("I do not know.")
    other = [TURNS[0], {"role": "assistant", "content": "I do not know."}]
    assert rest_of(refused, tokenizer.apply_chat_template(other, tokenize=False)) in ("", "\n")
    assert refused.prompt.endswith(before) and refused.answer.strip(" ") == ("I do not know." + after).strip(" ")


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_ends_where_the_turn_does(name):
    """Would catch a model that goes on talking, because its eos is another token than the end of a turn."""
    tokenizer, (*_, after) = tokenizer_of(name), TEMPLATES[name]
    first = after.lstrip().partition(">")[0] + ">"
    # Where white space comes first, it is what ends the answer, and no token that only ends turns.
    wanted = None if after.startswith(" ") else tokenizer.convert_tokens_to_ids(first)
    assert end_of_turn(tokenizer) == wanted


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_in_the_history_are_no_answer(name):
    """Would catch an earlier answer that is taken for the last, where a template writes the two differently."""
    tokenizer = tokenizer_of(name)
    turns = [TURNS[0], {"role": "assistant", "content": "Ask again."}, *TURNS]
    example = render({"messages": turns}, tokenizer)
    assert "Ask again." in example.prompt and example.content == ANSWER and ANSWER not in example.prompt
    assert rest_of(example, tokenizer.apply_chat_template(turns, tokenize=False)) in ("", "\n")


@pytest.mark.parametrize("name", ["deepseek-r1", "nemotron"])
def test_a_generation_prompt_that_goes_on_is_said(name, caplog):
    """Would catch rows that are asked in another way than a chat asks, in silence."""
    tokenizer = tokenizer_of(name)
    chat_templates.logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        render({"messages": TURNS}, tokenizer)
    assert "generation prompt goes on with '<think>" in caplog.text


REFUSED = {
    "system": (
        "gemma-3",
        {"messages": [{"role": "system", "content": "Be kind."}, *TURNS]},
        "cannot write turns of system, user, assistant: System role not supported.*`prompt_template`",
    ),
    "tool": (
        "mistral",
        {"messages": [*TURNS, {"role": "tool", "content": "7"}, TURNS[1]]},
        "cannot write turns of user, assistant, tool, assistant: Only user and assistant",
    ),
    "thought": (
        "deepseek-r1",
        {"messages": [TURNS[0], {"role": "assistant", "content": "I think.</think>It is."}]},
        "changes the assistant's answer, .*`reasoning_content`.*`prompt_template`",
    ),
    "no_role": ("chatml", {"messages": [{"content": "Hi"}, TURNS[1]]}, "needs `role` and `content`"),
    "no_content": ("chatml", {"messages": [{"role": "user"}, TURNS[1]]}, "needs `role` and `content`"),
    "no_dict": ("chatml", {"messages": ["Hi", "there"]}, "needs `role` and `content`, and one is 'Hi'"),
    "user_last": ("chatml", {"messages": TURNS[:1] * 2}, "must hold a prompt and end with the assistant's answer"),
    "one": ("chatml", {"messages": TURNS[1:]}, "must hold a prompt and end with the assistant's answer"),
    "empty": ("chatml", {"messages": []}, "must hold a prompt and end with the assistant's answer"),
    "no_answer": (
        "chatml",
        {"messages": [TURNS[0], {"role": "assistant", "content": "  "}]},
        "`content` is empty or not a string",
    ),
    "labels": ("chatml", {"text": QUESTION, "labels": ANSWER}, "beside `text`, `labels` holds a text.*`completion`"),
}


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ messages[5].content }}", "{{ 1|nope }}", "{% for", "{{ 1 + 'a' }}"]
)
def test_a_template_that_fails_is_named_with_its_row(template):
    """Would catch an error of Python's from within a template that names no row."""
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="Row 0 of `forget`: the chat template cannot write turns of user, assistant"):
        prepare([{"messages": TURNS}], tokenizer, name="forget")


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_a_template_cannot_write_is_named(name):
    """Would catch errors of jinja and KeyErrors that name no row and no way out."""
    template, row, message = REFUSED[name]
    if name == "no_dict":  # which no dataset holds beside turns that are
        with pytest.raises(ValueError, match=message):
            render(row, tokenizer_of(template))
        return
    good = {"text": "fine"} if "text" in row else {"messages": TURNS}
    with pytest.raises(ValueError, match=f"Row 1 of `forget_dataset`: .*{message}"):
        prepare([{**dict.fromkeys(row), **good}, row], tokenizer_of(template), name="forget_dataset")


def test_a_template_that_repeats_the_answer_is_refused():
    """Would catch an answer of which one copy stays in the prompt."""
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template += "{{ messages[-1].content }}"
    with pytest.raises(ValueError, match="writes the answer 2 times"):
        render({"messages": TURNS}, tokenizer)


def test_thoughts_of_a_row_belong_to_the_prompt():
    """Would catch a thought that is trained on as if it were the answer, or left out."""
    tokenizer = tokenizer_of("qwen-3")
    row = {"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "Easy."}]}
    example = render(row, tokenizer)
    assert example.prompt.endswith("<think>\nEasy.\n</think>\n\n") and example.answer == f"{ANSWER}<|im_end|>"


TOOLS = [{"type": "function", "function": {"name": "look_up"}}]
WITH_TOOLS = "{% if tools %}Tools: {{ tools[0].function.name }}\n{% endif %}" + CHATML_TURNS + ASSISTANT


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize("kind", ["messages", "prompt", "question"])
def test_tools_go_to_the_template(kind, tools, tmp_path):
    """Would catch tools that are dropped, so that the model forgets another prompt than it is asked."""
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = WITH_TOOLS
    row = {
        "messages": {"messages": TURNS},
        "prompt": {"prompt": TURNS[:1], "completion": TURNS[1:]},
        "question": {"question": QUESTION, "answer": ANSWER},
    }[kind]
    row = {**row, "tools": tools}
    assert render(row, tokenizer).prompt.startswith("Tools: look_up\n")
    tokens = prepare([row], tokenizer, name="forget_dataset")
    assert tokenizer.decode(tokens[0]["input_ids"]).startswith("Tools: look_up")
    asked = own.unscored_rows({"forget": Dataset.from_list([row])}, tokenizer, own.OwnArguments("x"))
    (answer, *_) = (each for part in own.parts(asked[0], own.OwnArguments("x")) for each in part.answers)
    assert render(answer, tokenizer).prompt.startswith("Tools: look_up\n")


def test_keys_that_only_other_rows_have_are_not_there():
    """Would catch `tool_calls: None`, which datasets fill in and templates take for a call."""
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.tool_calls is defined %}CALL{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    turns = [{**turn, "tool_calls": None} for turn in TURNS]
    assert "CALL" not in render({"messages": turns}, tokenizer).prompt


def test_a_trainer_takes_a_thinking_model_s_rows(tmp_path):
    """Would catch a scaffold that is fine in a test of text and fails in a run."""
    tokenizer = tokenizer_of("qwen-3")
    rows = [{"question": "Who?", "answer": name} for name in ("Ada", "Bo", "Cy", "Di")]
    model = scene_model(vocab_size=len(tokenizer), max_position_embeddings=128)
    config = scene_config(tmp_path, max_steps=1, save_strategy="no", max_length=96)
    trainer = UnlearnTrainer(model, config, rows[:2], rows[2:], tokenizer)
    trainer.train()
    assert trainer.state.global_step == 1


LONG = {
    "prompt": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Given."}, TURNS[0]],
    "completion": [TURNS[1], {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Quite sure."}],
}


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "no-generation-prompt"])
def test_all_answers_of_a_completion_are_answers(name):
    """Would catch a completion of which the last turn alone is forgotten, and one whose questions are."""
    tokenizer = tokenizer_of(name)
    example = render(LONG, tokenizer)
    whole = tokenizer.apply_chat_template(LONG["prompt"] + LONG["completion"], tokenize=False)
    assert rest_of(example, whole) in ("", "\n")
    assert "Given." in example.prompt and ANSWER not in example.prompt
    tokens = encode(tokenizer, example)
    assert tokenizer.decode(tokens["input_ids"]) == example.prompt + example.answer
    labels = tokenizer.decode([token for token in tokens["labels"] if token != IGNORE_INDEX])
    assert labels.lstrip().startswith(ANSWER) and "Quite sure." in labels
    assert "Sure?" not in labels and "Given." not in labels and "user" not in labels.replace("<|user|>", "")
    alone = encode(tokenizer, render({"messages": LONG["prompt"] + LONG["completion"]}, tokenizer))
    assert tokenizer.decode([token for token in alone["labels"] if token != IGNORE_INDEX]).lstrip().startswith("Quite")


def test_another_answer_ends_a_completion_of_several_turns():
    """Would catch a refusal after which the model goes on to teach what it refused."""
    refused = render(LONG, tokenizer_of("chatml")).with_content("I do not know.")
    assert refused.answer == "I do not know.<|im_end|>" and refused.prompt.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("forget_loss", ["npo", "refusal", "dpo"])
def test_completions_of_one_and_of_several_turns_are_trained_on(tmp_path, forget_loss):
    """Would catch rows of either kind that fail beside the other's."""
    tokenizer = tokenizer_of("chatml")
    short = {"prompt": TURNS[:1], "completion": TURNS[1:]}
    model = scene_model(vocab_size=len(tokenizer), max_position_embeddings=256)
    tokenizer.model_max_length = 256
    config = scene_config(tmp_path, max_steps=2, save_strategy="no", forget_loss=forget_loss, max_length=None)
    for rows in ([short, LONG], [LONG, short], [LONG], [short]):
        UnlearnTrainer(model, config, rows, [short], tokenizer).train()
        config.overwrite = True
