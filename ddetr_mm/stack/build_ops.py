"""Full mmcv with its compiled ops into an environment: ``ddetr-mm install-ops``.

mmcv and mmcv-lite give the same module ``mmcv``, so the one replaces the other. The new one is
installed beside the environment's packages and tried out there first; then the two change places by
renaming. Whatever fails before that leaves the environment as it was.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ddetr_mm.errors import Problem, StackError
from ddetr_mm.stack.ops_compile import Echo, Workshop, build_wheel
from ddetr_mm.stack.ops_target import Target, choose_target, probe
from ddetr_mm.stack.ops_wheels import cache_folder, candidates

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
                mend="use a virtual environment of your own",
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
                mend="use an environment with mmcv-lite==2.1.0 and mmdet==3.3.0, or build the ops of "
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
            "the environment has neither pip nor uv", file=python, mend="run: python -m ensurepip --upgrade"
        )
    )
