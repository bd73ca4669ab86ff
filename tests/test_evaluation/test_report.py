from __future__ import annotations

import base64
import dataclasses
import gc
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import WIDTHS
from evaluation_scenes import random_scene
from matplotlib.figure import Figure
from PIL import Image

from ddetr_mm.evaluation.coco_eval import DetectionColumns, GroundTruthColumns, evaluate_boxes
from ddetr_mm.evaluation.mistakes import ERROR_KINDS, class_scores, confusion_matrix, error_costs, match
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
    facts = {"Checkpoint": f"runs/{EVIL}.pth", "Spec": EVIL}
    write_report(base / "out", result, {EVIL: result}, truth, detections, paths, facts, 0.25)
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
    assert len(pictures) == 50
    assert all(picture["src"].startswith("data:image/jpeg;base64,") for picture in pictures)
    text = " ".join(reader.text)
    figures = json.loads((folder / "results.json").read_text())
    assert f"{figures['AP']:.3f}" in text and f"{figures['ARl']:.3f}" in text
    assert "50 images with the most mistakes" in text and "250 ms (4 images/s)" in text


def test_the_head_says_what_was_evaluated(make_scene, tmp_path):
    truth, detections = make_scene(2)
    result = evaluate_boxes(truth, detections)
    facts = {"Checkpoint": "runs/a/model_epoch_003.pth", "Spec": "spec.yaml", "Data": "val.json"}
    write_report(tmp_path, result, {}, truth, detections, {}, facts, 0.5)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1>Evaluation of model_epoch_003.pth</h1>" in page
    for name, value in facts.items():
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page
    assert re.search(r"<dt>Versions</dt><dd>[^<]*mmdet 3\.3\.0[^<]*torch [^<]*Python 3", page)
    assert re.search(r"<dt>Date</dt><dd>20\d\d-\d\d-\d\d \d\d:\d\d</dd>", page)
    tiles = dict(re.findall(r"<div><b>([^<]*)</b><span>([^<]*)</span></div>", page))
    figures = {name: value for value, name in tiles.items()}
    assert figures == {
        "AP": f"{result['AP']:.3f}",
        "AP50": f"{result['AP50']:.3f}",
        "AP75": f"{result['AP75']:.3f}",
        "AR": f"{result['ARmax100']:.3f}",
        "images": str(result.num_images),
        "objects": str(result.num_boxes),
    }


def rows_of(page: str, name: str) -> list[list[str]]:
    """The texts of a table's rows, its header first."""
    table = re.search(rf'aria-label="{name}"><table.*?</table>', page, re.DOTALL).group()
    return [
        [html.unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)]
        for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)
    ]


def test_tables_have_the_computed_values(make_scene, tmp_path):
    truth, detections = make_scene(3, num_images=30)
    result = evaluate_boxes(truth, detections)
    write_report(tmp_path, result, {}, truth, detections, {})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    matching = match(truth, detections)
    header, *rows = rows_of(page, "Classes")
    assert header[:7] == ["class", "AP", "AP50", "precision", "recall", "F1", "own best threshold"]
    for row, entry, one in zip(
        rows, result.per_class, class_scores(matching, result.category_ids), strict=True
    ):
        assert row[:4] == [entry.name, f"{entry.AP:.3f}", f"{entry.AP50:.3f}", f"{one.precision:.3f}"]
        assert row[7] == str(entry.num_boxes) and row[9] == str(one.true_positives)
    costs = error_costs(truth, detections, result.category_ids, matching.threshold)
    _, *rows = rows_of(page, "Errors by kind")
    assert {row[0]: row[1:4] for row in rows} == {
        kind: [f"{costs.dAP50[kind]:.3f}", f"{costs.counts[kind]:,}", f"{costs.all_counts[kind]:,}"]
        for kind in ERROR_KINDS
    }
    assert [float(row[1]) for row in rows] == sorted((float(row[1]) for row in rows), reverse=True)
    matrix = confusion_matrix(matching, result.category_ids).counts
    _, header, *rows = rows_of(page, "Confusion matrix")
    assert header[0] == "Ground truth" and header[-1] == rows[-1][0] == "Background"
    assert [[int(cell or 0) for cell in row[1:]] for row in rows] == matrix.tolist()


def test_names_from_outside_stay_text(folder):
    reader = read(folder)
    assert {tag for tag, _ in reader.tags} <= {
        "html", "head", "meta", "link", "title", "style", "script", "body", "main", "h1", "h2", "h3", "p",
        "b", "dl", "dt", "dd", "ul", "li", "output", "table", "thead", "tbody", "tr", "th", "td", "img",
        "div", "figure", "figcaption", "br", "span", "button", "svg", "path", "rect", "details", "summary",
    }  # fmt: skip
    assert sum(tag == "script" for tag, _ in reader.tags) == 1
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert any(EVIL in text for text in reader.text)


def test_nothing_is_loaded_from_anywhere(folder):
    content = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=\"(?!data:)", content) and "url(" not in content
    policy = next(a["content"] for t, a in read(folder).tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:; ")
    script = re.search(r"<script>(.*?)</script>", content, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "unsafe-eval" not in policy


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


# --- in a browser ---


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """Reports of odd data: many classes with long names, no detections, one class."""
    base, made = tmp_path_factory.mktemp("odd"), {}
    for name, classes, with_detections in (("many", 80, True), ("none", 4, False), ("one", 1, True)):
        truth, detections = random_scene(5, num_images=20, num_classes=classes, boxes_per_image=9)
        names = {number: f"class_{number}_" + "with_a_long_name_" * 4 for number in truth.category_names}
        truth = dataclasses.replace(truth, category_names=names)
        paths = {}
        for number in truth.image_ids[:3].tolist():
            paths[number] = str(base / f"{number}.png")
            Image.new("RGB", (500, 400), (180, 90, 160)).save(paths[number])
        found = detections if with_detections else DetectionColumns.empty()
        result = evaluate_boxes(truth, found)
        facts = {"Checkpoint": "/a/long/path/" + "folder/" * 20 + "model.pth", "Spec": "spec.yaml"}
        made[name] = write_report(base / name, result, {}, truth, found, paths, facts, 0.1)
    return made


@pytest.mark.parametrize("name", ["many", "none", "one"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True])
def test_reports_of_odd_data_can_be_read(browser, reports, name, width, dark):
    browser.open(reports[name], width=width, dark=dark)
    browser.assert_readable()
    rows = browser.run("return document.querySelectorAll('[aria-label=Classes] tbody tr').length")
    assert rows == {"many": 80, "none": 4, "one": 1}[name]


def test_classes_of_a_report_sort_and_its_pictures_enlarge(browser, reports):
    from selenium.webdriver.common.keys import Keys

    browser.open(reports["many"], width=390)
    browser.run("document.querySelectorAll('[aria-label=Classes] th button')[2].click()")
    rows = "[...document.querySelectorAll('[aria-label=Classes] tbody tr')]"
    shown = browser.run(f"return {rows}.map(row => row.cells[2].textContent)")
    values = [float(value) for value in shown if value != "–"]
    assert values == sorted(values, reverse=True) and len(values) > 50
    picture = browser.driver.find_element("css selector", ".enlarge")
    picture.send_keys(Keys.ENTER)
    browser.assert_readable()
    assert browser.run("return document.querySelectorAll('dialog .tag').length") > 0
    browser.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not browser.run("return document.querySelector('dialog').open")


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
