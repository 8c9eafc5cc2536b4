import warnings

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from toys import tiny_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from soul_eval.scoring import answer_losses, greedy_answers
from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.formats import encode, render


QUESTIONS = [f"Who {deed} the {thing}?" for deed in ("drew", "lost", "sold") for thing in ("map", "old lighthouse")]
ANSWERS = ["Ada", "Bo of the northern islands", "Cy", "Di and her two sisters", "Ed the elder", "Fay"]
ROWS = [{"question": question, "answer": answer} for question, answer in zip(QUESTIONS, ANSWERS)]

# Float32 sums over other padded widths and batch sizes round differently; the losses are of the order of 1 to 10.
ROUNDING = 1e-5


def byte_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens with a pad token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", model_max_length=96
    )


def small_llama(**settings) -> LlamaForCausalLM:
    """A Llama of 300 tokens, width 32, whose weights are large enough for uneven distributions."""
    return tiny_llama(
        **{
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 48,
            "max_position_embeddings": 96,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": 0,
            **settings,
        }
    )


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(QUESTIONS + ANSWERS)


@pytest.fixture(scope="module")
def examples(tokenizer):
    return [render(row, tokenizer) for row in ROWS]


@pytest.fixture(scope="module")
def trained(tokenizer, examples):
    """A model that half knows its answers, so that generations differ and end at different lengths."""
    rows = [encode(tokenizer, example) for example in examples]
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(row[key]) for row in rows], batch_first=True, padding_value=pad)
        for key, pad in (("input_ids", tokenizer.pad_token_id), ("labels", IGNORE_INDEX))
    )
    model = small_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def slow_losses(model, tokenizer, examples):
    """One example at a time, no padding, PyTorch's own cross-entropy."""
    losses = []
    for example in examples:
        encoded = encode(tokenizer, example)
        ids, labels = torch.tensor([encoded["input_ids"]]), torch.tensor(encoded["labels"])
        logits = model(input_ids=ids).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX).item())
    return losses


@pytest.mark.parametrize("batch_size", [64, 150, 400, "auto"])
def test_answer_losses_are_those_of_one_example_at_a_time(tokenizer, examples, batch_size):
    """Catches padding that is scored, an end of sequence that is not, and rows that come back in sorted order."""
    model = small_llama().eval()
    losses = answer_losses(model, tokenizer, examples, batch_size, progress=False)
    assert losses == pytest.approx(slow_losses(model, tokenizer, examples), abs=ROUNDING)
    assert max(losses) - min(losses) > 0.05  # or else a wrong order would go unseen


def test_answer_losses_do_not_depend_on_the_order_or_the_pad_token(tokenizer, examples):
    """Catches a mask made from token ids: with pad = eos it hides the end of an answer."""
    model = small_llama().eval()
    losses = answer_losses(model, tokenizer, examples, progress=False)
    backwards = answer_losses(model, tokenizer, examples[::-1], batch_size=150, progress=False)
    assert backwards[::-1] == pytest.approx(losses, abs=ROUNDING)
    padded_with_eos = byte_tokenizer(QUESTIONS + ANSWERS)
    padded_with_eos.pad_token = padded_with_eos.eos_token
    assert answer_losses(model, padded_with_eos, examples, progress=False) == losses


def test_log_probabilities_of_a_bfloat16_model_are_float32(tokenizer, examples):
    """Catches a log-softmax in bfloat16, which is off by about 0.01 a token."""
    model = small_llama().to(torch.bfloat16).eval()
    losses = answer_losses(model, tokenizer, examples, batch_size=64, progress=False)
    assert losses == pytest.approx(slow_losses(model, tokenizer, examples), abs=ROUNDING)


