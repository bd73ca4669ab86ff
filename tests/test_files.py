"""The cores a process may use."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from folders import visible

from ddetr_mm.files import fill_name, usable_cores, write_text_whole, written_whole

# --- Output in any encoding ---

PRINT = "from ddetr_mm.files import allow_any_text; allow_any_text(); print(__import__('sys').argv[1])"


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "+ a\\xe9 \\u4eba ... -> 3 x 4 | --"),
        ("latin-1", "+ aé \\u4eba ... -> 3 × 4 | --"),
        ("cp1252", "+ aé \\u4eba … -> 3 × 4 | --"),
        ("utf-8", "✓ aé 人 … → 3 × 4 │ ──"),
    ],
)
def test_what_an_encoding_lacks_is_printed_in_ascii(encoding, expected):
    done = subprocess.run(
        [sys.executable, "-c", PRINT, "✓ aé 人 … → 3 × 4 │ ──"],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode(encoding).rstrip() == expected


def test_bytes_that_are_no_text_are_printed():
    """A file name that is not UTF-8, on a UTF-8 stream."""
    done = subprocess.run(
        [sys.executable, "-c", PRINT, b"a\xff.png"],
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().rstrip() == r"a\udcff.png"


# --- Files appear whole or not at all ---


def test_a_file_appears_when_the_block_succeeds(tmp_path: Path):
    target = tmp_path / "new" / "a.txt"
    with written_whole(target) as temporary:
        temporary.write_text("one")
        assert not target.exists() and temporary.suffix == ".txt" and temporary.parent == target.parent
    assert target.read_text() == "one" and visible(target.parent) == ["a.txt"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_files_have_the_mode_of_new_files(tmp_path: Path, umask: int, mode: int):
    before = os.umask(umask)
    try:
        with written_whole(tmp_path / "a.txt") as temporary:
            temporary.unlink(missing_ok=True)
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors creates its files
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode


def test_a_link_leaves_its_targets_mode(tmp_path: Path):
    target = tmp_path / "secret.txt"
    target.touch(mode=0o600)
    with written_whole(tmp_path / "link") as temporary:
        temporary.unlink()
        temporary.symlink_to(target.name)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_a_failure_leaves_what_was_there(tmp_path: Path):
    target = write_text_whole(tmp_path / "a.txt", "old")

    def fail() -> None:
        with written_whole(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert target.read_text() == "old" and visible(tmp_path) == ["a.txt"]


# --- The cores a process may use ---


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_those_the_process_may_run_on():
    one = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{one}}}); "
        "from ddetr_mm.files import usable_cores; print(usable_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 1
    assert usable_cores() == len(os.sched_getaffinity(0))


def test_those_of_the_machine_where_a_system_has_no_affinity(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert usable_cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


@pytest.mark.parametrize(
    ("pattern", "named", "name"),
    [
        ("model_best_{epoch:03d}", False, "model_best_007"),
        ("model_best_{epoch:03d}", True, "model_best_epoch=007"),
        ("{step}-{val_mAP50:.3f}", False, "120-0.125"),
        ("a{{b}}", False, "a{b}"),
    ],
)
def test_fields_of_a_name_are_filled(pattern, named, name):
    assert fill_name(pattern, {"epoch": 7, "step": 120, "val_mAP50": 0.125}, named=named) == name


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{epoch.__class__}", "unknown field {epoch.__class__}"),
        ("{epoch[0]}", "unknown field {epoch[0]}"),
        ("{epoch!r}", "unknown field {epoch}"),
        ("{}", "unknown field {}"),
        ("{0}", "unknown field {0}"),
        ("{loss}", "unknown field {loss}"),
        ("{epoch:{step}}", "unusable format '{step}'"),
        ("{epoch:999999999d}", "unusable format"),
        ("{epoch:.3f}", "unusable format"),
        ("{val_mAP50:d}", "format of integers"),
        ("{val_mAP50:%}", "unusable format"),
        ("{epoch", "cannot be read"),
        ("../{epoch}", "no plain file name"),
        ("/tmp/x", "no plain file name"),
        ("a\\b", "no plain file name"),
        ("a\nb", "no plain file name"),
        (".hidden", "no plain file name"),
        ("", "no plain file name"),
        ("x" * 201, "longer than 200 bytes"),
    ],
)
def test_names_that_cannot_be_filled(pattern, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        fill_name(pattern, {"epoch": 7, "step": 120, "val_mAP50": 0.125})
