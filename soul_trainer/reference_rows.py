"""What the model said of each row before unlearning, computed once and kept with the rows."""

import math
import secrets
import shutil
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from .batch import IGNORE_INDEX
from .config import UnlearnConfig
from .divergences import TopTokens
from .engines import Engine
from .log_probs import LEAST_LOG_PROB, answer_chunks, shift_labels, token_log_probs
from .objectives import Objectives
from .pairing import PairedDataset
from .records import OWNER_ONLY
from .reference import eval_mode
from .scratch import reference_folder


logger = logging.get_logger(__name__)

_COLUMNS = {"reference_ids": List(List(Value("int32"))), "reference_log_probs": List(List(Value("float32")))}


@dataclass
class RowForward:
    """
    Forwards of rows through the model as it is.

    Args:
        model (`torch.nn.Module`): The unwrapped model, before the first step.
        collate (`Callable`): Makes a padded batch of rows.
        batch_size (`int`): Rows in a forward on one process.
        engine ([`~engines.Engine`]): The rows are shared out over its processes.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
    """

    model: torch.nn.Module
    collate: Callable[[list[dict]], dict[str, Tensor]]
    batch_size: int
    engine: Engine
    show_progress: bool = True

    @torch.no_grad()
    def __call__(self, rows: Sequence[dict], read: Callable[[Tensor, Tensor], list], desc: str | None = None) -> list:
        """
        Args:
            rows (`Sequence[dict]`): From [`~formats.prepare`].
            read (`Callable`): Makes a list of one value a row of logits and targets.
            desc (`str`, *optional*): Of the progress bar; none without.

        Returns:
            `list`: The values of all rows, on every process.
        """
        engine = self.engine
        device = engine.accelerator.device if engine.shards else next(self.model.parameters()).device
        places = engine.share(list(range(len(rows))))
        values = []
        with eval_mode(self.model), engine.autocast():
            starts = range(0, len(places), self.batch_size)
            for start in tqdm(starts, desc=desc, disable=desc is None or not self.show_progress):
                items = [{"forget": rows[place]} for place in places[start : start + self.batch_size]]
                batch = {key: tensor.to(device) for key, tensor in self.collate(items).items()}
                logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
                values += read(logits, shift_labels(batch["labels"]))
        engine.forget_gathered(self.model)
        return engine.collect(values, len(rows))


def keep_with_rows(rows: PairedDataset, objectives: Objectives, args: UnlearnConfig, forward: RowForward) -> None:
    """
    Computes what the objectives ask for and the rows do not have yet.

    Args:
        rows ([`~pairing.PairedDataset`]): Gets columns in its datasets, and the numbers of its preferred answers.
        objectives ([`~objectives.Objectives`]): Of the run.
        args ([`UnlearnConfig`]): Says whether distributions are kept, and where; and for how long the run goes.
        forward ([`RowForward`]): Of the model before the first step.
    """
    if objectives.any("needs_reference_log_prob"):
        if "reference_log_prob" not in rows.forget.column_names:
            rows.forget = rows.forget.add_column("reference_log_prob", answer_log_probs(rows.forget, forward))
        if objectives.forget.prefers_answers and not rows.preferred_log_prob:
            rows.num_known_epochs = _num_epochs(args, len(rows))
            preferred = rows.preferred_rows(rows.num_known_epochs)
            rows.preferred_log_prob = dict(zip(preferred, answer_log_probs(list(preferred.values()), forward)))
    if args.reference != "cached_topk":
        return
    for half, objective in objectives._asdict().items():
        dataset = getattr(rows, half)
        if objective is None or not objective.needs_reference or "reference_ids" in dataset.column_names:
            continue
        dataset, mass = add_top_tokens(dataset, args.reference_topk, Path(args.output_dir), forward)
        setattr(rows, half, dataset)
        if args.should_log:
            logger.warning(
                f"Reference of `{half}_dataset`: the {args.reference_topk} tokens that are kept hold "
                f"{100 * (1 - mass):.4g}% of its probability. `reference_topk` keeps more."
            )


def drop_from_rows(rows: PairedDataset) -> None:
    """Takes off the rows what [`keep_with_rows`] has added: another model has said it."""
    kept = {"reference_log_prob", *_COLUMNS}
    for half in ("forget", "retain"):
        dataset = getattr(rows, half)
        setattr(rows, half, dataset.remove_columns(kept & set(dataset.column_names)))
    rows.preferred_log_prob, rows.num_known_epochs = {}, 0


