"""Weights at a URL: downloaded to a file first, then read like any file, without running code from it.

The loaders of torch.hub and mmengine unpickle what they download without any protection.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch

from ddetr_mm.errors import Problem, WeightsError

_SCHEMES = ("http", "https")


def local_file(location: str | os.PathLike[str]) -> Path:
    """The path itself, or for a URL that of its copy in torch's cache folder, downloaded once.

    Args:
        location: a path, or an http(s) URL.

    Raises:
        WeightsError: the URL is of another kind, or nothing can be downloaded from it.
    """
    url = os.fspath(location)
    if "://" not in url:
        return Path(url)
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES:
        raise WeightsError(
            Problem(
                f"weights cannot be fetched by {parts.scheme}://",
                file=url,
                allowed="a file, a folder, or an http(s) URL",
                mend="download the file and give its path",
            )
        )
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    mark = hashlib.blake2b(url.encode(), digest_size=4).hexdigest()
    target = folder / f"{mark}-{Path(unquote(parts.path)).name or 'weights'}"
    if not target.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(target), progress=False)
        except OSError as error:  # a URLError is one
            raise WeightsError(
                Problem(f"cannot be downloaded: {error}", file=url, mend="check the address and the network")
            ) from error
    return target
