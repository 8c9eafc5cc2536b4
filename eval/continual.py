"""
A sequence of requests to forget, each of which starts from the model that the last one left.

After each request the model is asked again, about all requests so far and about what it is to keep: a model that has
forgotten once must not remember when it forgets something else, and every request costs some utility.
"""

import json
from dataclasses import dataclass, replace
from functools import partial

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets

from soul_trainer import UnlearnConfig

from . import report
from .comparison import Comparison, same_rows
from .experiment import Experiment, UnlearningTask, fingerprint
from .markdown import markdown_text
from .report import Run
from .rows import write_whole
from .statistics import values


@dataclass
class Request:
    """
    A part of what is to be forgotten.

    Attributes:
        name (`str`): What tables call it.
        forget ([`~datasets.Dataset`]): Its rows, none of which an earlier request has.
        rows (`list[dict]`): The rows of the suite that ask about it, unscored; indices are unique over all requests.
        retain ([`~datasets.Dataset`], *optional*): What is kept meanwhile; by default the task's.
    """

    name: str
    forget: Dataset
    rows: list[dict]
    retain: Dataset | None = None


@dataclass
class Stage:
    """
    What is left after a request.

    Attributes:
        optimizer (`str`): As the report calls it.
        request (`str`): Name of the request.
        run ([`~runs.Run`]): Figures on all requests so far, and on what is to be kept.
        by_request (`dict[str, Run]`): The same on each of those requests alone, by its name.
    """

    optimizer: str
    request: str
    run: Run
    by_request: dict[str, Run]

    def to_json(self) -> dict:
        """Names and values, without rows."""
        return {
            "optimizer": self.optimizer,
            "after": self.request,
            "all so far": values(self.run.summary),
            "each": {name: values(run.summary) for name, run in self.by_request.items()},
        }


def run_requests(experiment: Experiment, task: UnlearningTask, requests: list[Request]) -> list[Stage]:
    """
    Unlearns one request after the other with each optimizer, or finds that done, and writes the report, and the
    figures of every request after every request to `requests.md` and `requests.json`.

    Args:
        experiment ([`~experiment.Experiment`]): Its settings are those of each request.
        task ([`~experiment.UnlearningTask`]):
            `target`, `gold`, `retain`, and in `rows` what is asked besides the requests' own rows: of what is kept.
            Its `forget` is not used.
        requests (`list[Request]`): In their order.

    Returns:
        `list[Stage]`: One for each optimizer and request.

    Raises:
        ValueError: If there is no request, two have the same name or ask the same row, or there is a `limit`.
    """
    check_requests(requests, task.rows)
    if experiment.arguments[0].limit is not None:
        raise ValueError("`limit` asks the first rows of a split, and requests are parts of it: leave it out.")
    data = {f"{request.name} to forget": request.forget for request in requests}
    data |= {f"{request.name} to keep": request.retain for request in requests if request.retain is not None}
    whole = replace(
        task,
        forget=concatenate_datasets([request.forget for request in requests]),
        rows=[*(row for request in requests for row in request.rows), *task.rows],
        settings={**task.settings, "requests": fingerprint(data)},
        originals=None,
    )
    with experiment.hold():
        return _run(experiment, whole, task, requests)


def _run(experiment: Experiment, whole: UnlearningTask, task: UnlearningTask, requests: list[Request]) -> list[Stage]:
    comparison = experiment.compare(whole)
    stages = []
    for optimizer, label in experiment.optimizers.items():
        model = task.target
        for place, request in enumerate(requests, 1):
            config = _stage_settings(experiment, optimizer, place)
            experiment.lengthen(config, request.forget)
            part = replace(whole, target=model, forget=request.forget, retain=request.retain or task.retain)
            run = comparison.unlearn(
                f"{label} {place}/{len(requests)}",
                config,
                partial(experiment.make_trainer, part, config),
                experiment.arguments[0].evaluations,
                target=model,
                rows=[*(row for former in requests[:place] for row in former.rows), *task.rows],
            )
            by_request = {
                former.name: Run(
                    f"{label} {place} on {number}",
                    comparison.figures(same_rows(run.rows, [*former.rows, *task.rows])),
                )
                for number, former in enumerate(requests[:place], 1)
            }
            stages.append(Stage(label, request.name, run, by_request))
            model = config.output_dir
    _write(experiment, comparison, task, requests, stages)
    return stages


def check_requests(requests: list[Request], rows: list[dict]) -> None:
    """Raises a `ValueError` if there is no request, or a name or a row comes twice; `rows` are those of no request."""
    names = [request.name for request in requests]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`requests` needs at least one, each with a name of its own, but the names are {names}.")
    owner = {(row["split"], row["index"]): "`task.rows`" for row in rows}
    for request in requests:
        if not len(request.forget) or not request.rows:
            raise ValueError(f"The request {request.name!r} has no rows to forget, or none that ask about it.")
        for row in request.rows:
            place = (row["split"], row["index"])
            if place in owner:
                raise ValueError(f"Row {row['index']} of `{row['split']}` is in {request.name!r} and {owner[place]}.")
            owner[place] = repr(request.name)


def _stage_settings(experiment: Experiment, optimizer: str, place: int) -> UnlearnConfig:
    config = experiment.settings(optimizer)
    config.output_dir = f"{config.output_dir}/request-{place}"
    config.run_name += f"-{place}"
    if config.hub_model_id:
        config.hub_model_id += f"-{place}"
    return config


def _write(
    experiment: Experiment, comparison: Comparison, task: UnlearningTask, requests: list[Request], stages: list[Stage]
) -> None:
    each = ", ".join(f"{number}: {request.name}" for number, request in enumerate(requests, 1))
    note = (
        f"The requests came one after the other, each from the model that the last one left ({each}). A model after "
        "request k is asked about the requests 1 to k, the target and the gold model about all of them."
    )
    comparison.write_report(task.title, [*task.notes, note])
    if not PartialState().is_main_process:
        return
    runs = [run for stage in stages for run in stage.by_request.values()]
    title = f"# {markdown_text(task.title)}: each request by itself"
    text = "\n\n".join([title, markdown_text(note), report.markdown_table(runs)]) + "\n"
    write_whole(experiment.folder / "requests.md", text)
    record = json.dumps([stage.to_json() for stage in stages], indent=2, allow_nan=False)
    write_whole(experiment.folder / "requests.json", record + "\n")
    print(f"\nAfter request k, on request j alone ({each}):\n\n{report.table(runs)}")
