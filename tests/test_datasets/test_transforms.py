"""TAO's transforms: alone, with mmdet's own, and as TAO's training policy."""

import cv2
import numpy as np
import pytest
import torch
from data_builders import random_image
from dataset_builders import config  # noqa: F401
from golden_files import GOLDEN
from mmcv.transforms import Compose
from mmcv.transforms import LoadImageFromFile as MmcvLoader
from mmdet.datasets.transforms import Resize as MmdetResize
from mmdet.registry import TRANSFORMS
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.registry import init_default_scope
from PIL import Image

import ddetr_mm
import ddetr_mm.datasets.transforms  # noqa: F401
from ddetr_mm.errors import DataError

# --- The registered transforms: alone, with mmdet's own, and as TAO's training policy ---

BOXES = [[4.0, 6, 30, 40], [20, 10, 64, 48], [0, 0, 3, 3]]


def build(name, **options):
    return TRANSFORMS.build({"type": name, **options})


def sample(boxes=BOXES, height=48, width=64, as_arrays=False):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return {
        "img": random_image(1, height, width),
        "img_shape": (height, width),
        "ori_shape": (height, width),
        "img_path": "x.jpg",
        "img_id": 1,
        "gt_bboxes": boxes if as_arrays else HorizontalBoxes(boxes),
        "gt_bboxes_labels": np.arange(len(boxes)),
        "gt_ignore_flags": np.arange(len(boxes)) % 2 == 1,
    }


def boxes_of(results):
    boxes = results["gt_bboxes"]
    return boxes.tensor.numpy() if isinstance(boxes, HorizontalBoxes) else boxes


@pytest.fixture(autouse=True)
def mmdet_scope():
    """The scope in which a run builds what is nested in mmcv's wrappers."""
    init_default_scope("mmdet")


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("TAORandomResize", dict(scales=[96], max_size=160)),
        ("Resize", dict(scale=(160, 96), keep_ratio=True, backend="pillow", size_rule="tao")),
    ],
)
def test_validation_transform_equals_tao(index, name, options):
    data = np.load(GOLDEN / "transforms.npz")
    image_bgr = data[f"{index}/image_rgb_u8"][:, :, ::-1]
    results = {
        "img": np.ascontiguousarray(image_bgr),
        "gt_bboxes": HorizontalBoxes(torch.tensor([[10.0, 20, 200, 220], [100.5, 50.25, 300, 333]])),
        "gt_bboxes_labels": np.arange(2),
    }
    results = build(name, **options)(results)
    assert results["img_shape"] == tuple(data[f"{index}/size_hw"])
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected_rgb = data[f"{index}/plain"].transpose(1, 2, 0) * std + mean
    assert np.abs(results["img"][:, :, ::-1] / 255 - expected_rgb).max() <= 1 / 255 + 1e-6
    height, width = results["img_shape"]
    boxes = results["gt_bboxes"].tensor / torch.tensor([width, height, width, height])
    cxcywh = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)
    np.testing.assert_allclose(cxcywh, data[f"{index}/boxes_cxcywh_plain"], atol=1e-6)


@pytest.mark.parametrize("backend", ["pillow", "fast"])
@pytest.mark.parametrize("as_arrays", [False, True])
def test_resize_keeps_the_books_as_mmdet_does(as_arrays, backend):
    ours = build("TAORandomResize", scales=96, max_size=200, backend=backend)(sample(as_arrays=as_arrays))
    theirs = build("Resize", scale=(128, 96), keep_ratio=True)(sample(as_arrays=as_arrays))
    assert ours["img"].shape == theirs["img"].shape == (96, 128, 3)
    for key in ("img_shape", "scale_factor", "keep_ratio", "scale"):
        assert ours[key] == theirs[key], key
    np.testing.assert_array_equal(ours["homography_matrix"], theirs["homography_matrix"])
    np.testing.assert_array_equal(boxes_of(ours), boxes_of(theirs))
    assert type(ours["gt_bboxes"]) is type(theirs["gt_bboxes"])


