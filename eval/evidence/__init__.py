"""
A record of what an unlearning run did, for whoever asks later: an in-toto statement, signed if there is a key.

| file | holds |
|---|---|
| `hashing.py` | hashes of rows and of files; the salt that keeps those of rows from being guessed |
| `envelope.py` | Ed25519 keys, and DSSE envelopes signed with them |
| `record.py` | what the record says; writing, reading and completing it |
| `verification.py` | what can be checked, and what was |
| `callback.py` | the record of a run that a recipe makes |
| `command.py` | the command lines |

Only `callback.py` imports torch, and what checks the weights of a model.
"""

from .envelope import new_key
from .record import Evidence, complete_record, read_record, record_file_of, write_record
from .verification import Check, verify_record, write_row_keys


__all__ = [
    "Check",
    "Evidence",
    "complete_record",
    "new_key",
    "read_record",
    "record_file_of",
    "verify_record",
    "write_record",
    "write_row_keys",
]
