"""Adapters on one process: which parameters have state, what the reference is, and what is saved."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scenes import largest_difference, scene_model, scene_trainer, weights
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from soul_trainer.engines import find_soul


INPUTS = {"input_ids": torch.tensor([[3, 4, 5, 6]])}


def four_bit(folder):
    """The scene's model, its linear layers in 4 bits."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which quantizes to 4 bits")
    scene_model(hidden_size=64, intermediate_size=64).save_pretrained(folder)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized, device_map={"": "cpu"})
    return model.train()  # in evaluation, bitsandbytes changes to kernels for inference that round otherwise


def lora(**settings):
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora"])
def test_an_adapter_alone_has_state_is_its_own_reference_and_can_be_merged(tmp_path, kind):
    """
    Would catch states for frozen or quantized weights, a base model copied as reference, a reference that is trained,
    an adapter that is not trained, and a saved adapter that is not the trained one.
    """
    base = four_bit(tmp_path / "base") if kind == "qlora" else scene_model()
    before = base(**INPUTS).logits.detach().clone()
    trainer = scene_trainer(
        tmp_path / "run",
        base,
        trainer_arguments={"peft_config": lora(use_dora=kind == "dora")},
        forget_loss="ga",
        retain_loss="kl",
    )
    frozen = {name: weight for name, weight in weights(trainer.model).items() if "lora_" not in name}
    trainer.train()
    model, sophia = trainer.model, find_soul(trainer.optimizer)
    adapters = {name for name, parameter in model.named_parameters() if "lora_" in name}
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[parameter] for parameter in sophia.state} == adapters != set()
    assert any(state["hessian"].any() for state in sophia.state.values())
    after = weights(model)
    assert all(after[name].equal(weight) for name, weight in frozen.items())
    assert trainer.reference.kept is None and torch.equal(trainer.reference.outputs(INPUTS).logits, before)
    trained = model(**INPUTS).logits.detach()
    assert (trained - before).abs().max() > 1e-3
    trainer.save_model()
    fresh = four_bit(tmp_path / "base") if kind == "qlora" else scene_model()
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "run").train()
    assert torch.equal(loaded(**INPUTS).logits, trained)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    # Merging rounds the sum of two products; with 4 bits, the merged weight itself is rounded to one of 16 values.
    assert torch.allclose(again(**INPUTS).logits, trained, atol=0.5 if kind == "qlora" else 1e-5)


def test_an_adapter_on_top_of_another_is_refused(tmp_path):
    """Would catch two adapters of which one, or neither, is off when the reference is asked."""
    model = get_peft_model(scene_model(), lora())
    with pytest.raises(ValueError, match="`model` has an adapter already: leave `peft_config` out"):
        scene_trainer(tmp_path, model, trainer_arguments={"peft_config": lora()})


def test_tied_and_frozen_parameters_have_one_state_or_none(tmp_path):
    """Would catch a head that is stepped twice because it is the embedding too, and a frozen layer that moves."""
    model = scene_model(tie_word_embeddings=True, num_hidden_layers=2)
    model.get_submodule("model.layers.0").requires_grad_(False)
    before = weights(model)
    trainer = scene_trainer(tmp_path, model)
    trainer.train()
    sophia, after = find_soul(trainer.optimizer), weights(model)
    assert len(sophia.state) == sum(parameter.requires_grad for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert int(sophia.state[model.lm_head.weight]["step"]) == trainer.state.global_step
    frozen = [name for name in before if ".layers.0." in name]
    assert largest_difference({n: before[n] for n in frozen}, after) == 0 < largest_difference(before, after)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_learns_the_same(tmp_path, backend):
    """Would catch a refresh or a reference that a compiled forward sees with weights of another moment."""
    settings = {"forget_loss": "ga", "retain_loss": "kl", "max_steps": 4, "rho": 10.0, "eps": 1e-3}
    plain = scene_trainer(tmp_path / "plain", **settings)
    plain.train()
    compiled = scene_trainer(tmp_path / "compiled", torch_compile=True, torch_compile_backend=backend, **settings)
    compiled.train()
    # Fused kernels add in another order.
    assert largest_difference(weights(plain.model), weights(compiled.model)) < 1e-5