@pytest.mark.parametrize("options", [dict(scale=(90, 50), keep_ratio=True), dict(scale=(31, 47))])
def test_resize_without_a_size_rule_is_mmdets(options):
    ours, theirs = build("Resize", **options)(sample()), MmdetResize(**options)(sample())
    np.testing.assert_array_equal(ours["img"], theirs["img"])
    np.testing.assert_array_equal(boxes_of(ours), boxes_of(theirs))
    for key in ("img_shape", "scale", "scale_factor", "keep_ratio"):
        assert ours[key] == theirs[key], key


def test_tools_can_set_the_size_of_a_resize_with_taos_sizes():
    """SAHI sets one square, mmdeploy exactly the width and height of its graph."""
    step = build("Resize", scale=(160, 96), keep_ratio=True, backend="pillow", size_rule="tao")
    assert step(sample(height=90, width=200))["img_shape"] == (72, 160)
    step.scale = (50, 50)
    # As in TAO: the shorter side, 22.5, is cut to 22, and the longer one follows from it.
    assert step(sample(height=90, width=200))["img_shape"] == (22, 48)
    step.scale, step.keep_ratio = (64, 32), False
    results = step(sample(height=90, width=200))
    assert results["img_shape"] == (32, 64) and results["scale_factor"] == (64 / 200, 32 / 90)
    assert results["keep_ratio"] is False


def test_scale_factor_is_per_axis_and_undoes_the_resize():
    results = build("TAORandomResize", scales=31, max_size=None)(sample(boxes=[[10, 10, 40, 40]]))
    assert results["img_shape"] == (31, 41)
    scale_w, scale_h = results["scale_factor"]
    back = boxes_of(results)[0] / [scale_w, scale_h, scale_w, scale_h]
    np.testing.assert_allclose(back, [10, 10, 40, 40], rtol=1e-6)


def test_resize_clips_boxes_to_the_decoded_image():
    """Boxes reach the first transform unclipped; the decoded size decides, not the recorded one."""
    results = build("TAORandomResize", scales=48)(
        sample(boxes=[[-10, -10, 20, 20], [70, 0, 90, 20], [50, 40, 99, 99]])
    )
    assert boxes_of(results).tolist() == [[0, 0, 20, 20], [50, 40, 64, 48]]
    assert results["gt_bboxes_labels"].tolist() == [0, 2]
    assert results["gt_ignore_flags"].tolist() == [False, False]


def test_scales_are_drawn_uniformly_and_repeat_with_the_seed():
    transform = build("TAORandomResize", scales=[16, 24, 32], max_size=64)

    def draw():
        np.random.seed(3)
        return [transform(sample())["img_shape"][0] for _ in range(300)]

    first = draw()
    assert first == draw()
    assert {height: abs(first.count(height) - 100) < 40 for height in (16, 24, 32)} == dict.fromkeys(
        (16, 24, 32), True
    )


def test_one_scale_leaves_the_random_state_alone():
    before = np.random.get_state()[2]
    build("TAORandomResize", scales=[24], max_size=64)(sample())
    assert np.random.get_state()[2] == before


def test_crop_sizes_cover_the_range_and_stay_inside():
    transform = build("TAORandomSizeCrop", min_size=20, max_size=50)
    np.random.seed(0)
    windows = [transform.window(48, 64) for _ in range(3000)]
    tops, lefts, heights, widths = (np.array(column) for column in zip(*windows, strict=True))
    assert (heights.min(), heights.max()) == (20, 48)
    assert (widths.min(), widths.max()) == (20, 50)
    assert tops.min() == lefts.min() == 0
    assert (tops + heights).max() == 48
    assert (lefts + widths).max() == 64
    # independent and uniform: mean of U{20..48} and U{20..50}
    assert abs(heights.mean() - 34) < 1
    assert abs(widths.mean() - 35) < 1
    assert abs(np.corrcoef(heights, widths)[0, 1]) < 0.1


def test_crop_of_an_image_smaller_than_the_smallest_window():
    results = build("TAORandomSizeCrop", min_size=100, max_size=200)(sample())
    assert results["img_shape"] == (48, 64)
    np.testing.assert_array_equal(boxes_of(results), np.array(BOXES, np.float32))


