"""Instruct models of several families, tiny and random, with chat templates that behave as the families' own do."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from soul_eval.scoring import answer_losses, greedy_answers
from soul_trainer import UnlearnConfig, UnlearnTrainer
from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.collator import UnlearnCollator
from soul_trainer.formats import prepare, render


NAMES = ("Mara", "Bo", "Ines", "Otto", "Yuki", "Omar", "Lena", "Raj")
ROWS = [
    {"question": f"where was {name} born ?", "answer": f"{name} was born in town {place} ."}
    for place, name in enumerate(NAMES)
]
FORGET, RETAIN = ROWS[:3], ROWS[3:]

# As in each family: the header of a turn, what ends it, and what the generation prompt is.
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN_3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
FAMILIES = {
    "llama-3": (
        LlamaForCausalLM,
        LlamaConfig,
        LLAMA_3,
        "<|end_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "qwen-3": (Qwen3ForCausalLM, Qwen3Config, QWEN_3, "<|endoftext|>", ["<|im_start|>", "<|im_end|>"]),
    "gemma-3": (Gemma3ForCausalLM, Gemma3TextConfig, GEMMA_3, "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "mistral": (MistralForCausalLM, MistralConfig, MISTRAL, "</s>", ["[INST]", "[/INST]"]),
}


def family(name):
    """A model and a tokenizer of the family; its end of a turn is not its end of a text, but for Mistral."""
    kind, config, template, eos, controls = FAMILIES[name]
    words = sorted({word for row in ROWS for word in (row["question"] + " " + row["answer"]).split()})
    words += ["user", "assistant", "model", "\n", "\n\n"]
    vocabulary = {word: place for place, word in enumerate(["<unk>", "<bos>", eos, *controls, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n\n", "isolated"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(" ", "removed"),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token=eos,
        pad_token=eos,
        additional_special_tokens=controls,
        model_max_length=64,
    )
    tokenizer.chat_template = template
    extra = {"head_dim": 8} if name in ("qwen-3", "gemma-3") else {}
    torch.manual_seed(0)
    return kind(config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **SIZE, **extra)), tokenizer


def taught(model, tokenizer):
    """The model once it says every answer by heart."""
    rows = prepare(ROWS, tokenizer).select_columns(["input_ids", "labels", "row"]).to_list()
    batch = UnlearnCollator.for_tokenizer(tokenizer)([{"forget": row} for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(400):
        output = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if output.loss < 0.01:
            break
    return model.eval()


def probability(model, tokenizer, rows):
    losses = answer_losses(model.eval(), tokenizer, [render(row, tokenizer) for row in rows], progress=False)
    return float(torch.tensor(losses).neg().exp().mean())


@pytest.mark.parametrize("name", FAMILIES)
def test_an_instruct_model_forgets_by_defaults_and_keeps(name, tmp_path):
    """Would catch labels off the answer, generation past a turn's end, and a model class that cannot take a step."""
    model, tokenizer = family(name)
    examples = [render(row, tokenizer) for row in ROWS]
    rows = prepare(ROWS, tokenizer)
    said = tokenizer.decode([label for label in rows[0]["labels"] if label != IGNORE_INDEX])
    assert said.startswith(ROWS[0]["answer"].split()[0]) and "user" not in said and "where" not in said
    taught(model, tokenizer)
    answers = greedy_answers(model, tokenizer, examples, max_new_tokens=20, progress=False)
    assert answers == [row["answer"] for row in ROWS]
    before = [probability(model, tokenizer, part) for part in (FORGET, RETAIN)]
    args = UnlearnConfig(
        str(tmp_path),
        max_steps=40,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    UnlearnTrainer(model, args, FORGET, RETAIN, tokenizer).train()
    after = [probability(model, tokenizer, part) for part in (FORGET, RETAIN)]
    assert after[0] < 0.4 * before[0] and after[1] > 0.9 * before[1]
