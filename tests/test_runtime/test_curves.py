from __future__ import annotations

import pytest
from mmengine.hooks import Hook

from ddetr_mm.runtime.checkpoint_hook import TAOCheckpointHook
from ddetr_mm.runtime.curve_record import read_points
from ddetr_mm.runtime.curves import CurvesHook
from ddetr_mm.runtime.learning_rates import learning_rates


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
    page = (tmp_path / "train" / "curves.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and 'http-equiv="refresh"' not in page
    assert "learning rate, 0.005" in page and "coco/bbox_mAP (epoch 2)" in page and "epoch 2 of 2" in page


def test_the_page_is_live_while_training_runs(make_runner, tmp_path):
    pages = []

    class Watcher(Hook):
        priority = "VERY_LOW"

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            path = tmp_path / "train" / "curves.html"
            pages.append(path.read_text() if path.exists() else "")

    make_runner([CurvesHook(interval=1, redraw_s=0), Watcher()], epochs=1, batches=2).train()
    assert all('http-equiv="refresh"' in page for page in pages)
    assert "<td>steps</td><td>1</td>" in pages[0] and "<td>steps</td><td>2</td>" in pages[1]


def test_groups_are_named_by_the_parts_of_the_config(make_runner):
    groups = {"custom_keys": {"linear.bias": {"lr_mult": 0.1}, "dropout": {"lr_mult": 0.1}}}
    wrapper = {"optimizer": {"type": "AdamW", "lr": 0.05}, "paramwise_cfg": groups}
    runner = make_runner([], optim_wrapper=wrapper)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    assert list(learning_rates(runner)) == ["0.05", "0.005"]
    runner.cfg.optim_wrapper = wrapper
    assert learning_rates(runner) == pytest.approx({"rest (0.05)": 0.05, "linear.bias (0.005)": 0.005})


def test_resumed_run_keeps_earlier_points(make_runner, tmp_path):
    hooks = [CurvesHook(interval=1), TAOCheckpointHook()]
    make_runner(hooks, epochs=1, batches=3).train()
    make_runner([CurvesHook(interval=1), TAOCheckpointHook()], epochs=2, batches=3, resume=True).train()
    points = read_points(tmp_path / "train" / "curves.jsonl")
    assert [point["step"] for point in points] == [1, 2, 3, 4, 5, 6]


def test_draws_seldom_but_always_at_the_end(make_runner, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "ddetr_mm.runtime.curves.draw_curves", lambda points, folder: drawn.append(len(points)) or []
    )
    make_runner([CurvesHook(interval=1, redraw_s=1000)], epochs=2, batches=3, validate=True).train()
    assert drawn == [1, 8]


def test_interval_is_checked():
    with pytest.raises(ValueError, match="at least 1"):
        CurvesHook(interval=0)