def test_crop_takes_boxes_labels_flags_and_masks_along(monkeypatch):
    transform = build("TAORandomSizeCrop", min_size=20, max_size=20)
    monkeypatch.setattr(transform, "window", lambda height, width: (8, 10, 20, 30))
    results = sample()
    pixels = results["img"].copy()
    results["gt_masks"] = BitmapMasks(np.ones((3, 48, 64), np.uint8), 48, 64)
    results["gt_seg_map"] = np.arange(48 * 64).reshape(48, 64)
    results = transform(results)
    np.testing.assert_array_equal(results["img"], pixels[8:28, 10:40])
    assert boxes_of(results).tolist() == [[0, 0, 20, 20], [10, 2, 30, 20]]
    assert results["gt_bboxes_labels"].tolist() == [0, 1]
    assert results["gt_ignore_flags"].tolist() == [False, True]
    assert results["gt_masks"].masks.shape == (2, 20, 30)
    assert results["gt_seg_map"].shape == (20, 30)
    assert results["homography_matrix"].tolist() == [[1, 0, -10], [0, 1, -8], [0, 0, 1]]


def test_homography_follows_a_box_through_the_whole_chain(monkeypatch):
    np.random.seed(1)
    corners = np.array([[20.0, 15, 1], [40, 30, 1]])
    results = sample(boxes=[[20, 15, 40, 30]])
    crop = build("TAORandomSizeCrop", min_size=10, max_size=90)
    monkeypatch.setattr(crop, "window", lambda height, width: (5, 7, 60, 80))
    chain = [
        build("RandomFlip", prob=1.0),
        build("TAORandomResize", scales=[72]),
        crop,
        build("TAORandomResize", scales=[33]),
    ]
    for transform in chain:
        results = transform(results)
    moved = (results["homography_matrix"] @ corners.T).T[:, :2]
    expected = [moved[:, 0].min(), moved[:, 1].min(), moved[:, 0].max(), moved[:, 1].max()]
    np.testing.assert_allclose(boxes_of(results)[0], expected, rtol=1e-4)


def test_jitter_gives_squares_and_keeps_track_of_the_padding():
    np.random.seed(0)
    transform = build("LargeScaleJitter", size=40)
    shapes = []
    for _ in range(60):
        results = transform(sample())
        assert results["img"].shape == (40, 40, 3)
        assert results["pad_shape"] == (40, 40)
        height, width = results["img_shape"]
        shapes.append((height, width))
        padding = np.concatenate(
            [results["img"][height:].reshape(-1, 3), results["img"][:, width:].reshape(-1, 3)]
        )
        assert (padding == [104, 116, 124]).all()
        boxes = boxes_of(results)
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes[:, 2:] <= [width, height]).all()
    assert min(shapes)[0] < 10  # far smaller than the square
    assert max(shapes) == (40, 40)  # and larger, cut


def test_jitter_without_padding_and_with_fixed_ratio():
    results = build("LargeScaleJitter", size=32, ratio_range=(0.5, 0.5), pad=False)(sample())
    assert results["img"].shape == (12, 16, 3)
    assert "pad_shape" not in results


@pytest.mark.parametrize(
    ("options", "size_hw", "expected"),
    [
        ({"short_long": (60, 80)}, (48, 64), (60, 80)),
        ({"short_long": (60, 80)}, (64, 48), (80, 60)),
        ({"short_long": (40, 50)}, (48, 64), (48, 64)),
        ({"size_divisor": 32}, (48, 65), (64, 96)),
        ({"short_long": (60, 80), "size_divisor": 32}, (48, 64), (64, 96)),
    ],
)
def test_fixed_pad(options, size_hw, expected):
    results = sample(boxes=[[1, 2, 3, 4]], height=size_hw[0], width=size_hw[1])
    pixels = results["img"].copy()
    results = build("FixedPad", **options)(results)
    assert results["img"].shape[:2] == results["pad_shape"] == expected
    assert results["img_shape"] == size_hw
    np.testing.assert_array_equal(results["img"][: size_hw[0], : size_hw[1]], pixels)
    assert (results["img"][size_hw[0] :] == [104, 116, 124]).all()
    assert boxes_of(results).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("TAORandomResize", {"scales": []}),
        ("TAORandomResize", {"scales": [0]}),
        ("TAORandomResize", {"scales": [10], "max_size": 0}),
        ("TAORandomResize", {"scales": [10], "backend": "lanczos"}),
        ("Resize", {"scale": (10, 10), "size_rule": "round"}),
        ("Resize", {"scale": (10, 10), "size_rule": "tao", "backend": "cv2"}),
        ("Resize", {"scale_factor": 2.0, "size_rule": "tao", "backend": "pillow"}),
        ("TAORandomSizeCrop", {"min_size": 10, "max_size": 9}),
        ("TAORandomSizeCrop", {"min_size": 0, "max_size": 9}),
        ("LargeScaleJitter", {"size": 0}),
        ("LargeScaleJitter", {"size": 9, "ratio_range": (2.0, 0.1)}),
        ("FixedPad", {}),
    ],
)
def test_wrong_arguments_are_refused(name, options):
    with pytest.raises(ValueError, match=r"not|give"):
        build(name, **options)


