"""Figures are written and freed at once: a run that draws for days must not carry what it has drawn."""

from __future__ import annotations

import gc

import pytest
from matplotlib.figure import Figure
from PIL import Image

from ddetr_mm.evaluation.coco_eval import evaluate_boxes
from ddetr_mm.evaluation.figures import freed_figures, save_png
from ddetr_mm.evaluation.plots import draw_class_precision, draw_precision_recall


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
