from __future__ import annotations

import dataclasses
import gc
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from evaluation_scenes import random_scene
from matplotlib.figure import Figure
from PIL import Image

from ddetr_mm.evaluation.coco_eval import DetectionColumns, GroundTruthColumns, evaluate_boxes
from ddetr_mm.evaluation.report import (
    draw_class_precision,
    draw_precision_recall,
    freed_figures,
    save_png,
    write_report,
)

# --- the page: complete, self-contained, safe for any names ---

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>$\\frac{1}'


class Reader(HTMLParser):
    """Collects what a page is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The report of a scene whose classes, sources and files have evil names."""
    truth, detections = random_scene(0, num_images=56)
    names = {number: f"{EVIL}{number}" for number in truth.category_names}
    truth = dataclasses.replace(truth, category_names=names)
    base = tmp_path_factory.mktemp("report")
    paths = {}
    for number in truth.image_ids.tolist():
        paths[number] = str(base / f"<b>{number}&.png")
        shade = np.random.default_rng(number).integers(60, 160, 3)
        Image.new("RGB", (160, 120), tuple(shade.tolist())).save(paths[number])
    result = evaluate_boxes(truth, detections)
    write_report(base / "out", result, {EVIL: result}, truth, detections, paths)
    return base / "out"


def read(folder: Path) -> Reader:
    reader = Reader()
    reader.feed((folder / "report.html").read_text(encoding="utf-8"))
    return reader


def test_report_is_complete(folder):
    assert {path.name for path in folder.iterdir()} == {
        "results.json", "results_detail.json", "report.html", "precision_recall.png", "class_precision.png",
        "confusion_matrix.png", "score_histogram.png",
    }  # fmt: skip
    reader = read(folder)
    pictures = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(pictures) == 4 + 50
    assert all(
        picture["src"].startswith(("data:image/png;base64,", "data:image/jpeg;base64,"))
        for picture in pictures
    )
    text = " ".join(reader.text)
    figures = json.loads((folder / "results.json").read_text())
    assert f"{figures['AP']:.3f}" in text and f"{figures['ARl']:.3f}" in text
    assert "50 images with the most mistakes" in text and "Sources" in text


def test_names_from_outside_stay_text(folder):
    reader = read(folder)
    assert {tag for tag, _ in reader.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "b", "table", "tr", "th", "td",
        "img",
        "div", "figure", "figcaption", "br", "span",
    }  # fmt: skip
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert any(EVIL in text for text in reader.text)


def test_nothing_is_loaded_from_anywhere(folder):
    content = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=\"(?!data:)", content) and "url(" not in content
    policy = next(a["content"] for t, a in read(folder).tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_no_detections_and_no_pictures(make_scene, tmp_path):
    truth, _ = make_scene(1)
    nothing = DetectionColumns.empty()
    write_report(tmp_path, evaluate_boxes(truth, nothing), {}, truth, nothing, {})
    assert "There are no detections" in (tmp_path / "report.html").read_text()
    assert "the picture cannot be read" in (tmp_path / "report.html").read_text()


def test_no_ground_truth(tmp_path):
    truth, nothing = GroundTruthColumns([1], [], [], [], [], [], {1: "a"}), DetectionColumns.empty()
    write_report(tmp_path, evaluate_boxes(truth, nothing), {}, truth, nothing, {})
    assert "No image has a mistake" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_a_real_browser_shows_it(folder, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    options += [
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        "--window-size=1200,4000",
    ]
    shot = tmp_path / "shot.png"
    page = (folder / "report.html").as_uri()
    done = subprocess.run(
        [browser, *options, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
        + [f"--screenshot={shot}", page],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        "Refused to" not in done.stderr
        and "violates the following Content Security Policy" not in done.stderr
    )
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    # The plots' own colours are on the screen, so the browser has decoded them.
    for color in ((33, 113, 181), (198, 219, 239)):
        assert (np.abs(pixels.astype(int) - color).max(axis=1) <= 3).sum() > 200


# --- plots ---


def num_colors(path):
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(1 << 22))


@pytest.mark.parametrize("draw", [draw_precision_recall, draw_class_precision])
def test_pictures_follow_the_result(make_scene, tmp_path, draw):
    truth, detections = make_scene(0)
    good = draw(tmp_path / "deep" / "good.png", evaluate_boxes(truth, detections))
    none = draw(tmp_path / "none.png", evaluate_boxes(truth, DetectionColumns.empty()))
    assert num_colors(good) > 20
    assert not np.array_equal(np.asarray(Image.open(good)), np.asarray(Image.open(none)))


@pytest.mark.parametrize("draw", [draw_precision_recall, draw_class_precision])
def test_nothing_to_draw_is_still_a_picture(tmp_path, draw):
    nothing = GroundTruthColumns([1], [], [], [], [], [], {1: "a"})
    path = draw(tmp_path / "empty.png", evaluate_boxes(nothing, DetectionColumns.empty()))
    assert num_colors(path) > 1


def test_many_classes_and_odd_names(make_scene, tmp_path):
    truth, detections = make_scene(1, num_images=60, num_classes=100)
    names = {number: f"$x_{number}$ <b>[odd]" * 3 for number in truth.category_names}
    result = evaluate_boxes(dataclasses.replace(truth, category_names=names), detections)
    draw_class_precision(tmp_path / "a.png", result)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size[1] == pytest.approx(110 * (1.5 + 0.25 * 60), abs=2)
    assert num_colors(draw_precision_recall(tmp_path / "b.png", result)) > 20


# --- figures are freed, so that a long run does not keep them ---


def draw(path, size_px: int = 100):
    figure = Figure(figsize=(1, 1), dpi=size_px)
    figure.add_subplot().plot([1, 2], [3, 4])
    return save_png(path, figure)


def test_a_figure_is_a_cycle_and_is_freed(tmp_path, living_figures):
    before = living_figures()
    draw(tmp_path / "a.png")
    assert living_figures() == before + 1
    gc.collect()
    for _ in range(3):
        freed_figures()(draw)(tmp_path / "b.png")
        assert living_figures() == before
    with Image.open(tmp_path / "b.png") as image:
        assert image.size == (100, 100)


@pytest.mark.parametrize("function", [draw_precision_recall, draw_class_precision])
def test_pictures_of_an_evaluation_leave_no_figure(make_scene, tmp_path, function, living_figures):
    result = evaluate_boxes(*make_scene(0))
    before = living_figures()
    function(tmp_path / "picture.png", result)
    assert (tmp_path / "picture.png").is_file() and living_figures() == before


@pytest.mark.parametrize("enabled", [True, False])
def test_the_search_for_cycles_is_left_as_it_was(enabled):
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ValueError, match="odd"), freed_figures():
            assert not gc.isenabled()
            raise ValueError("odd")
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
