"""When the Hessian is refreshed, from which rows, and what is logged of it."""

import logging

import pytest
import torch
from scenes import logged, scene_model, scene_trainer
from transformers import TrainerCallback

from soul_trainer import HessianCallback
from soul_trainer.curvature import estimate_hessian
from soul_trainer.engines import find_soul


def hessian_callback(trainer) -> HessianCallback:
    return next(each for each in trainer.callback_handler.callbacks if isinstance(each, HessianCallback))


def refresh_steps(trainer) -> list[int]:
    """The steps before which `trainer` refreshes, seen through the optimizer's own method."""
    steps, sophia_refresh = [], hessian_callback(trainer)._estimate

    def watched(*args, **kwargs):
        steps.append(trainer.state.global_step)
        return sophia_refresh(*args, **kwargs)

    hessian_callback(trainer)._estimate = watched
    trainer.train()
    return steps


@pytest.mark.parametrize(("interval", "expected"), [(1, [0, 1, 2, 3, 4, 5]), (4, [0, 4]), (10, [0]), (0, [0, 0, 0])])
def test_refreshes_come_before_the_first_step_and_then_every_k(tmp_path, interval, expected):
    """Would catch a first step without a Hessian, and an interval that is off by one."""
    trainer = scene_trainer(tmp_path, hessian_interval=interval, num_train_epochs=3)
    assert refresh_steps(trainer) == expected


def test_a_second_training_begins_with_a_refresh(tmp_path):
    """Would catch the step of the first training's last refresh taken for one that the second has refreshed at."""
    trainer = scene_trainer(tmp_path, hessian_interval=10, overwrite=True)
    assert refresh_steps(trainer) == [0]
    trainer.optimizer = trainer.lr_scheduler = None
    assert refresh_steps(trainer) == [0]


def test_once_is_the_plain_mean_over_the_rows(tmp_path):
    """Would catch a running average where one pass must weigh all its rows alike, and rows visited twice."""
    settings = {"hessian_interval": 0, "hessian_estimator": "empirical_fisher", "hessian_batch_size": 5}
    trainer = scene_trainer(tmp_path, max_steps=1, learning_rate=0.0, **settings)
    trainer.train()
    sophia, callback = find_soul(trainer.optimizer), hessian_callback(trainer)
    parameters = [p for group in sophia.param_groups for p in group["params"]]
    means = [torch.zeros_like(p) for p in parameters]
    rows = callback._sample(draw=0, num_rows=16)
    assert sorted(row for _, row in rows) == list(range(16))
    for draw, start in enumerate(range(0, 16, 5)):
        fresh = type(sophia)(parameters, betas=(0.9, 0.0))
        batch = trainer.data_collator([{half: callback.sources[half][row]} for half, row in rows[start : start + 5]])
        estimate_hessian(trainer.model, fresh, [batch], "empirical_fisher", draw=draw)
        means = [mean + fresh.state[p]["hessian"] / 4 for mean, p in zip(means, parameters)]
    for mean, parameter in zip(means, parameters):
        assert torch.allclose(sophia.state[parameter]["hessian"], mean, rtol=1e-4, atol=1e-12)
        assert float(sophia.state[parameter]["hessian_weight"]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("data", "halves"), [("retain", {"retain"}), ("forget", {"forget"}), ("both", {"retain", "forget"})]
)
def test_rows_come_from_where_they_should(tmp_path, data, halves):
    """Would catch a Hessian of the rows to forget where that of the retain rows was asked for."""
    callback = hessian_callback(scene_trainer(tmp_path, hessian_data=data))
    seen = {half for draw in range(8) for half, _ in callback._sample(draw)}
    assert seen == halves
    assert callback._sample(3) == callback._sample(3) != callback._sample(4)


def test_the_curvature_is_logged_with_every_loss(tmp_path):
    """Would catch figures of another step, shares that do not add up, and a loss that is no longer logged."""
    trainer = scene_trainer(tmp_path, rho=1e9)
    trainer.train()
    assert len(logged(trainer, "loss")) == len(logged(trainer, "curvature/clipped")) == 4
    # A huge rho: only coordinates whose Hessian is exactly zero are clipped, those of tokens that no row has.
    assert max(logged(trainer, "curvature/clipped")) < 0.35
    for entry in trainer.state.log_history:
        shares = [value for key, value in entry.items() if key.startswith("curvature/update_share/")]
        assert not shares or sum(shares) == pytest.approx(1.0)
    assert min(logged(trainer, "curvature/refresh_seconds")) > 0
    clipped = scene_trainer(tmp_path / "sign", rho=1e-9)
    clipped.train()
    assert min(logged(clipped, "curvature/clipped")) > 0.9


@pytest.mark.parametrize("is_frozen", [True, False])
def test_an_update_of_one_tensor_is_warned_of_once(tmp_path, caplog, is_frozen):
    """Would catch the trap that this log is for: unlearning that edits an embedding and leaves the model alone."""
    model = scene_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not is_frozen or "embed_tokens" in name
    with caplog.at_level(logging.WARNING):
        scene_trainer(tmp_path, model).train()
    warnings = [record for record in caplog.records if "Over 95% of the squared update" in record.message]
    assert len(warnings) == is_frozen


def test_another_optimizer_has_no_hessian_to_refresh(tmp_path):
    """Would catch a callback that silently does nothing under AdamW."""
    trainer = scene_trainer(tmp_path, optim="adamw_torch")
    trainer.add_callback(HessianCallback(trainer, trainer.train_dataset.retain))
    with pytest.raises(ValueError, match="needs `optim='soul'`"):
        trainer.train()


class HessianOfTheFirstStep(TrainerCallback):
    """Keeps the Hessian that the first step has."""

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == 0:
            states = find_soul(optimizer).state.values()
            self.hessian = [held["hessian"].clone() for held in states]
            self.weights = {float(held["hessian_weight"]) for held in states}


def test_a_refresh_that_overflows_is_taken_again_at_a_lower_scale(tmp_path):
    """Would catch a first step without a Hessian, sign descent, because float16's first loss scale was too high."""
    kept = []
    for scale in (None, 2.0**127):
        trainer = scene_trainer(tmp_path / str(scale), scene_model(initializer_range=0.5), max_steps=1)
        if scale:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        kept.append(HessianOfTheFirstStep())
        trainer.add_callback(kept[-1])
        trainer.train()
    assert trainer.accelerator.scaler.get_scale() <= 2.0**126
    assert kept[0].weights == kept[1].weights and kept[0].weights.pop() == pytest.approx(0.05)
    # A scale that is a power of two changes no bit but of numbers near 0.
    for plain, scaled in zip(kept[0].hessian, kept[1].hessian, strict=True):
        assert torch.allclose(plain, scaled, rtol=1e-6, atol=0.0)


def test_a_refresh_that_overflows_at_every_scale_stops_the_run(tmp_path):
    """Would catch a loop without end, and training that goes on without a Hessian."""
    trainer = scene_trainer(tmp_path, scene_model(initializer_range=0.5), max_steps=1)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=0.999999)
    with pytest.raises(FloatingPointError, match="overflows float16 at every loss scale.*holds the state before it"):
        trainer.train()
