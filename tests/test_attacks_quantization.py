import logging

import pytest
import torch
from test_eval_scoring import small_llama
from transformers import GPT2Config, GPT2LMHeadModel

from soul_eval.attacks.quantization import load_quantized, round_to_nearest, rounded_weights
from soul_eval.models import load_model, weights_digest


def slow_rounding(weight, bits, group_size):
    """Number by number, in Python's own float64."""
    most = 2 ** (bits - 1) - 1
    result = []
    for output in weight.tolist():
        row = []
        for start in range(0, len(output), group_size or len(output)):
            group = output[start : start + (group_size or len(output))]
            scale = max(abs(number) for number in group) / most
            row += [scale * round(number / scale) if scale else 0.0 for number in group]
        result.append(row)
    return torch.tensor(result)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [None, 1, 8, 7, 100])
def test_rounding_is_what_a_slow_loop_does(bits, group_size):
    """Catches scales of inputs instead of outputs, groups across outputs, a lost last group, 2**bits levels."""
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 5)[:, None]
    weight[1, :9] = 0
    weight[2] = 0
    found = round_to_nearest(weight, bits, group_size)
    # Float32 keeps 2**-24 of a number; a quotient, a product and a conversion.
    torch.testing.assert_close(found, slow_rounding(weight, bits, group_size), rtol=4 * 2**-24, atol=0)


