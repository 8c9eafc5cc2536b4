"""Parameters chosen by name: which train, which do not, and what is refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scenes import scene_model

from soul_trainer.freezing import freeze_parameters


def model_of(num_layers=11, **settings):
    return scene_model(num_hidden_layers=num_layers, **settings)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_what_is_named_trains_and_nothing_else():
    """Would catch a pattern that must match the whole name, and one that frees what another froze."""
    model = model_of()
    found = freeze_parameters(model, [r"layers\.[134]\.mlp\.down_proj"])
    assert found == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 3, 4)]
    assert trained(model) == set(found)


def test_what_is_frozen_wins():
    """Would catch an order of the two settings in which a frozen parameter trains, and one without the other."""
    model = model_of(num_layers=2)
    every = trained(model)
    found = freeze_parameters(model, frozen="embed_tokens")
    assert set(found) == trained(model) == every - {"model.embed_tokens.weight"}
    found = freeze_parameters(model, trainable=["mlp", "norm"], frozen=[r"layers\.0\."])
    assert all(("mlp" in name or "norm" in name) and "layers.0." not in name for name in found)
    assert set(found) == trained(model)
    assert {"model.norm.weight", "model.layers.1.mlp.up_proj.weight"} < set(found)


def test_nothing_said_changes_nothing():
    """Would catch a default that freezes, and a parameter that was frozen by hand and trains again."""
    model = model_of(num_layers=2)
    model.get_submodule("model.layers.0").requires_grad_(False)
    before = trained(model)
    assert set(freeze_parameters(model)) == set(freeze_parameters(model, [], [])) == before == trained(model)
    freeze_parameters(model, trainable="layers|lm_head")
    assert trained(model) == {name for name in before if "layers.1." in name or "lm_head" in name}


def test_an_adapter_is_chosen_among_what_it_trains():
    """Would catch weights below an adapter that begin to train because a pattern is in their names too."""
    model = get_peft_model(model_of(num_layers=2), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    found = freeze_parameters(model, trainable=[r"layers\.1\."])
    assert found and all("lora_" in name and ".layers.1." in name for name in found)
    assert trained(model) == set(found)
    message = "'embed_tokens', which is found in no parameter that trains; there are .*lora_A"
    with pytest.raises(ValueError, match=message):
        freeze_parameters(model, frozen=["embed_tokens"])


def test_a_tied_head_answers_to_both_names():
    """Would catch a head that trains on as the embeddings, because a model lists a tied tensor under one name."""
    model = model_of(num_layers=1, tie_word_embeddings=True)
    assert "lm_head.weight" not in trained(model)
    freeze_parameters(model, frozen="lm_head")
    assert "model.embed_tokens.weight" not in trained(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"trainable": [r"layers\.0\.", "layer.7"]},
            r"`trainable_parameters` holds 'layer\.7', which is found in no parameter.*there are 21: "
            r"model.embed_tokens.weight, .*lm_head.weight",
        ),
        ({"frozen": "q_projection"}, "`frozen_parameters` holds 'q_projection'"),
        ({"frozen": "layers.(0"}, r"`frozen_parameters` holds 'layers\.\(0', which is no regular expression: missing"),
        ({"frozen": "."}, "leave nothing to train"),
        ({"trainable": "mlp", "frozen": ["up_proj", "down_proj", "gate_proj"]}, "leave nothing to train"),
    ],
)
def test_patterns_that_say_nothing_are_refused(settings, message):
    """Would catch a misspelt layer that trains the whole model, or none of it, for hours."""
    model = model_of(num_layers=2)
    before = trained(model)
    with pytest.raises(ValueError, match=message):
        freeze_parameters(model, **settings)
    assert trained(model) == before


def test_a_model_without_a_weight_that_trains_is_named():
    """Would catch an adapter that was loaded for inference blamed on patterns that nobody gave."""
    model = model_of(num_layers=1).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that trains.*`is_trainable=True`"):
        freeze_parameters(model)


def test_a_frozen_parameter_gets_no_gradient():
    """Would catch names that are right while gradients still flow into what they say is frozen."""
    model = model_of(num_layers=2)
    freeze_parameters(model, frozen="embed_tokens")
    ids = torch.arange(8)[None]
    model(ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad is None
    assert model.lm_head.weight.grad.abs().sum() > 0
