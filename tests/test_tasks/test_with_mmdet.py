"""mmdet's own DetInferencer and analysis tools, unchanged, on a config that a spec was translated to."""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from PIL import Image

import ddetr_mm.datasets.transforms  # noqa: F401 - registers
from ddetr_mm.datasets.coco import SerializedCocoDataset
from ddetr_mm.tasks import mmdet_tools
from tests.test_tasks.conftest import ROOT, Project

# One process for all of them: importing mmdet takes longer than each. "perfect" is a step of our own:
# detections with a score of 1 that are the ground truth of the config's test data.
TOOLS = """
import json, pickle, sys
from ddetr_mm.tasks.mmdet_tools import main_of_any

def perfect(config, found, path):
    import torch
    from mmdet.registry import DATASETS
    from mmengine.config import Config
    dataset = DATASETS.build(Config.fromfile(config).test_dataloader.dataset)
    with open(found, "rb") as file:
        results = pickle.load(file)
    assert len(results) == len(dataset)
    for index, result in enumerate(results):
        info = dataset.get_data_info(index)
        assert info["img_id"] == result["img_id"]
        objects = info["instances"]
        result["pred_instances"] = {
            "bboxes": torch.tensor([each["bbox"] for each in objects]).reshape(-1, 4),
            "labels": torch.tensor([each["bbox_label"] for each in objects]),
            "scores": torch.ones(len(objects)),
        }
    with open(path, "wb") as file:
        pickle.dump(results, file)

for arguments in json.loads(sys.argv[1]):
    print("\\n#", *arguments)  # a progress bar ends without a line break
    if arguments[0] == "perfect":
        perfect(*arguments[1:])
        continue
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
def use_tools(trained_project: Project):
    """Runs tools in one process; gives what each printed, by its name."""

    def use(calls: list[list[str]]) -> dict[str, str]:
        done = trained_project.python("-c", TOOLS, json.dumps(calls))
        parts = re.split(r"^# (\S+) .*\n", done.stdout, flags=re.MULTILINE)[1:]
        said: dict[str, str] = {}
        for name, part in zip(parts[::2], parts[1::2], strict=True):
            said[name] = said.get(name, "") + part
        return said

    return use


@pytest.fixture(scope="module")
def tested(trained_project: Project, run_folder, use_tools):
    """What the tools printed that say how good detections are, for detections that are the ground truth."""
    config = str(run_folder / "config.py")
    folder = trained_project.folder
    write_annotation_file(trained_project)
    perfect = ["perfect.bbox.json"] * 2
    said = use_tools(
        [
            [
                *("train", config, "--work-dir", "scaled", "--auto-scale-lr", "--cfg-options"),
                *("train_cfg.max_epochs=1", "train_dataloader.batch_size=2", "val_cfg=None"),
                *("val_dataloader=None", "val_evaluator=None"),
            ],
            [
                *("test", config, str(run_folder / "model_epoch_001.pth"), "--work-dir", "tested"),
                *("--show-dir", "shown", "--out", "found.pkl"),
            ],
            ["perfect", config, "found.pkl", "perfect.pkl"],
            [
                *("analysis_tools/eval_metric", config, "perfect.pkl"),
                *("--cfg-options", "val_evaluator.outfile_prefix=perfect"),
            ],
            ["analysis_tools/analyze_results", config, "perfect.pkl", "analyzed", "--topk", "2"],
            ["analysis_tools/confusion_matrix", config, "perfect.pkl", "confusion", "--score-thr", "0"],
            [
                *("analysis_tools/fuse_results", *perfect, "--annotation", "val.json"),
                *("--save-fusion-results", "--out-dir", "fused"),
            ],
        ]
    )
    assert (folder / "confusion" / "confusion_matrix.png").is_file()
    return said


def write_annotation_file(project: Project) -> None:
    """Write the annotations that the training config tests on as the one file that COCO's tools take."""
    merged: dict[str, list] = {"images": [], "annotations": []}
    for shard in sorted((project.results / "coco" / "val").glob("*.json")):
        content = json.loads(shard.read_text())
        # coco_error_analysis reads what COCO has and the converter, as TAO's, leaves out.
        merged["categories"] = [dict(each, supercategory="none") for each in content["categories"]]
        for part in ("images", "annotations"):
            merged[part] += content[part]
    (project.folder / "val.json").write_text(json.dumps(merged))


