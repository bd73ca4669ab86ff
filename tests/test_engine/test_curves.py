from __future__ import annotations

import sys

import numpy as np
import pytest
from mmengine.hooks import Hook
from PIL import Image

from ddetr_mm.engine.checkpoint import TAOCheckpointHook
from ddetr_mm.engine.curves import (
    CurveRecord,
    CurvesHook,
    ap_series,
    draw_curves,
    loss_series,
    rate_series,
    read_points,
)
from ddetr_mm.engine.hooks import learning_rates


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
        "ddetr_mm.engine.curves.draw_curves", lambda points, folder: drawn.append(len(points)) or []
    )
    make_runner([CurvesHook(interval=1, redraw_s=1000)], epochs=2, batches=3, validate=True).train()
    assert drawn == [1, 8]


def test_interval_is_checked():
    with pytest.raises(ValueError, match="at least 1"):
        CurvesHook(interval=0)


def points(number=50):
    train = [
        {
            "kind": "train",
            "step": 10 * step,
            "epoch": step / 10,
            "losses": {"loss": 100 / step, "loss_cls": 1.0, "d0.loss_cls": 2.0, "enc_loss_cls": 3.0},
            "learning_rates": {"0.0002": 2e-4, "2e-05": 2e-5},
        }
        for step in range(1, number + 1)
    ]
    val = [
        {
            "kind": "val",
            "step": 100 * epoch,
            "epoch": epoch,
            "metrics": {"coco/bbox_mAP": epoch / 10, "coco/bbox_mAP_s": -1.0, "coco/bbox_AR@1": 0.3},
        }
        for epoch in (1, 2, 3)
    ]
    return train + val


def test_series_show_the_parts_that_matter():
    losses = loss_series(points())
    assert list(losses) == ["loss", "loss_cls"]
    assert losses["loss"][0].tolist() == [10 * step for step in range(1, 51)]
    assert list(rate_series(points())) == ["0.0002", "2e-05"]
    precision = ap_series(points())
    assert list(precision) == ["AP"]
    assert precision["AP"][0].tolist() == [1, 2, 3]
    np.testing.assert_allclose(precision["AP"][1], [0.1, 0.2, 0.3])


def test_long_runs_are_thinned_to_means():
    x, y = loss_series(points(6000))["loss_cls"]
    assert len(x) == 1500
    np.testing.assert_allclose(y, 1.0)
    np.testing.assert_allclose(x[:2], [25, 65])


def test_pictures_show_something_and_pyplot_stays_out(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    drawn = draw_curves(points(), tmp_path)
    assert [path.name for path in drawn] == ["curve_loss.png", "curve_lr.png", "curve_ap.png"]
    for path in drawn:
        with Image.open(path) as image:
            assert image.size == (990, 550)
            assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_only_what_has_points_is_drawn(tmp_path):
    assert draw_curves([], tmp_path) == []
    assert [path.name for path in draw_curves(points()[-3:], tmp_path)] == ["curve_ap.png"]


def test_missing_and_non_finite_values_do_not_break_drawing(tmp_path):
    broken = [
        {"kind": "train", "step": 1, "epoch": 0, "losses": {"loss": None}, "learning_rates": {"0.1": 0.1}}
    ]
    undefined = [{"kind": "val", "step": 1, "epoch": 1, "metrics": {"coco/bbox_mAP": -1.0}}]
    assert [path.name for path in draw_curves(broken + undefined, tmp_path)] == [
        "curve_loss.png",
        "curve_lr.png",
    ]


def test_drawing_again_and_again_keeps_no_figure(tmp_path, living_figures):
    before = living_figures()
    for _ in range(3):
        assert draw_curves(points(), tmp_path)
    assert living_figures() == before


def test_points_read_back(tmp_path):
    record = CurveRecord(tmp_path / "deep" / "curves.jsonl")
    record.add_train(10, 0.5, {"loss": 2.0, "loss_cls": float("nan")}, {"0.1": 0.1})
    record.add_val(20, 1, {"coco/bbox_mAP": 0.25})
    assert (
        read_points(record.path)
        == record.points
        == [
            {
                "kind": "train",
                "step": 10,
                "epoch": 0.5,
                "losses": {"loss": 2.0, "loss_cls": None},
                "learning_rates": {"0.1": 0.1},
            },
            {"kind": "val", "step": 20, "epoch": 1, "metrics": {"coco/bbox_mAP": 0.25}},
        ]
    )


def test_resuming_keeps_what_was_not_lost(tmp_path):
    path = tmp_path / "curves.jsonl"
    first = CurveRecord(path)
    for step in (10, 20, 30):
        first.add_train(step, 0, {"loss": step}, {})
    second = CurveRecord(path, resumed_step=20)
    second.add_train(30, 0, {"loss": 99}, {})
    assert [(point["step"], point["losses"]["loss"]) for point in read_points(path)] == [
        (10, 10),
        (20, 20),
        (30, 99),
    ]


def test_a_new_run_starts_anew(tmp_path):
    path = tmp_path / "curves.jsonl"
    CurveRecord(path).add_val(10, 1, {})
    CurveRecord(path)
    assert read_points(path) == []
    assert read_points(tmp_path / "missing.jsonl") == []


def test_a_cut_off_line_is_left_out_and_a_broken_one_told(tmp_path):
    path = tmp_path / "curves.jsonl"
    CurveRecord(path).add_val(10, 1, {})
    with path.open("a") as file:
        file.write('{"kind": "val", "st')
    assert len(CurveRecord(path, resumed_step=10).points) == 1
    assert path.read_text().endswith("}\n")
    path.write_text('{"kind\n{}\n')
    with pytest.raises(ValueError, match="Unterminated"):
        read_points(path)
