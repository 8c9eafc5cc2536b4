"""Models with a vision or audio tower beside the language model: text must neither train nor change the tower."""

import pytest
import torch
from peft import LoraConfig
from scenes import largest_difference, scene_tokenizer, scene_trainer, weights
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)


WORDS = len(scene_tokenizer())
SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
TEXT = {**SIZE, "vocab_size": WORDS + 2, "num_hidden_layers": 3, "num_key_value_heads": 2}
TEXT |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {**SIZE, "num_hidden_layers": 9, "image_size": 8, "patch_size": 4}
AUDIO = {"d_model": 16, "encoder_layers": 9, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 8}
MODELS = {
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**VISION), image_token_index=WORDS + 1
        )
    ),
    "smolvlm": lambda: SmolVLMForConditionalGeneration(
        SmolVLMConfig(text_config=LlamaConfig(**TEXT), vision_config=VISION, image_token_id=WORDS + 1)
    ),
    "qwen2_audio": lambda: Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(text_config=Qwen2Config(**TEXT), audio_config=AUDIO, audio_token_index=WORDS + 1)
    ),
}


@pytest.fixture(params=MODELS)
def model(request):
    """A model of several parts."""
    torch.manual_seed(0)
    return MODELS[request.param]()


def is_of_text(name: str) -> bool:
    """Whether a parameter is the language model's."""
    return any(part in name for part in ("language_model", "text_model", "lm_head"))


def test_rmu_trains_the_language_model_s_layers_alone(tmp_path, model):
    """Would catch a vision tower's MLPs that RMU's default pattern takes for those of the language model."""
    scene_trainer(tmp_path, model, forget_loss="rmu", rmu_layer=2)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 3 and all(map(is_of_text, trained))


def test_rmu_refuses_a_layer_that_only_the_tower_has(tmp_path, model):
    """Would catch a layer of the vision tower that is trained, without effect, in the place of a missing one."""
    with pytest.raises(ValueError, match="forget_loss='rmu' trains down projections of `rmu_layer`=8"):
        scene_trainer(tmp_path, model, forget_loss="rmu", rmu_layer=8)


def test_rmu_refuses_a_tower_that_it_cannot_tell_from_the_language_model(tmp_path):
    """Would catch a model of one configuration that has its vision tower among its layers, as Phi-4-multimodal has."""
    model = MODELS["llava"]()
    model.model.language_model.seer = model.model.vision_tower
    with pytest.raises(ValueError, match="2 stacks of layers: .*language_model.*Name the parameters in"):
        scene_trainer(tmp_path, model, forget_loss="rmu", rmu_layer=2)


def test_a_penalty_of_all_weights_leaves_the_tower_alone(tmp_path, model):
    """Would catch an L1 penalty that shrinks a vision tower which no row of text reaches."""
    before = weights(model)
    scene_trainer(tmp_path, model, l1_weight=1e-2, max_steps=1).train()
    after = weights(model)
    assert largest_difference(before, after) > 0
    for name in before:
        assert is_of_text(name) or torch.equal(before[name], after[name]), name


def test_an_adapter_of_all_parts_counts_where_text_reaches_it(tmp_path):
    """Would catch a default learning rate that counts the adapters of a vision tower, which never move."""
    rates = []
    for targets in (["q_proj", "v_proj"], r".*language_model.*\.(q_proj|v_proj)"):
        adapter = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
        made = {"trainer_arguments": {"peft_config": adapter}, "rule": "diagonal", "learning_rate": None}
        rates.append(scene_trainer(tmp_path, MODELS["llava"](), **made).args.learning_rate)
    assert rates[0] == rates[1]
