"""Scalars of a run read back, and the curves drawn from them."""

from __future__ import annotations

import html
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from mmengine.hooks import Hook
from PIL import Image

from ddetr_mm.engine.checkpoint import TAOCheckpointHook
from ddetr_mm.engine.curves import (
    RATE_PREFIX,
    RESUMED_EPOCH,
    RESUMED_STEP,
    CurvesHook,
    RunScalars,
    RunState,
    ap_series,
    draw_curves,
    duration_text,
    loss_series,
    rate_series,
    run_name,
    write_curve_page,
)
from ddetr_mm.engine.hooks import learning_rates

EACH_STEP = {"logger": {"type": "LoggerHook", "interval": 1}, "checkpoint": None}


def read(work_dir: Path) -> RunScalars:
    scalars = RunScalars(work_dir)
    scalars.update()
    return scalars


def write_start(work_dir: Path, start: str, *points: dict) -> Path:
    path = work_dir / start / "vis_data" / "scalars.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(point) + "\n" for point in points))
    return path


def train_points(steps) -> list[dict]:
    return [{"lr": 0.1, "loss": float(step), "epoch": 1, "iter": step, "step": step} for step in steps]


# --- the hook ---


def test_losses_rates_of_every_group_and_metrics_are_read_back(make_runner, tmp_path):
    groups = {"custom_keys": {"linear.bias": {"lr_mult": 0.1}}}
    runner = make_runner(
        [{"type": "CurvesHook"}],
        epochs=2,
        batches=4,
        validate=True,
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.05}, "paramwise_cfg": groups},
        default_hooks={"logger": {"type": "LoggerHook", "interval": 2}, "checkpoint": None},
    )
    runner.train()
    scalars = read(tmp_path / "train")
    assert [point["step"] for point in scalars.train] == [2, 4, 6, 8]
    assert [point["step"] for point in scalars.val] == [1, 2]
    for part in ("loss", "loss_cls", "loss_bbox"):
        history = runner.message_hub.get_scalar(f"train/{part}").data[0]
        assert scalars.train[1][part] == pytest.approx(history[:4].mean())
    rates = rate_series(scalars)
    assert list(rates) == ["0.05", "0.005"]
    assert rates["0.005"][1].tolist() == pytest.approx([0.005, 0.005, 0.0005, 0.0005])
    assert {name: y.tolist() for name, (_, y) in ap_series(scalars).items()} == {
        "AP": pytest.approx([0.1, 0.2]),
        "AP50": pytest.approx([0.2, 0.4]),
    }
    for name in ("curve_loss.png", "curve_lr.png", "curve_ap.png"):
        assert (tmp_path / "train" / name).stat().st_size > 5000
    page = (tmp_path / "train" / "curves.html").read_text()
    assert page.count('<figure class="chart"') == 3 and "data:image" not in page
    assert 'data-refresh="0"' in page and 'http-equiv="refresh"' not in page
    assert "<h1>train</h1>" not in page and f"<h1>{tmp_path.name}</h1>" in page
    assert "finished · epoch 2 of 2, step 8 of 8" in page and "<td" not in page
    tiles = re.findall(r"<div><b>([^<]*)</b><span>([^<]*)</span><small>([^<]*)</small>", page)
    assert tiles[:2] == [("0.200", "best AP", "epoch 2"), ("0.400", "best AP50", "epoch 2")]
    assert tiles[2][1:] == ("loss", "step 8") and "time left" not in page


class FixedLoss(Hook):
    """Adds a falling loss of validation, as ValidationLossHook does."""

    priority = "HIGHEST"

    def after_val_epoch(self, runner, metrics=None):
        metrics.update({"val_loss": 10.0 - runner.epoch, "val_loss_cls": 3.0})
        runner.message_hub.log_scalars.pop("val/val_loss", None)


def test_the_loss_of_validation_is_drawn_over_steps(make_runner, tmp_path):
    hooks = [FixedLoss(), CurvesHook()]
    make_runner(hooks, epochs=2, batches=3, validate=True, default_hooks=EACH_STEP).train()
    scalars = read(tmp_path / "train")
    x, y = loss_series(scalars)["val_loss"]
    assert x.tolist() == [3, 6] and y.tolist() == [9.0, 8.0]
    assert "val_loss" not in ap_series(scalars)
    page = (tmp_path / "train" / "curves.html").read_text()
    (drawn, *_) = re.findall(r'data-chart="([^"]*)"', page)
    assert json.loads(html.unescape(drawn))["series"][-1] == [[3, 6], [9, 8], 0]
    assert "</span>val_loss<output>" in page and "at_step" not in page


