"""Building a wheel of full mmcv from its source distribution, against the torch of an environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ddetr_mm.errors import Problem, StackError
from ddetr_mm.stack.cores import usable_cores
from ddetr_mm.stack.ops_target import (
    DEFAULT_ARCHITECTURES,
    MMCV_VERSION,
    Environment,
    Target,
    find_compiler,
    find_toolkit,
)

# pkg_resources, which mmcv's setup.py imports, is gone from setuptools 81; ninja compiles in parallel.
BUILD_TOOLS = ("pip", "setuptools<81", "ninja")
# No debug symbols and no warnings: -O2 is what ships, and they cost more time than it.
COMPILER_FLAGS = "-g0 -O2 -w"
_GIB_PER_JOB = 2.5
_SECONDS_BETWEEN_LINES = 5.0
_COMPILER_HELPER = Path(__file__).with_name("cxx_with_header.sh")

Echo = Callable[[str], object]


@dataclass(frozen=True)
class Workshop:
    """Everything one build needs.

    Attributes:
        python: the environment's interpreter.
        environment: what it told.
        target: what is built.
        folder: an empty folder to work in.
        installer: the start of an install command (``uv pip install …`` or ``python -m pip install``).
        echo: takes one line for the user at a time.
    """

    python: Path
    environment: Environment
    target: Target
    folder: Path
    installer: tuple[str, ...]
    echo: Echo


def build_wheel(workshop: Workshop, destination: Path, jobs: int | None = None) -> Path:
    """Download, patch and compile mmcv.

    Args:
        workshop: with what.
        destination: folder for the wheel, made when missing; ``build.log`` is left there too.
        jobs: compiler processes at a time; by default as many as cores and memory allow.

    Returns:
        The wheel, in ``destination``.

    Raises:
        StackError: no compiler, no matching CUDA toolkit, no download, or the build failed.
    """
    compiler = find_compiler(workshop.environment)
    toolkit = find_toolkit(workshop.target) if workshop.target.cuda else None
    tools = workshop.folder / "tools"
    install_tools(workshop, tools)
    variables = build_variables(workshop, compiler, toolkit, tools, jobs or default_jobs())
    source = unpack_source(workshop, variables)
    if needs_cxx20(workshop.environment):
        replaced = patch_standard(source)
        workshop.echo(
            f"torch {workshop.target.torch} asks for C++20: changed {replaced} flags in mmcv's build"
        )
    return compile_wheel(workshop, source, variables, destination)


def install_tools(workshop: Workshop, tools: Path) -> None:
    """The build's own tools into a folder, so that the environment is not touched.

    Raises:
        StackError: they cannot be downloaded.
    """
    run_quietly(
        [*workshop.installer, "--quiet", "--target", str(tools), *BUILD_TOOLS],
        {**os.environ},
        "the build tools (pip, setuptools, ninja) cannot be installed",
    )


def build_variables(
    workshop: Workshop, compiler: str, toolkit: Path | None, tools: Path, jobs: int
) -> dict[str, str]:
    """The environment variables of the build.

    Args:
        workshop: with what.
        compiler: path of the C++ compiler.
        toolkit: the CUDA toolkit's folder; None for CPU ops.
        tools: folder with the build tools.
        jobs: compiler processes at a time.
    """
    header = workshop.folder / "header" / "torch_header.hpp"
    header.parent.mkdir(parents=True, exist_ok=True)
    header.write_text("#include <torch/types.h>\n", encoding="utf-8")  # what mmcv's files include
    helper = workshop.folder / _COMPILER_HELPER.name
    shutil.copyfile(_COMPILER_HELPER, helper)  # a wheel's files may have lost their executable bit
    helper.chmod(0o755)
    variables = {
        **os.environ,
        "PYTHONPATH": str(tools),
        "PATH": os.pathsep.join([str(tools / "bin"), os.environ.get("PATH", "")]),
        "MMCV_WITH_OPS": "1",
        "FORCE_CUDA": "1" if toolkit else "0",
        "CFLAGS": f"{os.environ.get('CFLAGS', '')} {COMPILER_FLAGS}".strip(),
        "CXX": str(helper),
        "REAL_CXX": compiler,
        "TORCH_HEADER": str(header),
        "MAX_JOBS": str(jobs),
    }
    if toolkit:
        variables["CUDA_HOME"] = str(toolkit)
        variables["TORCH_CUDA_ARCH_LIST"] = ";".join(workshop.target.architectures) or DEFAULT_ARCHITECTURES
        headers = [*library_headers(Path(workshop.environment.site_packages)), os.environ.get("CPATH", "")]
        variables["CPATH"] = os.pathsep.join(filter(None, map(str, headers)))
    else:
        # mmcv's build takes CUDA where it sees a GPU, whatever FORCE_CUDA says.
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def library_headers(site_packages: Path) -> list[Path]:
    """Header folders of the CUDA libraries that pip installed: a slim toolkit lacks cusparse.h and others."""
    return sorted({*site_packages.glob("nvidia/cu[0-9]*/include"), *site_packages.glob("nvidia/*/include")})


def default_jobs() -> int:
    """As many compilers as there are cores, but no more than fit into memory."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(usable_cores(), int(memory_gib / _GIB_PER_JOB)))


