"""
Every command of the tables in docs/tasks.md and docs/training_free.md runs, in small: hub ids stand for folders of the
same layout, and flags that the docs do not have make models, rows and runs of a few kilobytes.
"""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from toys import tiny_llama

from soul_eval.__main__ import main as soul_eval
from soul_recipes import fictitious_news, fictitious_science, rude_townsfolk, small_classifier
from soul_recipes.fictitious_authors import make_corpus
from soul_recipes.hub_layout import dataset_files, write_files, write_hub_layout
from soul_recipes.neutral_tokenizer import train_tokenizer, training_text
from soul_trainer.influence import main as influence


ROOT = Path(__file__).parents[1]


TABLE, TRAINING_FREE = (
    (ROOT / "docs" / name).read_text(encoding="utf-8").partition("## ")[0] for name in ("tasks.md", "training_free.md")
)
COMMANDS = re.findall(r"`((?:accelerate launch|python) [^`]+)`", TABLE + TRAINING_FREE)
RUN = "--evaluations 1 --use_cpu --disable_tqdm True --hessian_interval 2 --hessian_batch_size 2"
FROM_SCRATCH = f"{RUN} --hidden_size 16 --finetune_epochs 0.1 --max_steps 2"
PUBLISHED = f"{RUN} --max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --bf16 False"
# The configurations that there are of WMDP and MMLU.
WMDP = "--subsets wmdp-bio --mmlu_subjects prehistory"
# Flags of each recipe, whatever its models.
OWN = {
    "tofu": "--max_new_tokens 4",
    "muse": "--max_length 48 --knowmem_tokens 4 --verbmem_tokens 8",
    "wmdp": "--max_length 48",
    "copyright": "--chunk_length 24 --prompt_tokens 4,8 --continuation_tokens 6 --num_samples 4",
    "detox": "--forget_rows 8 --max_new_tokens 4 --num_prompts 4 --classifier TOXICITY --fluency_classifier FLUENCY",
    "unlearn": "--max_new_tokens 4",
}
# And those that make its own corpus small.
CORPUS = {"tofu": "--authors 9", "muse": "--articles 2", "wmdp": "--entries 2", "unlearn": "--authors 4"}
# And those that a published run needs beside its hub ids' stand-ins.
BESIDE = {"tofu": "--held_out_rows 0", "wmdp": f"--rmu_layer 1 --questions cais/wmdp --mmlu cais/mmlu {WMDP}"}
ASKED = {
    "tofu": "--max_new_tokens 4",
    "muse": "--knowmem_tokens 4 --verbmem_tokens 8",
    "wmdp": WMDP,
    "copyright": "--prompt_tokens 4,8 --continuation_tokens 6 --num_samples 4",
    "detox": "--max_new_tokens 4 --num_prompts 4 --classifier TOXICITY",
    "own": "--max_new_tokens 4",
}
LINES = "The lamp of Orrin burnt low, and nobody came to fill it. The mule of Tessaly went home by itself at night. "


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory) -> dict[str, str]:
    """Paths by the names that they stand for."""
    folder = tmp_path_factory.mktemp("tasks")
    corpus = {split: rows[:4] for split, rows in make_corpus(3, num_forget=1, num_retain=1).items()}
    tofu = {"forget10": corpus["forget"], "retain90": corpus["retain"], "full": corpus["forget"] + corpus["retain"]}
    tofu |= {name: corpus[name] for name in ("retain", "real_authors", "world_facts")}
    found = {"locuslab/TOFU": write_hub_layout(tofu, folder / "tofu")}
    found["muse-bench/MUSE-News"] = fictitious_news.write_corpus(folder / "news", 2)
    science = fictitious_science.write_corpora(folder / "science", 2)
    found |= {"cais/wmdp-corpora": science["corpora"], "cais/wmdp": science["wmdp"], "cais/mmlu": science["mmlu"]}
    found["PKU-Alignment/PKU-SafeRLHF"] = rude_townsfolk.write_corpus(folder / "townsfolk", 24, 0)
    texts = [{"text": f"{LINES}{number}."} for number in range(20)]
    found["allenai/c4"] = write_files(dataset_files({"en": {"train": texts}}, "C4's columns."), folder / "c4")
    for name, text in (("book.txt", LINES * 4), ("other.txt", LINES[::-1] * 4)):
        (folder / name).write_text(text, encoding="utf-8")
        found[name] = folder / name
    for name, split in (("forget.jsonl", "forget"), ("retain.jsonl", "retain")):
        rows = [{key: row[key] for key in ("question", "answer")} for row in corpus[split]]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found[name] = folder / name
    learnt = [training_text(row) for row in tofu["full"]] + [LINES]
    tokenizer = train_tokenizer(learnt, 400, learnt, learnt, allow_strange=True)
    size = {"vocab_size": len(tokenizer), "hidden_size": 16, "max_position_embeddings": tokenizer.model_max_length}
    tiny_llama(num_hidden_layers=2, initializer_range=0.1, **size).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    found["HUB_ID"] = folder / "model"
    for name, labels in (("TOXICITY", ("toxic", "neutral")), ("FLUENCY", ("clean", "garbled"))):
        judged = {label: [f"{label} {number}" for number in range(20)] for label in labels}
        found[name] = small_classifier.train_classifier(judged, folder / name, use_cpu=True)
    return {name: str(path) for name, path in found.items()}


