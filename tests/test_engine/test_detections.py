from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddetr_mm.register  # noqa: F401
from ddetr_mm.datasets.sources import SkippedFile
from ddetr_mm.engine.detections import (
    DetectionWriter,
    draw_detections,
    name_of,
    palette,
    parse_color_map,
    place_labels,
    result_names,
    save_image,
    write_kitti_labels,
)
from ddetr_mm.errors import DataError, SpecError

# --- Inference files: which detections are written, which are drawn, and where ---

NAMES = ("background", "cat", "guinea pig")


def sample(path: Path, boxes_xyxy, scores, labels) -> dict:
    found = dict(
        bboxes=torch.tensor(boxes_xyxy, dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor(scores, dtype=torch.float32),
        labels=torch.tensor(labels, dtype=torch.long),
    )
    return dict(img_path=str(path), pred_instances=found)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "seq" / "images" / "one.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (80, 60), "white").save(path)
    return path


def writer(folder: Path, **options) -> DetectionWriter:
    made = DetectionWriter(str(folder), **options)
    made.dataset_meta = dict(classes=NAMES)
    return made


def test_only_confident_detections_are_written(picture: Path, tmp_path: Path):
    out = tmp_path / "out"
    made = writer(out, conf_threshold=0.5)
    made.process(None, [sample(picture, [[5, 6, 40, 50], [1, 1, 9, 9]], [0.75, 0.25], [2, 1])])
    lines = (out / "labels" / "one.txt").read_text().splitlines()
    assert lines == [
        "guinea_pig 0.00 0 0.00 5.000 6.000 40.000 50.000 0.00 0.00 0.00 0.00 0.00 0.00 0.00 0.750"
    ]
    assert made.compute_metrics(made.results) == {"images": 1.0, "objects": 1.0, "skipped": 0.0}


def test_a_class_without_colour_is_written_and_not_drawn(picture: Path, tmp_path: Path):
    white = np.asarray(Image.open(picture))
    boxes, scores, labels = [[5, 6, 40, 50]], [0.9], [1]
    writer(tmp_path / "a", color_map={"guinea pig": "red"}).process(
        None, [sample(picture, boxes, scores, labels)]
    )
    assert (tmp_path / "a" / "labels" / "one.txt").read_text().startswith("cat ")
    assert (np.asarray(Image.open(tmp_path / "a" / "images_annotated" / "one.png")) == white).all()
    writer(tmp_path / "b", color_map={"cat": "red"}).process(None, [sample(picture, boxes, scores, labels)])
    drawn = np.asarray(Image.open(tmp_path / "b" / "images_annotated" / "one.png"))
    assert (drawn[30, 5] == (255, 0, 0)).all()


def test_results_of_images_of_more_than_eight_bits_are_visible(tmp_path: Path):
    values = np.linspace(0, 4095, 60 * 80).astype(np.uint16).reshape(60, 80)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(values).save(tmp_path / name)
        writer(tmp_path / "out").process(None, [sample(tmp_path / name, [], [], [])])
        shown = np.asarray(Image.open(tmp_path / "out" / "images_annotated" / name))
        assert np.array_equal(shown[:, :, 0], values >> 4)
        (tmp_path / "out" / "labels" / "deep.txt").unlink()


def test_no_detection_leaves_an_empty_label_file(picture: Path, tmp_path: Path):
    writer(tmp_path / "out").process(None, [sample(picture, [], [], [])])
    assert (tmp_path / "out" / "labels" / "one.txt").read_text() == ""
    assert (tmp_path / "out" / "images_annotated" / "one.png").is_file()


def test_per_sequence_uses_the_folder_two_levels_up(picture: Path, tmp_path: Path):
    writer(tmp_path / "out", per_sequence=True).process(None, [sample(picture, [], [], [])])
    assert (tmp_path / "out" / "seq" / "labels" / "one.txt").is_file()


def test_two_images_never_write_the_same_file(picture: Path, tmp_path: Path):
    other = tmp_path / "other" / "images" / "one.png"
    other.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(other)
    made = writer(tmp_path / "out")
    made.process(None, [sample(picture, [], [], [])])
    with pytest.raises(DataError, match="would both write"):
        made.process(None, [sample(other, [], [], [])])
    made = writer(tmp_path / "out", folders=[str(picture.parent), str(other.parent)])
    made.process(None, [sample(picture, [], [], []), sample(other, [], [], [])])
    assert {path.name for path in (tmp_path / "out" / "labels").iterdir()} >= {
        *("seq_images_one.txt", "other_images_one.txt")
    }


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (["x/a.png", "x/b.png"], {}),
        (
            ["x/a.png", "x/a.bmp"],
            {"x/a.png": ("a.png.txt", "a.png"), "x/a.bmp": ("a.bmp.txt", "a.bmp")},
        ),
        (["x/a.png", "y/a.png"], {"x/a.png": ("x_a.txt", "x_a.png"), "y/a.png": ("y_a.txt", "y_a.png")}),
        (
            ["x/images/a.png", "y/images/a.png", "y/images/b.png"],
            {
                "x/images/a.png": ("x_images_a.txt", "x_images_a.png"),
                "y/images/a.png": ("y_images_a.txt", "y_images_a.png"),
            },
        ),
        (
            ["x/a.png", "y/a.png", "y/x_a.png"],
            {
                "x/a.png": ("x_a.png.txt", "x_a.png"),
                "y/a.png": ("y_a.txt", "y_a.png"),
                "y/x_a.png": ("x_a.png_2.txt", "x_a_2.png"),
            },
        ),
    ],
)
def test_names_of_results_differ_and_change_only_where_they_must(images, expected):
    names = result_names([Path(image) for image in images])
    assert {str(image): (one.label, one.picture) for image, one in names.items()} == expected


