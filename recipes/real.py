"""
A real pretrained model forgets an author, with AdamW and with SOUL, each by its defaults.

    make real                                                            # SmolLM2-135M-Instruct, two CPU cores
    python recipes/real.py --tofu DIR --seeds 0,1,2                      # rows of TOFU, three requests

The model first learns 52 rows: an author's 20 to forget, 24 to retain and 8 that unlearning never sees. A gold model
never learns the 20. With `--tofu`, a folder in TOFU's layout, the rows are TOFU's, otherwise invented authors'.
`outputs/real/seed-<n>/unlearn` then holds what `recipes/unlearn.py` writes, `outputs/real/table.md` all figures, and
`outputs/real/real.png` the course of each run.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from soul_eval.console import run_script
from soul_eval.markdown import markdown_text
from soul_eval.report import Run
from soul_eval.rows import read_rows
from soul_eval.study import records
from soul_eval.study.drawing import draw_curves
from soul_eval.suites import own
from soul_recipes import unlearn
from soul_recipes.fictitious_authors import make_corpus
from soul_recipes.hub_layout import json_lines
from soul_recipes.real_model import (
    GOLD_EPOCHS,
    HELD_OUT_AUTHORS,
    RETAIN_AUTHORS,
    ROWS_OF_OTHERS,
    ROWS_PER_AUTHOR,
    TARGET_EPOCHS,
    convert,
    general_text,
    request_rows,
    taught,
    with_other_answers,
)
from soul_trainer.command_line import PlainParser
from soul_trainer.records import OWNER_ONLY, write_whole


LEARNT = ("forget", "retain", "held_out")
OPTIMIZERS = {"adamw_torch": "AdamW", "soul": "SOUL"}
# Columns of the table: figure, label, number of decimals.
FIGURES = (
    ("forget_probability", "forget", 3),
    ("retain_probability", "retain", 3),
    ("held_out_probability", "held-out", 3),
    ("general_text_nll", "general text, nats", 3),
    ("forget_rougeL_recall", "forget ROUGE-L", 2),
    ("forget_embedding_accuracy", "forget MiniLM accuracy", 2),
)
ATTACKS = (("relearning", "relearnt"), ("quantization_4", "4 bits"))


def small_request(seed: int) -> dict[str, list[dict]]:
    """As many rows as [`~real_model.request_rows`] gives, of invented authors."""
    corpus = make_corpus(1 + RETAIN_AUTHORS + HELD_OUT_AUTHORS, 1, RETAIN_AUTHORS, seed=seed)
    rows = {"forget": corpus["forget"]}
    for split in ("retain", "held_out"):
        starts = range(0, len(corpus[split]), ROWS_PER_AUTHOR)
        rows[split] = [row for start in starts for row in corpus[split][start : start + ROWS_OF_OTHERS]]
    return rows


def forget_request(base: Path, minilm: Path, rows: dict[str, list[dict]], folder: Path, seed: int) -> list[Run]:
    """Teaches the target and the gold model, and unlearns with both optimizers by defaults; returns what ran."""
    everything = [row for split in LEARNT for row in rows[split]]
    target = taught(base, everything, folder / "target", TARGET_EPOCHS, seed)
    gold = taught(base, everything[len(rows["forget"]) :], folder / "gold", GOLD_EPOCHS, seed)
    texts = [{"text": text} for text in general_text()]
    paths = {split: folder / f"{split}.jsonl" for split in (*LEARNT, "general_text")}
    for split, path in paths.items():
        write_whole(path, json_lines(texts if split == "general_text" else rows[split]), OWNER_ONLY)
    command = ["--model", str(target), "--gold", str(gold), "--output_dir", str(folder / "unlearn")]
    command += [word for split, path in paths.items() for word in (f"--{split}", str(path))]
    command += ["--embedding_model", str(minilm), "--max_new_tokens", "64", "--evaluations", "1", "--seed", str(seed)]
    # A step of 8 + 8 rows would need more memory than a small machine has.
    command += ["--per_device_train_batch_size", "4", "--logging_steps", "4"]
    runs = []
    for optimizer in OPTIMIZERS:
        runs += unlearn.main([*command, "--optim", optimizer])
    return [*references(folder / "unlearn"), *runs]


def references(folder: Path) -> list[Run]:
    """The target and, if there is one, the gold model of finished runs."""
    found = []
    for role in ("target", "gold"):
        path = folder / f"{role}.rows.jsonl"
        if path.exists():
            _, rows = read_rows(path)
            found.append(Run(role, own.SUITE.summarise(rows, None), rows, role=role))
    return found


def table(runs: list[Run]) -> str:
    """A line a model, as Markdown."""
    labels = ["", *(label for _, label, _ in FIGURES), *(f"forget, {label}" for _, label in ATTACKS)]
    lines = [labels, ["---", *("---:" for _ in labels[1:])]]
    for run in runs:
        cells = [markdown_text(run.name)]
        for key, _, decimals in FIGURES:
            value = run.value(key)
            cells.append("–" if value is None else f"{value:.{decimals}f}")
        for attack, _ in ATTACKS:
            recovery = (run.attacks or {}).get(attack, {}).get("unlearned", {}).get("probability")
            cells.append("–" if recovery is None else f"{recovery.attacked.value:.3f}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def course(folder: Path, optimizer: str, seed: int) -> records.Run:
    """
    The looks at a model in the course of a finished run, which is what a study keeps of its runs.

    Args:
        folder (`Path`): Of the run's model.
        optimizer (`str`): The run's.
        seed (`int`): The request's.
    """
    history = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["log_history"]
    names = {"forget": "until/forget_probability", "held_out": "until/kept_probability"}
    looks = [entry for entry in history if all(name in entry for name in names.values())]
    curve = [{"step": look["step"], **{key: look[name] for key, name in names.items()}} for look in looks]
    place = {"task": "SmolLM2-135M-Instruct, by defaults", "objective": f"request {seed}"}
    return records.Run(**place, family=optimizer, setting={}, seed=seed, stage="final", target=curve[0], curve=curve)


def main(command_line: Sequence[str] | None = None) -> None:
    """Runs every request and writes the table."""
    parser = PlainParser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/real"), help="folder of models and results")
    parser.add_argument("--tofu", type=Path, help="folder in TOFU's layout; without it, invented authors")
    parser.add_argument("--seeds", default="0", help="requests, by commas; each forgets another author")
    args = parser.parse_args(command_line)
    base, minilm = convert(args.output_dir)
    tables, figures, courses = [], {}, []
    for seed in map(int, args.seeds.split(",")):
        rows = small_request(seed) if args.tofu is None else request_rows(args.tofu, seed)
        if args.tofu is not None:
            rows = with_other_answers(rows, args.tofu)
        runs = forget_request(base, minilm, rows, args.output_dir / f"seed-{seed}", seed)
        tables.append(f"Request {seed}\n\n{table(runs)}\n")
        courses += [course(args.output_dir / f"seed-{seed}/unlearn/{name}", name, seed) for name in OPTIMIZERS]
        figures[seed] = {run.name: {name: figure.to_json() for name, figure in run.summary.items()} for run in runs}
    write_whole(args.output_dir / "table.md", "\n".join(tables))
    write_whole(args.output_dir / "figures.json", json.dumps(figures, indent=1) + "\n")
    draw_curves(courses, args.output_dir / "real.png", OPTIMIZERS)
    print("\n".join(tables))


if __name__ == "__main__":
    sys.exit(run_script(main))