def test_the_page_is_live_while_training_runs(make_runner, tmp_path):
    pages = []

    class Watcher(Hook):
        priority = "VERY_LOW"

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            path = tmp_path / "train" / "curves.html"
            pages.append(path.read_text() if path.exists() else "")

    hooks = [CurvesHook(redraw_s=0), Watcher()]
    make_runner(hooks, epochs=1, batches=2, default_hooks=EACH_STEP).train()
    assert all('data-refresh="5"' in page and "<noscript><meta http-equiv" in page for page in pages)
    assert "<small>step 1</small>" in pages[0] and "<small>step 2</small>" in pages[1]


def test_the_page_says_how_long_training_takes(tmp_path):
    state = RunState("night", "epoch 1 of 4", seconds_left=4830.0, alarms=["<b>loss</b> is not finite"])
    page = write_curve_page(tmp_path / "curves.html", made(), state, refresh_s=10).read_text()
    assert "<b>1 h 20 min</b><span>time left</span>" in page and "<h1>night</h1>" in page
    assert '<p class="alarm">&lt;b&gt;loss&lt;/b&gt; is not finite</p>' in page
    assert "<b>0.300</b><span>best AP</span><small>epoch 3</small>" in page
    none = write_curve_page(tmp_path / "none.html", RunScalars(tmp_path), RunState("night")).read_text()
    assert "No values have been logged yet." in none and 'tiles"' not in none


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0 s"), (45.4, "45 s"), (60, "1 min"), (3725, "1 h 2 min"), (90000, "1 d 1 h"), (86400, "1 d")],
)
def test_durations_have_two_units(seconds, expected):
    assert duration_text(seconds) == expected


def test_a_run_is_named_after_its_results_folder(tmp_path):
    assert run_name(tmp_path / "second" / "train") == "second"
    assert run_name(tmp_path / "second") == "second"


def test_time_left_is_measured_from_this_start(monkeypatch):
    hook = CurvesHook()
    hook._begun_at, hook._begun_step = 100.0, 2
    monkeypatch.setattr("ddetr_mm.engine.curves.time.monotonic", lambda: 108.0)
    # 4 steps in 8 s, 10 are left.
    assert hook._seconds_left(types.SimpleNamespace(iter=6, max_iters=16)) == pytest.approx(20.0)
    assert hook._seconds_left(types.SimpleNamespace(iter=2, max_iters=16)) is None


def test_groups_are_named_by_the_parts_of_the_config(make_runner):
    groups = {"custom_keys": {"linear.bias": {"lr_mult": 0.1}, "dropout": {"lr_mult": 0.1}}}
    wrapper = {"optimizer": {"type": "AdamW", "lr": 0.05}, "paramwise_cfg": groups}
    runner = make_runner([], optim_wrapper=wrapper)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    assert list(learning_rates(runner)) == ["0.05", "0.005"]
    runner.cfg.optim_wrapper = wrapper
    assert learning_rates(runner) == pytest.approx({"rest (0.05)": 0.05, "linear.bias (0.005)": 0.005})


def test_a_resumed_run_keeps_earlier_points(make_runner, tmp_path):
    logger = {"logger": {"type": "LoggerHook", "interval": 1}, "checkpoint": None}
    make_runner([CurvesHook(), TAOCheckpointHook()], epochs=1, batches=3, default_hooks=logger).train()
    resumed = make_runner(
        [CurvesHook(), TAOCheckpointHook()], epochs=2, batches=3, resume=True, default_hooks=logger
    )
    # mmengine names the folders by the second.
    assert resumed.timestamp is not None
    resumed.train()
    assert [point["step"] for point in read(tmp_path / "train").train] == [1, 2, 3, 4, 5, 6]


def test_mmdets_analyze_logs_can_read_the_file(make_runner, tmp_path):
    """It takes a line with a key of two parts for validation, and every other line for a step."""
    runner = make_runner([{"type": "CurvesHook"}], epochs=2, batches=3, default_hooks=EACH_STEP)
    runner.train()
    (path,) = (tmp_path / "train").glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert any("/" in key for key in lines[0])
    steps = [line for line in lines if not any("/" in key for key in line)]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all("loss" in line for line in steps)


def test_without_the_file_of_scalars_nothing_is_drawn(make_runner, tmp_path, capsys):
    visualizer = {"type": "Visualizer", "vis_backends": [], "name": "no_scalars"}
    runner = make_runner([{"type": "CurvesHook"}], epochs=1, batches=1, visualizer=visualizer)
    runner.train()
    assert "LocalVisBackend" in capsys.readouterr().out
    assert not list((tmp_path / "train").glob("curve*"))


def test_it_draws_seldom_but_always_at_the_end(make_runner, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "ddetr_mm.engine.curves.draw_curves",
        lambda scalars, folder: drawn.append((len(scalars.train), len(scalars.val))) or [],
    )
    hooks = [CurvesHook(redraw_s=1000)]
    make_runner(hooks, epochs=2, batches=3, validate=True, default_hooks=EACH_STEP).train()
    assert drawn == [(1, 0), (6, 2)]


# --- scalars of several starts ---


