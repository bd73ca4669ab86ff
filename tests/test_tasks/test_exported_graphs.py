"""From a checkpoint to ONNX and on: evaluation and inference of the file, DeepStream's files, engines."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
import yaml
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

import ddetr_mm.register  # noqa: F401 - registers the detector
from ddetr_mm.cli import build_parser, main
from ddetr_mm.deploy.onnx_file import Normalisation, load_batch, ort_forward
from ddetr_mm.engine.runner import QuietRunner
from ddetr_mm.spec import load_spec
from ddetr_mm.tasks.runner import config_source, exported_input, load_checkpoint

CHECKPOINT, ONNX, IMAGES = "model.pth", "out/chain.onnx", 6
NAMES = ("background", "triangle", "star", "rectangle", "circle")
SPEC = """
results_dir: results
dataset:
  val_data_sources: [{image_dir: images, json_file: truth.json}]
  test_data_sources: {image_dir: images, json_file: truth.json}
  infer_data_sources: {image_dir: images}
  num_classes: 5
  batch_size: 4
  workers: 0
  augmentation: {scales: [64], random_resize_max_size: 96, test_random_resize: 64, fixed_padding: false}
model:
  num_feature_levels: 2
  return_interm_indices: [1, 2]
  hidden_dim: 32
  nheads: 4
  dim_feedforward: 32
  enc_layers: 1
  dec_layers: 2
  num_queries: 12
  num_select: 12
export: {input_width: 96, input_height: 64, opset_version: 17}
ddetr_mm:
  device: cpu
  backbone: {type: ResNet, depth: 18, base_channels: 8, out_indices: [1, 2]}
