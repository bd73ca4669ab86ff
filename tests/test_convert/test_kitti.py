import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kitti_builder import label_line

from ddetr_mm.convert import kitti
from ddetr_mm.convert.kitti import (
    BOX_VERDICTS,
    DEFAULT_CLASS_MAPPING,
    ClassLookup,
    category_ids,
    check_class_mapping,
    clip_boxes,
    coco_categories,
    kitti_line,
    load_class_mapping,
    parse_labels,
)
from ddetr_mm.errors import DataError

LOOKUP = ClassLookup({"Car": 2, "car": 3, "person": 1, "Person Group": 4, "fußgänger": 5})


def parse_one(text):
    columns, problems = parse_labels([text if isinstance(text, bytes) else text.encode()], LOOKUP)
    return columns, [(problem.line, problem.kind, problem.detail) for problem in problems]


class TestLookup:
    @pytest.mark.parametrize(
        ("name", "category_id"),
        [
            ("Car", 2),
            ("car", 3),
            ("CAR", 3),
            ("PERSON", 1),
            ("Fußgänger", 5),
            ("bike", 0),
            ("person group", 0),
        ],
    )
    def test_exact_name_first_then_lower_case(self, name, category_id):
        assert LOOKUP[name.encode()] == category_id

    def test_bytes_that_are_not_utf8_are_unknown(self):
        assert LOOKUP[b"\xff\xfe"] == 0

    def test_does_not_remember_names_without_end(self, monkeypatch):
        monkeypatch.setattr(kitti, "_MAX_REMEMBERED_NAMES", 10)
        lookup = ClassLookup({"car": 1})
        assert [lookup[f"CAR{number}".encode()] for number in range(50)] == [0] * 50
        assert len(lookup) == 10


class TestGoodLabels:
    @pytest.mark.parametrize("score", [None, "0.913"])
    @pytest.mark.parametrize("end", ["", "\n", "\n\n  \n"])
    def test_fifteen_and_sixteen_columns(self, score, end):
        text = "\n".join(
            [label_line("Car", (1, 2, 3.5, 4), score), label_line("person", (0, 0, 9, 9), score)]
        )
        columns, problems = parse_one(text + end)
        assert problems == []
        np.testing.assert_array_equal(columns.boxes_xyxy, [[1, 2, 3.5, 4], [0, 0, 9, 9]])
        np.testing.assert_array_equal(columns.category_ids, [2, 1])
        np.testing.assert_array_equal(columns.line_numbers, [1, 2])

    def test_columns_may_be_mixed_and_separated_by_tabs(self):
        text = label_line("Car") + "\n" + label_line("Car", score="1").replace(" ", "\t") + "  \n"
        columns, problems = parse_one(text)
        assert problems == []
        assert len(columns.category_ids) == 2

    @pytest.mark.parametrize("score", [None, "0.5"])
    def test_class_of_several_words(self, score):
        columns, problems = parse_one(label_line("Person Group", (1, 2, 3, 4), score))
        assert problems == []
        np.testing.assert_array_equal(columns.category_ids, [4])
        np.testing.assert_array_equal(columns.boxes_xyxy, [[1, 2, 3, 4]])

    def test_class_of_several_words_that_is_not_known_is_no_shifted_box(self):
        columns, problems = parse_one(label_line("Car Wash"))
        assert len(columns.category_ids) == 0
        assert problems == [(1, "unknown_class", "Car Wash")]  # its whole name, to be put into the mapping

    def test_class_outside_ascii(self):
        columns, problems = parse_one(label_line("fußgänger") + "\n" + label_line("FUßGÄNGER"))
        assert problems == []
        np.testing.assert_array_equal(columns.category_ids, [5, 5])

    def test_blank_lines_count_as_lines(self):
        columns, problems = parse_one("\n\n" + label_line("Car"))
        assert problems == []
        np.testing.assert_array_equal(columns.line_numbers, [3])

    def test_byte_order_mark_is_no_part_of_the_class(self):
        columns, problems = parse_one(b"\xef\xbb\xbf" + label_line("Car").encode())
        assert problems == []
        np.testing.assert_array_equal(columns.category_ids, [2])

    def test_no_texts(self):
        columns, problems = parse_labels([], LOOKUP)
        assert columns.boxes_xyxy.shape == (0, 4)
        assert problems == []

    def test_many_files_keep_their_order_around_a_bad_one(self):
        texts = [f"{label_line('Car', (n, 0, n + 1, 1))}\n".encode() * (n % 3 + 1) for n in range(200)]
        texts[77] = (
            label_line("Car", (77, 0, "x", 1)).encode() + b"\n" + label_line("Car", (77, 0, 78, 1)).encode()
        )
        texts[120] = label_line("Car", (120, 0, 121, 1)).encode() + b"\r\n"
        columns, problems = parse_labels(texts, LOOKUP)
        expected = [n for n in range(200) for _ in range(n % 3 + 1 if n not in (77, 120) else 1)]
        np.testing.assert_array_equal(columns.file_index, expected)
        np.testing.assert_array_equal(columns.boxes_xyxy[:, 0], expected)
        assert [(problem.file_index, problem.kind) for problem in problems] == [
            (77, "not_a_number"),
            (120, "windows_line_ends"),
        ]


