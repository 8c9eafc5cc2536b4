"""What a record says; writing, reading and completing it."""

import hashlib
import json
import logging
import math
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from ..rows import make_header, write_whole
from ..statistics import CONFIDENCE, Figure
from .envelope import is_signed_by, open_envelope, sign
from .hashing import (
    MODEL_FILES,
    ROW_HASH,
    TOKENIZER_FILES,
    file_hashes,
    folder_of,
    new_salt,
    row_hashes,
    write_salt,
)


if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

logger = logging.getLogger(__name__)

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
# Nobody registers such names, and a domain that is not ours could say anything: a random UUID is ours alone. A change
# that readers of older records cannot follow gets another version.
PREDICATE_TYPE = "urn:uuid:e9fff8bc-a832-45fa-a1b0-00c429716da9#unlearning-record-v1"
# Lowercase hex of `soul_trainer.weights.weights_digest`, whatever files the weights lie in.
WEIGHTS = "weightsSha256"
NOTE = (
    "A record of what an unlearning run did and measured, as its author states it. It does not prove that the model "
    "holds no trace of the rows, nor that no other copy of the model exists."
)
SALT_SUFFIX = ".record.salt"
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "safetensors", "tokenizers", "numpy")
_PACKAGES += ("deepspeed", "bitsandbytes", "scipy", "rouge_score")
# Settings whose text is part of the method. Another text with a slash is a path, which says who ran it and where.
_TEXTS = ("prompt_template", "trainable_parameters", "frozen_parameters", "optim_args")
_SECRET = ("token", "password", "secret")


@dataclass
class Evidence:
    """
    What a record is made of.

    Attributes:
        model (`Path`): Folder of the model after unlearning.
        target (`str`): Folder or hub id of the model before.
        rows (`Mapping[str, Iterable[Mapping]]`): `forget` and `retain`: rows as their owner has them.
        figures (`Mapping[str, tuple]`): `before`, `after` and perhaps `gold`: the hash of the weights that were asked,
            or `None`, and the figures by name.
        started (`datetime`): When training began, aware of its time zone.
        ended (`datetime`): When the last figure was there.
        suite (`str`, *optional*): Name of the suite that made the figures.
        settings (`Mapping`, *optional*): What another run must repeat. Paths and secrets are taken out.
        seeds (`Mapping`, *optional*): By name.
        weights (`str`, *optional*): [`~soul_trainer.weights.weights_digest`] of the model after unlearning.
        target_weights (`str`, *optional*): That of the model before.
        target_revision (`str`, *optional*): Of the model before, on the hub.
        device (`Mapping`, *optional*): What it ran on.
        attacks (`Mapping`, *optional*): What attacks brought back: `attacks` of `attacks.json`.
    """

    model: Path
    target: str
    rows: Mapping[str, Iterable[Mapping]]
    figures: Mapping[str, tuple[str | None, Mapping[str, Figure]]]
    started: datetime
    ended: datetime
    suite: str | None = None
    settings: Mapping = field(default_factory=dict)
    seeds: Mapping = field(default_factory=dict)
    weights: str | None = None
    target_weights: str | None = None
    target_revision: str | None = None
    device: Mapping = field(default_factory=dict)
    attacks: Mapping | None = None


