"""docs/fields.md: every field of a spec has a row, and every row a test that is there."""

from __future__ import annotations

import ast
import csv
import importlib.util
import sys
import types
from functools import cache
from pathlib import Path

import pytest
from golden_files import GOLDEN

from ddetr_mm.spec import iter_fields
from ddetr_mm.spec.notes import NO_EFFECT

ROOT = Path(__file__).resolve().parents[1]


@cache
def table() -> types.ModuleType:
    """tools/fields_table.py as a module."""
    found = importlib.util.spec_from_file_location("fields_table", ROOT / "tools" / "fields_table.py")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    return module


@cache
def names_in(file: str) -> frozenset[str]:
    """Names of the test functions of a file, with ``Class::`` in front of methods."""
    path = ROOT / file
    if not path.is_file():
        return frozenset()
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
    return frozenset(name for name in names if name.rpartition("::")[2].startswith("test_"))


# Fields that act and whose effect no test shows yet; a row that names tests must not be here.
NOT_SHOWN_YET: set[str] = set()
FIELDS = [info.path for info in iter_fields()]


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_has_a_row(path: str):
    effect = table().known_effects().get(path)
    if table().reason_without_effect(path) is not None:
        assert effect is None, "a field without effect has its reason in spec/notes.py alone"
        return
    assert effect is not None, "say in docs/fields.csv what the field becomes and which test shows it"
    assert effect.becomes and bool(effect.tests) is (path not in NOT_SHOWN_YET)


def test_every_row_is_a_field():
    assert set(table().known_effects()) <= set(FIELDS)
    assert all(table().reason_without_effect(path) for path in NO_EFFECT)


@pytest.mark.parametrize("path", sorted(table().known_effects()))
def test_named_tests_exist(path: str):
    for test in table().known_effects()[path].tests:
        file, _, name = test.partition("::")
        assert name in names_in(file), test


def test_tests_that_are_not_there_are_noticed():
    assert "test_named_tests_exist" in names_in("tests/test_fields_table.py")
    assert "test_nothing" not in names_in("tests/test_fields_table.py")
    assert names_in("tests/test_no_such_file.py") == frozenset()


def test_the_document_is_up_to_date():
    written = table().TARGET.read_text(encoding="utf-8")
    assert written == table().document(), "run `python tools/fields_table.py`"


def test_the_document_reports_every_field_and_every_reason():
    text = table().document()
    assert all(f"| `{path}` |" in text for path in FIELDS)
    assert all(f"no effect: {reason}" in text for reason in NO_EFFECT.values())


def test_every_field_of_tao_is_in_the_document():
    text = table().document()
    with (GOLDEN / "spec_fields.csv").open(newline="", encoding="utf-8") as stream:
        paths = [row["path"] for row in csv.DictReader(stream)]
    assert len(paths) > 200
    assert [path for path in paths if f"| `{path}` |" not in text] == []
