"""What mmcv's compiled ops have to fit: the torch, Python, CUDA and platform of an environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ddetr_mm.errors import Problem, StackError

MMCV_VERSION = "2.1.0"
# Where no GPU tells what to compile for: Turing, Ampere (and Ada, which runs its code), Hopper and later.
DEFAULT_ARCHITECTURES = "7.5;8.0;9.0+PTX"

_PROBE = """
import json, sys, sysconfig, torch
gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
paths = sysconfig.get_paths()
print(json.dumps(dict(
    torch=torch.__version__,
    torch_cuda=torch.version.cuda,
    torch_folder=torch.__path__[0],
    gpus=sorted({f"{major}.{minor}" for major, minor in gpus}),
    python_tag="cp%d%d" % sys.version_info[:2],
    platform=sysconfig.get_platform().replace("-", "_").replace(".", "_"),
    site_packages=paths["platlib"],
    python_header=paths["include"] + "/Python.h",
)))
"""


@dataclass(frozen=True)
class Environment:
    """A Python environment, as its own interpreter tells it.

    Attributes:
        torch: torch's full version, with the local tag (``2.14.1+cu130``).
        torch_cuda: the CUDA version torch was built with; None for a CPU build.
        torch_folder: torch's package folder.
        gpus: compute capabilities of the GPUs in sight, e.g. ``("9.0",)``.
        python_tag: e.g. ``cp311``.
        platform: e.g. ``linux_x86_64``.
        site_packages: where compiled packages are installed.
        python_header: where ``Python.h`` should be.
    """

    torch: str
    torch_cuda: str | None
    torch_folder: str
    gpus: tuple[str, ...]
    python_tag: str
    platform: str
    site_packages: str
    python_header: str


@dataclass(frozen=True)
class Target:
    """What a wheel of mmcv is built for. Equal targets can share a wheel.

    Attributes:
        torch: torch's full version, with the local tag.
        cuda: the CUDA version the ops are built with; None for CPU ops only.
        architectures: GPU architectures as ``TORCH_CUDA_ARCH_LIST`` takes them; empty without CUDA.
        python_tag: e.g. ``cp311``.
        platform: e.g. ``linux_x86_64``.
    """

    torch: str
    cuda: str | None
    architectures: tuple[str, ...]
    python_tag: str
    platform: str

    @property
    def key(self) -> str:
        """The name of the cache folder: everything that makes two wheels differ."""
        cuda = "cpu"
        if self.cuda:
            cuda = f"cu{self.cuda.replace('.', '')}-sm" + "_".join(
                name.replace(".", "").replace("+PTX", "ptx") for name in self.architectures
            )
        parts = (f"mmcv{MMCV_VERSION}", f"torch{self.torch}", cuda, self.python_tag, self.platform)
        return re.sub(r"[^A-Za-z0-9.+_-]", "_", "-".join(parts))

    @property
    def torch_release(self) -> str:
        """Torch's version without the local tag."""
        return self.torch.partition("+")[0]


def probe(python: Path) -> Environment:
    """Ask an environment's interpreter what there is.

    Raises:
        StackError: the interpreter does not start, or torch cannot be imported there.
    """
    try:
        answer = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=False)
    except OSError as error:
        raise StackError(Problem(f"cannot be started: {error}", file=python)) from error
    if answer.returncode != 0:
        reason = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise StackError(
            Problem(
                f"torch cannot be imported: {reason}",
                file=python,
                mend="install torch first; the ops are compiled against it",
            )
        )
    told = json.loads(answer.stdout.splitlines()[-1])
    return Environment(**{**told, "gpus": tuple(told["gpus"])})


