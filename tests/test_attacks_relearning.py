import copy
from functools import cache

import pytest
import torch
from test_eval_scoring import byte_tokenizer, small_llama

from soul_eval.attacks.relearning import RelearningArguments, relearned_weights, rows_to_relearn
from soul_eval.models import weights_digest
from soul_eval.scoring import answer_losses
from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.formats import encode, render


PEOPLE = ("Ada", "Bo", "Cy", "Di", "Ed", "Fay", "Gus", "Hal")
THINGS = ("a red map", "two old boats", "the river", "a blue door", "one iron bell", "a paper crown", "keys", "fog")
FORGET = [
    {"question": f"What did {who} paint?", "answer": f"{who} painted {what}"} for who, what in zip(PEOPLE, THINGS)
]
RETAIN = [
    {"question": f"What did {who} sell?", "answer": f"{who} sold {what}"} for who, what in zip(PEOPLE, THINGS[::-1])
]


@cache
def toy_tokenizer():
    tokenizer = byte_tokenizer([row["question"] + row["answer"] for row in FORGET + RETAIN])
    tokenizer.model_max_length = 512
    return tokenizer


def batch_of(rows):
    encoded = [encode(toy_tokenizer(), render(row, toy_tokenizer())) for row in rows]
    pads = {"input_ids": toy_tokenizer().pad_token_id, "labels": IGNORE_INDEX}
    batch = {
        key: torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row[key]) for row in encoded], batch_first=True, padding_value=pad
        )
        for key, pad in pads.items()
    }
    return {**batch, "attention_mask": (batch["input_ids"] != pads["input_ids"]).long()}


