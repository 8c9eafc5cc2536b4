"""Fine-tuning scripts that never heard of us, with `--optim soul`, in processes of their own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scenes import FORGET, RETAIN, scene_model, scene_tokenizer
from subprocesses import RUNNER, TWO_PROCESSES, python, succeeded
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

from soul_trainer.engines import find_soul


SCRIPTS = Path(__file__).parent / "scripts"
# 8 steps, whose every second one refreshes, with a rho at which few coordinates are clipped: the curvature counts.
STEPS, REFRESHES, RHO = 8, 4, 100.0
SETTINGS = {
    "optim": "soul",
    "optim_args": f"rho={RHO},hessian_interval=2",
    "learning_rate": 3e-2,
    "per_device_train_batch_size": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
# 16 blocks: two epochs of four steps.
CLM = {**SETTINGS, "train_file": "rows.txt", "block_size": 17, "num_train_epochs": 2, "do_train": True}
SFT = {**SETTINGS, "dataset_name": "rows", "max_steps": STEPS, "gradient_checkpointing": False}


def options(settings: dict) -> list[str]:
    """Settings as a command line."""
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model and its tokenizer, and with the scene's rows as lines of text and as JSON."""
    folder = tmp_path_factory.mktemp("home")
    scene_model().save_pretrained(folder / "model")
    scene_tokenizer().save_pretrained(folder / "model")
    rows = FORGET + RETAIN
    lines = [f"{row['question']} {row['answer']}" for row in rows]
    (folder / "rows.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "rows").mkdir()
    pairs = [json.dumps({"prompt": row["question"], "completion": f" {row['answer']}"}) for row in rows]
    (folder / "rows" / "train.jsonl").write_text("\n".join(pairs) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def single(home) -> Path:
    """What run_clm.py makes in one process; its arguments are in a file, as those scripts allow."""
    settings = {**CLM, "validation_file": "rows.txt", "do_eval": True}
    settings |= {"model_name_or_path": "model", "output_dir": "single"}
    (home / "arguments.json").write_text(json.dumps(settings), encoding="utf-8")
    succeeded(python(*RUNNER, SCRIPTS / "run_clm.py", "arguments.json", folder=home))
    return home / "single"


def check_sophia(checkpoint: Path, trained: dict[str, torch.Tensor]) -> None:
    """Asserts that Sophia, and no other, has trained exactly these tensors, and that it refreshed itself."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == STEPS
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert {group["rho"] for group in saved["param_groups"]} == {RHO}
    states = saved["state"].values()
    shapes = sorted(tuple(tensor.shape) for tensor in trained.values())
    assert sorted(tuple(state["hessian"].shape) for state in states) == shapes
    assert all(state["hessian"].any() for state in states)
    for state in states:
        assert float(state["hessian_weight"]) == pytest.approx(1 - 0.95**REFRESHES)


def test_run_clm_trains_with_sophia(home, single):
    """
    Would catch a name that is valid only in scripts that import us, `optim_args` that get lost, and a Hessian that
    nobody refreshes: sign descent under another name.
    """
    trained, start = load_file(single / "model.safetensors"), load_file(home / "model" / "model.safetensors")
    check_sophia(single / f"checkpoint-{STEPS}", trained)
    assert all((trained[name] != start[name]).any() for name in start)
    results = json.loads((single / "all_results.json").read_text(encoding="utf-8"))
    assert results["eval_loss"] < 3.4 and results["epoch"] == 2  # it was 3.7, the log of 40 words


def test_run_clm_that_was_stopped_goes_on_bit_for_bit(home, single):
    """Would catch state of the optimizer that a script's own search for the last checkpoint does not bring back."""
    expected = load_file(single / "model.safetensors")
    stopped = home / "stopped"
    shutil.copytree(single / "checkpoint-4", stopped / "checkpoint-4")
    settings = {**CLM, "model_name_or_path": "model", "output_dir": "stopped"}
    log = succeeded(python(*RUNNER, SCRIPTS / "run_clm.py", *options(settings), folder=home))
    assert "training goes on from" in log
    found = load_file(stopped / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_run_clm_on_two_processes_follows_one(home, single):
    """
    Would catch a runner that the launcher cannot start as a module, and a Hessian of one process's gradients. The
    same global batches: 2 processes of 2 rows.
    """
    settings = {**CLM, "model_name_or_path": "model", "output_dir": "both", "per_device_train_batch_size": 2}
    succeeded(python(*TWO_PROCESSES, *RUNNER, SCRIPTS / "run_clm.py", *options(settings), folder=home))
    expected, found = (load_file(folder / "model.safetensors") for folder in (single, home / "both"))
    check_sophia(home / "both" / f"checkpoint-{STEPS}", expected)
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() <= 1e-5 * weight.abs().max(), name


def test_without_the_runner_the_name_is_refused(home):
    """Would catch tests of this file that pass because something else makes the name valid."""
    settings = {**CLM, "model_name_or_path": "model", "output_dir": "refused"}
    done = python(SCRIPTS / "run_clm.py", *options(settings), folder=home)
    assert done.returncode != 0 and "--optim: invalid choice: 'soul'" in done.stderr
    assert not (home / "refused").exists()


@pytest.mark.parametrize("use_peft", [False, True], ids=["whole", "adapter"])
def test_sft_trains_with_sophia(home, use_peft):
    """Would catch a TRL script that needs more than the name, and state for weights that an adapter leaves alone."""
    pytest.importorskip("trl", reason="sft.py is a script of TRL's users")
    settings = {**SFT, "model_name_or_path": "model", "output_dir": f"sft_{use_peft}"}
    settings |= {"use_peft": True, "lora_r": 2} if use_peft else {}
    log = succeeded(python(*RUNNER, SCRIPTS / "sft.py", *options(settings), folder=home))
    assert "Training completed." in log
    output = home / settings["output_dir"]
    trained = load_file(output / ("adapter_model.safetensors" if use_peft else "model.safetensors"))
    assert all("lora_" in name for name in trained) == use_peft
    check_sophia(output / f"checkpoint-{STEPS}", trained)


def test_a_sequence_to_sequence_trainer_makes_sophia(tmp_path):
    """Would catch an optimizer that only causal models, or only the Trainer itself, can have."""
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0)
    rows = [{"input_ids": [2 + row, 9, 4, 1], "labels": [3 + row, 5, 1]} for row in range(8)]
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        optim="soul",
        optim_args="rho=2,hessian_interval=1",
        per_device_train_batch_size=4,
        max_steps=2,
        predict_with_generate=True,
        generation_max_length=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Seq2SeqTrainer(T5ForConditionalGeneration(config), args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    sophia = find_soul(trainer.optimizer)
    assert len(sophia.state) == len(list(trainer.model.parameters())) and sophia.defaults["rho"] == 2
    for state in sophia.state.values():
        assert float(state["hessian_weight"]) == pytest.approx(1 - 0.95**2) and state["hessian"].any()
    assert trainer.evaluate()["eval_loss"] > 0
