"""Checkpoints from elsewhere run no code, unless the user says that they may."""

import os
import pickle

import pytest

from soul_trainer.consolidate import command, consolidate


class Evil:
    """Leaves a mark where it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(params=["zero", "fsdp2", "fsdp2_loading"])
def checkpoint(request, tmp_path):
    """A checkpoint whose pickles leave a mark."""
    folder, mark = tmp_path / "checkpoint-1", tmp_path / "mark"
    files = {
        "zero": ["global_step1/mp_rank_00_model_states.pt", "global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt"],
        "fsdp2": ["optimizer_0/.metadata", "pytorch_model_fsdp_0/.metadata"],
        "fsdp2_loading": ["sharded/.metadata"],
    }[request.param]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(pickle.dumps(Evil(mark)))
    if request.param == "zero":
        (folder / "latest").write_text("global_step1")
    return folder


def test_a_checkpoint_s_pickles_are_not_read_unasked(checkpoint, tmp_path, capsys):
    """Would catch a checkpoint from a stranger that runs code when it is merged."""
    with pytest.raises(ValueError, match="holds pickles.*--trust_pickle"):
        consolidate(checkpoint, tmp_path / "out")
    with pytest.raises(ValueError, match="holds pickles"):
        command([str(checkpoint), str(tmp_path / "out")])
    assert not (tmp_path / "mark").exists() and not (tmp_path / "out").exists()


def test_the_mark_is_left_where_pickles_are_trusted(checkpoint, tmp_path):
    """Would catch a test above that passes because its pickles do nothing."""
    with pytest.raises(BaseException):  # noqa: B017 - torch's own is none; no checkpoint is behind the pickle
        consolidate(checkpoint, tmp_path / "out", trust_pickle=True)
    assert (tmp_path / "mark").exists()
