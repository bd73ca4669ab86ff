"""Loading, with and without scaled decoding."""

import cv2
import numpy as np
import pytest
from data_builders import random_image
from dataset_builders import config  # noqa: F401  (imports mmdet the right way round)
from mmdet.registry import TRANSFORMS
from PIL import Image, ImageOps

import ddetr_mm.data.load  # noqa: F401  (registers)

BOX = [10.0, 20, 300, 200]


@pytest.fixture
def path(tmp_path):
    cv2.imwrite(str(tmp_path / "x.jpg"), random_image(0, 401, 603))
    return str(tmp_path / "x.jpg")


def load(path, name="TAOLoadImageFromFile", size_hw=(401, 603), **options):
    info = {"img_path": str(path), "height": size_hw[0], "width": size_hw[1]}
    info["instances"] = [{"bbox": list(BOX), "bbox_label": 1, "ignore_flag": 0}]
    return TRANSFORMS.build({"type": name, **options})(info)


def test_decodes_in_full_by_default(path):
    ours, theirs = load(path), load(path, "LoadImageFromFile")
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
    expected = np.array(BOX) * [scale_w, scale_h, scale_w, scale_h]
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
    assert results["instances"][0]["bbox"] == BOX


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


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
def test_every_format_is_turned_as_its_tag_says(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(random_image(0, 48, 64)).save(path, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    results = load(path)
    assert results["img_shape"] == results["ori_shape"] == expected.shape[:2]
    np.testing.assert_array_equal(results["img"][:, :, ::-1], expected)


def test_undecodable_files_are_reported_as_by_mmcv(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8 no image")
    for options in ({}, {"min_short_side": 100}):
        with pytest.raises(AssertionError, match="failed to load image"):
            load(tmp_path / "x.jpg", **options)


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


def test_repr_tells_the_settings():
    assert "min_short_side=9" in repr(TRANSFORMS.build({"type": "TAOLoadImageFromFile", "min_short_side": 9}))
