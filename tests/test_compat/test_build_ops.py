import os
import shutil
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from ddetr_mm.compat import install_ops
from ddetr_mm.compat.mmcv_ops import has_compiled_ops
from ddetr_mm.errors import StackError


def package(folder, name, version, text):
    """An installed package ``mmcv`` of a distribution."""
    (folder / "mmcv").mkdir(parents=True)
    (folder / "mmcv" / "__init__.py").write_text(text, encoding="utf-8")
    (folder / f"{name}-{version}.dist-info").mkdir()


def content(folder):
    return sorted(path.name for path in folder.iterdir()), (folder / "mmcv" / "__init__.py").read_text(
        "utf-8"
    )


@pytest.fixture
def site_packages(tmp_path):
    folder = tmp_path / "site-packages"
    package(folder, "mmcv_lite", "2.1.0", "lite")
    return folder


def test_full_mmcv_takes_the_place_of_the_lite_one(site_packages):
    staging = site_packages / ".staging"
    package(staging, "mmcv", "2.1.0", "full")
    install_ops.swap_in(staging, site_packages)
    shutil.rmtree(staging)
    assert content(site_packages) == (["mmcv", "mmcv-2.1.0.dist-info"], "full")


def test_a_fork_is_not_overwritten(tmp_path, site_packages):
    assert install_ops.refuse_fork(site_packages) is None
    package(tmp_path / "fork", "onedl_mmcv", "2.3.6", "fork")
    with pytest.raises(StackError, match="onedl-mmcv is installed"):
        install_ops.refuse_fork(tmp_path / "fork")


def test_full_mmcv_goes_where_there_was_none(tmp_path):
    package(tmp_path / "staging", "mmcv", "2.1.0", "full")
    (tmp_path / "site").mkdir()
    install_ops.swap_in(tmp_path / "staging", tmp_path / "site")
    assert content(tmp_path / "site") == (["mmcv", "mmcv-2.1.0.dist-info"], "full")


def test_swap_that_fails_half_way_is_undone(site_packages, monkeypatch):
    staging = site_packages / ".staging"
    package(staging, "mmcv", "2.1.0", "full")
    rename = Path.rename

    def fail_at_the_last(path, target):
        if path.name == "mmcv-2.1.0.dist-info":
            raise OSError(28, "No space left on device", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_last)
    with pytest.raises(StackError, match="cannot be replaced: No space left"):
        install_ops.swap_in(staging, site_packages)
    monkeypatch.undo()
    shutil.rmtree(staging)
    assert content(site_packages) == (["mmcv", "mmcv_lite-2.1.0.dist-info"], "lite")


@pytest.mark.skipif(has_compiled_ops(), reason="mmcv has its compiled ops here")
@pytest.mark.skipif(
    "mmcv-lite" not in packages_distributions()["mmcv"], reason="another mmcv is refused first"
)
def test_wheel_that_does_not_work_leaves_the_environment_as_it_was(tmp_path, monkeypatch):
    """The whole way with a broken wheel and no compiler: one message, mmcv-lite untouched."""
    import mmcv

    before = sorted(path.name for path in Path(mmcv.__file__).parent.parent.iterdir())
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheel = tmp_path / f"mmcv-2.1.0-{tag}-{tag}-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("mmcv/__init__.py", "raise ImportError('built for another torch')")
        file.writestr("mmcv-2.1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: mmcv\nVersion: 2.1.0\n")
        file.writestr(
            "mmcv-2.1.0.dist-info/WHEEL",
            f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}-{tag}-linux_x86_64\n",
        )
        file.writestr("mmcv-2.1.0.dist-info/RECORD", "")
    installer = install_ops._installer(Path(sys.executable))
    monkeypatch.setattr(install_ops, "_installer", lambda python: installer)
    monkeypatch.setattr(install_ops, "candidates", lambda target: iter([wheel]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("FORCE_CUDA", "0")
    lines = []
    with pytest.raises(StackError, match="no-compiler is not there.*apt-get install g"):
        install_ops.install_ops(echo=lines.append)
    assert any("passing over" in line and "built for another torch" in line for line in lines)
    assert sorted(path.name for path in Path(mmcv.__file__).parent.parent.iterdir()) == before


def test_environment_without_pip_and_uv_is_told(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n', encoding="utf-8")
    bare.chmod(0o755)
    with pytest.raises(StackError, match="neither pip nor uv.*ensurepip"):
        install_ops._installer(bare, {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)})


def test_uv_is_preferred_and_found_in_our_cache(tmp_path):
    uv = tmp_path / "ddetr_mm" / "uv" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text("", encoding="utf-8")
    command = install_ops._installer(Path("python"), {"PATH": "", "XDG_CACHE_HOME": str(tmp_path)})
    assert command == (str(uv), "pip", "install", "--python", "python")


@pytest.mark.full_ops
def test_compiled_ops_that_are_there_are_kept():
    lines = []
    extension = install_ops.install_ops(force_cuda=False, echo=lines.append)
    assert extension.name.startswith("_ext") and extension.is_file()
    assert len(lines) == 1 and "already" in lines[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_build_from_source(tmp_path):
    """The real build, for minutes: the wheel holds the extension."""
    python = Path(sys.executable)
    environment = install_ops.probe(python)
    target = install_ops.choose_target(environment, force_cuda=False)
    folder = tmp_path / "work"
    folder.mkdir()
    workshop = install_ops.Workshop(
        python, environment, target, folder, install_ops._installer(python), print
    )
    wheel = install_ops.build_wheel(workshop, tmp_path / "cache", jobs=os.cpu_count())
    with zipfile.ZipFile(wheel) as file:
        assert any(name.startswith("mmcv/_ext.") for name in file.namelist())
