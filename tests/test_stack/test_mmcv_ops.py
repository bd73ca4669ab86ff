import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from ddetr_mm.errors import StackError
from ddetr_mm.stack import mmcv_ops

REPO = Path(__file__).resolve().parents[2]
only_without_ops = pytest.mark.skipif(mmcv_ops.has_compiled_ops(), reason="mmcv has its compiled ops here")


def run_python(code):
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )


def test_hook_is_last_and_there_once():
    mmcv_ops.install_stand_in()
    hooks = [finder for finder in sys.meta_path if isinstance(finder, mmcv_ops.StandInFinder)]
    assert len(hooks) == 1


def test_hook_answers_for_nothing_else():
    finder = mmcv_ops.StandInFinder()
    assert finder.find_spec("mmcv") is None
    assert finder.find_spec("mmcv._ext2") is None
    assert finder.find_spec("mmcv._ext").loader is finder


def fake_mmcv(folder, *files):
    package = folder / "mmcv"
    package.mkdir(parents=True)
    for name in ("__init__.py", *files):
        (package / name).write_text("", encoding="utf-8")


def test_compiled_ops_are_seen_by_their_file(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "mmcv", raising=False)
    importlib.invalidate_caches()
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    fake_mmcv(tmp_path / "lite", "_extra.so")
    fake_mmcv(tmp_path / "full", f"_ext{suffix}")
    monkeypatch.syspath_prepend(tmp_path / "lite")
    assert not mmcv_ops.has_compiled_ops()
    monkeypatch.syspath_prepend(tmp_path / "full")
    assert mmcv_ops.has_compiled_ops()


def test_package_whose_import_broke_off_is_recognised():
    module = types.ModuleType("x")
    whole = dict.fromkeys(["mmcv", "mmcv.utils", "mmcv.utils.env", "mmdet", "torch.nn"], module)
    assert mmcv_ops._half_imported(whole) is None
    assert (
        mmcv_ops._half_imported({**whole, "mmdet.models.backbones.csp_darknet": module})
        == "mmdet.models.backbones"
    )


@only_without_ops
def test_ops_delegate_or_say_what_to_do():
    import torch
    from mmcv import _ext
    from mmcv.ops import nms, soft_nms

    assert _ext.__spec__.origin == "ddetr_mm stand-in"
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 11.0, 11.0], [20.0, 20.0, 30.0, 30.0]])
    scores = torch.tensor([0.5, 0.9, 0.7])
    assert nms(boxes, scores, 0.5)[1].tolist() == [1, 2]
    assert nms(boxes, scores, 0.5, score_threshold=0.6, max_num=1)[1].tolist() == [1]
    with pytest.raises(StackError, match="softnms.*ddetr-mm install-ops"):
        soft_nms(boxes, scores)


@only_without_ops
def test_environment_report_is_honest():
    from mmcv.ops import get_compiler_version, get_compiling_cuda_version

    assert "no compiled ops" in get_compiler_version()
    assert get_compiling_cuda_version() == "not available"


@only_without_ops
def test_import_after_a_failed_mmdet_is_explained():
    answer = run_python("try:\n    import mmdet.models\nexcept ImportError:\n    pass\nimport ddetr_mm")
    assert answer.returncode == 1
    assert "imported before ddetr_mm" in answer.stderr
    assert "start Python anew" in answer.stderr


@pytest.mark.full_ops
def test_compiled_ops_are_left_alone():
    code = "import ddetr_mm, mmcv._ext as ext, mmcv.ops; print(ext.__file__, mmcv.ops.get_compiler_version())"
    answer = run_python(code)
    assert "_ext." in answer.stdout
    assert "no compiled ops" not in answer.stdout
