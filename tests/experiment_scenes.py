"""A recipe's experiment in small: models of the scene on disk, what TOFU's suite asks about its rows, settings."""

from pathlib import Path

from datasets import Dataset
from scenes import FORGET, RETAIN, scene_model, scene_tokenizer

from soul_eval.experiment import Experiment, ExperimentArguments, UnlearningTask
from soul_eval.suites import tofu


FLAGS = ["--per_device_train_batch_size", "4", "--num_train_epochs", "2", "--learning_rate", "1e-2", "--rho", "1"]
FLAGS += ["--hessian_interval", "2", "--hessian_batch_size", "6", "--logging_steps", "1", "--save_strategy", "no"]
FLAGS += ["--use_cpu", "--disable_tqdm", "True", "--evaluations", "1"]


def saved_model(folder: Path, seed: int = 0) -> str:
    """A model of the scene with its tokenizer, in a folder."""
    scene_model(seed).save_pretrained(folder)
    scene_tokenizer().save_pretrained(folder)
    return str(folder)


def asked(rows: list[dict], split: str) -> list[dict]:
    """Rows as TOFU's suite asks them, unscored."""
    wrong = [row["answer"] for row in reversed(rows)]
    items = [{**row, "paraphrased_answer": row["answer"], "perturbed_answer": wrong[:2]} for row in rows]
    return tofu.unscored_rows({split: Dataset.from_list(items)})


def scene_task(folder: Path, with_gold: bool = True) -> UnlearningTask:
    """The scene's task; its models lie in the folder."""
    return UnlearningTask(
        suite="tofu",
        title="A scene",
        target=saved_model(folder / "target"),
        gold=saved_model(folder / "gold", seed=1) if with_gold else None,
        forget=Dataset.from_list(FORGET),
        retain=Dataset.from_list(RETAIN),
        rows=[*asked(FORGET, "forget"), *asked(RETAIN, "retain")],
        asked={"max_new_tokens": 4},
    )


def scene_experiment(folder: Path, *flags: str) -> Experiment:
    """An experiment with the scene's settings, and no files of settings."""
    command_line = ["--output_dir", str(folder / "out"), *FLAGS, *flags]
    return Experiment("tofu", folder / "configs", ExperimentArguments, command_line=command_line)
