"""Disk and memory: the arithmetic, and what would make a step fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddetr_mm.files import size_text
from ddetr_mm.preflight.annotations import largest_padded_hw
from ddetr_mm.preflight.resources import (
    GIB,
    MemoryNeed,
    ModelSize,
    available_host_memory,
    check_cpu_precision,
    check_disk,
    check_memory,
    num_checkpoints,
)
from ddetr_mm.spec.schema import AugmentationConfig

SIZE = ModelSize(weights=160 << 20, trained=150 << 20)
NEED = MemoryNeed(SIZE, per_image=2 * GIB, batch_size=4, padded_hw=(800, 1333))
OPTIONS = {"train.activation_checkpoint": True, "train.precision": False, "model.train_backbone": True}


def test_bytes_of_the_parts():
    assert SIZE.checkpoint == (160 + 300) << 20
    assert NEED.total == ((160 + 150 + 300) << 20) + 8 * GIB


def test_a_step_that_fits_gives_no_finding():
    assert check_memory(NEED, 80 * GIB, "GPU", OPTIONS).findings == []
    assert [f.kind for f in check_memory(NEED, 10 * GIB, "GPU", OPTIONS).findings] == ["memory-tight"]


def test_a_step_that_does_not_fit_names_what_would():
    section = check_memory(NEED, 6 * GIB, "GPU", OPTIONS)
    (finding,) = section.findings
    assert finding.kind == "memory-too-small" and finding.weight == "fault"
    text = str(finding.problem)
    assert "dataset.batch_size=2 (about 4.6 GiB)" in text and "activation_checkpoint=True" in text
    assert "train.precision" not in text and "6.0 GiB" in text


def test_a_network_that_is_too_large_by_itself():
    text = str(check_memory(NEED, GIB // 2, "GPU", OPTIONS).findings[0].problem)
    assert "dataset.batch_size=" not in text and "a smaller network" in text


def test_disk(tmp_path):
    folder = tmp_path / "not" / "yet"
    assert check_disk(folder, 2, 1000).findings == []
    (finding,) = check_disk(folder, 1000, 1 << 50).findings
    assert finding.kind == "disk-too-small" and str(tmp_path) in str(finding.problem)
    assert "checkpoint_interval 1000 times" in str(finding.problem)
    assert not folder.exists()


@pytest.mark.parametrize(
    "arguments, expected", [((50, 1, "epoch", 10), 50), ((50, 20, "epoch", 10), 3), ((2, 100, "step", 75), 2)]
)
def test_number_of_checkpoints(arguments, expected):
    assert num_checkpoints(*arguments) == expected


def test_largest_batch():
    augmentation = AugmentationConfig(scales=[400, 800], random_resize_max_size=1333)
    lying = np.array([[480, 640], [500, 1000]])
    assert largest_padded_hw(lying, augmentation) == (800, 1333)
    mixed = np.array([[480, 640], [640, 480]])
    assert largest_padded_hw(mixed, augmentation) == (1333, 1333)
    augmentation.fixed_padding = False
    assert largest_padded_hw(np.array([[480, 640]]), augmentation) == (800, 1067)
    augmentation.pad_size_divisor = 32  # outside training only
    assert largest_padded_hw(np.array([[480, 640]]), augmentation) == (800, 1067)
    augmentation.fixed_random_crop = 512
    assert largest_padded_hw(mixed, augmentation) == (512, 512)


def test_this_machine_has_memory():
    assert available_host_memory() > 50 << 20


def test_sizes_for_readers():
    assert [size_text(value) for value in (12, 2048, 5 * GIB)] == ["12 B", "2.0 KiB", "5.0 GiB"]


@pytest.mark.parametrize(
    ("flags", "value", "advised"),
    [
        ("sse amx_bf16 x", "fp32", True),
        ("sse avx512_bf16", "fp32", True),
        ("sse amx_bf16", "bf16", False),
        ("avx512_vnni", "fp32", False),
    ],
)
def test_bfloat16_is_advised_where_the_cpu_has_it_in_hardware(tmp_path: Path, flags, value, advised):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbogomips\t: 1\n")
    sections = check_cpu_precision("train.precision", value, cpuinfo)
    assert [one.findings[0].problem.hint.split()[0] for one in sections] == ["train.precision=bf16"] * advised
    assert check_cpu_precision("train.precision", "fp32", tmp_path / "missing") == []
