"""
General ability: what a model still can do that has nothing to do with what it should forget, measured by lm-eval on
the model in memory.
"""

import copy
import difflib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .extras import require
from .rows import write_whole
from .schema import GeneralFile, check_fields
from .statistics import (
    Figure,
    interval_figure,
    mean_figure,
    resampled_means,
    share_bounds,
    student_quantile,
)


if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .models import ModelArguments


# Of the SOUL paper (Jia et al., 2024), without examples in context; TruthfulQA by its two multiple-choice scores.
SOUL_TASKS = (
    "boolq",
    "rte",
    "hellaswag",
    "winogrande",
    "arc_challenge",
    "arc_easy",
    "openbookqa",
    "piqa",
    "truthfulqa_mc1",
    "truthfulqa_mc2",
)
TASK_SETS = {"soul": SOUL_TASKS, "wikitext": ("wikitext",), "mmlu": ("mmlu",), "wmdp": ("wmdp",)}
# What lm-eval itself takes by default, so that examples in context are those of published figures.
FEWSHOT_SEED = 1234
NUM_RESAMPLES = 1000
# lm-eval's metrics, and our tasks', that are means of a value in [0, 1] a row.
SHARES = frozenset(
    "acc acc_norm acc_mutual_info acc_bytes acc_all exact_match f1 em probability truth_ratio rougeL_recall "
    "rouge1_recall rougeL_f1".split()
)
# Rows make up a figure if their mean is it, up to the order of summation.
SAME_FIGURE = 1e-9
# lm-eval's metrics of (log-likelihood, length) pairs, for which it has no standard error.
PERPLEXITIES = {
    "word_perplexity": lambda mean: np.exp(-mean),
    "byte_perplexity": lambda mean: np.exp(-mean),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}


def general_ability(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: str | Sequence[str] = SOUL_TASKS,
    limit: int | None = None,
    batch_size: int | str = 8,
    num_fewshot: int | None = None,
    include_path: str | None = None,
    progress: bool = True,
) -> dict[str, Figure]:
    """
    Runs tasks of lm-eval on a model in memory and leaves model, tokenizer and random numbers as they were.

    Every process evaluates everything, as a sharded model needs it; all of them return the first one's figures.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model, with or without an adapter, on the device where it is to run; not wrapped in DDP.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        tasks (`str` or `Sequence[str]`, *optional*, defaults to `SOUL_TASKS`):
            Names of `TASK_SETS`, of lm-eval's tasks, tags and groups, or of those of `soul_eval.tasks`.
        limit (`int`, *optional*): Takes the first rows of each task only.
        batch_size (`int` or `str`, *optional*, defaults to 8): Requests in a forward, or `"auto"`.
        num_fewshot (`int`, *optional*):
            Examples in context, except in tasks that say they have none. By default each task's own number.
        include_path (`str`, *optional*): Folder with more task files.
        progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Returns:
        `dict[str, Figure]`: By `task/metric`, or `task/metric,filter` where lm-eval filters answers, and of groups
        their aggregates. Shares have the interval of [`~statistics.mean_figure`] over their rows or, where a figure is
        not the mean over its rows, that of [`share_figure`]; perplexities one by resamples of documents; all other
        figures Student's of lm-eval's standard error.

    Raises:
        ImportError: If lm-eval is not installed.
        ValueError: If a task is unknown, or `limit` or `num_fewshot` are out of range.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, but it is {limit}.")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"`num_fewshot` must be at least 0, but it is {num_fewshot}.")
    lm_eval = require("lm_eval", "lm-eval")
    from soul_trainer.reference import eval_mode

    manager = _task_manager(include_path)
    loaded = manager.load(_task_names(tasks, manager))
    for task in loaded["tasks"].values():
        _prepare(task, tokenizer, num_fewshot)
    with eval_mode(model), nullcontext() if progress else _without_bars():
        results = lm_eval.evaluate(
            _in_memory(model, tokenizer, batch_size), loaded, limit=limit, bootstrap_iters=NUM_RESAMPLES
        )
    return _first_process(_figures(results))


def kept_general_ability(
    path: Path,
    name: str,
    loading: "ModelArguments",
    tasks: Sequence[str],
    limit: int | None = None,
    include_path: str | None = None,
    overwrite: bool = False,
) -> dict[str, Figure]:
    """
    The general ability of a model in a folder or on the hub, under names that reports know: `boolq_acc`. What a file
    holds of the same model and tasks is read from there; else the model is asked, and the file written.

    Args:
        path (`Path`): The file.
        name (`str`): The model.
        loading ([`~models.ModelArguments`]): How it is loaded.
        tasks (`Sequence[str]`): As in [`general_ability`].
        limit (`int`, *optional*): As in [`general_ability`].
        include_path (`str`, *optional*): As in [`general_ability`].
        overwrite (`bool`, *optional*, defaults to `False`): Whether what is there is of no interest.
    """
    from accelerate import PartialState

    from .models import weight_files

    asked = {"model": name, "files": weight_files(name), "tasks": list(tasks), "limit": limit}
    asked |= loading.loading_settings()
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not overwrite else {}
    PartialState().wait_for_everyone()  # nobody writes before all have looked
    if found:
        check_fields(GeneralFile, found, f"{path}: ")
    if found.get("asked") != json.loads(json.dumps(asked)):
        model = loading.load_model(name, PartialState().device).eval()
        figures = general_ability(model, loading.load_tokenizer(name), tasks, limit, include_path=include_path)
        figures = {re.sub(r"\W+", "_", key): figure.to_json() for key, figure in figures.items()}
        found = {"asked": asked, "figures": figures}
        if PartialState().is_main_process:
            write_whole(path, json.dumps(found, indent=2, allow_nan=False) + "\n")
        PartialState().wait_for_everyone()
    return {key: Figure.from_json(entry) for key, entry in found["figures"].items()}


def check_tasks(tasks: str | Sequence[str], include_path: str | None = None) -> None:
    """Raises what [`general_ability`] raises of unknown tasks, before hours have passed."""
    require("lm_eval", "lm-eval")
    _task_names(tasks, _task_manager(include_path))


@lru_cache(maxsize=4)
def _task_manager(include_path: str | None) -> "TaskManager":
    """Kept, since it takes seconds to read the thousands of task files."""
    from .tasks import TASKS_PATH

    if include_path is not None and not os.path.isdir(include_path):
        raise ValueError(f"`include_path` must be a folder with task files, but it is {include_path!r}.")
    return require("lm_eval.tasks").TaskManager(include_path=[TASKS_PATH, *([include_path] if include_path else [])])


def _task_names(tasks: str | Sequence[str], manager: "TaskManager") -> list[str]:
    asked = [tasks] if isinstance(tasks, str) else tasks
    names = list(dict.fromkeys(name for each in asked for name in TASK_SETS.get(each, (each,))))
    if not names:
        raise ValueError(f"`tasks` is empty: name tasks of lm-eval, or one of the sets {', '.join(TASK_SETS)}.")
    for name in names:
        if name not in manager.task_index:
            similar = ", ".join(difflib.get_close_matches(name, manager.all_tasks)) or "its list has no similar name"
            raise ValueError(f"`tasks` has {name!r}, which lm-eval does not know: {similar}. See `lm_eval ls tasks`.")
    return names


def _prepare(task: Any, tokenizer: "PreTrainedTokenizerBase", num_fewshot: int | None) -> None:
    """As lm-eval's command line does, but for the seeds of all random numbers, which training may be using."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config("num_fewshot", num_fewshot)
    elif own is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(FEWSHOT_SEED)
    if hasattr(type(task), "tokenizer"):
        task.tokenizer = tokenizer