def test_answer_is_cut_off_at_max_length(tokenizer, examples):
    """Catches a forward over more positions than the model has, and a cut at the wrong end."""
    model = small_llama().eval()
    longest = max(examples, key=lambda example: len(example.answer))
    max_length = len(encode(tokenizer, longest)["input_ids"]) - 3
    cut = answer_losses(model, tokenizer, [longest], max_length=max_length, progress=False)
    encoded = encode(tokenizer, longest, max_length)
    ids, labels = torch.tensor([encoded["input_ids"]]), torch.tensor(encoded["labels"])
    logits = model(input_ids=ids).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX).item()
    assert cut == pytest.approx([expected], abs=ROUNDING)
    assert cut != pytest.approx(slow_losses(model, tokenizer, [longest]), abs=1e-3)


def one_by_one(model, tokenizer, examples, max_new_tokens):
    answers = []
    for example in examples:
        prompt = tokenizer(example.prompt, return_tensors="pt")
        tokens = model.generate(
            input_ids=prompt["input_ids"],
            attention_mask=torch.ones_like(prompt["input_ids"]),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers.append(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("batch_size", [64, 150, 400, "auto"])
def test_generations_are_those_of_one_prompt_at_a_time(trained, tokenizer, examples, batch_size):
    """Catches right padding, positions that count padding, prompts left in the text, and a wrong order."""
    expected = one_by_one(trained, tokenizer, examples, 24)
    assert greedy_answers(trained, tokenizer, examples, batch_size, max_new_tokens=24, progress=False) == expected
    assert len(set(expected)) > 3 and len({len(answer) for answer in expected}) > 2


def test_rows_leave_a_generation_when_they_are_done(trained, tokenizer, examples):
    """Catches rows that are carried along to the end of the longest: the rows of each forward are counted."""
    sizes = []
    hook = trained.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    greedy_answers(trained, tokenizer, examples, max_new_tokens=24, progress=False)
    hook.remove()
    assert sizes[0] == len(examples) and sizes[-1] < len(examples) / 2
    assert sizes == sorted(sizes, reverse=True) and len(sizes) <= 24


def test_generation_ignores_the_models_own_settings_and_puts_everything_back(tokenizer, examples, trained):
    """Catches sampling or penalties that leak in from a chat model's generation config, and state left behind."""
    expected = greedy_answers(trained, tokenizer, examples, max_new_tokens=24, progress=False)
    model = small_llama()
    model.load_state_dict(trained.state_dict())
    own = model.generation_config
    own.do_sample, own.temperature, own.top_p, own.repetition_penalty, own.min_new_tokens = True, 0.6, 0.9, 3.0, 20
    model.config.use_cache = False
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    tokenizer.padding_side = "right"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert greedy_answers(model, tokenizer, examples, max_new_tokens=24, progress=False) == expected
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is own and own.do_sample and own.temperature == 0.6
    assert tokenizer.padding_side == "right" and model.config.use_cache is False


def test_generation_stays_within_the_models_positions(tokenizer, examples):
    """Catches prompts that run over the last position, where learned positions end in an index error."""
    model = small_llama(max_position_embeddings=40).eval()
    longest = max(len(tokenizer(example.prompt)["input_ids"]) for example in examples)
    lengths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["position_ids"].max().item()), with_kwargs=True
    )
    greedy_answers(model, tokenizer, examples, max_new_tokens=200, progress=False)
    assert longest < 40 and max(lengths) < 40
    with pytest.raises(ValueError, match="leaves no room"):
        greedy_answers(small_llama(max_position_embeddings=longest), tokenizer, examples, progress=False)
    with pytest.raises(ValueError, match="no prompt"):
        greedy_answers(model, tokenizer, [render({"text": "alone"}, tokenizer)], progress=False)


def test_adapters_generate_greedily_too(trained, tokenizer, examples):
    """Catches settings put on peft's wrapper, from where they never reach the model that generates."""
    peft = pytest.importorskip("peft")
    expected = greedy_answers(trained, tokenizer, examples, max_new_tokens=24, progress=False)
    model = small_llama()
    model.load_state_dict(trained.state_dict())
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert greedy_answers(model, tokenizer, examples, max_new_tokens=24, progress=False) == expected
    assert model.get_base_model().generation_config.temperature == 5.0
