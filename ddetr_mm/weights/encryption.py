"""Checkpoints encrypted with the user's key, by the ``cryptography`` library.

A file begins with a header, followed by segments::

    magic (8 bytes) · salt (16) · nonce prefix (7) · length of the content (8, big-endian) · key check (16)
    segment: AES-256-GCM of 16 MiB of content, 16 bytes longer than those; the last one may be shorter

The AES key is derived from the user's key by scrypt with the salt; the magic decides how costly that is. A
segment's nonce is the prefix, the segment's number and whether it is the last; the header without the key
check is authenticated with each. So segments cannot be changed, exchanged or omitted. The key check is the
authentication tag of empty content: it distinguishes a wrong key from a damaged file.

The key is never written. Decrypted content is not written to disk where the system has files in memory
(Linux).
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ddetr_mm.errors import Problem, StackError, WeightsError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MAGIC = b"DDMMENC2"
_COSTS = {MAGIC: 2**17, b"DDMMENC1": 2**15}
"""Beginning of a file → cost of scrypt (its ``n``, with r = 8 and p = 1). The newest one is written."""
SEGMENT_BYTES = 16 * 2**20
_TAG_BYTES = 16
_HEAD = struct.Struct(">8s16s7sQ")
_HEADER_BYTES = _HEAD.size + _TAG_BYTES
_KEY_CHECK = 0xFFFFFFFF  # a segment number that no file reaches

_key: str | None = None


def use_encryption_key(key: str | None) -> None:
    """Set the key for every checkpoint that this process reads or writes.

    Args:
        key: any text; None or empty for none.
    """
    global _key
    _key = key or None


def encryption_key() -> str | None:
    """Return the key set by :func:`use_encryption_key`."""
    return _key


def is_encrypted(path: str | Path) -> bool:
    """Return whether a file begins as :func:`encrypt_file` writes it."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(MAGIC)) in _COSTS
    except OSError:
        return False


def is_whole_encrypted(path: str | Path) -> bool:
    """Return whether an encrypted file has the length given in its header; needs no key."""
    with Path(path).open("rb") as file:
        head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return False
    length = _HEAD.unpack(head)[3]
    return Path(path).stat().st_size == _HEADER_BYTES + length + _num_segments(length) * _TAG_BYTES


def encrypt_file(source: BinaryIO, destination: str | Path, key: str) -> None:
    """Encrypt a whole file.

    Args:
        source: a seekable file.
        destination: file to write.
        key: the user's key.

    Raises:
        OSError: the destination cannot be written.
    """
    length = source.seek(0, os.SEEK_END)
    source.seek(0)
    head = _HEAD.pack(MAGIC, os.urandom(16), os.urandom(7), length)
    cipher = _cipher(key, head)
    with Path(destination).open("wb") as file:
        file.write(head + cipher.encrypt(_nonce(head, _KEY_CHECK, False), b"", head))
        count = _num_segments(length)
        for number in range(count):
            nonce = _nonce(head, number, number == count - 1)
            file.write(cipher.encrypt(nonce, source.read(SEGMENT_BYTES), head))


def require_key(path: str | Path, key: str | None) -> None:
    """Check the key of a file without decrypting it; files that are not encrypted need none.

    Raises:
        WeightsError: the key is missing or wrong, or the file is damaged.
        StackError: the library is not installed.
    """
    if not is_encrypted(path):
        return
    if not key:
        raise WeightsError(Problem("is encrypted", file=path, hint="give its key: encryption_key=…"))
    _opened_cipher(path, key)


def _opened_cipher(path: str | Path, key: str) -> tuple[AESGCM, bytes]:
    """The cipher of a file and the header that it authenticates.

    Raises:
        WeightsError: the key is wrong, or the file is damaged.
    """
    with Path(path).open("rb") as file:
        head, check = file.read(_HEAD.size), file.read(_TAG_BYTES)
    if not is_whole_encrypted(path):
        raise _damaged(path)
    cipher = _cipher(key, head)
    from cryptography.exceptions import InvalidTag

    try:
        cipher.decrypt(_nonce(head, _KEY_CHECK, False), check, head)
    except InvalidTag:
        raise WeightsError(
            Problem(
                "cannot be decrypted with this key",
                file=path,
                where="encryption_key",
                hint="give the key that it was encrypted with",
            )
        ) from None
    return cipher, head


def decrypt_file(source: str | Path, destination: BinaryIO, key: str | None) -> None:
    """Decrypt a file that :func:`encrypt_file` wrote.

    Args:
        source: the encrypted file.
        destination: receives the content, each segment after its authentication.
        key: the user's key.

    Raises:
        WeightsError: the key is missing or wrong, or the file is damaged.
        StackError: the library is not installed.
    """
    if not key:
        raise WeightsError(Problem("is encrypted", file=source, hint="give its key: encryption_key=…"))
    cipher, head = _opened_cipher(source, key)
    from cryptography.exceptions import InvalidTag

    with Path(source).open("rb") as file:
        file.seek(_HEADER_BYTES)
        count = _num_segments(_HEAD.unpack(head)[3])
        for number in range(count):
            nonce = _nonce(head, number, number == count - 1)
            try:
                destination.write(cipher.decrypt(nonce, file.read(SEGMENT_BYTES + _TAG_BYTES), head))
            except InvalidTag:
                raise _damaged(source) from None


@contextmanager
def plain_file(path: str | Path, key: str | None = None) -> Iterator[Path]:
    """Yield a path from which a file, encrypted or not, can be read inside the block.

    Args:
        path: the file; if it is not encrypted, it is yielded itself.
        key: the key; by default the process's.

    Raises:
        WeightsError: see :func:`decrypt_file`.
    """
    if not is_encrypted(path):
        yield Path(path)
        return
    with hidden_file() as (hidden, name):
        decrypt_file(path, hidden, key or encryption_key())
        hidden.flush()
        yield name


@contextmanager
def hidden_file() -> Iterator[tuple[BinaryIO, Path]]:
    """Yield an open file in memory, and its path in this process.

    On systems without such files it is a temporary file that only the user can read.
    """
    if hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir():
        with os.fdopen(os.memfd_create("checkpoint", os.MFD_CLOEXEC), "w+b") as file:
            yield file, Path(f"/proc/self/fd/{file.fileno()}")
        return
    with tempfile.NamedTemporaryFile(prefix="ddetr_mm-") as named:
        yield named.file, Path(named.name)  # type: ignore[misc]


def _cipher(key: str, head: bytes) -> AESGCM:
    # Imported here: runs without a key do not need it.
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
    except ImportError as error:
        hint = "run: pip install 'cryptography>=42'"
        raise StackError(Problem("encryption needs the package cryptography", hint=hint)) from error
    magic, salt = _HEAD.unpack(head)[:2]
    derived = Scrypt(salt=salt, length=32, n=_COSTS[magic], r=8, p=1).derive(
        key.encode("utf-8", "surrogatepass")
    )
    return AESGCM(derived)


def _nonce(head: bytes, number: int, last: bool) -> bytes:
    prefix: bytes = _HEAD.unpack(head)[2]
    return prefix + struct.pack(">IB", number, last)


def _num_segments(length: int) -> int:
    return max(1, -(-length // SEGMENT_BYTES))


def _damaged(path: str | Path) -> WeightsError:
    return WeightsError(
        Problem("is encrypted, and truncated or changed since", file=path, hint="copy it again")
    )
