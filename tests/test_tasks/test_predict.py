"""``Detector`` and ``ddetr-mm predict``: a checkpoint alone, pictures and videos."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from weights_builders import detector as build_detector
from weights_builders import write_mmdet

import ddetr_mm
from ddetr_mm import Detector
from ddetr_mm.cli import main
from ddetr_mm.errors import DataError, WeightsError
from ddetr_mm.tasks.predict import find_sources
from ddetr_mm.weights import convert_checkpoint, read_checkpoint
from ddetr_mm.weights.describe import checked_settings, describe, settings_of_config, settings_of_spec

CONF = 0.01


@pytest.fixture(scope="module")
def checkpoint(trained_project) -> Path:
    return trained_project.results / "train" / "dd_model_latest.pth"


@pytest.fixture(scope="module")
def pictures(trained_project) -> list[Path]:
    return sorted((trained_project.results / "data" / "test" / "images").glob("*.png"))


@pytest.fixture(scope="module")
def labels_of_inference(trained_project, checkpoint) -> Path:
    """The label files of ``ddetr-mm inference`` on the same pictures."""
    folder = trained_project.folder / "of_inference"
    words = (f"inference.checkpoint={checkpoint}", f"inference.conf_threshold={CONF}")
    trained_project.tiny("inference", *words, f"inference.results_dir={folder}")
    return next(folder.rglob("labels"))


def read_rows(path: Path) -> list[tuple[str, list[float], float]]:
    rows = [line.split() for line in path.read_text().splitlines()]
    return [(row[0], [float(value) for value in row[4:8]], float(row[-1])) for row in rows]


# --- Detector ---


def test_detections_equal_those_of_inference(checkpoint, pictures, labels_of_inference):
    detector = Detector(checkpoint, conf=CONF, device="cpu", batch_size=4)
    assert detector.names == {1: "triangle", 2: "star", 3: "rectangle", 4: "circle"} and detector.notes == []
    results = detector(pictures)
    assert sum(map(len, results)) > 20
    # Attention values at padded positions are not zeroed, as in TAO: the same batches, or others come out.
    for picture, result in zip(pictures, results, strict=True):
        expected = read_rows(labels_of_inference / f"{picture.stem}.txt")
        assert result.path == picture and len(result) == len(expected)
        assert sorted(result.names) == sorted(row[0] for row in expected)
        scores = np.sort([row[2] for row in expected])
        np.testing.assert_allclose(np.sort(result.scores), scores, atol=6e-4)  # files have three decimals
        order = np.lexsort((*result.boxes_xyxy.T,))
        theirs = np.array([row[1] for row in expected])
        np.testing.assert_allclose(result.boxes_xyxy[order], theirs[np.lexsort((*theirs.T,))], atol=0.02)
        assert [detector.names[label] for label in result.labels] == list(result.names)


def test_every_form_of_a_picture_gives_the_same(checkpoint, pictures):
    detector = Detector(checkpoint, conf=CONF, device="cpu")
    path = pictures[0]
    expected = detector(path)
    opened = Image.open(path)
    array = np.asarray(opened.convert("RGB"))
    forms = [str(path), array, opened]
    results = [*map(detector, forms), *detector(forms), *detector(form for form in forms)]
    assert len(results) == 9
    for result in results:
        np.testing.assert_array_equal(result.boxes_xyxy, expected.boxes_xyxy)
        np.testing.assert_array_equal(result.image_rgb, array)
    assert [result.path for result in results[:3]] == [path, None, None]


def test_a_generator_is_read_a_batch_at_a_time(checkpoint, pictures):
    taken = []

    def source():
        for path in pictures:
            taken.append(path)
            yield path

    detector = Detector(checkpoint, conf=CONF, device="cpu", batch_size=2)
    results = detector(source())
    next(results)
    assert len(taken) == 2


def test_threshold_and_classes(checkpoint, pictures):
    everything = Detector(checkpoint, conf=0.0, device="cpu")(pictures[0])
    assert list(everything.scores) == sorted(everything.scores, reverse=True)
    middle = float(np.median(everything.scores))
    some = Detector(checkpoint, conf=middle, classes=["Star", "circle"], device="cpu")(pictures[0])
    keep = (everything.scores >= middle) & np.isin(everything.labels, [2, 4])
    np.testing.assert_array_equal(some.scores, everything.scores[keep])
    assert len(Detector(checkpoint, conf=0.0, device="cpu")(pictures[0], conf=middle)) == int(
        (everything.scores >= middle).sum()
    )
    with pytest.raises(DataError, match=r"stra.*did you mean star\?"):
        Detector(checkpoint, classes=["stra"], device="cpu")


def test_a_result_in_other_forms(checkpoint, pictures):
    result = Detector(checkpoint, conf=CONF, device="cpu")(pictures[0])
    coco = result.to_coco(image_id=7)
    x1, y1, x2, y2 = (float(value) for value in result.boxes_xyxy[0])
    assert coco[0]["image_id"] == 7 and coco[0]["category_name"] == result.names[0]
    assert coco[0]["category_id"] == int(result.labels[0])
    assert coco[0]["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-4)
    json.dumps(coco)
    given = result.to_supervision()
    np.testing.assert_array_equal(given.xyxy, result.boxes_xyxy)
    assert list(given.data["class_name"]) == list(result.names) and given.class_id.dtype.kind == "i"
    plain, drawn = np.asarray(Image.open(pictures[0]).convert("RGB")), np.asarray(result.plot())
    assert drawn.shape == plain.shape and (drawn != plain).any()
    bare = np.asarray(result.plot(show_labels=False))
    assert 0 < (bare != plain).any(-1).sum() < (drawn != plain).any(-1).sum()


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4, 7), np.uint8), "7 channels"),
        (np.zeros((0, 4, 3), np.uint8), "no picture"),
        (42, "int"),
        ("missing.jpg", "does not exist"),
    ],
)
def test_what_is_no_picture_is_refused(checkpoint, picture, words):
    with pytest.raises(DataError, match=words):
        Detector(checkpoint, device="cpu")(picture)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"conf": 1.5}, "conf"),
        ({"batch_size": 0}, "batch_size"),
        ({"precision": "int8"}, "precision"),
        ({"size": (800, 100)}, "size"),
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:99"}, "device"),
        ({"class_names": ["a", "b", "c", "d"]}, "names other classes"),
    ],
)
def test_wrong_arguments_are_refused(checkpoint, options, words):
    with pytest.raises((DataError, WeightsError), match=words):
        Detector(checkpoint, **options)


def test_half_precision_is_near(checkpoint, pictures):
    full = Detector(checkpoint, conf=0.0, device="cpu")(pictures[0])
    half = Detector(checkpoint, conf=0.0, device="cpu", precision="bf16", warmup=1)(pictures[0])
    assert half.scores.dtype == np.float32
    np.testing.assert_allclose(half.scores[:5], full.scores[:5], atol=0.02)
    assert (half.scores != full.scores).any()


def test_importing_the_package_stays_light():
    code = "import sys, ddetr_mm; print([m for m in ('torch', 'mmdet', 'cv2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="Detectors"):
        _ = ddetr_mm.Detectors


# --- Files of other formats ---


@pytest.mark.parametrize("to", ["tao", "official"])
def test_other_formats_give_the_same_detections(to, checkpoint, pictures, tmp_path):
    target = tmp_path / f"{to}.pth"
    convert_checkpoint(checkpoint, target, to)
    expected = Detector(checkpoint, conf=CONF, device="cpu")(pictures[0])
    result = Detector(target, conf=CONF, device="cpu")(pictures[0])
    np.testing.assert_allclose(result.boxes_xyxy, expected.boxes_xyxy, atol=1e-3)
    assert result.names == expected.names


def test_an_onnx_file_gives_what_inference_does(trained_project, checkpoint, pictures):
    file = trained_project.folder / "predict.onnx"
    trained_project.tiny("export", f"export.checkpoint={checkpoint}", f"export.onnx_file={file}")
    folder = trained_project.folder / "of_onnx"
    words = (f"inference.checkpoint={file}", f"inference.conf_threshold={CONF}")
    trained_project.tiny("inference", *words, f"inference.results_dir={folder}")
    detector = Detector(file, conf=CONF, device="cpu")
    assert detector.notes == []
    result = detector(pictures[0])
    expected = read_rows(next(folder.rglob("labels")) / f"{pictures[0].stem}.txt")
    np.testing.assert_allclose(np.sort(result.scores), np.sort([row[2] for row in expected]), atol=6e-4)
    assert sorted(result.names) == sorted(row[0] for row in expected)


@pytest.fixture(scope="module")
def two_stage(tmp_path_factory) -> Path:
    """A stock two-stage detector of mmdet, which no spec describes, without class names or a config."""
    network = build_detector(as_two_stage=True, backbone="resnet_18", neck_bias=False)
    path = tmp_path_factory.mktemp("weights") / "two_stage.pth"
    return write_mmdet(path, network.state_dict())


def test_a_file_without_class_names_asks_for_them(two_stage, pictures, tmp_path):
    with pytest.raises(WeightsError, match="names no classes"):
        Detector(two_stage)
    listed = tmp_path / "names.txt"
    listed.write_text("ape\nbear\ncat\ndog\neel\n")
    for given in (listed, ["ape", "bear", "cat", "dog", "eel"]):
        detector = Detector(two_stage, class_names=given, conf=0.0, device="cpu", size=(200, 300))
        assert detector.names == {1: "ape", 2: "bear", 3: "cat", 4: "dog", 5: "eel"}
    result = detector(pictures[0])
    assert len(result) and set(result.names) <= {"ape", "bear", "cat", "dog", "eel"}
    with pytest.raises(WeightsError, match="COCO"):
        Detector(two_stage, class_names="coco")


def test_what_the_file_does_not_say_is_said(two_stage):
    notes = " ".join(Detector(two_stage, class_names="numbers", device="cpu").notes)
    assert "dataset.augmentation.test_random_resize=800" in notes and "model.nheads=8" in notes


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="does not exist"):
        Detector(tmp_path / "none.pth")


# --- Settings from configs inside files ---


def test_settings_of_a_config():
    steps = [dict(type="LoadImageFromFile"), dict(type="Resize", scale=[640, 480], keep_ratio=True)]
    config = dict(
        model=dict(
            backbone=dict(type="ResNet", depth=18, init_cfg=dict(type="Pretrained", checkpoint="http://x")),
            data_preprocessor=dict(pad_short_long=None, pad_size_divisor=32),
            test_cfg=dict(max_per_img=50),
        ),
        test_dataloader=dict(dataset=dict(pipeline=steps)),
    )
    assert settings_of_config(config) == dict(
        test_random_resize=480,
        random_resize_max_size=640,
        fixed_padding=False,
        pad_size_divisor=32,
        resize="fast",
        num_select=50,
        backbone=dict(type="ResNet", depth=18),
    )
    assert settings_of_config({"model": None, "test_dataloader": [1]}) == {}


def test_settings_of_a_spec():
    spec = {"dataset": {"augmentation": {"test_random_resize": 640}}, "model": {"num_select": 20}}
    assert settings_of_spec({"experiment_spec": spec}) == dict(test_random_resize=640, num_select=20)


@pytest.mark.parametrize(
    "values",
    [
        {"test_random_resize": "640"},
        {"test_random_resize": True},
        {"random_resize_max_size": 10**9},
        {"resize": "lanczos"},
        {"backbone": {"type": "os.system"}},
        {"backbone": {"type": "ResNet", "norm_cfg": {"type": "torch.nn.BatchNorm2d"}}},
        {"backbone": {"depth": 18}},
    ],
)
def test_settings_of_files_are_not_trusted(values):
    assert checked_settings(values) == {}


def test_a_backbone_that_is_no_backbone_is_refused(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=False)
    content["meta"]["cfg"] = content["meta"]["cfg"].replace("type='ResNet'", "type='FasterRCNN'")
    changed = tmp_path / "changed.pth"
    torch.save(content, changed)
    with pytest.raises(WeightsError, match="FasterRCNN"):
        Detector(changed, device="cpu")


def test_a_described_network_loads(checkpoint):
    found = describe(read_checkpoint(checkpoint))
    assert found.spec["model"]["return_interm_indices"] == [1, 2, 3]
    assert found.spec["model"]["nheads"] == 4 and found.spec["dataset"]["num_classes"] == 5
    assert found.class_names == ("background", "triangle", "star", "rectangle", "circle")
    assert found.assumed == {} and not found.two_stage


# --- The command ---


def test_wrong_numbers_are_named_as_options(checkpoint, pictures, tmp_path, capsys):
    words = ["predict", str(checkpoint), str(pictures[0]), "--out", str(tmp_path / "out")]
    assert main([*words, "--conf", "30", "--size", "300", "200"]) == 2
    shown = capsys.readouterr().err
    assert "--conf: is out of range (got 30.0); allowed: 0 to 1; 0.3 is 30 %" in shown.replace("\n", " ")
    assert "--size: is no size" in shown
    assert not (tmp_path / "out").exists()


def test_pictures_and_labels(checkpoint, pictures, labels_of_inference, tmp_path, capsys):
    out = tmp_path / "out"
    words = [
        "predict",
        str(checkpoint),
        str(pictures[0].parent),
        "--out",
        str(out),
        "--save-txt",
        "--batch-size",
        "4",
    ]
    assert main([*words, "--conf", str(CONF), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    # A rate of fewer than ten images would be the time that the start takes.
    assert re.search(rf"objects in {len(pictures)} images, [\d.]+ (s|a second): ", printed)
    found = json.loads((out / "predictions.json").read_text())
    assert [Path(one["file"]) for one in found["images"]] == pictures and found["skipped"] == []
    assert found["categories"][0] == {"id": 1, "name": "triangle"}
    for picture, entry in zip(pictures, found["images"], strict=True):
        mine, theirs = (
            read_rows(folder / f"{picture.stem}.txt") for folder in (out / "labels", labels_of_inference)
        )
        assert len(mine) == len(theirs) == len(entry["detections"])
        assert sorted(mine) == sorted(theirs)
        assert Image.open(out / "images_annotated" / picture.name).size == Image.open(picture).size
    # A second prediction into its own results replaces them.
    assert main([*words, "--conf", "0.9", "--device", "cpu"]) == 0
    again = json.loads((out / "predictions.json").read_text())
    assert sum(len(one["detections"]) for one in again["images"]) < sum(
        len(one["detections"]) for one in found["images"]
    )


def test_a_video_becomes_an_annotated_video(checkpoint, pictures, tmp_path, capsys):
    video = tmp_path / "clip.avi"
    frame = cv2.imread(str(pictures[0]))
    height, width = frame.shape[:2]
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), 10, (width, height))
    for _ in range(3):
        writer.write(frame)
    writer.release()
    out = tmp_path / "out"
    assert main(["predict", str(checkpoint), str(video), "--out", str(out), "--conf", "0.01"]) == 0
    assert "in 3 frames" in capsys.readouterr().out
    capture = cv2.VideoCapture(str(out / "videos_annotated" / "clip.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and capture.get(cv2.CAP_PROP_FPS) == 10
    found = json.loads((out / "predictions.json").read_text())["images"]
    assert [(one["frame"], one["time_s"], one["width"]) for one in found] == [
        (0, 0.0, width),
        (1, 0.1, width),
        (2, 0.2, width),
    ]


def test_a_broken_picture_is_skipped(checkpoint, pictures, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    (tmp_path / "good.png").write_bytes(pictures[0].read_bytes())
    out = tmp_path / "out"
    assert main(["predict", str(checkpoint), str(tmp_path / "*.*"), "--out", str(out)]) == 0
    assert "1 files were skipped" in capsys.readouterr().err
    found = json.loads((out / "predictions.json").read_text())
    assert [Path(one["file"]).name for one in found["skipped"]] == ["broken.jpg"]
    assert main(["predict", str(checkpoint), str(tmp_path / "broken.jpg"), "--out", str(out)]) == 2
    assert "none of the sources can be read" in capsys.readouterr().err


def test_what_we_did_not_write_stays(checkpoint, pictures, tmp_path, capsys):
    folder = tmp_path / "mine" / "images_annotated"
    folder.mkdir(parents=True)
    source = folder / "a.png"
    source.write_bytes(pictures[0].read_bytes())
    before = source.read_bytes()
    words = ["predict", str(checkpoint), str(source), "--out", str(tmp_path / "mine")]
    for more in ([], ["--force"]):
        assert main([*words, *more]) == 2
        assert "is read by this run" in capsys.readouterr().err
    other = tmp_path / "other" / "images_annotated" / "a.png"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    words[-1] = str(tmp_path / "other")
    assert main(words) == 2 and "--force" in capsys.readouterr().err and other.read_text() == "mine"
    assert source.read_bytes() == before and [*tmp_path.rglob("*.json")] == []
    assert main([*words, "--force"]) == 0 and Image.open(other).size == Image.open(source).size


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("none.jpg", "does not exist"),
        ("*.png", "fits the pattern"),
        ("notes.txt", "neither an image nor a video"),
        ("http://host/a.jpg", "not fetched"),
        ("empty", "no image was found"),
    ],
)
def test_sources_that_are_none(source, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("x")
    Path("empty").mkdir()
    with pytest.raises(DataError, match=words):
        find_sources([source])


def test_every_kind_of_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "sub/b.PNG", "sub/c.txt", "d.mp4"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"x")
    found = find_sources(["a.jpg", "sub", "*.mp4", "0", "**/*.jpg"])
    assert found.pictures == [Path("a.jpg"), Path("sub/b.PNG")]
    assert (found.videos, found.cameras) == ([Path("d.mp4")], [0])


def test_no_detection_names_the_highest_score(checkpoint, pictures, tmp_path, capsys):
    arguments = ["predict", str(checkpoint), str(pictures[0]), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--conf", "0.999"]) == 0
    scores = Detector(checkpoint, conf=0, device="cpu")(pictures[0]).scores
    note = f"note: the highest score is {scores.max():.2g}, below --conf 0.999"
    assert note in capsys.readouterr().err
