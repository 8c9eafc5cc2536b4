"""
Searches learning rate, rho and retain weight with Optuna: the best forget quality among the settings that keep the
model's utility.

    python recipes/search.py                                                  # the small model of recipes/tofu.py
    python recipes/search.py --trials 50 --optim soul --forget_loss ga --share_of_target 0.98
    python recipes/search.py --dataset locuslab/TOFU --model HUB_ID --gold HUB_ID

Every flag of `recipes/tofu.py` works. AdamW and SOUL get as many trials each; a search that was stopped goes on.
`<optimizer>/best.yaml` holds the best settings, for `recipes/tofu.py --config`.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from accelerate import PartialState

from soul_eval.callback import EvalCallback
from soul_eval.comparison import Comparison
from soul_eval.console import run_script
from soul_eval.experiment import Experiment, UnlearningTask
from soul_eval.extras import require
from soul_eval.markdown import markdown_text
from soul_eval.search import ForgetQualitySubjectToUtility, hp_space
from soul_recipes.small_llama import SmallModelArguments
from soul_recipes.tofu import CONFIGS, TofuArguments, load_rows, make_task
from soul_trainer import UnlearnConfig
from soul_trainer.records import run_settings, write_whole
from soul_trainer.soul_settings import SOUL_NAMES


optuna = require("optuna", extra="search")
FIGURES = ("forget_quality", "model_utility")


@dataclass
class SearchArguments(TofuArguments):
    """What to forget, which model must, and where to look for settings; ranges are drawn from in the logarithm."""

    trials: int = field(default=20, metadata={"help": "Trials of each optimizer, at least 1."})
    share_of_target: float = field(
        default=0.95, metadata={"help": "The least model utility, as a share of the target's, in (0, 1]."}
    )
    learning_rates: str | None = field(
        default=None, metadata={"help": "Least and largest: 1e-4,1e-2 for the small model, 1e-6,1e-4 with --model."}
    )
    rhos: str = field(default="0.1,100", metadata={"help": "Least and largest rho, for SOUL."})
    retain_weights: str = field(default="0.5,20", metadata={"help": "Least and largest weight of the retain loss."})

    def __post_init__(self):
        super().__post_init__()
        self.learning_rates = self.learning_rates or ("1e-6,1e-4" if self.model else "1e-4,1e-2")
        for optimizer in SOUL_NAMES:
            hp_space(**self.ranges(optimizer))
        if self.trials < 1:
            raise ValueError(f"`trials` must be at least 1, but it is {self.trials}.")
        if self.requests or self.num_requests:
            raise ValueError("A search forgets once: leave out `requests` and `num_requests`.")

    def ranges(self, optimizer: str) -> dict[str, tuple[float, ...]]:
        """The settings that an optimizer's trials draw."""
        texts = {"learning_rate": self.learning_rates, "rho": self.rhos, "retain_weight": self.retain_weights}
        if optimizer not in SOUL_NAMES:
            del texts["rho"]
        return {name: tuple(map(float, text.split(","))) for name, text in texts.items()}


def find_study(config: UnlearnConfig, identity: list) -> dict:
    """What makes, or finds, the study of trials that the same settings have made before."""
    journal = Path(config.output_dir) / "trials.log"
    journal.parent.mkdir(parents=True, exist_ok=True)
    if config.overwrite and PartialState().is_main_process:
        journal.unlink(missing_ok=True)
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    return {"study_name": name, "storage": storage, "load_if_exists": True, "direction": "maximize"}


def search(experiment: Experiment, task: UnlearningTask, comparison: Comparison, optimizer: str) -> "optuna.Study":
    """Makes the trials of an optimizer that are not made yet; each keeps its figures beside its settings."""
    args, config, prefix = experiment.arguments[0], experiment.settings(optimizer), f"eval_{task.suite}_"
    utility = comparison.references["target"].value("model_utility")
    objective = ForgetQualitySubjectToUtility.of_target({f"{prefix}model_utility": utility}, args.share_of_target)
    ranges, trials = args.ranges(optimizer), []

    def draw(trial: "optuna.Trial") -> dict:
        trials.append(trial)
        return hp_space(**ranges)(trial)

    def judge(metrics: dict[str, float]) -> float:
        for name in FIGURES:
            trials[-1].set_user_attr(name, metrics[prefix + name])
        return objective(metrics)

    fixed = {name: value for name, value in run_settings(config).items() if name not in ranges}
    how = find_study(config, [fixed, comparison.settings, ranges, objective.min_utility])
    with PartialState().main_process_first():
        study = optuna.create_study(**how)
    num_done = sum(trial.state.is_finished() for trial in study.trials)
    trainer = experiment.make_trainer(task, config, for_search=True)
    trainer.add_callback(EvalCallback(trainer, task.suite, comparison.rows, comparison.gold_rows, **task.asked))
    trainer.hyperparameter_search(
        draw,
        judge,
        n_trials=max(0, args.trials - num_done),
        # Those that a search before it has made had the same seed, and would be drawn again.
        sampler=optuna.samplers.TPESampler(seed=config.seed + num_done),
        # A model that diverges is a failed trial, which says where not to look.
        catch=(FloatingPointError,),
        **how,
    )
    return study


def write_best(study: "optuna.Study", optimizer: str, config: UnlearnConfig) -> None:
    """Prints the trials, the best first, and writes its settings."""
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.value is not None]
    done.sort(key=lambda trial: trial.value, reverse=True)
    names = [*(done[0].params if done else []), *FIGURES]
    lines = [["trial", *map(markdown_text, names)], ["---"] * (len(names) + 1)]
    lines += [[str(t.number), *(f"{(t.params | t.user_attrs)[name]:.4g}" for name in names)] for t in done]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    if not done or done[0].value < 0:
        print(f"{optimizer}: no setting keeps the utility.")
        return
    settings = {"optim": optimizer, "forget_loss": config.forget_loss, **done[0].params}
    comment = f"# The best of {len(study.trials)} trials of recipes/search.py.\n"
    write_whole(Path(config.output_dir) / "best.yaml", comment + yaml.safe_dump(settings, sort_keys=False))


def run(experiment: Experiment, task: UnlearningTask) -> None:
    """Searches with each optimizer."""
    comparison = experiment.compare(task)
    for optimizer in experiment.optimizers:
        study = search(experiment, task, comparison, optimizer)
        if PartialState().is_main_process:
            write_best(study, optimizer, experiment.settings(optimizer))


def main(command_line: list[str] | None = None) -> None:
    """Runs the recipe."""
    experiment = Experiment("tofu", CONFIGS, SearchArguments, SmallModelArguments, command_line=command_line)
    task = make_task(experiment, load_rows(experiment))
    if not task.gold:
        raise ValueError("Forget quality compares with a gold model: name one with --gold.")
    with experiment.hold():
        run(experiment, task)


if __name__ == "__main__":
    sys.exit(run_script(main))
