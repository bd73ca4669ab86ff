"""Writing files so that a name never stands for half a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; rename it onto ``path`` when the block succeeds.

    The folder is made if missing. When the block raises, the temporary file is removed and whatever
    stood under ``path`` before stays.

    Args:
        path: the final name.

    Yields:
        The path to write to, in the same folder and with the same suffix (some writers choose their
        format by it).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:  # a full disk, say: writing knows no names
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text_whole(path: str | Path, text: str) -> Path:
    """Write UTF-8 text to ``path`` by :func:`written_whole`; returns the path."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)
