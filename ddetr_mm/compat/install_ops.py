"""Installs mmcv with its compiled ops into the running environment: ``ddetr-mm install-ops``.

mmcv and mmcv-lite are the same module, so the one replaces the other. The new one is installed into a staging
folder and tried out there before the installed files are replaced; whatever fails earlier changes nothing.
All functions raise :class:`~ddetr_mm.errors.StackError` for what is missing or fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ddetr_mm.errors import Problem, StackError
from ddetr_mm.files import python_module, usable_cores

MMCV_VERSION = "2.1.0"
WHEELS_VARIABLE = "DDETR_MM_WHEELS"
"""Names a folder with wheels of mmcv, at any depth, that are tried before building."""
# mmcv's setup.py imports pkg_resources, which setuptools 81 removed; ninja compiles in parallel.
BUILD_TOOLS = ("pip", "setuptools<81", "ninja")
# -O2 is what ships; debug symbols and warnings cost more compile time than it does.
COMPILER_FLAGS = "-g0 -O2 -w"
# CUDA ops built where no GPU is visible: Turing, Ampere and Ada, Hopper and later.
DEFAULT_ARCHITECTURES = "7.5;8.0;9.0+PTX"
Echo = Callable[[str], object]

TRY_OUT = """
import sys, torch, mmcv._ext
from mmcv.ops import get_compiling_cuda_version, nms
if sys.argv[1] == "cuda" and get_compiling_cuda_version() == "not available":
    sys.exit("its ops were compiled without CUDA")
boxes_xyxy = torch.tensor([[0., 0., 10., 10.], [1., 1., 11., 11.], [20., 20., 30., 30.]])
for device in ["cpu"] + ["cuda"] * (sys.argv[1] == "cuda" and torch.cuda.is_available()):
    kept = nms(boxes_xyxy.to(device), torch.tensor([.9, .8, .7], device=device), .5)[1].tolist()
    if kept != [0, 2]:
        sys.exit(f"nms on {device} kept {kept} of three boxes instead of [0, 2]")
"""


def run(arguments: Namespace, echo: Echo = print) -> None:
    """Replace mmcv-lite by mmcv with its ops, from a wheel that works or else from source.

    ``arguments.jobs`` is the number of compiler processes, None for one per core; ``echo`` takes one line.
    """
    try:
        import torch
    except ImportError as error:
        raise StackError(f"torch cannot be imported ({error}); the ops are compiled against it") from error
    with_cuda = wants_cuda(torch.version.cuda, torch.cuda.is_available())
    if try_out(None, with_cuda) is None:
        echo("mmcv has its compiled ops already")
        return
    site_packages = Path(sysconfig.get_path("platlib"))
    refuse_fork(site_packages)
    installer = find_installer()
    cache = cache_folder() / f"torch{torch.__version__}-{f'cu{torch.version.cuda}' if with_cuda else 'cpu'}"
    with tempfile.TemporaryDirectory(prefix=".ddetr_mm-ops-", dir=site_packages) as name:
        staging = Path(name)  # on the file system of the environment, so that renaming is enough
        for wheel in candidates(cache):
            if stage(wheel, staging, installer, with_cuda, echo):
                break
        else:
            toolkit = find_toolkit(str(torch.version.cuda)) if with_cuda else None
            wheel = build_wheel(cache, toolkit, installer, arguments.jobs or usable_cores(), echo)
            if not stage(wheel, staging, installer, with_cuda, echo):
                raise StackError(Problem("was built, but does not work", file=wheel))
        swap_in(staging, site_packages)
    echo(f"installed {wheel} into {site_packages}")


def wants_cuda(torch_cuda: str | None, has_gpu: bool, variables: Mapping[str, str] = os.environ) -> bool:
    """Whether the ops need CUDA: as ``FORCE_CUDA`` (1 or 0) says, else where there is a GPU."""
    forced = variables.get("FORCE_CUDA")
    if forced == "1" and not torch_cuda:
        raise StackError("FORCE_CUDA=1, but torch is a build without CUDA; install another, or unset it")
    return bool(torch_cuda) and (forced == "1" or (has_gpu and forced != "0"))


def cache_folder(variables: Mapping[str, str] = os.environ) -> Path:
    """Where built wheels and their logs are kept: ``~/.cache/ddetr_mm/wheels``."""
    return Path(variables.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddetr_mm" / "wheels"


def candidates(cache: Path, variables: Mapping[str, str] = os.environ) -> Iterator[Path]:
    """Wheels of this mmcv and Python in ``DDETR_MM_WHEELS``, then in ``cache``; each has to be tried out."""
    folders = [Path(variables[WHEELS_VARIABLE])] if variables.get(WHEELS_VARIABLE) else []
    if folders and not folders[0].is_dir():
        raise StackError(Problem("is not a folder", file=folders[0], where=WHEELS_VARIABLE))
    pattern = "mmcv-{}-cp{}{}-*.whl".format(MMCV_VERSION, *sys.version_info)
    for folder in [*folders, cache]:
        yield from sorted(folder.rglob(pattern))


def find_installer(variables: Mapping[str, str] = os.environ) -> list[str]:
    """The start of an install command: by this environment's pip, else by uv (on PATH or in our cache)."""
    if subprocess.run(python_module("pip", "--version"), capture_output=True).returncode == 0:
        return python_module("pip", "install", "--disable-pip-version-check")
    places = [variables.get("PATH", ""), str(cache_folder(variables).parent / "uv" / "bin")]
    uv = shutil.which("uv", path=os.pathsep.join(places))
    if uv is None:
        raise StackError("the environment has neither pip nor uv; run: python -m ensurepip --upgrade")
    return [uv, "pip", "install", "--python", sys.executable]


