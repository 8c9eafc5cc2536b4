"""Folders that a command names and that are not what it takes them for."""

import pytest

from soul_eval.comparison import _checkpoint
from soul_trainer import UnlearnConfig
from soul_trainer.loading import load_model, load_tokenizer


def config(folder, wanted) -> UnlearnConfig:
    return UnlearnConfig(str(folder), resume_from_checkpoint=str(wanted), use_cpu=True)


def test_a_checkpoint_of_no_run_is_refused(tmp_path):
    """Would catch a checkpoint that the user named and nobody resumed: the run began anew."""
    for place in ("here/adamw/checkpoint-3", "here/request-1/soul/checkpoint-3", "elsewhere/soul/checkpoint-3"):
        (tmp_path / place).mkdir(parents=True)
    here, own = tmp_path / "here", tmp_path / "here" / "soul"
    with pytest.raises(ValueError, match="elsewhere/soul/checkpoint-3' is of no run in .*here"):
        _checkpoint(config(own, tmp_path / "elsewhere" / "soul" / "checkpoint-3"), here)
    with pytest.raises(ValueError, match="no such folder"):
        _checkpoint(config(own, here / "soul" / "checkpoint-4"), here)
    # Another run's of the same comparison: that run resumes it.
    for other in ("adamw/checkpoint-3", "request-1/soul/checkpoint-3"):
        assert _checkpoint(config(own, here / other), here) is None
    own_checkpoint = here / "adamw" / "checkpoint-3"
    assert _checkpoint(config(here / "adamw", own_checkpoint), here) == str(own_checkpoint)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_folder_that_is_not_there_is_named(load, monkeypatch):
    """Would catch a misspelt folder that is told to check its connection to the internet."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="There is no folder 'out/soull', and as an id on the hub it cannot be loaded"):
        load("out/soull")
