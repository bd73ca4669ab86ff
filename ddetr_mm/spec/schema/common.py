"""Sections that several subtasks share: the machine they run on, and Weights & Biases."""

from __future__ import annotations

from dataclasses import dataclass

from ddetr_mm.spec.schema.fields import spec_field


@dataclass
class DistributedTask:
    """GPUs and nodes of a subtask that can run on several."""

    num_gpus: int = spec_field(
        1,
        ge=1,
        doc="""Number of GPUs on this machine. Where it disagrees with gpu_ids, the larger number of
        GPUs wins. Without a GPU the run uses the CPU.""",
    )
    gpu_ids: list[int] = spec_field(
        [0],
        ge=0,
        doc="Indices of the GPUs to use, each at most once, as the CUDA driver counts them.",
    )
    num_nodes: int = spec_field(
        1,
        ge=1,
        doc="Number of machines taking part; more than 1 makes the run a multi-node one.",
    )


@dataclass
class WandbConfig:
    """Reporting to Weights & Biases; acts when its package is installed and a key is configured."""

    enable: bool = spec_field(
        True, doc="Report to Weights & Biases, if its package and an API key are there."
    )
    project: str = spec_field("TAO Toolkit", doc="Name of the project the run is filed under.")
    entity: str | None = spec_field(
        "", doc="User or team that owns the project; empty: the account's default."
    )
    group: str | None = spec_field("", doc="Name that groups several runs; empty: none.")
    tags: list[str] = spec_field(["training", "tao-toolkit"], doc="Words attached to the run.")
    reinit: bool = spec_field(False, doc="Let one process open several runs.")
    sync_tensorboard: bool = spec_field(False, doc="Copy the TensorBoard events into the run.")
    save_code: bool = spec_field(False, doc="Upload the source code of the main script.")
    name: str = spec_field("TAO Toolkit training experiment", doc="Name shown for the run.")
    run_id: str = spec_field("", doc="Identifier of an existing run to continue; empty: a new one.")
