"""Sharpness-aware unlearning against its formula."""

import pytest
import torch
from peft import LoraConfig
from scenes import FORGET, largest_difference, logged, scene_config, scene_model, scene_trainer, spoil, weights
from toys import ToyLM

from soul_trainer.engines import trained_parameters
from soul_trainer.perturbation import Perturbation


# Float32's rounding of a sum of a few dozen terms.
ROUNDING = 1e-6


def gradients_of(model, scale=1.0):
    random = torch.Generator().manual_seed(3)
    return [scale * torch.randn(parameter.shape, generator=random) for parameter in model.parameters()]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e12])
def test_weights_move_by_the_radius_along_the_gradient(scale):
    """Would catch a norm of each tensor instead of all, a step that grows with the gradient, or goes down."""
    model, gradients = ToyLM(), gradients_of(ToyLM(), scale)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    perturbation = Perturbation(model, radius=0.5)
    perturbation.find([gradient.clone() for gradient in gradients])
    with perturbation.applied():
        steps = [now.detach() - then for now, then in zip(model.parameters(), before)]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    for step, gradient in zip(steps, gradients, strict=True):
        torch.testing.assert_close(step, 0.5 * gradient / norm, rtol=0, atol=ROUNDING)
    assert float(torch.cat([step.flatten() for step in steps]).norm()) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit(dtype):
    """Would catch theta + epsilon - epsilon, which rounds, and weights that stay away after an error."""
    model = ToyLM().to(dtype)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    perturbation = Perturbation(model, radius=0.37)
    perturbation.find(gradients_of(model), num_uses=3)
    for _ in range(2):  # of a step's micro-batches
        with perturbation.applied():
            moved = [parameter.detach().clone() for parameter in model.parameters()]
        assert not any(now.equal(then) for now, then in zip(moved, before))
        assert all(now.equal(then) for now, then in zip(model.parameters(), before))
    with pytest.raises(RuntimeError, match="backward"), perturbation.applied():
        raise RuntimeError("an error in a backward")
    assert all(now.equal(then) for now, then in zip(model.parameters(), before))
    assert not perturbation.moved  # no second copy of the weights while the optimizer steps


def test_a_gradient_of_zero_moves_nothing():
    """Would catch 0 / 0: weights that are no numbers where a step's forget rows are forgotten."""
    model = ToyLM()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    perturbation = Perturbation(model, radius=0.5)
    perturbation.find([torch.zeros_like(parameter) for parameter in model.parameters()])
    with perturbation.applied():
        assert all(now.equal(then) for now, then in zip(model.parameters(), before))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused(bad):
    """Would catch weights that are no numbers, which no later error could name."""
    model = ToyLM()
    gradients = gradients_of(model)
    gradients[1][0, 0] = bad
    with pytest.raises(FloatingPointError, match="forget loss is not finite"):
        Perturbation(model, radius=0.5).find(gradients)


# Sums of the same float32 terms in another order, 1e-7 of gradients of norm 60, through four steps: up to 1.2e-5 seen.
SAME_TRAJECTORY = 3e-5
SGD = {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant", "learning_rate": 0.1}


def halves_of(trainer):
    """The losses of a step's rows, by plain autograd: `(forget, retain)` functions of the model."""
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(trainer.train_dataset))])

    def mean(is_forget):
        rows = batch["is_forget"] == is_forget
        labels = batch["labels"][rows]
        logits = trainer.model(batch["input_ids"][rows], attention_mask=batch["attention_mask"][rows]).logits
        scores = logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(scores, labels[:, 1:].flatten(), ignore_index=-100)

    return lambda: -mean(True), lambda: mean(False)