def unpack_source(workshop: Workshop, variables: Mapping[str, str]) -> Path:
    """Download mmcv's source distribution with pip and unpack it.

    Raises:
        StackError: it cannot be downloaded.
    """
    folder = workshop.folder / "source"
    folder.mkdir()
    workshop.echo(f"downloading the source of mmcv {MMCV_VERSION}")
    command = [str(workshop.python), "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", str(folder)]
    run_quietly(
        [*command, f"mmcv=={MMCV_VERSION}"],
        variables,
        f"the source of mmcv {MMCV_VERSION} cannot be downloaded",
    )
    archives = list(folder.glob("mmcv-*.tar.gz"))
    if len(archives) != 1:
        raise StackError(f"pip downloaded {len(archives)} source archives of mmcv instead of one")
    with tarfile.open(archives[0]) as archive:
        # Refuses paths that lead out of the folder; the first releases of Python 3.10 and 3.11 lack it.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        archive.extractall(folder)  # noqa: S202
    return folder / f"mmcv-{MMCV_VERSION}"


def needs_cxx20(environment: Environment) -> bool:
    """Whether torch's headers refuse an older standard, asked of the header that does it.

    Raises:
        StackError: torch has no C++ headers.
    """
    header = Path(environment.torch_folder) / "include/torch/csrc/api/include/torch/all.h"
    try:
        return bool(re.search(r"__cplusplus\s*<\s*202002L", header.read_text(encoding="utf-8")))
    except OSError as error:
        raise StackError(
            Problem(
                "torch's C++ headers are missing",
                file=header,
                mend="install torch from a wheel that has them",
            )
        ) from error


def patch_standard(source: Path) -> int:
    """Replace C++17 by C++20 in mmcv's ``setup.py``; returns how often.

    Raises:
        StackError: the file does not hold what it should.
    """
    setup = source / "setup.py"
    text = setup.read_text(encoding="utf-8")
    patched, count = re.subn(r"\bc\+\+17\b", "c++20", text)
    if not count:
        raise StackError(Problem("does not set C++17 anywhere: not the mmcv this was made for", file=setup))
    setup.write_text(patched, encoding="utf-8")
    return count


def compile_wheel(workshop: Workshop, source: Path, variables: Mapping[str, str], destination: Path) -> Path:
    """Run mmcv's own build; the wheel and ``build.log`` are put into ``destination``.

    Raises:
        StackError: the build failed; names the log and shows the compiler's first error.
    """
    destination.mkdir(parents=True, exist_ok=True)
    log = destination / "build.log"
    kind = f"CUDA {workshop.target.cuda} ops" if workshop.target.cuda else "CPU ops"
    workshop.echo(f"compiling mmcv {MMCV_VERSION} ({kind}, {variables['MAX_JOBS']} at a time); log: {log}")
    hook = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    command = [str(workshop.python), "-c", hook, str(workshop.folder)]
    started = time.monotonic()
    status = _run_with_progress(command, source, variables, log, workshop.echo)
    wheels = list(workshop.folder.glob("mmcv-*.whl"))
    if status != 0 or len(wheels) != 1:
        raise StackError(
            Problem(
                f"mmcv's ops did not compile: {first_error(log)}",
                file=log,
                mend="read the log; a compiler too old for torch's headers is the usual reason (g++ >= 11)",
            )
        )
    final = destination / wheels[0].name
    scratch = destination / f".{wheels[0].name}.tmp-{os.getpid()}"
    shutil.copyfile(wheels[0], scratch)
    os.replace(scratch, final)
    workshop.echo(f"compiled in {time.monotonic() - started:.0f} s: {final}")
    return final


def first_error(log: Path) -> str:
    """The first line of a build log that tells of an error; else its last line."""
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    told = [line for line in lines if re.search(r"\b(fatal )?error:|Error: |No space left", line)]
    return (told or lines[-1:] or ["the log is empty"])[0][:300]


def run_quietly(command: list[str], variables: Mapping[str, str], failure: str) -> None:
    """Run a command whose output matters only when it fails.

    Raises:
        StackError: with ``failure`` and the command's last line of error.
    """
    answer = subprocess.run(
        command, env=dict(variables), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if answer.returncode != 0:
        lines = [line for line in answer.stderr.splitlines() if line.strip()] or ["no reason given"]
        told = next((line for line in lines if re.match(r"(ERROR|error|\s*cause)", line)), lines[-1])
        raise StackError(
            f"{failure}: {told.strip()[:300]}; check the connection to the package index "
            "(PIP_INDEX_URL, proxy), and run this again"
        )


def _run_with_progress(
    command: list[str], folder: Path, variables: Mapping[str, str], log: Path, echo: Echo
) -> int:
    """Run the build, all output into ``log``, ninja's count of finished files to the user now and then."""
    last = time.monotonic()
    with (
        log.open("w", encoding="utf-8", buffering=1) as written,
        subprocess.Popen(
            command,
            cwd=folder,
            env=dict(variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None  # noqa: S101 (stdout=PIPE above)
        for line in process.stdout:
            written.write(line)
            counted = re.match(r"\[(\d+)/(\d+)\]", line)
            if counted and time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                echo(f"compiled {counted[1]} of {counted[2]} files")
    return process.returncode
