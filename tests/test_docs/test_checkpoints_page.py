"""docs/checkpoints.md: every row of its tables names a test, and the tests exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")


def test_every_row_names_a_test_that_exists():
    heads = re.compile(r"\| ---|.*\| test \|$")
    rows = [line for line in TEXT.splitlines() if line.startswith("|") and not heads.match(line)]
    assert len(rows) > 40
    for row in rows:
        (named,) = re.findall(r"`(tests/[\w/]+\.py)::(\w+)` \|$", row)
        assert f"def {named[1]}(" in (ROOT / named[0]).read_text(encoding="utf-8"), row


def test_other_tests_of_the_page_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), (path, name)
