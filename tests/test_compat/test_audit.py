"""The audit of the installed packages, for each output of pip-audit."""

from __future__ import annotations

import json
import runpy
import subprocess
from pathlib import Path

import pytest

TOOL = runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools" / "audit.py"), run_name="audit")


def runner(stdout: str = "", stderr: str = "", status: int = 0):
    """A replacement for ``run_command``, and the list of commands it receives."""
    commands: list[list[str]] = []

    def run(command):
        commands.append(list(command))
        return subprocess.CompletedProcess(command, status, stdout, stderr)

    return run, commands


def dependencies(*items: dict) -> str:
    return json.dumps({"dependencies": list(items), "fixes": []})


CLEAN = {"name": "rich", "version": "14.0", "vulns": []}
FIXABLE = {
    "name": "pillow",
    "version": "1.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"], "aliases": [], "description": ""}],
}
UNFIXED = {
    "name": "torch",
    "version": "2.0",
    "vulns": [{"id": "GHSA-2", "fix_versions": [], "aliases": [], "description": ""}],
}
UNKNOWN = {"name": "ours", "skip_reason": "not found on PyPI"}


@pytest.mark.parametrize(
    ("stdout", "stderr", "status", "words"),
    [
        (dependencies(CLEAN, UNKNOWN), "", 0, "1 packages audited, 0 known vulnerabilities"),
        (dependencies(CLEAN, FIXABLE), "", 1, "pillow 1.0: PYSEC-1, fixed in 1.1"),
        (dependencies(CLEAN, UNFIXED), "", 0, "torch 2.0: GHSA-2, no version fixes it yet"),
        (dependencies(UNKNOWN), "", 0, "not audited: the advisories cannot be reached"),
        ("", "Traceback ...\nConnectionError: no route", 0, "not audited: ConnectionError: no route"),
    ],
)
def test_each_output(stdout: str, stderr: str, status: int, words: str):
    run, commands = runner(stdout, stderr)
    found, lines = TOOL["audit"]("uv", Path("site-packages"), run)
    assert found == status and words in "\n".join(lines)
    assert TOOL["PIP_AUDIT"] in commands[0] and "site-packages" in commands[0]


def test_missing_uv_is_reported_in_one_line():
    assert TOOL["audit"](None, Path("x")) == (0, ["dependencies not audited: uv is missing (pip install uv)"])

    def run(command):
        raise FileNotFoundError(2, "No such file or directory", "uv")

    status, lines = TOOL["audit"]("uv", Path("x"), run)
    assert status == 0 and len(lines) == 1 and "not audited" in lines[0]
