"""Runs the benchmarks one after the other: ``make bench``, or ``make bench ARGS='convert gcvit'`` for some.

Those for a CUDA GPU (``*_gpu``) run only when named, or all together with ``--gpu``: ``python
benchmarks/run.py --gpu`` writes every GPU record, without a limit of time; ``python benchmarks/run.py --gpu
--budget-s 540 --out DIR`` runs what matters most within 540 seconds (``--device cpu --quick`` rehearses it
without a GPU): see ``docs/gpu-run.md``.

Every script of this folder that measures something has a ``main``; each writes its record to
``benchmarks/records`` and lists its options with ``-h``. Options after ``--`` go to every script. What takes
hours runs only when it is named: ``make bench ARGS=soak``.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
TAKES_HOURS = ("soak",)


def scripts() -> list[str]:
    """Names of the scripts that measure: those that define ``main``, but for this one."""
    found = []
    for path in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defines_main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
        if defines_main and path.name != Path(__file__).name:
            found.append(path.stem)
    return found


def _on_gpu(name: str) -> bool:
    return name.endswith("_gpu")


def main() -> int:
    """Run the chosen scripts; returns 0 when all succeeded."""
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        print("There are:", ", ".join(scripts()))
        return 0
    if any(one.startswith("--budget-s") for one in arguments):
        import gpu_call

        return gpu_call.call(arguments)
    options = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    chosen = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--gpu" in chosen:
        chosen = [name for name in chosen if name != "--gpu"] + [name for name in scripts() if _on_gpu(name)]
        options = options or ["--record"]
    unknown = sorted(set(chosen) - set(scripts()))
    if unknown:
        print(f"no such benchmark: {', '.join(unknown)}; there are: {', '.join(scripts())}", file=sys.stderr)
        return 2
    failed = []
    for name in chosen or [name for name in scripts() if name not in TAKES_HOURS and not _on_gpu(name)]:
        print(f"== {name}", flush=True)
        if (
            subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), *options], check=False).returncode
            != 0
        ):
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