def test_points_of_lost_steps_are_dropped(tmp_path):
    begin = {RESUMED_STEP: 0, RESUMED_EPOCH: 0, "step": 0}
    val = {"coco/bbox_mAP": 0.2, "step": 1}
    write_start(tmp_path, "20260101_000000", begin, *train_points([10, 20]), val, *train_points([30]))
    again = {RESUMED_STEP: 20, RESUMED_EPOCH: 0, "step": 20}
    write_start(tmp_path, "20260101_000001", again, {**train_points([30])[0], "loss": 99.0})
    scalars = read(tmp_path)
    assert [(point["step"], point["loss"]) for point in scalars.train] == [(10, 10), (20, 20), (30, 99)]
    assert scalars.val == []
    write_start(tmp_path, "20260101_000002", begin, *train_points([5]))
    assert [point["step"] for point in read(tmp_path).train] == [5]


def test_starts_without_the_hook_are_left_out(tmp_path):
    write_start(tmp_path, "20260101_000000", {RESUMED_STEP: 0, "step": 0}, *train_points([10]))
    write_start(tmp_path, "20260101_000001", *train_points([1]))
    assert [point["step"] for point in read(tmp_path).train] == [10]


def test_reading_continues_after_a_line_that_was_half_written(tmp_path):
    path = write_start(tmp_path, "20260101_000000", {RESUMED_STEP: 0, "step": 0}, *train_points([1]))
    scalars = read(tmp_path)
    with path.open("a") as file:
        file.write('{"loss": 2.0, "iter": 2, "st')
    scalars.update()
    assert [point["step"] for point in scalars.train] == [1]
    with path.open("a") as file:
        file.write('ep": 2}\n')
    scalars.update()
    assert [point["step"] for point in scalars.train] == [1, 2]


@pytest.mark.parametrize("line", ['{"kind', "[1]"])
def test_a_broken_line_is_refused_with_its_file(tmp_path, line):
    path = write_start(tmp_path, "20260101_000000", {RESUMED_STEP: 0, "step": 0})
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"scalars\.json: a line is not"):
        read(tmp_path)


# --- drawing ---


def made(number: int = 50) -> RunScalars:
    scalars = RunScalars("nowhere")
    scalars.train = [
        {
            "loss": 100 / step,
            "loss_cls": 1.0,
            "d0.loss_cls": 2.0,
            "enc_loss_cls": 3.0,
            "lr": 2e-4,
            f"{RATE_PREFIX}0.0002": 2e-4,
            f"{RATE_PREFIX}2e-05": 2e-5,
            "step": 10 * step,
        }
        for step in range(1, number + 1)
    ]
    scalars.val = [
        {"coco/bbox_mAP": epoch / 10, "coco/bbox_mAP_s": -1.0, "coco/bbox_AR@1": 0.3, "step": epoch}
        for epoch in (1, 2, 3)
    ]
    return scalars


def test_series_show_the_parts_that_matter():
    losses = loss_series(made())
    assert list(losses) == ["loss", "loss_cls"]
    assert losses["loss"][0].tolist() == [10 * step for step in range(1, 51)]
    assert list(rate_series(made())) == ["0.0002", "2e-05"]
    precision = ap_series(made())
    assert list(precision) == ["AP"]
    assert precision["AP"][0].tolist() == [1, 2, 3]
    np.testing.assert_allclose(precision["AP"][1], [0.1, 0.2, 0.3])


def test_long_runs_are_thinned_to_means():
    x, y = loss_series(made(6000))["loss_cls"]
    assert len(x) == 1500
    np.testing.assert_allclose(y, 1.0)
    np.testing.assert_allclose(x[:2], [25, 65])


def test_pictures_show_something_and_pyplot_stays_out(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    drawn = draw_curves(made(), tmp_path)
    assert [path.name for path in drawn] == ["curve_loss.png", "curve_lr.png", "curve_ap.png"]
    for path in drawn:
        with Image.open(path) as image:
            assert image.size == (990, 550)
            assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_only_what_has_points_is_drawn(tmp_path):
    scalars = made()
    scalars.train = []
    assert draw_curves(RunScalars(tmp_path), tmp_path) == []
    assert [path.name for path in draw_curves(scalars, tmp_path)] == ["curve_ap.png"]


def test_missing_and_non_finite_values_do_not_break_drawing(tmp_path):
    begin = {RESUMED_STEP: 0, "step": 0}
    broken = {"loss": float("nan"), "lr": 0.1, "iter": 1, "step": 1}
    write_start(tmp_path, "20260101_000000", begin, broken, {"coco/bbox_mAP": -1.0, "step": 1})
    drawn = draw_curves(read(tmp_path), tmp_path)
    assert [path.name for path in drawn] == ["curve_loss.png", "curve_lr.png"]


def test_drawing_again_and_again_keeps_no_figure(tmp_path, living_figures):
    before = living_figures()
    for _ in range(3):
        assert draw_curves(made(), tmp_path)
    assert living_figures() == before
