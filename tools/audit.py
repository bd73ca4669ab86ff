"""Looks for known vulnerabilities in the installed packages, by pip-audit, where the network allows it.

Part of ``make lint``. Ends with 1 when a package has a known vulnerability that a newer version mends. Those
without a mend are printed; and where the advisories cannot be reached one line says so.

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
"""Run by uv in an environment of its own: it shares no dependency with the project."""

OUR_UV = Path.home() / ".cache" / "ddetr_mm" / "uv" / "bin" / "uv"
TIMEOUT_S = 300

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def run_command(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command and keep what it prints."""
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def find_uv() -> str | None:
    """The ``uv`` on the path, or the one that ``make env`` has put into our cache."""
    return shutil.which("uv") or (str(OUR_UV) if os.access(OUR_UV, os.X_OK) else None)


def audit(uv: str | None, packages: Path, run: Run = run_command) -> tuple[int, list[str]]:
    """Audit the packages of a folder.

    Args:
        uv: the program that runs pip-audit; None where there is none.
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
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return 0, [f"dependencies not audited: {reason[:200]}"]
    audited = [item for item in found if "vulns" in item]
    if not audited:
        return 0, ["dependencies not audited: the advisories cannot be reached from here"]
    return report(audited)


def report(audited: Sequence[dict]) -> tuple[int, list[str]]:
    """The exit status and a line for every vulnerability."""
    lines, mendable = [], 0
    for item in audited:
        for vulnerability in item["vulns"]:
            hints = ", ".join(vulnerability["fix_versions"])
            mendable += bool(hints)
            hint = f"mended in {mends}" if hints else "no version mends it yet"
            lines.append(f"{item['name']} {item['version']}: {vulnerability['id']}, {mend}")
    lines.append(
        f"{len(audited)} packages audited, {len(lines)} known vulnerabilities, {mendable} with a mend"
    )
    return int(mendable > 0), lines


def main() -> int:
    """Audit the environment this runs in."""
    status, lines = audit(find_uv(), Path(sysconfig.get_paths()["purelib"]))
    print("\n".join(lines), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
