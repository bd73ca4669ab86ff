from __future__ import annotations

import pytest

from ddetr_mm.runtime.checkpoint_hook import TAOCheckpointHook
from ddetr_mm.runtime.curve_record import read_points
from ddetr_mm.runtime.curves import CurvesHook


def test_records_losses_rates_and_figures(make_runner, tmp_path):
    groups = {"custom_keys": {"linear.bias": {"lr_mult": 0.1}}}
    optim_wrapper = {"optimizer": {"type": "AdamW", "lr": 0.05}, "paramwise_cfg": groups}
    runner = make_runner(
        [{"type": "CurvesHook", "interval": 2}],
        epochs=2,
        batches=4,
        validate=True,
        optim_wrapper=optim_wrapper,
    )
    runner.train()
    points = read_points(tmp_path / "train" / "curves.jsonl")
    assert [(point["kind"], point["step"], point["epoch"]) for point in points] == [
        ("train", 2, 0.5),
        ("train", 4, 1.0),
        ("val", 4, 1),
        ("train", 6, 1.5),
        ("train", 8, 2.0),
        ("val", 8, 2),
    ]
    for part in ("loss", "loss_cls", "loss_bbox"):
        history = runner.message_hub.get_scalar(f"train/{part}").data[0]
        assert points[1]["losses"][part] == pytest.approx(history[2:4].mean())
    assert points[0]["learning_rates"] == pytest.approx({"0.05": 0.05, "0.005": 0.005})
    assert points[3]["learning_rates"] == pytest.approx({"0.05": 0.005, "0.005": 0.0005})
    assert points[2]["metrics"] == pytest.approx({"coco/bbox_mAP": 0.1, "coco/bbox_mAP_50": 0.2})
    for name in ("curve_loss.png", "curve_lr.png", "curve_ap.png"):
        assert (tmp_path / "train" / name).stat().st_size > 5000


def test_resumed_run_keeps_earlier_points(make_runner, tmp_path):
    hooks = [CurvesHook(interval=1), TAOCheckpointHook()]
    make_runner(hooks, epochs=1, batches=3).train()
    make_runner([CurvesHook(interval=1), TAOCheckpointHook()], epochs=2, batches=3, resume=True).train()
    points = read_points(tmp_path / "train" / "curves.jsonl")
    assert [point["step"] for point in points] == [1, 2, 3, 4, 5, 6]


def test_draws_seldom_but_always_at_the_end(make_runner, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "ddetr_mm.runtime.curves.draw_curves", lambda points, folder: drawn.append(len(points))
    )
    make_runner([CurvesHook(interval=1, redraw_s=1000)], epochs=2, batches=3, validate=True).train()
    assert drawn == [1, 8]


def test_interval_is_checked():
    with pytest.raises(ValueError, match="at least 1"):
        CurvesHook(interval=0)
