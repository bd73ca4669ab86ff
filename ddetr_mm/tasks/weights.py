"""``ddetr-mm weights SRC DST --to FORMAT``: read any of the four formats, write any other."""

from __future__ import annotations

from argparse import Namespace

from ddetr_mm.spec import load_spec
from ddetr_mm.weights import convert_checkpoint


def run(arguments: Namespace) -> None:
    """Convert the checkpoint and print the report of every key."""
    spec = load_spec(arguments.experiment_spec).spec if arguments.experiment_spec else None
    report = convert_checkpoint(arguments.source, arguments.destination, arguments.to, spec=spec)
    print(report.summary())
    print(f"written: {arguments.destination}")
