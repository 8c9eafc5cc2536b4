"""The study's Muon baseline: which optimizer has which weights, and that both are one optimizer to their callers."""

import copy

import pytest
import torch
from scenes import scene_model

from soul_recipes.study_optimizers import MuonWithAdamW, hidden_matrices


RATE, NUM_STEPS = 0.01, 4
pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has had Muon since 2.9")


def step(model, optimizer, seed):
    """A step of a made-up gradient of every parameter."""
    random = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=random)
    optimizer.step()


@pytest.mark.parametrize("is_tied", [False, True])
def test_muon_has_the_hidden_matrices_alone(is_tied):
    """Would catch an embedding or a head in Muon's group, and norms or biases that no group trains."""
    model = scene_model(tie_word_embeddings=is_tied, attention_bias=True)
    names = {param: name for name, param in model.named_parameters()}
    groups = MuonWithAdamW(model, RATE).param_groups
    matrices, others = ([names[param] for param in group["params"]] for group in groups)
    assert matrices and all(".self_attn." in name or ".mlp." in name for name in matrices)
    assert all(name.endswith("weight") for name in matrices)
    assert sorted(matrices + others) == sorted(names.values())
    found = {part for name in others for part in ("embed_tokens", "lm_head", "norm", "bias") if part in name}
    assert found == {"embed_tokens", "norm", "bias"} | (set() if is_tied else {"lm_head"})


def test_what_does_not_train_is_in_no_group():
    """Would catch frozen weights that decay."""
    model = scene_model()
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.model.norm.weight.requires_grad_(False)
    params = {param for group in MuonWithAdamW(model, RATE).param_groups for param in group["params"]}
    assert params == {param for param in model.parameters() if param.requires_grad}
    assert frozen not in set(hidden_matrices(model))


def test_steps_are_those_of_both_optimizers_under_one_schedule():
    """Would catch a group that the scheduler does not move, a group that steps twice, and another's settings."""
    model, other = scene_model(), scene_model()
    matrices = hidden_matrices(other)
    rest = [param for param in other.parameters() if param not in set(matrices)]
    muon = torch.optim.Muon(matrices, RATE, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, RATE, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer = MuonWithAdamW(model, RATE)

    def halving(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 0.5**number)

    schedules = [halving(each) for each in (optimizer, muon, adamw)]
    for number in range(NUM_STEPS):
        step(model, optimizer, number)
        step(other, muon, number)
        adamw.step()
        for schedule in schedules:
            schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [RATE * 0.5**NUM_STEPS] * 2
    start = dict(scene_model().named_parameters())
    for (name, param), expected in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(param, expected), name
        assert not torch.equal(param, start[name]), name


def test_a_state_that_was_loaded_goes_on():
    """Would catch both optimizers going on with the groups and averages that were there before the state came."""
    model = scene_model()
    optimizer = MuonWithAdamW(model, RATE)
    for number in range(NUM_STEPS):
        step(model, optimizer, number)
    other = scene_model()
    other.load_state_dict(model.state_dict())
    resumed = MuonWithAdamW(other, lr=1.0)
    step(scene_model(), resumed, 0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(model.state_dict())
    for each, own in ((model, optimizer), (other, resumed)):
        own.param_groups[1]["lr"] = RATE / 2
        step(each, own, NUM_STEPS)
    for (name, param), expected in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(param, expected), name


@pytest.mark.parametrize("keep", ["norm", "proj"])
def test_a_model_without_one_of_the_groups_is_refused(keep):
    """Would catch a group without parameters, which fails at the first step of a run."""
    model = scene_model()
    for name, param in model.named_parameters():
        param.requires_grad_(keep in name)
    with pytest.raises(ValueError, match="AdamW alone"):
        MuonWithAdamW(model, RATE)
