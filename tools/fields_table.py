#!/usr/bin/env python3
"""Writes ``docs/fields.md`` from the schema and ``docs/fields.csv``.

The schema has the type, default and range of a field, ``ddetr_mm/spec/notes.py`` the fields without effect
and the reasons; the CSV file has what every other field becomes and which tests show it. Run
``python tools/fields_table.py`` after changing any of them.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ddetr_mm.spec.describe import FieldInfo, flow, iter_fields  # noqa: E402 - the checkout
from ddetr_mm.spec.notes import CONDITIONS, NO_EFFECT  # noqa: E402
from ddetr_mm.spec.readers import ALL, USED_IF_GIVEN, readers_of  # noqa: E402
from ddetr_mm.spec.schema import ConvertSpec, ExperimentSpec  # noqa: E402

SOURCE = ROOT / "docs" / "fields.csv"
TARGET = ROOT / "docs" / "fields.md"
REPORTED = "tests/test_spec/test_notes.py::test_field_without_effect_is_reported_when_set"

HEAD = """\
# Every field of a spec

What each field becomes, and the test that shows its effect. A field without effect is reported in one line at
start when it is set to another value than its default. A value is checked by the subtasks that read it alone;
"where given" are those that can do without. Made by `tools/fields_table.py` from the schema and
`docs/fields.csv`; [migrating-from-tao.md](migrating-from-tao.md) lists the differences from TAO.

Names in `code` in the third column are those of the mmengine config that `ddetr-mm translate` writes.
"""


@dataclass(frozen=True)
class Effect:
    """What a field becomes, and the tests that show it (``tests/file.py::name``)."""

    becomes: str
    tests: tuple[str, ...]


def known_effects(path: Path = SOURCE) -> dict[str, Effect]:
    """The rows of the CSV file by field.

    Raises:
        ValueError: a field has two rows.
    """
    found: dict[str, Effect] = {}
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if row["field"] in found:
                raise ValueError(f"{row['field']} has two rows in {path}")
            found[row["field"]] = Effect(row["becomes"], tuple(row["tests"].split()))
    return found


def reason_without_effect(path: str) -> str | None:
    """Why a field, or the section it is in, changes nothing; None if it acts."""
    for name, reason in NO_EFFECT.items():
        if path == name or path.startswith((name + ".", name + "[")):
            return reason
    return None


def conditions_of(path: str) -> list[str]:
    """When a field that acts does not, in words."""
    root = ConvertSpec if path.startswith("convert:") else ExperimentSpec
    bare = path.removeprefix("convert:")
    return [
        f"No effect when {one.reason}."
        for one in CONDITIONS
        if (bare == one.path or bare.startswith(one.path + ".")) and one.root is root
    ]


def lines() -> Iterator[str]:
    """The document, line by line."""
    yield HEAD
    effects = known_effects()
    for section, fields in groupby(iter_fields(), key=section_of):
        yield f"## {section}\n"
        yield "| field | default; values | what it becomes | read by | shown by |"
        yield "| --- | --- | --- | --- | --- |"
        for info in fields:
            yield "| " + " | ".join(escaped(cell) for cell in cells(info, effects)) + " |"
        yield ""


def section_of(info: FieldInfo) -> str:
    """The heading that a field is listed under."""
    if info.path.startswith("convert:"):
        return "convert (a spec of its own)"
    return info.path.partition(".")[0] if "." in info.path else "at the top"


def read_by(path: str) -> str:
    """The subtasks that read a field, in words."""
    if path.startswith("convert:"):
        return "convert"
    subtasks, optional = readers_of(path), ()
    for name, more in USED_IF_GIVEN.items():
        if path == name or path.startswith(f"{name}["):
            optional = more
    words = "all" if subtasks == ALL else ", ".join(subtasks)
    return words + (f"; where given {', '.join(optional)}" if optional else "")


def cells(info: FieldInfo, effects: dict[str, Effect]) -> tuple[str, str, str, str, str]:
    """The five cells of a field."""
    default = info.default if info.default == "???" else flow(info.default)
    values = [f"`{default}`", info.type]
    values += [info.bounds] if info.bounds else []
    values += [", ".join(map(str, info.options))] if info.options else []
    values += [f"searched by AutoML: {info.searched}"] if info.searched else []
    reason = reason_without_effect(info.path)
    if reason is not None:
        return f"`{info.path}`", "; ".join(values), f"no effect: {reason}", "none", link(REPORTED)
    effect = effects.get(info.path, Effect("", ()))
    becomes = " ".join([effect.becomes, *conditions_of(info.path)])
    tests = " ".join(link(test, number) for number, test in enumerate(effect.tests, 1))
    return f"`{info.path}`", "; ".join(values), becomes, read_by(info.path), tests


def link(test: str, number: int = 1) -> str:
    """A test as a link to its file, by a number: its name, the tooltip, would be the widest column."""
    file, _, name = test.partition("::")
    return f'[{number}](../{file} "{name}")'


def escaped(cell: str) -> str:
    """A cell that holds no bar of its own."""
    return cell.replace("|", "\\|")


def document() -> str:
    """The whole document."""
    return "\n".join(lines()).rstrip("\n") + "\n"


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