"""


@dataclass(frozen=True)
class Project:
    """A folder with pictures, a spec and a checkpoint of random weights."""

    folder: Path

    @property
    def spec(self) -> str:
        """Path of the experiment spec."""
        return str(self.folder / "spec.yaml")


@contextmanager
def inside(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def command(project: Project, capsys, name: str, *words: str) -> tuple[int, str]:
    """Run a command in this process; its status and all it said."""
    with inside(project.folder):
        status = main([name, "-e", project.spec, *words])
    told = capsys.readouterr()
    return status, told.out + told.err


def write_pictures(folder: Path) -> None:
    """Pictures of smooth noise, and annotations without boxes."""
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / "images" / f"{number}.png"), cv2.resize(coarse, (120, 90)))


def write_checkpoint(folder: Path, name: str = CHECKPOINT, *overrides: str) -> None:
    """Random weights that find something everywhere."""
    loaded = load_spec(folder / "spec.yaml", list(overrides), None)
    init_default_scope("mmdet")
    torch.manual_seed(0)
    model = MODELS.build(Config.fromstring(config_source(loaded, "evaluate"), ".py").model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    meta = dict(dataset_meta=dict(classes=NAMES, category_ids=(None, 1, 2, 3, 4)))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / name)


def write_truth(folder: Path, graph: Path | None) -> None:
    """Annotations: each picture's three best boxes, moved a little, so that AP is neither 0 nor 1."""
    annotations: list[dict] = []
    if graph is not None:
        paths = [folder / "images" / f"{number}.png" for number in range(IMAGES)]
        imagenet = Normalisation((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
        logits, boxes = ort_forward(graph)(load_batch(paths, (64, 96), imagenet))
        for image in range(IMAGES):
            best = np.argsort(-logits[image, :, 1:].max(-1))[:3]
            for query in best:
                cx, cy, w, h = boxes[image, query] * [120, 90, 120, 90] + [1.5, 0, 0, 0]
                box = [float(value) for value in (cx - w / 2, cy - h / 2, w, h)]
                category = int(logits[image, query, 1:].argmax()) + 1
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=image + 1,
                        category_id=category,
                        bbox=box,
                        area=box[2] * box[3],
                        iscrowd=0,
                    )
                )
    images = [dict(id=n + 1, file_name=f"{n}.png", width=120, height=90) for n in range(IMAGES)]
    categories = [dict(id=number, name=name) for number, name in enumerate(NAMES) if number]
    (folder / "truth.json").write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories))
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Project:
    """A project with an exported graph and DeepStream's files."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "images").mkdir()
    (folder / "spec.yaml").write_text(SPEC)
    with inside(folder):
        write_pictures(folder)
        write_checkpoint(folder)
        write_truth(folder, None)
        words = [
            f"export.checkpoint={CHECKPOINT}",
            f"export.onnx_file={ONNX}",
            "export.serialize_nvdsinfer=true",
        ]
        assert main(["export", "-e", "spec.yaml", *words]) == 0
        write_truth(folder, folder / ONNX)
    return Project(folder)


def test_export_compares_on_validation_images_and_writes_deepstreams_files(exported: Project):
    folder = (exported.folder / ONNX).parent
    report = json.loads((folder / "chain.parity.json").read_text())
    assert report["passed"] and report["images"] == "validation"
    assert (folder / "labels.txt").read_text().split() == [
        "background",
        "triangle",
        "star",
        "rectangle",
        "circle",
    ]
    config = yaml.safe_load((folder / "nvdsinfer_config.yaml").read_text())["property"]
    assert config["num-detected-classes"] == 5 and config["infer-dims"] == "3;64;96"


def test_an_existing_file_needs_force(exported: Project, capsys):
    words = (f"export.checkpoint={CHECKPOINT}", f"export.onnx_file={ONNX}")
    status, told = command(exported, capsys, "export", *words)
    assert status == 2 and "exists already" in told and "--force" in told
    assert command(exported, capsys, "export", *words, "--force")[0] == 0


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("x.etlt", "encrypted files are not written"),
        ("images", "is a folder"),
        (f"{CHECKPOINT}/x.onnx", "cannot be written to"),
    ],
)
def test_targets_that_cannot_be_written(exported: Project, capsys, target, words):
    status, told = command(
        exported, capsys, "export", f"export.checkpoint={CHECKPOINT}", f"export.onnx_file={target}"
    )
    assert status == 2 and words in told and "Traceback" not in told


def test_opset_and_missing_checkpoint_are_reported(exported: Project, capsys):
    status, told = command(
        exported,
        capsys,
        "export",
        f"export.checkpoint={CHECKPOINT}",
        "export.onnx_file=x.onnx",
        "export.opset_version=99",
    )
    assert status == 2 and "export.opset_version" in told
    status, told = command(exported, capsys, "export", "export.checkpoint=no.pth", "export.onnx_file=x.onnx")
    assert status == 2 and "no.pth" in told and not (exported.folder / "x.onnx").exists()


@pytest.mark.parametrize(
    ("override", "told_words"),
    [
        ("export.batch_size=0", ("export.batch_size", "at least 1")),
        ("export.batch_size=-3", ("export.batch_size",)),
        ("export.input_height=0", ("export.input_height",)),
        ("dataset.num_classes=3", ("the class list and the checkpoint disagree", "5 names")),
        ("export.checkpoint=foreign.pth", ("foreign.pth",)),
        ("export.opset_version=10 export.on_cpu=false", ("export.opset_version", "11 to 20")),
        ("export.opset_version=21", ("export.opset_version", "16 to 20")),
    ],
)
def test_one_message_for_wrong_values(exported: Project, capsys, override, told_words):
    # A checkpoint, but of another network.
    torch.save(dict(state_dict={"fc.weight": torch.zeros(10, 4)}), exported.folder / "foreign.pth")
    words = (f"export.checkpoint={CHECKPOINT}", "export.onnx_file=refused.onnx", *override.split())
    status, told = command(exported, capsys, "export", *words)
    assert status == 2 and all(word in told for word in told_words) and "Traceback" not in told, told
    assert not list(exported.folder.glob("refused*"))


def test_engines_refuse_wrong_files(exported: Project, capsys, tmp_path: Path):
    (tmp_path / "there.engine").write_bytes(b"x")
    for onnx_file, engine, words in (
        ("no.onnx", "m.engine", "no.onnx"),
        (CHECKPOINT, "m.engine", "gen_trt_engine.onnx_file: is a checkpoint; export it first"),
        (ONNX, "there.engine", "exists already"),
    ):
        arguments = (
            f"gen_trt_engine.onnx_file={onnx_file}",
            f"gen_trt_engine.trt_engine={tmp_path / engine}",
        )
        arguments += (f"gen_trt_engine.results_dir={tmp_path}",)
        status, told = command(exported, capsys, "gen_trt_engine", *arguments)
        assert status == 2 and words in told and "Traceback" not in told, told
    assert (tmp_path / "there.engine").read_bytes() == b"x" and not (tmp_path / "m.engine").exists()


def test_an_opset_whose_sampling_tensorrt_reads_wrongly(exported: Project, capsys, tmp_path: Path):
    """From opset 20 on GridSample's mode is called linear, which TensorRT takes for nearest."""
    graph = tmp_path / "m.onnx"
    words = (
        f"export.checkpoint={CHECKPOINT}",
        f"export.onnx_file={graph}",
        f"export.results_dir={tmp_path}",
        "export.opset_version=20",
    )
    status, said = command(exported, capsys, "export", *words)
    assert status == 0 and "issue 4646" in said and "export.opset_version 17 to 19" in said
    with inside(exported.folder):
        assert main(["check", "--for", "export", "--quick", "-e", exported.spec, *words]) == 0
        assert "issue 4646" in capsys.readouterr().out
        assert main(["check", "--for", "export", "--quick", "-e", exported.spec, *words[:3]]) == 0
        assert "4646" not in capsys.readouterr().out
    engine = (
        f"gen_trt_engine.onnx_file={graph}",
        f"gen_trt_engine.trt_engine={tmp_path / 'm.engine'}",
        f"gen_trt_engine.results_dir={tmp_path}",
    )
    status, said = command(exported, capsys, "gen_trt_engine", *engine)
    assert (
        status == 2 and "gen_trt_engine.onnx_file: cannot become an engine" in said and "trtexec" not in said
    )
    with inside(exported.folder):
        assert main(["check", "--for", "gen_trt_engine", "-e", exported.spec, *engine]) == 2
        assert "cannot become an engine" in capsys.readouterr().err


