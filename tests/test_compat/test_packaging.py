"""What ``pip install .`` installs."""

import email
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
if not (REPO / "pyproject.toml").is_file():
    pytest.skip("this is no checkout", allow_module_level=True)


CARRIED = ("configs", "tools", "model-index.yml")
NEEDS_THE_REPOSITORY = {"tools/audit.py", "tools/fields_table.py"}


def run_hook(folder, call):
    """Call one of setuptools' build hooks in a folder, as pip does; returns the file it names, in ``out``."""
    (folder / "out").mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.{call})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True
    )
    return folder / "out" / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources, with folders beside the package as a checkout has them."""
    folder = tmp_path_factory.mktemp("source")
    unwanted = shutil.ignore_patterns("__pycache__", ".mim")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "ddetr_mm", *CARRIED):
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, folder / name, ignore=unwanted)
        else:
            shutil.copy(REPO / name, folder)
    for name in ("tests/test_x.py", "projects/shapes/demo.py", "benchmarks/__init__.py"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def wheel_path(source, tmp_path_factory):
    """The wheel, built from the unpacked sdist: so the sdist holds all that it takes."""
    unpacked = tmp_path_factory.mktemp("sdist")
    shutil.unpack_archive(run_hook(source, "build_sdist('out')"), unpacked)
    (folder,) = unpacked.iterdir()
    return run_hook(folder, "build_wheel('out')")


@pytest.fixture(scope="module")
def wheel(wheel_path):
    with zipfile.ZipFile(wheel_path) as file:
        yield file


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = wheel.namelist()
    assert {name.partition("/")[0] for name in names} == {"ddetr_mm", "ddetr_mm-0.1.0.dist-info"}
    assert "ddetr_mm/py.typed" in names
    sources = {path.relative_to(REPO).as_posix() for path in (REPO / "ddetr_mm").rglob("*.py")}
    carried = {name for name in names if name.startswith("ddetr_mm/.mim/")}
    assert {name for name in names if name.endswith(".py")} - carried == sources


def test_wheel_carries_configs_tools_and_the_index(wheel):
    tracked = subprocess.run(
        ["git", "ls-files", *CARRIED], cwd=REPO, capture_output=True, text=True, check=False
    ).stdout.split()
    if not tracked:
        pytest.skip("git does not know these files")
    expected = {
        name for name in tracked if name not in NEEDS_THE_REPOSITORY and not name.startswith("tools/env/")
    }
    prefix = "ddetr_mm/.mim/"
    assert {name[len(prefix) :] for name in wheel.namelist() if name.startswith(prefix)} == expected
    for name in expected:
        assert wheel.read(prefix + name) == (REPO / name).read_bytes()


INHERITING = """
_base_ = "ddetr_mm::deformable_detr/deformable-detr-refine_r50_8xb4-50e_coco.py"
model = dict(num_queries=77)
"""
READ_CONFIGS = """
import json, sys, warnings
warnings.simplefilter("ignore")
import ddetr_mm
from ddetr_mm.compat.patches import find_our_configs  # one of the patches of `import ddetr_mm.register`
from mmengine.config import Config
find_our_configs()
inherited = Config.fromfile("mine.py").model
assert inherited.num_queries == 77 and inherited.with_box_refine, inherited
found = {}
if sys.argv[1:]:
    from mmengine.hub import get_config
    found = {name: get_config(f"ddetr_mm::{name}")._filename for name in sys.argv[1:]}
print(json.dumps([ddetr_mm.__file__, found]))
"""


def read_configs(folder, names, *import_from):
    """What a Python of its own finds under ``ddetr_mm::`` when the package comes from ``import_from``."""
    (folder / "mine.py").write_text(INHERITING, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", READ_CONFIGS, *names],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, import_from))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def site(wheel_path, tmp_path_factory):
    """A folder with the installed wheel."""
    folder = tmp_path_factory.mktemp("site")
    shutil.unpack_archive(wheel_path, folder, "zip")
    return folder


def test_a_config_inherits_from_an_installed_wheel(site, tmp_path):
    package, _ = read_configs(tmp_path, [], site)
    assert Path(package) == site / "ddetr_mm" / "__init__.py"


RUN_FROM = "import ddetr_mm, sys; assert ddetr_mm.__file__.startswith(sys.argv.pop(1)), ddetr_mm.__file__; "


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        ("from ddetr_mm.cli import main; sys.exit(main())", ["spec", "train"], "num_queries: 300"),
        ("from ddetr_mm.cli import main; sys.exit(main())", ["train", "-h"], "results_dir"),
        # What `mim train ddetr_mm` and `mim test ddetr_mm` start.
        ("import runpy; runpy.run_path({mim}/'train.py', run_name='__main__')", ["-h"], "--amp"),
        ("import runpy; runpy.run_path({mim}/'test.py', run_name='__main__')", ["-h"], "checkpoint"),
    ],
)
def test_commands_of_an_installed_wheel_outside_the_checkout(site, tmp_path, code, arguments, said):
    code = code.replace("{mim}/", f"{str(site / 'ddetr_mm' / '.mim' / 'tools')!r} + '/' + ")
    done = subprocess.run(
        [sys.executable, "-c", RUN_FROM + code, str(site), *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert said in done.stdout


@pytest.mark.slow
def test_get_config_finds_every_recipe_of_an_installed_wheel(site, tmp_path):
    mim = site / "ddetr_mm" / ".mim"
    names = [
        model["Config"].partition("/")[2]
        for file in yaml.safe_load((mim / "model-index.yml").read_text())["Import"]
        for model in yaml.safe_load((mim / file).read_text())["Models"]
    ]
    assert len(names) >= 6
    _, found = read_configs(tmp_path, names, site)
    assert found == {name: str(mim / "configs" / name) for name in names}


def test_editable_install_links_to_the_sources(source, tmp_path):
    for _ in range(2):  # the second finds the links
        editable = run_hook(source, "build_editable('out', {'editable_mode': 'compat'})")
    side = tmp_path / "site"
    with zipfile.ZipFile(editable) as file:
        assert not [name for name in file.namelist() if ".mim" in name]
        file.extractall(side)
    for name in CARRIED:
        link = source / "ddetr_mm" / ".mim" / name
        assert link.is_symlink() and link.samefile(source / name)
    (pth,) = side.glob("*.pth")
    assert pth.read_text().strip() == str(source)
    # The metadata lie in one folder and the package in another, as after `pip install -e .`.
    package, _ = read_configs(tmp_path, [], side, source)
    assert Path(package) == source / "ddetr_mm" / "__init__.py"


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
