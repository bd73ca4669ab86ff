"""What ``pip install .`` installs."""

import email
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
if not (REPO / "pyproject.toml").is_file():
    pytest.skip("this is no checkout", allow_module_level=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the sources, with folders beside the package as a checkout has them."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    shutil.copytree(REPO / "ddetr_mm", source / "ddetr_mm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests/test_x.py", "projects/shapes/demo.py", "benchmarks/__init__.py", "tools/train.py"):
        (source / name).parent.mkdir(parents=True)
        (source / name).write_text("", encoding="utf-8")
    hook = "from setuptools import build_meta; print(build_meta.build_wheel('out'))"
    (source / "out").mkdir()
    subprocess.run([sys.executable, "-c", hook], cwd=source, check=True, capture_output=True)
    (built,) = (source / "out").glob("*.whl")
    with zipfile.ZipFile(built) as file:
        yield file


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = wheel.namelist()
    assert {name.partition("/")[0] for name in names} == {"ddetr_mm", "ddetr_mm-0.1.0.dist-info"}
    assert {"ddetr_mm/py.typed", "ddetr_mm/stack/cxx_with_header.sh"} <= set(names)
    sources = {path.relative_to(REPO).as_posix() for path in (REPO / "ddetr_mm").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_metadata(wheel):
    text = wheel.read("ddetr_mm-0.1.0.dist-info/METADATA").decode()
    metadata = email.message_from_string(text)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    required = [line.split(";")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert not any(line.startswith("mmcv") for line in required)
    assert any(line.startswith("mmdet<3.4,>=3.3") for line in required)
    entry_points = wheel.read("ddetr_mm-0.1.0.dist-info/entry_points.txt").decode()
    assert "ddetr-mm = ddetr_mm.cli:main" in entry_points


def test_version_is_the_packages(wheel):
    import ddetr_mm

    assert ddetr_mm.__version__ == "0.1.0"
    assert "Version: 0.1.0\n" in wheel.read("ddetr_mm-0.1.0.dist-info/METADATA").decode()
