"""A difference applied again, by command: the figures of a later version before and after."""

import copy
import json

import pytest
import torch
from scenes import scene_model, scene_tokenizer
from test_difference import FORGET, HELD_OUT, NEW, RETAIN, answer_loss, learn, saved

from soul_eval.__main__ import main as soul_eval
from soul_trainer.difference import save_difference


def forgetting(model):
    """A copy that has lost what it knew of the rows to forget."""
    other = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3)
    for _ in range(25):
        (5 * answer_loss(other, RETAIN) - answer_loss(other, FORGET).clamp(max=2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return other


@pytest.fixture(scope="module")
def later(tmp_path_factory):
    """A folder with a later version of a model, what was unlearned of the earlier one, and rows."""
    folder = tmp_path_factory.mktemp("later")
    base = learn(scene_model(hidden_size=32, intermediate_size=48), FORGET + RETAIN + HELD_OUT, 100, 5e-3)
    save_difference(base, forgetting(base), folder / "difference.safetensors")
    saved(learn(base, NEW + RETAIN + HELD_OUT, 20, 2e-3), folder / "model")
    scene_tokenizer().save_pretrained(folder / "model")
    for name, rows in (("forget", FORGET), ("held_out", HELD_OUT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(later, output, *flags):
    named = {"model": later / "model", "difference": later / "difference.safetensors", "output": output}
    named |= {name: later / f"{name}.jsonl" for name in ("forget", "held_out")}
    arguments = [text for name, value in named.items() for text in (f"--{name}", str(value))]
    return ["reapply", *arguments, "--generate", "False", "--device", "cpu", *flags]


def test_the_figures_say_what_came_and_what_it_cost(later, tmp_path, capsys):
    """Would catch figures of the same model twice, a run that starts over, and results that are replaced unasked."""
    assert soul_eval(command(later, tmp_path)) == 0
    said = capsys.readouterr().out
    assert "\nbefore " in said and "\nafter " in said and str(tmp_path / "model") in said
    before, after = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("before", "after"))
    change = {name: after[name]["value"] - before[name]["value"] for name in ("forget_nll", "held_out_nll")}
    assert change["forget_nll"] > 0.1 and change["forget_nll"] > 3 * abs(change["held_out_nll"]), change
    # Once more, after a kill: what is there already stays.
    model, rows = tmp_path / "model" / "model.safetensors", tmp_path / "after" / "rows.jsonl"
    made = model.stat().st_mtime_ns
    rows.unlink()
    assert soul_eval(command(later, tmp_path)) == 0
    assert model.stat().st_mtime_ns == made and rows.exists()
    assert soul_eval(command(later, tmp_path, "--scale", "0.5")) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert soul_eval(command(later, tmp_path, "--scale", "0.5", "--overwrite")) == 0
    half = json.loads((tmp_path / "after" / "summary.json").read_text())["forget_nll"]["value"]
    assert before["forget_nll"]["value"] < half < after["forget_nll"]["value"]


def test_what_does_not_fit_is_an_error_before_any_question(later, tmp_path, capsys):
    """Would catch minutes of evaluation that end in a missing file, and processes that all write one model."""
    wrong = command(later, tmp_path)
    wrong[wrong.index("--difference") + 1] = str(later / "model" / "model.safetensors")
    assert soul_eval(wrong) == 1 and "has the format None" in capsys.readouterr().err
    assert not (tmp_path / "before").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert soul_eval(command(later, tmp_path)) == 1
    assert "runs in one process" in capsys.readouterr().err
