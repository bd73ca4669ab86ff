"""Why a file cannot be read, in words: the messages of :mod:`ddetr_mm.weights.safe_read`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ddetr_mm.errors import Problem

ENCRYPTED = (
    "is encrypted by the reference's own, closed scheme and cannot be read here",
    "decrypt it with the tool that wrote it, or save it there without encryption_key",
)
"""What is wrong with a file the reference encrypted, and the mend."""

MALICIOUS_MEND = (
    "loading never runs code from a file: save the state_dict alone (torch.save(model.state_dict(), path))"
    " where you trust it, or do not use this file"
)

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a bitmap image"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "gzip-compressed data"),
    (b"BZh", "bzip2-compressed data"),
    (b"\xfd7zXZ", "xz-compressed data"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x7fELF", "a program"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"version https://git-lfs", "a Git LFS pointer: the file itself has not been fetched"),
    (b"<!DOCTYPE", "a web page, perhaps an error page saved by a download"),
    (b"<html", "a web page, perhaps an error page saved by a download"),
)


def explain_strange_bytes(path: Path, start: bytes) -> Problem:
    """The problem with a file that begins like no weights file.

    Args:
        path: the file.
        start: its first bytes, up to 512.
    """
    if path.suffix.lower() in (".tlt", ".etlt"):
        return Problem(ENCRYPTED[0], file=path, mend=ENCRYPTED[1])
    for signature, kind in _SIGNATURES:
        if start.startswith(signature):
            return _not_weights(path, kind)
    if start[257:262] == b"ustar":
        return Problem(
            "is a tar archive (or PyTorch's oldest file format, which cannot be read safely)",
            file=path,
            mend="give the weights file itself; a file of that age must be saved again with a newer torch",
        )
    if path.suffix.lower() == ".onnx":
        return _not_weights(path, "an ONNX model")
    if _is_text(start):
        return _not_weights(path, "a JSON file" if start.lstrip()[:1] in (b"{", b"[") else "a text file")
    return Problem(
        "is neither a PyTorch nor a safetensors file; it may be damaged, or encrypted by the reference's"
        " own, closed scheme, which cannot be read here",
        file=path,
        mend="check where it comes from; what the reference has encrypted must be saved there without"
        " encryption_key",
    )


def _not_weights(path: Path, kind: str) -> Problem:
    return Problem(
        f"is {kind}, not a file of weights",
        file=path,
        allowed=".pth, .pt, .bin, .safetensors or a Hugging Face folder",
        mend="check the path",
    )


def _is_text(start: bytes) -> bool:
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        # The last character may be cut in two by the end of the sample.
        if error.start < len(start) - 4:
            return False
        text = start[: error.start].decode("utf-8")
    return bool(text) and all(character.isprintable() or character.isspace() for character in text)


def short_names(names: Sequence[str], shown: int = 4) -> str:
    """The first names of a list, and how many more there are."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
