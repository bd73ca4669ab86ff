"""What ``ddetr-mm install-ops`` chooses and reports; only the slow test compiles."""

import os
import shutil
import sys
import tarfile
import zipfile
from argparse import Namespace
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from ddetr_mm.compat import install_ops
from ddetr_mm.compat.mmcv_ops import has_compiled_ops
from ddetr_mm.errors import StackError

TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
WHEEL = f"mmcv-2.1.0-{TAG}-{TAG}-linux_x86_64.whl"


def executable(path, text="#!/bin/sh\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


# --- choices ---


@pytest.mark.parametrize(
    ("torch_cuda", "has_gpu", "forced", "expected"),
    [
        ("13.0", True, None, True),
        ("13.0", False, None, False),
        ("13.0", True, "0", False),
        ("13.0", False, "1", True),
        (None, False, None, False),
        (None, True, None, False),  # a GPU of another maker
    ],
)
def test_cuda_is_built_for_a_gpu_or_on_request(torch_cuda, has_gpu, forced, expected):
    variables = {"FORCE_CUDA": forced} if forced else {}
    assert install_ops.wants_cuda(torch_cuda, has_gpu, variables) is expected


def test_cuda_ops_for_a_cpu_build_of_torch_are_refused():
    with pytest.raises(StackError, match="FORCE_CUDA=1, but torch is a build without CUDA"):
        install_ops.wants_cuda(None, False, {"FORCE_CUDA": "1"})


def test_users_wheels_come_before_the_cache(tmp_path):
    mine, cache = tmp_path / "mine", tmp_path / "cache"
    wheels = [mine / "a" / WHEEL, mine / "b" / "c" / WHEEL, cache / WHEEL]
    others = [mine / WHEEL.replace(TAG, "cp27"), mine / WHEEL.replace("2.1.0", "2.0.1")]
    for path in wheels + others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert list(install_ops.candidates(cache, {"DDETR_MM_WHEELS": str(mine)})) == wheels
    assert list(install_ops.candidates(cache, {})) == wheels[2:]
    assert list(install_ops.candidates(tmp_path / "none", {})) == []


def test_missing_folder_of_wheels_is_an_error(tmp_path):
    with pytest.raises(StackError, match="gone: DDETR_MM_WHEELS: is not a folder"):
        list(install_ops.candidates(tmp_path, {"DDETR_MM_WHEELS": str(tmp_path / "gone")}))


@pytest.fixture
def bare_python(tmp_path, monkeypatch):
    """Makes ``sys.executable`` a Python without packages."""
    path = executable(tmp_path / "bare" / "python", f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    monkeypatch.setattr(sys, "executable", str(path))
    return path


@pytest.mark.parametrize("place", ["path", "cache"])
def test_uv_installs_where_pip_is_missing(place, tmp_path, bare_python):
    folder = tmp_path / "bin" if place == "path" else tmp_path / "ddetr_mm" / "uv" / "bin"
    uv = executable(folder / "uv")
    variables = {"PATH": str(tmp_path / "bin"), "XDG_CACHE_HOME": str(tmp_path)}
    command = install_ops.find_installer(variables)
    assert command == [str(uv), "pip", "install", "--python", str(bare_python)]


def test_environment_without_pip_and_uv_is_reported(tmp_path, bare_python):
    with pytest.raises(StackError, match="neither pip nor uv.*ensurepip"):
        install_ops.find_installer({"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)})


# --- what a build needs ---


@pytest.mark.parametrize(
    ("variables", "header", "message"),
    [
        ({}, True, r"no C\+\+ compiler \(g\+\+, c\+\+, clang\+\+\).*apt-get install g\+\+"),
        ({"CXX": "icpx"}, True, r"no C\+\+ compiler \(icpx\)"),
        ({"CXX": "my-cxx"}, False, "Python.h: Python's C headers are missing.*python3-dev"),
    ],
)
def test_missing_compiler_and_headers_are_reported(tmp_path, variables, header, message):
    executable(tmp_path / "my-cxx")
    if header:
        (tmp_path / "Python.h").write_text("", encoding="utf-8")
    with pytest.raises(StackError, match=message):
        install_ops.check_compiler(tmp_path, {"PATH": str(tmp_path), **variables})


def test_compiler_on_path_is_enough(tmp_path):
    executable(tmp_path / "clang++")
    (tmp_path / "Python.h").write_text("", encoding="utf-8")
    assert install_ops.check_compiler(tmp_path, {"PATH": str(tmp_path)}) is None


@pytest.mark.parametrize(("version", "fits"), [("13.0", True), ("13.2", True), ("12.8", False)])
def test_toolkit_must_be_of_torchs_major_version(tmp_path, version, fits):
    report = f"Cuda compilation tools, release {version}, V{version}.88"
    executable(tmp_path / "bin" / "nvcc", f'#!/bin/sh\necho "{report}"\n')
    variables = {"CUDA_HOME": str(tmp_path)}
    if fits:
        assert install_ops.find_toolkit("13.0", variables) == tmp_path
    else:
        with pytest.raises(
            StackError, match=r"nvcc: is not of torch's CUDA 13.0: release 12.8.*FORCE_CUDA=0"
        ):
            install_ops.find_toolkit("13.0", variables)


def test_missing_toolkit_is_reported(tmp_path):
    with pytest.raises(StackError, match="nvcc: .*CUDA 13.0: cannot be started: No such file.*set CUDA_HOME"):
        install_ops.find_toolkit("13.0", {"CUDA_HOME": str(tmp_path)})


def test_variables_of_a_cpu_build(tmp_path, monkeypatch):
    monkeypatch.setenv("CFLAGS", "-march=x86-64-v3")
    variables = install_ops.build_variables(tmp_path / "tools", None, 3)
    assert variables["MMCV_WITH_OPS"] == "1" and variables["FORCE_CUDA"] == "0"
    assert variables["CUDA_VISIBLE_DEVICES"] == ""
    assert variables["CFLAGS"] == "-march=x86-64-v3 -g0 -O2 -w"
    assert variables["MAX_JOBS"] == "3"
    assert variables["PATH"].startswith(f"{tmp_path}/tools/bin{os.pathsep}")


@pytest.mark.parametrize("asked", [None, "8.6"])
def test_variables_of_a_cuda_build(tmp_path, monkeypatch, asked):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(install_ops.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if asked:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    headers = tmp_path / "nvidia" / "cu13" / "include"
    headers.mkdir(parents=True)
    variables = install_ops.build_variables(tmp_path / "tools", Path("/opt/cuda"), 1)
    assert variables["FORCE_CUDA"] == "1" and variables["CUDA_HOME"] == "/opt/cuda"
    assert variables["TORCH_CUDA_ARCH_LIST"] == (asked or install_ops.DEFAULT_ARCHITECTURES)
    assert variables["CPATH"].split(os.pathsep)[0] == str(headers)
    assert variables.get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        ("202002L", "a = ['-std=c++20']\nb = ['/std:c++20', '-std=c++14']  # c++17x\n"),
        ("201703L", "a = ['-std=c++17']\nb = ['/std:c++17', '-std=c++14']  # c++17x\n"),
    ],
)
def test_standard_is_the_one_torchs_headers_ask_for(tmp_path, least, expected):
    setup = tmp_path / "setup.py"
    setup.write_text("a = ['-std=c++17']\nb = ['/std:c++17', '-std=c++14']  # c++17x\n", encoding="utf-8")
    header = tmp_path / "include/torch/csrc/api/include/torch/all.h"
    header.parent.mkdir(parents=True)
    header.write_text(f"#if !defined(_MSC_VER) && __cplusplus < {least}\n#error\n#endif\n", encoding="utf-8")
    install_ops.set_standard(setup, tmp_path)
    assert setup.read_text(encoding="utf-8") == expected


def test_torch_without_headers_is_reported(tmp_path):
    with pytest.raises(StackError, match="all.h: torch's C\\+\\+ headers are missing"):
        install_ops.set_standard(tmp_path / "setup.py", tmp_path)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("g++ a.cpp\na.cpp:3:1: error: no type\nmake: *** [a.o] Error 1\n", "a.cpp:3:1: error: no type"),
        ("ERROR: Could not find a version\nWARNING: old pip\n", "ERROR: Could not find a version"),
        (
            "Traceback\nModuleNotFoundError: No module named 'torch'\nend",
            "ModuleNotFoundError: No module named 'torch'",
        ),
        ("one\n\ntwo\n\n", "two"),
        ("", "no output"),
    ],
)
def test_first_error_of_an_output(output, expected):
    assert install_ops.first_error(output) == expected


# --- the build, with a pip that compiles nothing ---

INSTALLER = """
import pathlib, sys
tools = pathlib.Path(sys.argv[sys.argv.index("--target") + 1])
tools.mkdir()
(tools / "pip").mkdir()
(tools / "pip" / "__init__.py").touch()
(tools / "pip" / "__main__.py").write_text(pathlib.Path({pip!r}).read_text())
"""
PIP = """
import os, pathlib, shutil, sys
command = next(word for word in sys.argv if word in ("download", "wheel"))
if os.environ.get("FAILS") == command:
    sys.exit("nms.cpp:3:1: error: no type")
assert "--no-build-isolation" in sys.argv and os.environ["MMCV_WITH_OPS"] == "1"
if command == "download":
    assert sys.argv[-1] == "mmcv==2.1.0" and "--no-binary" in sys.argv
    shutil.copy({archive!r}, sys.argv[sys.argv.index("--dest") + 1])
else:
    setup = pathlib.Path(sys.argv[-1], "setup.py").read_text()
    pathlib.Path(sys.argv[sys.argv.index("--wheel-dir") + 1], {wheel!r}).write_text(setup)
"""


@pytest.fixture
def installer(tmp_path, monkeypatch):
    """An install command that provides a pip whose wheel holds the text of mmcv's ``setup.py``."""
    monkeypatch.setattr(install_ops, "check_compiler", lambda include: None)
    (tmp_path / "setup.py").write_text("print('mmcv')\n", encoding="utf-8")
    archive = tmp_path / "mmcv-2.1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "setup.py", "mmcv-2.1.0/setup.py")
    (tmp_path / "pip.py").write_text(PIP.format(archive=str(archive), wheel=WHEEL), encoding="utf-8")
    script = tmp_path / "installer.py"
    script.write_text(INSTALLER.format(pip=str(tmp_path / "pip.py")), encoding="utf-8")
    return [sys.executable, str(script)]


def test_wheel_and_log_are_put_into_the_cache(tmp_path, installer):
    lines = []
    wheel = install_ops.build_wheel(tmp_path / "cache", None, installer, 2, lines.append)
    assert wheel == tmp_path / "cache" / WHEEL
    assert wheel.read_text(encoding="utf-8") == "print('mmcv')\n"
    assert lines == [f"compiling CPU ops in 2 processes, for minutes; log: {wheel.parent / 'build.log'}"]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("install", "build.log: the build tools cannot be installed: .*no route"),
        ("download", "build.log: mmcv's source cannot be downloaded: nms.cpp:3:1: error: no type"),
        ("wheel", "build.log: mmcv's ops do not compile .*: nms.cpp:3:1: error: no type"),
    ],
)
def test_failed_step_is_one_message_that_names_the_log(tmp_path, installer, monkeypatch, step, message):
    monkeypatch.setenv("FAILS", step)
    if step == "install":
        installer = [sys.executable, "-c", "import sys; sys.exit('ERROR: no route to the index')"]
    with pytest.raises(StackError, match=message):
        install_ops.build_wheel(tmp_path / "cache", None, installer, 2, print)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["build.log"]


