"""What the compiler makes of the Triton kernels of deformable attention for Hopper; needs no GPU.

Each kernel is compiled for sm_90 with eight heads of 32 channels, four levels and four points. Counted are
registers of a thread and spilt bytes (``ptxas``), shared memory of a program, and the instructions that all
warps of a program execute (``nvdisasm``; the loop over levels four times), per query and head, since programs
differ in how many queries they work on. These are the compiler's figures, not times: they say what a kernel
needs, not how long memory takes. And what one layer of attention keeps for the backward pass is counted, in
bytes a query.

    python benchmarks/attention_kernels.py [--record]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RECORD = Path(__file__).with_name("records") / "attention_kernels.md"
CUTS = {
    "forward_kernel": ((32, 4, False), (8, 1, False)),
    "backward_kernel": ((32, 4, False), (8, 1, False)),
    "fused_forward_kernel": ((8, 1, False), (32, 4, False), (16, 4, False)),
    "fused_backward_kernel": ((2, 1, False), (8, 4, False), (4, 1, False), (8, 2, False), (2, 1, True)),
}
"""Kernel → queries and warps of a program and whether it merges, the first one tried first."""
HEADS, LEVELS, POINTS, CHANNELS = 8, 4, 4, 32
CAPABILITY = 90
_CONSTANTS = {
    "HEADS": HEADS,
    "LEVELS": LEVELS,
    "POINTS": POINTS,
    "CHANNELS": CHANNELS,
    "LANES": CHANNELS,
    "POINT_LANES": POINTS,
    "LEVEL_LANES": LEVELS,
    "BOXES": False,
    "ADD_TO_VALUE": True,
}
_FLOATS = {"value", "locations", "weights", "output", "references", "offsets", "logits", "log_sums"}
_FLOATS |= {f"grad_{name}" for name in _FLOATS}
_IN_NETWORK_DTYPE = {"value", "output", "offsets", "logits", "grad_output", "grad_offsets", "grad_logits"}
_KINDS = {
    "global loads": ("LDG",),
    "global stores": ("STG",),
    "atomics": ("ATOM", "ATOMG", "RED", "REDG"),
    "shared memory": ("LDS", "STS", "LDSM", "STSM"),
    "barriers": ("BAR",),
    "shuffles": ("SHFL",),
}


@dataclass(frozen=True)
class Compiled:
    """Figures of one kernel.

    Attributes:
        name: of the kernel.
        dtype: of the network's tensors.
        queries: of one program.
        warps: of one program.
        merges: whether additions of a query to equal cells are merged.
        registers: of one thread.
        spilled: bytes of a thread that do not fit into registers.
        shared: bytes of shared memory of a program.
        instructions: of the machine code, padding left out.
        per_query: instructions of all warps for one query, the levels' loop counted for each level.
        kinds: number of instructions by kind, in one pass over the code.
    """

    name: str
    dtype: str
    queries: int
    warps: int
    merges: bool
    registers: int
    spilled: int
    shared: int
    instructions: int
    per_query: float
    kinds: dict[str, int]


def compile_kernel(
    name: str, queries: int, warps: int, dtype: str = "fp32", merges: bool = False
) -> Compiled:
    """Compile one kernel of :mod:`ddetr_mm.models.triton_kernels`.

    Args:
        name: of the function.
        queries: of one program.
        warps: of one program.
        dtype: ``fp32`` or ``bf16``, of the network's tensors.
        merges: with the backward pass: see :class:`~ddetr_mm.models.triton_attention.Launch`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import ddetr_mm  # noqa: F401
    from ddetr_mm.models import triton_kernels

    kernel = getattr(triton_kernels, name)
    given = {**_CONSTANTS, "QUERIES": queries, "MERGES": merges}
    names = kernel.arg_names

    def kind(argument: str) -> str:
        if argument in given:
            return "constexpr"
        if argument in ("sizes_hw", "starts"):
            return "*i64"
        if argument in _FLOATS:
            return f"*{dtype}" if argument in _IN_NETWORK_DTYPE else "*fp32"
        return "i32"

    signature = {argument: kind(argument) for argument in names}
    constants = {(names.index(one),): value for one, value in given.items() if one in names}
    pointers = [place for place, one in enumerate(names) if signature[one][0] == "*"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(place,): [["tt.divisibility", 16]] for place in pointers},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
        code = _tool("nvdisasm", "-c", str(cubin))
    lines = _instructions(code)
    inside = _loop(lines)
    everything = sum(bool(opcode) for opcode, _ in lines)
    per_program = everything + (LEVELS - 1) * sum(bool(opcode) for opcode, _ in inside)
    return Compiled(
        name,
        dtype,
        queries,
        warps,
        merges,
        registers=int(_found(r"REG:(\d+)", usage)),
        spilled=int(_found(r"LOCAL:(\d+)", usage)) + int(_found(r"STACK:(\d+)", usage)),
        shared=int(compiled.metadata.shared),
        instructions=everything,
        per_query=per_program * warps / queries,
        kinds={what: _count(lines, inside, parts) for what, parts in _KINDS.items()},
    )


