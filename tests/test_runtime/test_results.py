from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddetr_mm.errors import DataError, SpecError
from ddetr_mm.runtime.results import (
    box_colors,
    draw_detections,
    kitti_line,
    load_upright_rgb,
    palette,
    parse_color_map,
    save_image,
    write_kitti_labels,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_line_as_documented():
    expected = "person 0.00 0 0.00 10.000 20.000 110.000 220.000 0.00 0.00 0.00 0.00 0.00 0.00 0.00 0.913"
    assert kitti_line("person", [10, 20, 110, 220], 0.9129) == expected


@given(
    name=st.text(min_size=1).filter(str.strip),
    box=st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4),
    score=st.floats(0, 1),
)
def test_any_line_has_sixteen_columns_that_read_back(name, box, score):
    columns = kitti_line(name, box, score).split()
    assert len(columns) == 16
    assert [float(column) for column in columns[4:8]] == pytest.approx(box, abs=5e-4)
    assert float(columns[15]) == pytest.approx(score, abs=5e-4)


def test_names_with_spaces_keep_the_columns():
    assert kitti_line(" traffic  light", [0, 0, 1, 1], 1).split()[0] == "traffic_light"
    with pytest.raises(ValueError, match="class name"):
        kitti_line("  ", [0, 0, 1, 1], 1)


def test_label_file_holds_what_passes(tmp_path):
    path = tmp_path / "labels" / "a.txt"
    boxes = np.array([[0, 0, 5, 5], [1, 1, 6, 6], [2, 2, 7, 7]], dtype=np.float32)
    assert write_kitti_labels(path, ["car", "bus", "car"], boxes, np.array([0.9, 0.3, 0.5]), 0.5) == 2
    assert [line.split()[0] + line.split()[15] for line in path.read_text().splitlines()] == [
        "car0.900",
        "car0.500",
    ]
    assert path.read_text().endswith("\n")
    assert write_kitti_labels(path, ["car", "bus", "car"], boxes, np.array([0.1, 0.1, 0.1]), 0.5) == 0
    assert path.read_bytes() == b""


def test_colors_by_name_and_code():
    assert parse_color_map({"a": "red", "b": "#0000ff", "c": "rgb(1,2,3)"}) == {
        "a": RED,
        "b": BLUE,
        "c": (1, 2, 3),
    }
    with pytest.raises(SpecError) as caught:
        parse_color_map({"a": "grean", "b": "red", "c": 7})
    assert "inference.color_map.a: is not a colour (got 'grean')" in str(caught.value)
    assert "inference.color_map.c" in str(caught.value)


def test_palette_is_stable_and_tells_classes_apart():
    names = [f"class {number}" for number in range(30)]
    colors = palette(names)
    assert colors == palette(names)
    assert len(set(colors.values())) == 30
    assert box_colors(names, None) == colors
    assert box_colors(names, {"class 3": "red"}) == {"class 3": RED}


def test_boxes_are_drawn_in_their_colours_on_a_copy():
    image = np.full((200, 300, 3), 128, dtype=np.uint8)
    boxes = np.array([[50, 60, 150, 160], [170, 60, 260, 160]], dtype=float)
    drawn = np.asarray(draw_detections(image, boxes, ["a", "b"], np.array([0.9, 0.8]), {"a": RED}, 3))
    assert (image == 128).all()
    assert tuple(drawn[110, 50]) == tuple(drawn[110, 52]) == RED
    assert tuple(drawn[110, 53]) == (128, 128, 128)
    # A class without a colour leaves the picture as it was.
    assert (drawn[:, 165:] == 128).all()


def test_the_better_detection_lies_on_top():
    image = np.zeros((100, 100, 3), dtype=np.uint8)
    boxes = np.array([[20, 40, 80, 90], [20, 40, 80, 90]], dtype=float)
    drawn = draw_detections(image, boxes, ["a", "b"], np.array([0.9, 0.2]), {"a": RED, "b": BLUE})
    assert drawn.getpixel((20, 70)) == RED


def test_odd_boxes_do_not_break_the_picture():
    image = Image.new("RGB", (40, 30))
    boxes = np.array([[-100, -100, 500, 500], [30, 20, 10, 5], [np.nan, 0, 1, 1], [39, 29, 39, 29]])
    drawn = draw_detections(image, boxes, ["a"] * 4, np.ones(4), {"a": RED})
    assert drawn.size == (40, 30)
    assert drawn.getpixel((10, 12)) == RED


def test_images_are_turned_by_their_exif_tag(tmp_path):
    picture = Image.new("RGB", (40, 20), BLUE)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert load_upright_rgb(tmp_path / "turned.jpg").size == (20, 40)
    Image.new("L", (5, 6)).save(tmp_path / "grey.png")
    assert load_upright_rgb(tmp_path / "grey.png").mode == "RGB"


def test_unreadable_images_are_named(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "missing.png"):
        with pytest.raises(DataError, match=name):
            load_upright_rgb(tmp_path / name)
    Image.new("RGB", (100, 100)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"large\.png"):
        load_upright_rgb(tmp_path / "large.png")


@pytest.mark.parametrize("ending", [".jpg", ".png", ".bmp", ".JPEG"])
def test_saved_pictures_open_again(tmp_path, ending):
    path = save_image(tmp_path / "deep" / f"a{ending}", Image.new("RGB", (8, 9), RED))
    with Image.open(path) as image:
        assert image.size == (8, 9)
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_unknown_endings_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.xyz"):
        save_image(tmp_path / "a.xyz", Image.new("RGB", (8, 9)))