class TestBadLabels:
    @pytest.mark.parametrize("text", [b"", b"\n", b" \n\t\n", b"\xef\xbb\xbf"])
    def test_empty(self, text):
        columns, problems = parse_one(text)
        assert len(columns.category_ids) == 0
        assert [kind for _, kind, _ in problems] == ["empty_label"]

    @pytest.mark.parametrize(
        "line", ["Car", "Car 1 2 3", label_line() + " 1 2", " ".join(label_line().split()[:-1])]
    )
    def test_wrong_number_of_columns(self, line):
        columns, problems = parse_one(label_line() + "\n" + line + "\n" + label_line())
        np.testing.assert_array_equal(columns.line_numbers, [1, 3])
        assert problems == [(2, "wrong_column_count", f"{len(line.split())} columns")]

    @pytest.mark.parametrize("column", range(1, 16))
    @pytest.mark.parametrize(
        ("word", "kind"),
        [
            ("abc", "not_a_number"),
            ("1,5", "not_a_number"),
            ("1_000", "not_a_number"),
            ("0x10", "not_a_number"),
            ("nan", "not_finite"),
            ("-Infinity", "not_finite"),
            ("1e999", "not_finite"),
        ],
    )
    def test_every_column_but_the_class_is_a_finite_number(self, column, word, kind):
        fields = label_line(score="0.5").split()
        fields[column] = word
        columns, problems = parse_one(label_line() + "\n" + " ".join(fields))
        np.testing.assert_array_equal(columns.line_numbers, [1])
        if (column, word) == (1, "abc"):  # 16 fields with two words in front: a class of two words, no score
            kind, word = "unknown_class", "Car abc"
        assert problems == [(2, kind, word)]

    def test_unknown_class_is_listed_with_its_name(self):
        columns, problems = parse_one(label_line("DontCare") + "\n" + label_line("Car"))
        np.testing.assert_array_equal(columns.line_numbers, [2])
        assert problems == [(1, "unknown_class", "DontCare")]

    def test_bytes_that_are_not_utf8_cost_one_line(self):
        columns, problems = parse_one(label_line().encode() + b"\nCar\xff" + label_line().encode()[3:])
        np.testing.assert_array_equal(columns.line_numbers, [1])
        assert problems == [(2, "not_utf8", "byte 0xff at column 4")]

    @pytest.mark.parametrize("end", ["\r\n", "\r"])
    def test_carriage_returns_are_reported_and_read(self, end):
        columns, problems = parse_one(end.join([label_line("Car"), label_line("person"), ""]))
        np.testing.assert_array_equal(columns.category_ids, [2, 1])
        np.testing.assert_array_equal(columns.line_numbers, [1, 2])
        assert problems == [(1, "windows_line_ends", "carriage return")]

    def test_a_control_character_is_no_space(self):
        _, problems = parse_one(label_line().replace("0.00", "0.00\x00", 1))
        assert problems == [(1, "not_a_number", "0.00\x00")]


