"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddetr_mm.files import write_text_whole, written_whole


def test_a_file_appears_when_the_block_succeeds(tmp_path: Path):
    target = tmp_path / "new" / "a.txt"
    with written_whole(target) as temporary:
        temporary.write_text("one")
        assert not target.exists() and temporary.suffix == ".txt" and temporary.parent == target.parent
    assert target.read_text() == "one" and [path.name for path in target.parent.iterdir()] == ["a.txt"]


def test_a_failure_leaves_what_was_there(tmp_path: Path):
    target = write_text_whole(tmp_path / "a.txt", "old")

    def fail() -> None:
        with written_whole(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert target.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a.txt"]
