"""Two directions in `UnlearnTrainer`: steps by hand, whatever surrounds them."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig
from scenes import largest_difference, logged, scene_model, scene_trainer, weights
from slow_soul import SlowSoul, SlowTensor

from soul_trainer.batch import IGNORE_INDEX, parts_of
from soul_trainer.engines import find_soul


# Three steps of at most 0.02 a coordinate, from float32 gradients that were summed in another order: 1e-4 of a step
# where a direction is divided by a small curvature.
SAME_STEPS = 5e-6
SETTINGS = {
    "rule": "diagonal",
    "forget_loss": "ga",
    "hessian_interval": None,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 3,
    "lr_scheduler_type": "constant",
}
CURVATURE = {"retain_loss": "curvature"}
LORA = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}
CASES = {
    "none": {"rule": "none"},
    "diagonal": {},
    "kronecker": {"rule": "kronecker"},
    "sophia": {"rule": "sophia", "two_directions": True},
    "accumulated": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    "lora": {"trainer_arguments": LORA},
    "lora_kronecker": {"trainer_arguments": LORA, "rule": "kronecker"},
    "dpo": {"forget_loss": "dpo", "per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    "weighted": {"forget_weight": 2.0, "retain_weight": 0.5, "retain_weight_schedule": "epoch"},
    "sam": {"sam_radius": 0.3, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "clipped": {"max_grad_norm": 0.05, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    "not_clipped": {"max_grad_norm": 0.0, "weight_decay": 0.1},
    "trust_region": {"scaling": "trust_region"},
    "bfloat16_state": {"state_dtype": "bfloat16", "num_train_epochs": 1},
    "forget_only_none": {"rule": "none", **CURVATURE},
    "forget_only_diagonal": CURVATURE,
    "forget_only_kronecker": {"rule": "kronecker", **CURVATURE, "per_device_train_batch_size": 3,
                              "gradient_accumulation_steps": 3},
}  # fmt: skip


def two_trainer(folder, model=None, **settings):
    return scene_trainer(folder, model, **{**SETTINGS, **settings})


def row_log_probs(model, batch, rows):
    """The log-probability of each row's answer, and its number of tokens."""
    logits = model(input_ids=batch["input_ids"][rows], attention_mask=batch["attention_mask"][rows]).logits
    labels = batch["labels"][rows][:, 1:]
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return (chosen * (labels != IGNORE_INDEX)).sum(1), (labels != IGNORE_INDEX).sum()


