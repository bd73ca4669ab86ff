"""Signs after the first validations that a training will come to nothing, in words, with likely causes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FLAT_AP50 = 0.001
"""Below this AP50 (0..1) nothing has been learnt that detects."""

ENOUGH_STEPS = 500
"""Steps after which a single validation without a detection is worth a word."""

LEAST_LOSSES = 40
"""Fewer losses show no trend."""

CLASSES_NAMED = 8


@dataclass(frozen=True)
class Alarm:
    """One sign.

    Attributes:
        kind: its name.
        text: what was seen, in a sentence.
        causes: what it may come from, the likeliest first.
    """

    kind: str
    text: str
    causes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.text} Likely causes: " + "; ".join(self.causes) + "."


@dataclass(frozen=True)
class ClassScore:
    """What a validation says of one class: objects, detections, average recall (0..1, -1 if undefined)."""

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
        learning_rates: group → present rate.
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
        f"learning rates that do not suit ({rates})",
    ]
    times = "one validation" if len(defined) == 1 else f"{len(defined)} validations"
    return Alarm("ap-flat", f"AP50 is still at zero after {times} and {steps} steps.", tuple(causes))


def loss_not_falling(
    losses: Sequence[float], learning_rates: Mapping[str, float], clip_norm: float | None = None
) -> Alarm | None:
    """The loss is not finite, or the last fifth of it is no lower than the first.

    Args:
        losses: total loss of every step so far.
        learning_rates: group → present rate.
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
    # Noise alone hides a small fall; a rise, or less than two percent, is none.
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
        f"the learning rate does not suit ({rates})",
    ]
    means = f"{first.mean():.4g} in the first {fifth} steps, {last.mean():.4g} in the last"
    text = f"The loss does not fall: {means}."
    return Alarm("loss-flat", text, tuple(dict.fromkeys(causes)))


def absent_classes(classes: Sequence[ClassScore]) -> Alarm | None:
    """Classes that have objects and are never found, where others are.

    Args:
        classes: what the last validation says of each class.
    """
    with_objects = [one for one in classes if one.num_objects > 0]
    absent = [one for one in with_objects if one.recall <= 0]
    if not absent or len(absent) == len(with_objects):
        return None
    never_said = all(one.num_detections == 0 for one in absent)
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
    verb = "is never predicted" if never_said else "is never found"
    subject = "A class" if len(absent) == 1 else f"{len(absent)} classes"
    verb = verb if len(absent) == 1 else verb.replace("is", "are", 1)
    return Alarm("class-absent", f"{subject} {verb}: {names}.", tuple(causes))


def _described(one: ClassScore) -> str:
    trained = "" if one.num_training_boxes is None else f", {one.num_training_boxes} training boxes"
    return f"{one.name} ({one.num_objects} objects{trained})"