def train_pipeline(scales=(24, 32), max_size=60):
    multi_scale = {"type": "TAORandomResize", "scales": list(scales), "max_size": max_size}
    crop = [
        {"type": "TAORandomResize", "scales": [40, 50]},
        {"type": "TAORandomSizeCrop", "min_size": 20, "max_size": 44},
        multi_scale,
    ]
    return [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "RandomChoice", "transforms": [[multi_scale], crop], "prob": [0.5, 0.5]},
        {"type": "PackDetInputs"},
    ]


def write_sample(tmp_path, boxes):
    cv2.imwrite(str(tmp_path / "x.png"), random_image(1))
    instances = [{"bbox": box, "bbox_label": i, "ignore_flag": i % 2} for i, box in enumerate(boxes)]
    return {
        "img_path": str(tmp_path / "x.png"),
        "img_id": 1,
        "height": 48,
        "width": 64,
        "instances": instances,
    }


def test_the_whole_train_policy(tmp_path):
    np.random.seed(0)
    info = write_sample(tmp_path, BOXES)
    pipeline = Compose([TRANSFORMS.build(step) for step in train_pipeline()])
    sizes, flips = set(), 0
    for _ in range(40):
        packed = pipeline(dict(info))
        sample = packed["data_samples"]
        height, width = sample.img_shape
        assert packed["inputs"].shape == (3, height, width)
        assert packed["inputs"].dtype == torch.uint8
        assert packed["inputs"].is_contiguous()
        boxes = sample.gt_instances.bboxes.tensor
        assert len(boxes) == len(sample.gt_instances.labels)
        assert set(sample.gt_instances.labels.tolist()) <= {0, 2}
        assert set(sample.ignored_instances.labels.tolist()) <= {1}
        assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
        sizes.add((height, width))
        flips += bool(sample.flip)
    assert len(sizes) > 5
    assert {24, 32} >= {min(size) for size in sizes if max(size) < 60}
    assert 8 < flips < 32


def test_an_image_without_boxes_goes_all_the_way(tmp_path):
    info = write_sample(tmp_path, [])
    pipeline = Compose([TRANSFORMS.build(step) for step in train_pipeline()])
    for seed in range(6):
        np.random.seed(seed)
        sample = pipeline(dict(info))["data_samples"]
        assert sample.gt_instances.bboxes.tensor.shape == (0, 4)
        assert sample.gt_instances.labels.shape == (0,)
        assert sample.ignored_instances.bboxes.tensor.shape == (0, 4)


@pytest.mark.parametrize(
    "step", [{"type": "LargeScaleJitter", "size": 40}, {"type": "FixedPad", "short_long": (64, 80)}]
)
def test_empty_images_through_jitter_and_padding(tmp_path, step):
    steps = [*train_pipeline()[:3], step, {"type": "PackDetInputs"}]
    packed = Compose([TRANSFORMS.build(item) for item in steps])(write_sample(tmp_path, []))
    assert packed["data_samples"].gt_instances.bboxes.tensor.shape == (0, 4)
    assert packed["inputs"].ndim == 3