def _num_epochs(args: UnlearnConfig, num_rows: int) -> int:
    """Epochs that a run begins, at most."""
    if args.max_steps <= 0:
        return math.ceil(args.num_train_epochs)
    pairs_per_batch = args.train_batch_size * args.world_size
    num_batches = num_rows // pairs_per_batch if args.dataloader_drop_last else math.ceil(num_rows / pairs_per_batch)
    return math.ceil(args.max_steps / max(1, math.ceil(num_batches / args.gradient_accumulation_steps)))


def answer_log_probs(rows: Sequence[dict], forward: RowForward) -> list[float]:
    """The log-probability of each row's whole answer, in nats: a float32 sum."""

    def read(logits: Tensor, targets: Tensor) -> list[float]:
        return token_log_probs(logits, targets).sum(1).tolist()

    return forward(rows, read, desc="Reference log-probabilities")


def add_top_tokens(dataset: Dataset, num_tokens: int, folder: Path, forward: RowForward) -> tuple[Dataset, float]:
    """
    Adds the columns `reference_ids` and `reference_log_probs` of [`~divergences.TopTokens`], for each answer token.
    They are written to disk as they are computed, 8 bytes a kept token, and read from there. The files hold what is to
    be forgotten, so they go with the dataset, or at the end of the program.

    Args:
        dataset ([`~datasets.Dataset`]): From [`~formats.prepare`].
        num_tokens (`int`): Tokens that are kept at each position.
        folder (`Path`): Where each process makes a folder `_reference-...` of its own.
        forward ([`RowForward`]): Of the model before the first step.

    Returns:
        `tuple[Dataset, float]`: The dataset with the columns, and the mean probability of what is not kept: each KL
        divergence is too small by this mass times the divergence within it.
    """
    masses: list[float] = []

    def read(logits: Tensor, targets: Tensor) -> list[tuple[list, list]]:
        kept = zip(*top_tokens(logits, targets, num_tokens), targets != IGNORE_INDEX)
        return [(ids[is_answer].tolist(), log_probs[is_answer].tolist()) for ids, log_probs, is_answer in kept]

    def add(columns: dict[str, list]) -> dict[str, list]:
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        ids, log_probs = zip(*forward(rows, read))
        masses.extend(torch.tensor([token[-1] for row in log_probs for token in row]).exp().tolist())
        return {"reference_ids": list(ids), "reference_log_probs": list(log_probs)}

    folder.mkdir(parents=True, exist_ok=True)
    own_folder = reference_folder(folder)
    added = dataset.map(
        add,
        batched=True,
        batch_size=forward.batch_size * forward.engine.num_processes,
        features=Features({**dataset.features, **_COLUMNS}),
        cache_file_name=f"{own_folder}/rows.arrow",
        new_fingerprint=secrets.token_hex(8),  # of the function's pickle otherwise, and so of the model
        desc="Reference distributions" if forward.show_progress else None,
    )
    Path(own_folder, "rows.arrow").chmod(OWNER_ONLY)
    weakref.finalize(added, shutil.rmtree, own_folder, ignore_errors=True)
    return added, sum(masses) / len(masses)


@torch.no_grad()
def top_tokens(logits: Tensor, targets: Tensor, num_tokens: int) -> TopTokens:
    """
    The most probable tokens at each answer position.

    Args:
        logits (`torch.FloatTensor` of shape `(rows, tokens, V)`): The model's.
        targets (`torch.LongTensor` of shape `(rows, tokens)`): From [`~log_probs.shift_labels`].
        num_tokens (`int`): How many, at most the vocabulary.

    Returns:
        [`~divergences.TopTokens`]: With zeros off the answers.
    """
    flat_logits, flat_targets = logits.flatten(0, 1), targets.flatten()
    num_tokens = min(num_tokens, logits.shape[2])
    ids = flat_targets.new_zeros(len(flat_targets), num_tokens)
    log_probs = flat_logits.new_zeros(len(flat_targets), num_tokens + 1, dtype=torch.float32)
    for chunk in answer_chunks(targets):
        log_p, labels = flat_logits[chunk].float().log_softmax(1), flat_targets[chunk, None]
        ids[chunk] = log_p.scatter(1, labels, float("inf")).topk(num_tokens).indices
        rest = log_p.scatter(1, ids[chunk], float("-inf")).logsumexp(1, keepdim=True).clamp_min(LEAST_LOG_PROB)
        log_probs[chunk] = torch.cat([log_p.gather(1, ids[chunk]), rest], 1)
    return TopTokens(ids.unflatten(0, targets.shape), log_probs.unflatten(0, targets.shape))
