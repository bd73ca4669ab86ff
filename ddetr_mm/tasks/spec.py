"""``ddetr-mm spec SUBTASK``: the complete default spec, commented."""

from __future__ import annotations

from argparse import Namespace

from ddetr_mm.spec import default_spec_text


def run(arguments: Namespace) -> None:
    """Print the spec to standard output."""
    print(default_spec_text(arguments.subtask), end="")
