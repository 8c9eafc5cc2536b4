"""Progress bars: that they move while work is done and say whose it is; and that nothing needless is warned of."""

import logging
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from scenes import FORGET, scene_trainer
from test_eval_scoring import ANSWERS, QUESTIONS, ROWS, byte_tokenizer, small_llama
from tqdm import tqdm
from transformers import TrainingArguments

from soul_eval import evaluation
from soul_eval.console import run
from soul_eval.scoring import generate_answers, generation, likelihood, score_answers
from soul_eval.suites.base import DETAILS, GENERATION, SCORES, Part
from soul_trainer import UnlearnConfig
from soul_trainer.formats import render
from soul_trainer.machine import fit_to_machine


NEW_TOKENS = 12


@pytest.fixture
def bars(monkeypatch):
    """The bars that are made, each with the places that it stood at."""
    made = []

    class Recorded(tqdm):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.places = []
            made.append(self)

        def update(self, n=1):
            super().update(n)
            self.places.append(self.n)

    for module in (generation, likelihood):
        monkeypatch.setattr(module, "tqdm", Recorded)
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(QUESTIONS + ANSWERS)


def test_a_bar_moves_within_a_batch_of_answers(tokenizer, bars):
    """Would catch a bar that stands at 0 until all of 256 rows are done, and one that goes beyond their number."""
    examples = [render(row, tokenizer) for row in ROWS]
    list(generate_answers(small_llama(), tokenizer, examples, max_new_tokens=NEW_TOKENS))
    (bar,) = bars
    assert bar.places == sorted(bar.places) and bar.places[-1] == bar.total == len(ROWS)
    assert len(set(bar.places)) >= NEW_TOKENS and bar.places[1] <= len(ROWS) / 2


def test_a_bar_counts_once_what_memory_had_to_do_twice(tokenizer, bars, monkeypatch):
    """Would catch 150%, where a batch did not fit and its halves were done anew."""
    model, forward, calls = small_llama(), torch.nn.Module.__call__, []

    def fails(module, *args, **settings):
        if module is model:
            calls.append(settings["input_ids"].shape)
            if len(calls) == 4:  # in the midst of the first batch
                raise torch.OutOfMemoryError("no memory")
        return forward(module, *args, **settings)

    monkeypatch.setattr(type(model), "__call__", fails)
    examples = [render(row, tokenizer) for row in ROWS]
    assert len(list(generate_answers(model, tokenizer, examples, max_new_tokens=NEW_TOKENS))) == len(ROWS)
    (bar,) = bars
    assert bar.n == bar.total == max(bar.places) and bar.places != sorted(bar.places)


def test_a_bar_of_scores_counts_this_process_s_rows(tokenizer, bars):
    """Would catch a bar that ends at half, because another process has the other half."""
    shared = [{**row, "answer": answer} for row in ROWS[:3] for answer in ANSWERS[:4]]
    examples = [render(row, tokenizer) for row in [*shared, *ROWS[3:]]]
    scored = 0
    for index in range(2):
        engine = SimpleNamespace(process_index=index, num_processes=2, shards=False)
        found = list(score_answers(small_llama(), tokenizer, examples, batch_size=64, engine=engine))
        assert bars[-1].n == bars[-1].total == len(found) and len(bars[-1].places) > 2
        scored += len(found)
    assert scored == len(examples)


def test_bars_name_the_model_and_what_it_does(tokenizer, bars):
    """Would catch three bars in a row that only say Answers."""
    kinds = (SCORES, DETAILS, GENERATION)
    rows = [{**row, "split": "forget", "index": index} for index, row in enumerate(ROWS)]

    def parts(row):
        return [Part(kind, [row], lambda answer: {}, kind, NEW_TOKENS) for kind in kinds]

    evaluation.ask(small_llama(), tokenizer, rows, parts, name="target")
    assert [bar.desc for bar in bars] == ["target: answers"] * 2 + ["target: greedy answers"]


def test_without_an_accelerator_nothing_is_said_of_its_absence(tmp_path, monkeypatch):
    """Would catch torch's warning at each loader of a CPU, and DeepSpeed's at each Trainer."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    args = TrainingArguments(str(tmp_path))
    fit_to_machine(args)
    assert args.dataloader_pin_memory and "DS_ACCELERATOR" not in os.environ
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert not UnlearnConfig(str(tmp_path)).dataloader_pin_memory and os.environ["DS_ACCELERATOR"] == "cpu"
    trainer = scene_trainer(tmp_path / "out", use_cpu=False, max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*pin_memory.*")
        next(iter(trainer.get_train_dataloader()))
    assert len(FORGET) > 1


def test_a_missing_kernel_of_4_bits_is_no_warning_in_a_command(caplog):
    """Would catch bitsandbytes' warning at the start of every run, and a filter that swallows its other warnings."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    missing = "Failed to load CPU gemm_4bit_forward from kernels-community: %s."
    run("soul toy", lambda arguments: (logger.warning(missing, "none"), logger.warning("other")), [])
    assert [record.message for record in caplog.records] == ["other"]
    with caplog.at_level(logging.INFO):
        logger.warning(missing, "none")
    assert caplog.records[-1].levelname == "INFO" and "gemm_4bit" in caplog.records[-1].message
