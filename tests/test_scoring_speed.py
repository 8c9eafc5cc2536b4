"""What makes scoring fast must not change what it finds: shared prompts, batches of tokens, rows that leave."""

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from test_eval_scoring import ANSWERS, QUESTIONS, byte_tokenizer, one_by_one, slow_losses, small_llama
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from soul_eval.scoring import answer_losses, check_batch_size, greedy_answers, score_answers
from soul_eval.scoring.batches import Unit, can_continue, token_batches
from soul_trainer.formats import encode, render


# Float32 sums in another order; losses are of the order of 1 to 10.
ROUNDING = 2e-5
SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ENDS = {"bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.2}


def architectures():
    """Models that keep keys and values, in two ways, and models that do not."""
    torch.manual_seed(0)
    mistral = MistralConfig(
        **SIZES, **ENDS, intermediate_size=48, num_key_value_heads=1, sliding_window=8, max_position_embeddings=96
    )
    gpt2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 96}
    opt = OPTConfig(
        **SIZES, ffn_dim=48, max_position_embeddings=96, word_embed_proj_dim=32, init_std=0.2, pad_token_id=1
    )
    opt.bos_token_id, opt.eos_token_id = None, 0
    return {
        "llama": (small_llama(), True),
        "sliding window": (MistralForCausalLM(mistral), True),
        "learned positions": (GPT2LMHeadModel(GPT2Config(**gpt2, **ENDS)), True),
        "offset positions": (OPTForCausalLM(opt), True),
        "alibi": (BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=2, **ENDS)), False),
        "recurrent": (
            MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, **ENDS)),
            False,
        ),
    }


@pytest.fixture(scope="module")
def models():
    return {name: (model.eval(), continues) for name, (model, continues) in architectures().items()}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(QUESTIONS + ANSWERS)


@pytest.fixture(scope="module")
def examples(tokenizer):
    """Prompts of different lengths, some with one answer and some with several, not side by side."""
    pairs = [(question, answer) for question in QUESTIONS[:4] for answer in ANSWERS] + [(QUESTIONS[4], "alone")]
    pairs = pairs[::2] + pairs[1::2]
    return [render({"question": question, "answer": answer}, tokenizer) for question, answer in pairs]


@pytest.mark.parametrize(
    "name", ["llama", "sliding window", "learned positions", "offset positions", "alibi", "recurrent"]
)
def test_all_architectures_score_and_generate_as_row_by_row(models, tokenizer, examples, name):
    """Catches positions that count padding, a cache of the wrong row, a window that slides over a shared prompt."""
    model, continues = models[name]
    assert can_continue(model) == continues
    for batch_size in (100, "auto"):
        losses = answer_losses(model, tokenizer, examples, batch_size, progress=False)
        assert losses == pytest.approx(slow_losses(model, tokenizer, examples), abs=ROUNDING)
        texts = greedy_answers(model, tokenizer, examples[:9], batch_size, max_new_tokens=12, progress=False)
        assert texts == one_by_one(model, tokenizer, examples[:9], 12)


def test_shared_prompts_are_computed_once(tokenizer, examples):
    """Catches sharing that is given up without a word: the tokens that go through the model are counted."""
    model = small_llama().eval()
    counted = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: counted.append(int(kwargs["input_ids"].numel())), with_kwargs=True
    )
    answer_losses(model, tokenizer, examples, progress=False)
    whole = sum(len(encode(tokenizer, example)["input_ids"]) for example in examples)
    assert sum(counted) < 0.8 * whole


def test_details_are_those_of_the_whole_distribution(tokenizer, examples):
    """Catches moments over the wrong distribution, hits shifted by a token, and details that depend on the batch."""
    model = small_llama().eval()
    scores = dict(score_answers(model, tokenizer, examples, 200, details=True, progress=False))
    for place, example in enumerate(examples):
        encoded = encode(tokenizer, example)
        num_answer = sum(label != -100 for label in encoded["labels"])
        logits = model(input_ids=torch.tensor([encoded["input_ids"]])).logits[0, -num_answer - 1 : -1].double()
        labels = torch.tensor(encoded["input_ids"][-num_answer:])
        log_probs, probs = logits.log_softmax(-1), logits.softmax(-1)
        own = log_probs.gather(1, labels[:, None])[:, 0]
        mean = (probs * log_probs).sum(1)
        deviation = ((probs * log_probs**2).sum(1) - mean**2).sqrt()
        assert scores[place].log_probs == pytest.approx(own.tolist(), abs=1e-4)
        assert scores[place].hits == (logits.argmax(-1) == labels).tolist()
        assert scores[place].z_scores == pytest.approx(((own - mean) / deviation).tolist(), abs=1e-3)
    plain = dict(score_answers(model, tokenizer, examples, progress=False))
    assert plain[3].z_scores is None and plain[3].nll == pytest.approx(scores[3].nll, abs=ROUNDING)


