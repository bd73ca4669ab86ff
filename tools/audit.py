"""Audits the installed packages for known vulnerabilities, with pip-audit.

Part of ``make lint``. Exits with 1 when a newer version fixes a known vulnerability. Vulnerabilities without
a fix are printed only, and so is the reason where the advisories cannot be reached.

    python tools/audit.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

PIP_AUDIT = "pip-audit==2.10.1"
"""Runs in an environment of its own, made by uv."""

OUR_UV = Path.home() / ".cache" / "ddetr_mm" / "uv" / "bin" / "uv"
TIMEOUT_S = 300

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def run_command(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output."""
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def find_uv() -> str | None:
    """The ``uv`` on PATH, or the one that ``make env`` has put into the cache."""
    return shutil.which("uv") or (str(OUR_UV) if os.access(OUR_UV, os.X_OK) else None)


def audit(uv: str | None, packages: Path, run: Run = run_command) -> tuple[int, list[str]]:
    """Audit the packages of a folder.

    Args:
        uv: path of uv, which runs pip-audit; None where it is missing.
        packages: a ``site-packages`` folder.
        run: runs a command.

    Returns:
        The exit status and the lines to print.
    """
    if uv is None:
        return 0, ["dependencies not audited: uv is missing (pip install uv)"]
    command = [uv, "tool", "run", "--from", PIP_AUDIT, "pip-audit", "--path", str(packages)]
    try:
        done = run([*command, "--skip-editable", "--progress-spinner", "off", "--format", "json"])
    except (OSError, subprocess.TimeoutExpired) as error:
        return 0, [f"dependencies not audited: {error}"]
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return 0, [f"dependencies not audited: {reason[:200]}"]
    audited = [item for item in found if "vulns" in item]
    if not audited:
        return 0, ["dependencies not audited: the advisories cannot be reached from here"]
    return report(audited)


def report(audited: Sequence[dict]) -> tuple[int, list[str]]:
    """The exit status and a line for every vulnerability."""
    lines, fixable = [], 0
    for item in audited:
        for vulnerability in item["vulns"]:
            versions = ", ".join(vulnerability["fix_versions"])
            fixable += bool(versions)
            fix = f"fixed in {versions}" if versions else "no version fixes it yet"
            lines.append(f"{item['name']} {item['version']}: {vulnerability['id']}, {fix}")
    lines.append(f"{len(audited)} packages audited, {len(lines)} known vulnerabilities, {fixable} with a fix")
    return int(fixable > 0), lines


def main() -> int:
    """Audit the environment this runs in."""
    status, lines = audit(find_uv(), Path(sysconfig.get_paths()["purelib"]))
    print("\n".join(lines), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
