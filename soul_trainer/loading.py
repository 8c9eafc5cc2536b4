"""Models, tokenizers and rows by the names that a command line gives: files, folders, hub ids."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


ROW_FILES = (".json", ".jsonl")
# What makes a folder one of rows, though there may be a text beside them that says what they are.
_DATA_FILES = {*ROW_FILES, ".parquet", ".csv", ".arrow"}


def load_model(name: str, dtype: str = "float32", device: str | torch.device | None = None) -> PreTrainedModel:
    """
    A causal language model, or an adapter on its base model, of which the adapter alone trains.

    Args:
        name (`str`): Folder or hub id.
        dtype (`str`, *optional*, defaults to `"float32"`): Of the weights.
        device (`str` or `torch.device`, *optional*): By default a GPU if there is one.
    """
    loader, options = AutoModelForCausalLM, {}
    if _is_adapter(name):
        from peft import AutoPeftModelForCausalLM as loader

        options = {"is_trainable": True}
    model = loader.from_pretrained(name, dtype=dtype, **options)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or of an adapter's base model where none was saved with it."""
    if _is_adapter(name) and not (Path(name) / "tokenizer_config.json").exists():
        from peft import PeftConfig

        name = PeftConfig.from_pretrained(name).base_model_name_or_path
    return AutoTokenizer.from_pretrained(name)


def load_rows(source: str, config: str | None = None, split: str = "train") -> Dataset:
    """
    Rows of a JSON or JSON lines file, of a folder or of a dataset on the hub.

    Args:
        source (`str`): File, folder or hub id.
        config (`str`, *optional*): Configuration of the dataset.
        split (`str`, *optional*, defaults to `"train"`): Of the dataset; a file has but one.

    Raises:
        ValueError: If there is no such file.
    """
    path = Path(source)
    if path.suffix in ROW_FILES:
        _check_file(path)
        arguments, split = {"path": "json", "data_files": source}, "train"
    else:
        arguments = {"path": source, "name": config}
    if not path.exists():
        return load_dataset(**arguments, split=split)
    # The library's cache tells folders apart by their names alone: it would give the rows of another folder.
    with TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        return load_dataset(**arguments, split=split, cache_dir=cache, keep_in_memory=True)


def load_texts(source: str) -> list[str]:
    """
    The texts of a `.txt` file or of all such files in a folder, in the order of their names; none of another source.

    Raises:
        ValueError: If there is no such file.
    """
    path = Path(source)
    if path.suffix == ".txt" and not path.is_dir():
        _check_file(path)
        files = [path]
    else:
        files = sorted(path.glob("*.txt")) if path.is_dir() else []
        if files and any(other.suffix in _DATA_FILES for other in path.iterdir()):
            return []
    return [file.read_text(encoding="utf-8") for file in files]


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")


def _is_adapter(name: str) -> bool:
    return (Path(name) / "adapter_config.json").exists()
