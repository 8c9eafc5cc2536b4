"""What leaves the machine: the files and the card of `push_to_hub`, and the figures that trackers get."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, PeftModel
from scenes import largest_difference, logged, scene_model, scene_trainer, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.integrations import integration_utils, rewrite_logs

from soul_eval.report import add_to_model_card
from soul_trainer import UnlearnTrainer
from soul_trainer.records import is_local, public_name


@pytest.fixture
def uploads(monkeypatch, tmp_path):
    """Folders of what the hub would have got, one for each upload."""
    folders = []

    def create_repo(self, repo_id, **kwargs):
        return RepoUrl(f"https://huggingface.co/someone/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **kwargs):
        assert repo_id == "someone/out"
        folder = tmp_path / f"upload-{len(folders)}"
        files = [path.relative_to(folder_path) for path in Path(folder_path).rglob("*") if path.is_file()]
        for file in filter_repo_objects(map(str, files), ignore_patterns=ignore_patterns):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / file, folder / file)
        folders.append(folder)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return folders


def pushing_trainer(folder, **arguments) -> UnlearnTrainer:
    """A trainer after training, of a model from the hub."""
    model = scene_model()
    model.config._name_or_path = "someone/base"
    model.add_model_tags(["tiny"])
    losses = {"forget_loss": "npo", "retain_loss": "kl", "reference": "cached_topk", "reference_topk": 4}
    trainer = scene_trainer(folder, model, trainer_arguments=arguments, save_strategy="epoch", **losses)
    trainer.train()
    return trainer


def test_the_hub_gets_the_model_and_a_card_that_says_how_it_forgot(tmp_path, uploads):
    """
    Would catch a card without the method, its tags, base model or datasets, and checkpoints, or distributions of rows,
    that are published.
    """
    trainer = pushing_trainer(tmp_path / "out")
    trainer.push_to_hub(dataset_tags="locuslab/TOFU", license="mit", tags="fictitious")
    (folder,) = uploads
    assert largest_difference(weights(trainer.model), weights(AutoModelForCausalLM.from_pretrained(folder))) == 0
    assert len(AutoTokenizer.from_pretrained(folder)) == len(trainer.processing_class)
    assert list((tmp_path / "out").rglob("*.arrow"))
    assert not any("checkpoint" in path.name or path.suffix == ".arrow" for path in folder.rglob("*"))
    card = ModelCard.load(folder / "README.md")
    tags = {"machine-unlearning", "soul-trainer", "fictitious", "tiny", "generated_from_trainer"}
    assert tags <= set(card.data.tags) and len(card.data.tags) == len(set(card.data.tags))
    assert (card.data.base_model, card.data.license) == ("someone/base", "mit")
    assert card.data.datasets == ["locuslab/TOFU"]
    for setting in ("| `forget_loss` | `npo` |", "| `rho` | `1.0` |", "| `learning_rate` | `0.01` |"):
        assert card.text.count(setting) == 1
    assert card.text.count("Framework versions") == 1


def test_a_second_push_loses_nothing_that_was_added(tmp_path, uploads):
    """Would catch an evaluation, a note or metadata that the new card overwrites, and sections that pile up."""
    trainer = pushing_trainer(tmp_path / "out")
    trainer.push_to_hub(dataset_tags="locuslab/TOFU", language="en", tags=["fictitious"])
    path = tmp_path / "out" / "README.md"
    add_to_model_card(path, "## Evaluation of unlearning\n\n| figure | this model |\n")
    path.write_text(path.read_text(encoding="utf-8") + "\nA note by hand.\n", encoding="utf-8")
    trainer.args.forget_weight = 7.0
    for _ in range(2):
        trainer.push_to_hub()
    card = ModelCard.load(uploads[-1] / "README.md")
    assert uploads[-1].joinpath("README.md").read_text() == uploads[-2].joinpath("README.md").read_text()
    assert (card.data.datasets, card.data.language) == (["locuslab/TOFU"], ["en"])
    assert {"fictitious", "machine-unlearning", "tiny"} <= set(card.data.tags)
    for text in ("## Evaluation of unlearning", "A note by hand.", "## Unlearning", "| `forget_weight` | `7.0` |"):
        assert card.text.count(text) == 1
    # The evaluation's own place is found again.
    add_to_model_card(path, "## Evaluation of unlearning\n\nanew\n")
    assert path.read_text(encoding="utf-8").count("## Evaluation of unlearning") == 1


def test_an_adapter_is_pushed_as_one(tmp_path, uploads):
    """Would catch peft's metadata, without which the hub does not load an adapter, lost to the Trainer's card."""
    trainer = pushing_trainer(tmp_path / "out", peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.push_to_hub()
    card = ModelCard.load(uploads[0] / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model == "someone/base"
    assert "machine-unlearning" in card.data.tags and card.text.count("## Unlearning") == 1
    loaded = PeftModel.from_pretrained(scene_model(), uploads[0])
    assert largest_difference(weights(trainer.model), weights(loaded)) == 0


@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_card_names_what_a_model_was_made_of_and_no_path(tmp_path, is_adapter):
    """
    Would catch a card that says "trained from scratch on an unknown dataset", a folder of this machine as base model,
    in peft's tags or among the settings, and rows that are named by their path.
    """
    target = tmp_path / "secret" / "the-target"
    scene_model().save_pretrained(target)
    (target / "README.md").write_text("---\nbase_model: someone/base\n---\n# Target\n", encoding="utf-8")
    config = LoraConfig(r=2, target_modules=["q_proj"]) if is_adapter else None
    model = AutoModelForCausalLM.from_pretrained(target)
    trainer = scene_trainer(tmp_path / "out", model, trainer_arguments={"peft_config": config})
    trainer.data_names = {"forget": public_name(str(target / "README.md"))}
    trainer.train()
    trainer.save_model()
    trainer.args.curvature = str(target / "model.safetensors")
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "secret" not in text and "unknown dataset" not in text and "from scratch" not in text
    rows = {half: len(getattr(trainer.train_dataset, half)) for half in ("forget", "retain")}
    assert (
        "This model was made from the local model `the-target`, which comes from [someone/base]"
        "(https://huggingface.co/someone/base), by machine unlearning: "
        f"{rows['forget']} rows of `README.md` were to be forgotten, and {rows['retain']} rows to be kept."
    ) in card.text
    assert card.data.base_model == "someone/base" and "| `curvature` | `model.safetensors` |" in text
    assert card.data.library_name == ("peft" if is_adapter else "transformers")


def test_a_local_model_of_no_known_origin_has_no_base_model(tmp_path):
    """Would catch metadata that the hub refuses, and a name of a model that was never on the hub."""
    scene_model().save_pretrained(tmp_path / "target")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    trainer = scene_trainer(tmp_path / "out", model, trainer_arguments={"peft_config": LoraConfig(r=2)})
    trainer.origin = str(tmp_path / "target")
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model is None and "made from the local model `target` by machine unlearning" in card.text
    assert not any("/" in tag for tag in card.data.tags)
    assert [
        is_local(name) for name in (str(tmp_path), "./gone", "/gone/for/good", "a/b/c", "gpt2", "owner/name-1.5")
    ] == [
        True,
        True,
        True,
        True,
        False,
        False,
    ]


class Recorder(TrainerCallback):
    """A tracker as transformers' own: it gets logs from the Trainer and gives them its tracker's names."""

    received: list[tuple[int, dict]] = []

    def on_log(self, args, state, control, logs, **kwargs):
        if state.is_world_process_zero:
            self.received.append((state.global_step, rewrite_logs(logs)))


def test_trackers_get_what_unlearning_logs(tmp_path, monkeypatch):
    """Would catch figures that are logged past the Trainer, at another step, or under a name that a tracker spoils."""
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "received", [])
    trainer = scene_trainer(tmp_path, report_to="recorder", eval_strategy="steps", eval_steps=2)
    trainer.train()
    for ours in ("forget_loss", "retain_loss", "curvature/clipped", "curvature/update_share/mlp"):
        received = {step: logs[f"train/{ours}"] for step, logs in Recorder.received if f"train/{ours}" in logs}
        assert list(received) == [1, 2, 3, 4] and list(received.values()) == logged(trainer, ours)
    evaluated = [step for step, logs in Recorder.received if "eval/forget_loss" in logs]
    assert evaluated == [2, 4]
