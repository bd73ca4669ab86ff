"""mmdet's own scripts, unchanged and started by themselves, run a translated config.

They import mmdet before anything of ours, which needs mmcv with its compiled ops.
"""

from __future__ import annotations

import pytest

from ddetr_mm.tasks.mmdet_tools import mmdet_tool
from tests.test_tasks.conftest import TINY, Project

pytestmark = pytest.mark.full_ops


def test_train_and_test(data_project: Project):
    data_project.run("translate", "-e", data_project.spec, "-o", "own_train.py", *TINY)
    data_project.python(
        str(mmdet_tool("train")),
        "own_train.py",
        "--work-dir=work_dirs/own",
        "--cfg-options",
        "train_cfg.max_epochs=1",
    )
    checkpoint = data_project.folder / "work_dirs" / "own" / "model_epoch_000.pth"
    assert checkpoint.is_file()
    tested = ("own_train.py", str(checkpoint), "--work-dir=work_dirs/own_test", "--show-dir=shown")
    done = data_project.python(str(mmdet_tool("test")), *tested)
    assert "coco/bbox_mAP" in done.stdout + done.stderr
    assert len(list((data_project.folder / "work_dirs" / "own_test").glob("*/shown/*.png"))) == 5
    data_project.python(
        str(mmdet_tool("train")),
        "own_train.py",
        "--work-dir=work_dirs/own",
        "--auto-scale-lr",
        "--resume",
        "--cfg-options",
        "train_cfg.max_epochs=2",
    )
    assert checkpoint.with_name("model_epoch_001.pth").is_file()


def test_mmcvs_attention_is_the_one_in_use(data_project: Project):
    code = (
        "import ddetr_mm, mmcv.ops\n"
        "from ddetr_mm.compat.mmcv_ops import has_compiled_ops\n"
        "assert has_compiled_ops()\n"
        "import mmcv._ext\n"
        "assert mmcv._ext.__file__.endswith('.so'), mmcv._ext\n"
    )
    data_project.python("-c", code)
