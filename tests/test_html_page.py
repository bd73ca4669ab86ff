"""Parts of our HTML pages: what they say, and, in a real browser, how they look and work."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from pathlib import Path

import pytest
from browser import WIDTHS

from ddetr_mm.html_page import (
    CHART_HELP,
    NUM_COLORS,
    SIDE,
    Cell,
    Chart,
    Html,
    Mark,
    Series,
    chart,
    chart_axes,
    difference,
    facts,
    heading,
    image,
    join,
    legend,
    log_ticks,
    marked_picture,
    number,
    page,
    paragraph,
    table,
    text,
    tick_text,
    ticks,
    tiles,
)

EVIL = "<script>alert(1)</script>\"'&"
LONG = "class_name_without_any_space_" * 4 + "end"

# --- texts and tables ---


def test_every_part_escapes_what_it_is_given():
    parts = [
        heading(EVIL),
        paragraph(EVIL),
        tiles({EVIL: EVIL}, {EVIL: EVIL}),
        facts({EVIL: EVIL}),
        legend([(EVIL, EVIL)]),
        table([EVIL], [[Cell(EVIL, title=EVIL)]], name=EVIL, sortable=True),
        chart(Chart(EVIL, EVIL, EVIL, [Series(EVIL, [1], [2])], marks=[(1, EVIL)])),
        marked_picture(b"", EVIL, [Mark((0, 0, 1, 1), EVIL, EVIL)], text(EVIL)),
        image(b"", EVIL),
    ]
    whole = page(EVIL, parts, refresh_s=5)
    assert whole.count("<script>") == 1 and 'alert(1)</script>"' not in whole
    assert unescape(whole).count(EVIL) > 15


def test_bytes_of_file_names_that_are_no_text_are_shown():
    assert text("a\udce9.png") == "a?.png"


@pytest.mark.parametrize(
    ("value", "shown", "sorted_by"),
    [
        (0.5, "0.500", 0.5),
        (1234, "1,234", 1234.0),
        (-1.0, "–", None),
        (None, "–", None),
        (math.nan, "–", None),
    ],
)
def test_numbers(value, shown, sorted_by):
    cell = number(value)
    assert (cell.text, cell.value) == (shown, sorted_by)


@pytest.mark.parametrize(
    ("value", "shown", "kind"),
    [(0.25, "+0.250", "better"), (-0.25, "-0.250", "worse"), (0.0001, "0.000", ""), (None, "–", "")],
)
def test_differences_are_signed_and_coloured(value, shown, kind):
    cell = difference(value)
    assert (cell.text, cell.kind) == (shown, kind)


def test_bars_are_within_their_cell():
    assert 'style="--share:25.0%"' in table(["a"], [[number(0.25, bar=True)]], name="t", names=())
    assert number(1.5, bar=True).share == 1.0 and number(-0.5, bar=True).share == 0.0


# --- charts ---


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 100000, [0, 20000, 40000, 60000, 80000, 100000]),
        (1, 3, [1, 1.5, 2, 2.5, 3]),
        (0.301, 0.309, [0.302, 0.304, 0.306, 0.308]),
        (-5, 5, [-4, -2, 0, 2, 4]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high, 6) == pytest.approx(expected)


def test_ticks_of_a_logarithmic_axis():
    assert [10**place for place in log_ticks(0, 2, 7)] == pytest.approx([1, 2, 5, 10, 20, 50, 100])
    assert [10**place for place in log_ticks(-4, 3, 8)] == pytest.approx([10.0**n for n in range(-4, 4)])
    assert len(log_ticks(0, 40, 7)) <= 7 and len(log_ticks(0.42, 0.44, 7)) == 2


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.2, "0.2"), (20000, "20000"), (2e6, "2e6"), (2e-5, "2e-5"), (0.30000000000000004, "0.3")],
)
def test_text_of_ticks(value, shown):
    assert tick_text(value) == shown


def paths(content: str) -> list[str]:
    return re.findall(r'<path class="s\d+[^"]*" d="([^"]*)"', content)


def test_lines_are_at_their_place_and_broken_where_a_value_is_missing():
    series = [Series("a", [0, 1, 2, 4], [0, 1, None, 0.5], dots) for dots in (False, True)]
    given = Chart("t", "x", "y", series, y_range=(0, 1))
    line, dots = paths(chart(given))
    assert line == f"M0.0 {SIDE}.0h.1L250.0 0.0M1000.0 500.0h.1"
    assert dots == f"M0.0 {SIDE}.0h.1M250.0 0.0h.1M1000.0 500.0h.1"
    data = json.loads(unescape(re.search(r'data-chart="([^"]*)"', chart(given)).group(1)))
    assert data["series"] == [[[0, 1, 2, 4], [0, 1, None, 0.5], kind] for kind in (0, 1)]
    assert data["x"] == [0, 4]


def test_logarithmic_axes_hold_what_is_not_positive_at_their_end():
    axes = chart_axes(Chart("t", "x", "y", [Series("a", [0, 1, 2], [1, 100, 0])], log=True))
    assert axes.y == pytest.approx((-0.06, 2.06))
    assert axes.place(2, 0) == (SIDE, SIDE) and axes.place(1, 100)[1] == pytest.approx(28.3, abs=0.1)


def test_a_histogram_is_made_of_bars_from_the_bottom():
    given = Chart("t", "x", "y", [Series("a", [0.25, 0.75], [2, 4])], step=0.5, x_range=(0, 1))
    assert paths(chart(given)) == [f"M0.0 {SIDE}V500.0H500.0V{SIDE}M500.0 {SIDE}V0.0H1000.0V{SIDE}"]


@pytest.mark.parametrize(
    "series",
    [[], [Series("a", [], [])], [Series("a", [3], [5])], [Series("a", [1, 2], [None, math.nan])]],
    ids=["none", "empty", "one point", "no values"],
)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("step", [0.0, 1.0])
def test_charts_of_little_are_drawn(series, log, step):
    axes = chart_axes(Chart("t", "x", "y", series, log=log, step=step))
    assert axes.x[0] < axes.x[1] and axes.y[0] < axes.y[1]
    assert "nan" not in chart(Chart("t", "x", "y", series, log=log, step=step)).lower()


def test_more_series_than_colours_are_dashed():
    many = [Series(f"a{place}", [0, 1], [0, place]) for place in range(NUM_COLORS + 2)]
    kinds = re.findall(r'<path class="(s\d+[^"]*)"', chart(Chart("t", "x", "y", many)))
    assert kinds[0] == "s0" and kinds[NUM_COLORS] == "s0 dashed" and len(set(kinds)) == len(kinds)
    chosen = chart(Chart("t", "x", "y", many[:2], colors=[3, 1]))
    assert re.findall(r'<path class="(s\d+)"', chosen) == ["s3", "s1"]


# --- colours ---


def luminance(color: str) -> float:
    """Relative luminance of ``#rrggbb`` by WCAG."""
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_are_seen_in_light_and_dark_mode():
    from ddetr_mm.html_assets import STYLE

    light, dark = re.findall(r":root \{([^}]*)\}", STYLE)
    for block, back in ((light, "#ffffff"), (dark, "#14171c")):
        colors = dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6})", block))
        for name in ("text", "quiet", *(f"s{place}" for place in range(NUM_COLORS))):
            assert contrast(colors[name], back) >= (4.5 if name in ("text", "quiet") else 3), name
    marks = re.findall(r"--mark: (#[0-9a-f]{6})", STYLE)
    assert len(set(marks)) == 4
    assert all(contrast(mark, "#ffffff") >= 4.5 for mark in marks)  # white labels, and the line beside it


