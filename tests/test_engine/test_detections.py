from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from PIL import Image

import ddetr_mm.register  # noqa: F401
from ddetr_mm.datasets.sources import SkippedFile
from ddetr_mm.engine import detections
from ddetr_mm.engine.detections import (
    DetectionWriter,
    ValidationPicturesHook,
    _fitting,
    draw_detections,
    letter_size_px,
    line_width_px,
    name_of,
    palette,
    parse_color_map,
    picture_backends,
    place_labels,
    result_names,
    save_image,
    validation_picture,
    write_kitti_labels,
)
from ddetr_mm.errors import DataError, SpecError
from ddetr_mm.fonts import label_font

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


# --- Sizes ---


@pytest.mark.parametrize(
    ("size_wh", "line", "letters"),
    [((200, 150), 1, 10), ((640, 480), 2, 12), ((1333, 800), 3, 20), ((3840, 2160), 9, 54)],
)
def test_lines_and_letters_grow_with_the_picture(size_wh, line, letters):
    assert (line_width_px(size_wh), letter_size_px(size_wh)) == (line, letters)
    blank = Image.new("RGB", size_wh, (128, 128, 128))
    box = np.array([[size_wh[0] * 0.3, size_wh[1] * 0.4, size_wh[0] * 0.8, size_wh[1] * 0.9]])
    drawn = draw_detections(blank, box, ["a"], np.array([0.9]), {"a": RED}, show_labels=False)
    row = np.asarray(drawn)[int(size_wh[1] * 0.6)]
    assert (row == RED).all(axis=1).sum() == 2 * line  # left and right side of the box
    labelled = np.asarray(draw_detections(blank, box, ["a"], np.array([0.9]), {"a": RED}))
    reds = np.flatnonzero((labelled[:, int(box[0, 0]) + line + 1] == RED).all(axis=1))
    assert letters * 0.6 < int(box[0, 1]) - reds[0] < letters * 1.6  # the label above it


def crowded(size_wh: tuple[int, int], count: int = 80, seed: int = 0):
    """Boxes over one another, with names of all lengths."""
    random = np.random.default_rng(seed)
    sides = random.uniform(0.05, 0.3, (count, 2)) * size_wh
    starts = random.uniform(-0.05, 0.95, (count, 2)) * size_wh
    names = [
        ("person", "traffic light", "a very long name of a class " * 8)[place % 3] for place in range(count)
    ]
    return np.concatenate([starts, starts + sides], axis=1), names, random.uniform(0.3, 1, count)


@pytest.mark.parametrize("size_wh", [(200, 150), (640, 480), (3840, 2160)])
def test_labels_of_a_crowd_lie_apart_and_inside(size_wh, monkeypatch):
    boxes, names, scores = crowded(size_wh)
    placed = []

    def record(canvas, label, extent, place):
        placed.append((label, place))
        draw_label(canvas, label, extent, place)

    draw_label = detections._draw_label
    monkeypatch.setattr(detections, "_draw_label", record)
    drawn = draw_detections(Image.new("RGB", size_wh), boxes, names, scores, palette(names))
    # The smallest has room for ten rows.
    assert drawn.size == size_wh and len(placed) > (10 if size_wh[0] == 200 else 20)
    for index, (label, (x1, y1, x2, y2)) in enumerate(placed):
        assert 0 <= x1 < x2 <= size_wh[0] - 1 and 0 <= y1 < y2 <= size_wh[1] - 1
        left, top, right, bottom = label.font.getbbox(label.text)
        assert right - left <= x2 - x1 and bottom - top <= y2 - y1  # the text is within its label
        for _, other in placed[:index]:
            assert x1 > other[2] or x2 < other[0] or y1 > other[3] or y2 < other[1]


def test_a_name_longer_than_the_picture_is_cut_and_keeps_its_score():
    font, _ = label_font("abc", 12)
    short = _fitting("n" * 200, " 0.50", font, 150)
    assert short.endswith("…") and 100 < font.getlength(f"{short} 0.50") <= 150
    assert _fitting("cat", " 0.50", font, 150) == "cat"
    assert _fitting("cat", " 0.50", font, 1) == "c…"


