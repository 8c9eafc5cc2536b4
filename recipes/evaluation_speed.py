"""
Times TOFU's suite three ways on one model, and holds their figures together.

    python recipes/benchmark.py eval                                     # a small model on the embedded corpus
    python recipes/benchmark.py eval --dataset DIR --forget_split forget10 --model DIR

| way | likelihoods | generations |
|---|---|---|
| row by row | one answer a forward | one prompt a `generate` |
| batches of 32 | 32 answers in the dataset's order, padded | 32 prompts in its order, until the last is done |
| soul_eval | what `soul_eval.scoring` does | what `soul_eval.scoring` does |
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from soul_eval.metrics.rouge_overlap.formula import rouge_scores
from soul_eval.models import load_model
from soul_eval.scoring import longest_input
from soul_eval.statistics import values
from soul_eval.suites import tofu
from soul_recipes.fictitious_authors import make_corpus
from soul_recipes.hub_layout import write_hub_layout
from soul_recipes.small_llama import SmallModelArguments
from soul_recipes.small_models import small_models
from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.formats import encode, render


MAX_NEW_TOKENS = 200
Model = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def padded(rows: list[list[int]], value: int, side: str) -> torch.Tensor:
    """Rows of tokens as one tensor, filled up on a side."""
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


@torch.no_grad()
def losses_in_batches(model: Model, examples: list, size: int) -> Iterator[float]:
    """Mean token losses as TOFU's own code has them: cross-entropy over all positions, in the dataset's order."""
    for start in range(0, len(examples), size):
        rows = [encode(model[1], example) for example in examples[start : start + size]]
        ids = padded([row["input_ids"] for row in rows], 0, "right").to(model[0].device)
        labels = padded([row["labels"] for row in rows], IGNORE_INDEX, "right").to(model[0].device)
        mask = padded([[1] * len(row["input_ids"]) for row in rows], 0, "right").to(model[0].device)
        logits = model[0](input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORE_INDEX, reduction="none"
        )
        yield from (losses.sum(1) / (labels[:, 1:] != IGNORE_INDEX).sum(1)).tolist()


@torch.no_grad()
def texts_in_batches(model: Model, examples: list, size: int) -> Iterator[str]:
    """Greedy answers by `generate`, in the dataset's order."""
    network, tokenizer = model
    prompts = [
        [token for token, label in zip(*row.values()) if label == IGNORE_INDEX]
        for row in (encode(tokenizer, example) for example in examples)
    ]
    limit = min(MAX_NEW_TOKENS, (longest_input(network, tokenizer) or 10**6) - max(map(len, prompts)))
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        ids = padded(batch, tokenizer.pad_token_id or 0, "left").to(network.device)
        mask = padded([[1] * len(prompt) for prompt in batch], 0, "left").to(network.device)
        tokens = network.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=limit)
        for text in tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True):
            yield text.strip()


def rows_in_batches(model: Model, splits: dict[str, Dataset], size: int) -> tuple[list[dict], float, float]:
    """The suite's rows with batches of so many, and the seconds of likelihoods and generations."""
    rows = tofu.unscored_rows(splits)
    start = time.perf_counter()
    parts = [tofu.parts(row, tofu.TofuArguments(generate=False))[0] for row in rows]
    examples = [[render(answer, model[1]) for answer in part.answers] for part in parts]
    losses = losses_in_batches(model, [example for group in examples for example in group], size)
    for row, group in zip(rows, examples):
        first, *others = (next(losses) for _ in group)
        has_paraphrase = "paraphrased_answer" in row
        row |= {"answer_nll": first, "paraphrased_nll": others[0] if has_paraphrase else first}
        row["perturbed_nll"] = others[has_paraphrase:]
    middle = time.perf_counter()
    for row, text in zip(rows, texts_in_batches(model, [group[0] for group in examples], size)):
        row |= {"generation": text, **rouge_scores(row["answer"], text)}
    return rows, middle - start, time.perf_counter() - middle


def own_rows(model: Model, splits: dict[str, Dataset]) -> tuple[list[dict], float, float]:
    """The same by `soul_eval`."""
    start = time.perf_counter()
    tofu.evaluate_model(*model, splits, generate=False, progress=False)
    middle = time.perf_counter()
    rows = tofu.evaluate_model(*model, splits, max_new_tokens=MAX_NEW_TOKENS, progress=False)
    whole = time.perf_counter() - middle
    return rows, middle - start, whole - (middle - start)


def load(folder: Path, dataset: str | None, forget_split: str, model_name: str | None) -> tuple[Model, dict]:
    """The model and the rows; a small model is trained on them if none is named."""
    if dataset is None:
        dataset, forget_split = str(folder / "data"), "forget"
        write_hub_layout(make_corpus(), dataset)
    splits = tofu.load_splits(dataset, forget_split)
    if model_name is None:
        learnt = {split: rows.select_columns(["question", "answer"]) for split, rows in splits.items()}
        model_name = small_models(learnt, folder, SmallModelArguments(finetune_epochs=8), seed=0)[0]
    return (load_model(model_name), AutoTokenizer.from_pretrained(model_name)), splits


def compare(folder: Path, dataset: str | None, forget_split: str, model_name: str | None) -> None:
    """Prints seconds, ratios and the largest difference of any figure and of any row's loss."""
    model, splits = load(folder, dataset, forget_split, model_name)
    ways: dict[str, Callable] = {
        "row by row": lambda: rows_in_batches(model, splits, 1),
        "batches of 32": lambda: rows_in_batches(model, splits, 32),
        "soul_eval": lambda: own_rows(model, splits),
    }
    own_rows(model, {split: rows.select(range(2)) for split, rows in splits.items()})  # warm
    found = {name: way() for name, way in ways.items()}
    own, own_seconds = values(tofu.summarise(found["soul_eval"][0])), sum(found["soul_eval"][1:])
    print(f"{sum(p.numel() for p in model[0].parameters()) / 1e6:.1f}M parameters, {len(found['soul_eval'][0])} rows")
    print(f"{'':<14}{'likelihoods':>12}{'generations':>12}{'whole':>9}{'ratio':>7}{'figures':>10}{'losses':>10}")
    for name, (rows, *seconds) in found.items():
        figures = max(abs(value - own[key]) for key, value in values(tofu.summarise(rows)).items())
        losses = max(abs(a["answer_nll"] - b["answer_nll"]) for a, b in zip(rows, found["soul_eval"][0]))
        print(
            f"{name:<14}{seconds[0]:>10.1f} s{seconds[1]:>10.1f} s{sum(seconds):>7.1f} s"
            f"{sum(seconds) / own_seconds:>7.1f}{figures:>10.0e}{losses:>10.0e}"
        )
