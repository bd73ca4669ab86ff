"""Full mmcv with its compiled ops into an environment: ``ddetr-mm install-ops``.

mmcv and mmcv-lite give the same module ``mmcv``, so the one replaces the other. The new one is
installed beside the environment's packages and tried out there first; then the two change places by
renaming. Whatever fails before that leaves the environment as it was.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ddetr_mm.errors import Problem, StackError
from ddetr_mm.files import usable_cores

# --- What mmcv's compiled ops have to fit: the torch, Python, CUDA and platform of an environment ---

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
                hint="install torch first; the ops are compiled against it",
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
                hint="install them (Debian, Ubuntu: apt-get install python3-dev) and run this again",
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
            hint=f"install that one and {way_out}",
        )
    )


def _toolkit_version(folder: Path) -> str:
    """A toolkit's version as its ``nvcc`` tells it, e.g. ``13.0``."""
    answer = subprocess.run([folder / "bin/nvcc", "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"release (\d+\.\d+)", answer.stdout)
    return match[1] if match else "unknown"


# --- Finding a wheel of mmcv that was built before, for the same torch, Python and CUDA ---

WHEELS_VARIABLE = "DDETR_MM_WHEELS"

# torch2.14.1-cpu, torch2.11.0-cu130-sm90
_FOLDER = re.compile(r"torch(?P<torch>\d[\w.]*)-(?P<cuda>cpu|cu\d+)(?P<architectures>(-sm\d+)*)$")


def cache_folder(variables: Mapping[str, str] = os.environ) -> Path:
    """Where wheels are kept between environments: ``~/.cache/ddetr_mm/wheels``."""
    base = variables.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ddetr_mm" / "wheels"


def candidates(target: Target, variables: Mapping[str, str] = os.environ) -> Iterator[Path]:
    """Wheels that may fit, best first: the caller's own, the checkout's neighbours, the cache.

    A name can promise what the file does not hold, so each has to be tried out.

    Args:
        target: what the wheel must fit.
        variables: ``DDETR_MM_WHEELS`` (a wheel or a folder) and ``XDG_CACHE_HOME`` are read.

    Raises:
        StackError: ``DDETR_MM_WHEELS`` names nothing that exists.
    """
    asked = variables.get(WHEELS_VARIABLE)
    if asked:
        place = Path(asked)
        if not place.exists():
            raise StackError(
                Problem(
                    "does not exist",
                    file=asked,
                    where=WHEELS_VARIABLE,
                    hint="name a wheel or a folder of them",
                )
            )
        yield from [place] if place.is_file() else _in_folder(place, target)
    beside_checkout = Path(__file__).resolve().parents[3] / "shared" / "wheels"
    if beside_checkout.is_dir():
        yield from _in_folder(beside_checkout, target)
    yield from _wheels(cache_folder(variables) / target.key, target)


def _in_folder(folder: Path, target: Target) -> Iterator[Path]:
    """Wheels in a folder itself, and in those of its folders whose names fit, the closest first."""
    yield from _wheels(folder, target)
    named = [(folder_fit(path.name, target), path) for path in sorted(folder.iterdir()) if path.is_dir()]
    for fit, path in sorted(named, key=lambda pair: -pair[0]):
        if fit:
            yield from _wheels(path, target)


def folder_fit(name: str, target: Target) -> int:
    """How well a folder named like ``torch2.11.0-cu130-sm90`` fits: 2 exactly, 1 usable, 0 not at all.

    CUDA ops serve a machine that asks for CPU ops; not the other way round.
    """
    match = _FOLDER.match(name)
    if not match or match["torch"] != target.torch_release:
        return 0
    if target.cuda is None:
        return 2 if match["cuda"] == "cpu" else 1
    if match["cuda"] != f"cu{target.cuda.replace('.', '')}":
        return 0
    there = set(match["architectures"].split("-sm")[1:])
    wanted = {name.replace(".", "").removesuffix("+PTX") for name in target.architectures}
    return 2 if wanted <= there else 0


def _wheels(folder: Path, target: Target) -> list[Path]:
    """Wheels of the right mmcv and Python in one folder."""
    return sorted(folder.glob(f"mmcv-{MMCV_VERSION}-{target.python_tag}-*.whl"))


# --- Building a wheel of full mmcv from its source distribution, against the torch of an environment ---

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
                hint="install torch from a wheel that has them",
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
                hint="read the log; a compiler too old for torch's headers is the usual reason (g++ >= 11)",
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


# --- Full mmcv with its compiled ops into an environment: ``ddetr-mm install-ops`` ---

# Runs in the environment; -I is not used, since PYTHONPATH says which mmcv is tried out.
_TRY_OUT = """
import sys
import torch, mmcv._ext
from mmcv.ops import get_compiling_cuda_version, nms
boxes = torch.tensor([[0., 0., 10., 10.], [1., 1., 11., 11.], [20., 20., 30., 30.]])
kept = nms(boxes, torch.tensor([.9, .8, .7]), .5)[1].tolist()
if kept != [0, 2]:
    sys.exit(f"nms kept {kept} of three boxes instead of [0, 2]")
if sys.argv[1] == "cuda":
    if get_compiling_cuda_version() == "not available":
        sys.exit("the ops were compiled without CUDA")
    if torch.cuda.is_available():
        kept = nms(boxes.cuda(), torch.tensor([.9, .8, .7]).cuda(), .5)[1].tolist()
        if kept != [0, 2]:
            sys.exit(f"nms on the GPU kept {kept} of three boxes instead of [0, 2]")
print(mmcv._ext.__file__)
"""


def install_ops(
    python: Path | None = None,
    force_cuda: bool | None = None,
    jobs: int | None = None,
    echo: Echo = print,
) -> Path:
    """Give an environment mmcv with its compiled ops, from a wheel built before or a fresh build.

    Args:
        python: the environment's interpreter; by default the running one.
        force_cuda: build CUDA ops (True) or CPU ops (False); None takes CUDA where there is a GPU, or as
            the variable ``FORCE_CUDA`` says.
        jobs: compiler processes at a time.
        echo: takes one line for the user at a time.

    Returns:
        The compiled extension module in the environment.

    Raises:
        StackError: no compiler, no matching CUDA toolkit, a failed download or build, or an environment
            that cannot be written to or has the fork onedl-mmcv. mmcv-lite, where it was, still works then.
    """
    python = Path(python or sys.executable)
    environment = probe(python)
    target = choose_target(environment, force_cuda)
    there = _tried_out(python, target)
    if there:
        echo(f"mmcv has its compiled ops already: {there}")
        return there
    installer = _installer(python)
    site_packages = Path(environment.site_packages)
    refuse_fork(site_packages)
    with _staging_folder(site_packages) as staging:
        wheel = _first_that_works(python, target, installer, staging, echo)
        if wheel is None:
            with tempfile.TemporaryDirectory(prefix="ddetr_mm-ops-") as folder:
                workshop = Workshop(python, environment, target, Path(folder), installer, echo)
                wheel = build_wheel(workshop, cache_folder() / target.key, jobs)
            _stage(wheel, installer, staging)
            reason = _why_it_fails(python, target, staging)
            if reason:
                raise StackError(Problem(f"was built, but does not work: {reason}", file=wheel))
        swap_in(staging, site_packages)
    echo(f"installed {wheel.name} with {'CUDA' if target.cuda else 'CPU'} ops into {site_packages}")
    installed = _tried_out(python, target)
    if installed is None:
        raise StackError(Problem("was installed, but is not the mmcv that Python imports", file=wheel))
    return installed


def _first_that_works(
    python: Path, target: Target, installer: tuple[str, ...], staging: Path, echo: Echo
) -> Path | None:
    """Stage the first wheel at hand that works with this torch; None where there is none."""
    for wheel in candidates(target):
        _stage(wheel, installer, staging)
        reason = _why_it_fails(python, target, staging)
        if not reason:
            echo(f"using {wheel}")
            return wheel
        echo(f"passing over {wheel}: {reason}")
    return None


def _stage(wheel: Path, installer: tuple[str, ...], staging: Path) -> None:
    """Install a wheel into the empty staging folder."""
    for path in staging.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    command = [*installer, "--quiet", "--no-deps", "--target", str(staging), str(wheel)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if answer.returncode != 0:
        raise StackError(Problem(f"cannot be installed: {answer.stderr.strip()[-300:]}", file=wheel))


def _why_it_fails(python: Path, target: Target, folder: Path | None) -> str | None:
    """Why the mmcv in ``folder`` (None: the environment's own) does not do; None when it does."""
    answer = _try_out(python, target, folder)
    if answer.returncode == 0:
        return None
    return (answer.stderr.strip().splitlines() or [f"exit status {answer.returncode}"])[-1][:300]


def _tried_out(python: Path, target: Target) -> Path | None:
    """The environment's own compiled extension, when it has one that works."""
    answer = _try_out(python, target, None)
    return Path(answer.stdout.splitlines()[-1]) if answer.returncode == 0 else None


def _try_out(python: Path, target: Target, folder: Path | None) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if folder:
        variables["PYTHONPATH"] = str(folder)
    kind = "cuda" if target.cuda else "cpu"
    with tempfile.TemporaryDirectory() as elsewhere:  # a folder named mmcv here must not be imported
        return subprocess.run(
            [python, "-c", _TRY_OUT, kind],
            capture_output=True,
            text=True,
            check=False,
            env=variables,
            cwd=elsewhere,
            stdin=subprocess.DEVNULL,
        )


@contextmanager
def _staging_folder(site_packages: Path) -> Iterator[Path]:
    """An empty folder on the file system of the environment, removed in the end.

    Raises:
        StackError: the environment cannot be written to.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=".ddetr_mm-ops-", dir=site_packages))
    except OSError as error:
        raise StackError(
            Problem(
                f"cannot be written to: {error.strerror}",
                file=site_packages,
                hint="use a virtual environment of your own",
            )
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def refuse_fork(site_packages: Path) -> None:
    """Refuse to put mmcv over its fork, which has files of the same names and an mmdet of its own.

    Raises:
        StackError: onedl-mmcv is installed there.
    """
    for found in site_packages.glob("onedl_mmcv-*.dist-info"):
        raise StackError(
            Problem(
                "onedl-mmcv is installed, and mmcv would overwrite it",
                file=found,
                hint="use an environment with mmcv-lite==2.1.0 and mmdet==3.3.0, or build the ops of "
                "onedl-mmcv as its own documentation tells",
            )
        )


def swap_in(staging: Path, site_packages: Path) -> None:
    """Let the staged mmcv take the place of the installed mmcv or mmcv-lite, by renaming.

    When a rename fails, those done are undone.

    Args:
        staging: holds ``mmcv`` and its ``.dist-info`` folder; on the same file system.
        site_packages: where they go.

    Raises:
        StackError: a rename fails.
    """
    outgoing = [site_packages / "mmcv", *site_packages.glob("mmcv-*.dist-info")]
    outgoing += list(site_packages.glob("mmcv_lite-*.dist-info"))
    retired = staging / "retired"
    retired.mkdir()
    moves = [(path, retired / path.name) for path in outgoing if path.exists()]
    incoming = [staging / "mmcv", *staging.glob("mmcv-*.dist-info")]
    moves += [(path, site_packages / path.name) for path in incoming]
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in moves:
            source.rename(destination)
            done.append((source, destination))
    except OSError as error:
        for source, destination in reversed(done):
            destination.rename(source)
        raise StackError(
            Problem(f"mmcv cannot be replaced: {error.strerror}", file=error.filename)
        ) from error


def _installer(python: Path, variables: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The start of a command that installs packages for ``python``: with uv, or its own pip.

    Raises:
        StackError: there is neither.
    """
    uv = shutil.which("uv", path=variables.get("PATH"))
    ours = cache_folder(variables).parent / "uv" / "bin" / "uv"  # put there by the project's set-up
    if not uv and ours.is_file():
        uv = str(ours)
    if uv:
        return (uv, "pip", "install", "--python", str(python))
    answer = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False)
    if answer.returncode == 0:
        return (str(python), "-m", "pip", "install", "--disable-pip-version-check")
    raise StackError(
        Problem(
            "the environment has neither pip nor uv", file=python, hint="run: python -m ensurepip --upgrade"
        )
    )
