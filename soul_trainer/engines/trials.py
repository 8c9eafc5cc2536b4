"""The runs of a trainer, of which a hyperparameter search makes many: when each begins, and where it goes."""

from collections.abc import Sequence

from transformers import Trainer
from transformers.trainer_utils import BestRun


class TrialMixin(Trainer):
    """
    Tells a trainer when a run begins, and gives each trial of a hyperparameter search the settings that it draws, on
    top of those before the search and not of the last trial's.

    Attributes:
        run_folder (`str`): Of the run's checkpoints and records: `output_dir` or, for a trial, a folder in it.
        fixed_settings (`Sequence[str]`): Settings that no trial can draw, because the trainer is made of them.
    """

    fixed_settings: Sequence[str] = ()

    def begin_run(self) -> None:
        """The run's model is made, its settings are in force, and no checkpoint is loaded yet."""

    def hyperparameter_search(self, *args, **kwargs) -> BestRun | list[BestRun]:
        """As [`~transformers.Trainer`]'s, of a trainer with `model_init`; afterwards, settings are as before."""
        self._settings = vars(self.args).copy()
        try:
            return super().hyperparameter_search(*args, **kwargs)
        finally:
            vars(self.args).update(self._settings)

    def _hp_search_setup(self, trial) -> None:
        if trial is not None:
            vars(self.args).update(self._settings)
        fixed = {name: getattr(self.args, name) for name in self.fixed_settings}
        super()._hp_search_setup(trial)
        for name, value in fixed.items():
            if getattr(self.args, name) != value:
                raise ValueError(
                    f"`{name}` cannot differ between trials, because the trainer is made of it: search once for each "
                    "value."
                )
        self.args.check()
        self.run_folder = self._get_output_dir(trial)
        self.begin_run()
