"""The Triton kernels compiled for Hopper, without a GPU: what the compiler made of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddetr_mm.models.triton_attention import has_triton

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),  # a minute of processor time, which may be shared
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
]
REPO = Path(__file__).resolve().parents[2]
COMPILE = """
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import ddetr_mm
from ddetr_mm.models import triton_kernels

kernel = getattr(triton_kernels, sys.argv[1])
given = dict(HEADS=8, LEVELS=4, POINTS=4, CHANNELS=32, LANES=32, QUERIES=32, BLOCK=32, ADD_TO_VALUE=True)
integers = {"sizes_hw", "starts", "bin_starts", "order", "bin_offsets"}
floats = {"value", "locations", "weights", "output"}
floats |= {"grad_output", "grad_value", "grad_locations", "grad_weights"}
def kind(name):
    if name in given:
        return "constexpr"
    if name in integers:
        return "*i64"
    return "*fp32" if name in floats else "*i32" if name == "bins" else "i32"
names = kernel.arg_names
signature = {name: kind(name) for name in names}
constants = {(names.index(name),): value for name, value in given.items() if name in names}
pointers = [place for place, name in enumerate(names) if signature[name][0] == "*"]
aligned = {(place,): [["tt.divisibility", 16]] for place in pointers}
source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
ptx = compiled.asm["ptx"]
print(json.dumps({"wide loads": len(re.findall(r"ld\\.global[\\w.]*\\.v4\\.b32", ptx)),
    "wide additions": len(re.findall(r"(?:atom|red)\\.[\\w.]*add[\\w.]*\\.v4\\.f32", ptx)),
    "bytes": len(compiled.asm["cubin"])}))
"""


def compile_for_hopper(kernel: str) -> dict[str, int]:
    environment = {**os.environ, "PYTHONPATH": str(REPO), "TRITON_INTERPRET": "0"}
    answer = subprocess.run(
        [sys.executable, "-c", COMPILE, kernel], capture_output=True, text=True, env=environment, check=False
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout.splitlines()[-1])


def test_values_are_read_and_added_sixteen_bytes_at_a_time() -> None:
    forward = compile_for_hopper("forward_kernel")
    assert forward["wide loads"] >= 16  # four corners of four points
    backward = compile_for_hopper("backward_kernel")
    assert backward["wide loads"] >= 16 and backward["wide additions"] >= 16
    # Levels are a loop: unrolled they would not fit into the cache for instructions.
    assert backward["bytes"] < 200_000


@pytest.mark.parametrize("kernel", ["bin_kernel", "gather_value_gradient_kernel"])
def test_the_deterministic_gradients_kernels_compile(kernel: str) -> None:
    assert compile_for_hopper(kernel)["bytes"] > 0
