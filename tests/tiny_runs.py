"""Real mmengine runs small enough for hook tests: a linear model on random points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

import ddetr_mm.datasets.samplers
import ddetr_mm.engine.train_loop  # noqa: F401 - both register
from ddetr_mm.datasets.samplers import sample_randomness


class Points(torch.utils.data.Dataset):
    """Points with a target; every read draws from numpy's generator, as augmentation does."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.metainfo = {"classes": ("a", "b"), "category_ids": [1, 2]}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.full((4,), index / self.size) + torch.from_numpy(np.random.normal(0, 0.1, 4)).float()
        return {"x": x, "y": x.sum() * 2}


class SeededPoints(Points):
    """Points whose noise depends on seed, epoch and index alone, and that know their index."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        with sample_randomness(index):
            return super().__getitem__(index)


ELASTIC = {
    "sampler": {"type": "ElasticDistributedSampler"},
    "batch_sampler": {"type": "ElasticBatchSampler"},
    "worker_init_fn": {"type": "signal_proof_worker_init"},
}


class Line(BaseModel):
    """A linear layer with dropout, so that torch's random state matters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor, y: torch.Tensor, mode: str = "tensor") -> Any:
        prediction = self.linear(self.dropout(x))[:, 0]
        if mode == "loss":
            error = prediction - y
            return {"loss_cls": error.square().mean(), "loss_bbox": error.abs().mean()}
        return list(prediction.detach()) if mode == "predict" else prediction


class FixedAP(BaseMetric):
    """Gives rising figures under the names that box metrics have."""

    default_prefix = "coco"

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def process(self, data_batch: Any, data_samples: Any) -> None:
        np.random.random()
        torch.rand(1)
        self.results.extend(data_samples)

    def compute_metrics(self, results: list) -> dict[str, float]:
        self.calls += 1
        return {"bbox_mAP": 0.1 * self.calls, "bbox_mAP_50": 0.2 * self.calls}


def build_runner(
    work_dir: Path,
    hooks: list[Any],
    *,
    epochs: int = 2,
    batches: int = 5,
    validate: bool = False,
    runner_class: type[Runner] = Runner,
    elastic: bool = False,
    num_workers: int = 0,
    batch_size: int = 2,
    **options: Any,
) -> Runner:
    """A runner over ``batches`` batches of 2 an epoch, with only ``hooks`` and mmengine's own basic ones.

    ``elastic`` takes our training loop and samplers.
    """
    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "model": Line(),
        "work_dir": str(work_dir),
        "train_dataloader": {
            "dataset": Points(2 * batches),
            "sampler": {"type": "DefaultSampler", "shuffle": True},
            "batch_size": 2,
            "num_workers": 0,
            "collate_fn": {"type": "default_collate"},
        },
        "train_cfg": {"by_epoch": True, "max_epochs": epochs},
        "optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 0.05}},
        "param_scheduler": [{"type": "MultiStepLR", "milestones": [1], "gamma": 0.1}],
        "default_hooks": {"checkpoint": None},
        "custom_hooks": hooks,
        "randomness": {"seed": 11},
        "default_scope": "mmdet",
        "log_level": "WARNING",
        "experiment_name": f"{work_dir.name}-{np.random.default_rng().integers(1 << 60)}",
    }
    if elastic:
        settings["train_cfg"] = {"type": "ResumableTrainLoop", "max_epochs": epochs}
        loader = settings["train_dataloader"]
        loader |= {"dataset": SeededPoints(2 * batches), "batch_size": batch_size, **ELASTIC}
        loader |= {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    if validate:
        settings |= {
            "val_dataloader": {
                "dataset": Points(4),
                "sampler": {"type": "DefaultSampler", "shuffle": False},
                "batch_size": 2,
                "num_workers": 0,
                "collate_fn": {"type": "default_collate"},
            },
            "val_cfg": {},
            "val_evaluator": Evaluator([FixedAP()]),
        }
    return runner_class(**(settings | options))
