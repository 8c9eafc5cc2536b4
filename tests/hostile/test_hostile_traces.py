"""What knows the rows to forget: docs/privacy.md names every file that a run writes and that has them in it."""

import gc
import os
import stat
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from privacy import PATTERNS, files_with
from scenes import RETAIN, scene_config, scene_model, scene_tokenizer, scene_trainer, spoil
from test_recipe_unlearn import FLAGS, OTHERS, ROWS, learnt_model, text_tokenizer
from transformers import TrainerCallback

from soul_recipes import unlearn
from soul_trainer import UnlearnConfig, UnlearnTrainer
from soul_trainer.formats import prepare
from soul_trainer.held_folder import hold_folder


ROOT = Path(__file__).parents[2]
SECRET = "Zanzibarbaz"


def test_every_file_with_rows_is_on_the_page_and_private(tmp_path, monkeypatch):
    """Would catch a file with rows that nobody is told of, wherever it is, or that everybody may read."""
    home, given, out = (tmp_path / name for name in ("home", "given", "out"))
    for folder in (home, given):
        folder.mkdir()
    for name in ("HOME", "HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(home))
    rows = [*ROWS, {"question": "Who is Wendel?", "answer": f"Wendel is {SECRET}."}]
    tokenizer = text_tokenizer()
    learnt_model(tokenizer, ROWS + OTHERS, num_steps=60).save_pretrained(given / "model")
    tokenizer.save_pretrained(given / "model")
    for name, members in (("forget", rows), ("retain", OTHERS)):
        Dataset.from_list(members).to_json(given / f"{name}.jsonl")
    command = ["--model", str(given / "model"), "--forget", str(given / "forget.jsonl"), *FLAGS]
    command += ["--retain", str(given / "retain.jsonl"), "--output_dir", str(out), "--save_strategy", "epoch"]
    command += ["--attacks", "relearning,quantization_8", "--reference", "cached_topk", "--forget_loss", "undial"]
    old_umask = os.umask(0)
    try:
        unlearn.main(command)
    finally:
        os.umask(old_umask)
    gc.collect()  # of the trainer, with which its copies of rows go
    found = files_with(tmp_path, SECRET)
    assert not [path for path in found if not path.is_relative_to(out) and not path.is_relative_to(given)]
    names = [path.relative_to(out).as_posix() for path in found if path.is_relative_to(out)]
    assert {"soul.rows.jsonl", "target.rows.jsonl", "report.html"} <= set(names)
    assert not [name for name in names if not any(fnmatch(name, pattern) for pattern in PATTERNS)]
    for path in found:
        if path.is_relative_to(out):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert not list(out.rglob("_reference-*"))


def test_rows_of_a_cached_dataset_leave_nothing_beside_it(tmp_path):
    """Would catch tokens of rows to forget in the cache of `datasets`, beside a file that the user deletes."""
    path, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    Dataset.from_list([{"question": "who is Mara ?", "answer": f"{SECRET} ."}]).to_json(path)
    rows = load_dataset("json", data_files=str(path), cache_dir=str(cache), split="train")
    before = {each: each.stat().st_size for each in cache.rglob("*")}
    tokens = prepare(rows, scene_tokenizer(), 64, None, "forget")
    prepare(tokens.select_columns(["input_ids", "labels"]), scene_tokenizer(), 64, None, "forget")
    UnlearnTrainer(scene_model(), scene_config(tmp_path / "out"), rows, RETAIN, scene_tokenizer())
    assert {each: each.stat().st_size for each in cache.rglob("*")} == before


HUB = {"push_to_hub": True, "hub_model_id": "someone/out"}


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
@pytest.mark.parametrize("forget_loss", ["npo", "ga", "task_vector"])
def test_nothing_is_pushed_before_the_run_is_over(strategy, forget_loss):
    """Would catch a repository whose history keeps a model that still knows the rows."""
    retain = {"retain_loss": "none"} if forget_loss == "task_vector" else {}
    with pytest.raises(ValueError, match=f"`hub_strategy='{strategy}'` would publish.*set it to 'end'"):
        UnlearnConfig("out", forget_loss=forget_loss, hub_strategy=strategy, **HUB, **retain)
    assert UnlearnConfig("out", forget_loss=forget_loss, **HUB, **retain).hub_strategy == "end"


def test_the_token_is_in_no_file(tmp_path):
    """Would catch a token of the hub in the pickled arguments, which are uploaded beside the model."""
    token = "hf_" + "q" * 34
    trainer = scene_trainer(tmp_path, hub_token=token, save_strategy="epoch")
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "training_args.bin").exists() and (tmp_path / "checkpoint-2" / "training_args.bin").exists()
    assert not files_with(tmp_path, token) and trainer.args.hub_token == token


def test_a_diverged_model_is_neither_saved_nor_pushed(tmp_path):
    """Would catch a model that is no model any more, on the hub under the name of a good one."""

    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.lm_head.weight.data[0, 0] = float("nan")

    trainer = scene_trainer(tmp_path, save_strategy="no")
    trainer.add_callback(Diverge())
    with pytest.raises(FloatingPointError):
        trainer.train()
    with pytest.raises(FloatingPointError, match="are not saved"):
        trainer.save_model()
    assert not list(tmp_path.rglob("*.safetensors"))


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from scenes import scene_trainer
from transformers import TrainerCallback

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        os.kill(os.getpid(), {signal})

settings = {{"forget_loss": "undial", "reference": "cached_topk", "reference_topk": 4}}
trainer = scene_trainer({folder!r}, save_strategy="no", **settings)
trainer.add_callback(Kill())
trainer.train()
"""


@pytest.mark.parametrize("signal", [9, 15])
def test_what_a_killed_run_left_is_deleted_by_a_command_and_by_the_next_run(tmp_path, signal):
    """Would catch copies of rows that a kill leaves and that nothing lists."""
    code = KILLED.format(tests=str(ROOT / "tests"), folder=str(tmp_path / "out"), signal=signal)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=120)
    assert done.returncode == -signal, done.stderr.decode()[-2000:]
    assert list((tmp_path / "out").glob("_reference-*"))
    if signal == 15:
        # The next run into the folder, of whatever kind.
        with hold_folder(tmp_path / "out"):
            assert not list((tmp_path / "out").glob("_reference-*"))
        return
    clean = [sys.executable, "-m", "soul_trainer.clean", str(tmp_path / "out"), "--delete"]
    said = subprocess.run(clean, capture_output=True, text=True, env=environment, timeout=60)
    assert said.returncode == 0, said.stderr
    assert not list((tmp_path / "out").glob("_reference-*")) and "copies of rows" in said.stdout


def test_the_spoilt_scene_is_healed_by_its_handle():
    """Would catch a helper of these tests that spoils what comes after."""
    model = scene_model()
    before = model(torch.tensor([[1, 2]])).logits
    spoil(model, "Mara").remove()
    assert model(torch.tensor([[1, 2]])).logits.equal(before)
