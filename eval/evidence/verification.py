"""What can be checked about a record, and what was."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from .envelope import is_signed_by, key_id, load_public_key
from .hashing import (
    KEYS_FORMAT,
    MODEL_FILES,
    TOKENIZER_FILES,
    file_hashes,
    folder_of,
    read_secret,
    row_hash,
    row_key,
    write_private,
)
from .record import PREDICATE_TYPE, STATEMENT_TYPE, WEIGHTS, Record, read_record


if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

PASSED, FAILED, NOT_CHECKED = "passed", "failed", "not checked"
_PREDICATE = {
    "note": str,
    "project": dict,
    "parent": (dict, type(None)),
    "before": dict,
    "tokenizer": dict,
    "rows": dict,
    "settings": dict,
    "seeds": dict,
    "figures": dict,
    "attacks": (dict, type(None)),
    "environment": dict,
    "times": dict,
}
_HEX = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Check:
    """
    One thing that was checked, or was not.

    Attributes:
        name (`str`): What: `format`, `signature`, `files`, `tokenizer`, `weights`, `rows` or `parent`.
        status (`str`): `"passed"`, `"failed"` or `"not checked"`.
        detail (`str`): Why, in a sentence.
    """

    name: str
    status: str
    detail: str


def verify_record(
    path: str | os.PathLike,
    public_key: "str | os.PathLike | Ed25519PublicKey | None" = None,
    model: str | None = None,
    rows: str | os.PathLike | Iterable[Mapping] | None = None,
    salt: str | os.PathLike | bytes | None = None,
    parent: str | os.PathLike | None = None,
) -> list[Check]:
    """
    Checks a record against what is at hand. Without a public key it can only be consistent: anyone could have written
    it.

    Args:
        path (`str` or `os.PathLike`): The record.
        public_key (`str`, `os.PathLike` or `Ed25519PublicKey`, *optional*): Whose signature it must have.
        model (`str`, *optional*): Folder or hub id of the model after unlearning.
        rows (`str`, `os.PathLike` or `Iterable[Mapping]`, *optional*):
            Rows that must be among those to forget: a file, folder or hub id, or the rows themselves.
        salt (`str`, `os.PathLike` or `bytes`, *optional*):
            The salt of the record, its file, or a file of [`write_row_keys`] for these rows. Needed with `rows`.
        parent (`str` or `os.PathLike`, *optional*): Record of the model before, if it was unlearned too.

    Returns:
        `list[Check]`: A record passes if none has failed.

    Raises:
        ValueError: If `path` is no record, `rows` comes without `salt` or the other way round, or a file is unusable.
        ImportError: If `cryptography` is needed and not installed.
    """
    if (rows is None) != (salt is None):
        raise ValueError("`rows` and `salt` (--rows, --salt) go together: give both, or neither.")
    record = read_record(path)
    checks = [_check_signature(record, public_key)]
    if problem := _problem(record.statement):
        return [Check("format", FAILED, problem), *checks]
    checks = [Check("format", PASSED, "an in-toto statement about an unlearning run"), *checks]
    checks += _check_model(record, model)
    checks.append(_check_rows(record, rows, salt))
    checks.append(_check_parent(record, parent))
    return checks


def write_row_keys(path: str | os.PathLike, salt: str | os.PathLike | bytes, rows) -> Path:
    """
    Writes the keys of some rows. Who gets them can check these rows against the record, and cannot try out others, as
    the salt would let them.

    Args:
        path (`str` or `os.PathLike`): The file to write, which only its owner may read.
        salt (`str`, `os.PathLike` or `bytes`): The salt, or its file.
        rows (`str`, `os.PathLike` or `Iterable[Mapping]`): As in [`verify_record`].

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If `salt` is a file of keys itself.
    """
    secret = salt if isinstance(salt, bytes) else read_secret(salt)
    if isinstance(secret, list):
        raise ValueError(f"`salt`={str(salt)!r} holds keys of rows already: the salt of the record is needed.")
    keys = [row_key(secret, row).hex() for row in _loaded(rows)]
    write_private(Path(path), json.dumps({"format": KEYS_FORMAT, "row_keys": keys}, indent=1) + "\n")
    return Path(path)


def _problem(statement: dict) -> str | None:
    """What is wrong with a statement's form."""
    for key, wanted in (("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE)):
        if statement.get(key) != wanted:
            return f"`{key}` must be {wanted!r}, but it is {statement.get(key)!r}"
    subject, predicate = statement.get("subject"), statement.get("predicate")
    if not isinstance(subject, list) or not subject or not isinstance(predicate, dict):
        return "`subject` must be a list and `predicate` an object"
    for entry in subject:
        digest = entry.get("digest") if isinstance(entry, dict) else None
        if (
            not isinstance(digest, dict)
            or not isinstance(entry.get("name"), str)
            or not set(digest) & {"sha256", WEIGHTS}
        ):
            return f"a subject needs a name and a digest, but one is {entry!r}"
        if not all(isinstance(value, str) and _HEX.fullmatch(value) for value in digest.values()):
            return f"the digest of {entry['name']!r} is no SHA-256 in lowercase hexadecimal digits"
    for key, kind in _PREDICATE.items():
        if key not in predicate or not isinstance(predicate[key], kind):
            return f"`predicate.{key}` is missing or of another type"
    for half in ("forget", "retain"):
        hashes = predicate["rows"].get(half)
        if not isinstance(hashes, list) or not all(isinstance(each, str) and _HEX.fullmatch(each) for each in hashes):
            return f"`predicate.rows.{half}` must be a list of hashes"
    return _problem_of_times(predicate["times"])


def _problem_of_times(times: dict) -> str | None:
    try:
        started, ended = (datetime.fromisoformat(times[key].replace("Z", "+00:00")) for key in ("started", "ended"))
        return None if started <= ended else "`predicate.times` ends before it starts"
    except (KeyError, ValueError, TypeError, AttributeError):
        return "`predicate.times` needs `started` and `ended`, times in UTC"


def _check_signature(record: Record, public_key) -> Check:
    name = "signature"
    if record.envelope is None:
        detail = "the record is not signed: anyone could have written or changed it"
        return Check(name, NOT_CHECKED if public_key is None else FAILED, detail)
    if public_key is None:
        return Check(name, NOT_CHECKED, "the record is signed, but no public key was given")
    key = load_public_key(public_key) if isinstance(public_key, (str, os.PathLike)) else public_key
    if is_signed_by(record.envelope, key):
        return Check(name, PASSED, f"by the key {key_id(key)[:16]}")
    return Check(name, FAILED, f"no signature is by the key {key_id(key)[:16]}, or the record was changed since")


def _check_model(record: Record, model: str | None) -> list[Check]:
    recorded = {
        "files": (record.files(), MODEL_FILES),
        "tokenizer": (record.statement["predicate"]["tokenizer"].get("files", {}), TOKENIZER_FILES),
    }
    if model is None:
        return [Check(name, NOT_CHECKED, "no model was given") for name in (*recorded, "weights")]
    folder = folder_of(model)
    if folder is None:
        raise ValueError(f"`model`={model!r} is no folder, and no model in the cache of the hub: download it first.")
    checks = [
        _compared(name, hashes, file_hashes(folder, patterns), folder) for name, (hashes, patterns) in recorded.items()
    ]
    if record.weights() is None:
        detail = "the run was sharded, and the record knows its files alone"
        return [*checks, Check("weights", NOT_CHECKED, detail)]
    # A hash of the weights themselves: the same whichever files they lie in.
    from soul_trainer.loading import load_model
    from soul_trainer.weights import weights_digest

    try:
        found = weights_digest(load_model(str(folder), "auto", "cpu"))
    except Exception as error:  # of files that were changed, a library may raise anything
        detail = f"the model cannot be loaded ({type(error).__name__}: {error})"
        return [*checks, Check("weights", NOT_CHECKED, detail)]
    if found == record.weights():
        return [*checks, Check("weights", PASSED, "the weights are those of the record")]
    return [*checks, Check("weights", FAILED, f"the weights have the hash {found}, not {record.weights()}")]


def _compared(name: str, recorded: dict[str, str], found: dict[str, str], folder: Path) -> Check:
    differing = sorted(each for each in recorded.keys() | found.keys() if recorded.get(each) != found.get(each))
    if not differing:
        return Check(name, PASSED, f"{len(found)} files are those of the record")
    reasons = []
    for each in differing:
        if each not in found:
            reasons.append(f"{each} is missing")
        else:
            reasons.append(f"{each} was changed" if each in recorded else f"{each} is not in the record")
    return Check(name, FAILED, f"in {folder}: {', '.join(reasons)}")


def _check_rows(record: Record, rows, salt) -> Check:
    name, recorded = "rows", record.statement["predicate"]["rows"]
    counts = f"{len(recorded['forget'])} rows to forget and {len(recorded['retain'])} to retain are in the record"
    if rows is None:
        return Check(name, NOT_CHECKED, f"no rows were given; {counts}")
    rows = _loaded(rows)
    secret = salt if isinstance(salt, bytes) else read_secret(salt)
    keys = secret if isinstance(secret, list) else [row_key(secret, row) for row in rows]
    if len(keys) != len(rows):
        return Check(name, FAILED, f"there are {len(rows)} rows, and keys for {len(keys)}")
    forget, retain = set(recorded["forget"]), set(recorded["retain"])
    hashes = [row_hash(key, row) for key, row in zip(keys, rows)]
    missing = [place for place, each in enumerate(hashes) if each not in forget]
    if not missing:
        return Check(name, PASSED, f"all {len(rows)} rows given are among the rows to forget; {counts}")
    kept = sum(hashes[place] in retain for place in missing)
    detail = f"{len(missing)} of {len(rows)} rows given are not among the rows to forget, first row {missing[0]}"
    return Check(name, FAILED, detail + (f"; {kept} of them are among the rows to retain" if kept else ""))


def _check_parent(record: Record, parent) -> Check:
    name, named = "parent", record.statement["predicate"]["parent"]
    if parent is None:
        detail = (
            "the model before had no record of its own"
            if named is None
            else "the record of the model before was not given"
        )
        return Check(name, NOT_CHECKED, detail)
    if named is None:
        return Check(name, FAILED, "this record names no parent")
    other = read_record(parent)
    if other.digest != named.get("digest", {}).get("sha256"):
        return Check(name, FAILED, f"{parent} is another record than the one that this one names")
    if other.files() != record.statement["predicate"]["before"].get("files"):
        return Check(name, FAILED, f"the model that {parent} is of is not the one that this run started from")
    return Check(name, PASSED, f"this run started from the model of {Path(parent).name}")


def _loaded(rows) -> list[Mapping]:
    if not isinstance(rows, (str, os.PathLike)):
        return list(rows)
    from ..suites.own import load

    return load(str(rows), name="rows").to_list()
