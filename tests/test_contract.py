"""What users rely on, as stored text: translated configs, help texts and registered names."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from contract import CONTRACT, check_contract, lines

from ddetr_mm.cli import build_parser, main

SPECS = Path(__file__).resolve().parents[1] / "configs" / "specs"
TRANSLATED = [
    *((path.stem, "train") for path in sorted(SPECS.glob("*.yaml")) if not path.stem.endswith("_convert")),
    *(("shapes_resnet18", subtask) for subtask in ("evaluate", "inference", "export")),
]


@pytest.mark.parametrize(("spec", "subtask"), TRANSLATED)
def test_translated_configs(spec: str, subtask: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # data and results that lie in the checkout must not matter
    checkpoint = [] if subtask == "train" else [f"{subtask}.checkpoint=model.pth"]
    arguments = ["-e", str(SPECS / f"{spec}.yaml"), "-o", "config.py", "--for", subtask]
    assert main(["translate", *arguments, *checkpoint]) == 0
    check_contract(f"translate/{spec}-{subtask}.txt", Path("config.py").read_text(encoding="utf-8"))


def test_every_stored_config_is_compared():
    stored = {path.stem for path in (CONTRACT / "translate").iterdir()}
    assert stored == {f"{spec}-{subtask}" for spec, subtask in TRANSLATED}


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and, in order, those of its subcommands at any depth."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


def test_help_texts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")
    # argparse breaks a long usage line at different places in different versions of Python.
    texts = []
    for parser in parsers(build_parser()):
        usage, _, rest = parser.format_help().partition("\n\n")
        texts.append(f"===== {parser.prog}\n{' '.join(usage.split())}\n\n{rest}")
    check_contract("help.txt", "\n".join(texts))


# Runs in a process of its own: other tests import modules that `ddetr_mm.register` does not.
LIST_NAMES = """
import ddetr_mm.register
import mmdet.registry, mmengine.registry
names = set()
for package in (mmengine.registry, mmdet.registry):
    for attribute, registry in vars(package).items():
        # mmdet imports mmengine's registries under names that begin with MMENGINE.
        if isinstance(registry, mmengine.registry.Registry) and not attribute.startswith("MMENGINE"):
            names |= {
                f"{package.__name__}.{attribute} {name}"
                for name, registered in registry.module_dict.items()
                if registered.__module__.split(".")[0] == "ddetr_mm"
            }
print("\\n".join(sorted(names)))
"""


def test_registered_names():
    done = subprocess.run([sys.executable, "-c", LIST_NAMES], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    check_contract("registered_names.txt", lines(done.stdout.split("\n")[:-1]))
