"""The spec sections ``export`` and ``gen_trt_engine``: what each field becomes in the work that is done."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddetr_mm.deploy.onnx_file import GraphSignature
from ddetr_mm.deploy.tensorrt import trtexec_command
from ddetr_mm.errors import SpecError, StackError
from ddetr_mm.spec import ExperimentSpec, load_spec
from ddetr_mm.tasks.export import export_options
from ddetr_mm.tasks.gen_trt_engine import engine_calibration, engine_settings
from ddetr_mm.tasks.session import choose_device

SIGNATURE = GraphSignature(Path("m.onnx"), (544, 960), None, 300, 91, {})
TRT = "gen_trt_engine.tensorrt."


def spec_of(folder: Path, subtask: str, *overrides: str) -> ExperimentSpec:
    """A spec with what the subtask cannot do without."""
    path = folder / "spec.yaml"
    path.write_text("results_dir: results\n")
    given = {
        "export": ("export.checkpoint=m.pth", "export.onnx_file=m.onnx"),
        "gen_trt_engine": ("gen_trt_engine.onnx_file=m.onnx",),
        "train": (),
    }[subtask]
    loaded = load_spec(path, [*given, *overrides], subtask, require_mandatory=subtask != "train")
    assert isinstance(loaded.spec, ExperimentSpec)
    return loaded.spec


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("export.input_width=320", "input_size_hw", (544, 320)),
        ("export.input_height=256", "input_size_hw", (256, 960)),
        ("export.batch_size=4", "batch_size", 4),
        ("export.batch_size=-1", "batch_size", -1),
        ("export.opset_version=18", "opset", 18),
        ("export.on_cpu=False", "plugin", True),
        ("export.on_cpu=True", "plugin", False),
        ("export.verbose=True", "verbose", True),
    ],
)
def test_export_options(tmp_path: Path, override: str, name: str, value: Any):
    assert getattr(export_options(spec_of(tmp_path, "export", override), ["a"]), name) == value


@pytest.mark.parametrize(
    ("override", "words"),
    [("export.input_channel=1", "export.input_channel"), ("export.format=xdl", "export.format")],
)
def test_what_cannot_be_exported_is_refused(tmp_path: Path, override: str, words: str):
    with pytest.raises(SpecError, match=words):
        spec_of(tmp_path, "export", override)


def command(tmp_path: Path, *overrides: str) -> str:
    """The build as TensorRT's own tool would do it."""
    spec = spec_of(tmp_path, "gen_trt_engine", *overrides)
    settings = engine_settings(spec, SIGNATURE)
    engine = spec.gen_trt_engine.trt_engine or "m.engine"
    return trtexec_command(
        settings, "m.onnx", engine, spec.gen_trt_engine.tensorrt.calibration.cal_cache_file
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((TRT + "workspace_size=512",), "--memPoolSize=workspace:512M"),
        ((TRT + "max_batch_size=8",), "--maxShapes=inputs:8x3x544x960"),
        ((TRT + "max_batch_size=8", TRT + "opt_batch_size=4"), "--optShapes=inputs:4x3x544x960"),
        (
            (TRT + "max_batch_size=8", TRT + "opt_batch_size=4", TRT + "min_batch_size=2"),
            "--minShapes=inputs:2x3x544x960",
        ),
        ((TRT + "data_type=FP16",), "--fp16"),
        (
            (
                TRT + "data_type=INT8",
                TRT + "calibration.cal_image_dir=[x]",
                TRT + "calibration.cal_cache_file=my.cache",
            ),
            "--int8 --fp16 --calib=my.cache",
        ),
        ((TRT + "data_type=FP16", TRT + "layers_precision=['a:fp32']"), "--layerPrecisions=a:fp32"),
        (("gen_trt_engine.timing_cache=t.cache",), "--timingCacheFile=t.cache"),
        (("gen_trt_engine.verbose=True",), "--verbose"),
        (("gen_trt_engine.trt_engine=other.engine",), "--saveEngine=other.engine"),
    ],
)
def test_engine_settings(tmp_path: Path, overrides: tuple[str, ...], words: str):
    usual = command(tmp_path)
    changed = command(tmp_path, *overrides)
    if "precision" in words.lower():
        words = words.split("=", maxsplit=1)[0]
    assert words in changed and words not in usual


def test_calibration_takes_images_batch_and_number(tmp_path: Path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for number in range(6):
            Image.new("RGB", (30, 20), (number, 0, 0)).save(tmp_path / name / f"{number}.png")

    def plan(*overrides: str) -> Any:
        spec = spec_of(
            tmp_path,
            "gen_trt_engine",
            TRT + "data_type=INT8",
            f"{TRT}calibration.cal_image_dir=[{tmp_path}/first]",
            f"{TRT}calibration.cal_cache_file={tmp_path}/c.cache",
            *overrides,
        )
        return engine_calibration(spec, SIGNATURE)

    shapes = [one.shape for one in plan(TRT + "calibration.cal_batch_size=2").arrays()]
    assert shapes == [(2, 3, 544, 960)]
    assert len(list(plan(TRT + "calibration.cal_batches=3").arrays())) == 3
    both = plan(
        f"{TRT}calibration.cal_image_dir=[{tmp_path}/first, {tmp_path}/second]",
        TRT + "calibration.cal_batches=12",
    )
    assert len(list(both.arrays())) == 12


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
@pytest.mark.parametrize("subtask", ["evaluate", "inference"])
def test_an_engine_goes_before_the_checkpoint(tmp_path: Path, subtask: str):
    from ddetr_mm.tasks.runner import exported_input

    engine = tmp_path / "m.engine"
    engine.write_bytes(b"x")
    assert exported_input("m.pth", None, where=subtask) is None
    with pytest.raises(StackError, match="TensorRT"):
        exported_input("m.pth", str(engine), where=subtask)


@pytest.mark.parametrize(
    ("overrides", "gpu_ids", "visible"),
    [
        ((), [0], "0"),
        ((), [2], "2"),
        ((), [1, 3], "1,3"),
        (("ddetr_mm.device=cpu",), [2], ""),
    ],
)
def test_the_process_sees_the_gpus_it_is_given(tmp_path: Path, monkeypatch, overrides, gpu_ids, visible):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    choose_device(spec_of(tmp_path, "train", *overrides), gpu_ids)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    if not overrides:
        choose_device(spec_of(tmp_path, "train"), gpu_ids)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"  # the environment has chosen already
