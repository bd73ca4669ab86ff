"""Images for INT8 calibration and the cache's rules."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from ddetr_mm.deploy.calibration import calibration_images, plan_calibration
from ddetr_mm.deploy.images import Normalisation, load_batch
from ddetr_mm.errors import DataError

HALF = Normalisation((0.0, 100.0, 0.0), (255.0, 50.0, 255.0))


def pictures(folder, count=5):
    """Pictures in two depths, some names the search must not find."""
    (folder / "deep" / "er").mkdir(parents=True)
    for number in range(count):
        place = folder if number % 2 else folder / "deep" / "er"
        bgr = np.full((8, 12, 3), (number, 100, 255), np.uint8)
        cv2.imwrite(str(place / f"{number}{'.JPG' if number == 0 else '.png'}"), bgr)
    (folder / "notes.txt").write_text("x")
    return folder


def plan(folder, **changes):
    values = dict(
        batch_size=2, batches=2, cache_file=None, fixed_batch=None, size_hw=(4, 6), normalisation=HALF
    )
    return plan_calibration([str(folder)], **(values | changes))


def test_images_are_found_at_any_depth_and_shuffled_alike(tmp_path):
    folder = pictures(tmp_path)
    paths = calibration_images([folder], at_least=5)
    assert sorted(path.name for path in paths) == ["0.JPG", "1.png", "2.png", "3.png", "4.png"]
    assert paths == calibration_images([folder, folder], at_least=5)
    assert paths != sorted(paths)


def test_batches_are_normalised_and_counted(tmp_path):
    batches = list(plan(pictures(tmp_path)).arrays())
    assert [batch.shape for batch in batches] == [(2, 3, 4, 6)] * 2 and batches[0].dtype == np.float32
    np.testing.assert_allclose(batches[0][:, 0], 1.0, atol=0.02)  # red 255 / 255
    np.testing.assert_allclose(batches[0][:, 1], 0.0, atol=0.1)  # (100 - 100) / 50
    assert len(next(plan(tmp_path, fixed_batch=4, batches=1).arrays())) == 4


def test_too_few_images_and_bad_folders(tmp_path):
    folder = pictures(tmp_path / "in")
    with pytest.raises(DataError, match=r"fewer images.*got 5.*6 or more"):
        plan(folder, batches=3)
    (tmp_path / "empty").mkdir()
    for wrong, words in ((tmp_path / "empty", "no images"), (tmp_path / "nowhere", "no folder")):
        with pytest.raises(DataError, match=words):
            plan(wrong)
    with pytest.raises(DataError, match="cal_batches"):
        plan(folder, batches=0)
    with pytest.raises(DataError, match="not given"):
        calibration_images([], at_least=1)


def test_a_cache_is_read_and_never_overwritten(tmp_path):
    folder, cache = pictures(tmp_path / "in"), tmp_path / "cal.bin"
    first = plan(folder, cache_file=str(cache))
    assert not first.uses_cache and first.read_cache() is None and len(list(first.arrays())) == 2
    first.write_cache(b"ranges")
    again = plan(folder, cache_file=str(cache))
    assert again.uses_cache and again.read_cache() == b"ranges" and list(again.arrays()) == []
    again.write_cache(b"other")
    assert cache.read_bytes() == b"ranges"
    with pytest.raises(DataError, match="fewer images"):  # the images are demanded with a cache too
        plan(folder, cache_file=str(cache), batches=9)


def test_a_broken_image_is_named(tmp_path):
    broken = tmp_path / "x.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"x\.png"):
        load_batch([broken], (4, 4), HALF)