@pytest.mark.parametrize("grey", [0, 60, 118, 180, 255])
def test_boxes_are_seen_on_any_picture(grey):
    """Each has a dark and a light line beside the coloured one."""
    shade = f"#{grey:02x}{grey:02x}{grey:02x}"
    assert max(contrast("#000000", shade), contrast("#ffffff", shade)) >= 4.5
    drawn = marked_picture(b"", "a", [Mark((0.1, 0.2, 0.5, 0.6), "missed", "b")], Html(""))
    kinds = re.findall(r'<rect class="([^"]*)" x="100.0" y="200.0" width="400.0" height="400.0"', drawn)
    assert kinds == ["dark", "light", "box missed"]


# --- in a browser ---

OUTPUTS = (
    "return [...document.querySelectorAll('.chart')[1].querySelectorAll('output')].map(o => o.textContent)"
)


def tiny_png() -> bytes:
    import io

    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (320, 200), (120, 130, 140)).save(content, format="PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def rich_page(tmp_path_factory) -> Path:
    """A page with every part, long names and large numbers."""
    steps = list(range(0, 200_000, 1000))
    falling = Series("loss of " + LONG, steps, [100 / (1 + step) for step in steps])
    rising = Series("AP", [1, 2, 3, 4], [0.1, None, 0.3, 0.25])
    rows = [
        [LONG, number(0.5, bar=True), number(20), *(number(value) for value in (None, 1e6))],
        ["b", number(0.25, bar=True), number(3), number(0.1), number(2)],
        ["a10", number(-1.0), number(100), number(0.2), number(1)],
        ["a9", number(0.75, bar=True), number(7), number(0.3), number(0)],
    ]
    marks = [Mark((0.3, 0.3, 0.6, 0.7), "false-positive", f"{LONG[:30]} 0.{n}") for n in range(10, 30)]
    parts = [
        heading("A run of " + LONG, 1),
        facts({"Checkpoint": "/long/path/" + LONG, "Date": "today"}),
        tiles({"AP": "0.123", "objects": "12,345,678,901"}, {"AP": "epoch 3"}),
        paragraph(LONG, "alarm"),
        heading("Charts"),
        Html(f'<div class="charts">{chart(Chart("Loss", "steps", "loss", [falling], log=True))}'),
        Html(f"{chart(Chart('AP', 'epochs', 'AP', [rising], y_range=(0, 1), marks=[(2, 'here')]))}</div>"),
        chart(Chart("Scores", "score", "n", [Series("a", [0.5, 1.5], [3, 4])], step=1)),
        paragraph(CHART_HELP),
        table(["class", "AP", "number", "c", "d"], rows, name="Classes", sortable=True),
        marked_picture(tiny_png(), "first", marks, text("first.png")),
        marked_picture(tiny_png(), "second", marks[:2], text("second.png")),
    ]
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page("A page", [join(parts)]), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True])
def test_everything_can_be_read(browser, rich_page, width, dark):
    browser.open(rich_page, width=width, dark=dark)
    found = browser.assert_readable()
    assert found["back"] == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
    assert found["front"] == ("rgb(231, 234, 238)" if dark else "rgb(28, 33, 40)")


