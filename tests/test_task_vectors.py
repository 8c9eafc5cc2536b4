"""Task vectors: what is learnt of the rows to forget, and taken back when training ends."""

import pytest
import torch
from peft import LoraConfig
from scenes import logged, scene_model, scene_trainer, weights


def make_trainer(folder, model=None, peft_config=None, **settings):
    return scene_trainer(folder, model, {"peft_config": peft_config}, **settings)


def test_a_task_vector_is_subtracted_from_where_it_began(tmp_path):
    """Would catch a model that has learnt what it was to forget, or a vector taken from the last step alone."""
    learnt = scene_model()
    settings = {"retain_loss": "none", "optim": "adamw_torch"}
    make_trainer(tmp_path / "learnt", model=learnt, forget_loss="refusal", **settings)  # a trainer moves nothing
    negated = scene_model()
    start = weights(negated)
    trainer = make_trainer(tmp_path / "negated", model=negated, forget_loss="task_vector", **settings)
    seen = {}

    def keep(args, state, control, **kwargs):
        seen.update(weights(negated))

    trainer.callback_handler.callbacks[-1].on_train_end = keep
    trainer.args.task_vector_scale = 0.7
    trainer.train()
    losses = logged(trainer, "forget_loss")
    assert losses[-1] < losses[0], "it learns first"
    for name, value in weights(negated).items():
        torch.testing.assert_close(value, start[name] - 0.7 * (seen[name] - start[name]), rtol=1e-6, atol=1e-7)


def test_the_task_vector_of_an_adapter_is_the_product_of_its_matrices(tmp_path):
    """Would catch both factors negated, whose product is what it was."""
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(
        tmp_path, forget_loss="task_vector", retain_loss="none", peft_config=adapter, task_vector_scale=0.5
    )
    seen = {}

    def keep(args, state, control, **kwargs):
        seen.update(weights(trainer.model))

    trainer.callback_handler.callbacks[-1].on_train_end = keep
    trainer.train()
    after = weights(trainer.model)
    for name, value in seen.items():
        if "lora_A" in name:
            assert torch.equal(after[name], value)
            other = name.replace("lora_A", "lora_B")
            product, wanted = after[other] @ after[name], -0.5 * (seen[other] @ value)
            torch.testing.assert_close(product, wanted)
            assert wanted.abs().max() > 0


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"trainable_token_indices": [3, 4]}])
def test_an_adapter_that_is_more_than_a_product_is_refused(tmp_path, settings):
    """Would catch parts of an adapter that go on saying what was learnt, because they are in no product."""
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    with pytest.raises(ValueError, match="negates the product of a LoRA adapter's matrices"):
        make_trainer(tmp_path, forget_loss="task_vector", retain_loss="none", peft_config=adapter)


def test_a_task_vector_of_the_retain_rows_is_refused(tmp_path):
    """Would catch rows to retain that are learnt beside those to forget, and so forgotten with them."""
    with pytest.raises(ValueError, match="`retain_loss='nll'` would learn the rows to retain: choose none"):
        make_trainer(tmp_path, forget_loss="task_vector")
    make_trainer(tmp_path, forget_loss="task_vector", retain_loss="kl")