numbers = st.floats(-1e6, 1e6).map(lambda value: round(value, 6))
names = st.sampled_from(["Car", "person", "CAR", "fußgänger"])


@settings(deadline=None)
@given(st.lists(st.tuples(names, st.tuples(numbers, numbers, numbers, numbers), st.none() | st.floats(0, 1))))
def test_what_is_written_is_read_back(rows):
    text = "".join(kitti_line(name, box, score, decimals=6) + "\n" for name, box, score in rows)
    columns, problems = parse_labels([text.encode()], LOOKUP)
    assert [problem.kind for problem in problems] == ([] if rows else ["empty_label"])
    np.testing.assert_array_equal(columns.boxes_xyxy, np.array([box for _, box, _ in rows]).reshape(-1, 4))
    assert columns.category_ids.tolist() == [LOOKUP[name.encode()] for name, _, _ in rows]


def test_a_written_line_has_three_decimals_and_a_name_of_one_word():
    line = kitti_line(" traffic  light", [10, 20, 110.5, 220], 0.9129)
    assert line == (
        "traffic_light 0.00 0 0.00 10.000 20.000 110.500 220.000 0.00 0.00 0.00 0.00 0.00 0.00 0.00 0.913"
    )
    with pytest.raises(ValueError, match="class name"):
        kitti_line("  ", [0, 0, 1, 1])


words = st.sampled_from(
    [
        b"Car",
        b"0",
        b"1.5",
        b"-3",
        b"nan",
        b"1_0",
        b"\xff",
        b"\xc3\xa9",
        b"\x00",
        b"Person Group",
        b"1e400",
        b"",
    ]
)
junk_lines = st.lists(words, max_size=18).map(b" ".join)
good_lines = st.just(label_line("Car", (1, 2, 3, 4)).encode())
junk = st.lists(st.one_of(junk_lines, good_lines, st.binary(max_size=60)), max_size=6).flatmap(
    lambda lines: st.sampled_from([b"\n", b"\r\n", b"\r"]).map(lambda end: end.join(lines))
)


@settings(max_examples=300, deadline=None)
@given(st.lists(junk, max_size=5))
def test_junk_never_raises_and_no_line_is_lost(texts):
    columns, problems = parse_labels(texts, LOOKUP)
    assert np.isfinite(columns.boxes_xyxy).all()
    assert (columns.category_ids > 0).all()
    found = set(zip(columns.file_index.tolist(), columns.line_numbers.tolist(), strict=True))
    assert len(found) == len(columns.file_index)
    dropped = {
        (problem.file_index, problem.line)
        for problem in problems
        if problem.kind not in ("windows_line_ends", "empty_label")
    }
    assert not found & dropped
    expected = set()
    for number, text in enumerate(texts):
        lines = text.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        expected |= {(number, line) for line, content in enumerate(lines, start=1) if content.split()}
    assert found | dropped == expected


@settings(deadline=None)
@given(st.lists(junk, max_size=5))
def test_reading_together_or_alone_is_the_same(texts):
    together, problems = parse_labels(texts, LOOKUP)
    alone = [parse_labels([text], LOOKUP) for text in texts]
    assert together.boxes_xyxy.tolist() == [
        box for columns, _ in alone for box in columns.boxes_xyxy.tolist()
    ]
    assert together.category_ids.tolist() == [
        number for columns, _ in alone for number in columns.category_ids.tolist()
    ]
    assert [problem[1:] for problem in problems] == [problem[1:] for _, found in alone for problem in found]