def test_boxes_of_another_kind_are_refused():
    results = sample()
    results["gt_bboxes"] = [[1, 2, 3, 4]]
    with pytest.raises(TypeError, match="list"):
        build("TAORandomResize", scales=[24])(results)


@pytest.mark.parametrize("name", ["TAORandomResize", "TAORandomSizeCrop", "LargeScaleJitter", "FixedPad"])
def test_repr_reports_the_settings(name):
    options = {
        "TAORandomResize": {"scales": [24], "max_size": 60},
        "TAORandomSizeCrop": {"min_size": 3, "max_size": 9},
        "LargeScaleJitter": {"size": 40},
        "FixedPad": {"size_divisor": 32},
    }[name]
    text = repr(build(name, **options))
    assert text.startswith(name)
    assert all(str(value) in text for value in options.values())


# --- Packing equals mmdet's ---


def pack(name, image, **options):
    results = {
        "img": image,
        "img_path": "x.jpg",
        "img_id": 3,
        "ori_shape": (48, 64),
        "img_shape": image.shape[:2],
        "gt_bboxes": HorizontalBoxes([[1, 2, 3, 4], [5, 6, 7, 8]]),
        "gt_bboxes_labels": np.array([4, 5]),
        "gt_ignore_flags": np.array([False, True]),
    }
    return TRANSFORMS.build({"type": name, **options})(results)


