"""Hashes of rows and of files, and the salt that keeps those of rows from being guessed."""

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path


# The columns that count in each kind of row. Others would give other hashes, so these stay whatever kinds there are.
KINDS = (("messages",), ("question", "answer"), ("prompt", "completion"), ("text",))
ROW_HASH = "HMAC-SHA256(HMAC-SHA256(salt, row), row), where row is canonical JSON (RFC 8785) in UTF-8"
SALT_FORMAT, KEYS_FORMAT = "soul_eval.record_salt/1", "soul_eval.row_keys/1"
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
MODEL_FILES += ("adapter_config.json",)
TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*", "*.model")
TOKENIZER_FILES += ("vocab.*", "merges.txt", "*.tiktoken")
_CHUNK = 1 << 20


def canonical_row(row: Mapping) -> bytes:
    """
    The bytes of a row that are hashed. The same row gives the same bytes whatever file it comes from.

    Args:
        row (`Mapping`): In any format of `soul_trainer.formats`. Of its columns, those that make the row count; all of
            them do if it is none of these formats, as tokens. Empty columns do not.

    Returns:
        `bytes`: JSON in UTF-8, with sorted keys and no spaces.
    """
    columns = next((kind for kind in KINDS if all(row.get(name) is not None for name in kind)), tuple(row))
    kept = _without_none({name: row[name] for name in columns})
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return text.encode("utf-8", "surrogatepass")


def row_key(salt: bytes, row: Mapping) -> bytes:
    """The secret of one row. Whoever has it can check this row, and no other, against a record."""
    return hmac.digest(salt, canonical_row(row), "sha256")


def row_hash(key: bytes, row: Mapping) -> str:
    """What a record holds of a row, from the row and its key."""
    return hmac.digest(key, canonical_row(row), "sha256").hex()


def row_hashes(salt: bytes, rows: Iterable[Mapping]) -> list[str]:
    """Hashes of rows, sorted, so that they do not tell their order."""
    return sorted(row_hash(row_key(salt, row), row) for row in rows)


def new_salt() -> bytes:
    """256 random bits."""
    return secrets.token_bytes(32)


def write_salt(path: Path, salt: bytes) -> None:
    """Writes a salt to a file that nobody else may read."""
    write_private(path, json.dumps({"format": SALT_FORMAT, "salt": salt.hex()}) + "\n")


def read_secret(path: str | os.PathLike) -> bytes | list[bytes]:
    """
    Args:
        path (`str` or `os.PathLike`): File of a salt, or of keys of single rows.

    Returns:
        `bytes` or `list[bytes]`: The salt, or the keys in their order.

    Raises:
        ValueError: If it is neither.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if found["format"] == SALT_FORMAT:
            return bytes.fromhex(found["salt"])
        if found["format"] == KEYS_FORMAT:
            return [bytes.fromhex(key) for key in found["row_keys"]]
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"`salt`={str(path)!r} holds neither the salt of a record nor keys of rows.")


def write_private(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all, that only its owner may read (mode 600)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def file_hashes(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the files of a folder whose names fit one of the patterns, by name."""
    paths = {path.name: path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {name: _file_hash(paths[name]) for name in sorted(paths)}


def folder_of(model: str, revision: str | None = None) -> Path | None:
    """The folder of a model: its own, or the one in the cache for a hub id; `None` if there is neither."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        places = [
            try_to_load_from_cache(model, name, revision=revision) for name in ("config.json", "adapter_config.json")
        ]
    except HFValidationError:
        return None
    return next((Path(place).parent for place in places if isinstance(place, str)), None)


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _without_none(value: object) -> object:
    # `datasets` gives the turns of all conversations the same keys, with nothing under those that a turn lacks.
    if isinstance(value, Mapping):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, (list, tuple)) else value
