"""Create or refresh a virtual environment with one of the pinned sets; do nothing when it is current.

The Makefile runs this before every target, so the path on which nothing is to be done must stay
cheap: it reads three small files. Only the standard library is used, and any Python 3.8 can run it:
the interpreter that launches it need not be the one the environment is made with.

    python3 tools/env/create.py --env .venv --stack torch2.14 [--python python3.12]

``uv`` does the installing. Where it is not on PATH, pip puts it into a cache folder of ours, never
into the user's own packages; where that fails too, ``venv`` and pip take over. Everything comes from
wheels, or from sources of Python alone, so no compiler is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PINS = ROOT / "tools" / "env"
UV_REQUIREMENT = "uv==0.13.9"
# The Pythons a stack is used with, best first: the first is the one its tests are run with.
STACKS = {
    "torch2.14": ("3.11", "3.12", "3.10", "3.13"),
    "torch2.11": ("3.12", "3.11", "3.10", "3.13"),
    "onedl": ("3.11", "3.12", "3.10"),  # the maintained forks of the OpenMMLab packages
}
STAMP = "ddetr_mm.json"
HAS_OPS = ".has-ops"  # left by `make ops`
# Two distributions that hold the same module must never be in one environment.
RIVALS = {"opencv-python-headless": "opencv-python", "mmcv-lite": "mmcv"}


class SetupError(Exception):
    """The environment cannot be made; the text says why and what to do."""


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, bring the environment up to date; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", type=Path, default=Path(".venv"), help="folder of the environment")
    parser.add_argument("--stack", default="torch2.14", help=f"pinned set: {', '.join(STACKS)}")
    parser.add_argument("--python", default="", help="interpreter (name, version or path) to make it with")
    parser.add_argument("--adopt", action="store_true", help="only record that the environment is current")
    options = parser.parse_args(argv)
    try:
        prepare(ROOT / options.env, options.stack, options.python, adopt=options.adopt)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(
            f"error: this command failed with status {error.returncode}: {' '.join(map(str, error.cmd))}",
            file=sys.stderr,
        )
        return 1
    return 0


def prepare(env: Path, stack: str, python: str, adopt: bool = False) -> None:
    """Make ``env`` hold the pinned set ``stack``, made with ``python`` where one is asked for.

    Raises:
        SetupError: unknown stack, no usable interpreter, or no way to install.
    """
    if stack not in STACKS:
        raise SetupError(f"STACK={stack} is not a pinned set; there are: {', '.join(STACKS)}")
    wanted = fingerprint(stack)
    asked = interpreter(python, STACKS[stack]) if python else None
    if is_current(env, wanted, asked):
        return
    with only_one_at_a_time():
        if is_current(env, wanted, asked):  # another call made it while this one waited
            return
        chosen = asked or existing_interpreter(env) or interpreter("", STACKS[stack])
        if adopt:
            write_stamp(env, wanted, chosen[1])
            return
        started = time.monotonic()
        print(f"Setting up {env.name} ({stack}, Python {chosen[1]}) ...", file=sys.stderr, flush=True)
        fill(env, stack, chosen)
        write_stamp(env, wanted, chosen[1])
        print(f"{env.name} is ready after {time.monotonic() - started:.0f} s.", file=sys.stderr, flush=True)


def fill(env: Path, stack: str, chosen: tuple[str, str]) -> None:
    """Create ``env`` where it is missing or has another Python, then install the pins and the package."""
    uv = find_uv(chosen[0])
    existing = existing_interpreter(env)
    if existing and existing[1] != chosen[1]:
        if not (env / STAMP).is_file():
            raise SetupError(
                f"{env} was not made by this script and has Python {existing[1]}, not {chosen[1]}: "
                "move it away, or pass its Python as PYTHON=..."
            )
        shutil.rmtree(env)
        existing = None
    if not existing:
        make_env(env, chosen[0], uv)
    write_stamp(env, "unfinished", chosen[1])
    with contextlib.suppress(FileNotFoundError):  # `make ops` has to put them in again
        (env / HAS_OPS).unlink()
    python = env_python(env)
    pins = str(PINS / f"{stack}.txt")
    installer = (
        [uv, "pip", "install", "--python", str(python)] if uv else [str(python), "-m", "pip", "install"]
    )
    remove_rivals(uv, python)
    # The pinned file is the whole closure, so nothing is resolved: mmdeploy's protobuf pin and mmcv's
    # opencv-python are overruled in it on purpose.
    run([*installer, "--no-deps", "--only-binary", ":all:", "-r", pins])
    if sources_of(stack).is_file():
        run([*installer, "--no-deps", "-r", str(sources_of(stack))])
    run(
        [
            *installer,
            "--no-deps",
            "--no-build-isolation",
            "--config-settings",
            "editable_mode=compat",
            "-e",
            str(ROOT),
        ]
    )


def sources_of(stack: str) -> Path:
    """The pins of a stack that are published without wheels, and so are built here; most have none."""
    return PINS / f"{stack}.sources.txt"


# --- is there anything to do? ---


def fingerprint(stack: str) -> str:
    """A hash of what an environment depends on: the pins, the package's metadata and how it is built."""
    pins = (PINS / f"{stack}.txt").read_text(encoding="utf-8")
    if sources_of(stack).is_file():
        pins += sources_of(stack).read_text(encoding="utf-8")
    # The settings of tools come last in the file, and change nothing that is installed.
    metadata, _, _ = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\n[tool.pytest")
    build = (ROOT / "setup.py").read_text(encoding="utf-8")
    return hashlib.sha256(f"{pins}\n{metadata}\n{build}".encode()).hexdigest()[:16]


def is_current(env: Path, wanted: str, asked: tuple[str, str] | None) -> bool:
    """Whether the environment's stamp says that it holds the wanted set (and the Python asked for)."""
    try:
        stamp = json.loads((env / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        stamp.get("pins") == wanted
        and (asked is None or stamp.get("python") == asked[1])
        and env_python(env).exists()
    )


def write_stamp(env: Path, pins: str, version: str) -> None:
    """Record what the environment holds, in one step, so that an interrupted run leaves no false stamp."""
    temporary = env / f".{STAMP}.tmp-{os.getpid()}"
    temporary.write_text(json.dumps({"pins": pins, "python": version}) + "\n", encoding="utf-8")
    os.replace(temporary, env / STAMP)


@contextlib.contextmanager
def only_one_at_a_time():
    """Let a second ``make`` in this checkout wait for the first instead of installing over it."""
    try:
        import fcntl
    except ImportError:  # Windows has none; two makes at once are the user's own affair there
        yield
        return
    handle = os.open(PINS, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# --- interpreters ---


def interpreter(asked: str, preferred: tuple[str, ...]) -> tuple[str, str]:
    """(path, full version) of the interpreter to use.

    Args:
        asked: a path, a name on PATH or a version (``3.12``); empty for the best one of ``preferred``.
        preferred: minor versions, best first.

    Raises:
        SetupError: none was found, or the one asked for is not supported.
    """
    if asked:
        minor = asked[len("python") :] if asked.startswith("python") else asked
        is_minor = all(part.isdigit() for part in minor.split(".")) and minor.count(".") == 1
        found = first_working([asked, *(candidates(minor) if is_minor else [])])
        if not found:
            raise SetupError(f"PYTHON={asked}: there is no such interpreter, or it does not start")
        if found[1].rpartition(".")[0] not in preferred:
            raise SetupError(
                f"PYTHON={asked} is Python {found[1]}; supported are {', '.join(sorted(preferred))}"
            )
        return found
    for minor in preferred:
        found = first_working(candidates(minor))
        if found:
            return found
    raise SetupError(
        f"no Python {', '.join(preferred)} was found: install one, or name it with PYTHON=/path/to/python3"
    )


def candidates(minor: str) -> list[str]:
    """Where a Python ``3.x`` may be: by name on PATH, this interpreter, and pyenv's folders."""
    names = [f"python{minor}", "python3", "python"]
    # A pyenv shim answers only for the versions that are switched on; the rest are in this folder.
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    names += sorted((str(path) for path in pyenv.glob(f"{minor}.*/bin/python")), reverse=True)
    return [f"{name}@{minor}" for name in names]


def first_working(names: list[str]) -> tuple[str, str] | None:
    """The first of ``names`` (``path`` or ``path@minor``) that starts and has that minor version."""
    for entry in names:
        name, _, minor = entry.partition("@")
        probe = "import sys; print(sys.executable); print('.'.join(map(str, sys.version_info[:3])))"
        path = shutil.which(name)
        if not path:
            continue
        answer = subprocess.run([path, "-I", "-S", "-c", probe], capture_output=True, text=True, check=False)
        lines = answer.stdout.split("\n")
        if answer.returncode == 0 and len(lines) >= 2 and (not minor or lines[1].startswith(f"{minor}.")):
            return lines[0], lines[1]
    return None


def env_python(env: Path) -> Path:
    """The interpreter inside an environment."""
    return env / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def existing_interpreter(env: Path) -> tuple[str, str] | None:
    """(path, version) of the interpreter an environment was made with; None where there is none."""
    found = first_working([str(env_python(env))]) if env_python(env).exists() else None
    return found and (str(env_python(env)), found[1])


# --- installers ---


def find_uv(python: str) -> str:
    """The path of ``uv``: on PATH, in our cache, or put there by pip; empty where it cannot be had."""
    on_path = shutil.which("uv")
    if on_path:
        return on_path
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddetr_mm" / "uv"
    uv = cache / ("bin/uv.exe" if os.name == "nt" else "bin/uv")
    if uv.is_file():
        return str(uv)
    scratch = cache.with_name(f".uv.tmp-{os.getpid()}")
    fetch = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--disable-pip-version-check",
        "--target",
        str(scratch),
        UV_REQUIREMENT,
    ]
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        # An environment that uv made has no pip, so the launcher's is tried as well.
        if any(
            subprocess.run([by, *fetch], check=False, stdin=subprocess.DEVNULL).returncode == 0
            for by in dict.fromkeys((python, sys.executable))
        ):
            if not cache.exists():
                os.replace(scratch, cache)
            return str(uv)
        reason = "pip could not install it"
    except OSError as error:
        reason = str(error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"note: uv cannot be had ({reason}); venv and pip are used, which takes longer", file=sys.stderr)
    return ""


def make_env(env: Path, python: str, uv: str) -> None:
    """Create an empty environment."""
    if uv:
        run([uv, "venv", "--quiet", "--no-python-downloads", "--clear", "--python", python, str(env)])
        return
    try:
        run([python, "-m", "venv", "--clear", str(env)])
    except subprocess.CalledProcessError as error:
        raise SetupError(
            f"{python} can make no virtual environment: install its venv module (Debian: apt-get install "
            "python3-venv), or uv, or pip"
        ) from error


def remove_rivals(uv: str, python: Path) -> None:
    """Uninstall the distributions whose modules a pinned one replaces, where they are installed."""
    probe = "import importlib.metadata as m; print(*(d.metadata['Name'] for d in m.distributions()))"
    answer = subprocess.run([str(python), "-I", "-c", probe], capture_output=True, text=True, check=True)
    installed = set(answer.stdout.lower().split())
    for pinned, rival in RIVALS.items():
        if rival not in installed:
            continue
        # Both go: removing the rival alone would take the files that they share from the pinned one.
        both = sorted({pinned, rival} & installed)
        run(
            [uv, "pip", "uninstall", "--python", str(python), *both]
            if uv
            else [str(python), "-m", "pip", "uninstall", "--yes", *both]
        )


def run(command: list[str]) -> None:
    """Run an installer, its output shown, without standard input."""
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