def test_ground_truth_has_no_number(monkeypatch):
    texts = []
    monkeypatch.setattr(detections, "_draw_label", lambda canvas, label, *_: texts.append(label.text))
    draw_detections(Image.new("RGB", (90, 60)), np.array([[9, 20, 40, 50]]), ["a"], None, {"a": RED})
    assert texts == ["a"]


# --- Pictures of validation ---


def validated(path, boxes=((10, 10, 60, 50),), scores=(0.9,), labels=(1,)):
    found = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor(scores),
        labels=torch.tensor(labels, dtype=torch.long),
    )
    truth = InstanceData(bboxes=torch.tensor([[100.0, 60.0, 180.0, 110.0]]), labels=torch.tensor([2]))
    sample = DetDataSample(metainfo={"img_path": str(path)})
    sample.pred_instances, sample.gt_instances = found, truth
    return sample


def changed_columns(shown: np.ndarray, color) -> set[int]:
    return set(np.flatnonzero((np.abs(shown.astype(int) - color).max(axis=2) < 3).any(axis=0)).tolist())


def test_a_validation_picture_has_truth_left_and_predictions_right(tmp_path):
    Image.new("RGB", (200, 120), (128, 128, 128)).save(tmp_path / "a.png")
    names = (None, "cat", "dog")
    colors = palette(["cat", "dog"])
    shown = validation_picture(validated(tmp_path / "a.png"), names, 0.3)
    assert shown.shape == (138, 406, 3) and shown.dtype == np.uint8
    assert changed_columns(shown, colors["dog"]) == set(range(100, 181))
    assert min(changed_columns(shown, colors["cat"])) == 206 + 10
    low = validation_picture(validated(tmp_path / "a.png", scores=(0.2,)), names, 0.3)
    assert changed_columns(low, colors["cat"]) == set()


def test_large_pictures_are_made_smaller_with_their_boxes(tmp_path):
    Image.new("RGB", (1280, 768), (128, 128, 128)).save(tmp_path / "a.png")
    shown = validation_picture(
        validated(tmp_path / "a.png", boxes=((400, 200, 800, 600),)), ("x", "cat"), 0.3
    )
    assert shown.shape == (384 + 18, 2 * 640 + 6, 3)
    assert min(changed_columns(shown, palette(["x", "cat"])["cat"])) == 646 + 200


def test_pictures_go_to_tensorboard_and_wandb_but_not_twice():
    class Backend:
        sync_tensorboard = False

    tensorboard, wandb = Backend(), Backend()
    found = {"TensorboardVisBackend": tensorboard, "WandbBackend": wandb, "LocalVisBackend": Backend()}
    visualizer = types.SimpleNamespace(get_backend=found.get)
    assert picture_backends(visualizer) == [tensorboard, wandb]
    wandb.sync_tensorboard = True  # it copies TensorBoard's
    assert picture_backends(visualizer) == [tensorboard]


def test_the_same_images_are_drawn_each_time_spread_over_the_data(tmp_path):
    Image.new("RGB", (200, 120)).save(tmp_path / "a.png")
    drawn = []
    backend = types.SimpleNamespace(add_image=lambda tag, picture, step: drawn.append((tag, step)))
    loader = types.SimpleNamespace(
        batch_size=4, sampler=range(10), dataset=types.SimpleNamespace(metainfo={"classes": ("a", "b", "c")})
    )
    visualizer = types.SimpleNamespace(get_backend={"TensorboardVisBackend": backend}.get)
    hook = ValidationPicturesHook(pictures=3)
    for epoch in (1, 2):
        runner = types.SimpleNamespace(val_dataloader=loader, visualizer=visualizer, epoch=epoch)
        hook.before_val_epoch(runner)
        for batch, size in enumerate((4, 4, 2)):
            names = [tmp_path / f"{4 * batch + row}.png" for row in range(size)]
            for name in names:
                Image.new("RGB", (200, 120)).save(name)
            hook.after_val_iter(runner, batch, None, [validated(name) for name in names])
    assert drawn == [
        (f"validation/{number} {place}.png", epoch)
        for epoch in (1, 2)
        for number, place in ((1, 0), (2, 3), (3, 6))
    ]


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