def _tool(name: str, *arguments: str) -> str:
    """Run one of the CUDA tools that come with Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the tool's output has no {pattern}")
    return match[1]


def _instructions(code: str) -> list[tuple[str, str]]:
    """Label or opcode with operands of each line of machine code; padding after the last exit is left out."""
    found: list[tuple[str, str]] = []
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            found.append(("", label[1]))
        match = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", line)
        if match and match[1] != "NOP":
            found.append((match[1], match[2]))
    return found


def _loop(lines: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The instructions of the longest backward branch: the loop over levels."""
    labels = {text: place for place, (opcode, text) in enumerate(lines) if not opcode}
    best: list[tuple[str, str]] = []
    for place, (opcode, operands) in enumerate(lines):
        target = re.search(r"\.L_x_\d+", operands) if opcode.startswith("BRA") else None
        begin = labels.get(target[0], place) if target else place
        if begin < place and place - begin > len(best):
            best = lines[begin : place + 1]
    return best


def _count(lines: list[tuple[str, str]], inside: list[tuple[str, str]], parts: tuple[str, ...]) -> int:
    """Instructions of a kind that one warp executes for its program: those of the loop for each level."""

    def number(some: list[tuple[str, str]]) -> int:
        return sum(opcode.split(".")[0] in parts for opcode, _ in some)

    return number(lines) + (LEVELS - 1) * number(inside)


# --- What is kept for the backward pass ---


def kept_bytes(fused: bool, dtype: str) -> float:
    """Bytes a query that one layer's sampling keeps for the backward pass, beside values and references.

    Args:
        fused: with softmax and offsets in one operator, or after them.
        dtype: ``fp32`` or ``bf16``, of what the network computes.
    """
    import torch

    import ddetr_mm  # noqa: F401
    from ddetr_mm.models.deformable_attention import level_layout
    from ddetr_mm.models.fused_sampling import fused_sampling, locations_and_weights
    from ddetr_mm.models.triton_attention import deformable_sampling

    sizes_hw, queries = ((8, 8), (4, 4), (2, 2), (1, 1)), 200
    geometry = level_layout(sizes_hw, "cpu")
    of_network = torch.float32 if dtype == "fp32" else torch.bfloat16
    value = torch.rand(1, 85, HEADS, CHANNELS, dtype=of_network, requires_grad=True)
    references = torch.rand(1, queries, LEVELS, 2)
    logits = torch.rand(1, queries, HEADS, LEVELS, POINTS, dtype=of_network, requires_grad=True)
    offsets = torch.rand(*logits.shape, 2, dtype=of_network, requires_grad=True)
    given = {one.untyped_storage().data_ptr() for one in (value, references, *geometry)}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(one: torch.Tensor) -> torch.Tensor:
        storage = one.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        # Copies, as a linear layer makes them.
        raw = references, offsets.clone(), logits.clone()
        if fused:
            output, _ = fused_sampling(value, *raw, *geometry, "auto", 64)
        else:
            places = locations_and_weights(*raw, geometry[0])
            output = deformable_sampling(value, *places, *geometry, "auto", 64)
    output.sum().backward()
    return sum(storage.nbytes() for storage in kept.values()) / queries


# --- Additions to equal cells ---