def _in_memory(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int | str) -> "LM":
    huggingface = require("lm_eval.models.huggingface")

    class InMemoryModel(huggingface.HFLM):
        """Its constructor would switch the model's modes and tie its weights, so it sees none."""

        constructed = False

        @property
        def model(self) -> "PreTrainedModel | None":
            return super().model if self.constructed else None

    logger = logging.getLogger(huggingface.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of several processes
    try:
        # The tokenizer gets a pad token, and a softmax in 16 bits would be of 3 digits.
        lm = InMemoryModel(model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, softmax_dtype="float32")
    finally:
        logger.setLevel(level)
    lm.constructed = True
    return lm


@contextmanager
def _without_bars() -> Iterator[None]:
    """lm-eval's bars cannot be switched off one by one; log records go where they went."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


def _figures(results: dict) -> dict[str, Figure]:
    figures = {}
    for task, entry in results["results"].items():
        for key, value in entry.items():
            metric, is_metric, name = key.partition(",")
            if not is_metric or metric.endswith("_stderr"):
                continue
            label = f"{task}/{metric}" + ("" if name == "none" else f",{name}")
            values = _row_values(task, metric, name, results)
            error = entry.get(f"{metric}_stderr,{name}")
            error = float(error) if isinstance(error, float) and math.isfinite(error) else None
            value, num_rows = float(value), entry["sample_len"]
            if metric in PERPLEXITIES and values:
                figures[label] = _perplexity(task, metric, value, values)
            elif metric not in SHARES:
                figures[label] = _with_error(value, num_rows, error)
            elif values and abs(sum(values) / len(values) - value) <= SAME_FIGURE:
                figures[label] = mean_figure(values, task)
            else:
                figures[label] = share_figure(value, num_rows, error)
    return figures


def share_figure(value: float, num_rows: int, error: float | None) -> Figure:
    """
    A share with an interval of which only the standard error is known, as of a mean over tasks of different sizes: the
    exact one of as many independent rows as would have this error (Korn and Graubard, 1998).

    Args:
        value (`float`): In [0, 1].
        num_rows (`int`): Rows that it is made of. At 0 and at 1, where the error is 0, the interval is of them.
        error (`float`, *optional*): Its standard error; `None` gives no interval.
    """
    if error is None:
        return Figure(value, num_rows)
    num_effective = value * (1 - value) / error**2 if error else num_rows
    return Figure(value, num_rows, *share_bounds(value * num_effective, num_effective))


def _with_error(value: float, num_rows: int, error: float | None) -> Figure:
    """Student's interval of a figure whose range is not known."""
    if not error or num_rows < 2:
        return Figure(value, num_rows)
    margin = student_quantile(num_rows) * error
    return Figure(value, num_rows, value - margin, value + margin)


def _row_values(task: str, metric: str, name: str, results: dict) -> list:
    """The metric of each row of a task, or of all tasks of a group; `name` is that of lm-eval's filter."""
    members = results.get("group_subtasks", {}).get(task)
    if members:
        return [value for member in members for value in _row_values(member, metric, name, results)]
    samples = [sample for sample in results["samples"].get(task, []) if sample["filter"] == name]
    return [sample[metric] for sample in samples if metric in sample]


def _perplexity(task: str, metric: str, value: float, pairs: list[tuple[float, int]]) -> Figure:
    """A document's log-likelihood and length are weighed together."""
    log_likelihoods, lengths = np.array(pairs, dtype=np.float64).T
    means = resampled_means(log_likelihoods, task) / resampled_means(lengths, task)
    return interval_figure(value, len(pairs), PERPLEXITIES[metric](means))


def _first_process(figures: dict[str, Figure]) -> dict[str, Figure]:
    from torch import distributed

    box = [figures]
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(box, src=0)
    return box[0]
