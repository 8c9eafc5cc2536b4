"""What recipes share: settings by their rank, runs, trackers, the hub."""

import importlib.machinery
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from datasets import Dataset
from experiment_scenes import scene_experiment, scene_task
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load, load_file
from scenes import FORGET, scene_tokenizer
from test_eval_scoring import byte_tokenizer
from toys import tiny_llama
from transformers import HfArgumentParser, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from soul_eval import experiment as experiments
from soul_eval.experiment import Experiment, ExperimentArguments
from soul_eval.report import Run
from soul_eval.rows import read_rows
from soul_eval.settings_files import SettingsParser, settings_file
from soul_trainer import UnlearnConfig


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def parsed(configs: Path, *flags: str) -> Experiment:
    flags = ["--use_cpu", *flags]
    return Experiment("tofu", configs, ExperimentArguments, command_line=flags)


def test_the_command_line_is_over_the_file_over_the_defaults(tmp_path):
    """Would catch layers in another order, at each of the four borders, and a default that hides what a file says."""
    small = tmp_path / "tofu" / "small"
    write(small / "defaults.yaml", "forget_loss: ga", "learning_rate: 1", "retain_weight: 1", "rho: 1", "seed: 1")
    write(small / "soul_ga.yaml", "optim: soul", "learning_rate: 2", "retain_weight: 2", "rho: 2")
    config = parsed(tmp_path, "--rho", "4").settings("soul")
    assert (config.seed, config.retain_weight, config.rho, config.forget_loss) == (1, 2, 4, "ga")
    chosen = write(tmp_path / "mine.yaml", "retain_weight: 3", "rho: 3")
    config = parsed(tmp_path, "--config", str(chosen), "--rho", "4").settings("soul")
    # A file that is named takes the place of the one that the rule finds: the learning rate is the defaults'.
    assert (config.learning_rate, config.retain_weight, config.rho) == (1, 3, 4)
    # A value that is the parser's default is a value all the same where the command line names it.
    assert parsed(tmp_path, "--learning_rate", "1e-5").settings("soul").learning_rate == 1e-5


def test_the_file_is_found_by_model_optimizer_and_loss(tmp_path):
    """Would catch a published run with the small model's settings, SOUL with AdamW's, and a loss without its file."""
    for folder, base in ((tmp_path / "tofu", 10), (tmp_path / "tofu" / "small", 20)):
        for place, name in enumerate(("soul", "adamw", "soul_npo", "adamw_npo", "sophia")):
            write(folder / f"{name}.yaml", f"retain_weight: {base + place}")

    def weight(optimizer, *flags):
        return parsed(tmp_path, *flags).settings(optimizer).retain_weight

    assert [weight("soul", "--forget_loss", "ga"), weight("soul"), weight("sophia")] == [20, 22, 24]
    assert [weight("adamw_torch", "--forget_loss", "ga"), weight("adamw_torch"), weight("adafactor")] == [21, 23, 23]
    assert [weight("soul", "--model", "a/b"), weight("adamw_torch", "--model", "a/b", "--forget_loss", "ga")] == [
        12,
        11,
    ]
    assert settings_file(tmp_path / "muse", "soul", "npo") is None
    write(tmp_path / "tofu" / "defaults.yaml", "seed: 30")
    chosen = write(tmp_path / "mine.yaml", "model: a/b")
    assert parsed(tmp_path, "--config", str(chosen)).config.seed == 30


def test_optimizers_are_two_unless_one_is_named(tmp_path):
    """Would catch a comparison of one, --optim that runs both, and a file's optimizer that another replaces."""
    assert list(parsed(tmp_path).optimizers.items()) == [("adamw_torch", "AdamW"), ("soul", "SOUL")]
    assert parsed(tmp_path, "--optim", "adafactor").optimizers == {"adafactor": "adafactor"}
    chosen = write(tmp_path / "mine.yaml", "optim: soul", "forget_loss: ga")
    experiment = parsed(tmp_path, "--config", str(chosen))
    assert experiment.optimizers == {"soul": "SOUL"} and experiment.settings("soul").forget_loss == "ga"
    assert parsed(tmp_path, "--config", str(chosen), "--optim", "adamw_torch").optimizers == {"adamw_torch": "AdamW"}
    write(tmp_path / "tofu" / "small" / "defaults.yaml", "optim: soul")
    assert parsed(tmp_path).optimizers == {"soul": "SOUL"}
    # Without a name, the Trainer would call the repository "soul".
    assert parsed(tmp_path, "--push_to_hub").settings("soul").hub_model_id == "tofu-soul-npo"
    folders = {parsed(tmp_path, "--output_dir", "x").settings(name).output_dir for name in ("soul", "adamw_torch")}
    assert folders == {"x/soul", "x/adamw_torch"}


