"""Atomic writes, disk space, JSON, output in any encoding, processes, names with fields."""

from __future__ import annotations

import codecs
import gc
import json
import os
import re
import shutil
import signal
import stat
import string
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddetr_mm.outputs import claim, require_free, temporary_beside

# --- Atomic writes ---


@contextmanager
def written_whole(path: str | Path, *, owned: bool = True, locked: bool = True) -> Iterator[Path]:
    """Give a temporary path beside ``path``, and rename it to ``path`` when the block succeeds.

    The folder is made if missing. When the block raises, the temporary file is removed and an earlier file
    under ``path`` stays. The file gets the mode of any new file, by umask, whatever its writer asks for
    (safetensors makes it readable by its owner alone).

    Args:
        path: the final name.
        owned: ask :mod:`ddetr_mm.outputs`; False for files of a cache, whose names are digests.
        locked: False for writers that lock their file themselves, such as HDF5.

    Yields:
        The path to write to, an empty file in the same folder and with the same suffix (some writers choose
        their format by it).

    Raises:
        DataError: ``path`` is an input of the run, or a file that we did not write.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if owned:
        require_free([path])
    with temporary_beside(path, locked=locked) as temporary:
        try:
            mode = stat.S_IMODE(temporary.stat().st_mode)
            yield temporary
            if not temporary.is_symlink():
                os.chmod(temporary, mode)
            if owned:
                claim(path)
            os.replace(temporary, path)
        except OSError as error:
            # write() does not know the name, for example on a full disk; users know the final one.
            if error.filename in (None, str(temporary)):
                error.filename = str(path)
            raise


def write_text_whole(path: str | Path, text: str) -> Path:
    """Write UTF-8 text to ``path`` by :func:`written_whole`; returns the path."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


# --- Secrets ---

SECRETS = frozenset({"encryption_key", "api_key", "password", "token"})
"""Names of fields whose values no report shows."""


# --- Disk space ---


def existing_parent(path: Path) -> Path:
    """The nearest folder above (or at) ``path`` that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def size_text(num_bytes: float) -> str:
    """Bytes for a reader, e.g. ``"1.4 GiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def free_space_text(path: str | Path, wanted: int | None = None) -> str:
    """Return how much is free where a file was to be written, in brackets; empty where it cannot be found.

    Args:
        path: the file.
        wanted: bytes that it takes, where that is known.
    """
    try:
        folder = existing_parent(Path(path).parent)
        free = size_text(shutil.disk_usage(folder).free)
    except (OSError, StopIteration):
        return ""
    return f" ({'' if wanted is None else f'{size_text(wanted)} wanted, '}{free} free in {folder})"


# --- JSON of others ---


def parse_json(text: str | bytes) -> Any:
    """Return the value of JSON text.

    Raises:
        ValueError: it is not JSON, or its values are nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deep") from None


# --- Output streams ---

_ASCII = {
    "✓": "+",
    "✗": "x",
    "…": "...",
    "–": "-",
    "—": "-",
    "·": "-",
    "→": "->",
    "×": "x",
    "²": "2",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
}
_ASCII |= dict.fromkeys("─━═╌╍", "-") | dict.fromkeys("│┃║", "|") | dict.fromkeys("█▉▊▋▌▍▎▏■", "#")
_ASCII |= dict.fromkeys("┌┐└┘├┤┬┴┼┏┓┗┛┡┩╇╈╀╁╂┳┻╋┠┨┯┷┿╭╮╰╯", "+")

ERRORS_NAME = "ddetr_mm.ascii"
"""Name of the handler of characters that a stream's encoding lacks, for ``open`` and ``reconfigure``."""


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """The ASCII form of characters that cannot be encoded: a similar sign, else a backslash and its number.

    Raises:
        UnicodeError: the error itself, where it is not about encoding.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(
        _ASCII.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in text
    ), error.end


codecs.register_error(ERRORS_NAME, _in_ascii)


def allow_any_text() -> None:
    """Have standard output and error print any text in any encoding (ASCII, Latin-1, cp1252, UTF-8).

    What an encoding lacks is printed in ASCII; so are bytes of file names that are not UTF-8. A stream that
    cannot be configured, such as a test's, stays as it is.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ERRORS_NAME)


# --- Processes ---

END_SIGNALS = (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
"""Signals that ask a process to end; Windows has no SIGHUP."""


def python_module(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module in a new Python without the current folder on its path.

    ``python -m`` and ``python -c`` put it first, so that a ``yaml.py`` beside the user's files would be
    imported. ``-P`` exists from Python 3.11 only.
    """
    start = (
        "import sys; sys.path[:] = [path for path in sys.path if path]; import runpy; "
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", start, *arguments]


def usable_cores() -> int:
    """Cores this process may run on: fewer than the machine has where a scheduler or ``taskset`` says so."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # no affinity on macOS and Windows


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause cyclic garbage collection inside the block.

    For code that makes hundreds of thousands of short-lived objects and no cycles, where the collector takes
    a third of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# --- Names with fields ---

_FORMAT = re.compile(r"(0?\d{1,2})?(?P<precision>\.\d{1,2})?(?P<kind>[deEfFgG])?")
_MAX_NAME_BYTES = 200


def fill_name(pattern: str, values: Mapping[str, int | float], *, named: bool = False) -> str:
    """Fill the fields of a file name that a user wrote: ``model_best_{epoch:03d}``.

    A field is one of the given names with a number's format; attributes, items and conversions are refused.

    Args:
        pattern: the name with its fields in braces.
        values: what each field may be, and its value.
        named: write ``epoch=003`` for the field ``epoch``, not ``003``.

    Returns:
        A name without a folder.

    Raises:
        ValueError: the reason, to follow the name of the setting.
    """
    try:
        parsed = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise ValueError(f"cannot be read as a name with fields ({error})") from None
    parts = []
    for text, field, form, conversion in parsed:
        parts.append(text)
        if field is None:
            continue
        if field not in values or conversion:
            raise ValueError(f"has the unknown field {{{field}}}")
        found = _FORMAT.fullmatch(form or "")
        whole = isinstance(values[field], int)
        if found is None or (whole and (found["precision"] or found["kind"] not in (None, "d"))):
            raise ValueError(f"has the unusable format {form!r} for {field}")
        if not whole and found["kind"] == "d":
            raise ValueError(f"has a format of integers, {form!r}, for {field}")
        parts.append((f"{field}=" if named else "") + format(values[field], form or ""))
    name = "".join(parts)
    if not name or name.startswith(".") or re.search(r"[/\\\x00-\x1f\x7f]", name):
        raise ValueError("is no plain file name")
    if len(os.fsencode(name)) > _MAX_NAME_BYTES:
        raise ValueError(f"is longer than {_MAX_NAME_BYTES} bytes")
    return name