def test_rounding_in_closed_form():
    """Catches a scale by 2**(bits - 1), ties that go away from zero, and a sign that is lost."""
    weight = torch.tensor([[7.0, 2.5, -2.5, 3.5, -0.5, 0.4, -6.6]])
    assert round_to_nearest(weight, 4).tolist() == [[7.0, 2.0, -2.0, 4.0, 0.0, 0.0, -7.0]]
    assert round_to_nearest(weight / 7, 2).tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]]
    # The error is at most half a step, and even over the step for even weights: its mean square is step**2 / 12.
    weight = torch.rand(1, 100_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for bits in (4, 8, 16):
        step = weight.abs().max() / (2 ** (bits - 1) - 1)
        error = round_to_nearest(weight, bits) - weight
        # Numbers up to 1 are 2**-24 apart in float32.
        assert error.abs().max() <= step / 2 + 2**-23
        assert error.square().mean() == pytest.approx(step.item() ** 2 / 12, rel=0.02)
    # A group of one is its own scale.
    torch.testing.assert_close(round_to_nearest(weight, 4, 1), weight, rtol=4 * 2**-24, atol=0)


def test_rounding_keeps_the_dtype():
    """Catches scales in bfloat16, which are off by a 256th."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = round_to_nearest(weight, 8)
    assert found.dtype == torch.bfloat16 and torch.equal(found, round_to_nearest(weight.float(), 8).bfloat16())


def test_arguments_out_of_range_are_refused():
    """Catches one bit, which has no level but zero, and groups of nothing."""
    for bits in (1, 25):
        with pytest.raises(ValueError, match=f"`bits` must be 2 to 24, but it is {bits}"):
            round_to_nearest(torch.ones(1, 1), bits)
    with pytest.raises(ValueError, match="`group_size` must be at least 1, but it is 0"):
        round_to_nearest(torch.ones(1, 1), 4, 0)


def names_of_changed(model, **settings):
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with rounded_weights(model, 4, 8, **settings) as rounded:
        assert rounded is model
        changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
        for name in changed:
            expected = round_to_nearest(before[name], 4, 8)
            is_transposed = isinstance(model, GPT2LMHeadModel)
            assert torch.equal(
                model.get_parameter(name), round_to_nearest(before[name].T, 4, 8).T if is_transposed else expected
            )
    return changed


def test_linear_layers_alone_are_rounded():
    """Catches rounded norms and embeddings, a head rounded unasked, an embedding rounded through its tie."""
    model = small_llama()
    layers = {name for name, _ in model.named_parameters() if "proj" in name}
    assert len(layers) == 7 and names_of_changed(model) == layers
    assert names_of_changed(model, include_head=True) == layers | {"lm_head.weight"}
    tied = small_llama(tie_word_embeddings=True)
    assert names_of_changed(tied, include_head=True) == layers
    # GPT-2 stores its layers with the inputs first.
    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    changed = names_of_changed(GPT2LMHeadModel(config))
    assert {name.rpartition(".h.0.")[2] for name in changed} == {
        *("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    }


def test_weights_come_back_bit_for_bit():
    """Catches a model left rounded, after an error too, and gradients or tied weights lost on the way."""
    model = small_llama(tie_word_embeddings=True).bfloat16()
    before, pointers = weights_digest(model), [weight.data_ptr() for weight in model.parameters()]
    with rounded_weights(model, 4):
        assert weights_digest(model) != before and torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="in the middle"), rounded_weights(model, 3):
        raise RuntimeError("in the middle")
    assert weights_digest(model) == before and [weight.data_ptr() for weight in model.parameters()] == pointers
    assert all(weight.requires_grad for weight in model.parameters())


def test_many_bits_change_nearly_nothing():
    """Catches a model that is damaged by more than its rounding."""
    model, ids = small_llama().eval(), torch.arange(40).view(2, 20)
    with torch.no_grad():
        whole = model(ids).logits
        errors = []
        for bits in (4, 8, 16):
            with rounded_weights(model, bits):
                errors.append((model(ids).logits - whole).abs().max().item())
    # Each further bit halves the step; logits are of the order of 1 to 10.
    assert errors[2] < 1e-3 and errors[1] < errors[0] / 4 and errors[2] < errors[1] / 64


def test_weights_in_no_layer_are_counted(caplog):
    """Catches a mixture of experts whose experts stay whole, and nobody is told."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    with caplog.at_level(logging.WARNING), rounded_weights(model, 4):
        assert not caplog.text
    model.experts = torch.nn.Parameter(torch.ones(2, 3, 4))
    with caplog.at_level(logging.WARNING), rounded_weights(model, 4):
        assert "24 weights of the model are in no linear layer" in caplog.text


def test_models_that_cannot_be_rounded_are_refused():
    """Catches an adapter whose factors are rounded instead of their sum, and a model without a layer."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(small_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="`merge_and_unload` it first"), rounded_weights(adapted, 4):
        pass
    with pytest.raises(ValueError, match="no linear layer"), rounded_weights(torch.nn.LayerNorm(3), 4):
        pass


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """Of a width that bitsandbytes' groups of 64 divide."""
    folder = tmp_path_factory.mktemp("wide")
    small_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_loads_fewer_bits(wide_model, bits):
    """Catches a quantization that is asked for and not done, and one of something else than this model."""
    pytest.importorskip("bitsandbytes")
    whole, ids = load_model(wide_model, "cpu"), torch.arange(40).view(2, 20)
    quantized = load_quantized(wide_model, bits, "cpu")
    kinds = {type(module).__name__ for name, module in quantized.named_modules() if "proj" in name}
    assert kinds == {f"Linear{bits}bit" + ("Lt" if bits == 8 else "")}
    assert type(quantized.lm_head) is torch.nn.Linear and not quantized.training
    with torch.no_grad():
        difference = (quantized(ids).logits - whole(ids).logits).abs().mean() / whole(ids).logits.abs().mean()
    # Random weights of few layers: 8 bits lose about a hundredth, 4 bits about a tenth.
    assert 0 < difference < (0.1 if bits == 8 else 0.6)
    with pytest.raises(ValueError, match="quantized already"), rounded_weights(quantized, 4):
        pass


def test_bitsandbytes_merges_an_adapter_first(wide_model, tmp_path):
    """Catches an adapter that stays in full precision on a quantized base model, which nobody attacked."""
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        load_model(wide_model, "cpu"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    quantized = load_quantized(str(tmp_path / "adapter"), 8, "cpu")
    assert not any("lora" in name for name, _ in quantized.named_modules())
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = load_quantized(str(tmp_path / "merged"), 8, "cpu")
    assert weights_digest(quantized) == weights_digest(merged)
    with pytest.raises(ValueError, match="`bits` must be 4 or 8 with bitsandbytes, but it is 3"):
        load_quantized(wide_model, 3)