def test_a_step_is_the_formula(tmp_path):
    """
    Would catch a perturbation down the forget loss or along the retain loss too, a retain gradient beside the weights,
    weights that stay perturbed, and a forget weight in the direction. One step of SGD over all rows, by autograd.
    """
    settings = {"forget_loss": "ga", "forget_weight": 0.5, "retain_weight": 2.0, "sam_radius": 0.3, **SGD}
    trainer = scene_trainer(tmp_path, per_device_train_batch_size=len(FORGET), max_steps=1, **settings)
    model, (forget, retain) = trainer.model, halves_of(trainer)
    parameters = list(model.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    forget_gradient = torch.autograd.grad(forget(), parameters)
    norm = torch.cat([gradient.flatten() for gradient in forget_gradient]).norm()
    retain_gradient = torch.autograd.grad(retain(), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, forget_gradient):
            parameter.add_(gradient * 0.3 / norm)
    perturbed_gradient = torch.autograd.grad(forget(), parameters)
    perturbed_loss = float(forget())
    with torch.no_grad():
        for parameter, then in zip(parameters, before):
            parameter.copy_(then)
    trainer.train()
    for parameter, then, g_f, g_r in zip(parameters, before, perturbed_gradient, retain_gradient, strict=True):
        torch.testing.assert_close(parameter.detach(), then - 0.1 * (0.5 * g_f + 2.0 * g_r), rtol=0, atol=ROUNDING)
    assert logged(trainer, "forget_loss") == [pytest.approx(perturbed_loss, rel=1e-5)]


# Steps of Adam and of clipped Sophia are signs where a gradient is near 0, and 8 bits of bfloat16 round often.
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [({}, 1e-4), ({"optim": "adamw_torch"}, 1e-4), ({"bf16": True, **SGD, "learning_rate": 0.01}, 1e-3)],
    ids=["soul", "adamw", "bf16"],
)
def test_a_radius_to_zero_is_plain_unlearning(tmp_path, settings, tolerance):
    """Would catch losses that count twice, gradients of the first pass that stay, and an extra refresh or step."""
    found = {}
    for radius in (0.0, 1e-7, 0.3):
        batches = {"sam_radius": radius, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
        trainer = scene_trainer(tmp_path / str(radius), **batches, **settings)
        trainer.train()
        found[radius] = weights(trainer.model), logged(trainer, "forget_loss"), logged(trainer, "retain_loss")
    assert largest_difference(found[0.0][0], found[1e-7][0]) < tolerance
    for one, other in zip(found[0.0][1:], found[1e-7][1:], strict=True):
        assert one == pytest.approx(other, rel=10 * tolerance)
    assert largest_difference(found[0.0][0], found[0.3][0]) > 3 * tolerance


@pytest.mark.parametrize(
    "settings",
    [
        {"forget_loss": "npo"},
        {"forget_loss": "dpo", "retain_loss": "kl"},
        {"forget_loss": "rmu", "retain_loss": "activations", "rmu_layer": 0, "trainable_parameters": "mlp"},
        {"forget_loss": "ga", "retain_loss": "none"},
        {"forget_loss": "kl", "gradient_checkpointing": True},
    ],
    ids=["npo", "dpo", "rmu", "ascent", "kl"],
)
def test_micro_batches_do_not_change_the_trajectory(tmp_path, settings):
    """Would catch a perturbation of each micro-batch by itself, and means of means, whatever the objective."""
    found = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = scene_trainer(tmp_path / str(size), sam_radius=0.3, **batches, **settings, **SGD)
        trainer.train()
        assert trainer.state.global_step == 4
        found.append(weights(trainer.model))
    for other in found[1:]:
        assert largest_difference(found[0], other) < SAME_TRAJECTORY
    plain = scene_trainer(tmp_path / "plain", per_device_train_batch_size=4, **settings, **SGD)
    plain.train()
    assert largest_difference(found[0], weights(plain.model)) > 10 * SAME_TRAJECTORY


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    """Would catch a first pass that draws from the random state, which a resumed run loads after it."""
    settings = {"sam_radius": 0.3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    settings |= {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 3, "retain_loss": "kl"}
    whole = scene_trainer(tmp_path, scene_model(attention_dropout=0.2), **settings)
    whole.train()
    resumed = scene_trainer(tmp_path, scene_model(attention_dropout=0.2), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.state.global_step == whole.state.global_step == 12
    assert largest_difference(weights(whole.model), weights(resumed.model)) == 0


def test_an_adapter_is_perturbed_alone(tmp_path):
    """Would catch a radius that is spent on weights that do not train."""
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = scene_trainer(tmp_path, sam_radius=0.3, trainer_arguments={"peft_config": adapter}, max_steps=2)
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, value in weights(trainer.model).items() if not value.equal(before[name])}
    assert moved and all("lora_" in name for name in moved)
    perturbation = Perturbation(trainer.model, radius=0.5)
    perturbation.find([torch.ones_like(parameter) for parameter in trained_parameters(trainer.model)])
    before = weights(trainer.model)
    with perturbation.applied():
        steps = {name: value - before[name] for name, value in weights(trainer.model).items()}
    assert {name for name, step in steps.items() if step.any()} <= {name for name in steps if "lora_" in name}
    assert float(torch.cat([step.flatten() for step in steps.values()]).norm()) == pytest.approx(0.5, rel=1e-5)


def test_the_loss_scale_of_float16_leaves_the_perturbation(tmp_path):
    """Would catch a step along overflowed gradients, and a scale that stays in the direction."""
    found, losses = [], []
    for scale in (None, 2.0**12, 2.0**127):
        settings = {"sam_radius": 0.3, "max_steps": 2, "optim": "adamw_torch", "max_grad_norm": 0}
        trainer = scene_trainer(tmp_path / str(scale), scene_model(initializer_range=0.5), **settings)
        if scale:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.train()
        found.append(weights(trainer.model))
        losses.append(logged(trainer, "forget_loss")[0])
    # A scale that is a power of two changes no bit but of numbers near 0.
    assert largest_difference(found[0], found[1]) < ROUNDING and losses[0] == pytest.approx(losses[1], rel=1e-6)
    # From 2^127 the first pass finds a scale that it fits under; the step itself is skipped, as the scaler has it.
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)
    assert trainer.accelerator.scaler.get_scale() < 2.0**126


def test_a_gradient_that_is_not_finite_stops_the_run_with_a_checkpoint(tmp_path):
    """Would catch a run that goes on with weights that are no numbers, and one that loses the state before."""
    trainer = scene_trainer(tmp_path, sam_radius=0.3)
    before = weights(trainer.model)
    trainer.model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match="`sam_radius` moves along it. .*checkpoint-0 holds the state before"):
        trainer.train()
    assert largest_difference(before, weights(trainer.model)) == 0
    assert (tmp_path / "checkpoint-0" / "model.safetensors").exists()


def test_rows_whose_loss_is_not_finite_are_named(tmp_path):
    """Would catch a first pass with an error path of its own."""
    trainer = scene_trainer(tmp_path, sam_radius=0.3)
    spoil(trainer.model, "Mara")
    with pytest.raises(FloatingPointError, match="row .* of `forget_dataset`.*checkpoint-0 holds the state before"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sam_radius": -0.1}, "`sam_radius` must be >= 0, but it is -0.1"),
        ({"sam_radius": 0.1, "forget_loss": "none"}, "it needs a `forget_loss`"),
        ({"sam_radius": 0.1, "l1_weight": 0.1}, "and no `l1_weight`"),
    ],
)
def test_settings_that_have_no_meaning_are_refused(tmp_path, settings, message):
    """Would catch a run that says that it is sharpness-aware and is not."""
    with pytest.raises(ValueError, match=message):
        scene_config(tmp_path, **settings)