@pytest.mark.parametrize(
    "line, said",
    [
        ("learning_rte: 1.0", "learning_rte.*did you mean learning_rate"),
        ("zzzzzzzz: 1", "zzzzzzzz.*known are .*forget_loss"),
        ("num_train_epochs: many", "`num_train_epochs` must be of type float.*'many'"),
        ("hessian_interval: 2.5", "`hessian_interval` must be of type int.*2.5"),
        ("bf16: perhaps", "`bf16` must be of type bool.*'perhaps'"),
        ("save_strategy: no", '`save_strategy` must be one of.*write "no"'),
        ("just words", "must hold settings"),
        ("a: [1", "is no YAML"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(tmp_path, line, said):
    """Would catch a misspelt setting that is ignored, and a value that fails far away from its file."""
    chosen = write(tmp_path / "mine.yaml", line)
    with pytest.raises(ValueError, match=f"mine.yaml.*{said}"):
        parsed(tmp_path, "--config", str(chosen))


def test_a_missing_file_is_named(tmp_path):
    """Would catch a run with the defaults in the place of the settings that were asked for."""
    with pytest.raises(ValueError, match="`config`='none.yaml': no such file"):
        parsed(tmp_path, "--config", "none.yaml")


def test_values_of_files_have_the_types_of_the_command_line(tmp_path):
    """Would catch `5e-6`, which YAML takes for a text, and lists and flags that a file cannot give."""
    path = write(
        tmp_path / "mine.yaml",
        *("learning_rate: 5e-6", "num_train_epochs: 3", "bf16: yes", 'save_strategy: "no"', "prompt_template: null"),
        *("label_names: [labels]", "lr_scheduler_kwargs: {num_cycles: 2}"),
    )
    found = SettingsParser((UnlearnConfig,)).read(path)
    assert found["learning_rate"] == 5e-6 and isinstance(found["num_train_epochs"], float)
    assert found["bf16"] is True and found["save_strategy"] == "no" and found["prompt_template"] is None
    assert found["label_names"] == ["labels"] and found["lr_scheduler_kwargs"] == {"num_cycles": 2}
    flags = ["--learning_rate", "5e-6", "--num_train_epochs", "3", "--use_cpu"]
    (expected,) = HfArgumentParser(UnlearnConfig).parse_args_into_dataclasses(flags)
    (built,) = SettingsParser((UnlearnConfig,)).build({**found, "use_cpu": True})
    assert (built.learning_rate, built.num_train_epochs) == (expected.learning_rate, expected.num_train_epochs)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--gold", "a/b"], "`gold`.*needs `model`"),
        (["--evaluations", "0"], "`evaluations` must be at least 1"),
        (["--until", "soon"], "`until` must be 'epochs', 'forgotten' or a probability"),
        (["--stop_at_forget_loss", "gold"], "`stop_at_forget_loss` was removed: write `until: forgotten`"),
        (["--max_utility_loss", "2"], "`max_utility_loss` must be between 0 and 1"),
        (["--lora_rank", "0"], "`lora_rank` must be at least 1"),
    ],
)
def test_bad_values_are_named(tmp_path, flags, said):
    """Would catch a value that only fails once models are trained."""
    with pytest.raises(ValueError, match=said):
        parsed(tmp_path, *flags)


def test_runs_are_made_once_and_their_rows_lie_beside_them(tmp_path):
    """Would catch a second training, a finished run that other settings replace, and rows in a model's folder."""
    task = scene_task(tmp_path)
    runs = scene_experiment(tmp_path).run(task)
    assert [run.name for run in runs] == ["AdamW", "SOUL"]
    out = tmp_path / "out"
    for optimizer, run in zip(("adamw_torch", "soul"), runs):
        header, rows = read_rows(out / f"{optimizer}.rows.jsonl")
        assert header["settings"]["optim"] == optimizer and len(rows) == len(task.rows)
        assert not list((out / optimizer).rglob("*rows*"))
        assert run.value("forget_quality") is not None and run.value("seconds_per_step") > 0
        assert "Evaluation of unlearning" in (out / optimizer / "README.md").read_text(encoding="utf-8")
    assert "SOUL" in (out / "report.md").read_text(encoding="utf-8")
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = scene_experiment(tmp_path).run(task)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == times
    assert [run.value("forget_probability") for run in again] == [run.value("forget_probability") for run in runs]
    with pytest.raises(ValueError, match="holds a finished run with other settings"):
        scene_experiment(tmp_path, "--retain_weight", "3").run(task)
    with pytest.raises(ValueError, match="holds a finished run with other settings"):
        scene_experiment(tmp_path, "--lora_rank", "2").run(task)


def test_adapters_are_trained_and_evaluated(tmp_path):
    """Would catch a whole model that trains in the place of adapters, and an experiment that cannot read them."""
    (run,) = scene_experiment(tmp_path, "--optim", "soul", "--lora_rank", "2").run(scene_task(tmp_path))
    saved = load_file(tmp_path / "out" / "soul" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in saved} == {"q_proj", "v_proj"}
    assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)
    assert run.settings["lora_rank"] == 2 and not (tmp_path / "out" / "soul" / "model.safetensors").exists()