def test_onnx_and_pytorch_have_the_same_ap(exported: Project, capsys, tmp_path: Path):
    # Four images a batch, six images: the last batch is incomplete and counts.
    words = [f"evaluate.checkpoint={ONNX}", f"evaluate.results_dir={tmp_path / 'onnx'}"]
    assert command(exported, capsys, "evaluate", *words)[0] == 0
    found = json.loads((tmp_path / "onnx" / "results.json").read_text())
    with inside(exported.folder):
        loaded = load_spec(exported.spec, [*words, f"evaluate.results_dir={tmp_path / 'torch'}"], "evaluate")
        graph = exported_input(ONNX, where="evaluate")
        config = Config.fromstring(config_source(loaded, "evaluate", ONNX, graph), ".py")
        network = Config.fromstring(config_source(loaded, "evaluate", CHECKPOINT), ".py").model
        config.model = {**network, "data_preprocessor": config.model.data_preprocessor}
        runner = QuietRunner.from_cfg(config)
        load_checkpoint(runner.model, CHECKPOINT, where="test")
        runner.test()
    expected = json.loads((tmp_path / "torch" / "results.json").read_text())
    images = {entry["image_id"] for entry in json.loads((tmp_path / "onnx" / "predictions.json").read_text())}
    assert len(images) == 6
    assert found.keys() == expected.keys() and 0.05 < found["AP"] < 1
    assert all(abs(found[name] - expected[name]) < 1e-3 for name in expected)


def test_inference_takes_the_file_and_knows_its_classes(exported: Project, capsys, tmp_path: Path):
    status, _ = command(
        exported,
        capsys,
        "inference",
        f"inference.checkpoint={ONNX}",
        f"inference.results_dir={tmp_path}",
        "inference.conf_threshold=0.01",
    )
    assert status == 0
    lines = [line for path in (tmp_path / "labels").glob("*.txt") for line in path.read_text().splitlines()]
    assert lines and {line.split()[0] for line in lines} <= {"triangle", "star", "rectangle", "circle"}


RESNET18 = "ddetr_mm.backbone={type: ResNet, depth: 18, out_indices: [1, 2]}"
"""Of the usual width: Hugging Face's models have no other."""


