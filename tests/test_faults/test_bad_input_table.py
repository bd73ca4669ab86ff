"""The table of bad input names tests that exist, and covers enough."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "bad-input.md"
COMMANDS = ("convert", "train", "evaluate", "inference", "export", "gen_trt_engine", "translate", "check")
OTHER_COMMANDS = ("weights", "spec", "install-ops")


def rows() -> list[list[str]]:
    """The cells of every row."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if row[0] not in ("input", "---")]


@cache
def source(path: str) -> tuple[str, set[str]]:
    """The text of a test file and the names of its test functions."""
    text = (ROOT / path).read_text(encoding="utf-8")
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    return text, {node.name for node in functions}


def test_there_are_enough_kinds():
    kinds = {(row[0], row[1]) for row in rows()}
    assert len(kinds) >= 80
    named = " ".join(row[1] for row in rows())
    missing = [name for name in (*COMMANDS, *OTHER_COMMANDS) if name not in named]
    assert not missing


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[-1].strip("`").rpartition("::")[2])
def test_every_row_has_its_test(row: list[str]):
    assert len(row) == 5 and all(row[index] for index in (0, 2, 3, 4))
    path, _, name = row[-1].strip("`").partition("::")
    function, _, case = name.rstrip("]").partition("[")
    text, functions = source(path)
    assert function in functions, f"{path} has no {function}"
    if case:
        assert _is_case(text, case), f"{path} has no case {case}"


def _is_case(text: str, case: str) -> bool:
    """Whether the words of a case's name stand in the file, as a whole or as those of two parameters."""
    parts = [case, *case.split("-", 1)] if f'"{case}"' not in text else [case]
    wanted = parts[1:] if len(parts) > 1 else parts
    return all(re.search(rf'"{re.escape(part)}"', text) for part in wanted)


def test_statuses_are_those_of_the_contract():
    assert {row[3] for row in rows()} <= {"0", "1", "2", "killed"}