class ByHand:
    """The trainer's steps by autograd of each half's loss alone, over all rows at once, and by [`SlowSoul`]."""

    def __init__(self, trainer, before):
        self.trainer, self.args, self.model = trainer, trainer.args, trainer.model.train()
        self.named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        soul, settings = find_soul(trainer.optimizer), trainer.args.resolved()
        tensors = []
        for name, param in self.named.items():
            own = {"lr": self.args.learning_rate, "betas": (settings.beta1, settings.beta2)}
            own |= {
                key: getattr(settings, key) for key in ("rule", "scaling", "two_directions", "damping", "rho", "eps")
            }
            own["damping_scope"] = "model" if settings.scaling == "trust_region" else "tensor"
            own["weight_decay"] = self.args.weight_decay * (param.dim() > 1)
            tensor = SlowTensor(before[name], own, self._dense(soul.matrices.get(name), param))
            state = soul.state[param]
            if "hessian" in state:  # whether it is right is a matter of the tests of curvature
                tensor.h, tensor.h_weight = state["hessian"].double().flatten().numpy(), float(state["hessian_weight"])
            tensors.append(tensor)
        self.slow = SlowSoul(tensors)
        self.start = before
        self._load()

    @staticmethod
    def _dense(curvature, param):
        if curvature is None:
            return None
        units = torch.eye(param.numel()).view(-1, *param.shape)
        return torch.stack([curvature.product(unit).flatten() for unit in units]).double().numpy()

    def _load(self, offsets=None):
        with torch.no_grad():
            for place, (param, tensor) in enumerate(zip(self.named.values(), self.slow.tensors)):
                param.copy_(torch.from_numpy(tensor.theta).view(param.shape))
                if offsets is not None:
                    param.add_(offsets[place])

    def losses(self, batch):
        """The forget and the retain loss as functions of the weights as they are."""
        parts = {name: list(range(rows.start, rows.stop)) for name, rows in parts_of(batch).items()}

        def forget():
            own, count = row_log_probs(self.model, batch, parts["forget"])
            if self.args.forget_loss == "ga":
                return own.sum() / count
            preferred, _ = row_log_probs(self.model, batch, parts["preferred"])
            known = (batch["reference_log_prob"][parts[name]] for name in ("forget", "preferred"))
            margin = (own - next(known)) - (preferred - next(known))
            return -(2 / 0.1) * torch.nn.functional.logsigmoid(-0.1 * margin).mean()

        def retain():
            log_probs, count = row_log_probs(self.model, batch, parts["retain"])
            return -log_probs.sum() / count

        return forget, retain

    def gradients(self, loss):
        gradients = torch.autograd.grad(loss(), list(self.named.values()))
        norm, limit = torch.cat([gradient.flatten() for gradient in gradients]).norm(), self.args.max_grad_norm
        factor = min(1.0, limit / (float(norm) + 1e-6)) if limit else 1.0
        return [factor * gradient for gradient in gradients]

    def step(self, epoch):
        data = self.trainer.train_dataset
        data.set_epoch(epoch)
        forget, retain = self.losses(self.trainer.data_collator([data[index] for index in range(len(data))]))
        schedule = epoch / self.args.num_train_epochs if self.args.retain_weight_schedule == "epoch" else 1.0
        for tensor in self.slow.tensors:
            tensor.settings |= {"forget_weight": self.args.forget_weight}
            tensor.settings |= {"retain_weight": self.args.retain_weight * schedule}
        self._load()
        if self.args.retain_loss == "curvature":
            self.slow.step(self.gradients(forget))
            return
        retain_gradients = self.gradients(retain)
        if self.args.sam_radius:
            raw = torch.autograd.grad(forget(), list(self.named.values()))
            norm = torch.cat([gradient.flatten() for gradient in raw]).norm()
            self._load([gradient * self.args.sam_radius / norm for gradient in raw])
        self.slow.forget(self.gradients(forget))
        self.slow.step(retain_gradients)


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_by_hand(tmp_path, name):
    """
    Would catch a half's gradient in the other's momentum or left behind, clipping of their sum, a sum of means over
    micro-batches, weights inside a loss, a preferred row among the retain rows, a retain gradient beside the weights.
    """
    trainer = two_trainer(tmp_path, **CASES[name])
    before = weights(trainer.model)
    trainer.train()
    assert trainer.state.global_step == trainer.args.num_train_epochs
    after = weights(trainer.model)
    by_hand = ByHand(trainer, before)
    for epoch in range(int(trainer.args.num_train_epochs)):
        by_hand.step(epoch)
    tolerance = 2e-4 if name == "bfloat16_state" else SAME_STEPS  # of one step of 0.01: 2^-9, twice
    moved = 0
    for key, tensor in zip(by_hand.named, by_hand.slow.tensors):
        np.testing.assert_allclose(after[key].numpy().flatten(), tensor.theta, rtol=0, atol=tolerance, err_msg=key)
        moved += int(not after[key].equal(before[key]))
    assert moved == len(by_hand.named)
    frozen = set(before) - set(by_hand.named)
    assert all(after[key].equal(before[key]) for key in frozen) and bool(frozen) == name.startswith("lora")


@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (3, 3), (1, 8)])
def test_the_logged_loss_is_the_sum_of_both_halves(tmp_path, size, accumulation):
    """Would catch a forget loss that is logged once a micro-batch, or not at all, and weights in what is logged."""
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "forget_loss": "npo"}
    trainer = two_trainer(tmp_path, retain_weight=0.3, **settings)
    trainer.train()
    loss, forget, retain = (logged(trainer, key) for key in ("loss", "forget_loss", "retain_loss"))
    assert len(loss) == 3
    assert loss == pytest.approx([f + r for f, r in zip(forget, retain)], rel=1e-5)
    assert forget[0] == pytest.approx(2 / 0.1 * math.log(2), rel=1e-5)
    assert min(retain) > 1.0


@pytest.mark.parametrize(
    "settings", [{}, {"rule": "kronecker"}, {"sam_radius": 0.3}, {"rule": "kronecker", **CURVATURE}]
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, settings):
    """Would catch a forget momentum or a curvature of matrices that is not saved, and dropout of another state."""
    settings = {**settings, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    settings |= {"per_device_train_batch_size": 1, "forget_loss": "npo"}
    if "retain_loss" not in settings:
        settings["retain_weight_schedule"] = "linear"
    found = []
    for resume in (None, str(tmp_path / "checkpoint-6")):
        trainer = two_trainer(tmp_path, scene_model(attention_dropout=0.2), **settings)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == 12
        found.append(weights(trainer.model))
    assert largest_difference(*found) == 0
