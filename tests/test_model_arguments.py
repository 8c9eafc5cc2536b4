"""Flags of everything that loads a model, and settings files on devices that they were not written for."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
import yaml
from experiment_scenes import scene_experiment, scene_task
from safetensors.torch import load_file
from scenes import scene_model, scene_tokenizer
from test_configs import dataclasses_of
from test_eval_scoring import byte_tokenizer, small_llama
from test_eval_tofu import write_dataset
from test_finetune import ROWS, STORY, WORDS, write_rows
from toys import tiny_llama, toy_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments
from transformers.utils import logging

from soul_eval.__main__ import main as evaluate
from soul_eval.attacks.running import AttackArguments
from soul_eval.experiment import Experiment, ExperimentArguments
from soul_eval.models import weights_digest
from soul_eval.rows import read_rows
from soul_eval.running import EvalArguments
from soul_eval.settings_files import SettingsParser
from soul_eval.suites import SUITES
from soul_recipes import copyright, detox, finetune, muse, tofu, unlearn, wmdp
from soul_trainer.curvature.command import CurvatureArguments
from soul_trainer.influence_command import CommandArguments
from soul_trainer.loading import ModelArguments


CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"
COMMANDS = (
    *(EvalArguments, AttackArguments, CurvatureArguments, CommandArguments, finetune.FinetuneArguments),
    *(tofu.TofuArguments, muse.MuseRunArguments, wmdp.WmdpRunArguments, detox.DetoxTaskArguments),
    *(copyright.CopyrightTaskArguments, unlearn.UnlearnArguments),
)
WITHOUT_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without a GPU")


@dataclass
class Named(ModelArguments):
    """A command with a model."""

    model: str | None = None
    gold: str | None = None


def cpu(monkeypatch, **capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_every_command_has_the_same_flags(kind):
    """Would catch a command that loads models in its own way, or runs code of a model unasked."""
    assert issubclass(kind, ModelArguments)
    (parser,) = [HfArgumentParser(kind)]
    flags = {action.dest: action for action in parser._actions}
    assert {each.name for each in fields(ModelArguments)} <= set(flags) and flags["trust_remote_code"].default is False


@pytest.mark.parametrize("suite", SUITES)
def test_the_revision_of_a_dataset_has_a_name_of_its_own(suite):
    """Would catch two flags of one name, of which argparse takes neither."""
    HfArgumentParser((EvalArguments, SUITES[suite].arguments))


def test_models_are_loaded_as_the_flags_say(tmp_path):
    """Would catch a flag that is read and not used, and a revision of one model that another is loaded by."""
    scene_model().save_pretrained(tmp_path / "model")
    scene_tokenizer().save_pretrained(tmp_path / "model")
    byte_tokenizer(["a"]).save_pretrained(tmp_path / "tokenizer")
    folder = str(tmp_path / "model")
    plain = Named(model=folder)
    assert plain.load_model(folder).dtype == torch.float32 and not plain.loading_settings()
    set_apart = {"dtype": "bfloat16", "tokenizer": str(tmp_path / "tokenizer"), "attn_implementation": "eager"}
    named = Named(model=folder, **set_apart)
    model = named.load_model(folder)
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert len(named.load_tokenizer(folder)) == len(byte_tokenizer(["a"])) != len(plain.load_tokenizer(folder))
    assert named.loading_settings() == set_apart
    hub = Named(model="me/model", revision="v1", gold="me/gold")
    assert hub.pretrained_options("me/model") == {"revision": "v1", "trust_remote_code": False}
    assert hub.pretrained_options("me/gold") == {"trust_remote_code": False}
    target = AttackArguments("a/b", "a/target", "out", revision="v1", target_revision="v0")
    assert [target.revision_of(name) for name in ("a/b", "a/target", "a/gold")] == ["v1", "v0", None]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"dtype": "half"}, "`dtype` must be one of auto, float32, bfloat16, float16"),
        ({"model": ".", "revision": "v1"}, "`revision`='v1'.*`model` is '.'.*`dataset_revision`"),
        ({"revision": "v1"}, "`revision`='v1'.*`dataset_revision`"),
    ],
)
def test_bad_values_are_named(settings, said):
    """Would catch a revision that is meant for the dataset, as recipes had it, and that nothing reads."""
    with pytest.raises(ValueError, match=said):
        Named(**settings)


def test_a_tokenizer_of_its_own_needs_a_model(tmp_path):
    """Would catch a small model that is asked with another tokenizer than it was trained with."""
    with pytest.raises(ValueError, match="`tokenizer` .*needs `model`"):
        Experiment("tofu", tmp_path, ExperimentArguments, command_line=["--tokenizer", "a/b", "--use_cpu"])


def test_a_run_in_16_bits_is_saved_and_asked_in_16_bits(tmp_path, monkeypatch):
    """
    Would catch flags that do not reach the trainer, a report about float32 weights that nobody gets, and a finished
    run that is taken for one of another dtype.
    """
    cpu(monkeypatch, avx512_bf16=True)
    task = scene_task(tmp_path)
    flags = ("--model", task.target, "--optim", "adamw_torch", "--forget_loss", "ga", "--dtype", "bfloat16")
    scene_experiment(tmp_path, *flags).run(task)
    folder = tmp_path / "out" / "adamw_torch"
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    header = read_rows(tmp_path / "out" / "adamw_torch.rows.jsonl")[0]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert header["settings"]["dtype"] == "bfloat16" and header["weights"] == weights_digest(loaded)
    before = read_rows(tmp_path / "out" / "target.rows.jsonl")[0]
    target = AutoModelForCausalLM.from_pretrained(task.target, dtype=torch.bfloat16)
    assert before["weights"] == weights_digest(target)
    scene_experiment(tmp_path, *flags).run(task)
    with pytest.raises(ValueError, match="holds a finished run with other settings"):
        scene_experiment(tmp_path, *flags[:-2]).run(task)


def test_rows_of_another_dtype_are_other_rows(tmp_path, capsys):
    """Would catch rows of float32 that are given out as those of the flags."""
    dataset = write_dataset(tmp_path / "small")
    small_llama(seed=1).save_pretrained(tmp_path / "model")
    byte_tokenizer(["a"]).save_pretrained(tmp_path / "model")
    flags = ["tofu", "--model", str(tmp_path / "model"), "--dataset", dataset, "--forget_split", "forget_small"]
    flags += ["--device", "cpu", "--limit", "1", "--generate", "False", "--output", str(tmp_path / "out")]
    assert evaluate(flags) == 0
    settings = read_rows(tmp_path / "out" / "rows.jsonl")[0]["settings"]
    assert settings["dtype"] == "float32" and "attn_implementation" not in settings
    assert evaluate([*flags, "--attn_implementation", "eager"]) == 1
    assert "results of another settings" in capsys.readouterr().err


def test_a_target_of_16_bits_learns_in_float32(tmp_path, monkeypatch):
    """Would catch a target that has learnt nothing because its steps were rounded away, or takes twice its room."""
    cpu(monkeypatch, avx512_bf16=True)
    tokenizer = toy_tokenizer(WORDS)
    before = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=64).bfloat16()
    before.save_pretrained(tmp_path / "pretrained")
    tokenizer.save_pretrained(tmp_path / "pretrained")
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags = ["--model", str(tmp_path / "pretrained"), "--dataset", rows, "--use_cpu", "--disable_tqdm", "True"]
    flags += ["--learning_rate", "1e-5", "--num_train_epochs", "2", "--model_dir", str(tmp_path / "tuned")]
    found = {}
    for dtype in ("auto", "float32"):
        folder = finetune.main([*flags, "--dtype", dtype])
        found[dtype] = load_file(folder / "model.safetensors")
        assert json.loads((folder / "config.json").read_text())["dtype"] == ("bfloat16" if dtype == "auto" else dtype)
    for name, weight in found["float32"].items():
        assert found["auto"][name].dtype == torch.bfloat16
        # One of the two neighbours in 8 bits of what float32 has learnt.
        assert ((found["auto"][name].float() - weight).abs() <= weight.abs() / 128).all()
    assert AutoTokenizer.from_pretrained(folder)(STORY)["input_ids"]


@pytest.fixture
def said(caplog):
    logging.enable_propagation()
    logging.get_logger("soul_eval.settings_files").warning_once.__func__.cache_clear()
    yield lambda: [record.getMessage() for record in caplog.records if "Precision" in record.getMessage()]
    logging.disable_propagation()


def written(folder, **settings):
    (folder / "mine.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", str(folder / "mine.yaml"), "--output_dir", str(folder / "out")]


def config_of(folder, *flags):
    return Experiment("tofu", folder, ExperimentArguments, command_line=flags).settings("soul")


@WITHOUT_GPU
def test_bfloat16_of_a_file_is_for_devices_that_are_made_for_it(tmp_path, monkeypatch, said):
    """
    Would catch published settings that end with transformers' error on a CPU, or take twice as long there, and a
    precision that was chosen without a word.
    """
    flags = written(tmp_path, optim="soul", bf16=True)
    cpu(monkeypatch, avx512_bf16=True)
    config = config_of(tmp_path, *flags)
    assert config.bf16 is None and config.mixed_precision == "no"
    (line,) = said()
    assert "float32" in line and "no AMX" in line
    assert config_of(tmp_path, *flags, "--bf16", "--use_cpu").bf16 is True
    with pytest.raises(ValueError, match="`bf16` .*cannot be honoured.*--use_cpu"):
        config_of(tmp_path, *flags, "--bf16")
    assert config_of(tmp_path, *flags, "--bf16", "False").bf16 is False
    cpu(monkeypatch, amx_bf16=True)
    config = config_of(tmp_path, *flags)
    assert config.bf16 is True and config.use_cpu and config.mixed_precision == "bf16"


@WITHOUT_GPU
def test_published_settings_are_good_for_a_plain_cpu(monkeypatch, tmp_path):
    """Would catch a file that only runs with `--use_cpu`, or `--bf16 False`."""
    cpu(monkeypatch, avx512_bf16=True)
    number = 0
    for path in CONFIGS.glob("*/*.yaml"):
        is_finetune = path.parent.name == "finetune"
        own = (finetune.FinetuneArguments, finetune.ChunkArguments, TrainingArguments)
        parser = SettingsParser(own if is_finetune else dataclasses_of(path))
        found = parser.read(path)
        needed = {"dataset": ["a"], "model_dir": "b", "model": "c/d"} if is_finetune else {}
        config = parser.build({**found, **needed, "output_dir": str(tmp_path)}, named=())[-1]
        assert not config.bf16 and config.mixed_precision == "no"
        number += bool(found.get("bf16"))
    assert number > 40
