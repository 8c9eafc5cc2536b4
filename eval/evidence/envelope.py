"""Ed25519 keys, and the envelopes that are signed with them: DSSE 1.0, as in-toto uses it."""

import base64
import binascii
import hashlib
import logging
import os
import stat
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..extras import require
from ..rows import write_whole
from .hashing import write_private


if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

logger = logging.getLogger(__name__)

PAYLOAD_TYPE = "application/vnd.in-toto+json"


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed (PAE of DSSE): both lengths are among them, so that no byte can change its part."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(payload: bytes, key: "Ed25519PrivateKey") -> dict:
    """
    Args:
        payload (`bytes`): The statement.
        key (`Ed25519PrivateKey`): Of [`load_signing_key`].

    Returns:
        `dict`: The envelope.
    """
    signature = key.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }


def open_envelope(envelope: dict) -> bytes:
    """
    The payload of an envelope, whose signatures are not checked here.

    Raises:
        ValueError: If it is no envelope of an in-toto statement.
    """
    if envelope.get("payloadType") != PAYLOAD_TYPE:
        raise ValueError(f"`payloadType` must be {PAYLOAD_TYPE!r}, but it is {envelope.get('payloadType')!r}.")
    return _decoded(envelope.get("payload"), "payload")


def is_signed_by(envelope: dict, key: "Ed25519PublicKey") -> bool:
    """Whether one of the signatures is a key's. What an envelope says of keys (`keyid`) does not count."""
    from cryptography.exceptions import InvalidSignature

    signed = pre_authentication_encoding(PAYLOAD_TYPE, open_envelope(envelope))
    signatures = envelope.get("signatures")
    for entry in signatures if isinstance(signatures, list) else ():
        try:
            key.verify(_decoded(entry.get("sig") if isinstance(entry, dict) else None, "sig"), signed)
            return True
        except (InvalidSignature, ValueError):
            continue
    return False


def load_signing_key(path: str | os.PathLike) -> "Ed25519PrivateKey":
    """
    Reads a private Ed25519 key, a PEM file without a password, as `openssl genpkey -algorithm ed25519` writes it.

    Raises:
        ValueError: If there is no such file, or it holds something else.
        ImportError: If `cryptography` is not installed.
    """
    serialization, ed25519 = _library()
    try:
        key = serialization.load_pem_private_key(_read(path, "signing_key"), password=None)
    except TypeError:
        raise ValueError(
            f"`signing_key`={str(path)!r} has a password: write a copy without one, by `openssl pkey -in {path} -out "
            "FILE`, and keep it private."
        ) from None
    except ValueError as error:
        raise ValueError(f"`signing_key`={str(path)!r} is no private key in PEM: {error}.") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ValueError(
            f"`signing_key`={str(path)!r} is no Ed25519 key: make one by `openssl genpkey -algorithm ed25519`."
        )
    _warn_of_readers(str(path))
    return key


def load_public_key(path: str | os.PathLike) -> "Ed25519PublicKey":
    """
    Reads a public Ed25519 key, a PEM file, as `openssl pkey -pubout` writes it.

    Raises:
        ValueError: If there is no such file, or it holds something else.
        ImportError: If `cryptography` is not installed.
    """
    serialization, ed25519 = _library()
    try:
        key = serialization.load_pem_public_key(_read(path, "public_key"))
    except ValueError as error:
        raise ValueError(f"`public_key`={str(path)!r} is no public key in PEM: {error}.") from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise ValueError(f"`public_key`={str(path)!r} is no Ed25519 key.")
    return key


def new_key(path: str | os.PathLike) -> Path:
    """
    Makes an Ed25519 key pair.

    Args:
        path (`str` or `os.PathLike`): File of the private key, which only its owner may read.

    Returns:
        `Path`: File of the public key, `<path>.pub`.

    Raises:
        ValueError: If one of the files exists.
        ImportError: If `cryptography` is not installed.
    """
    serialization, ed25519 = _library()
    private, public = Path(path), Path(f"{path}.pub")
    for file in (private, public):
        if file.exists():
            raise ValueError(f"{file} exists: name another file, a key is not overwritten.")
    key, encoding = ed25519.Ed25519PrivateKey.generate(), serialization.Encoding.PEM
    secret = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_private(private, secret.decode())
    content = key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
    write_whole(public, content, mode=0o644)
    return public


def key_id(key: "Ed25519PublicKey") -> str:
    """SHA-256 of a public key (its SubjectPublicKeyInfo in DER), by which people can tell keys apart."""
    serialization, _ = _library()
    return hashlib.sha256(
        key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    ).hexdigest()


@lru_cache
def _warn_of_readers(path: str) -> None:
    if os.name == "posix" and os.stat(path).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning(f"Others may read the private key {path}: `chmod 600 {path}`.")


def _library() -> tuple:
    primitives = "cryptography.hazmat.primitives"
    return require(f"{primitives}.serialization", "sign"), require(f"{primitives}.asymmetric.ed25519", "sign")


def _read(path: str | os.PathLike, argument: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"`{argument}`={str(path)!r} cannot be read: {error.strerror}.") from None


def _decoded(text: object, field: str) -> bytes:
    if not isinstance(text, str):
        raise ValueError(f"`{field}` must be base64, but it is {text!r}.")
    try:
        # Both alphabets of base64 are allowed.
        return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except binascii.Error as error:
        raise ValueError(f"`{field}` is no base64: {error}.") from None
