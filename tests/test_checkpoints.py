"""Which checkpoints are whole, and what is resumed."""

import logging
import os
import shutil

import pytest
import torch
from scenes import largest_difference, scene_trainer, weights

from soul_trainer.consolidate import consolidate
from soul_trainer.engines import damage_of


SETTINGS = {"num_train_epochs": 6, "save_strategy": "steps", "save_steps": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with the checkpoints 4, 8 and 12, and its weights."""
    folder = tmp_path_factory.mktemp("run")
    trainer = scene_trainer(folder, **SETTINGS)
    trainer.train()
    return folder, weights(trainer.model)


@pytest.mark.parametrize(
    ("file", "how"),
    [
        *(("trainer_state.json", how) for how in ("missing", "cut", "empty")),
        *((name, "cut") for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")),
        ("training_args.bin", "empty"),
    ],
)
def test_damage_is_seen_and_the_checkpoint_before_is_resumed(run, tmp_path, caplog, file, how):
    """Would catch a resume that dies of half a file, or goes on from it, where a whole checkpoint is at hand."""
    folder = shutil.copytree(run[0], tmp_path / "run")
    path = folder / "checkpoint-12" / file
    assert damage_of(path.parent) is None
    if how == "missing":
        path.unlink()
    else:
        os.truncate(path, 0 if how == "empty" else path.stat().st_size // 2)
    assert file in damage_of(path.parent)
    trainer = scene_trainer(folder, **SETTINGS)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-12 is skipped, because it was not written to its end" in caplog.text
    assert trainer.state.log_history[-1]["step"] == 12 and largest_difference(run[1], weights(trainer.model)) == 0


def test_a_damaged_checkpoint_that_was_asked_for_by_name_is_refused(run, tmp_path):
    """Would catch a run that goes on from another checkpoint than the one that was asked for."""
    folder = shutil.copytree(run[0] / "checkpoint-8", tmp_path / "checkpoint-8")
    (folder / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="was not written to its end: it has no trainer_state.json.*Name an earlier"):
        scene_trainer(tmp_path / "other", **SETTINGS).train(resume_from_checkpoint=str(folder))
    with pytest.raises(ValueError, match="found no whole checkpoint of this run in"):
        scene_trainer(tmp_path, **SETTINGS).train(resume_from_checkpoint=True)


def test_files_of_others_are_no_damage(run, tmp_path):
    """Would catch a whole checkpoint that is skipped because of a file beside it, or of the number of processes."""
    folder = shutil.copytree(run[0] / "checkpoint-8", tmp_path / "checkpoint-8")
    (folder / "vocabulary.bin").write_bytes(b"not an archive")
    torch.save({}, folder / "notes.pt", _use_new_zipfile_serialization=False)
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    assert damage_of(folder) is None


def test_consolidating_names_what_it_cannot_do(run, tmp_path):
    """Would catch a checkpoint that is overwritten, and a checkpoint without shards that is taken for one with."""
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists: name a folder that does not"):
        consolidate(run[0] / "checkpoint-4", tmp_path / "there")
    with pytest.raises(ValueError, match="holds no shards of DeepSpeed ZeRO or FSDP2"):
        consolidate(run[0] / "checkpoint-4", tmp_path / "new")
    assert not (tmp_path / "new").exists()
