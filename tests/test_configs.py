"""Every file of settings: it parses, is of the types that it should be, and says what was published."""

import importlib
import re
from pathlib import Path

import pytest
import yaml
from transformers import HfArgumentParser

from soul_eval.settings_files import DEFAULTS_FILE, SettingsParser, settings_file
from soul_trainer import UnlearnConfig
from soul_trainer.objectives import FORGET_LOSSES
from soul_trainer.soul_settings import SOUL_NAMES


RECIPES = Path(__file__).parents[1] / "recipes"
CONFIGS = RECIPES / "configs"
# Those of finetune.py are read by its own test: it unlearns nothing.
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "finetune")
NAMES = [str(path.relative_to(CONFIGS)) for path in FILES]
# SOUL's settings on TOFU with LLaMA2-7B, as its paper and its configs/ have them.
SOUL = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "num_train_epochs": 5}
SOUL |= {"weight_decay": 0.1, "warmup_steps": 0.1, "bf16": True, "retain_loss": "nll"}
SOPHIA = {"optim": "sophia", "beta1": 0.9, "beta2": 0.95, "rho": 0.04}
ADAMW = {"optim": "adamw_torch"}
PUBLISHED = {
    "tofu/sophia_ga.yaml": SOUL | SOPHIA | {"forget_loss": "ga", "learning_rate": 5e-6, "retain_weight": 2},
    "tofu/adamw_ga.yaml": SOUL | ADAMW | {"forget_loss": "ga", "learning_rate": 5e-6, "retain_weight": 0.3},
    "tofu/sophia_refusal.yaml": SOUL | SOPHIA | {"forget_loss": "refusal", "learning_rate": 1e-5, "retain_weight": 5},
    "tofu/adamw_refusal.yaml": SOUL | ADAMW | {"forget_loss": "refusal", "learning_rate": 2e-5, "retain_weight": 1},
}
# OpenUnlearning's defaults and the papers': forget weight, learning rate, epochs, and what is a method's own.
METHODS = {
    "npo": (1, 1e-5, 10, {"retain_weight": 1, "npo_beta": 0.1}),
    "simnpo": (0.125, 1e-5, 10, {"retain_weight": 1, "simnpo_beta": 4.5, "simnpo_margin": 0}),
    "simnpo_forget05": (0.1375, 1e-5, 10, {"retain_weight": 1, "simnpo_beta": 2.5, "weight_decay": 0.01}),
    "dpo": (1, 1e-5, 10, {"retain_weight": 1, "dpo_beta": 0.1}),
    "rmu": (1, 1e-5, 10, {"retain_weight": 1, "retain_loss": "activations", "rmu_layer": 7, "rmu_coefficient": 2}),
    "undial": (1, 1e-4, 10, {"retain_loss": "none", "undial_strength": 10}),
    "wga": (1, 1e-5, 5, {"retain_weight": 1, "wga_power": 1}),
    "satimp": (0.1, 1e-5, 5, {"retain_weight": 1, "satimp_saturation": 5, "satimp_importance": 1}),
    "ceu": (1, 1e-5, 10, {"retain_loss": "none"}),
    "altpo": (1, 5e-5, 2, {"retain_weight": 1, "dpo_beta": 0.1}),
    "pdu": (
        1,
        1e-5,
        10,
        {"retain_weight": 100, "retain_loss_limit": 0.3, "dual_step_size": 5, "dual_warmup_epochs": 5},
    ),
    "gradient_ascent": (1, 1e-5, 10, {"retain_loss": "none"}),
}


def on_cpu(path: Path, folder: Path) -> Path:
    """The file with `use_cpu` besides, without which no bf16 is to be had on a machine without a GPU."""
    copy = folder / path.name
    copy.write_text(path.read_text(encoding="utf-8") + "use_cpu: true\n", encoding="utf-8")
    return copy


def dataclasses_of(path: Path) -> list[type]:
    """The dataclasses whose fields are a file's keys: for defaults and small models those of the recipe too."""
    is_small = path.parent.name == "small"
    if not is_small and path.name != DEFAULTS_FILE:
        return [UnlearnConfig]
    recipe = importlib.import_module(f"soul_recipes.{path.parents[is_small].name}")
    found = [each for name, each in vars(recipe).items() if name.endswith("Arguments")]
    own = [each for each in found if not any(issubclass(other, each) and other is not each for other in found)]
    return [*own, UnlearnConfig]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_is_what_both_parsers_read(path, tmp_path):
    """Would catch a field that does not exist, a number that YAML takes for a text, and a value out of its range."""
    copy, kinds = on_cpu(path, tmp_path), dataclasses_of(path)
    parsed = HfArgumentParser(kinds).parse_yaml_file(copy)
    parser = SettingsParser(kinds)
    own = parser.read(copy)
    assert own == yaml.safe_load(copy.read_text(encoding="utf-8"))
    assert parser.build(own) == parsed


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_says_where_it_is_from_and_is_named_by_the_rule(path):
    """Would catch settings without a source, and a file that the rule finds for another optimizer or loss."""
    text = path.read_text(encoding="utf-8")
    assert re.match(r"# \S.{15}", text), "the first line is a comment with the source"
    assert all(len(line) <= 119 for line in text.splitlines())
    content = yaml.safe_load(text)
    if path.name == DEFAULTS_FILE:
        assert content["report_to"] == "none"
        return
    optimizer, _, loss = path.stem.partition("_")
    assert optimizer in ("soul", "sophia", "adamw") and (content["optim"] in SOUL_NAMES) == (optimizer != "adamw")
    if loss in FORGET_LOSSES:
        assert content["forget_loss"] == loss
        assert settings_file(path.parent, optimizer, loss) == path


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_settings_are_not_left_to_chance(path):
    """Would catch a published file that depends on the defaults of a library, which change; SOUL's are our own."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if (
        path.name == DEFAULTS_FILE
        or path.parent.name == "small"
        or path.stem.startswith("soul")
        or path.stem in ("sophia", "adamw")
    ):
        return
    assert set(content) & {"num_train_epochs", "max_steps"}
    needed = {"learning_rate", "per_device_train_batch_size", "weight_decay", "forget_loss"}
    assert needed <= set(content), needed - set(content)
    assert not set(content) & {"output_dir", "report_to", "save_strategy"}, "what no paper is about"


@pytest.mark.parametrize("name", PUBLISHED)
def test_souls_settings_are_those_that_it_published(name):
    """Would catch a change of any of SOUL's numbers, which a run that names it would take for the paper's."""
    content = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    assert content == PUBLISHED[name]


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_have_the_settings_that_they_published(method):
    """Would catch a change of any number of the table of methods."""
    weight, learning_rate, epochs, own = METHODS[method]
    content = yaml.safe_load((CONFIGS / "tofu" / f"adamw_{method}.yaml").read_text(encoding="utf-8"))
    found = (content["forget_weight"], content["learning_rate"], content["num_train_epochs"])
    assert found == (weight, learning_rate, epochs)
    assert {name: content[name] for name in own} == own
    batch = content["per_device_train_batch_size"] * content["gradient_accumulation_steps"]
    assert batch == (35 if method == "altpo" else 32) and content["bf16"] is True


def test_every_forget_loss_has_settings_on_tofu():
    """Would catch a method that falls back to settings of no method, but for those that have none published."""
    without = {"none", "kl", "random"}
    for loss in set(FORGET_LOSSES) - without:
        assert (CONFIGS / "tofu" / f"adamw_{loss}.yaml").is_file(), loss
    assert {"sophia_npo.yaml", "sophia_ga.yaml", "sophia_refusal.yaml"} <= {path.name for path in FILES}
