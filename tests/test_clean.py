"""What killed runs leave behind: found by its name, and deleted only when told and only if nothing is lost."""

import os
import signal
import socket
import tempfile
from multiprocessing import get_context
from pathlib import Path

import pytest
from datasets import Dataset
from scenes import FORGET, scene_model, scene_tokenizer

from soul_trainer import sources
from soul_trainer.clean import command, main
from soul_trainer.collator import UnlearnCollator
from soul_trainer.engines import Engine
from soul_trainer.formats import prepare
from soul_trainer.held_folder import hold_folder, hold_output
from soul_trainer.leftovers import FINDINGS, LOCK, MEASUREMENT, PART, ROWS, delete_leftovers, find_leftovers
from soul_trainer.reference_rows import RowForward, add_top_tokens
from soul_trainer.scratch import PREFIX, machine_of, process_of, reference_folder, scratch_folder


FINISHED = (
    "unlearning.json",
    "soul.rows.jsonl",
    "model.safetensors",
    "curvature.safetensors",
    "checkpoint-30/model.safetensors",
    "checkpoint-30/trainer_state.json",
    "target-1234abcd/model.safetensors",
    "_references/rows.arrow",
    "video.mp4.part",
    "album.part/01.mp3",
    "rows.jsonl.part-x",
)
LEFT = {
    "soul/_reference-0a1b2c3d/rows.arrow": ROWS,
    "soul/README.md.part": PART,
    "soul/unlearning.json.part": PART,
    "influence.part/model.safetensors": PART,
    "empty.part/": PART,
    "checkpoint-30/_consolidate-ab/zero/states.pt": PART,
    "soul.rows.jsonl.part-0": FINDINGS,
    "soul.rows.jsonl.part-11": FINDINGS,
    "curvature.safetensors.progress.safetensors": MEASUREMENT,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of runs, some of which were killed; and a place of its own for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for name in (*FINISHED, *LEFT):
        path = tmp_path / "out" / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text("secret", encoding="utf-8")
    return tmp_path / "out"


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def top(name: str) -> str:
    """The file or folder that is listed for a file."""
    parts = Path(name).parts
    return next(("/".join(parts[: n + 1]) for n, part in enumerate(parts) if part[0] == "_" or ".part" in part), name)


def test_it_lists_and_deletes_nothing_but_leftovers(folder, capsys):
    """Would catch a finished result or a checkpoint that is deleted, and rows to forget that stay on disk."""
    before = names_in(folder)
    command([str(folder)])
    printed = capsys.readouterr().out
    found = {leftover.path.relative_to(folder).as_posix(): leftover.kind for leftover in find_leftovers(folder)}
    assert found == {top(name): kind for name, kind in LEFT.items()}
    assert all(str(folder / name) in printed for name in found) and f"{len(found)} can be deleted" in printed
    assert names_in(folder) == before, "deleted without being told"
    command([str(folder), "--delete"])
    assert f"Deleted: {len(found)}." in capsys.readouterr().out
    assert names_in(folder) == set(FINISHED) and not (folder / "empty.part").exists()
    command([str(folder), "--delete"])
    assert "There is nothing to delete." in capsys.readouterr().out


def test_a_checkpoint_in_a_half_trained_model_is_kept(folder):
    """Would catch hours of training that a look for copies of rows takes away."""
    checkpoint = folder / "target-5678.part" / "checkpoint-100" / "model.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("weights", encoding="utf-8")
    leftovers = find_leftovers(folder)
    (kept,) = (each for each in leftovers if each.kept_because)
    assert kept.path == folder / "target-5678.part" and kept.kept_because == "it holds a checkpoint"
    assert kept not in delete_leftovers(leftovers) and checkpoint.exists()


def test_what_a_running_process_reads_is_kept(folder):
    """Would catch rows that are pulled from under a run on the same machine."""
    own = Path(reference_folder(folder))
    with scratch_folder() as scratch:
        assert process_of(own.name) == process_of(Path(scratch).name) == os.getpid()
        kept = {each.path for each in find_leftovers(folder) if each.kept_because}
        assert kept == {own, Path(scratch)}
        delete_leftovers(find_leftovers(folder))
        assert own.exists() and Path(scratch).exists()


def test_links_are_not_followed(folder, tmp_path):
    """Would catch a deletion outside of the folder that was named."""
    other = tmp_path / "other"
    (other / "_reference-1").mkdir(parents=True)
    (other / "_reference-1" / "rows.arrow").write_text("of another", encoding="utf-8")
    (folder / "link").symlink_to(other)
    (folder / "_reference-link").symlink_to(other / "_reference-1")
    delete_leftovers(find_leftovers(folder))
    assert (other / "_reference-1" / "rows.arrow").exists()


def test_a_folder_that_is_none_is_an_error(tmp_path, capsys):
    """Would catch a typing error that looks like a clean folder."""
    assert main([str(tmp_path / "typo")]) == 1
    assert "is no folder" in capsys.readouterr().err


def work_until_killed(out: Path, rows: Path, temporary: Path) -> None:
    """What a run keeps on disk, cut off while it reads its rows."""
    tempfile.tempdir = str(temporary)
    tokenizer = scene_tokenizer()
    forget = prepare(Dataset.from_list(FORGET), tokenizer, 64, None, "forget")
    forward = RowForward(scene_model(), UnlearnCollator.for_tokenizer(tokenizer), 4, Engine(), False)
    kept = add_top_tokens(forget, 3, out, forward)
    sources.load_dataset_builder = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
    sources.load_split(str(rows))
    del kept


def test_a_run_that_is_killed_leaves_what_is_found(tmp_path, monkeypatch):
    """Would catch names that the trainer has changed and this list has not: the real ones, after a real kill."""
    temporary, out, rows = tmp_path / "temporary", tmp_path / "out", tmp_path / "rows"
    temporary.mkdir()
    rows.mkdir()
    (rows / "train.jsonl").write_text('{"text": "a secret"}', encoding="utf-8")
    run = get_context("fork").Process(target=work_until_killed, args=(out, rows, temporary))
    run.start()
    run.join(120)
    assert run.exitcode == -signal.SIGKILL
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    leftovers = find_leftovers(out)
    assert [each.kind for each in leftovers] == [ROWS, ROWS]
    assert leftovers[0].path.parent == out and leftovers[0].num_bytes > 100
    assert leftovers[1].path.parent == temporary and leftovers[1].path.name.startswith(PREFIX)
    assert len(delete_leftovers(leftovers)) == 2 and not list(out.iterdir()) and not list(temporary.glob(f"{PREFIX}*"))
    assert sources.load_split(str(rows))["text"][:] == ["a secret"]


def test_the_next_run_deletes_what_a_killed_one_left(folder):
    """Would catch copies of rows that stay because nobody thinks of cleaning, or a measurement that is begun anew."""
    name = f"{PREFIX}999999999-x"
    (folder.parent / "temporary" / name).mkdir()
    with hold_folder(folder):
        assert names_in(folder) == {*FINISHED, LOCK} | {key for key, kind in LEFT.items() if kind not in (ROWS, PART)}
    assert not (folder.parent / "temporary" / name).exists()


def test_the_next_run_leaves_alone_what_others_write_below_it(folder):
    """Would catch a run that deletes the rows, or the half-written model, of one at work in a folder within."""
    with hold_output(folder / "influence"), hold_folder(folder / "soul"), hold_folder(folder):
        assert (folder / "influence.part" / "model.safetensors").exists()
        assert not (folder / "empty.part").exists()


@pytest.mark.parametrize("process, machine", [("own", "own"), ("own", "elsewhere"), ("dead", "own")])
def test_copies_of_rows_tell_whose_they_are(folder, process, machine):
    """Would catch rows that are deleted under a run whose processes are on several machines."""
    number = os.getpid() if process == "own" else 999_999_999
    host = socket.gethostname() if machine == "own" else "node-7.cluster"
    copies = folder / "soul" / f"_reference-{number}-{host}-0a1b_c3d"
    copies.mkdir()
    assert (process_of(copies.name), machine_of(copies.name)) == (number, host)
    is_kept = (process, machine) == ("own", "own")
    assert [each.kept_because is not None for each in find_leftovers(folder) if each.path == copies] == [is_kept]
    own = [f"{number}-{host}"]
    assert all(each.kept_because for each in find_leftovers(folder, own=own) if each.path == copies)
