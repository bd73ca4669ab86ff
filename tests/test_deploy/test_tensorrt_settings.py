"""From spec values to what a TensorRT build is told, and its command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddetr_mm.deploy.onnx_file import OnnxSignature
from ddetr_mm.deploy.tensorrt_settings import builder_settings, parse_layer, trtexec_command
from ddetr_mm.errors import ExportError

DYNAMIC = OnnxSignature(Path("m.onnx"), (544, 960), None, 300, 91, {})
FIXED = OnnxSignature(Path("m.onnx"), (544, 960), 4, 300, 91, {})


def settings(signature=DYNAMIC, **changes):
    values = dict(data_type="FP32", workspace_mib=1024, batches=(1, 2, 8)) | changes
    return builder_settings(signature, **values)


def test_precisions_become_flags():
    assert settings().flags == ()
    assert settings(data_type="FP16").flags == ("FP16",)
    assert settings(data_type="int8").flags == ("INT8", "FP16")
    with pytest.raises(ExportError, match="data_type"):
        settings(data_type="bf16")


def test_memory_counts_in_mib_also_below_1024():
    assert settings(workspace_mib=512).workspace_bytes == 512 * 2**20
    assert settings(workspace_mib=0).workspace_bytes == 0


def test_batches_of_a_dynamic_and_a_fixed_graph():
    profile = settings().profile
    assert profile.shapes((544, 960)) == ((1, 3, 544, 960), (2, 3, 544, 960), (8, 3, 544, 960))
    fixed = settings(FIXED)
    assert not fixed.dynamic_batch and fixed.profile.shapes((2, 3))[0] == fixed.profile.shapes((2, 3))[2]
    assert fixed.profile.tuned == 4
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
