"""Every command of the tables in docs/methods.md runs, on a model and rows of a few kilobytes."""

import re
import shlex
from pathlib import Path

import pytest
from datasets import Dataset
from toys import tiny_llama
from transformers import AutoConfig

from soul_eval.experiment import Experiment, UnlearningTask
from soul_eval.rows import read_rows
from soul_recipes import tofu
from soul_recipes.fictitious_authors import make_corpus
from soul_recipes.hub_layout import write_hub_layout
from soul_recipes.neutral_tokenizer import train_tokenizer, training_text
from soul_recipes.small_llama import SmallModelArguments
from soul_trainer.objectives import FORGET_LOSSES, RETAIN_LOSSES


ROOT = Path(__file__).parents[1]


DOCS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
# What makes a published run small: two steps in float32, short answers, a layer that a small model has.
SMALL = "--max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --bf16 False --use_cpu "
SMALL += (
    "--evaluations 1 --max_new_tokens 4 --held_out_rows 0 --hessian_batch_size 2 --rmu_layer 0 --disable_tqdm True"
)


def section(title: str) -> str:
    """The text of a section, up to the next."""
    return re.split(r"^## ", DOCS.partition(f"## {title}\n")[2], flags=re.MULTILINE)[0]


def table_of(title: str) -> list[list[str]]:
    """The cells of the first table in a section, without its header."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


METHODS = [
    pytest.param(cell.strip("`"), optimizer, id=f"{name}-{optimizer}")
    for name, *cells in table_of("Every method as a command")
    for optimizer, cell in zip(("adamw_torch", "soul"), cells, strict=True)
]


@pytest.fixture(scope="session")
def models_and_rows(tmp_path_factory):
    """Flags of a target, a gold model and a dataset in TOFU's layout, of four rows a split."""
    folder = tmp_path_factory.mktemp("methods")
    corpus = {split: rows[:4] for split, rows in make_corpus(3, num_forget=1, num_retain=1).items()}
    splits = {"forget10": corpus["forget"], "retain90": corpus["retain"], "retain": corpus["retain"]}
    splits |= {name: corpus[name] for name in ("real_authors", "world_facts")}
    dataset = write_hub_layout(splits, folder / "tofu")
    texts = {split: [training_text(row) for row in rows] for split, rows in splits.items()}
    everything = [text for split in texts.values() for text in split]
    tokenizer = train_tokenizer(everything, 400, texts["retain"], texts["forget10"], allow_strange=True)
    for name, seed in (("target", 0), ("gold", 1)):
        size = {"vocab_size": len(tokenizer), "hidden_size": 16, "max_position_embeddings": tokenizer.model_max_length}
        tiny_llama(seed, num_hidden_layers=2, initializer_range=0.1, **size).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return f"--dataset {dataset} --model {folder / 'target'} --gold {folder / 'gold'}"


@pytest.mark.parametrize("command, optimizer", METHODS)
def test_every_command_of_the_methods_table_unlearns(models_and_rows, command, optimizer, tmp_path, monkeypatch):
    """Would catch a method that the docs promise and the recipe does not run, or runs with another optimizer."""
    monkeypatch.chdir(ROOT)
    script, *arguments = shlex.split(command.replace("$TOFU", models_and_rows))
    assert script == "recipes/tofu.py"
    tofu.main([*arguments, *shlex.split(SMALL), "--output_dir", str(tmp_path)])
    header, rows = read_rows(tmp_path / f"{optimizer}.rows.jsonl")
    given = dict(zip(arguments[::2], arguments[1::2]))
    settings = header["settings"]
    assert settings["optim"] == optimizer and settings["forget_loss"] == given.get("--forget_loss", "ga")
    assert len(rows) == 16
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("command, optimizer", [param for param in METHODS if "--config" not in param.values[0]])
def test_a_command_without_tofu_has_settings_for_the_small_model(models_and_rows, command, optimizer, tmp_path):
    """Would catch a method that, without a model, asks for a layer or a retain loss that is not to be had there."""
    model = shlex.split(models_and_rows)[3]
    arguments = [*shlex.split(command.replace("$TOFU", ""))[1:], "--use_cpu", "--output_dir", str(tmp_path)]
    experiment = Experiment("tofu", tofu.CONFIGS, tofu.TofuArguments, SmallModelArguments, command_line=arguments)
    assert experiment.arguments[1].num_hidden_layers == AutoConfig.from_pretrained(model).num_hidden_layers
    rows = Dataset.from_list([{"question": "Who is Ada?", "answer": "A poet.", "alternate": "A cook."}] * 2)
    task = UnlearningTask("tofu", "", model, rows, rows, [], gold=model)
    experiment.make_trainer(task, experiment.settings(optimizer))


def test_the_tables_name_every_loss_and_its_settings():
    """Would catch a loss or a setting that the docs do not have, and one that they have and nobody else."""
    for title, table in (("Forget losses", FORGET_LOSSES), ("Retain losses", RETAIN_LOSSES)):
        rows = {cells[0].strip("`"): cells for cells in table_of(title)}
        assert set(rows) == set(table)
        for name, objective in table.items():
            if objective is not None:
                assert rows[name][1] == objective.per, name
                missing = [field for field in objective.settings if f"`{field}`" not in " ".join(rows[name])]
                assert not missing, f"{name}: {missing}"
    commands = " ".join(command for param in METHODS for command in param.values[:1])
    assert set(re.findall(r"--forget_loss (\w+)", commands)) == set(FORGET_LOSSES)
