"""mmdet's own DetInferencer and analysis tools, unchanged, on a config that a spec was translated to."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
from PIL import Image

from ddetr_mm.tasks import mmdet_tools
from tests.test_tasks.conftest import ROOT, Project

# One process for all of them: importing mmdet takes longer than each.
TOOLS = """
import json, sys
from ddetr_mm.tasks.mmdet_tools import main_of_any
for arguments in json.loads(sys.argv[1]):
    print("\\n#", *arguments)  # a progress bar ends without a line break
    sys.argv = ["run_mmdet.py", *arguments]
    assert main_of_any() == 0, arguments
"""
INFERENCER = """
import json, sys
import ddetr_mm.register
import mmcv
import numpy as np
from mmdet.apis import DetInferencer, inference_detector, init_detector
config, checkpoint, *images = sys.argv[1:]
inferencer = DetInferencer(config, checkpoint, device="cpu", show_progress=False)
# One by one: as in TAO, a prediction depends on the padding of its batch.
found = inferencer(images, out_dir="inferencer", no_save_pred=False, batch_size=1, pred_score_thr=0.0)
of_array = inferencer(mmcv.imread(images[0]))["predictions"][0]
one = inference_detector(init_detector(config, checkpoint, device="cpu"), images[0]).pred_instances
np.testing.assert_allclose(of_array["scores"], one.scores, atol=1e-5)
np.testing.assert_allclose(of_array["bboxes"], one.bboxes, atol=1e-2)
print(json.dumps([found["predictions"], of_array, inferencer.model.dataset_meta["classes"]]))
"""


@pytest.fixture(scope="module")
def run_folder(trained_project: Project):
    """Where the training left its config, log and checkpoints."""
    return trained_project.results / "train"


@pytest.fixture(scope="module")
def printed(trained_project: Project, run_folder):
    """What each tool printed, by its name."""
    config = str(run_folder / "config.py")
    checkpoint = str(run_folder / "model_epoch_001.pth")
    (log,) = map(str, run_folder.glob("*/vis_data/scalars.json"))
    calls = [
        ["analysis_tools/browse_dataset", trained_project.spec, "--output-dir", "browse", "--not-show"],
        ["analysis_tools/get_flops", config, "--num-images", "2"],
        ["test", config, checkpoint, "--work-dir", "tested", "--out", "found.pkl"],
        ["analysis_tools/confusion_matrix", config, "found.pkl", "confusion", "--score-thr", "0"],
    ]
    if importlib.util.find_spec("seaborn"):
        calls += [
            ["analysis_tools/analyze_logs", "cal_train_time", log],
            ["analysis_tools/analyze_logs", "plot_curve", log, "--keys", "loss", "--out", "loss.png"],
        ]
    text = trained_project.python("-c", TOOLS, json.dumps(calls)).stdout
    parts = re.split(r"^# (\S+) .*\n", text, flags=re.MULTILINE)[1:]
    said: dict[str, str] = {}
    for name, part in zip(parts[::2], parts[1::2], strict=True):
        said[name] = said.get(name, "") + part
    return said


@pytest.mark.slow
def test_browse_dataset_draws_every_training_image(printed, trained_project: Project):
    drawn = {path.name: path for path in (trained_project.folder / "browse").iterdir()}
    images = {path.name for path in (trained_project.results / "data" / "train" / "images").iterdir()}
    assert set(drawn) == images and len(images) == 12
    sizes = set()
    for path in drawn.values():
        with Image.open(path) as picture:
            sizes.add(picture.size)
            assert len(picture.getcolors(1 << 16)) > 10
    # The spec crops to 96 at least and resizes to 160 at most; the files themselves are all 160 x 120.
    assert len(sizes) > 1 and all(min(size) >= 90 and max(size) <= 160 for size in sizes)


@pytest.mark.slow
def test_get_flops_counts_the_network(printed):
    said = printed["analysis_tools/get_flops"]
    assert "from (120, 160) to (64, 85)" in said
    assert float(re.search(r"Flops: ([\d.]+)M", said)[1]) > 1
    assert float(re.search(r"Params: ([\d.]+)M", said)[1]) == pytest.approx(0.751, abs=0.001)


@pytest.mark.slow
def test_confusion_matrix_of_the_test_tools_results(printed, trained_project: Project):
    assert (trained_project.folder / "found.pkl").is_file()
    with Image.open(trained_project.folder / "confusion" / "confusion_matrix.png") as picture:
        assert min(picture.size) > 100


@pytest.mark.slow
def test_analyze_logs_reads_our_log(printed, trained_project: Project):
    pytest.importorskip("seaborn", reason="mmdet's analyze_logs needs seaborn")
    said = printed["analysis_tools/analyze_logs"]
    assert re.search(r"average iter time: [\d.]+ s/iter", said)
    assert (trained_project.folder / "loss.png").stat().st_size > 1000


@pytest.mark.slow
def test_det_inferencer(trained_project: Project, run_folder):
    images = sorted((trained_project.results / "data" / "test" / "images").iterdir())[:3]
    arguments = [run_folder / "config.py", run_folder / "model_epoch_001.pth", *images]
    done = trained_project.python("-c", INFERENCER, *map(str, arguments))
    found, of_array, classes = json.loads(done.stdout.splitlines()[-1])
    assert classes == ["background", "triangle", "star", "rectangle", "circle"]
    assert [len(image["labels"]) for image in found] == [12, 12, 12]
    assert {label for image in found for label in image["labels"]} <= {1, 2, 3, 4}
    assert of_array["scores"] == pytest.approx(found[0]["scores"], abs=1e-5)
    for kind, suffix in (("vis", ".png"), ("preds", ".json")):
        written = (trained_project.folder / "inferencer" / kind).iterdir()
        assert {path.name for path in written} == {image.stem + suffix for image in images}


def test_a_spec_takes_a_configs_place(tmp_path, monkeypatch):
    spec = str(ROOT / "configs" / "specs" / "shapes_resnet18.yaml")
    monkeypatch.chdir(tmp_path)
    prepared = mmdet_tools.prepare_arguments("analysis_tools/confusion_matrix", [spec, "found.pkl", "out"])
    config = (tmp_path / prepared[0]).read_text()
    assert prepared[1:] == ["found.pkl", "out"]
    assert "test_dataloader" in config and "train_dataloader" not in config  # as `evaluate` takes it
    first = mmdet_tools.prepare_arguments("analysis_tools/get_flops", [spec])[0]
    assert "train_dataloader" in (tmp_path / first).read_text()
    assert mmdet_tools.prepare_arguments("analysis_tools/analyze_logs", ["plot_curve", "a.json"]) == [
        "plot_curve",
        "a.json",
    ]


def test_tools_are_listed_and_a_wrong_name_is_reported(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run_mmdet.py", "-h"])
    assert mmdet_tools.main_of_any() == 0
    assert {"train", "analysis_tools/get_flops"} <= set(capsys.readouterr().out.split())
    monkeypatch.setattr("sys.argv", ["run_mmdet.py", "analysis_tools/no_such"])
    assert mmdet_tools.main_of_any() == 2
    assert "no_such" in capsys.readouterr().err
