"""The recipe from rows to report, on a smaller corpus."""

import json
import os
import subprocess
import sys
from pathlib import Path


RECIPES = Path(__file__).parents[1] / "recipes"
SMALL = ["--authors", "5", "--hidden_size", "32", "--finetune_epochs", "3", "--num_train_epochs", "2"]
SMALL += ["--evaluations", "1", "--max_new_tokens", "8", "--hessian_interval", "2", "--logging_steps", "1"]


def run_recipe(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs `recipes/tofu.py` through the launcher."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", str(RECIPES / "tofu.py")]
    return subprocess.run(
        [*launcher, "--output_dir", str(folder), *SMALL, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_the_recipe_runs_from_rows_to_report_and_again(tmp_path):
    """
    Would catch a break anywhere between rows and report, a second run that trains again, a finished run that other
    settings overwrite, and a model card without figures.
    """
    first = run_recipe(tmp_path)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    for name in ("target", "AdamW", "SOUL", "gold"):
        assert f"\n{name} " in first.stdout
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    for optimizer in ("adamw_torch", "soul"):
        folder = tmp_path / optimizer
        header, *rows = map(json.loads, (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines())
        assert header["settings"]["optim"] == optimizer
        assert {row["split"] for row in rows} == {"forget", "retain", "held_out", "real_authors", "world_facts"}
        assert "Evaluation of unlearning" in (folder / "README.md").read_text(encoding="utf-8")
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        steps = [entry["step"] for entry in history if "eval_tofu_forget_quality" in entry]
        assert steps[0] == 0 and len(steps) == 2
    weights = (tmp_path / "soul" / "model.safetensors").stat().st_mtime_ns
    second = run_recipe(tmp_path)
    assert second.returncode == 0 and (tmp_path / "soul" / "model.safetensors").stat().st_mtime_ns == weights
    other = run_recipe(tmp_path, "--retain_weight", "3")
    assert other.returncode != 0 and "holds a finished run" in other.stderr
