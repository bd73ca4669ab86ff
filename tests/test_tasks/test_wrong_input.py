"""Wrong input: one message, exit status 2, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.test_tasks.conftest import TINY, Project


def test_unknown_key_names_file_line_and_nearest_key(data_project: Project, tmp_path: Path):
    spec = tmp_path / "bad.yaml"
    spec.write_text("model:\n  num_querys: 300\ntrain:\n  optim:\n    lr: fast\n")
    done = data_project.run("check", "-e", str(spec), status=2)
    assert "bad.yaml" in done.stderr and "line 2" in done.stderr and "num_queries" in done.stderr
    assert "train.optim.lr" in done.stderr and "line 5" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_checkpoint(data_project: Project, tmp_path: Path):
    folder = f"evaluate.results_dir={tmp_path}"
    done = data_project.tiny("evaluate", "evaluate.checkpoint=nowhere.pth", folder, status=2)
    last = json.loads((tmp_path / "status.json").read_text().splitlines()[-1])
    assert last["status"] == "FAILURE" and "nowhere.pth" in last["message"]
    assert "nowhere.pth" in done.stderr and "evaluate.checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(data_project: Project):
    done = data_project.run(
        "evaluate", "--debug", "-e", data_project.spec, *TINY, "evaluate.checkpoint=nowhere.pth", status=2
    )
    assert "Traceback" in done.stderr


def test_a_checkpoint_that_is_none(data_project: Project, tmp_path: Path):
    fake = tmp_path / "fake.pth"
    fake.write_text("not a checkpoint")
    done = data_project.tiny(
        "export", f"export.checkpoint={fake}", f"export.onnx_file={tmp_path / 'x.onnx'}", status=2
    )
    assert "fake.pth" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x.onnx").exists()


def test_results_folder_that_cannot_be_made(data_project: Project, tmp_path: Path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    done = data_project.tiny("train", f"results_dir={blocker}", status=2)
    assert "results_dir" in done.stderr and str(blocker) in done.stderr


def test_help_answers_without_heavy_imports():
    code = (
        "import sys\n"
        "from ddetr_mm.cli import main\n"
        "try:\n    main(['train', '-h'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'mmengine', 'mmdet', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "key=value" in done.stdout


def test_a_stack_that_does_not_fit_is_one_message():
    # An environment without mmdet, as the metadata tells it.
    code = (
        "import importlib.metadata as metadata, sys\n"
        "real = metadata.version\n"
        "def version(name):\n"
        "    if name in ('mmdet', 'onedl-mmdetection'):\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "metadata.version = version\n"
        "sys.argv[0] = 'ddetr-mm'\n"
        "from ddetr_mm.compat import versions\n"
        "try:\n    versions.check_versions(version)\nexcept versions.StackImportError as error:\n"
        "    versions._deferred = error\n"
        "from ddetr_mm.cli import main\n"
        "assert main(['spec', 'train']) == 0\n"
        "sys.exit(main(['check', '-e', 'nowhere.yaml']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "mmdet" in done.stderr and "pip install" in done.stderr and "Traceback" not in done.stderr