# --- replacing the installed mmcv ---


def package(folder, name, version, text):
    """An installed package ``mmcv`` of a distribution."""
    (folder / "mmcv").mkdir(parents=True)
    (folder / "mmcv" / "__init__.py").write_text(text, encoding="utf-8")
    (folder / f"{name}-{version}.dist-info").mkdir()


def content(folder):
    names = sorted(path.name for path in folder.iterdir())
    return names, (folder / "mmcv" / "__init__.py").read_text("utf-8")


@pytest.mark.parametrize("installed", [None, ("mmcv_lite", "2.1.0"), ("mmcv", "2.0.0")])
def test_staged_mmcv_replaces_the_installed_one(tmp_path, installed):
    site_packages = tmp_path / "site-packages"
    site_packages.mkdir()
    if installed:
        package(site_packages, *installed, "old")
    staging = site_packages / ".staging"
    package(staging, "mmcv", "2.1.0", "new")
    install_ops.swap_in(staging, site_packages)
    shutil.rmtree(staging)
    assert content(site_packages) == (["mmcv", "mmcv-2.1.0.dist-info"], "new")


@pytest.mark.parametrize("fails_at", range(4))
def test_failed_rename_undoes_the_others(tmp_path, monkeypatch, fails_at):
    site_packages = tmp_path / "site-packages"
    package(site_packages, "mmcv_lite", "2.1.0", "lite")
    staging = site_packages / ".staging"
    package(staging, "mmcv", "2.1.0", "full")
    rename, calls = Path.rename, []

    def fail_once(path, target):
        calls.append(path)
        if len(calls) == fails_at + 1:
            raise OSError(28, "No space left on device", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(StackError, match="cannot be replaced: No space left"):
        install_ops.swap_in(staging, site_packages)
    monkeypatch.undo()
    shutil.rmtree(staging)
    assert content(site_packages) == (["mmcv", "mmcv_lite-2.1.0.dist-info"], "lite")


def test_fork_is_not_overwritten(tmp_path):
    package(tmp_path, "onedl_mmcv", "2.3.6", "fork")
    with pytest.raises(StackError, match="onedl-mmcv is installed"):
        install_ops.refuse_fork(tmp_path)


@pytest.mark.skipif(has_compiled_ops(), reason="mmcv has its compiled ops here")
@pytest.mark.skipif("mmcv-lite" not in packages_distributions()["mmcv"], reason="onedl-mmcv is refused first")
def test_wheel_that_does_not_work_leaves_the_environment_as_it_was(tmp_path, monkeypatch):
    """The whole command with a broken wheel and no compiler: one message, mmcv-lite untouched."""
    import mmcv

    site_packages = Path(mmcv.__file__).parents[1]
    before = sorted(path.name for path in site_packages.iterdir())
    with zipfile.ZipFile(tmp_path / WHEEL, "w") as file:
        file.writestr("mmcv/__init__.py", "raise ImportError('built for another torch')")
        file.writestr("mmcv-2.1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: mmcv\nVersion: 2.1.0\n")
        file.writestr(
            "mmcv-2.1.0.dist-info/WHEEL",
            f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {TAG}-{TAG}-linux_x86_64\n",
        )
        file.writestr("mmcv-2.1.0.dist-info/RECORD", "")
    installer = install_ops.find_installer()
    monkeypatch.setattr(install_ops, "find_installer", lambda: installer)
    for name, value in {
        "DDETR_MM_WHEELS": tmp_path,
        "XDG_CACHE_HOME": tmp_path / "cache",
        "CXX": tmp_path / "no-compiler",
        "FORCE_CUDA": 0,
    }.items():
        monkeypatch.setenv(name, str(value))
    lines = []
    with pytest.raises(StackError, match="no C.. compiler .*no-compiler"):
        install_ops.run(Namespace(jobs=None), lines.append)
    assert lines == [f"{tmp_path / WHEEL} does not work here: ImportError: built for another torch"]
    assert sorted(path.name for path in site_packages.iterdir()) == before


@pytest.mark.full_ops
def test_working_ops_are_kept(monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "0")
    lines = []
    install_ops.run(Namespace(jobs=None), lines.append)
    assert lines == ["mmcv has its compiled ops already"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_build_from_source(tmp_path):
    """The real build, for minutes: the wheel holds the extension."""
    wheel = install_ops.build_wheel(tmp_path, None, install_ops.find_installer(), os.cpu_count(), print)
    with zipfile.ZipFile(wheel) as file:
        assert any(name.startswith("mmcv/_ext.") for name in file.namelist())