IMAGES = {
    "plain": lambda: random_image(0),
    "flipped view": lambda: random_image(0)[:, ::-1],
    "upside down": lambda: random_image(0)[::-1],
    "window": lambda: random_image(0)[5:30, 7:50],
    "grey": lambda: random_image(0)[:, :, 0],
    "one channel": lambda: random_image(0)[:, :, :1],
    "floats": lambda: random_image(0).astype(np.float32),
    "four channels": lambda: np.concatenate([random_image(0), random_image(1)[:, :, :1]], axis=2),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_same_result_as_mmdet(kind):
    options = {"meta_keys": ("img_id", "ori_shape")}
    ours = pack("TAOPackDetInputs", IMAGES[kind](), **options)
    theirs = pack("PackDetInputs", np.ascontiguousarray(IMAGES[kind]()), **options)
    assert torch.equal(ours["inputs"], theirs["inputs"])
    assert ours["inputs"].dtype == theirs["inputs"].dtype
    assert ours["inputs"].is_contiguous()
    one, other = ours["data_samples"], theirs["data_samples"]
    assert one.metainfo == other.metainfo == {"img_id": 3, "ori_shape": (48, 64)}
    assert torch.equal(one.gt_instances.bboxes.tensor, other.gt_instances.bboxes.tensor)
    assert torch.equal(one.ignored_instances.labels, other.ignored_instances.labels)


def test_the_packed_pixels_are_a_copy():
    image = random_image(0)
    packed = pack("TAOPackDetInputs", image)["inputs"]
    before = packed.clone()
    image[:] = 0
    assert torch.equal(packed, before)


# --- loading, with and without reduced decoding ---

LOADED_BOX = [10.0, 20, 300, 200]


@pytest.fixture
def path(tmp_path):
    cv2.imwrite(str(tmp_path / "x.jpg"), random_image(0, 401, 603))
    return str(tmp_path / "x.jpg")


def load(path, name="TAOLoadImageFromFile", size_hw=(401, 603), **options):
    info = {"img_path": str(path), "height": size_hw[0], "width": size_hw[1]}
    info["instances"] = [{"bbox": list(LOADED_BOX), "bbox_label": 1, "ignore_flag": 0}]
    return TRANSFORMS.build({"type": name, **options})(info)


def test_decodes_in_full_by_default(path):
    ours, theirs = load(path), load(path, MmcvLoader)
    assert ours.keys() == theirs.keys()
    np.testing.assert_array_equal(ours["img"], theirs["img"])
    assert ours["img_shape"] == ours["ori_shape"] == (401, 603)


def test_pixels_are_those_that_pillow_decodes(path):
    np.testing.assert_array_equal(load(path)["img"][:, :, ::-1], np.asarray(Image.open(path)))


@pytest.mark.parametrize(
    ("short", "size_hw"),
    [(400, (401, 603)), (201, (401, 603)), (200, (201, 302)), (101, (201, 302)), (50, (51, 76))],
)
def test_the_shorter_side_stays_long_enough(path, short, size_hw):
    results = load(path, min_short_side=short)
    assert results["img"].shape[:2] == results["img_shape"] == size_hw
    assert results["ori_shape"] == (401, 603)
    assert min(size_hw) >= short


def test_boxes_follow_the_reduced_image(path):
    results = load(path, min_short_side=200)
    scale_w, scale_h = results["scale_factor"]
    assert (scale_w, scale_h) == (302 / 603, 201 / 401)
    expected = np.array(LOADED_BOX) * [scale_w, scale_h, scale_w, scale_h]
    np.testing.assert_allclose(results["instances"][0]["bbox"], expected)
    assert results["instances"][0]["bbox_label"] == 1
    np.testing.assert_allclose(np.diag(results["homography_matrix"]), [scale_w, scale_h, 1], rtol=1e-6)


def test_the_reduced_image_shows_the_same(path):
    reduced = load(path, min_short_side=200)["img"]
    averaged = cv2.resize(load(path)["img"], reduced.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(reduced.astype(int) - averaged.astype(int)).mean() < 2


def test_wrong_recorded_size_means_a_full_decode(path):
    results = load(path, size_hw=(1000, 603), min_short_side=100)
    assert results["img"].shape[:2] == results["ori_shape"] == (401, 603)
    assert results["instances"][0]["bbox"] == LOADED_BOX


def test_exif_rotation_is_applied_to_reduced_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(random_image(0, 400, 600)).save(tmp_path / "x.jpg", exif=exif)
    turned = load(tmp_path / "x.jpg", size_hw=(600, 400), min_short_side=200)
    assert turned["img"].shape[:2] == (300, 200)
    as_stored = load(tmp_path / "x.jpg", size_hw=(400, 600), min_short_side=200)
    assert as_stored["img"].shape[:2] == as_stored["ori_shape"] == (600, 400)


def test_other_formats_are_decoded_in_full(tmp_path):
    cv2.imwrite(str(tmp_path / "x.png"), random_image(0, 401, 603))
    assert load(tmp_path / "x.png", min_short_side=100)["img"].shape[:2] == (401, 603)


def test_missing_file_is_reported_as_by_mmcv(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "x.jpg", min_short_side=100)
    assert load(tmp_path / "x.jpg", min_short_side=100, ignore_empty=True) is None


def test_undecodable_files_are_named(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8 no image")
    for options in ({}, {"min_short_side": 100}):
        with pytest.raises(DataError, match="x.jpg: image file cannot be decoded"):
            load(tmp_path / "x.jpg", **options)
        assert load(tmp_path / "x.jpg", ignore_empty=True, **options) is None


def test_pipelines_with_mmcvs_name_read_the_same_pixels(tmp_path):
    """Twelve bits in a 16-bit file, in which mmcv's own class keeps 16 grey levels."""
    values = np.linspace(0, 4095, 48 * 64).astype(np.uint16).reshape(48, 64)
    cv2.imwrite(str(tmp_path / "x.png"), values)
    for name in ("LoadImageFromFile", "TAOLoadImageFromFile"):
        loaded = load(tmp_path / "x.png", name, size_hw=(48, 64))["img"]
        np.testing.assert_array_equal(loaded, np.repeat((values >> 4)[:, :, None], 3, axis=2))
    inferencer = TRANSFORMS.build({"type": "InferencerLoader"})(str(tmp_path / "x.png"))
    np.testing.assert_array_equal(inferencer["img"], loaded)


@pytest.mark.parametrize(
    "options",
    [
        {"min_short_side": 0},
        {"min_short_side": 9, "color_type": "grayscale"},
        {"min_short_side": 9, "imdecode_backend": "pillow"},
    ],
)
def test_wrong_arguments(options):
    with pytest.raises(ValueError, match="min_short_side"):
        TRANSFORMS.build({"type": "TAOLoadImageFromFile", **options})


def test_repr_of_the_loader():
    assert "min_short_side=9" in repr(TRANSFORMS.build({"type": "TAOLoadImageFromFile", "min_short_side": 9}))
