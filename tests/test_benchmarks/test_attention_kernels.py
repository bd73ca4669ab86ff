"""``benchmarks/attention_kernels.py``: the kernels compiled for Hopper, and what attention keeps."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ddetr_mm.models.fused_sampling import BACKWARD_LAUNCHES, FORWARD_LAUNCHES
from ddetr_mm.models.triton_attention import has_triton

REPO = Path(__file__).resolve().parents[2]
CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FADD R5, R5, R4 ;
.L_x_1:
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*0050*/               @P0 BRA `(.L_x_0) ;
        /*0060*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0070*/                   EXIT ;
        /*0080*/                   NOP ;
"""


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """The script as a module."""
    sys.path.insert(0, str(REPO / "benchmarks"))
    try:
        return importlib.import_module("attention_kernels")
    finally:
        sys.path.pop(0)


def test_instructions_in_the_longest_loop_count_for_each_level(kernels: ModuleType) -> None:
    lines = kernels._instructions(CODE)
    inside = kernels._loop(lines)
    assert [opcode.split(".")[0] for opcode, _ in lines if opcode] == [
        *("LDC", "LDG", "FADD", "BRA", "RED", "BRA", "STG", "EXIT")
    ]
    assert [opcode.split(".")[0] for opcode, _ in inside if opcode] == ["LDG", "FADD", "BRA", "RED", "BRA"]
    counts = {what: kernels._count(lines, inside, parts) for what, parts in kernels._KINDS.items()}
    assert counts["global loads"] == counts["atomics"] == 4
    assert counts["global stores"] == 1 and counts["barriers"] == 0


def test_half_precision_keeps_half_for_the_backward_pass(kernels: ModuleType) -> None:
    points = kernels.HEADS * kernels.LEVELS * kernels.POINTS
    log_sums = 4 * kernels.HEADS
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        assert kernels.kept_bytes(False, dtype) == pytest.approx(3 * 4 * points, abs=1)  # and the sizes
        assert kernels.kept_bytes(True, dtype) == 3 * size * points + log_sums


def test_the_record_is_of_the_launches_in_use(kernels: ModuleType) -> None:
    for name, launches in (("fused_forward", FORWARD_LAUNCHES), ("fused_backward", BACKWARD_LAUNCHES)):
        assert kernels.CUTS[f"{name}_kernel"] == tuple(
            (one.queries, one.warps, one.merges) for one in launches
        )
        for one in launches:
            kind = name + ", merged" * one.merges
            assert f"| {kind} | fp32 | {one.queries} x {one.warps} |" in kernels.RECORD.read_text()


def test_additions_to_equal_cells_are_counted_once(kernels: ModuleType) -> None:
    same = torch.zeros(5, 4, 2)
    assert kernels.remaining_additions(same) == 4 / 16
    apart = same + 2 * torch.arange(4)[:, None]
    assert kernels.remaining_additions(apart) == 1
    # Neighbours in a row share a column of two cells.
    in_a_row = same + torch.tensor([1, 0]) * torch.arange(4)[:, None]
    assert kernels.remaining_additions(in_a_row) == 10 / 16


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a minute of processor time, which may be shared
@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_fused_kernels_spill_nothing_and_store_each_level_once(kernels: ModuleType) -> None:
    for dtype in ("fp32", "bf16"):
        forward = kernels.compile_kernel("fused_forward_kernel", 8, 1, dtype)
        backward = kernels.compile_kernel("fused_backward_kernel", 2, 1, dtype)
        before = kernels.compile_kernel("backward_kernel", 32, 4, dtype)
        assert forward.spilled == backward.spilled == before.spilled == 0
        assert max(forward.registers, backward.registers) <= 96
        # Four levels' offsets and all logits for two queries, against three a point for 32.
        assert backward.kinds["global stores"] <= 5
        assert before.kinds["global stores"] == 48
