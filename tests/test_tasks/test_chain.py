"""Every command on a tiny data set, as a user types it, and the files each leaves."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image

from tests.test_tasks.conftest import TINY, Project

LATEST = "results/shapes/train/dd_model_latest.pth"


def status_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_convert_leaves_shards_and_statistics(data_project: Project):
    folder = data_project.results / "coco"
    shards = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*-shard-*.json"))
    assert shards[0] == "test/test-shard-00000-of-00002.json" and len(shards) == 6
    assert (folder / "stats.txt").is_file() and (folder / "warnings.json").is_file()
    lines = status_lines(folder / "status.json")
    messages = [line["message"] for line in lines]
    assert messages[0] == "Starting DDETR/DINO dataset convert" and lines[0]["status"] == "STARTED"
    assert messages[-1] == "Dataset convert finished successfully" and lines[-1]["status"] == "SUCCESS"
    assert len(set(messages[:2] + messages[-2:])) == 4 and messages.count(messages[0]) == 1
    assert not (folder / "experiment.yaml").exists()


def test_check_passes_and_writes_its_report(data_project: Project):
    done = data_project.tiny("check")
    assert "the run can start" in done.stdout
    report = json.loads((data_project.results / "train" / "check.json").read_text())
    assert report["passed"] and report["splits"]["train"]["num_images"] == 12
    assert sum(report["splits"]["train"]["boxes_by_class"].values()) == report["splits"]["train"]["num_boxes"]


def test_check_names_a_wrong_folder_and_too_few_classes(data_project: Project, tmp_path: Path):
    done = data_project.tiny(
        "check",
        "dataset.train_data_sources.0.image_dir=/nowhere",
        "dataset.num_classes=3",
        f"train.results_dir={tmp_path}",
        "model.num_select=12",
        status=2,
    )
    assert "dataset.train_data_sources[0].image_dir" in done.stderr and "/nowhere" in done.stderr
    assert "dataset.num_classes" in done.stderr and "5 or more" in done.stderr
    assert not json.loads((tmp_path / "check.json").read_text())["passed"]


def test_train_leaves_checkpoints_log_config_and_curves(trained_project: Project):
    folder = trained_project.results / "train"
    names = {path.name for path in folder.iterdir()}
    assert {"model_epoch_000.pth", "model_epoch_001.pth", "dd_model_latest.pth", "config.py"} <= names
    assert (folder / "dd_model_latest.pth").resolve().name == "model_epoch_001.pth"
    assert any(folder.rglob("events.out.tfevents.*"))
    curves = list(folder.glob("*.png"))
    assert curves and all(Image.open(path).size[0] > 300 for path in curves)
    experiment = yaml.safe_load((folder / "experiment.yaml").read_text())
    assert experiment["model"]["hidden_dim"] == 32 and experiment.get("encryption_key") is None
    lines = status_lines(folder / "status.json")
    assert lines[0]["message"] == "Starting Deformable DETR train."
    assert lines[-1]["status"] == "SUCCESS" and "val_mAP50" in lines[-1]["kpi"]
    assert any(line.get("epoch") == 1 and "eta" in line for line in lines)


def test_the_checkpoint_knows_its_classes_and_loads_safely(trained_project: Project):
    from ddetr_mm.weights import inspect_checkpoint
    from ddetr_mm.weights.scheme import FIELDS

    info = inspect_checkpoint(trained_project.folder / LATEST)
    assert info.stated == frozenset(FIELDS)  # heads, dilation, normalisation …
    assert info.meta.class_names[1:] == ("triangle", "star", "rectangle", "circle")
    assert info.meta.zero_padded_values is False and info.meta.label_mode == "category_id"


def test_training_again_continues_from_the_latest_checkpoint(trained_project: Project, tmp_path: Path):
    import shutil

    folder = tmp_path / "train"
    shutil.copytree(trained_project.results / "train", folder, symlinks=True)
    done = trained_project.tiny("train", f"train.results_dir={folder}", "train.num_epochs=3")
    assert (folder / "model_epoch_002.pth").is_file()
    before = torch.load(folder / "model_epoch_000.pth", weights_only=False, mmap=True)["meta"]["iter"]
    after = torch.load(folder / "model_epoch_002.pth", weights_only=False, mmap=True)["meta"]["iter"]
    assert after == 3 * before
    messages = [line["message"] for line in status_lines(folder / "status.json")]
    assert any(message.startswith("Resuming training from checkpoint: ") for message in messages)
    assert f"training: {before}/" not in done.stderr and f"training: {after}/{after} steps" in done.stderr
    # The last line is a command that works as it is.
    program, *arguments = shlex.split(done.stdout.splitlines()[-1].removeprefix("next: "))
    assert program == "ddetr-mm" and str(folder / "dd_model_best.pth") in arguments[-1]
    trained_project.run(*arguments, f"evaluate.results_dir={tmp_path / 'evaluate'}")
    assert (tmp_path / "evaluate" / "results.json").is_file()


@pytest.mark.parametrize(
    ("epochs", "says"),
    [
        (2, "Nothing to do: 2 of 2 epochs trained; to train on, set train.num_epochs=4"),
        (1, "Nothing to do: 2 epochs trained, train.num_epochs is 1; to train on, set train.num_epochs=4"),
    ],
)
def test_a_finished_run_says_that_nothing_is_left(trained_project: Project, tmp_path: Path, epochs, says):
    import shutil

    folder = tmp_path / "train"
    shutil.copytree(trained_project.results / "train", folder, symlinks=True)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pth")}
    counts = (f"train.num_epochs={epochs}", "train.validation_interval=1")
    done = trained_project.tiny("train", f"train.results_dir={folder}", *counts)
    assert says in done.stdout + done.stderr and "training: " not in done.stdout + done.stderr
    lines = status_lines(folder / "status.json")
    begun = "Starting Deformable DETR train."
    started = max(index for index, line in enumerate(lines) if line["message"] == begun)
    assert sum(says in line["message"] for line in lines[started:]) == 1
    assert (lines[-1]["status"], lines[-1]["message"]) == ("SUCCESS", "Train finished successfully.")
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pth")} == before


def test_evaluate_leaves_results_and_predictions(trained_project: Project):
    trained_project.tiny("evaluate", f"evaluate.checkpoint={LATEST}")
    folder = trained_project.results / "evaluate"
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == {
        *("AP", "AP50", "AP75", "APs", "APm", "APl"),
        *("ARmax1", "ARmax10", "ARmax100", "ARs", "ARm", "ARl"),
    }
    assert 0.0 <= results["AP"] <= results["AP50"] <= 1.0
    predictions = json.loads((folder / "predictions.json").read_text())
    assert predictions and {"image_id", "category_id", "bbox", "score"} <= set(predictions[0])
    assert {entry["category_id"] for entry in predictions} <= {1, 2, 3, 4}
    assert status_lines(folder / "status.json")[-1]["kpi"]["test_mAP50"]
    page = (folder / "report.html").read_text()
    facts = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", page))
    assert facts["Checkpoint"] == LATEST and facts["Spec"] == trained_project.spec
    assert re.fullmatch(r"0\.7 M parameters, \d+\.\d MiB", facts["Size"])
    assert facts["Data"] == "results/shapes/coco/test, images in results/shapes/data"
    assert facts["Image size"] == "shorter side 64, longer side at most 96 pixels"
    assert re.fullmatch(r"[\d.]+ m?s \([\d.]+ images/s\), reading included", facts["Time an image"])
    assert facts["Device"]


def test_conf_threshold_and_eval_class_ids_act(trained_project: Project, tmp_path: Path):
    trained_project.tiny(
        "evaluate",
        f"evaluate.checkpoint={LATEST}",
        f"evaluate.results_dir={tmp_path}",
        "evaluate.conf_threshold=0.999",
        "dataset.eval_class_ids=[2]",
    )
    assert json.loads((tmp_path / "results.json").read_text())["AP"] == 0.0
    assert json.loads((tmp_path / "predictions.json").read_text()) == []


def test_inference_leaves_labels_and_pictures(trained_project: Project):
    trained_project.tiny("inference", f"inference.checkpoint={LATEST}", "inference.conf_threshold=0.01")
    folder = trained_project.results / "inference"
    labels = sorted((folder / "labels").glob("*.txt"))
    pictures = sorted((folder / "images_annotated").glob("*.png"))
    assert (
        [path.stem for path in labels] == [path.stem for path in pictures] == [f"{n:05d}" for n in range(6)]
    )
    lines = [line.split(" ") for path in labels for line in path.read_text().splitlines()]
    assert lines and all(len(line) == 16 and float(line[15]) >= 0.01 for line in lines)
    assert {line[0] for line in lines} <= {"triangle", "star", "rectangle", "circle"}
    plain = Image.open(trained_project.results / "data" / "test" / "images" / pictures[0].name).convert("RGB")
    assert Image.open(pictures[0]).size == plain.size
    drawn = [np.asarray(Image.open(path).convert("RGB")) for path in pictures]
    originals = [
        np.asarray(
            Image.open(trained_project.results / "data" / "test" / "images" / path.name).convert("RGB")
        )
        for path in pictures
    ]
    assert any((one != other).any() for one, other in zip(drawn, originals, strict=True))


def test_export_is_checked_and_runs(trained_project: Project):
    target = "results/shapes/export/tiny.onnx"
    trained_project.tiny("export", f"export.checkpoint={LATEST}", f"export.onnx_file={target}")
    report = json.loads((trained_project.results / "export" / "tiny.parity.json").read_text())
    assert report["passed"] and report["max_abs_diff_boxes"] < 1e-4
    assert [batch["batch_size"] for batch in report["batches"]] == [1, 2, 7]
    session = onnxruntime.InferenceSession(str(trained_project.folder / target))
    logits, boxes = session.run(
        ["pred_logits", "pred_boxes"], {"inputs": np.zeros((3, 3, 64, 96), np.float32)}
    )
    assert logits.shape == (3, 12, 5) and boxes.shape == (3, 12, 4)
    again = trained_project.tiny(
        "export", f"export.checkpoint={LATEST}", f"export.onnx_file={target}", status=2
    )
    assert "exists already" in again.stderr and "export.onnx_file" in again.stderr


def test_translated_config_runs_in_mmdets_own_tools(trained_project: Project):
    trained_project.run("translate", "-e", trained_project.spec, "-o", "tiny_train.py", *TINY)
    trained_project.python(
        str(Path(__file__).resolve().parents[2] / "tools" / "train.py"),
        "tiny_train.py",
        "--work-dir=work_dirs/tiny",
        "--cfg-options",
        "train_cfg.max_epochs=1",
    )
    assert (trained_project.folder / "work_dirs" / "tiny" / "model_epoch_000.pth").is_file()


def test_tools_test_takes_a_spec_and_a_tao_checkpoint(trained_project: Project):
    trained_project.run("weights", LATEST, "tiny_tao.pth", "--to", "tao")
    spec = trained_project.folder / "tiny.yaml"
    experiment = yaml.safe_load((trained_project.results / "train" / "experiment.yaml").read_text())
    spec.write_text(yaml.safe_dump(experiment))
    done = trained_project.python(
        str(Path(__file__).resolve().parents[2] / "tools" / "test.py"),
        "tiny.yaml",
        "tiny_tao.pth",
        "--work-dir=work_dirs/tiny_test",
    )
    assert "coco/bbox_mAP" in done.stdout + done.stderr


def test_init_detector_runs_a_translated_config(trained_project: Project, tmp_path: Path):
    import ddetr_mm  # noqa: F401 - before mmdet, for environments without compiled ops

    trained_project.run("translate", "-e", trained_project.spec, "-o", "tiny.py", "--for", "inference", *TINY)
    script = tmp_path / "detect.py"
    script.write_text(
        "import ddetr_mm\n"
        "from mmdet.apis import inference_detector, init_detector\n"
        f"model = init_detector('tiny.py', {LATEST!r}, device='cpu')\n"
        "result = inference_detector(model, 'results/shapes/data/test/images/00000.png')\n"
        "print(model.dataset_meta['classes'], tuple(result.pred_instances.bboxes.shape))\n"
    )
    done = trained_project.python(str(script))
    assert "'star'" in done.stdout and "(12, 4)" in done.stdout


@pytest.mark.parametrize("subtask", ["train", "evaluate", "inference", "export", "convert", "gen_trt_engine"])
def test_the_printed_default_spec_is_yaml_with_comments(data_project: Project, subtask: str):
    text = data_project.run("spec", subtask).stdout
    assert yaml.safe_load(text) and text.count("#") > 20
