"""Settings of a TensorRT build, and INT8 calibration; no TensorRT is needed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from ddetr_mm.deploy.onnx_file import GraphSignature, Normalisation, load_batch
from ddetr_mm.deploy.tensorrt import (
    builder_flag,
    builder_settings,
    calibration_images,
    parse_layer,
    plan_calibration,
    trtexec_command,
)
from ddetr_mm.errors import DataError, ExportError, StackError

# --- Settings and trtexec ---

DYNAMIC = GraphSignature(Path("m.onnx"), (544, 960), None, 300, 91, {})
FIXED = GraphSignature(Path("m.onnx"), (544, 960), 4, 300, 91, {})


def settings(signature=DYNAMIC, **changes):
    values = dict(data_type="FP32", workspace_mib=1024, batches=(1, 2, 8)) | changes
    return builder_settings(signature, **values)


def test_precisions_become_flags():
    assert settings().flags == ()
    assert settings(data_type="FP16").flags == ("FP16",)
    assert settings(data_type="int8").flags == ("INT8", "FP16")
    with pytest.raises(ExportError, match="data_type"):
        settings(data_type="bf16")


@pytest.mark.parametrize(
    ("data_type", "formats", "flags"),
    [
        ("FP32", ("INT8",), ("INT8",)),
        ("FP16", ("INT8",), ("INT8", "FP16")),
        ("INT8", ("INT8",), ("INT8", "FP16")),
        ("FP16", ("FP8",), ("FP8", "FP16")),
    ],
)
def test_q_dq_graphs_need_flags_and_no_calibration(data_type: str, formats, flags):
    chosen = settings(data_type=data_type, quantized=formats)
    assert chosen.flags == flags
    assert not chosen.needs_calibration
    command = trtexec_command(chosen, "m.onnx", "m.engine", "cache.bin")
    assert all(f"--{flag.lower()}" in command for flag in flags) and "--calib" not in command


def test_memory_counts_in_mib_also_below_1024():
    assert settings(workspace_mib=512).workspace_bytes == 512 * 2**20
    assert settings(workspace_mib=0).workspace_bytes == 0


def test_batches_of_a_dynamic_and_a_fixed_graph():
    profile = settings().profile
    assert profile.shapes((544, 960)) == ((1, 3, 544, 960), (2, 3, 544, 960), (8, 3, 544, 960))
    fixed = settings(FIXED)
    assert not fixed.dynamic_batch and fixed.profile.shapes((2, 3))[0] == fixed.profile.shapes((2, 3))[2]
    assert fixed.profile.optimum == 4
    with pytest.raises(ExportError, match="min <= opt <= max"):
        settings(batches=(4, 2, 8))


def test_layer_precisions_act_beside_a_lower_precision_only():
    layers = ["/encoder/a:fp32", "*:fp16"]
    int8 = settings(data_type="INT8", layers_precision=layers)
    assert "PREFER_PRECISION_CONSTRAINTS" in int8.flags
    assert int8.layer_precision("/encoder/a") == "fp32" and int8.layer_precision("/x") == "fp16"
    assert settings(data_type="FP16").layer_precision("/x") is None
    fp32 = settings(layers_precision=layers)
    assert "PREFER_PRECISION_CONSTRAINTS" not in fp32.flags and fp32.layer_precision("/x") is None
    assert parse_layer("a:b:FP16").pattern == "a:b" and parse_layer("a:b:FP16").precision == "fp16"
    for text in ("fp16", "a:fp8", ":fp16"):
        with pytest.raises(ExportError, match="layers_precision"):
            parse_layer(text)


def test_trtexec_builds_the_same():
    command = trtexec_command(
        settings(data_type="INT8", layers_precision=["*head*:fp32"], timing_cache="t.cache", verbose=True),
        "my model.onnx",
        "m.engine",
        "cal.bin",
    )
    assert command == (
        "trtexec '--onnx=my model.onnx' --saveEngine=m.engine --memPoolSize=workspace:1024M "
        "--minShapes=inputs:1x3x544x960 --optShapes=inputs:2x3x544x960 --maxShapes=inputs:8x3x544x960 "
        "--int8 --fp16 --calib=cal.bin --precisionConstraints=prefer '--layerPrecisions=*head*:fp32' "
        "--timingCacheFile=t.cache --verbose"
    )
    assert trtexec_command(settings(FIXED, workspace_mib=0), "m.onnx", "m.engine") == (
        "trtexec --onnx=m.onnx --saveEngine=m.engine"
    )


# --- Calibration ---

HALF = Normalisation((0.0, 100.0, 0.0), (255.0, 50.0, 255.0))


def pictures(folder, count=5):
    """Pictures in two depths, some names the search must not find."""
    (folder / "deep" / "er").mkdir(parents=True)
    for number in range(count):
        place = folder if number % 2 else folder / "deep" / "er"
        bgr = np.full((8, 12, 3), (number, 100, 255), np.uint8)
        cv2.imwrite(str(place / f"{number}{'.JPG' if number == 0 else '.png'}"), bgr)
    (folder / "notes.txt").write_text("x")
    return folder


def plan(folder, **changes):
    values = dict(
        batch_size=2, batches=2, cache_file=None, fixed_batch=None, size_hw=(4, 6), normalisation=HALF
    )
    return plan_calibration([str(folder)], **(values | changes))


def test_images_are_found_at_any_depth_and_shuffled_alike(tmp_path):
    folder = pictures(tmp_path)
    paths = calibration_images([folder], at_least=5)
    assert sorted(path.name for path in paths) == ["0.JPG", "1.png", "2.png", "3.png", "4.png"]
    assert paths == calibration_images([folder, folder], at_least=5)
    assert paths != sorted(paths)


def test_batches_are_normalised_and_counted(tmp_path):
    batches = list(plan(pictures(tmp_path)).arrays())
    assert [batch.shape for batch in batches] == [(2, 3, 4, 6)] * 2 and batches[0].dtype == np.float32
    np.testing.assert_allclose(batches[0][:, 0], 1.0, atol=0.02)  # red 255 / 255
    np.testing.assert_allclose(batches[0][:, 1], 0.0, atol=0.1)  # (100 - 100) / 50
    assert len(next(plan(tmp_path, fixed_batch=4, batches=1).arrays())) == 4


def test_too_few_images_and_bad_folders(tmp_path):
    folder = pictures(tmp_path / "in")
    with pytest.raises(DataError, match=r"fewer images.*got 5.*6 or more"):
        plan(folder, batches=3)
    (tmp_path / "empty").mkdir()
    for wrong, words in ((tmp_path / "empty", "no images"), (tmp_path / "nowhere", "not a folder")):
        with pytest.raises(DataError, match=words):
            plan(wrong)
    with pytest.raises(DataError, match="cal_batches"):
        plan(folder, batches=0)
    with pytest.raises(DataError, match="not given"):
        calibration_images([], at_least=1)


def test_a_cache_is_read_and_never_overwritten(tmp_path):
    folder, cache = pictures(tmp_path / "in"), tmp_path / "cal.bin"
    first = plan(folder, cache_file=str(cache))
    assert not first.uses_cache and first.read_cache() is None and len(list(first.arrays())) == 2
    first.write_cache(b"ranges")
    again = plan(folder, cache_file=str(cache))
    assert again.uses_cache and again.read_cache() == b"ranges" and list(again.arrays()) == []
    again.write_cache(b"other")
    assert cache.read_bytes() == b"ranges"
    with pytest.raises(DataError, match="fewer images"):  # the images are demanded with a cache too
        plan(folder, cache_file=str(cache), batches=9)


def test_a_broken_image_is_named(tmp_path):
    broken = tmp_path / "x.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"x\.png"):
        load_batch([broken], (4, 4), HALF)


def test_calibration_reads_images_as_training_does(tmp_path: Path):
    """Twelve bits in a 16-bit file are scaled by the bits in use."""
    values = np.linspace(0, 4095, 32 * 32).astype(np.uint16).reshape(32, 32)
    cv2.imwrite(str(tmp_path / "a.png"), values)
    batch = load_batch([tmp_path / "a.png"], (32, 32), Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    np.testing.assert_array_equal(batch[0], np.repeat((values >> 4)[None].astype(np.float32), 3, axis=0))


@pytest.mark.parametrize(
    ("name", "words"), [("INT8", "build the Q/DQ file"), ("FP16", "build the .fp16.onnx")]
)
def test_a_tensorrt_without_precision_flags_is_named_with_what_to_do(name: str, words: str):
    trt = SimpleNamespace(__version__="11.0.0", BuilderFlag=SimpleNamespace(TF32=1))
    with pytest.raises(StackError, match=f"TensorRT 11.0.0 has no {name} flag") as caught:
        builder_flag(trt, name)
    assert words in str(caught.value)
    assert builder_flag(trt, "TF32") == 1