class TestClipping:
    @pytest.mark.parametrize(
        ("box", "verdict", "clipped"),
        [
            ((0, 0, 64, 48), "", (0, 0, 64, 48)),
            ((1.5, 2, 3, 4), "", (1.5, 2, 3, 4)),
            ((-5, -5, 10, 10), "box_clipped", (0, 0, 10, 10)),
            ((60, 40, 100, 100), "box_clipped", (60, 40, 64, 48)),
            ((-1e300, -1e300, 1e300, 1e300), "box_clipped", (0, 0, 64, 48)),
            ((10, 10, 5, 20), "box_reversed", None),
            ((10, 20, 15, 10), "box_reversed", None),
            ((-10, 20, -15, 10), "box_reversed", None),
            ((10, 10, 10, 20), "box_zero_area", None),
            ((10, 10, 20, 10), "box_zero_area", None),
            ((100, 100, 100, 100), "box_zero_area", None),
            ((64, 0, 70, 10), "box_outside", None),
            ((-9, 0, 0, 10), "box_outside", None),
            ((5, 48, 9, 50), "box_outside", None),
        ],
    )
    def test_verdicts(self, box, verdict, clipped):
        good = (3, 3, 6, 6)
        boxes, verdicts = clip_boxes(np.array([good, box], float), np.array([[64, 48]] * 2, np.int32))
        assert [BOX_VERDICTS[number] for number in verdicts] == ["", verdict]
        np.testing.assert_array_equal(boxes[0], good)
        if clipped is not None:
            np.testing.assert_array_equal(boxes[1], clipped)

    def test_no_boxes(self):
        boxes, verdicts = clip_boxes(np.zeros((0, 4)), np.zeros((0, 2), np.int32))
        assert boxes.shape == (0, 4)
        assert verdicts.shape == (0,)

    @settings(deadline=None)
    @given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=4, max_size=4))
    def test_what_is_kept_lies_inside_and_has_an_area(self, box):
        boxes, verdicts = clip_boxes(np.array([box]), np.array([[64, 48]], np.int32))
        left, top, right, bottom = boxes[0]
        if verdicts[0] < kitti.FIRST_DROPPED_VERDICT:
            assert 0 <= left < right <= 64
            assert 0 <= top < bottom <= 48
            assert math.isfinite((right - left) * (bottom - top))
        else:
            assert BOX_VERDICTS[verdicts[0]] in ("box_reversed", "box_zero_area", "box_outside")


def test_default_mapping_has_the_documented_ids():
    assert category_ids(DEFAULT_CLASS_MAPPING.values()) == {"person": 1, "face": 2, "bag": 3}


def test_categories_are_listed_by_id():
    ids = category_ids(["bag", "face", "person"])
    assert coco_categories(ids) == [
        {"id": 1, "name": "person"},
        {"id": 2, "name": "face"},
        {"id": 3, "name": "bag"},
    ]


def test_reads_a_mapping_file_with_byte_order_mark(tmp_path):
    path = tmp_path / "mapping.json"
    path.write_bytes(b'\xef\xbb\xbf{"RBC": "rbc", "WBC": "wbc"}')
    assert load_class_mapping(path) == {"RBC": "rbc", "WBC": "wbc"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": "b",}', "line 1, column 1"),
        (b"", "not valid JSON"),
        (b"[1, 2]", "not an object"),
        (b"{}", "is empty"),
        (b'{"a": 1}', "got 1"),
        (b'{"a": null}', "leaves out every class"),
        (b'{"a": "b", "c": false}', "got False"),
        (b'{"a": ""}', "non-empty"),
        (b'{" ": "b"}', "non-empty"),
        (b'{"a": "b", "a": "c"}', "two categories"),
        (b"\xff\xfe{", "not UTF-8"),
        (b"[" * 100_000, "JSON"),
    ],
)
def test_refuses_what_maps_no_name_to_a_name(tmp_path, content, message):
    path = tmp_path / "mapping.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_class_mapping(path)
    assert str(path) in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="mapping_path"):
        load_class_mapping(tmp_path / "nowhere.json")


def test_all_bad_entries_are_shown_at_once():
    with pytest.raises(DataError) as caught:
        check_class_mapping({"a": 1, "b": "fine", "c": []})
    assert [problem.where for problem in caught.value.problems] == ["a", "c"]
