"""The commands of a project's README, run in order in the tests' own process."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ddetr_mm.cli import main

ROOT = Path(__file__).resolve().parents[2]
SMALL_COMMANDS = ("check", "train", "evaluate", "inference", "export")


def commands_of(project: str) -> list[list[str]]:
    """The lines of the README's shell blocks as words, in order."""
    text = (ROOT / "projects" / project / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for line in "".join(blocks).replace("\\\n", " ").splitlines()]


def prepared(folder: Path) -> Path:
    """A folder in which the relative paths of the README lead to the repository's specs."""
    for name in ("configs", "projects"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def ddetr_mm(folder: Path, *words: str, small: Sequence[str] = ()) -> None:
    """One ``ddetr-mm`` command; ``small`` is set over the spec of commands that build the network."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.chdir(folder)
        assert main([*words, *(small if words[0] in SMALL_COMMANDS else ())]) == 0, words


def follow(project: str, folder: Path, small: Sequence[str]) -> list[str]:
    """Run every ``ddetr-mm`` and ``python -m`` line of a README; returns the subtasks in order."""
    done = []
    for words in commands_of(project):
        if words[0] == "ddetr-mm":
            ddetr_mm(folder, *words[1:], small=small)
            done.append(words[1])
        elif words[:2] == ["python", "-m"]:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.setattr(sys, "argv", words[2:])
                with pytest.raises(SystemExit) as ended:
                    runpy.run_module(words[2], run_name="__main__")
            assert ended.value.code == 0, words
            done.append(words[2])
    return done