@pytest.mark.parametrize(
    "command", [pytest.param(command, id=f"{number}-{command[:60]}") for number, command in enumerate(COMMANDS)]
)
def test_every_command_of_the_tasks_table_runs(stand_ins, command, tmp_path, monkeypatch):
    """Would catch a task that the docs promise and no recipe runs, or with flags that it does not have."""
    monkeypatch.chdir(ROOT)
    words = re.sub(r"^(accelerate launch|python) ", "", command)
    name = Path(words.split()[0]).stem
    if name == "finetune":
        flags = "--use_cpu True --disable_tqdm True"
        flags += (
            " --bf16 False --num_train_epochs 1" if "--model " in words else " --hidden_size 16 --finetune_epochs 1"
        )
    elif words.startswith("-m soul_trainer.influence"):
        flags = "--max_iterations 2"
    elif words.startswith("-m soul_eval"):
        name = words.split()[2]
        flags = ASKED[name] + " --device cpu"
    else:
        is_published = "--model" in words
        flags = [PUBLISHED, BESIDE.get(name, "")] if is_published else [FROM_SCRATCH, CORPUS.get(name, "")]
        flags = " ".join([OWN[name], *flags])
    names = sorted(stand_ins, key=len, reverse=True)
    pattern = rf"(?<!\S)({'|'.join(map(re.escape, names))})(?!\S)"
    filled = re.sub(pattern, lambda found: stand_ins[found[1]], f"{words} {flags}")
    script, *arguments = shlex.split(filled)
    if script == "-m":
        where = arguments.index("results")
        arguments[where] = str(tmp_path / "results")
        if arguments[0] == "soul_trainer.influence":
            assert influence(arguments[1:]) == 0
            assert (tmp_path / "results" / "model.safetensors").exists()
            return
        monkeypatch.setattr(sys, "argv", ["soul_eval", *arguments[1:]])
        soul_eval()
        assert (tmp_path / "results" / "summary.json").exists()
    elif script == "recipes/finetune.py":
        arguments[arguments.index("target")] = str(tmp_path / "target")
        importlib.import_module("soul_recipes.finetune").main(arguments)
        assert list(tmp_path.glob("target-*/model.safetensors"))
    else:
        importlib.import_module(f"soul_recipes.{name}").main([*arguments, "--output_dir", str(tmp_path / "out")])
        page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
        assert "<table" in page and list((tmp_path / "out").rglob("model.safetensors"))


def test_each_task_has_a_command_in_every_column_that_it_can_have():
    """Would catch a table that has lost a task or a column to an edit."""
    assert TRAINING_FREE.count("`python") == 5
    rows = [line for line in TABLE.splitlines() if line.startswith("| ")][1:]
    recipes = [re.search(r"recipes/(\w+)\.py", row)[1] for row in rows]
    assert recipes == ["tofu", "muse", "wmdp", "copyright", "detox", "unlearn", "finetune"]
    assert [row.count("`") // 2 for row in rows] == [4, 4, 3, 3, 3, 3, 2]