def test_sequences_have_folders_of_their_own():
    images = [Path("/s1/images/a.png"), Path("/s2/images/a.png")]
    assert result_names(images, per_sequence=True) == {}


def test_an_unreadable_image_is_counted_and_not_written(picture: Path, tmp_path: Path):
    made = writer(tmp_path / "out")
    made.process(None, [dict(sample(picture, [[1, 1, 9, 9]], [0.9], [1]), unreadable="cannot be decoded")])
    assert made.evaluate(1) == {"inference/images": 0.0, "inference/objects": 0.0, "inference/skipped": 1.0}
    assert made.skipped == [SkippedFile(picture, "cannot be decoded")]
    assert not (tmp_path / "out").exists()


def test_names_come_from_the_file_if_there_is_one(picture: Path, tmp_path: Path):
    names = tmp_path / "names.txt"
    names.write_text("\ncat\n\nhorse\n")
    made = writer(tmp_path / "out", class_names_file=str(names))
    made.dataset_meta = {}
    boxes = [[1, 1, 9, 9]] * 5
    made.process(None, [sample(picture, boxes, [0.9] * 5, [1, 2, 3, 4, 5])])
    lines = (tmp_path / "out" / "labels" / "one.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["cat", "horse"]
    counts = made.evaluate(1)
    assert (counts["inference/objects"], counts["inference/unnamed"]) == (2, 3)
    assert name_of(NAMES, 7) == "class_7"


def test_a_file_that_contradicts_the_model_is_refused(picture: Path, tmp_path: Path):
    names = tmp_path / "names.txt"
    names.write_text("guinea pig\ncat\n")
    made = writer(tmp_path / "out", class_names_file=str(names))
    with pytest.raises(DataError, match="category 1 is 'guinea pig' here and 'cat' in the model"):
        made.process(None, [sample(picture, [[1, 1, 9, 9]], [0.9], [2])])
    assert not (tmp_path / "out").exists()


def test_wrong_input_is_reported(tmp_path: Path):
    with pytest.raises(DataError, match="classmap"):
        DetectionWriter(str(tmp_path), class_names_file=str(tmp_path / "nowhere.txt"))
    with pytest.raises(SpecError, match="no-such-colour"):
        DetectionWriter(str(tmp_path), color_map={"cat": "no-such-colour"})


RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_a_label_file_has_sixteen_columns_a_line(tmp_path):
    path = tmp_path / "labels" / "a.txt"
    boxes_xyxy = np.array([[10, 20, 110, 220], [2, 2, 7, 7]], dtype=np.float32)
    write_kitti_labels(path, ["person", "traffic light"], boxes_xyxy, np.array([0.9129, 0.5]))
    assert path.read_text() == (
        "person 0.00 0 0.00 10.000 20.000 110.000 220.000 0.00 0.00 0.00 0.00 0.00 0.00 0.00 0.913\n"
        "traffic_light 0.00 0 0.00 2.000 2.000 7.000 7.000 0.00 0.00 0.00 0.00 0.00 0.00 0.00 0.500\n"
    )
    write_kitti_labels(path, [], np.zeros((0, 4)), np.zeros(0))
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


def test_palette_is_stable_and_reports_classes_apart():
    names = [f"class {number}" for number in range(30)]
    colors = palette(names)
    assert colors == palette(names)
    assert len(set(colors.values())) == 30


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


@pytest.mark.parametrize("ending", [".jpg", ".png", ".bmp", ".JPEG"])
def test_saved_pictures_open_again(tmp_path, ending):
    path = save_image(tmp_path / "deep" / f"a{ending}", Image.new("RGB", (8, 9), RED))
    with Image.open(path) as image:
        assert image.size == (8, 9)
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_unknown_endings_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.xyz"):
        save_image(tmp_path / "a.xyz", Image.new("RGB", (8, 9)))


# --- Labels ---


@pytest.mark.parametrize("seed", range(5))
def test_labels_never_overlap_nor_leave_the_picture(seed):
    random = np.random.default_rng(seed)
    corners = random.uniform(-20, 220, (40, 2, 2))
    boxes = [(*map(float, pair.min(0)), *map(float, pair.max(0))) for pair in corners]
    sizes_wh = [(float(random.integers(10, 60)), 12.0) for _ in boxes]
    placed = [place for place in place_labels((200, 150), boxes, sizes_wh) if place is not None]
    assert len(placed) > 15
    for index, (x1, y1, x2, y2) in enumerate(placed):
        assert 0 <= x1 < x2 <= 199 and 0 <= y1 < y2 <= 149
        for other in placed[:index]:
            assert x1 > other[2] or x2 < other[0] or y1 > other[3] or y2 < other[1]


def test_a_label_is_above_its_box_where_there_is_room():
    box = (50.0, 60.0, 90.0, 100.0)
    assert place_labels((200, 150), [box], [(30.0, 12.0)]) == [(50.0, 48.0, 80.0, 60.0)]
    assert place_labels((200, 150), [(50.0, 3.0, 90.0, 100.0)], [(30.0, 12.0)])[0][1] == 0.0
    first, second = place_labels((200, 150), [box, box], [(30.0, 12.0)] * 2)
    assert first != second and second is not None
    assert place_labels((20, 10), [box], [(30.0, 12.0)]) == [None]  # no room in the whole picture