@pytest.fixture(scope="module")
def printed(trained_project: Project, run_folder, tested, use_tools):
    """What the other tools printed, by name."""
    config = str(run_folder / "config.py")
    checkpoint = str(run_folder / "model_epoch_001.pth")
    (log,) = map(str, run_folder.glob("*/vis_data/scalars.json"))
    names = trained_project.folder / "names.txt"
    names.write_text("triangle\nstar\n")
    images = str(trained_project.results / "data" / "test" / "images")
    short = ["--max-iter", "3", "--num-warmup", "1", "--log-interval", "1"]
    dataset = ["--task", "dataset", "--work-dir", "benchmarked"]
    calls = [
        ["analysis_tools/browse_dataset", trained_project.spec, "--output-dir", "browse", "--not-show"],
        ["analysis_tools/get_flops", config, "--num-images", "2"],
        ["analysis_tools/benchmark", config, "--task", "dataloader", "--work-dir", "benchmarked", *short],
        ["analysis_tools/benchmark", config, *dataset, *short],
        ["analysis_tools/coco_error_analysis", "perfect.bbox.json", "errors", "--ann", "val.json"],
        [
            *("analysis_tools/test_robustness", config, checkpoint, "--corruptions", "None"),
            *(
                "--out",
                "robust.pkl",
                "--cfg-options",
                "model.backbone.init_cfg.type=None",
                "dataset_type=coco",
            ),
        ],
        ["analysis_tools/robustness_eval", "robust_results.pkl", "--prints", "P"],
        ["test", config, checkpoint, "--work-dir", "augmented", "--tta", "--out", "augmented.pkl"],
        ["model_converters/publish_model", checkpoint, "published.pth"],
        ["misc/print_config", config, "--save-path", "printed/config.py"],
        ["dataset_converters/images2coco", images, str(names), "images.json"],
    ]
    if importlib.util.find_spec("seaborn"):
        calls += [
            ["analysis_tools/analyze_logs", "cal_train_time", log],
            ["analysis_tools/analyze_logs", "plot_curve", log, "--keys", "loss", "--out", "loss.png"],
        ]
    return use_tools(calls)


def test_test_tool_draws_every_image(tested, trained_project: Project):
    (shown,) = (trained_project.folder / "tested").glob("*/shown")
    images = {path.name for path in (trained_project.results / "data" / "val" / "images").iterdir()}
    assert {path.name for path in shown.iterdir()} == images and len(images) == 5
    with Image.open(shown / min(images)) as picture:  # what was found beside what is there
        assert picture.size == (320, 120)


def test_eval_metric_scores_a_pickle(tested):
    assert "'coco/bbox_mAP': 1.0" in tested["analysis_tools/eval_metric"]


def test_analyze_results_sorts_images_by_score(tested, trained_project: Project):
    for kind in ("good", "bad"):
        drawn = sorted(path.name for path in (trained_project.folder / "analyzed" / kind).iterdir())
        assert len(drawn) == 2 and all(name.endswith("_1.0.png") for name in drawn)


def test_fuse_results_runs_and_writes(tested, trained_project: Project):
    """Its figures mean nothing: it takes the x, y, width and height of its files for corners."""
    assert "IoU=0.50:0.95 | area=   all | maxDets=100" in tested["analysis_tools/fuse_results"]
    fused = json.loads((trained_project.folder / "fused" / "fusion_results.json").read_text())
    perfect = json.loads((trained_project.folder / "perfect.bbox.json").read_text())
    assert len(perfect) == 17 and {each["image_id"] for each in fused} == {
        each["image_id"] for each in perfect
    }


def test_auto_scale_lr_scales_from_the_specs_batch(tested, trained_project: Project, run_folder):
    def first_rates(folder):
        (log,) = folder.glob("*/vis_data/scalars.json")
        return next(line for line in map(json.loads, log.read_text().splitlines()) if "lr" in line)["lr"]

    # Batches of 2 where the spec has 4.
    assert first_rates(trained_project.folder / "scaled") == pytest.approx(first_rates(run_folder) / 2)


def test_a_slicers_model_wrapper_finds_its_steps(run_folder):
    """SAHI looks for two steps of the test pipeline by name and replaces the loader and the size."""
    steps = Config.fromfile(run_folder / "config.py").test_dataloader.dataset.pipeline
    load, resize = (
        next(index for index, step in enumerate(steps) if step.type == name)
        for name in ("LoadImageFromFile", "Resize")
    )
    steps[load]["type"] = "mmdet.InferencerLoader"
    steps[resize]["scale"] = (64, 64)
    with DefaultScope.overwrite_default_scope("mmdet"):
        packed = Compose(steps)(np.zeros((40, 80, 3), np.uint8))
    assert packed["inputs"].shape == (3, 32, 64)


