"""``ddetr-mm install-ops``: full mmcv with its compiled ops into the running environment."""

from __future__ import annotations

from argparse import Namespace

from ddetr_mm.compat.install_ops import install_ops


def run(arguments: Namespace) -> None:
    """Install a cached or freshly built wheel."""
    install_ops(jobs=arguments.jobs)