@dataclass(frozen=True)
class Record:
    """
    A record as it was read. Nothing of it is checked.

    Attributes:
        statement (`dict`): What it says.
        payload (`bytes`): The statement as it was written, which is what a signature and [`Record.digest`] are of.
        envelope (`dict`, *optional*): Around the payload, if it is signed.
    """

    statement: dict
    payload: bytes
    envelope: dict | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the payload: it stays if the record is signed later."""
        return hashlib.sha256(self.payload).hexdigest()

    def subjects(self) -> dict[str, dict]:
        """Digests by the name of what they are of."""
        return {entry["name"]: entry["digest"] for entry in self.statement["subject"]}

    def files(self) -> dict[str, str]:
        """SHA-256 of each file of the model after unlearning."""
        return {name: digest["sha256"] for name, digest in self.subjects().items() if "sha256" in digest}

    def weights(self) -> str | None:
        """The hash of the weights after unlearning, if it is there."""
        return next((digest[WEIGHTS] for digest in self.subjects().values() if WEIGHTS in digest), None)


def record_file_of(folder: str | os.PathLike) -> Path:
    """Where the record of a model lies: beside its folder, which is what goes to a hub."""
    folder = Path(folder)
    return folder.with_name(f"{folder.name}.record.json")


def salt_file_of(record: str | os.PathLike) -> Path:
    """Where the salt of a record lies: beside it."""
    record = Path(record)
    return record.with_name(record.name.removesuffix(".json").removesuffix(".record") + SALT_SUFFIX)


def write_record(path: str | os.PathLike, evidence: Evidence, signing_key: "Ed25519PrivateKey | None" = None) -> Path:
    """
    Writes a record, and beside it the salt of its rows, which only its owner may read.

    Args:
        path (`str` or `os.PathLike`): The record, `<name>.record.json`; its salt is `<name>.record.salt`.
        evidence ([`Evidence`]): What it says.
        signing_key (`Ed25519PrivateKey`, *optional*): Of [`~envelope.load_signing_key`].

    Returns:
        `Path`: The record.
    """
    salt = new_salt()
    statement = _statement(evidence, salt)
    write_salt(salt_file_of(path), salt)
    return _write(path, statement, signing_key)


def read_record(path: str | os.PathLike) -> Record:
    """
    Reads a record, signed or not.

    Raises:
        ValueError: If it is none.
    """
    try:
        content = Path(path).read_bytes()
        found = json.loads(content)
        envelope = found if isinstance(found, dict) and "payload" in found else None
        payload = content if envelope is None else open_envelope(envelope)
        statement = json.loads(payload)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no record: {error}") from None
    if not isinstance(statement, dict):
        raise ValueError(f"{path} is no record: it holds no JSON object.")
    return Record(statement, payload, envelope)


def complete_record(
    path: str | os.PathLike,
    attacks: Mapping | None = None,
    signing_key: "Ed25519PrivateKey | None" = None,
) -> bool:
    """
    Adds what attacks brought back, and signs.

    Args:
        path (`str` or `os.PathLike`): The record.
        attacks (`Mapping`, *optional*): As in [`Evidence`], in the place of those that it had.
        signing_key (`Ed25519PrivateKey`, *optional*):
            Signs the record, in the place of the key that has signed it. Needed for a signed record that gets attacks.

    Returns:
        `bool`: Whether the record is another one now. It stays as it is if it says all this already.

    Raises:
        ValueError: If a signed record would lose its signature.
    """
    record = read_record(path)
    statement = record.statement
    if attacks is not None:
        predicate = {**statement["predicate"], "attacks": _finite(attacks)}
        statement = {**statement, "predicate": predicate}
    is_same = statement == record.statement
    is_signed = record.envelope is not None
    if is_same and (signing_key is None or (is_signed and is_signed_by(record.envelope, signing_key.public_key()))):
        return False
    if is_signed and signing_key is None:
        raise ValueError(f"{path} is signed, and what is added must be too: give the key (--signing_key).")
    _write(path, statement, signing_key, record.payload if is_same else None)
    return True


def remove_record(folder: str | os.PathLike) -> None:
    """Removes the record of a model that is about to be replaced, and its salt."""
    path = record_file_of(folder)
    path.unlink(missing_ok=True)
    salt_file_of(path).unlink(missing_ok=True)


def timestamp(time: datetime) -> str:
    """A point in time as RFC 3339 has it, in UTC."""
    return time.astimezone(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")


def _statement(evidence: Evidence, salt: bytes) -> dict:
    subject = [{"name": name, "digest": {"sha256": found}} for name, found in _model_files(evidence.model).items()]
    if evidence.weights:
        subject.insert(0, {"name": evidence.model.name, "digest": {WEIGHTS: evidence.weights}})
    before, parent = _before(evidence)
    figures = {
        role: {"model": {WEIGHTS: weights} if weights else {}, "figures": _figures(found)}
        for role, (weights, found) in evidence.figures.items()
    }
    predicate = {
        "note": NOTE,
        "project": {"name": "soul-trainer", "version": _version("soul-trainer"), "commit": _commit()},
        "parent": parent,
        "before": before,
        "tokenizer": {"files": file_hashes(evidence.model, TOKENIZER_FILES)},
        "rows": {"hash": ROW_HASH, **{half: row_hashes(salt, rows) for half, rows in evidence.rows.items()}},
        "settings": _public(evidence.settings),
        "seeds": dict(evidence.seeds),
        "figures": {"suite": evidence.suite, "confidence": CONFIDENCE, **figures},
        "attacks": None if evidence.attacks is None else _finite(evidence.attacks),
        "environment": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": {name: found for name in _PACKAGES if (found := _version(name))},
            "device": dict(evidence.device),
        },
        "times": {"started": timestamp(evidence.started), "ended": timestamp(evidence.ended)},
    }
    return {"_type": STATEMENT_TYPE, "subject": subject, "predicateType": PREDICATE_TYPE, "predicate": predicate}


def _before(evidence: Evidence) -> tuple[dict, dict | None]:
    """What is known of the model before, and the record that it has of its own."""
    target, weights, parent = evidence.target, evidence.target_weights, None
    folder, is_folder = folder_of(target, evidence.target_revision), Path(target).is_dir()
    files = {} if folder is None else _model_files(folder)
    path = record_file_of(target)
    record = _record_of(path, files) if is_folder and path.exists() else None
    if record is not None:
        parent = {"name": path.name, "digest": {"sha256": record.digest}}
        weights = weights or record.weights()
    before = {"name": Path(target).name if is_folder else target, "digest": {WEIGHTS: weights} if weights else {}}
    if folder is not None and not is_folder:
        before["revision"] = folder.name
    return {**before, "files": files}, parent


def _record_of(path: Path, files: dict[str, str]) -> Record | None:
    """The record of these files. What else lies there is no reason to end a run without its own record."""
    try:
        record = read_record(path)
        if record.files() == files:
            return record
        reason = "it is of other files than the model's"
    except (ValueError, KeyError, TypeError) as error:
        reason = f"it cannot be read ({type(error).__name__}: {error})"
    logger.warning(f"{path} is not named as the parent record: {reason}.")
    return None


def _model_files(folder: Path) -> dict[str, str]:
    return file_hashes(folder, MODEL_FILES)


def _figures(figures: Mapping[str, Figure]) -> dict[str, dict]:
    return {name: _finite(Figure.to_json(figure)) for name, figure in sorted(figures.items())}


def _public(settings: Mapping) -> dict:
    """Settings without paths and secrets; of a file of weights or curvature, its hash."""
    found = {}
    for name, value in settings.items():
        if any(word in name for word in _SECRET):
            continue
        if isinstance(value, (str, os.PathLike)) and name not in _TEXTS:
            path = Path(value)
            if path.suffix == ".safetensors" and path.is_file():
                value = {"sha256": file_hashes(path.parent, [path.name])[path.name]}
            elif not isinstance(value, str) or "/" in value or os.sep in value or path.exists():
                continue
        found[name] = _finite(value)
    return found


def _finite(value: object) -> object:
    """A value as JSON has it, where infinity is a text."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)


def _write(
    path: str | os.PathLike, statement: dict, key: "Ed25519PrivateKey | None", payload: bytes | None = None
) -> Path:
    if payload is None:
        payload = (json.dumps(statement, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    content = payload if key is None else (json.dumps(sign(payload, key), indent=1) + "\n").encode()
    write_whole(path, content)
    return Path(path)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    return make_header("", {}, 0)["commit"]
