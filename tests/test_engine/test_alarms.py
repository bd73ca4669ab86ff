"""Signs of a training gone wrong: when they are told, when not, and with what causes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.evaluator import BaseMetric, Evaluator

from ddetr_mm.engine.alarms import AlarmHook, ClassScore, absent_classes, flat_precision, loss_not_falling
from ddetr_mm.engine.curves import CurvesHook
from ddetr_mm.engine.status import StatusLog

RATES = {"rest (0.0002)": 2e-4, "backbone (2e-05)": 2e-5}


def noisy(start: float, end: float, steps: int = 400, seed: int = 0) -> np.ndarray:
    """Losses that go from ``start`` to ``end`` with the noise of single batches."""
    return np.linspace(start, end, steps) + np.random.default_rng(seed).normal(0, 1.5, steps)


@pytest.mark.parametrize(
    "AP50s, steps, told",
    [
        ([0.0], 60, False),
        ([0.0], 600, True),
        ([0.0, 0.0004], 60, True),
        ([0.0, 0.02], 5000, False),
        ([-1.0, -1.0], 5000, False),
        ([0.3, 0.0], 5000, False),
    ],
)
def test_flat_precision(AP50s, steps, told):
    alarm = flat_precision(AP50s, steps, RATES, pretrained=True)
    assert (alarm is not None) == told
    if alarm:
        assert "AP50 is still at zero" in str(alarm) and "ddetr-mm check" in str(alarm)


def test_causes_of_flat_precision_fit_the_run():
    text = str(flat_precision([0.0, 0.0], 100, {"rest": 0.01}, pretrained=False))
    assert "learning rate is high" in text and "random weights" in text and "only 100 steps" in text
    text = str(flat_precision([0.0, 0.0], 9000, RATES, pretrained=True))
    assert "is high" not in text and "random weights" not in text and "only" not in text


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_falls_is_reported_from_one_that_does_not(seed):
    assert loss_not_falling(noisy(20, 14, seed=seed), RATES) is None
    assert loss_not_falling(noisy(20, 20, seed=seed), RATES).kind == "loss-flat"
    assert loss_not_falling(noisy(20, 26, seed=seed), RATES).kind == "loss-flat"


def test_few_losses_say_nothing_and_broken_ones_all():
    assert loss_not_falling([20.0] * 10, RATES) is None
    alarm = loss_not_falling([20.0, float("nan"), 19.0], RATES)
    assert alarm.kind == "loss-not-finite" and "1 of 3 steps" in alarm.text


def test_causes_of_a_flat_loss():
    assert loss_not_falling(noisy(9, 9), {"rest": 0.05}).causes[0].startswith("the learning rate is too high")
    assert loss_not_falling(noisy(9, 9), {"rest": 1e-9}).causes[0].startswith("the learning rate is too low")
    assert "clipped to a norm of 0.001" in loss_not_falling(noisy(9, 9), RATES, clip_norm=0.001).causes[0]


def test_absent_classes():
    car, dog = ClassScore("car", 50, 400, 0.3), ClassScore("dog", 9, 0, 0.0, num_training_boxes=4)
    alarm = absent_classes([car, dog, ClassScore("empty", 0, 7, -1.0)])
    assert alarm.text == "A class is never predicted: dog (9 objects, 4 training boxes)."
    assert alarm.causes[0] == "very few training boxes: dog 4"
    cat = ClassScore("cat", 5, 3, 0.0, num_training_boxes=0)
    alarm = absent_classes([car, dog, cat])
    assert (
        alarm.text.startswith("2 classes are never predicted correctly (at an IoU of 0.5 or more): dog")
        and "no training box: cat" in alarm.causes[0]
    )
    assert absent_classes([car]) is None
    assert absent_classes([dog, cat]) is None  # nothing is found at all: that is another alarm


class Scores(BaseMetric):
    """Gives AP50s, one a validation, and a result with two classes of which one is never predicted."""

    default_prefix = "coco"

    def __init__(self, AP50s: list[float]) -> None:
        super().__init__()
        self.AP50s = AP50s
        dog = SimpleNamespace(category_id=1, name="dog", num_boxes=9, num_detections=3, AR=0.0)
        car = SimpleNamespace(category_id=2, name="car", num_boxes=9, num_detections=30, AR=0.4)
        self.result = SimpleNamespace(per_class=[dog, car])

    def process(self, data_batch, data_samples) -> None:
        self.results.extend(data_samples)

    def compute_metrics(self, results: list) -> dict[str, float]:
        return {"bbox_mAP": 0.0, "bbox_mAP_50": self.AP50s.pop(0)}


def trained(make_runner, tmp_path, AP50s, **options):
    """A short run whose validations give ``AP50s``; returns its messages in status.json, and its page."""
    folder = tmp_path / "train"
    StatusLog.at(folder / "status.json").write("Starting Training Loop.")
    runner = make_runner(
        [AlarmHook(), CurvesHook()],
        epochs=len(AP50s),
        batches=30,
        validate=True,
        val_evaluator=Evaluator([Scores(list(AP50s))]),
        **options,
    )
    runner.train()
    lines = [json.loads(line) for line in (folder / "status.json").read_text().splitlines()]
    told = [line["message"] for line in lines if line["verbosity"] == "WARNING"]
    return told, (folder / "curves.html").read_text()


def test_a_run_that_learns_nothing_is_reported_once_and_shown_on_the_page(make_runner, tmp_path):
    frozen = {"optimizer": {"type": "AdamW", "lr": 1e-12}}
    told, page = trained(make_runner, tmp_path, [0.0, 0.0, 0.0], optim_wrapper=frozen)
    assert sorted(text[:12] for text in told) == ["A class is n", "AP50 is stil", "The loss doe"]
    assert page.count('class="alarm"') == 3
    assert "learning rate is too low" in page


def test_a_run_that_learns_is_left_alone(make_runner, tmp_path):
    told, page = trained(make_runner, tmp_path, [0.3, 0.5])
    assert [text[:12] for text in told] == ["A class is n"]
    assert "still at zero" not in page and "does not fall" not in page
