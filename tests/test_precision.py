"""Models that come in 16 bits: what they are trained in, what is saved, and which device chooses bfloat16."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from scenes import largest_difference, logged, scene_config, scene_model, scene_trainer, weights
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from transformers.utils import logging

from soul_trainer import UnlearnConfig
from soul_trainer.engines import keeper_of_weights
from soul_trainer.precision import choose_precision, round_stochastically


# So small that next to no weight of 16 bits moves: most of them are of the order of 0.1.
TINY_STEP = {"learning_rate": 1e-7, "lr_scheduler_type": "constant", "max_steps": 4}
OPTIMIZERS = {
    "adamw": {"optim": "adamw_torch", "forget_loss": "ga", **TINY_STEP},
    "soul": {"rule": "diagonal", "forget_loss": "ga", **TINY_STEP},
}
WITHOUT_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without a GPU")


def half_model(**settings):
    return scene_model(**settings).bfloat16()


def dtypes_of(model):
    return {parameter.dtype for parameter in model.parameters()}


def saved(folder):
    """The dtypes of the files, and that of the configuration."""
    config = json.loads((folder / "config.json").read_text())
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}, config["dtype"]


@pytest.fixture
def amx(monkeypatch):
    """A CPU that is made for bfloat16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)


@pytest.fixture
def plain_cpu(monkeypatch):
    """A CPU that is not."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)


@pytest.fixture
def said(caplog):
    logging.enable_propagation()
    yield lambda: [record.getMessage() for record in caplog.records if "comes in" in record.getMessage()]
    logging.disable_propagation()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_small_steps_add_up_as_in_float32(tmp_path, name, plain_cpu):
    """Would catch weights of 16 bits that a step rounds back, under AdamW or under an optimizer of ours."""
    same = half_model().float()
    expected = scene_trainer(tmp_path / "float32", same, **OPTIMIZERS[name])
    expected.train()
    trainer = scene_trainer(tmp_path / "half", half_model(), **OPTIMIZERS[name])
    trainer.train()
    assert logged(trainer, "forget_loss") == logged(expected, "forget_loss")
    left = scene_trainer(tmp_path / "left", half_model(), float32_weights=False, **OPTIMIZERS[name])
    left.train()
    assert dtypes_of(left.model) == {torch.bfloat16}
    before, after = weights(half_model()), weights(left.model)
    moved = sum(int((after[name] != weight).sum()) for name, weight in before.items())
    assert moved < 0.01 * sum(weight.numel() for weight in before.values())


class SavesOnTheWay(TrainerCallback):
    """Saves a model in the middle of training, as one that is served meanwhile."""

    def __init__(self, folder):
        self.folder, self.trainer = folder, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.trainer.save_model(str(self.folder))


def test_a_model_is_saved_in_what_it_came_in_and_checkpoints_in_float32(tmp_path, plain_cpu):
    """
    Would catch a model of 16 bits that takes twice its room once it is unlearned, a configuration that belies the
    weights, tied weights that are saved twice, and a checkpoint that has lost bits.
    """
    settings = {"optim": "adamw_torch", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    callback = SavesOnTheWay(tmp_path / "served")
    model = half_model(tie_word_embeddings=True)
    trainer = scene_trainer(tmp_path / "run", model, {"callbacks": [callback]}, **settings)
    callback.trainer = trainer
    assert dtypes_of(model) == {torch.float32}
    trainer.train()
    assert dtypes_of(model) == {torch.bfloat16}
    trainer.save_model()
    model.save_pretrained(tmp_path / "own")
    for folder in (tmp_path / "served", tmp_path / "run", tmp_path / "own"):
        assert saved(folder) == ({torch.bfloat16}, "bfloat16")
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert saved(checkpoint) == ({torch.float32}, "float32")
    names = [set(load_file(folder / "model.safetensors")) for folder in (tmp_path / "served", checkpoint)]
    assert names[0] == names[1] and "lm_head.weight" not in names[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    masters = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert dtypes_of(loaded) == {torch.bfloat16}
    assert largest_difference(weights(loaded), weights(model)) == 0
    for name, weight in weights(masters).items():
        # One of its two neighbours, of which a unit in the last of 8 bits is at most a 128th.
        assert ((weights(loaded)[name].float() - weight).abs() <= weight.abs() / 128).all()


def test_evaluation_after_training_is_computed_as_in_training(tmp_path, plain_cpu):
    """Would catch figures of the end of a run that differ from those on the way by how they were computed."""
    trainer = scene_trainer(tmp_path, half_model(), optim="adamw_torch", max_steps=2)
    trainer.train()
    found = trainer.evaluate()["eval_forget_loss"]
    assert dtypes_of(trainer.model) == {torch.bfloat16}
    trainer.model.float()
    assert trainer.evaluate()["eval_forget_loss"] == found
    trainer.args.overwrite = True
    trainer.train()
    assert dtypes_of(trainer.model) == {torch.bfloat16}


@pytest.mark.parametrize("dtype, bits", [(torch.bfloat16, 8), (torch.float16, 11)])
def test_rounding_keeps_the_mean_and_what_needs_none(dtype, bits):
    """
    Would catch a model that remembers again once it is saved, because each of its weights has moved by less than half
    a unit in the last place, and weights that move though they were not trained.
    """
    number = 200_000
    for value in (0.02001, -0.02001, 1.0001, -0.99999, 300.1):
        exact = torch.full((number,), value)
        rounded = round_stochastically(exact, dtype, torch.Generator().manual_seed(0))
        assert rounded.dtype == dtype and len(rounded.unique()) == 2
        unit = abs(value) * 2 ** (1 - bits)
        # Five standard deviations of a mean, of which one number has at most half a unit.
        assert abs(float(rounded.double().mean()) - float(exact[0])) < 5 * unit / 2 / number**0.5
    for value in (0.0, 1.0, -0.25, float("inf"), float("nan"), torch.finfo(dtype).max):
        exact = torch.full((64,), value)
        rounded = round_stochastically(exact, dtype, torch.Generator().manual_seed(0))
        assert torch.equal(rounded.float().nan_to_num(0, 1e9), exact.nan_to_num(0, 1e9))


@pytest.mark.parametrize("rule", ["sophia", "kronecker"])
def test_a_resumed_run_has_the_same_bits(tmp_path, rule, plain_cpu):
    """Would catch a checkpoint of rounded weights, and a resume that loads them before they are float32 again."""
    settings = {"rule": rule, "save_strategy": "steps", "save_steps": 3, "max_steps": 6, "forget_loss": "ga"}
    whole = scene_trainer(tmp_path, half_model(), **settings)
    whole.train()
    last = tmp_path / "checkpoint-6"
    expected = load_file(last / "model.safetensors")
    resumed = scene_trainer(tmp_path, half_model(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert largest_difference(load_file(last / "model.safetensors"), expected) == 0
    assert largest_difference(weights(resumed.model), weights(whole.model)) == 0


@pytest.mark.parametrize("device", ["plain_cpu", "amx"])
def test_the_base_of_an_adapter_stays_as_it_is(tmp_path, device, request, said):
    """Would catch a base model that takes twice its memory, and adapters whose steps 16 bits round away."""
    request.getfixturevalue(device)
    before = weights(half_model())
    peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    settings = {"optim": "adamw_torch", "max_steps": 2, "retain_loss": "kl"}
    trainer = scene_trainer(tmp_path, half_model(), {"peft_config": peft_config}, **settings)
    trainer.train()
    own = {name: weight for name, weight in trainer.model.named_parameters() if "lora_" in name}
    assert {weight.dtype for weight in own.values()} == {torch.float32}
    trainer.save_model()
    files = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in files.values()} == {torch.float32} and all(map(torch.any, files.values()))
    base = trainer.model.unload()
    assert dtypes_of(base) == {torch.bfloat16} and largest_difference(weights(base), before) == 0
    (message,) = said()
    assert "stays so" in message and ("no AMX" in message) == (device == "plain_cpu")


@pytest.mark.parametrize("device", ["plain_cpu", "amx"])
def test_frozen_weights_are_float32_where_there_is_no_autocast_alone(tmp_path, device, request):
    """Would catch a product of two dtypes, a norm of two dtypes, and memory for weights that do not train."""
    request.getfixturevalue(device)
    settings = {"frozen_parameters": "mlp|norm", "optim": "adamw_torch", "max_steps": 1, "retain_loss": "kl"}
    trainer = scene_trainer(tmp_path, half_model(), **settings)
    kinds = {name: parameter.dtype for name, parameter in trainer.model.named_parameters()}
    mlp = {dtype for name, dtype in kinds.items() if "mlp" in name}
    assert mlp == {torch.bfloat16 if device == "amx" else torch.float32}
    assert {dtype for name, dtype in kinds.items() if "mlp" not in name} == {torch.float32}
    trainer.train()
    assert dtypes_of(trainer.model) == {torch.bfloat16}


def test_autocast_is_chosen_by_the_weights_and_the_device(tmp_path, amx, said):
    """
    Would catch a model of 16 bits that is computed in float32 on a device for bfloat16, one of float32 that is not, a
    second trainer of a process that gets the first one's precision, and a choice that nobody hears of.
    """
    plain = scene_trainer(tmp_path / "float32", optim="adamw_torch", max_steps=1)
    assert plain.accelerator.mixed_precision == "no" and plain.args.bf16 is False and not said()
    trainer = scene_trainer(tmp_path / "half", half_model(), optim="adamw_torch", max_steps=1)
    assert trainer.accelerator.mixed_precision == "bf16" and trainer.args.bf16 is True
    with trainer.engine.autocast():
        assert trainer.model.lm_head(torch.ones(1, 16)).dtype == torch.bfloat16
    trainer.train()
    again = scene_trainer(tmp_path / "again", optim="adamw_torch", max_steps=1)
    assert again.accelerator.mixed_precision == "no"
    (message,) = said()
    assert "the CPU has AMX" in message and "saved in bfloat16" in message
    off = scene_trainer(tmp_path / "off", half_model(), optim="adamw_torch", max_steps=1, bf16=False)
    assert off.accelerator.mixed_precision == "no" and dtypes_of(off.model) == {torch.float32}


def test_two_trainers_of_one_config_have_a_precision_each(tmp_path, amx):
    """Would catch accelerate's refusal to change the precision that a former trainer has left behind."""
    from scenes import FORGET, RETAIN, scene_tokenizer

    from soul_trainer import UnlearnTrainer

    args = scene_config(tmp_path, optim="adamw_torch", max_steps=1)
    for model, expected in ((half_model(), "bf16"), (scene_model(), "no"), (half_model(), "bf16")):
        trainer = UnlearnTrainer(model, args, FORGET, RETAIN, scene_tokenizer())
        assert trainer.accelerator.mixed_precision == expected


