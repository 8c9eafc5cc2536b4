"""Where the update goes, in the names that model families give their parts."""

import pytest
from toys import tiny_llama
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from soul_trainer.curvature import update_shares


def llama():
    model = tiny_llama(num_hidden_layers=2, vocab_size=11, hidden_size=8, intermediate_size=12)
    return model, {"embeddings": 88, "head": 88, "attention": 2 * 4 * 64, "mlp": 2 * 3 * 96, "other": 5 * 8}


def gpt2():
    config = GPT2Config(
        vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2, n_inner=12, bos_token_id=1, eos_token_id=2
    )
    blocks = {"attention": 2 * (8 * 24 + 24 + 64 + 8), "mlp": 2 * (96 + 12 + 96 + 8)}
    return GPT2LMHeadModel(config), {"embeddings": (11 + 16) * 8, "head": 0, **blocks, "other": 5 * 16}


def opt():
    config = OPTConfig(
        vocab_size=11,
        hidden_size=8,
        word_embed_proj_dim=8,
        ffn_dim=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    blocks = {"attention": 2 * 4 * (64 + 8), "mlp": 2 * (96 + 12 + 96 + 8)}
    return OPTForCausalLM(config), {"embeddings": (11 + 16 + 2) * 8, "head": 88, **blocks, "other": 5 * 16}


def gpt_neox():
    config = GPTNeoXConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
    )
    blocks = {"attention": 2 * (8 * 24 + 24 + 64 + 8), "mlp": 2 * (96 + 12 + 96 + 8)}
    return GPTNeoXForCausalLM(config), {"embeddings": 88, "head": 88, **blocks, "other": 5 * 16}


def falcon():
    config = FalconConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_kv_heads=2,
        new_decoder_architecture=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    blocks = {"attention": 2 * (8 * 24 + 64), "mlp": 2 * 2 * 8 * 32}
    return FalconForCausalLM(config), {"embeddings": 88, "head": 0, **blocks, "other": 5 * 16}


@pytest.mark.parametrize("make_model", [llama, gpt2, opt, gpt_neox, falcon])
def test_update_shares_count_each_part_of_the_model(make_model):
    """Catches a norm that counts as attention, a head as embeddings, a family whose names are not known."""
    model, sizes = make_model()
    shares = update_shares({name: float(p.numel()) for name, p in model.named_parameters()})
    largest = max(p.numel() for p in model.parameters())
    total = sum(sizes.values())
    assert shares.pop("largest_tensor") == pytest.approx(largest / total)
    assert shares == pytest.approx({part: size / total for part, size in sizes.items()})
    assert sum(shares.values()) == pytest.approx(1.0)


def test_update_shares_weigh_the_squares():
    """Catches shares of parameters instead of shares of the squared update, and a division by zero before any."""
    shares = update_shares({"embed": 3.0, "lm_head": 1.0})
    assert (shares["embeddings"], shares["head"], shares["largest_tensor"]) == (0.75, 0.25, 0.75)
    assert set(update_shares({"embed": 0.0, "lm_head": 0.0}).values()) == {0.0}
