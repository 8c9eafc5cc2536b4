"""Weight masks in training: what is held still, and what a resumed run goes on with."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from scenes import largest_difference, scene_model, scene_trainer, weights

from soul_trainer.attribution import MASK_FILE


MASK = {"weight_mask": "wagle", "weight_mask_share": 0.5, "wagle_curvature": 1e-3}


def mask_of(trainer):
    """Which weights train, by name."""
    callback = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "MaskCallback")
    return {name: ~frozen for name, frozen in zip(weights(trainer.model), callback.mask.frozen, strict=True)}


@pytest.mark.parametrize(
    "settings",
    [
        {"forget_loss": "npo", "weight_decay": 0.1},
        {"forget_loss": "ga", "retain_loss": "kl", "optim": "adamw_torch", "weight_decay": 0.1},
        {"forget_loss": "refusal", "max_grad_norm": 0, "hessian_data": "both", "sam_radius": 0.1},
    ],
    ids=["npo-soul", "ga-adamw", "refusal-sam"],
)
def test_masked_weights_stay_bit_for_bit_under_any_optimizer_and_objective(tmp_path, settings):
    """Would catch masked gradients alone, behind which momentum and weight decay still move weights."""
    before = weights(scene_model())
    trainer = scene_trainer(tmp_path, scene_model(), **settings, **MASK)
    trainer.train()
    after, trains = weights(trainer.model), mask_of(trainer)
    moved = {name: after[name] != before[name] for name in before}
    assert not any((moved[name] & ~trains[name]).any() for name in before)
    num_trained, num_weights = (sum(int(part.sum()) for part in parts.values()) for parts in (trains, moved))
    assert sum(part.numel() for part in trains.values()) == 2 * num_trained
    assert num_weights > 0.95 * num_trained


def test_the_mask_does_not_depend_on_batches(tmp_path):
    """Would catch gradients that are means of means, and rows that a smaller batch leaves out."""
    masks = []
    for size in (1, 3):
        trainer = scene_trainer(tmp_path / str(size), per_device_train_batch_size=size, max_steps=1, **MASK)
        trainer.train()
        masks.append(mask_of(trainer))
    differing = sum(int((masks[0][name] != masks[1][name]).sum()) for name in masks[0])
    assert differing <= 2  # two weights whose scores are one but for rounding may change places at the threshold


@pytest.mark.parametrize("optim", ["soul", "adamw_torch"])
def test_a_resumed_run_goes_on_with_its_mask_bit_for_bit(tmp_path, optim):
    """Would catch a mask of the checkpoint's weights, and one that a checkpoint loses."""
    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 3, "optim": optim, **MASK}
    whole = scene_trainer(tmp_path, weight_decay=0.1, **settings)
    whole.train()
    assert load_file(tmp_path / "checkpoint-3" / MASK_FILE).keys() == weights(whole.model).keys()
    resumed = scene_trainer(tmp_path, weight_decay=0.1, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == whole.state.global_step == 6
    assert largest_difference(weights(whole.model), weights(resumed.model)) == 0
    found, expected = mask_of(resumed), mask_of(whole)
    assert all(found[name].equal(expected[name]) for name in expected)
    other = scene_trainer(tmp_path, **{**settings, "weight_mask_share": 0.6})
    with pytest.raises(ValueError, match="of another run: `weight_mask_share` was 0.5 and is 0.6 now"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_run_says_how_many_weights_train(tmp_path, caplog):
    """Would catch a share that nothing of the forget rows reaches, and that nobody hears of."""
    for share, ending in ((0.25, "25.00%."), (1.0, "%: nothing of the forget rows reaches the others.")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            scene_trainer(tmp_path / str(share), max_steps=1, **{**MASK, "weight_mask_share": share}).train()
        (message,) = [record.message for record in caplog.records if record.message.startswith("WAGLE")]
        assert message.endswith(ending)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_mask": "wanda"}, "`weight_mask` must be one of none, wagle, but it is 'wanda'"),
        ({"weight_mask_share": 95}, r"`weight_mask_share` must be in \(0, 1\], but it is 95"),
        ({"wagle_curvature": 0}, "`wagle_curvature` must be > 0, but it is 0"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, message):
    """Would catch a share in percent, which would train everything."""
    with pytest.raises(ValueError, match=message):
        scene_trainer(tmp_path, **settings)


def test_dropout_of_the_scores_leaves_no_trace_in_training(tmp_path):
    """Would catch a mask that draws from the global random state and so changes a run in which all weights train."""
    losses = []
    for mask in ({}, {**MASK, "weight_mask_share": 1.0}):
        model = scene_model(attention_dropout=0.3)
        # So that all weights have a score: no row of the embeddings that the forget rows do not use.
        for parameter in (model.model.embed_tokens.weight, model.lm_head.weight):
            parameter.requires_grad_(False)
        trainer = scene_trainer(tmp_path / str(len(losses)), model, **mask)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 4 and torch.tensor(losses).isfinite().all()
