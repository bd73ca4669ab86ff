"""Names of any script on pictures."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ddetr_mm import fonts
from ddetr_mm.engine.detections import draw_detections
from ddetr_mm.fonts import covering_font, font_families, label_font, latin_letters


@pytest.fixture
def only_bundled_fonts(monkeypatch):
    """As on a system without fonts: those of Pillow and matplotlib."""
    import matplotlib

    bundled = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    monkeypatch.setattr(fonts, "_font_files", lambda: (bundled,))
    label_font.cache_clear()
    fonts._log_spelling.cache_clear()
    yield bundled
    label_font.cache_clear()


def drawn(text: str) -> np.ndarray:
    """The pixels of a text, cut to its ink."""
    font, shown = label_font(text, 24)
    picture = Image.new("L", (400, 60))
    ImageDraw.Draw(picture).text((5, 5), shown, fill=255, font=font)
    return np.asarray(picture.crop(picture.getbbox()))


def test_plain_names_stay_in_pillows_font():
    assert covering_font("traffic light 0.93") == ""
    assert label_font("car", 12)[1] == "car"


@pytest.mark.parametrize("name", ["Fußgänger", "машина", "αυτοκίνητο", "سيارة", "רכב"])
def test_other_scripts_get_a_font_that_has_them(only_bundled_fonts, name):
    font, shown = label_font(name, 24)
    assert shown == name and font.path == only_bundled_fonts
    # Every letter has a shape of its own: none is the sign of a missing one.
    shapes = {drawn(letter).tobytes() for letter in set(name)}
    assert len(shapes) == len(set(name)) and drawn("\U0010fffd").tobytes() not in shapes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("人", "U+4EBA"),
        ("가나 1", "gana 1"),
        ("クマ", "kuma"),
        ("Ågesø", "Ageso"),
    ],
)
def test_without_a_font_names_are_spelled(name, expected):
    assert latin_letters(name) == expected


def test_a_spelled_name_is_noted_once(only_bundled_fonts, caplog):
    image = np.full((200, 300, 3), 128, np.uint8)
    boxes, names = np.array([[20, 60, 150, 160]] * 2, dtype=float), ["人", "人"]
    with caplog.at_level(logging.WARNING):
        picture = draw_detections(image, boxes, names, np.array([0.9, 0.8]), {"人": (255, 0, 0)})
    assert [record.getMessage() for record in caplog.records] == [
        "no font here has the letters of 人: it is drawn as U+4EBA"
    ]
    same = draw_detections(image, boxes, ["U+4EBA"] * 2, np.array([0.9, 0.8]), {"U+4EBA": (255, 0, 0)})
    assert np.array_equal(np.asarray(picture), np.asarray(same))


def test_a_font_of_placeholders_is_no_font():
    """matplotlib brings one that "has" every letter."""
    assert not any("LastResort" in path for path in fonts._font_files())


def test_plots_get_families_for_all_names():
    assert font_families(["car", "машина", "人"])[0] == "DejaVu Sans"
    assert len(set(font_families(["car", "машина"]))) == 1
