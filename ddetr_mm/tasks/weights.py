"""``ddetr-mm weights SRC DST --to FORMAT``: read any of the four formats, write any other."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from ddetr_mm.files import write_text_whole
from ddetr_mm.spec import load_spec
from ddetr_mm.tasks.session import encryption_key_of
from ddetr_mm.weights import convert_checkpoint


def run(arguments: Namespace) -> None:
    """Convert the checkpoint, print a summary, and leave the report of every key beside it.

    The spec's ``encryption_key`` opens an encrypted source; what is written is never encrypted, since other
    tools are to read it.
    """
    spec = load_spec(arguments.experiment_spec).spec if arguments.experiment_spec else None
    with encryption_key_of(spec):
        report = convert_checkpoint(arguments.source, arguments.destination, arguments.to, spec=spec)
    print(report.summary())
    target = Path(arguments.destination)
    account = write_text_whole(
        target.with_name(f"{target.stem}.report.json"), json.dumps(report.to_dict(), indent=1) + "\n"
    )
    print(f"written: {arguments.destination}, every key in {account}")
