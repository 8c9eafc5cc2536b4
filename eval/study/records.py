"""The runs of a study, one JSON line each. Imports no torch."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path


STAGES = ("search", "final")
_TYPES = {"task": str, "family": str, "objective": str, "setting": dict, "seed": int, "target": dict, "curve": list}
_PROBABILITIES = ("forget", "retain", "held_out")
_NEEDED = ("forget", "held_out")


@dataclass(frozen=True)
class Run:
    """
    One run of one optimizer on one objective. Probabilities are of true answers; general text is in nats a token.

    Attributes:
        task (`str`): The corpus and the model.
        family (`str`): The optimizer, whatever its setting.
        objective (`str`): What it minimises on the rows to forget.
        setting (`dict`): What the search may choose.
        seed (`int`): Of the run.
        stage (`str`): `"search"` if the run may choose the setting, `"final"` if it may be reported.
        target (`dict`): `forget`, `retain`, `held_out`, `general` of the model before unlearning.
        curve (`list[dict]`): The same in the course of training, with `step`, from step 0.
        gold (`dict`, *optional*): The same of a model that never saw the rows to forget.
        forget_quality (`float`, *optional*): P-value of the final model.
        seconds_per_step (`float`, *optional*): Measured.
        state_bytes (`int`, *optional*): Of the optimizer's state.
        relearned (`dict`, *optional*):
            `before` and `after`: forget probability of rows that were not relearned, before and after a fixed budget
            of relearning the others, from a snapshot of the run.
        rounded (`dict`, *optional*): `forget` and `held_out` of the last model after rounding to 4 bits.
        depth (`float`, *optional*): Forget probability of that snapshot.
        failed (`str`, *optional*): Why the run is of no use.
    """

    task: str
    family: str
    objective: str
    setting: dict
    seed: int
    stage: str
    target: dict
    curve: list[dict]
    gold: dict | None = None
    forget_quality: float | None = None
    seconds_per_step: float | None = None
    state_bytes: int | None = None
    relearned: dict | None = None
    rounded: dict | None = None
    depth: float | None = None
    failed: str | None = None

    @property
    def setting_key(self) -> str:
        """The setting as a text that is the same for the same values: 2 and 2.0 are one."""
        return json.dumps(_with_floats(self.setting), sort_keys=True)

    @property
    def key(self) -> tuple:
        """What tells a run from all others."""
        return (self.task, self.family, self.objective, self.setting_key, self.seed, self.stage)


def read_runs(paths: Iterable[str | os.PathLike]) -> list[Run]:
    """
    Reads runs. Of a run that is there more than once, the last counts.

    Args:
        paths (`Iterable[str | os.PathLike]`): Files of JSON lines, the older first; a single path is a mistake.

    Returns:
        `list[Run]`: Each run once.

    Raises:
        ValueError: If a line is no run; the message names its file and line.
    """
    if isinstance(paths, (str, os.PathLike)):
        raise ValueError(f"`paths` must be a list of paths, but it is the one path {str(paths)!r}.")
    runs: dict[tuple, Run] = {}
    for path in map(Path, paths):
        # Not `splitlines`, which would break lines at characters that JSON allows within a string.
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                run = parse_run(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            runs[run.key] = run
    return list(runs.values())


def parse_run(line: str) -> Run:
    """
    A run from its JSON line. Fields that no run has are left out.

    Raises:
        ValueError: If the line is not JSON, or something is missing, of another type or out of its range.
    """
    entry = json.loads(line, parse_constant=_refuse_constant)
    if not isinstance(entry, dict):
        raise ValueError(f"a run must be an object, but it is a {type(entry).__name__}.")
    for name, kind in _TYPES.items():
        if not isinstance(entry.get(name), kind) or isinstance(entry[name], bool):
            raise ValueError(f"`{name}` must be of type {kind.__name__}, but it is {entry.get(name)!r}.")
    if entry.get("stage") not in STAGES:
        raise ValueError(f"`stage` must be one of {STAGES}, but it is {entry.get('stage')!r}.")
    run = Run(**{field.name: entry[field.name] for field in fields(Run) if field.name in entry})
    # What a failed run has measured is never looked at.
    if run.failed is None:
        _check_measured(run)
    return run


def _check_measured(run: Run) -> None:
    _check_figures(run.target, "target")
    if not run.curve:
        raise ValueError("`curve` is empty, but the run has not failed.")
    if min(run.target[name] for name in _NEEDED) <= 0:
        raise ValueError("`target` must have a forget and a held-out probability above 0.")
    for entry in run.curve:
        if not isinstance(entry, dict) or not _is_number(entry.get("step")):
            raise ValueError(f"every entry of `curve` must have a `step`, but one is {entry!r}.")
        _check_figures(entry, f"curve at step {entry['step']}")
    steps = [entry["step"] for entry in run.curve]
    if any(later <= earlier for earlier, later in zip(steps, steps[1:])):
        raise ValueError(f"the steps of `curve` must rise, but they are {steps}.")
    for name in ("forget_quality", "seconds_per_step", "state_bytes", "depth"):
        if getattr(run, name) is not None and not _is_number(getattr(run, name)):
            raise ValueError(f"`{name}` must be a number, but it is {getattr(run, name)!r}.")
    for name in ("gold", "relearned", "rounded"):
        found = getattr(run, name)
        if found is not None:
            _check_figures(found, name, needed=("before", "after") if name == "relearned" else _NEEDED)


def _check_figures(figures: dict, name: str, needed: tuple[str, ...] = _NEEDED) -> None:
    if not isinstance(figures, dict):
        raise ValueError(f"`{name}` must be an object, but it is {figures!r}.")
    for key in dict.fromkeys((*_PROBABILITIES, *needed)):
        value = figures.get(key)
        if value is None and key not in needed:
            continue
        if not _is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"`{key}` of `{name}` must be a probability, but it is {value!r}.")
    general = figures.get("general")
    if general is not None and not _is_number(general):
        raise ValueError(f"`general` of `{name}` must be a number, but it is {general!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refuse_constant(name: str) -> None:
    raise ValueError(
        f"{name} is no number; a run that has diverged must say so in `failed`, with null for its figures."
    )


def _with_floats(value: object) -> object:
    if isinstance(value, dict):
        return {name: _with_floats(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_floats(each) for each in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
