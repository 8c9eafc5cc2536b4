"""Two commands in one folder, and processes of one run that do not agree: the second is told, and nothing is lost."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from experiment_scenes import scene_experiment, scene_task
from scenes import FORGET, largest_difference, scene_model, scene_tokenizer, scene_trainer, weights
from transformers import TrainingArguments

from soul_eval import commands, reapply
from soul_eval.attacks import command as attack
from soul_eval.attacks.running import AttackArguments
from soul_eval.running import EvalArguments, run_suite
from soul_eval.suites import own
from soul_recipes import study
from soul_recipes.muse import run_growing
from soul_recipes.training import train_once
from soul_trainer import influence_command
from soul_trainer.consolidate import consolidate
from soul_trainer.curvature.command import CurvatureArguments
from soul_trainer.curvature.command import run as run_curvature
from soul_trainer.difference import apply_difference, save_difference
from soul_trainer.formats import prepare
from soul_trainer.held_folder import hold_folder, hold_output
from soul_trainer.leftovers import LOCK, lock_of


TESTS = Path(__file__).parents[1]
HOLDER = """
import sys, time
from soul_trainer.held_folder import hold_folder
with hold_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a folder."""
    run = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "held\n"
    yield run
    run.kill()
    run.wait()


def asked(folder: Path) -> tuple:
    """An evaluation in small."""
    scene_model().save_pretrained(folder / "model")
    scene_tokenizer().save_pretrained(folder / "model")
    (folder / "forget.jsonl").write_text('{"question": "who is Mara ?", "answer": "the writer Mara ."}\n')
    args = EvalArguments(model=str(folder / "model"), output=str(folder / "out"), device="cpu")
    return own.SUITE, args, own.OwnArguments(str(folder / "forget.jsonl"), generate=False)


COMMANDS = {
    "training": lambda folder: scene_trainer(folder / "out").train(),
    "evaluation": lambda folder: run_suite(*asked(folder)),
    "experiment": lambda folder: scene_experiment(folder, "--optim", "soul").run(scene_task(folder)),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_second_command_in_a_folder_is_told_who_holds_it(tmp_path, holder, command):
    """Would catch two runs that overwrite each other's checkpoints, or two evaluations each other's rows."""
    with pytest.raises(ValueError, match=f"/out' is in use by process {holder.pid} on "):
        COMMANDS[command](tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]


def difference(folder: Path) -> Path:
    """A saved difference, beside the model that it is of."""
    scene_model().save_pretrained(folder / "model")
    return save_difference(scene_model(), scene_model(1), folder / "saved.safetensors")


def finetuned(folder: Path) -> Path:
    """A training in small, whose folder a hash names."""
    rows = prepare(FORGET, scene_tokenizer(), 64).select_columns(["input_ids", "labels"])
    args = TrainingArguments(str(folder), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    return train_once(scene_model, rows, scene_tokenizer(), folder / "model", args, [])


OF_FOLDERS = {
    "attack": lambda out: attack.run(AttackArguments(model="m", target="t", output=out), None, None),
    "reapply": lambda out: reapply.main(
        ["--model", "m", "--difference", "d", "--forget", "f", "--retain", "r", "--output", out]
    ),
    "report": lambda out: commands.report(["soul=rows.jsonl", "--output", out]),
    "growing": lambda out: run_growing(scene_experiment(Path(out).parent, "--optim", "soul"), None, {}),
}
OF_OUTPUTS = {
    "influence": lambda out: influence_command.run(
        influence_command.CommandArguments(model="m", forget="f", retain="r", output=out), None
    ),
    "curvature": lambda out: run_curvature(CurvatureArguments(model="m", dataset="d", output=out, device="cpu")),
    "consolidate": lambda out: consolidate(Path(out).with_name("checkpoint-1"), out),
    "save": lambda out: save_difference(scene_model(), scene_model(1), out),
    "apply": lambda out: apply_difference(Path(out).with_name("model"), difference(Path(out).parent), 1.0, Path(out)),
}


@pytest.mark.parametrize("command", OF_FOLDERS)
def test_every_command_waits_for_its_folder(tmp_path, command):
    """Would catch a command that writes into the folder of another."""
    with hold_folder(tmp_path / "out"), pytest.raises(ValueError, match=r"/out' is in use by process \d+ on "):
        OF_FOLDERS[command](str(tmp_path / "out"))


@pytest.mark.parametrize("command", OF_OUTPUTS)
def test_every_command_waits_for_its_output(tmp_path, command):
    """Would catch two commands that write one file, or the same half of a model, at a time."""
    with hold_output(tmp_path / "out"), pytest.raises(ValueError, match=r"/out' is in use by process \d+ on "):
        OF_OUTPUTS[command](str(tmp_path / "out"))
    assert not (tmp_path / lock_of("out")).exists()


def test_a_model_is_trained_once_at_a_time(tmp_path):
    """Would catch two recipes that need the same target and train it into one folder."""
    found = finetuned(tmp_path)
    shutil.rmtree(found)
    with hold_output(found), pytest.raises(ValueError, match="is in use by process"):
        finetuned(tmp_path)


def test_a_study_s_file_is_of_one_process(tmp_path):
    """Would catch lines of two processes in one file of runs, one within another."""
    args = argparse.Namespace(shard="0/1", name=None, output_dir=tmp_path)
    with hold_output(tmp_path / "runs-0.jsonl"), pytest.raises(ValueError, match="is in use by process"):
        study.work([], args)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_holder_that_was_killed_holds_nothing(tmp_path, holder, number):
    """Would catch a folder that nobody can use any more after a kill."""
    holder.send_signal(number)
    holder.wait()
    with hold_folder(tmp_path / "out"):
        assert json.loads((tmp_path / "out" / LOCK).read_text())["process"] == os.getpid()
    assert not (tmp_path / "out" / LOCK).exists()


def test_a_run_that_fails_lets_go(tmp_path):
    """Would catch a run that cannot be started again in the same process, as in a notebook."""
    trainer = scene_trainer(tmp_path)
    trainer.train_dataset.forget = None
    with pytest.raises((TypeError, AttributeError)):
        trainer.train()
    scene_trainer(tmp_path).train()
    assert not (tmp_path / LOCK).exists()


def test_a_search_holds_the_folder_of_all_its_trials(tmp_path):
    """Would catch a trial that is refused because its search holds the folder."""
    with hold_folder(tmp_path / "search"):
        scene_trainer(tmp_path / "search" / "run-0").train()


DIFFERING = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
from scenes import FORGET, RETAIN, scene_model, scene_trainer, scene_tokenizer
from soul_trainer.formats import prepare

folder, what = sys.argv[1:]
rank = int(os.environ["RANK"])
settings = dict(per_device_train_batch_size=2, num_train_epochs=1, ddp_backend="gloo")
if rank and what in ("rho", "seed", "learning_rate"):
    settings[what] = {{"rho": 3.0, "seed": 7, "learning_rate": 0.5}}[what]
model = scene_model(rms_norm_eps=1e-3) if rank and what == "model" else scene_model()
trainer = scene_trainer(folder, model, **settings)
if rank and what == "retain_dataset":
    trainer.train_dataset.retain = prepare(RETAIN[1:], scene_tokenizer(), 64)
try:
    trainer.train()
except ValueError as error:
    with open(f"{{folder}}-{{rank}}.txt", "w") as file:
        file.write(str(error))
torch.distributed.barrier()
os._exit(0)  # torch's own threads now and then abort an orderly exit
"""


