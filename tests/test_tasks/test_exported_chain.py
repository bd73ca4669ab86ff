"""From a checkpoint to ONNX and on: evaluation and inference of the file, DeepStream's files, engines."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from ddetr_mm.cli import main

from .conftest import TINY, Project

LATEST = "results/shapes/train/dd_model_latest.pth"
ONNX = "results/shapes/export/chain.onnx"


@contextmanager
def inside(folder: Path):
    import os

    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def command(project: Project, capsys, name: str, *words: str) -> tuple[int, str]:
    """Run a command in this process; its status and all it said."""
    with inside(project.folder):
        status = main([name, "-e", project.spec, *TINY, *words])
    told = capsys.readouterr()
    return status, told.out + told.err


@pytest.fixture(scope="module")
def exported(trained_project: Project) -> Project:
    """The trained project with an exported graph and DeepStream's files."""
    with inside(trained_project.folder):
        words = [f"export.checkpoint={LATEST}", f"export.onnx_file={ONNX}", "export.serialize_nvdsinfer=true"]
        assert main(["export", "-e", trained_project.spec, *TINY, *words]) == 0
    return trained_project


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
    words = (f"export.checkpoint={LATEST}", f"export.onnx_file={ONNX}")
    status, told = command(exported, capsys, "export", *words)
    assert status == 2 and "exists already" in told and "--force" in told
    assert command(exported, capsys, "export", *words, "--force")[0] == 0


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("x.etlt", "encrypted files are not written"),
        ("results", "is a folder"),
        (f"{LATEST}/x.onnx", "cannot be written to"),
    ],
)
def test_targets_that_cannot_be_written(exported: Project, capsys, target, words):
    status, told = command(
        exported, capsys, "export", f"export.checkpoint={LATEST}", f"export.onnx_file={target}"
    )
    assert status == 2 and words in told and "Traceback" not in told


def test_opset_and_missing_checkpoint_are_told(exported: Project, capsys):
    status, told = command(
        exported,
        capsys,
        "export",
        f"export.checkpoint={LATEST}",
        "export.onnx_file=x.onnx",
        "export.opset_version=99",
    )
    assert status == 2 and "export.opset_version" in told
    status, told = command(exported, capsys, "export", "export.checkpoint=no.pth", "export.onnx_file=x.onnx")
    assert status == 2 and "no.pth" in told and not (exported.folder / "x.onnx").exists()


def test_onnx_and_pytorch_have_the_same_ap(exported: Project, capsys, tmp_path: Path):
    from mmengine.config import Config

    from ddetr_mm.runtime.quiet import QuietRunner
    from ddetr_mm.spec import load_spec
    from ddetr_mm.tasks.runner import config_source, exported_input, load_checkpoint

    # Four images a batch, six images: the last batch is incomplete and counts.
    words = [f"evaluate.checkpoint={ONNX}", f"evaluate.results_dir={tmp_path / 'onnx'}"]
    assert command(exported, capsys, "evaluate", *words)[0] == 0
    found = json.loads((tmp_path / "onnx" / "results.json").read_text())
    with inside(exported.folder):
        loaded = load_spec(
            exported.spec, [*TINY, *words, f"evaluate.results_dir={tmp_path / 'torch'}"], "evaluate"
        )
        graph = exported_input(ONNX, where="evaluate")
        config = Config.fromstring(config_source(loaded, "evaluate", ONNX, graph), ".py")
        network = Config.fromstring(config_source(loaded, "evaluate", LATEST), ".py").model
        config.model = {**network, "data_preprocessor": config.model.data_preprocessor}
        runner = QuietRunner.from_cfg(config)
        load_checkpoint(runner.model, LATEST, where="test")
        runner.test()
    expected = json.loads((tmp_path / "torch" / "results.json").read_text())
    images = {entry["image_id"] for entry in json.loads((tmp_path / "onnx" / "predictions.json").read_text())}
    assert len(images) == 6
    assert found.keys() == expected.keys()
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
        "gen_trt_engine.tensorrt.calibration.cal_image_dir=[results/shapes/data/val]",
        f"gen_trt_engine.tensorrt.calibration.cal_cache_file={tmp_path / 'cal.bin'}",
        "gen_trt_engine.tensorrt.calibration.cal_batches=50",
    )
    status, told = command(exported, capsys, "gen_trt_engine", *words)
    assert status == 2 and "cal_batches * cal_batch_size" in told


def test_force_is_an_argument_of_both_commands():
    from ddetr_mm.cli import build_parser

    for name in ("export", "gen_trt_engine"):
        parsed: Namespace = build_parser().parse_args([name, "-e", "x.yaml", "--force"])
        assert parsed.force
