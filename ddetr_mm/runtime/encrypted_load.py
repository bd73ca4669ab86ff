"""mmengine reads encrypted checkpoints: whatever loads a local file through it gets the content."""

from __future__ import annotations

from typing import Any

from mmengine.runner.checkpoint import CheckpointLoader, load_from_local

from ddetr_mm.weights.encryption import plain_file


def load_from_local_or_encrypted(filename: str, map_location: Any = None) -> Any:
    """mmengine's ``load_from_local`` for files that may be encrypted.

    Raises:
        WeightsError: see :func:`ddetr_mm.weights.encryption.decrypt_file`.
        FileNotFoundError: there is no such file.
    """
    with plain_file(filename) as plain:
        return load_from_local(str(plain), map_location)


def register_encrypted_loading() -> None:
    """Put :func:`load_from_local_or_encrypted` in the place of mmengine's loader of local files."""
    CheckpointLoader.register_scheme(prefixes="", loader=load_from_local_or_encrypted, force=True)