@pytest.mark.parametrize("what", ["rho", "seed", "learning_rate", "model", "retain_dataset"])
def test_processes_that_are_not_at_the_same_stop_with_its_name(tmp_path, what):
    """Would catch a run whose processes train with other settings, rows or models, and average the result."""
    script = tmp_path / "worker.py"
    script.write_text(DIFFERING.format(tests=str(TESTS)), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "out"), what], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for rank in range(2):
        assert f"`{what}` differs between processes" in (tmp_path / f"out-{rank}.txt").read_text()
    assert not list((tmp_path / "out").glob("*"))


def test_a_full_disk_leaves_the_former_checkpoint_and_says_where(tmp_path, monkeypatch):
    """Would catch a save that breaks the checkpoint before it, or that a resume takes for whole."""
    trainer = scene_trainer(tmp_path, save_strategy="steps", save_steps=1, num_train_epochs=4)
    save = type(trainer.model).save_pretrained

    def save_until_full(self, folder, *args, **kwargs):
        if str(folder).endswith("checkpoint-3"):
            raise OSError(28, "No space left on device", f"{folder}/model.safetensors")
        return save(self, folder, *args, **kwargs)

    monkeypatch.setattr(type(trainer.model), "save_pretrained", save_until_full)
    with pytest.raises(OSError, match="No space left on device.*checkpoint-3"):
        trainer.train()
    monkeypatch.undo()
    whole = scene_trainer(tmp_path / "whole", num_train_epochs=4)
    whole.train()
    resumed = scene_trainer(tmp_path, num_train_epochs=4)
    resumed.train(resume_from_checkpoint=True)
    assert largest_difference(weights(resumed.model), weights(whole.model)) == 0
