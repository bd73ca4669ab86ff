from __future__ import annotations

import sys

import numpy as np
from PIL import Image

from ddetr_mm.runtime.curve_plots import ap_series, draw_curves, loss_series, rate_series


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
