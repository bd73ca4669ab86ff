"""DeepStream's files, and the replay of its parser."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from golden_files import BCCD
from test_onnx_export import export_onnx, tiny_detector

from ddetr_mm.deploy.deepstream import (
    CONFIG_NAME,
    LABELS_NAME,
    write_deepstream_files,
)
from ddetr_mm.deploy.onnx_file import Normalisation
from ddetr_mm.errors import ExportError

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from deepstream_replay import (
    NvinferConfig,
    check_deepstream,
    compare_detections,
    main,
    our_detections,
    replay_parser,
)

IMAGENET = Normalisation((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
REAL_IMAGE = BCCD / "val" / "images" / "BloodImage_00000.jpg"
NAMES = ["background", "person", "unknown", "dog"]


def written_config(folder, normalisation=IMAGENET, size_hw=(64, 96)):
    write_deepstream_files(folder / "m.onnx", size_hw, NAMES, normalisation)
    return NvinferConfig.read(folder / CONFIG_NAME)


def logit(score):
    return float(np.log(score / (1 - score)))


def test_the_files_hold_the_contract_and_the_values_of_the_spec(tmp_path):
    written_config(tmp_path, size_hw=(544, 960))
    content = yaml.safe_load((tmp_path / CONFIG_NAME).read_text())
    assert content["class-attrs-all"] == {"pre-cluster-threshold": 0.5, "topk": 20}
    assert content["property"] == {
        "cluster-mode": 4,
        "custom-lib-path": "/opt/nvidia/deepstream/deepstream/lib/libnvds_infercustomparser_tao.so",
        "gie-unique-id": 1,
        "infer-dims": "3;544;960",
        "labelfile-path": "labels.txt",
        "maintain-aspect-ratio": 1,
        "model-color-format": 0,
        "net-scale-factor": pytest.approx(0.0173520735728),
        "network-mode": 2,
        "network-type": 0,
        "num-detected-classes": 4,
        "offsets": "123.675;116.28;103.53",
        "onnx-file": "m.onnx",
        "output-blob-names": "pred_logits;pred_boxes",
        "output-tensor-meta": 1,
        "parse-bbox-func-name": "NvDsInferParseCustomDDETRTAO",
        "workspace-size": 1024,  # MiB in nvinfer: 1 GiB
    }
    assert (tmp_path / LABELS_NAME).read_text() == "background\nperson\nunknown\ndog\n"
    other = written_config(tmp_path, Normalisation((127.5,) * 3, (51.0,) * 3))
    assert other.offsets_rgb == (127.5,) * 3 and other.scale == pytest.approx(1 / 51)


def test_every_value_has_a_comment(tmp_path):
    written_config(tmp_path)
    lines = (tmp_path / CONFIG_NAME).read_text().splitlines()
    bare = [
        line.strip().partition(":")[0]
        for before, line in itertools.pairwise(lines)
        if line.startswith("  ") and "#" not in line and "#" not in before
    ]
    assert bare == []


def test_the_parsers_rules_one_by_one(tmp_path):
    config = written_config(tmp_path)
    scores = np.full((6, 4), 0.01)
    scores[0, 1] = 0.9
    scores[1, 3] = 0.8
    scores[2, 0], scores[2, 1] = 0.95, 0.9  # the background is its best class
    scores[3, 1] = 0.49  # below the threshold
    scores[4, 1] = 0.8  # ties with query 1 and overwrites it
    scores[5, 1], scores[5, 3] = 0.7, 0.6  # one class a query
    logits = np.vectorize(logit)(scores).astype(np.float32)
    boxes = np.tile(np.float32([0.5, 0.5, 0.5, 0.5]), (6, 1))
    boxes[0] = [0.0, 1.0, 0.5, 0.5]
    parsed = replay_parser(logits, boxes, config)
    assert parsed.queries.tolist() == [0, 4, 5] and parsed.labels.tolist() == [1, 1, 1]
    assert parsed.boxes_xyxy[0].tolist() == [0, 48, 24, 63]
    assert parsed.boxes_xyxy[1].tolist() == [24, 16, 72, 48]
    agreement = compare_detections(parsed, our_detections(logits, boxes, config))
    # Of ours, query 1 has fallen to the tie.
    assert (agreement.parsed, agreement.ours, agreement.matched) == (3, 4, 3)
    assert agreement.max_box_difference == 0 and agreement.max_score_difference < 1e-6


def test_the_parser_refuses_another_number_of_classes(tmp_path):
    with pytest.raises(ExportError, match="num-detected-classes"):
        replay_parser(np.zeros((2, 5)), np.zeros((2, 4)), written_config(tmp_path))


def write_generated_picture(path):
    picture = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(picture, (120, 90), interpolation=cv2.INTER_CUBIC))


@pytest.mark.parametrize(
    ("std", "nearest", "real"),
    [((57.63,) * 3, 0.01, False), (IMAGENET.std_rgb, 2.0, False), (IMAGENET.std_rgb, 2.0, True)],
)
def test_an_exported_graph_gives_deepstream_our_boxes(tmp_path, std, nearest, real, capsys):
    image = REAL_IMAGE if real else tmp_path / "a.png"
    if not real:
        write_generated_picture(image)
    detector = tiny_detector(tmp_path)
    # Some queries above the threshold of 0.5, few of them background.
    detector.bbox_head.cls_branches[-1].bias.data[:] = torch.tensor([-3.0, 0.5, 0.5, 0.5, 0.5, 0.5])
    meta = dict(
        input_mean=[value / 255 for value in IMAGENET.mean_rgb], input_std=[value / 255 for value in std]
    )
    export_onnx(detector, tmp_path / "m.onnx", input_size_hw=(64, 96), batch_size=1, meta=meta)
    names = ["background"] + ["unknown"] * 5
    write_deepstream_files(tmp_path / "m.onnx", (64, 96), names, Normalisation(IMAGENET.mean_rgb, std))
    agreement = check_deepstream(tmp_path / CONFIG_NAME, image)
    assert agreement.parsed > 3 and agreement.matched >= agreement.parsed - 1
    assert agreement.max_box_difference < nearest and agreement.max_score_difference < 0.05
    assert main([str(tmp_path / CONFIG_NAME), str(image)]) == 0
    assert capsys.readouterr().out == f"{agreement.summary()}\n"


def test_bad_configs_are_refused(tmp_path, capsys):
    broken = tmp_path / "x.yaml"
    broken.write_text("property: {infer-dims: 3;4}\n")
    with pytest.raises(ExportError, match="is not a config for nvinfer"):
        NvinferConfig.read(broken)
    assert main([str(broken), "a.png"]) == 2 and "error:" in capsys.readouterr().err


def test_the_module_runs_the_tool(tmp_path):
    broken = tmp_path / "x.yaml"
    broken.write_text("property: {infer-dims: 3;4}\n")
    command = [sys.executable, "-m", "ddetr_mm.deploy.deepstream"]
    result = subprocess.run([*command, broken, "a.png"], capture_output=True, text=True)
    assert result.returncode == 2 and "is not a config for nvinfer" in result.stderr
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("usage:")


def test_frames_keep_their_ratio_on_black(tmp_path):
    canvas = written_config(tmp_path).canvas(np.full((64, 64, 3), 255, np.uint8))
    assert canvas.shape == (64, 96, 3) and canvas[:, :64].min() == 255 and canvas[:, 64:].max() == 0
