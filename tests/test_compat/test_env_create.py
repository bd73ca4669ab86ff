"""The script that makes the environments (``tools/env/create.py``)."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "tools" / "env" / "create.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="this is no checkout")


@pytest.fixture
def create():
    spec = importlib.util.spec_from_file_location("env_create", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def env(tmp_path):
    """A folder that looks like an environment made with the running Python."""
    folder = tmp_path / "env"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    return folder


def version():
    return ".".join(map(str, sys.version_info[:3]))


def pins(stack):
    text = (REPO / "tools" / "env" / f"{stack}.txt").read_text(encoding="utf-8")
    return {
        line.split("==")[0]: line.split("==")[1].split(" ")[0] for line in text.splitlines() if "==" in line
    }


@pytest.mark.parametrize(
    ("stack", "torch", "torchvision"), [("torch2.14", "2.14.1", "0.29.1"), ("torch2.11", "2.11.0", "0.26.0")]
)
def test_pinned_sets(stack, torch, torchvision):
    pinned = pins(stack)
    assert (pinned["torch"], pinned["torchvision"]) == (torch, torchvision)
    assert (pinned["mmengine"], pinned["mmdet"], pinned["mmcv-lite"]) == ("0.10.7", "3.3.0", "2.1.0")
    assert pinned["mmdeploy"] == "1.3.1" and int(pinned["protobuf"].split(".")[0]) >= 5
    assert int(pinned["setuptools"].split(".")[0]) < 81
    # Never both of a pair that gives the same module.
    assert not {"mmcv", "opencv-python"} & set(pinned)


@pytest.mark.parametrize("stack", ["torch2.14", "torch2.11"])
def test_every_pin_is_exact(stack):
    text = (REPO / "tools" / "env" / f"{stack}.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        assert line.startswith("#") or re.match(r"[a-z0-9._-]+==[0-9][\w.]*( ; .+)?$", line), line


def test_current_environment_is_left_alone(create, env, monkeypatch):
    create.write_stamp(env, create.fingerprint("torch2.14"), version())
    monkeypatch.setattr(create, "fill", lambda *arguments: pytest.fail("it was filled"))
    create.prepare(env, "torch2.14", "")
    create.prepare(env, "torch2.14", sys.executable)
    assert sorted(path.name for path in env.iterdir()) == ["bin", create.STAMP]


@pytest.mark.parametrize("stamp", [None, "{broken", '{"pins": "other", "python": "3.11.7"}'])
def test_missing_or_old_stamp_fills_the_environment(create, env, monkeypatch, stamp):
    if stamp:
        (env / create.STAMP).write_text(stamp, encoding="utf-8")
    filled = []
    monkeypatch.setattr(create, "fill", lambda *arguments: filled.append(arguments))
    create.prepare(env, "torch2.11", "")
    assert filled == [(env, "torch2.11", (str(env / "bin" / "python"), version()))]
    assert create.is_current(env, create.fingerprint("torch2.11"), None)
    assert not create.is_current(env, create.fingerprint("torch2.14"), None)
    assert not create.is_current(env, create.fingerprint("torch2.11"), ("python3.9", "3.9.1"))


def test_failed_installation_leaves_no_valid_stamp(create, env, monkeypatch):
    def run(command):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(create, "run", run)
    monkeypatch.setattr(create, "find_uv", lambda python: "uv")
    with pytest.raises(subprocess.CalledProcessError):
        create.prepare(env, "torch2.14", "")
    assert json.loads((env / create.STAMP).read_text(encoding="utf-8"))["pins"] == "unfinished"
    assert not create.is_current(env, create.fingerprint("torch2.14"), None)


def test_foreign_environment_with_another_python_is_not_removed(create, env):
    with pytest.raises(create.SetupError, match="was not made by this script"):
        create.fill(env, "torch2.14", ("/usr/bin/python", "3.10.99"))
    assert (env / "bin" / "python").exists()


def test_forks_without_wheels_come_from_sources_after_the_pins(create, env, monkeypatch):
    commands = []
    monkeypatch.setattr(create, "run", commands.append)
    monkeypatch.setattr(create, "find_uv", lambda python: "uv")
    monkeypatch.setattr(create, "remove_rivals", lambda uv, python: None)
    create.fill(env, "onedl", (str(env / "bin" / "python"), version()))
    pins, sources, package = (command[5:] for command in commands)
    assert pins[-1].endswith("onedl.txt") and ":all:" in pins
    assert sources == ["--no-deps", "-r", str(create.PINS / "onedl.sources.txt")]
    assert "-e" in package


def test_pinned_forks_are_ones_the_package_takes(create):
    from ddetr_mm.compat import versions

    text = (create.PINS / "onedl.sources.txt").read_text(encoding="utf-8")
    forks = dict(line.split("==") for line in text.splitlines() if "==" in line)
    pins = (create.PINS / "onedl.txt").read_text(encoding="utf-8").splitlines()
    for requirement in versions.REQUIREMENTS:
        if requirement.module in ("mmengine", "mmdet", "mmcv"):
            (name,) = set(requirement.distributions) & set(forks)
            assert versions.fits(forks[name], requirement.distributions[name])
            assert not any(line.startswith(f"{requirement.module}==") for line in pins)


def test_only_wheels_of_the_pins_are_installed(create, env, monkeypatch):
    commands = []
    monkeypatch.setattr(create, "run", commands.append)
    monkeypatch.setattr(create, "find_uv", lambda python: "uv")
    monkeypatch.setattr(create, "remove_rivals", lambda uv, python: None)
    create.fill(env, "torch2.11", (str(env / "bin" / "python"), version()))
    into = ["uv", "pip", "install", "--python", str(env / "bin" / "python")]
    assert commands[0] == [
        *into,
        "--no-deps",
        "--only-binary",
        ":all:",
        "-r",
        str(create.PINS / "torch2.11.txt"),
    ]
    assert commands[1][:5] == into and commands[1][-2:] == ["-e", str(REPO)]
    assert len(commands) == 2


def test_interpreters_by_name_version_and_path(create):
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    for asked in (sys.executable, f"python{minor}", minor):
        assert create.interpreter(asked, (minor,))[1].startswith(f"{minor}.")
    assert create.interpreter("", ("3.0", minor))[1].startswith(f"{minor}.")


@pytest.mark.parametrize(
    ("asked", "preferred", "message"),
    [
        ("no-such-python", ("3.11",), "PYTHON=no-such-python: there is no such interpreter"),
        (sys.executable, ("3.0",), "supported are 3.0"),
        ("", ("3.0",), "no Python 3.0 was found: install one"),
    ],
)
def test_interpreters_that_do_not_do(create, asked, preferred, message):
    with pytest.raises(create.SetupError, match=message):
        create.interpreter(asked, preferred)


def test_unknown_stack_is_one_message(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-I", str(SCRIPT), "--env", str(tmp_path / "env"), "--stack", "torch1.0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 2
    assert (
        answer.stderr == "error: STACK=torch1.0 is not a pinned set; there are: torch2.14, torch2.11, onedl\n"
    )


def test_uv_of_our_own_is_found_where_path_has_none(create, tmp_path, monkeypatch):
    uv = tmp_path / "ddetr_mm" / "uv" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text("", encoding="utf-8")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert create.find_uv("python") == str(uv)


def test_without_uv_and_pip_the_fallback_is_reported(create, tmp_path, monkeypatch, capfd):
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    bare.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(bare))
    assert create.find_uv(str(bare)) == ""
    assert "venv and pip are used" in capfd.readouterr().err
    assert not list(tmp_path.glob("ddetr_mm/*"))


def test_rivals_go_together_with_what_they_overwrote(create, tmp_path, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho torch opencv-python opencv-python-headless mmcv\n", encoding="utf-8")
    fake.chmod(0o755)
    commands = []
    monkeypatch.setattr(create, "run", commands.append)
    create.remove_rivals("uv", fake)
    uninstall = ["uv", "pip", "uninstall", "--python", str(fake)]
    assert commands == [[*uninstall, "opencv-python", "opencv-python-headless"], [*uninstall, "mmcv"]]


def test_make_alone_lists_the_targets():
    answer = subprocess.run(
        ["make", "-C", str(REPO)], capture_output=True, text=True, check=True, env=os.environ
    )
    listed = re.findall(r"^  make ([a-z-]+) +\S", answer.stdout, re.MULTILINE)
    assert {"demo", "test", "ops", "test-ops", "bench", "lint", "clean"} <= set(listed)
