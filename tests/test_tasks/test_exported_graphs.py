"""From a checkpoint to ONNX and on: evaluation and inference of the file, DeepStream's files, engines."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

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