def remaining_additions(offsets: torch.Tensor) -> float:
    """Share of the atomic additions that is left when those of a query to equal cells are merged.

    Args:
        offsets: (queries, points, 2) in cells as (x, y), of one head on one level; all on the map.
    """
    import torch

    centers = torch.rand(len(offsets), 1, 2, generator=torch.Generator().manual_seed(0))
    cells = (centers + offsets).floor()[:, :, None] + torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
    return sum(len(one.flatten(0, 1).unique(dim=0)) for one in cells) / cells[..., 0].numel()


def additions() -> list[str]:
    """Lines on :func:`remaining_additions`, at the start of training and for points around the centre."""
    import torch

    angles = torch.arange(HEADS) * (2 * torch.pi / HEADS)
    directions = torch.stack((angles.cos(), angles.sin()), -1)
    directions /= directions.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, POINTS + 1)[:, None]
    at_start = [remaining_additions((one * steps).expand(200, -1, -1)) for one in directions]
    found = [f"at the start of training, {sum(at_start) / HEADS:.0%}"]
    for cells in (0.5, 1, 2):
        offsets = cells * torch.randn(1000, POINTS, 2, generator=torch.Generator().manual_seed(1))
        found.append(f"with offsets of {cells} cells' deviation, {remaining_additions(offsets):.0%}")
    return [
        "`merged`: what points of a query add to the same cell is summed before, so that fewer of the",
        f"{4 * POINTS} additions of a query, head and level reach memory: {'; '.join(found)}.",
        "It is tried last, until a GPU shows whether memory or instructions cost more.",
    ]


# --- Record ---


def rows(kernels: Sequence[str], dtypes: Sequence[str]) -> list[str]:
    """Lines of the table of compiled kernels."""
    found = []
    for dtype in dtypes:
        for name in kernels:
            for queries, warps, merges in CUTS[name]:
                one = compile_kernel(name, queries, warps, dtype, merges)
                per_query = [f"{count * warps / queries:.1f}" for count in one.kinds.values()]
                cells = [
                    name.removesuffix("_kernel") + ", merged" * merges,
                    dtype,
                    f"{queries} x {warps}",
                    one.registers,
                    one.spilled,
                ]
                cells += [one.shared, one.instructions, f"{one.per_query:.0f}", *per_query]
                found.append("| " + " | ".join(map(str, cells)) + " |")
                print(found[-1], flush=True)
    return found


def report(dtypes: Sequence[str] = ("fp32", "bf16")) -> str:
    """The record."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    versions = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), **versions}
    titles = ["kernel", "dtype", "queries x warps", "registers", "spilt bytes", "shared bytes", "code"]
    titles += ["instructions", *_KINDS]
    lines = [
        "# Kernels of deformable attention, compiled for Hopper",
        "",
        *(f"- {name}: {value}" for name, value in versions.items()),
        "- command: python benchmarks/attention_kernels.py --record",
        "",
        "No GPU has run these kernels: there are no times here. `forward` and `backward` take locations and",
        "weights, which other kernels compute before; `fused_forward` and `fused_backward` take offsets and",
        "logits, and are what a GPU uses. `code` is the number of instructions of the kernel; from",
        "`instructions` on, figures are per query and head of what all warps execute.",
        "",
        "| " + " | ".join(titles) + " |",
        "| --- | --- | --- |" + " ---: |" * (len(titles) - 3),
        *rows(tuple(CUTS), dtypes),
        "",
        "Kept for the backward pass by one layer's sampling, beside values and references, bytes a query:",
        "",
        "| dtype | before | fused |",
        "| --- | ---: | ---: |",
    ]
    for dtype in dtypes:
        lines.append(f"| {dtype} | {kept_bytes(False, dtype):,.0f} | {kept_bytes(True, dtype):,.0f} |")
    lines += [
        "",
        "In float32 as much is kept as before. What no longer exists are the tensors between steps: scaled",
        "offsets, locations and weights, and in the backward pass their gradients.",
        "",
        *additions(),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile, print and, with ``--record``, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    args = parser.parse_args()
    text = report()
    print(text)
    if args.record:
        RECORD.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