def test_rows_are_of_the_model_that_is_saved_though_it_changes_after_training(tmp_path):
    """Would catch a task vector whose figures are those of the fine-tuned model, before it is subtracted."""
    task = scene_task(tmp_path)
    flags = ["--optim", "adamw_torch", "--forget_loss", "task_vector", "--retain_loss", "none"]
    (run,) = scene_experiment(tmp_path, *flags).run(task)
    saved = replace(task, target=str(tmp_path / "out" / "adamw_torch"))
    again = scene_experiment(tmp_path / "again").compare(saved).references["target"]
    for mine, other in zip(run.rows, again.rows):
        assert mine["answer_nll"] == pytest.approx(other["answer_nll"], abs=1e-5)
    before = scene_experiment(tmp_path, *flags).compare(task).references["target"]
    assert run.value("forget_probability") < before.value("forget_probability")


def test_a_run_stops_at_a_level_or_at_the_gold_models(tmp_path):
    """Would catch a level that is never looked at, another model than the gold one, and a level not recorded."""
    task = scene_task(tmp_path)
    flags = ["--optim", "adamw_torch", "--num_train_epochs", "6", "--max_utility_loss", "1"]
    flags += ["--forget_loss", "ga", "--retain_weight", "0"]

    def history(*more: str) -> tuple[list[float], int, Run]:
        (run,) = scene_experiment(tmp_path, *flags, *more, "--overwrite", "True").run(task)
        state = json.loads((tmp_path / "out" / "adamw_torch" / "trainer_state.json").read_text())
        looks = [
            entry["until/forget_probability"] for entry in state["log_history"] if "until/forget_probability" in entry
        ]
        return looks, state["global_step"], run

    whole, steps, _ = history("--until", "1e-6")
    assert steps == 12 and len(whole) == 13
    level = (whole[4] + whole[5]) / 2
    stopped, steps, run = history("--until", str(level))
    assert steps == next(step for step, value in enumerate(whole) if value <= level) < 12
    assert run.settings["forget_level"] == level and stopped == whole[: steps + 1]
    # The gold model here is as good as untrained, and so is the target: its level is reached at once, or soon.
    _, steps, _ = history("--until", "forgotten")
    assert steps < 12


def test_a_loss_gets_the_rows_that_it_needs_once(tmp_path, monkeypatch):
    """Would catch rows that never reach the trainer, and alternates that every optimizer writes anew."""
    calls = []

    def prepare(forget, model, tokenizer, config):
        calls.append((model.training, config.forget_loss))
        return forget.map(lambda row: {"answer": "I do not know that ."})

    monkeypatch.setitem(experiments.PREPARATIONS, "npo", prepare)
    task, experiment = scene_task(tmp_path), scene_experiment(tmp_path)
    trainers = [experiment.make_trainer(task, experiment.settings(name)) for name in experiment.optimizers]
    assert calls == [(False, "npo")]
    answer = scene_tokenizer()("I do not know that .", add_special_tokens=False)["input_ids"]
    for trainer in trainers:
        row = trainer.train_dataset.forget[0]
        assert [token for token in row["labels"] if token >= 0][: len(answer)] == answer