@pytest.mark.slow
def test_sahi_slices(trained_project: Project, run_folder):
    pytest.importorskip("sahi", reason="slicing needs sahi")
    code = """
import json, sys
import ddetr_mm.register
from sahi import AutoDetectionModel
from sahi.predict import get_sliced_prediction
config, checkpoint, image = sys.argv[1:]
model = AutoDetectionModel.from_pretrained(
    "mmdet", checkpoint, config_path=config, confidence_threshold=0.0, device="cpu", image_size=96
)
found = get_sliced_prediction(image, model, slice_height=80, slice_width=80, perform_standard_pred=False,
                              postprocess_type="NMS", postprocess_match_threshold=1.0)
found = found.object_prediction_list
right = max(each.bbox.to_xyxy()[2] for each in found)
print(json.dumps([len(found), right, sorted({each.category.name for each in found})]))
"""
    image = str(trained_project.results / "data" / "test" / "images" / "00000.png")
    arguments = (str(run_folder / "config.py"), str(run_folder / "model_epoch_001.pth"), image)
    done = trained_project.python("-c", code, *arguments)
    number, right, classes = json.loads(done.stdout.splitlines()[-1])
    assert number > 12 and right > 80  # 12 queries a slice of 80 pixels
    assert set(classes) <= {"triangle", "star", "rectangle", "circle"}


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


def test_confusion_matrix(tested, trained_project: Project):
    with Image.open(trained_project.folder / "confusion" / "confusion_matrix.png") as picture:
        assert min(picture.size) > 100


@pytest.mark.slow
def test_benchmark_times_loading(printed, trained_project: Project):
    (log,) = (trained_project.folder / "benchmarked").iterdir()
    text = log.read_text()
    assert re.search(r"TAOResize - [\d.]+ ms", text)
    assert re.search(r"Overall fps: [\d.]+ img/s", text)
    assert re.search(r"Overall fps: [\d.]+ batch/s", text)


@pytest.mark.slow
def test_coco_error_analysis_draws_each_class(printed, trained_project: Project):
    drawn = {path.name for path in (trained_project.folder / "errors" / "bbox").iterdir()}
    classes = ("triangle", "star", "rectangle", "circle", "allclass")
    assert {f"bbox-{name}-allarea.png" for name in classes} <= drawn


@pytest.mark.slow
def test_robustness_tools(printed):
    assert "Testing None at severity 0" in printed["analysis_tools/test_robustness"]
    assert "Performance on Clean Data [P] (bbox)" in printed["analysis_tools/robustness_eval"]


@pytest.mark.slow
def test_test_time_augmentation_joins_both_flips(printed, trained_project: Project):
    with (trained_project.folder / "augmented.pkl").open("rb") as file:
        results = pickle.load(file)
    assert len(results) == 5
    assert all(12 < len(result["pred_instances"]["labels"]) <= 24 for result in results)


@pytest.mark.slow
def test_published_checkpoint_loads(printed, trained_project: Project, run_folder):
    (published,) = trained_project.folder.glob("published-*.pth")
    before = torch.load(run_folder / "model_epoch_001.pth", weights_only=False)["state_dict"]
    after = torch.load(published, weights_only=False)
    assert set(after) == {"meta", "state_dict"}
    assert all(torch.equal(before[name], value) for name, value in after["state_dict"].items())


@pytest.mark.slow
def test_printed_config_is_a_config(printed, trained_project: Project):
    config = Config.fromfile(trained_project.folder / "printed" / "config.py")
    assert config.model.type == "TAODeformableDETR"
    assert "size_rule='tao'" in printed["misc/print_config"]


@pytest.mark.slow
def test_images2coco_writes_what_the_dataset_reads(printed, trained_project: Project):
    path = trained_project.results / "data" / "test" / "annotations" / "images.json"
    dataset = SerializedCocoDataset(ann_file=str(path), data_prefix={"img": ""}, test_mode=True)
    assert len(dataset) == 6 and dataset.metainfo["classes"] == ("triangle", "star")
    assert all(Path(dataset.get_data_info(index)["img_path"]).is_file() for index in range(6))


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
    prepared = mmdet_tools.prepare_arguments("analysis_tools/eval_metric", [spec, "found.pkl"])
    config = Config.fromfile(tmp_path / prepared[0])
    assert config.val_evaluator == config.test_evaluator  # the one that mmdet's tool reads
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