def test_a_click_on_a_header_sorts_and_cells_without_a_value_stay_last(browser, rich_page):
    browser.open(rich_page)
    column = (
        "return [...document.querySelectorAll('table.sortable tbody tr')].map(r => r.cells[%d].textContent)"
    )
    click = "document.querySelectorAll('table.sortable th button')[arguments[0]].click()"
    browser.run(click, 1)
    assert browser.run(column % 1) == ["0.750", "0.500", "0.250", "–"]
    sort = "return document.querySelectorAll('table.sortable thead th')[arguments[0]].ariaSort"
    assert browser.run(sort, 1) == "descending"
    browser.run(click, 1)
    assert browser.run(column % 1) == ["0.250", "0.500", "0.750", "–"]
    browser.run(click, 2)
    assert browser.run(column % 2) == ["100", "20", "7", "3"] and browser.run(sort, 1) is None
    browser.run(click, 0)
    assert browser.run(column % 0) == ["a9", "a10", "b", LONG]


def test_pointing_shows_values_and_dragging_zooms(browser, rich_page):
    from selenium.webdriver import ActionChains

    browser.open(rich_page)
    area = browser.driver.find_elements("css selector", ".area")[1]
    browser.run("arguments[0].scrollIntoView({block: 'center'})", area)
    width = area.size["width"]
    ActionChains(browser.driver).move_to_element_with_offset(area, int(width * 0.17), 0).perform()
    assert browser.run(OUTPUTS) == ["3", "0.3"]
    drag = ActionChains(browser.driver).move_to_element_with_offset(area, int(-width * 0.48), 0)
    drag.click_and_hold().move_by_offset(int(width * 0.4), 0).release().perform()
    view = "return document.querySelectorAll('.chart')[1].dataset.view.split(' ').map(Number)"
    low, high = browser.run(view)
    assert low == pytest.approx(1.06, abs=0.05) and high == pytest.approx(2.26, abs=0.05)
    browser.assert_readable()
    # The zoom outlives a reload, as a page that renews itself needs.
    browser.driver.refresh()
    assert browser.run(view) == pytest.approx([low, high])
    browser.run("document.querySelectorAll('.chart')[1].querySelector('[data-zoom=all]').click()")
    assert browser.run(view) == [1, 4]
    drawn = "return document.querySelectorAll('.chart')[1].querySelector('path.s0').getAttribute('d')"
    again = browser.run(drawn)
    browser.driver.refresh()
    assert browser.run(drawn).replace(".0", "") == again.replace(".0", "")  # drawn here as by Python