def test_altpo_asks_the_model_for_alternates_unless_there_are_some(tmp_path):
    """Would catch alternates of another number or seed than the run's, and the user's own that are replaced."""
    tokenizer = byte_tokenizer([row["question"] + row["answer"] for row in FORGET])
    tokenizer.model_max_length = 512
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512).eval()
    prepare, rows = experiments.PREPARATIONS["altpo"], Dataset.from_list(FORGET[:2])
    configs = [parsed(tmp_path, "--seed", seed).settings("soul") for seed in ("5", "5", "6")]
    made = [prepare(rows, model, tokenizer, config)["alternate"] for config in configs]
    assert [len(alternates) for alternates in made[0]] == [5, 5]
    assert made[0] == made[1] != made[2]
    own = rows.add_column("alternate", ["no", "nothing"])
    assert prepare(own, model, tokenizer, configs[0])["alternate"] == ["no", "nothing"]


def test_a_tracker_gets_each_run_under_its_own_name(tmp_path, monkeypatch):
    """Would catch a recipe that switches trackers off, figures that bypass them, and two runs under one name."""
    seen: dict[str, set] = {}

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.setdefault(args.run_name, set()).update(logs)

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "recorder", Tracker)
    scene_experiment(tmp_path, "--report_to", "recorder").run(scene_task(tmp_path))
    assert set(seen) == {"tofu-adamw_torch-npo", "tofu-soul-npo"}
    for figures in seen.values():
        assert {"loss", "forget_loss", "eval_tofu_forget_quality", "eval_tofu_retain_probability"} <= figures
    assert "curvature/clipped" in seen["tofu-soul-npo"]


@pytest.mark.parametrize("is_running", [False, True])
def test_each_model_has_a_run_of_weights_and_biases_unless_the_user_opened_one(tmp_path, monkeypatch, is_running):
    """Would catch a second model whose curves go on in the first one's run, and a user's run that is closed."""
    finished = []

    class Wandb(types.ModuleType):
        run = "the user's" if is_running else None

        def finish(self):
            finished.append(self.run)
            self.run = None

    class Tracker(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            wandb.run = wandb.run or args.run_name

    wandb = Wandb("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "recorder", Tracker)
    scene_experiment(tmp_path, "--report_to", "recorder").run(scene_task(tmp_path))
    assert finished == ([] if is_running else ["tofu-adamw_torch-npo", "tofu-soul-npo"])


def test_the_hub_gets_the_model_with_its_whole_card_and_none_of_the_rows(tmp_path, monkeypatch):
    """
    Would catch a card that is pushed before the evaluation is in it, a model that is pushed twice, two models in one
    repository, a base model that is a folder, which the hub refuses, and rows to forget that are published.
    """
    pushed: dict[str, dict[str, bytes]] = {}

    def upload(self, *, repo_id, folder_path, ignore_patterns=None, **kwargs):
        folder, files = Path(folder_path), [path for path in Path(folder_path).rglob("*") if path.is_file()]
        names = filter_repo_objects([str(path.relative_to(folder)) for path in files], ignore_patterns=ignore_patterns)
        assert repo_id not in pushed
        pushed[repo_id] = {name: (folder / name).read_bytes() for name in names}

    def create(self, repo_id, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    scene_experiment(tmp_path, "--push_to_hub", "--hub_model_id", "me/forgot").run(scene_task(tmp_path))
    assert set(pushed) == {"me/forgot-adamw_torch", "me/forgot-soul"}
    for repository, files in pushed.items():
        card = files["README.md"].decode()
        assert {"model.safetensors", "tokenizer.json"} <= set(files)
        for part in ("## Unlearning", "`forget_loss`", "## Evaluation of unlearning", "gold model"):
            assert card.count(part) >= 1, part
        assert card.count("## Evaluation of unlearning") == 1
        assert huggingface_hub.ModelCard(card).data.base_model is None
        assert card == (tmp_path / "out" / repository.split("-", 1)[1] / "README.md").read_text(encoding="utf-8")
        assert torch.equal(
            load_file(tmp_path / "out" / repository.split("-", 1)[1] / "model.safetensors")["lm_head.weight"],
            load(files["model.safetensors"])["lm_head.weight"],
        )
        for row in FORGET:
            for text in row.values():
                assert not any(text.encode() in content for content in files.values()), text
