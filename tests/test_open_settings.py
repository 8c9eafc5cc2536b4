"""What the settings leave open, and what a trainer makes of it for its model."""

import pytest
import torch
from scenes import FORGET, RETAIN, scene_model, scene_tokenizer
from toys import tiny_llama

from soul_trainer import UnlearnConfig, UnlearnTrainer
from soul_trainer.curvature import Curvature, linear_layers, num_kronecker_numbers, save_curvature
from soul_trainer.weights import weights_digest


def config(folder, **settings) -> UnlearnConfig:
    shared = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 2}
    return UnlearnConfig(output_dir=str(folder), **shared, **settings)


def trainer_of(args, model=None, retain=RETAIN) -> UnlearnTrainer:
    return UnlearnTrainer(model or scene_model(), args, FORGET, retain, scene_tokenizer())


def test_a_trainer_fills_in_settings_of_its_own(tmp_path):
    """Would catch a learning rate of one model that stays in the settings and serves a wider or a deeper one."""
    args = config(tmp_path)
    sizes = ((16, 2), (64, 2), (64, 8))
    models = [scene_model(hidden_size=width, num_hidden_layers=num_layers) for width, num_layers in sizes]
    rates = [trainer_of(args, model).args.learning_rate for model in models]
    assert rates == [0.12 / 16, 0.12 / 64, 0.06 / 64] and args.learning_rate is None and args.rule is None


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({}, "kronecker"),
        ({"rho": 0.04}, "sophia"),
        ({"optim": "sophia"}, "sophia"),
        ({"hessian_interval": 10}, "diagonal"),
        ({"hessian_estimator": "hutchinson"}, "diagonal"),
        ({"rule": "none"}, "none"),
    ],
)
def test_the_rule_follows_from_what_is_named(tmp_path, settings, rule):
    """Would catch the paper's rho taken for no rho at all, and two passes over all rows every few steps."""
    assert trainer_of(config(tmp_path, **settings)).args.resolved().rule == rule


def test_curvature_that_does_not_fit_is_a_diagonal():
    """Would catch an adapter of few weights whose factors are those of whole layers, and a sharded model's, whole."""
    layers = linear_layers(tiny_llama(hidden_size=4, intermediate_size=6))
    by_hand = sum(i**2 + o**2 + i * o for i, o in [(4, 4)] * 4 + [(4, 6)] * 2 + [(6, 4), (4, 7)])
    assert num_kronecker_numbers(layers.values()) == by_hand
    for number, shards, rule in ((by_hand, False, None), (10**9, False, "diagonal"), (by_hand, True, "diagonal")):
        args = UnlearnConfig(output_dir="unused", report_to="none", use_cpu=True)
        args.fill_rule(number, shards)
        assert args.rule == rule


def test_a_file_of_curvature_needs_no_retain_rows(tmp_path):
    """Would catch retain rows that are asked for where a file stands for them, and a file of another model."""
    model = scene_model()
    diagonals = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    path = tmp_path / "curvature.safetensors"
    save_curvature(path, Curvature(diagonals, metadata={"weights": weights_digest(model)}))
    settings = {"retain_loss": "curvature", "curvature": str(path), "rule": "diagonal", "forget_loss": "ga"}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = trainer_of(config(tmp_path / "run", **settings), model, retain=None)
    trainer.train()
    # With H = 1, damping 0.1 and the first gradient, each step is as long as the trust region: lr / sqrt(1.1).
    first, second = (3e-4 * rate for rate in (1.0, 0.5))
    moved = sum(float((p.detach() - before[name]).square().sum()) for name, p in model.named_parameters()) ** 0.5
    assert 0.5 * first / 1.1**0.5 < moved < (first + second) / 1.1**0.5 * 1.001
    with pytest.raises(ValueError, match="weights with the hash"):
        trainer_of(config(tmp_path / "other", **settings), scene_model(seed=1), retain=None).train()
    with pytest.raises(ValueError, match="needs `forget_dataset`, `retain_dataset`"):
        trainer_of(config(tmp_path / "none", retain_loss="curvature"), retain=None)