@pytest.fixture(scope="module")
def resnet18(exported: Project) -> Path:
    """A folder with mmdet's checkpoint of a ResNet-18 and its graph."""
    folder = exported.folder / "formats"
    folder.mkdir()
    write_checkpoint(exported.folder, "formats/mmdet.pth", RESNET18)
    words = ["export.checkpoint=formats/mmdet.pth", "export.onnx_file=formats/mmdet.onnx", RESNET18]
    with inside(exported.folder):
        assert main(["export", "-e", exported.spec, *words]) == 0
    return folder


@pytest.mark.parametrize("kind", ["tao", "official", "hf"])
def test_checkpoints_of_every_format_are_exported(exported: Project, resnet18: Path, capsys, kind):
    weights, target = resnet18 / (kind if kind == "hf" else f"{kind}.pth"), resnet18 / f"{kind}.onnx"
    assert main(["weights", str(resnet18 / "mmdet.pth"), str(weights), "--to", kind]) == 0
    # No validation images are needed.
    words = (f"export.checkpoint={weights}", f"export.onnx_file={target}", RESNET18)
    status, told = command(exported, capsys, "export", *words, "dataset.val_data_sources=null")
    assert status == 0, told
    report = json.loads((resnet18 / f"{kind}.parity.json").read_text())
    assert report["passed"] and report["images"] == "generated"
    assert [batch["batch_size"] for batch in report["batches"]] == [1, 2, 7]
    # The same weights give the same graph, whichever format they came in.
    images = np.random.default_rng(3).standard_normal((1, 3, 64, 96)).astype(np.float32)
    for found, expected in zip(
        ort_forward(target)(images), ort_forward(resnet18 / "mmdet.onnx")(images), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_another_class_count_is_refused(exported: Project, capsys, tmp_path: Path):
    status, told = command(
        exported,
        capsys,
        "evaluate",
        f"evaluate.checkpoint={ONNX}",
        f"evaluate.results_dir={tmp_path}",
        "dataset.num_classes=9",
    )
    assert status == 2 and "dataset.num_classes" in told


def test_engines_print_trtexec_and_say_what_to_install(exported: Project, capsys, tmp_path: Path):
    words = (
        f"gen_trt_engine.onnx_file={ONNX}",
        f"gen_trt_engine.trt_engine={tmp_path / 'm.engine'}",
        f"gen_trt_engine.results_dir={tmp_path}",
        "gen_trt_engine.tensorrt.max_batch_size=4",
        "gen_trt_engine.tensorrt.data_type=FP16",
    )
    status, told = command(exported, capsys, "gen_trt_engine", *words)
    assert "--maxShapes=inputs:4x3x64x96 --fp16" in told
    if "tensorrt" not in sys.modules:
        assert (
            status == 2 and "TensorRT is not installed here" in told and not (tmp_path / "m.engine").exists()
        )
    (tmp_path / "any.engine").write_bytes(b"x")
    status, told = command(exported, capsys, "evaluate", f"evaluate.trt_engine={tmp_path / 'any.engine'}")
    assert status == 2 and ("TensorRT" in told)


def test_calibration_images_are_demanded(exported: Project, capsys, tmp_path: Path):
    words = (
        f"gen_trt_engine.onnx_file={ONNX}",
        f"gen_trt_engine.results_dir={tmp_path}",
        "gen_trt_engine.tensorrt.data_type=INT8",
        "gen_trt_engine.tensorrt.calibration.cal_image_dir=[images]",
        f"gen_trt_engine.tensorrt.calibration.cal_cache_file={tmp_path / 'cal.bin'}",
        "gen_trt_engine.tensorrt.calibration.cal_batches=50",
    )
    status, told = command(exported, capsys, "gen_trt_engine", *words)
    assert status == 2 and "cal_batches * cal_batch_size" in told


def test_force_is_an_argument_of_both_commands():
    for name in ("export", "gen_trt_engine"):
        parsed = build_parser().parse_args([name, "-e", "x.yaml", "--force"])
        assert parsed.force


# --- tools/onnx_predict.py ---

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "onnx_predict.py"


def load_script():
    spec = importlib.util.spec_from_file_location("onnx_predict", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sorted_rows(rows: list[tuple[str, float, list[float]]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, scores (K,) and boxes_xyxy (K, 4), by name and then box."""
    rows = sorted(rows, key=lambda row: (row[0], row[2]))
    return [row[0] for row in rows], np.array([row[1] for row in rows]), np.array([row[2] for row in rows])


@pytest.mark.parametrize("batch", [-1, 2])
@pytest.mark.parametrize("scale", [1, 3], ids=["as_is", "shrunk"])
def test_the_script_predicts_as_inference_does(exported: Project, capsys, tmp_path: Path, batch, scale):
    """Its own folder of pictures with sharp pixels, where the ways to shrink differ."""
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(4)
    for number in range(3):
        picture = cv2.resize(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8), (120 * scale, 90 * scale))
        cv2.imwrite(str(tmp_path / "pictures" / f"{number}.png"), picture)
    graph = tmp_path / "m.onnx"
    mean, std = "[0.5,0.4,0.3]", "[0.2,0.25,0.3]"
    words = [f"dataset.augmentation.input_mean={mean}", f"dataset.augmentation.input_std={std}"]
    words += ["model.num_select=9"]
    export = (f"export.checkpoint={CHECKPOINT}", f"export.onnx_file={graph}", f"export.batch_size={batch}")
    assert command(exported, capsys, "export", *words, *export)[0] == 0
    words += [f"inference.checkpoint={graph}", f"inference.results_dir={tmp_path / 'out'}"]
    words += [f"dataset.infer_data_sources.image_dir=[{tmp_path / 'pictures'}]"]
    words += ["inference.conf_threshold=0.5"]
    assert command(exported, capsys, "inference", *words)[0] == 0
    labels = next((tmp_path / "out").rglob("labels"))
    for number in range(3):
        lines = [line.split() for line in (labels / f"{number}.txt").read_text().splitlines()]
        expected = [(line[0], float(line[-1]), [float(value) for value in line[4:8]]) for line in lines]
        image = tmp_path / "pictures" / f"{number}.png"
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(graph), str(image), "--conf", "0.5"],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        printed = [line.split("\t") for line in done.stdout.splitlines()]
        found = [(row[0], float(row[1]), [float(value) for value in row[2:]]) for row in printed]
        assert [row[1] for row in found] == sorted((row[1] for row in found), reverse=True)
        assert len(found) == 9
        names, scores, boxes = sorted_rows(found)
        expected_names, expected_scores, expected_boxes = sorted_rows(expected)
        assert names == expected_names
        np.testing.assert_allclose(scores, expected_scores, atol=0.01)
        np.testing.assert_allclose(boxes, expected_boxes, atol=1)


@pytest.mark.parametrize("size_hw", [(64, 96), (90, 60), (45, 60), (200, 301), (1, 1)])
def test_the_scripts_resize_is_opencvs(size_hw):
    image = np.random.default_rng(2).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    expected = cv2.resize(image, size_hw[::-1], interpolation=cv2.INTER_LINEAR)
    differences = np.abs(load_script().resize(image, size_hw).astype(int) - expected)
    assert differences.max() <= 1 and differences.mean() < 0.005


def test_the_script_reads_labels_beside_a_file_without_metadata(exported: Project, tmp_path: Path):
    model = onnx.load(str(exported.folder / ONNX))
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "bare.onnx"))
    image = exported.folder / "images" / "0.png"
    script = load_script()
    expected = script.predict(exported.folder / ONNX, image, 0.3)[
        :12
    ]  # ImageNet's values and 12 in its metadata
    unnamed = script.predict(tmp_path / "bare.onnx", image, 0.3)
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    named = script.predict(tmp_path / "bare.onnx", image, 0.3)
    assert len(expected) == 12 and named[:12] == expected
    assert [row[0] for row in unnamed] == [f"class {NAMES.index(row[0])}" for row in named]


def test_the_script_turns_pictures_upright_and_refuses_deep_ones(tmp_path: Path):
    pixels = np.random.default_rng(3).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    script = load_script()
    np.testing.assert_array_equal(script.read_image(tmp_path / "turned.png"), np.rot90(pixels, -1))
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((4, 4), 40000, np.uint16))
    with pytest.raises(ValueError, match=r"deep.png: has more than 8 bits"):
        script.read_image(tmp_path / "deep.png")


def test_the_script_imports_only_what_its_page_names():
    imported = re.findall(r"^(?:import|from) (\w+)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(imported) - sys.stdlib_module_names == {"numpy", "onnxruntime", "PIL"}
