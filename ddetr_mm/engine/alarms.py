"""Warnings after the first validations: AP at zero, a flat loss, classes that are never predicted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.registry import HOOKS
from mmengine.hooks import Hook

from ddetr_mm.engine.distributed import is_first_rank
from ddetr_mm.engine.hooks import learning_rates
from ddetr_mm.engine.status import StatusLog

# --- Signs ---

FLAT_AP50 = 0.001
"""AP50 (0..1) that counts as zero."""

ENOUGH_STEPS = 500
"""Steps after which a single validation at zero is reported."""

LEAST_LOSSES = 40
"""Losses that a trend needs at least."""

CLASSES_NAMED = 8


@dataclass(frozen=True)
class Alarm:
    """One warning.

    Attributes:
        kind: its name.
        text: the observation, one sentence.
        causes: possible causes, the likeliest first.
    """

    kind: str
    text: str
    causes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.text} Likely causes: " + "; ".join(self.causes) + "."


@dataclass(frozen=True)
class ClassScore:
    """One class in a validation: ground-truth boxes, detections, average recall (0..1, -1 if undefined)."""

    name: str
    num_objects: int
    num_detections: int
    recall: float
    num_training_boxes: int | None = None


def flat_precision(
    AP50s: Sequence[float], steps: int, learning_rates: Mapping[str, float], pretrained: bool
) -> Alarm | None:
    """AP50 at zero after two validations, or after one that follows many steps.

    Args:
        AP50s: of all validations so far, 0..1; -1 where there was nothing to score.
        steps: optimizer steps done.
        learning_rates: group → current rate.
        pretrained: whether training started from pretrained weights.
    """
    defined = [value for value in AP50s if value >= 0]
    few = steps < (ENOUGH_STEPS if len(defined) < 2 else ENOUGH_STEPS // 10)
    if not defined or max(defined) >= FLAT_AP50 or few:
        return None
    rates = ", ".join(f"{name}: {rate:.2g}" for name, rate in learning_rates.items())
    causes = []
    if max(learning_rates.values(), default=0) > 1e-3:
        causes.append(f"the learning rate is high for a DETR, where 2e-4 is usual ({rates})")
    if steps < 5 * ENOUGH_STEPS:
        causes.append(f"only {steps} steps have been done: a DETR needs thousands, most with a low AP")
    if not pretrained:
        causes.append("the backbone started from random weights: model.pretrained_backbone_path helps most")
    causes += [
        "boxes or ids differ between training and validation data: `ddetr-mm check` sends the ground truth "
        "through the pipeline",
        f"unsuitable learning rates ({rates})",
    ]
    times = "one validation" if len(defined) == 1 else f"{len(defined)} validations"
    return Alarm("ap-flat", f"AP50 is still at zero after {times} and {steps} steps.", tuple(causes))


def loss_not_falling(
    losses: Sequence[float], learning_rates: Mapping[str, float], clip_norm: float | None = None
) -> Alarm | None:
    """The loss is not finite, or the last fifth of it is no lower than the first.

    Args:
        losses: total loss of every step so far.
        learning_rates: group → current rate.
        clip_norm: the norm that gradients are clipped to; None without clipping.
    """
    values = np.asarray(losses, dtype=np.float64)
    finite = values[np.isfinite(values)]
    if len(finite) < len(values):
        return Alarm(
            "loss-not-finite",
            f"The loss was not finite in {len(values) - len(finite)} of {len(values)} steps.",
            ("half precision overflows: train.precision=bf16 or fp32", "the learning rate is too high"),
        )
    if len(finite) < LEAST_LOSSES:
        return None
    fifth = len(finite) // 5
    first, last = finite[:fifth], finite[-fifth:]
    fall = first.mean() - last.mean()
    error = math.sqrt(first.var(ddof=1) / fifth + last.var(ddof=1) / fifth)
    # A fall of less than two percent, or within the noise, does not count.
    if fall > 0.02 * abs(first.mean()) and fall > error:
        return None
    rates = ", ".join(f"{name}: {rate:.2g}" for name, rate in learning_rates.items())
    highest = max(learning_rates.values(), default=0.0)
    causes = []
    if highest > 1e-3:
        causes.append(f"the learning rate is too high ({rates})")
    elif highest < 1e-6:
        causes.append(f"the learning rate is too low ({rates})")
    if clip_norm is not None and clip_norm < 0.05:
        causes.append(f"gradients are clipped to a norm of {clip_norm:g}: train.clip_grad_norm")
    causes += [
        "too much is frozen: train.freeze, model.train_backbone",
        "the labels do not belong to the images: `ddetr-mm check` draws them",
        f"an unsuitable learning rate ({rates})",
    ]
    means = f"{first.mean():.4g} in the first {fifth} steps, {last.mean():.4g} in the last"
    text = f"The loss does not fall: {means}."
    return Alarm("loss-flat", text, tuple(dict.fromkeys(causes)))


def absent_classes(classes: Sequence[ClassScore]) -> Alarm | None:
    """Classes that have ground truth and no true positive, where other classes have some.

    Args:
        classes: results of the last validation by class.
    """
    with_objects = [one for one in classes if one.num_objects > 0]
    absent = [one for one in with_objects if one.recall <= 0]
    if not absent or len(absent) == len(with_objects):
        return None
    never_predicted = all(one.num_detections == 0 for one in absent)
    names = ", ".join(_described(one) for one in absent[:CLASSES_NAMED])
    if len(absent) > CLASSES_NAMED:
        names += f" and {len(absent) - CLASSES_NAMED} more"
    causes = []
    untrained = [one for one in absent if one.num_training_boxes == 0]
    rare = [one for one in absent if one.num_training_boxes and one.num_training_boxes < 50]
    if untrained:
        causes.append("no training box: " + ", ".join(one.name for one in untrained[:CLASSES_NAMED]))
    if rare:
        few = ", ".join(f"{one.name} {one.num_training_boxes}" for one in rare[:CLASSES_NAMED])
        causes.append(f"very few training boxes: {few}")
    causes += [
        "the class has another id or name in the training data: `ddetr-mm check` compares them",
        "its objects are too small for the input size or feature levels",
        "it is learnt late: rare classes come last",
    ]
    verb = (
        "is never predicted" if never_predicted else "is never predicted correctly (at an IoU of 0.5 or more)"
    )
    subject = "A class" if len(absent) == 1 else f"{len(absent)} classes"
    verb = verb if len(absent) == 1 else verb.replace("is", "are", 1)
    return Alarm("class-absent", f"{subject} {verb}: {names}.", tuple(causes))


def _described(one: ClassScore) -> str:
    trained = "" if one.num_training_boxes is None else f", {one.num_training_boxes} training boxes"
    return f"{one.name} ({one.num_objects} objects{trained})"


# --- The hook ---

MESSAGE_KEY = "alarms"
"""Key of the message hub with the warnings so far; they survive resuming."""


@HOOKS.register_module()
class AlarmHook(Hook):
    """Warns when AP stays at zero, the loss does not fall, or a class is never predicted.

    The warnings go to the log, into ``status.json`` where the run keeps one, and onto the page of curves.

    Args:
        validations: number of validations that are checked; every kind is reported once.
        pretrained: whether training starts from pretrained weights.
    """

    # After the metrics are known, before the curves are drawn.
    priority = "NORMAL"

    def __init__(self, validations: int = 5, pretrained: bool = True) -> None:
        self.validations = validations
        self.pretrained = pretrained
        self._AP50s: list[float] = []
        self._kinds_reported: set[str] = set()

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Report new kinds of warnings."""
        if not is_first_rank() or not metrics:
            return
        found = next((v for k, v in metrics.items() if k.rsplit("/", 1)[-1] == "bbox_mAP_50"), None)
        if found is None or len(self._AP50s) >= self.validations:
            return
        self._AP50s.append(float(found))
        warnings: list[str] = list(runner.message_hub.runtime_info.get(MESSAGE_KEY, []))
        for alarm in self.signs(runner):
            if alarm.kind not in self._kinds_reported:
                self._kinds_reported.add(alarm.kind)
                warnings.append(str(alarm))
                self._report(runner, alarm)
        runner.message_hub.update_info(MESSAGE_KEY, warnings)

    def signs(self, runner: Any) -> list[Alarm]:
        """All warnings that apply now."""
        rates = learning_rates(runner)
        history = runner.message_hub.log_scalars.get("train/loss")
        losses = history.data[0] if history is not None else np.zeros(0)
        clip = getattr(runner.optim_wrapper, "clip_grad_kwargs", None) or {}
        candidates = [flat_precision(self._AP50s, runner.iter, rates, self.pretrained)]
        # From good pretrained weights a flat loss is normal.
        if max(self._AP50s) < 0.2:
            candidates.append(loss_not_falling(losses, rates, clip.get("max_norm")))
        candidates.append(absent_classes(class_scores(runner)))
        return [alarm for alarm in candidates if alarm is not None]

    def _report(self, runner: Any, alarm: Alarm) -> None:
        lines = [alarm.text, *(f"  - {cause}" for cause in alarm.causes)]
        runner.logger.warning("\n".join(lines))
        status = Path(runner.work_dir) / "status.json"
        if status.is_file():
            StatusLog.at(status).write(str(alarm), verbosity="WARNING")


def class_scores(runner: Any) -> list[ClassScore]:
    """Results of the last validation by class; empty where the metric has none."""
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
    """Category id → training boxes of a ``SerializedCocoDataset``, wrapped or not; None for others."""
    while not hasattr(dataset, "table") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    table = getattr(dataset, "table", None)
    if table is None:
        return None
    ids, counts = np.unique(table.category_ids, return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))
