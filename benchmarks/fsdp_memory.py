"""Memory a rank needs for weights, gradients and optimizer state: copied to each (ddp) or sharded (fsdp).

Ranks are processes on the CPU that talk over gloo; what a rank holds is counted tensor by tensor after one
step of AdamW, so that the figures are those of GPUs too. Activations are not in them: they depend on the
images, and are the same for both. ``largest block`` is what fsdp brings together at once while a block
computes, on top of the shards.

Run: ``python benchmarks/fsdp_memory.py [--record]``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from environment import describe, heading, report

import ddetr_mm.register  # noqa: F401 - before mmdet
from ddetr_mm.engine.distributed import NodePlan, run_ranks

RECORD = Path(__file__).parent / "records" / "fsdp_memory.md"
SPEC = Path(__file__).resolve().parents[1] / "configs" / "specs" / "bccd_resnet50.yaml"
RANKS = (2, 4)
STRATEGIES = ("ddp", "fsdp")


def build_model() -> Any:
    """The full network, all of it trained."""
    from mmdet.registry import MODELS
    from mmengine.config import Config

    from ddetr_mm.spec import load_spec
    from ddetr_mm.tasks.runner import config_source, register_scope

    overrides = ["train.activation_checkpoint=true"]
    config = Config.fromstring(config_source(load_spec(str(SPEC), overrides, "train"), "train"), ".py")
    register_scope(config)
    return MODELS.build(config.model)


def one_rank(folder: Path) -> None:
    """Make one training step with each strategy and write what this rank holds."""
    from ddetr_mm.engine.distributed import process_group

    with process_group():
        held = {strategy: held_after_a_step(strategy) for strategy in STRATEGIES}
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(held))


def held_after_a_step(strategy: str) -> dict[str, int]:
    """Bytes of each kind that this rank holds."""
    import torch
    from torch import nn

    from ddetr_mm.engine.fsdp import blocks, shard

    torch.manual_seed(0)
    model = build_model()
    largest = max(local_bytes(block.parameters()) for block in blocks(model))
    trained: nn.Module = model
    if strategy == "ddp":
        trained = nn.parallel.DistributedDataParallel(model)
    else:
        shard(model, "cpu")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    logits, boxes = trained(torch.rand(1, 3, 96, 128), None, mode="tensor")
    (logits.sum() + boxes.sum()).backward()
    optimizer.step()
    moments = [
        value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    ]
    return dict(
        weights=local_bytes(model.parameters()),
        gradients=local_bytes(p.grad for p in model.parameters() if p.grad is not None),
        optimizer=local_bytes(moments),
        largest_block=largest if strategy == "fsdp" else 0,
    )


def local_bytes(tensors: Any) -> int:
    """What this rank holds of some tensors."""
    from torch.distributed.tensor import DTensor

    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def measure(num_ranks: int) -> dict[str, dict[str, float]]:
    """What the rank with most of it holds, in MB, by strategy."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(NodePlan(1, 0, num_ranks), [__file__, "--one-rank", folder])
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_ranks)]
    return {
        strategy: {kind: max(rank[strategy][kind] for rank in ranks) / 1e6 for kind in ranks[0][strategy]}
        for strategy in STRATEGIES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--one-rank", help=argparse.SUPPRESS)
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    options = parser.parse_args()
    if options.one_rank:
        one_rank(Path(options.one_rank))
        return
    environment = describe("torch", "mmengine", "mmdet")
    lines = heading("Memory of a rank: ddp and fsdp", environment)
    lines += [
        "",
        f"Network of `{SPEC.name}` (ResNet-50), float32, AdamW; the rank with most of it, MB.",
        "",
        "| ranks | strategy | weights | gradients | optimizer | sum | largest block |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for num_ranks in RANKS:
        for strategy, held in measure(num_ranks).items():
            parts = [held["weights"], held["gradients"], held["optimizer"]]
            cells = " | ".join(f"{part:.1f}" for part in (*parts, sum(parts), held["largest_block"]))
            lines.append(f"| {num_ranks} | {strategy} | {cells} |")
    report(None, "\n".join(lines) + "\n", RECORD if options.record else None)


if __name__ == "__main__":
    main()