def test_charts_work_by_keyboard(browser, rich_page):
    from selenium.webdriver.common.keys import Keys

    browser.open(rich_page, width=390)
    area = browser.driver.find_elements("css selector", ".area")[1]
    area.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert browser.run(OUTPUTS) == ["3", "0.3"]
    area.send_keys("+")
    view = "return document.querySelectorAll('.chart')[1].dataset.view.split(' ').map(Number)"
    assert browser.run(view) == pytest.approx([2.25, 3.75])
    area.send_keys("0")
    assert browser.run(view) == [1, 4]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_picture_is_enlarged_and_closed_by_keyboard(browser, rich_page, width):
    from selenium.webdriver.common.keys import Keys

    browser.open(rich_page, width=width)
    first = browser.driver.find_element("css selector", ".enlarge")
    first.send_keys(Keys.ENTER)
    shown = "return document.querySelector('dialog').open"
    assert browser.run(shown)
    browser.assert_readable()
    tags = browser.run(
        "const f = document.querySelector('dialog .frame').getBoundingClientRect();"
        "return [...document.querySelectorAll('dialog .tag')].map(t => t.getBoundingClientRect())"
        ".map(r => r.left >= f.left - 1 && r.right <= f.right + 1 && r.top >= f.top - 1"
        " && r.bottom <= f.bottom + 1)"
    )
    left_out = browser.run("return document.querySelector('dialog .left').textContent")
    assert tags and all(tags)
    assert len(tags) + int((re.match(r"\d+", left_out) or ["0"])[0]) == 20
    size = "const r = document.querySelector('dialog img').getBoundingClientRect(); return r.width / r.height"
    assert browser.run(size) == pytest.approx(1.6, abs=0.01)
    active = browser.driver.switch_to.active_element
    active.send_keys(Keys.ARROW_RIGHT)
    assert browser.run("return document.querySelector('dialog .title').textContent").startswith(
        "2 of 2: second"
    )
    browser.run("document.querySelector('[data-go=labels]').click()")
    assert browser.run("return document.querySelectorAll('dialog .tag').length") == 0
    browser.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not browser.run(shown)
    focused = browser.run("return document.activeElement.ariaLabel")
    assert focused == "Enlarge second"


def test_a_page_renews_itself(browser, tmp_path):
    path = tmp_path / "live.html"
    path.write_text(page("a", [heading("before", 1)], refresh_s=1), encoding="utf-8")
    browser.open(path)
    path.write_text(page("a", [heading("after", 1)]), encoding="utf-8")
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser.driver, 30).until(
        lambda driver: driver.find_element("css selector", "h1").text == "after"
    )


def test_a_series_of_one_point_is_a_dot():
    series = [Series("AP", [7.0], [0.3]), Series("AR", [1.0, 2.0], [0.1, 0.2])]
    page = chart(Chart("AP", "epoch", "AP", series))
    assert [" point" in kind for kind in re.findall(r'<path class="(s[^"]*)"', page)] == [True, False]