def test_batches_keep_to_their_budget():
    """Catches a budget of rows, padding that is not counted, a unit that is lost and one that is too long for any."""
    units = [Unit(index, 10 + index % 7, 1 + index % 5, 3 + index % 11) for index in range(60)] + [
        Unit(60, 900, 1, 99)
    ]
    batches = list(token_batches(units, 200))
    assert sorted(index for batch in batches for index in batch) == list(range(61))
    assert batches[0] == [60]
    for batch in batches[1:]:
        members = [units[index] for index in batch]
        prefix, suffix = max(unit.prefix for unit in members), max(unit.suffix for unit in members)
        assert len(members) * prefix + sum(unit.rows for unit in members) * suffix <= 200
    assert len(batches) < 61


@pytest.mark.parametrize("kind, limit", [("losses", 12), ("generations", 5)])
def test_a_batch_that_does_not_fit_is_halved(tokenizer, examples, kind, limit):
    """Catches a run that ends at the first batch too many, and rows that are lost or doubled when it is halved."""
    model = small_llama().eval()
    sizes = []

    def no_memory(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("as a GPU says")

    def ask():
        if kind == "losses":
            return answer_losses(model, tokenizer, examples, progress=False)
        return greedy_answers(model, tokenizer, examples, max_new_tokens=6, progress=False)

    expected = ask()
    model.register_forward_pre_hook(no_memory, with_kwargs=True)
    found = ask()
    assert found == (pytest.approx(expected, abs=ROUNDING) if kind == "losses" else expected)
    assert max(sizes) > limit
    limit = 0  # no row fits
    with pytest.raises(torch.OutOfMemoryError):
        ask()


@pytest.mark.parametrize("value", [32, "32", "many", 0])
def test_a_batch_size_in_rows_is_refused(value):
    """Catches 32 rows read as 32 tokens, which would run for hours."""
    with pytest.raises(ValueError, match="`batch_size` (counts tokens|must be a number of tokens)"):
        check_batch_size(value)
    assert check_batch_size("auto") == "auto" and check_batch_size("4096") == 4096


def test_padding_keeps_within_the_models_positions(models, tokenizer):
    """Catches a long prompt beside a long answer whose padding asks for a position that the model does not have."""
    long_prompt, long_answer = "Who " + "drew the map " * 14 + "?", "Bo " + "and her sisters " * 8
    rows = [(long_prompt, "Ada"), (long_prompt, "Bo"), ("Who?", long_answer), ("Who?", "Cy")]
    examples = [render({"question": question, "answer": answer}, tokenizer) for question, answer in rows]
    model, _ = models["learned positions"]
    lengths = [len(encode(tokenizer, example)["input_ids"]) for example in examples]
    assert max(lengths) <= 96 < max(lengths[:2]) + max(lengths[2:]) - 20
    losses = answer_losses(model, tokenizer, examples, 2000, progress=False)
    assert losses == pytest.approx(slow_losses(model, tokenizer, examples), abs=ROUNDING)


def test_the_room_for_an_answer_is_its_own(models, tokenizer):
    """Catches an answer that is cut off earlier because a longer prompt is in the batch, or was before a resume."""
    model, _ = models["learned positions"]
    examples = [
        render({"question": question, "answer": "Ada"}, tokenizer) for question in ("Who?", "Who " + "drew it " * 12)
    ]
    together = greedy_answers(model, tokenizer, examples, max_new_tokens=90, progress=False)
    alone = [greedy_answers(model, tokenizer, [each], max_new_tokens=90, progress=False)[0] for each in examples]
    assert together == alone and len(together[0]) > len(together[1])


def test_learnt_prompts_are_not_shared(tokenizer, examples):
    """Catches keys of ours that peft replaces by those of its own prompt, without a word."""
    settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(small_llama(), settings).eval()
    assert not can_continue(model)
    together = answer_losses(model, tokenizer, examples[:6], progress=False)
    alone = [answer_losses(model, tokenizer, [example], progress=False)[0] for example in examples[:6]]
    assert together == pytest.approx(alone, abs=ROUNDING)


def test_the_end_of_a_turn_is_no_answer():
    """Catches hits on what ends every turn, and on the newline that a chat template writes behind it."""
    tokenizer = byte_tokenizer(QUESTIONS + ANSWERS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}<|eot|>\n{% endfor %}"
    model = small_llama().eval()
    model.resize_token_embeddings(len(tokenizer))
    row = render({"question": "Who?", "answer": "Ada"}, tokenizer)
    (score,) = (score for _, score in score_answers(model, tokenizer, [row], progress=False))
    own = len(tokenizer("Ada", add_special_tokens=False)["input_ids"])
    assert len(score.log_probs) == own + 1 and len(score.content.hits) == own
    text = render({"text": "the old lighthouse"}, byte_tokenizer(QUESTIONS + ANSWERS))
    (score,) = (score for _, score in score_answers(small_llama().eval(), tokenizer, [text], progress=False))
    assert len(score.content.log_probs) == len(tokenizer("the old lighthouse")["input_ids"]) - 1