def refuse_fork(site_packages: Path) -> None:
    """Raise where onedl-mmcv is installed, whose files mmcv would overwrite."""
    for fork in site_packages.glob("onedl_mmcv-*.dist-info"):
        hint = "build its own ops, or use mmcv-lite and mmdet"
        raise StackError(Problem("onedl-mmcv is installed, mmcv would overwrite it", file=fork, hint=hint))


def stage(wheel: Path, staging: Path, installer: list[str], with_cuda: bool, echo: Echo) -> bool:
    """Install a wheel into the emptied ``staging``; returns whether its ops work, and reports why not."""
    for path in staging.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    command = [*installer, "--quiet", "--no-deps", "--target", str(staging), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    reason = first_error(done.stderr) if done.returncode else try_out(staging, with_cuda)
    if reason is not None:
        echo(f"{wheel} does not work here: {reason}")
    return reason is None


def try_out(folder: Path | None, with_cuda: bool) -> str | None:
    """Why the ops of the mmcv in ``folder`` (None: the installed one) do not work; None where they do."""
    variables = {**os.environ, "PYTHONPATH": str(folder)} if folder else None
    command = [sys.executable, "-c", TRY_OUT, "cuda" if with_cuda else "cpu"]
    # In an empty folder, since a folder named mmcv in the current one would be imported.
    with tempfile.TemporaryDirectory(prefix="ddetr_mm-") as empty:
        done = subprocess.run(command, env=variables, cwd=empty, capture_output=True, text=True)
    return ["no reason given", *done.stderr.splitlines()][-1] if done.returncode else None


def swap_in(staging: Path, site_packages: Path) -> None:
    """Replace the installed mmcv or mmcv-lite by the one in ``staging``, undoing all where a rename fails."""
    retired = staging / "retired"
    retired.mkdir()
    names = ("mmcv", "mmcv-*.dist-info", "mmcv_lite-*.dist-info")
    moves = [(path, retired / path.name) for name in names for path in site_packages.glob(name)]
    moves += [(path, site_packages / path.name) for name in names for path in staging.glob(name)]
    for number, (source, destination) in enumerate(moves):
        try:
            source.rename(destination)
        except OSError as error:
            for before, after in reversed(moves[:number]):
                after.rename(before)
            raise StackError(Problem(f"cannot be replaced: {error.strerror}", file=source)) from error


def build_wheel(cache: Path, toolkit: Path | None, installer: list[str], jobs: int, echo: Echo) -> Path:
    """Download mmcv's source, adapt it to torch and compile it; wheel and ``build.log`` go to ``cache``."""
    import torch

    check_compiler(Path(sysconfig.get_path("include")))
    cache.mkdir(parents=True, exist_ok=True)
    log = cache / "build.log"
    with tempfile.TemporaryDirectory(prefix="ddetr_mm-ops-") as name, log.open("w") as stream:

        def call(command: list[str], failure: str) -> None:
            if subprocess.run(command, env=variables, stdout=stream, stderr=stream).returncode:
                raise StackError(Problem(f"{failure}: {first_error(log.read_text())}", file=log))

        variables = build_variables(Path(name, "tools"), toolkit, jobs)
        call([*installer, "--target", f"{name}/tools", *BUILD_TOOLS], "the build tools cannot be installed")
        pip = python_module("pip", "--verbose", "--disable-pip-version-check")
        options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", name]
        call([*pip, "download", *options, f"mmcv=={MMCV_VERSION}"], "mmcv's source cannot be downloaded")
        source = Path(name, f"mmcv-{MMCV_VERSION}")
        shutil.unpack_archive(f"{source}.tar.gz", name)
        set_standard(source / "setup.py", Path(torch.__path__[0]))
        echo(f"compiling {'CUDA' if toolkit else 'CPU'} ops in {jobs} processes, for minutes; log: {log}")
        options = ["--no-deps", "--no-build-isolation", "--wheel-dir", name]
        call([*pip, "wheel", *options, str(source)], "mmcv's ops do not compile (g++ >= 11 is needed)")
        (wheel,) = Path(name).glob("mmcv-*.whl")
        return Path(shutil.move(wheel, cache / wheel.name))


def build_variables(tools: Path, toolkit: Path | None, jobs: int) -> dict[str, str]:
    """The environment variables of mmcv's build, with the build tools of the folder ``tools``."""
    variables = {
        **os.environ,
        "PYTHONPATH": str(tools),
        "PATH": f"{tools}/bin{os.pathsep}{os.environ.get('PATH', '')}",
        "MMCV_WITH_OPS": "1",
        "FORCE_CUDA": "1" if toolkit else "0",
        "CFLAGS": f"{os.environ.get('CFLAGS', '')} {COMPILER_FLAGS}".strip(),
        "MAX_JOBS": str(jobs),
    }
    if toolkit is None:
        return {**variables, "CUDA_VISIBLE_DEVICES": ""}  # mmcv builds CUDA ops where it sees a GPU
    import torch

    if not torch.cuda.is_available():  # else torch compiles for the visible GPUs
        variables.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    # A slim toolkit lacks cusparse.h and others, which pip's CUDA packages have.
    headers = map(str, Path(sysconfig.get_path("platlib")).glob("nvidia/*/include"))
    variables["CPATH"] = os.pathsep.join([*headers, os.environ.get("CPATH", "")]).strip(os.pathsep)
    return {**variables, "CUDA_HOME": str(toolkit)}


def check_compiler(include: Path, variables: Mapping[str, str] = os.environ) -> None:
    """Raise where there is no C++ compiler, or no ``Python.h`` in the folder ``include``."""
    names = [variables["CXX"]] if variables.get("CXX") else ["g++", "c++", "clang++"]
    if not any(shutil.which(name, path=variables.get("PATH")) for name in names):
        raise StackError(f"no C++ compiler ({', '.join(names)}); Debian and Ubuntu: apt-get install g++")
    if not (include / "Python.h").is_file():
        hint = "Debian and Ubuntu: apt-get install python3-dev"
        raise StackError(Problem("Python's C headers are missing", file=include / "Python.h", hint=hint))


def find_toolkit(torch_cuda: str, variables: Mapping[str, str] = os.environ) -> Path:
    """The CUDA toolkit in ``CUDA_HOME``, its usual place or on PATH; its major version must be torch's."""
    from torch.utils.cpp_extension import CUDA_HOME

    usual = f"/usr/local/cuda-{torch_cuda}"
    folder = Path(variables.get("CUDA_HOME") or (usual if os.path.isdir(usual) else CUDA_HOME or usual))
    try:
        text = subprocess.run([folder / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        text = f"cannot be started: {error.strerror}"
    version = re.search(r"release (\d+)\.\d+", text)
    if version and version[1] == torch_cuda.partition(".")[0]:
        return folder
    what = f"is not of torch's CUDA {torch_cuda}: {version[0] if version else text}"
    hint = "set CUDA_HOME to the folder of a toolkit that is, or FORCE_CUDA=0 for CPU ops"
    raise StackError(Problem(what, file=folder / "bin/nvcc", hint=hint))


def set_standard(setup: Path, torch_folder: Path) -> None:
    """Replace C++17 by C++20 in mmcv's ``setup.py`` where torch's headers refuse anything older."""
    header = torch_folder / "include/torch/csrc/api/include/torch/all.h"
    if not header.is_file():
        raise StackError(Problem("torch's C++ headers are missing", file=header))
    if re.search(r"__cplusplus\s*<\s*202002L", header.read_text(encoding="utf-8")):
        text = setup.read_text(encoding="utf-8")
        setup.write_text(re.sub(r"\bc\+\+17\b", "c++20", text), encoding="utf-8")


def first_error(output: str) -> str:
    """The first line of a command's output that reports an error; else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror:|\bERROR:|\w+Error: |No space left", line)]
    return (errors or lines[-1:] or ["no output"])[0][:300]
