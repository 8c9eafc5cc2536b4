"""
Checks the record of an unlearning run.

    python -m soul_eval verify out/soul.record.json --model out/soul --public_key key.pem.pub
    python -m soul_eval verify out/soul.record.json --rows mine.jsonl --salt out/soul.record.salt
    python -m soul_eval verify --new_key key.pem

The last command makes a key pair, as these do:

    openssl genpkey -algorithm ed25519 -out key.pem && chmod 600 key.pem
    openssl pkey -in key.pem -pubout -out key.pem.pub
"""

import json
from pathlib import Path

from ..console import Parser
from ..rows import read_rows
from ..schema import AttacksFile, check_fields
from .envelope import load_signing_key, new_key
from .record import complete_record, read_record
from .verification import FAILED, verify_record, write_row_keys


def main(arguments: list[str] | None = None) -> int:
    """
    Checks a record and prints each check, or makes a key pair.

    Args:
        arguments (`list[str]`, *optional*): Of the command line.

    Returns:
        `int`: 1 if a check failed, else 0.

    Raises:
        ValueError: If the file is no record, or a flag is unusable.
    """
    parser = Parser(description=__doc__.strip())
    parser.add_argument("record", nargs="?", help="the record, RUN.record.json beside the folder of the run")
    parser.add_argument("--public_key", metavar="FILE", help="PEM file: the key that must have signed it")
    parser.add_argument("--model", metavar="DIR", help="model after unlearning: folder or hub id")
    parser.add_argument("--rows", metavar="FILE", help="rows that must be among those to forget, in any format")
    parser.add_argument("--salt", metavar="FILE", help="with --rows: RUN.record.salt, or keys of these rows")
    parser.add_argument("--row_keys", metavar="FILE", help="with --rows: write the keys of these rows alone")
    parser.add_argument("--parent", metavar="RECORD", help="record of the model before, if it has one")
    parser.add_argument("--new_key", metavar="FILE", help="make a key pair, FILE and FILE.pub, and check nothing")
    args = parser.parse_args(arguments)
    if args.new_key:
        print(f"{args.new_key} is the private key, for --signing_key; {new_key(args.new_key)} is for everyone.")
        return 0
    if not args.record:
        parser.error("name the record: RUN.record.json beside the folder of the run")
    if args.row_keys and not args.rows:
        parser.error("--row_keys needs --rows and --salt")
    checks = verify_record(args.record, args.public_key, args.model, args.rows, args.salt, args.parent)
    for check in checks:
        print(f"{check.status:<12} {check.name}: {check.detail}")
    if any(check.status == FAILED for check in checks):
        return 1
    if args.row_keys:
        print(f"{write_row_keys(args.row_keys, args.salt, args.rows)} has the keys of these rows, in their order.")
    return 0


def complete(arguments: list[str] | None = None) -> None:
    """
    Adds the figures of attacks to a record, or signs one.

    Args:
        arguments (`list[str]`, *optional*): Of the command line.

    Raises:
        ValueError: If the file is no record, or a signed record would lose its signature.
    """
    parser = Parser(description="Adds the figures of attacks to the record of an unlearning run, or signs it.")
    parser.add_argument("record", help="the record, RUN.record.json")
    parser.add_argument("--attacks", metavar="FILE", help="attacks.json, as `python -m soul_eval attack` writes it")
    parser.add_argument("--signing_key", metavar="FILE", help="private Ed25519 key in PEM, without a password")
    args = parser.parse_args(arguments)
    if not args.attacks and not args.signing_key:
        parser.error("give --attacks, --signing_key or both")
    key = load_signing_key(args.signing_key) if args.signing_key else None
    attacks = read_attacks(args.attacks, args.record) if args.attacks else None
    has_changed = complete_record(args.record, attacks, key)
    print(f"{args.record} {'was completed' if has_changed else 'said all this already'}.")


def read_attacks(path: str, record: str) -> dict:
    """
    What attacks brought back, by attack, model and figure, of `attacks.json`.

    Args:
        path (`str`): The file.
        record (`str`): Of the model that must be the one that was attacked, as far as the rows beside the file tell.

    Raises:
        ValueError: If it is no such file, or of another model.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        check_fields(AttacksFile, found)
    except (ValueError, OSError) as error:
        raise ValueError(f"`attacks`={path!r} is no attacks.json: {error}") from None
    rows, known = Path(path).parent / "plain" / "rows.jsonl", read_record(record)
    # An adapter is merged before it is attacked, and has other weights then.
    if rows.exists() and "adapter_config.json" not in known.files():
        attacked = read_rows(rows)[0].get("weights")
        if None not in (attacked, known.weights()) and attacked != known.weights():
            raise ValueError(f"`attacks`={path!r} is of another model than {record}: their weights differ.")
    return found["attacks"]
