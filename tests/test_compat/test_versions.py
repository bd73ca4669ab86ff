import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement as PackagingRequirement
from packaging.specifiers import SpecifierSet

from ddetr_mm.compat import versions
from ddetr_mm.errors import StackError

REPO = Path(__file__).resolve().parents[2]
GOOD = {
    "torch": "2.14.1",
    "torchvision": "0.29.1",
    "mmengine": "0.10.7",
    "mmdet": "3.3.0",
    "mmcv-lite": "2.1.0",
}


def looking_up(installed):
    """A look-up of versions in a dict, with importlib.metadata's own error."""

    def version_of(name):
        try:
            return installed[name]
        except KeyError:
            raise importlib.metadata.PackageNotFoundError(name) from None

    return version_of


def error_message(installed):
    with pytest.raises(versions.StackImportError) as caught:
        versions.check_versions(looking_up(installed))
    return str(caught.value)


@pytest.fixture
def torchvision_for(monkeypatch):
    """Sets the torch that torchvision's metadata names."""

    def set_to(requirement):
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy", requirement])

    set_to("torch==2.14.1")
    return set_to


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"torch": "2.14.1+cu130"},
        {"torch": "2.14.0a0+gitabc"},
        {"mmcv-lite": None, "mmcv": "2.1.0"},
        {"mmengine": None, "onedl-mmengine": "0.10.12"},
        {"mmdet": None, "onedl-mmdetection": "3.5.1", "mmcv-lite": None, "onedl-mmcv": "2.3.6"},
    ],
)
def test_versions_that_fit_pass(changed, torchvision_for):
    installed = {name: version for name, version in {**GOOD, **changed}.items() if version}
    assert versions.check_versions(looking_up(installed)) is None


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"torch": None}, ["torch is not installed", "pip install torch torchvision"]),
        ({"mmcv-lite": None}, ["mmcv is not installed", "pip install mmcv-lite==2.1.0"]),
        ({"mmcv": "2.1.0"}, ["mmcv and mmcv-lite are both installed", "pip uninstall -y mmcv mmcv-lite"]),
        (
            {"mmcv-lite": None, "mmcv": "2.2.0"},
            ["mmcv 2.2.0 does not fit", "<2.2", "pip install 'mmcv>=2.0,<2.2'"],
        ),
        (
            {"onedl-mmdetection": "3.5.1"},
            ["mmdet and onedl-mmdetection are both installed", "pip uninstall -y mmdet onedl-mmdetection"],
        ),
        (
            {"mmengine": None, "onedl-mmengine": "1.0.0"},
            ["onedl-mmengine 1.0.0 does not fit", "pip install 'onedl-mmengine>=0.10.7,<1'"],
        ),
        ({"mmengine": "0.10.4"}, ["mmengine 0.10.4 does not fit", "pip install mmengine==0.10.7"]),
        ({"mmdet": "2.28.2"}, ["mmdet 2.28.2 does not fit", "pip install mmdet==3.3.0"]),
        ({"torch": "2.1.0"}, ["torch 2.1.0 does not fit", ">=2.6"]),
    ],
)
def test_what_does_not_fit_is_reported_with_the_command(changed, parts, torchvision_for):
    installed = {name: version for name, version in {**GOOD, **changed}.items() if version}
    message = error_message(installed)
    for part in parts:
        assert part in message


def test_all_missing_packages_are_reported_at_once():
    assert len(error_message({}).splitlines()) == len(versions.REQUIREMENTS)


def test_torchvision_for_another_torch_is_reported(torchvision_for):
    torchvision_for("torch==2.11.0")
    message = error_message(GOOD)
    assert "torchvision 0.29.1 was built for torch 2.11.0" in message
    assert "pip install torch==2.14.1 torchvision" in message


def test_error_is_an_import_error_and_wrong_input():
    error = versions.StackImportError("x")
    assert isinstance(error, ImportError) and isinstance(error, StackError)
    assert error.exit_status == 2


@pytest.mark.parametrize(
    ("version", "allowed", "expected"),
    [
        ("2.6.0a0+ecf3bae40a.nv25.01", ">=2.6", True),  # torch of NVIDIA's containers
        ("2.14.1+cu130", ">=2.6", True),
        ("2.10", ">=2.6", True),
        ("2.2.0rc1", ">=2.0,<2.2", False),
        ("3.3", ">=3.3,<3.4", True),
        ("3.4.0", ">=3.3,<3.4", False),
    ],
)
def test_range(version, allowed, expected):
    assert versions.fits(version, allowed) is expected


def test_ranges_are_those_of_the_package_metadata():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {}
    for line in project["dependencies"]:
        requirement = PackagingRequirement(line)
        declared[requirement.name] = requirement.specifier
    assert "mmcv" not in declared and "mmcv-lite" not in declared
    for requirement in versions.REQUIREMENTS:
        if requirement.module != "mmcv":
            assert declared[requirement.module] == SpecifierSet(requirement.distributions[requirement.module])


def run_python(*arguments, **variables):
    environment = {**os.environ, "PYTHONPATH": str(REPO), **variables}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False
    )


def test_import_is_light():
    code = "import ddetr_mm, sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = run_python("-c", code).stdout.split()
    assert "ddetr_mm" in loaded
    assert not {"torch", "torchvision", "numpy", "mmengine", "mmcv", "mmdet"} & set(loaded)


def test_import_without_the_stack_names_every_command():
    # -S leaves site-packages out: an environment with nothing in it.
    answer = run_python("-S", "-c", "import ddetr_mm")
    assert answer.returncode == 1
    assert "StackImportError" in answer.stderr
    for package in ("torch torchvision", "mmengine==0.10.7", "mmdet==3.3.0", "mmcv-lite==2.1.0"):
        assert f"pip install {package}" in answer.stderr


def test_command_line_answers_help_without_the_stack():
    pytest.importorskip("ddetr_mm.cli")
    answer = run_python("-S", "-m", "ddetr_mm", "-h")
    assert answer.returncode == 0
    assert "install-ops" in answer.stdout


def test_deferred_error_is_raised_on_request():
    code = (
        "import sys; sys.argv = ['/usr/bin/ddetr-mm']\n"
        "import ddetr_mm\n"
        "from ddetr_mm.compat import versions\n"
        "try: versions.raise_deferred()\n"
        "except ImportError as error: print('deferred:', type(error).__name__)\n"
    )
    assert run_python("-S", "-c", code).stdout.strip() == "deferred: StackImportError"