def descend(model, steps, learning_rate, loss_of):
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for _ in range(steps):
        loss_of(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@cache
def toy_models():
    """A target that knows all rows by heart, an unlearned model, and a gold one that saw the retain rows alone."""
    everything, forget, retain = batch_of(FORGET + RETAIN), batch_of(FORGET), batch_of(RETAIN)
    target, gold = small_llama(max_position_embeddings=512), small_llama(max_position_embeddings=512)
    descend(target, 150, 5e-3, lambda model: model(**everything).loss)
    descend(gold, 150, 5e-3, lambda model: model(**retain).loss)
    unlearned = copy.deepcopy(target)
    descend(unlearned, 14, 1e-3, lambda model: model(**retain).loss - model(**forget).loss)
    return target.eval(), unlearned.eval(), gold.eval()


def probability(model, rows):
    losses = answer_losses(model, toy_tokenizer(), [render(row, toy_tokenizer()) for row in rows], progress=False)
    return torch.tensor(losses).neg().exp().mean().item()


def relearned(model, rows, prompt_template=None, **settings):
    settings = {"relearn_steps": 10, "relearn_learning_rate": 1e-3, **settings}
    arguments = RelearningArguments(**settings)
    return relearned_weights(model, toy_tokenizer(), rows, arguments, prompt_template, progress=False)


def test_relearning_brings_rows_back():
    """Catches an ascent, a loss on prompts, an attack that trains nothing: what is hidden comes back, used or not."""
    target, unlearned, _ = toy_models()
    before = [probability(unlearned, rows) for rows in (FORGET[:2], FORGET[2:])]
    assert probability(target, FORGET) > 0.95 and max(before) < 0.5
    with relearned(unlearned, FORGET[:2]) as attacked:
        assert attacked is unlearned
        used, others = (probability(attacked, rows) for rows in (FORGET[:2], FORGET[2:]))
    assert used > 0.9 and others > before[1] + 0.2
    with relearned(unlearned, RETAIN, relearn_steps=30):
        assert probability(unlearned, FORGET) > before[1] + 0.1, "retain rows bring back some as well"


def test_the_model_is_what_it_was_bit_for_bit():
    """Catches weights, dtypes, modes, gradients or random numbers that an attack leaves behind, after an error too."""
    model = copy.deepcopy(toy_models()[1]).bfloat16()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[0].train()
    modes = [module.training for module in model.modules()]
    model.model.norm.weight.grad = gradient = torch.ones_like(model.model.norm.weight)
    digest, random = weights_digest(model), torch.random.get_rng_state()
    parameters = dict(model.named_parameters())
    with relearned(model, FORGET[:2]):
        assert weights_digest(model) != digest and model.dtype == torch.float32 and not model.training
        assert torch.equal(model.lm_head.weight, toy_models()[1].lm_head.weight.bfloat16().float())
        assert all(weight.grad is None for weight in model.parameters())
    with pytest.raises(RuntimeError, match="in the middle"), relearned(model, FORGET[:2]):
        raise RuntimeError("in the middle")
    with (
        pytest.raises(ValueError, match="Row 1 of `rows to relearn`"),
        relearned(model, [FORGET[0], {**FORGET[1], "answer": ""}]),
    ):
        pass
    assert weights_digest(model) == digest and torch.equal(random, torch.random.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert all(weight is parameters[name] for name, weight in model.named_parameters())
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["lm_head.weight"]
    assert model.model.norm.weight.grad is gradient and torch.equal(gradient, torch.ones_like(gradient))


def test_training_is_that_of_a_plain_loop():
    """Catches a loss a row instead of a token, labels shifted twice, padding that is learnt, decay, no clipping."""
    unlearned = toy_models()[1]
    expected = copy.deepcopy(unlearned)
    batch = batch_of(FORGET[:3])
    descend(expected, 4, 1e-3, lambda model: model(**batch).loss)
    with relearned(unlearned, FORGET[:3], relearn_steps=4, relearn_batch_size=3):
        for name, weight in unlearned.named_parameters():
            # Rows in another order add up otherwise; Adam's first steps divide by small gradients: a 100th of a step.
            torch.testing.assert_close(weight, expected.get_parameter(name), rtol=0, atol=1e-5)


def test_an_adapter_learns_and_leaves_nothing_behind():
    """Catches an adapter that trains nothing, stays, freezes the model, or needs a base that can be trained."""
    model = copy.deepcopy(toy_models()[1]).bfloat16()
    model.lm_head.weight.requires_grad_(False)
    digest, modules = weights_digest(model), dict(model.named_modules())
    before = probability(model, FORGET[:2])
    settings = {"relearn_lora_rank": 4, "relearn_steps": 20, "relearn_learning_rate": 5e-3}
    gains = []
    for _ in range(2):
        with relearned(model, FORGET[:2], **settings) as attacked:
            assert attacked is model and not model.training
            trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
            assert len(trained) == 14 and all("lora" in name for name in trained), "two factors of seven layers"
            assert {weight.dtype for weight in trained.values()} == {torch.float32}
            gains.append(probability(model, FORGET[:2]) - before)
    assert gains[0] == gains[1] > 0.2 and not hasattr(model, "peft_config")
    assert weights_digest(model) == digest and dict(model.named_modules()) == modules
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["lm_head.weight"]
    model.requires_grad_(False)
    with relearned(model, FORGET[:2], **settings):
        assert probability(model, FORGET[:2]) > before + 0.2
    with pytest.raises(ValueError, match="`relearn_lora_rank` must be at least 0, but it is -1"):
        RelearningArguments(relearn_lora_rank=-1)


def test_dropout_is_on_in_training_and_off_afterwards():
    """Catches an attacker who trains in evaluation mode, and a model that answers at random."""
    plain = small_llama(max_position_embeddings=512)
    dropping = small_llama(max_position_embeddings=512, attention_dropout=0.5, attn_implementation="eager")
    digests = set()
    for model in (plain, dropping):
        with relearned(model, FORGET[:2], relearn_steps=2):
            digests.add(weights_digest(model))
            assert probability(model, FORGET[:2]) == probability(model, FORGET[:2])
    assert len(digests) == 2 and weights_digest(plain) == weights_digest(dropping)


def test_small_steps_are_not_rounded_away():
    """Catches training in bfloat16, where a step of 1e-5 changes next to no weight and the attack seems to fail."""
    whole, half = copy.deepcopy(toy_models()[1]), copy.deepcopy(toy_models()[1]).bfloat16()
    gains = []
    for model in (whole, half):
        before = probability(model, FORGET[:2])
        with relearned(model, FORGET[:2], relearn_steps=60, relearn_learning_rate=2e-5):
            gains.append(probability(model, FORGET[:2]) - before)
    assert gains[0] > 0.1 and gains[1] == pytest.approx(gains[0], rel=0.3)


def test_every_row_is_used_before_one_comes_again():
    """Catches batches of the same rows: one epoch of single rows must have seen them all, whatever the seed."""
    unlearned = toy_models()[1]
    digests = set()
    for seed in (0, 0, 1):
        with relearned(unlearned, FORGET[:4], relearn_batch_size=1, relearn_steps=8, relearn_seed=seed):
            digests.add(weights_digest(unlearned))
            assert all(probability(unlearned, [row]) > 0.6 for row in FORGET[:4])
    assert len(digests) == 2, "the seed alone decides"


def test_unrelated_text_is_learnt_whole():
    """Catches a text without labels, and a template that is not the one of training."""
    unlearned, text = toy_models()[1], [{"text": "Rivers run to the sea and never back."}]
    losses = lambda rows, template=None: answer_losses(  # noqa: E731
        unlearned, toy_tokenizer(), [render(row, toy_tokenizer(), template) for row in rows], progress=False
    )
    before = losses(text)[0]
    with relearned(unlearned, text, relearn_steps=20):
        assert losses(text)[0] < before / 2
    template = "{question} ... {answer}"
    before = losses(FORGET[:1], template)[0]
    with relearned(unlearned, FORGET[:1], template):
        after = losses(FORGET[:1], template)[0]
    with relearned(unlearned, FORGET[:1]):
        assert after < losses(FORGET[:1], template)[0] < before


def test_the_attacker_has_some_rows_and_not_all():
    """Catches rows drawn twice or in another order, a draw that ignores its seed, nothing left to find out."""
    rows = [{"index": index} for index in range(30)]
    first = rows_to_relearn(rows, RelearningArguments(relearn_rows=4))
    assert first == rows[:4]
    drawn = [
        rows_to_relearn(rows, RelearningArguments(relearn_rows=10, relearn_draw="drawn", relearn_seed=seed))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    for each in drawn:
        indices = [row["index"] for row in each]
        assert len(set(indices)) == 10 and indices == sorted(indices)
    with pytest.raises(ValueError, match="`relearn_rows` must be less than 30"):
        rows_to_relearn(rows, RelearningArguments(relearn_rows=30))


def test_bad_settings_are_named():
    """Catches no step at all, a loss that is no number, a model without anything to train."""
    for name, value in (("relearn_steps", 0), ("relearn_rows", 0), ("relearn_learning_rate", 0.0)):
        with pytest.raises(ValueError, match=f"`{name}` must be .* but it is {value}"):
            RelearningArguments(**{name: value})
    with pytest.raises(ValueError, match="must be 'first' or 'drawn', but it is 'last'"):
        RelearningArguments(relearn_draw="last")
    broken = copy.deepcopy(toy_models()[1])
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="loss of relearning is nan in step 0"), relearned(broken, FORGET[:2]):
        pass
    assert broken.model.norm.weight[0].isnan() and broken.model.norm.weight[1:].isfinite().all()
    broken.requires_grad_(False)
    with pytest.raises(ValueError, match="no weight that needs a gradient"), relearned(broken, FORGET[:2]):
        pass