def choose_target(
    environment: Environment, force_cuda: bool | None = None, variables: Mapping[str, str] = os.environ
) -> Target:
    """Decide between CPU ops and CUDA ops.

    Args:
        environment: what the ops must fit.
        force_cuda: build CUDA ops, or do not, whatever GPUs are in sight; None asks the variable
            ``FORCE_CUDA`` (1 or 0), and else takes CUDA where there is a GPU.
        variables: ``FORCE_CUDA`` and ``TORCH_CUDA_ARCH_LIST`` are read.

    Raises:
        StackError: CUDA ops are asked for, but torch is a CPU build.
    """
    if force_cuda is None and variables.get("FORCE_CUDA") in ("0", "1"):
        force_cuda = variables["FORCE_CUDA"] == "1"
    with_cuda = bool(environment.gpus) if force_cuda is None else force_cuda
    if with_cuda and not environment.torch_cuda:
        raise StackError(
            f"CUDA ops are asked for, but torch {environment.torch} is a build without CUDA; "
            "install a CUDA build of torch, or set FORCE_CUDA=0"
        )
    architectures: tuple[str, ...] = ()
    if with_cuda:
        asked = variables.get("TORCH_CUDA_ARCH_LIST") or ";".join(environment.gpus) or DEFAULT_ARCHITECTURES
        architectures = tuple(asked.replace(" ", ";").split(";"))
    return Target(
        torch=environment.torch,
        cuda=environment.torch_cuda if with_cuda else None,
        architectures=architectures,
        python_tag=environment.python_tag,
        platform=environment.platform,
    )


def find_compiler(environment: Environment, variables: Mapping[str, str] = os.environ) -> str:
    """The path of the C++ compiler, which needs Python's headers too.

    Raises:
        StackError: either is missing.
    """
    asked = variables.get("CXX")
    for name in (asked,) if asked else ("g++", "c++", "clang++"):
        path = shutil.which(name, path=variables.get("PATH"))
        if path:
            break
    else:
        named = f"CXX={asked} is not there" if asked else "no C++ compiler was found (g++, c++, clang++)"
        raise StackError(f"{named}; install one (Debian, Ubuntu: apt-get install g++) and run this again")
    if not Path(environment.python_header).is_file():
        raise StackError(
            Problem(
                "Python's C headers are missing",
                file=environment.python_header,
                mend="install them (Debian, Ubuntu: apt-get install python3-dev) and run this again",
            )
        )
    return path


def find_toolkit(
    target: Target, variables: Mapping[str, str] = os.environ, system_folder: Path = Path("/usr/local")
) -> Path:
    """The CUDA toolkit's folder, of the same major version as torch's CUDA.

    ``CUDA_HOME`` decides where it is set; else the toolkit of the ``nvcc`` on PATH is taken, or the one
    in its usual place.

    Args:
        target: one with CUDA.
        variables: ``CUDA_HOME`` and ``PATH`` are read.
        system_folder: holds the usual places, ``cuda-13.0`` and ``cuda``.

    Raises:
        StackError: there is no toolkit, or one of another major version.
    """
    wanted = f"CUDA toolkit {target.cuda} (torch {target.torch} was built with it)"
    way_out = "set CUDA_HOME to its folder, or FORCE_CUDA=0 for CPU ops only"
    home = variables.get("CUDA_HOME") or variables.get("CUDA_PATH")
    if home:
        folders = [Path(home)]
    else:
        on_path = shutil.which("nvcc", path=variables.get("PATH"))
        folders = [Path(on_path).resolve().parent.parent] if on_path else []
        folders += [system_folder / f"cuda-{target.cuda}", system_folder / "cuda"]
    # An nvcc alone can be a script that calls the real one elsewhere: the headers show the toolkit.
    folders = [
        path
        for path in folders
        if (path / "bin/nvcc").is_file() and (path / "include/cuda_runtime.h").is_file()
    ]
    if not folders:
        where = f"CUDA_HOME={home} holds no nvcc with headers" if home else "no nvcc with headers was found"
        raise StackError(f"{where}: building CUDA ops needs {wanted}; install it, and {way_out}")
    versions = [_toolkit_version(path) for path in folders]
    for path, version in zip(folders, versions, strict=True):
        if version.partition(".")[0] == str(target.cuda).partition(".")[0]:
            return path
    raise StackError(
        Problem(
            f"is of CUDA {versions[0]}, but building the ops needs {wanted}",
            file=folders[0] / "bin" / "nvcc",
            mend=f"install that one and {way_out}",
        )
    )


def _toolkit_version(folder: Path) -> str:
    """A toolkit's version as its ``nvcc`` tells it, e.g. ``13.0``."""
    answer = subprocess.run([folder / "bin/nvcc", "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"release (\d+\.\d+)", answer.stdout)
    return match[1] if match else "unknown"
