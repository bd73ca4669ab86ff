"""The hook that looks for signs of a training gone wrong after each of the first validations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from ddetr_mm.runtime.alarms import Alarm, ClassScore, absent_classes, flat_precision, loss_not_falling
from ddetr_mm.runtime.learning_rates import learning_rates
from ddetr_mm.runtime.status import StatusLog

MESSAGE_KEY = "alarms"
"""Where the message hub holds the sentences told so far; they survive resuming."""


@HOOKS.register_module()
class AlarmHook(Hook):
    """Warns when AP stays at zero, the loss does not fall, or a class is never predicted.

    The warnings go to the log, into ``status.json`` where the run keeps one, and onto the page of curves.

    Args:
        validations: how many validations to look at; every kind of sign is told once.
        pretrained: whether training starts from pretrained weights.
    """

    # After the metrics are known, before the curves are drawn.
    priority = "NORMAL"

    def __init__(self, validations: int = 5, pretrained: bool = True) -> None:
        self.validations = validations
        self.pretrained = pretrained
        self._AP50s: list[float] = []
        self._kinds_told: set[str] = set()

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Look, and tell what has not been told."""
        if not is_main_process() or not metrics:
            return
        found = next((v for k, v in metrics.items() if k.rsplit("/", 1)[-1] == "bbox_mAP_50"), None)
        if found is None or len(self._AP50s) >= self.validations:
            return
        self._AP50s.append(float(found))
        told: list[str] = list(runner.message_hub.runtime_info.get(MESSAGE_KEY, []))
        for alarm in self.signs(runner):
            if alarm.kind not in self._kinds_told:
                self._kinds_told.add(alarm.kind)
                told.append(str(alarm))
                self._tell(runner, alarm)
        runner.message_hub.update_info(MESSAGE_KEY, told)

    def signs(self, runner: Any) -> list[Alarm]:
        """All signs there are now."""
        rates = learning_rates(runner)
        history = runner.message_hub.log_scalars.get("train/loss")
        losses = history.data[0] if history is not None else np.zeros(0)
        clip = getattr(runner.optim_wrapper, "clip_grad_kwargs", None) or {}
        candidates = [flat_precision(self._AP50s, runner.iter, rates, self.pretrained)]
        # A loss that stays where a good start put it is no bad sign.
        if max(self._AP50s) < 0.2:
            candidates.append(loss_not_falling(losses, rates, clip.get("max_norm")))
        candidates.append(absent_classes(class_scores(runner)))
        return [alarm for alarm in candidates if alarm is not None]

    def _tell(self, runner: Any, alarm: Alarm) -> None:
        lines = [alarm.text, *(f"  - {cause}" for cause in alarm.causes)]
        runner.logger.warning("\n".join(lines))
        status = Path(runner.work_dir) / "status.json"
        if status.is_file():
            StatusLog.at(status).write(str(alarm), verbosity="WARNING")


def class_scores(runner: Any) -> list[ClassScore]:
    """What the last validation says of every class; empty where the metric does not tell."""
    metrics = getattr(getattr(runner.val_loop, "evaluator", None), "metrics", [])
    result = next((one.result for one in metrics if getattr(one, "result", None) is not None), None)
    if result is None:
        return []
    counts = training_boxes(runner.train_dataloader.dataset)
    return [
        ClassScore(
            entry.name,
            entry.num_boxes,
            entry.num_detections,
            entry.AR,
            None if counts is None else counts.get(entry.category_id, 0),
        )
        for entry in result.per_class
    ]


def training_boxes(dataset: Any) -> dict[int, int] | None:
    """Category id → training boxes, of a data set of ours, wrapped or not; None for others."""
    while not hasattr(dataset, "table") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    table = getattr(dataset, "table", None)
    if table is None:
        return None
    ids, counts = np.unique(table.category_ids, return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))
