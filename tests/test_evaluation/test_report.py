"""The page of an evaluation: complete, self-contained, harmless whatever names it shows."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from evaluation_scenes import random_scene
from PIL import Image

from ddetr_mm.evaluation.coco_eval import evaluate_boxes
from ddetr_mm.evaluation.columns import DetectionColumns, GroundTruthColumns
from ddetr_mm.evaluation.report import write_report

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


def test_everything_is_there(folder):
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