def test_plain_arguments_leave_the_precision_open(tmp_path, amx):
    """Would catch the False of plain TrainingArguments that is taken for a wish."""
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    assert UnlearnConfig.from_training_arguments(args).bf16 is None
    args = TrainingArguments(str(tmp_path), use_cpu=True, bf16=True)
    assert UnlearnConfig.from_training_arguments(args).bf16 is True


def test_weights_that_another_keeps_stay(tmp_path, plain_cpu):
    """Would catch a quantized model whose 16-bit parts grow, and a wish that is silently not honoured."""
    model, args = half_model(), scene_config(tmp_path)
    assert keeper_of_weights(args, model) is None and choose_precision(model, args).dtypes
    model.hf_quantizer = object()
    keeper = keeper_of_weights(args, model)
    assert not choose_precision(model, args, keeps_weights=keeper).dtypes
    with pytest.raises(ValueError, match="`float32_weights=True` cannot be honoured, because the model is quantized"):
        choose_precision(model, args, True, keeper)


@WITHOUT_GPU
def test_bfloat16_that_is_insisted_on_needs_a_device(tmp_path, plain_cpu, monkeypatch):
    """Would catch transformers' error, which names a fix and not what it costs, and one on a CPU that can do it."""
    with pytest.raises(ValueError, match="`bf16` .*no GPU.*no AMX.*Leave it out.*use_cpu"):
        UnlearnConfig(str(tmp_path), bf16=True)
    assert UnlearnConfig(str(tmp_path), bf16=True, use_cpu=True).bf16 is True
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert UnlearnConfig(str(tmp_path), bf16=True).use_cpu is True
