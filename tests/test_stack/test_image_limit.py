"""The limit on the pixels of an image."""

from __future__ import annotations

import os
import subprocess
import sys

from ddetr_mm.stack.image_limit import MAX_IMAGE_PIXELS, OPENCV_VARIABLE, size_refused


def test_sizes():
    assert size_refused(10_000, 10_000) is None
    assert size_refused(30_000, 30_000) == (
        "has 30000 x 30000 pixels, more than the 178,956,970 that are decoded"
    )


def test_it_is_where_pillow_suspects_an_attack():
    from PIL import Image

    assert MAX_IMAGE_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


def test_opencv_gets_it_from_the_import_and_a_users_own_stays():
    code = f"import ddetr_mm, os; print(os.environ[{OPENCV_VARIABLE!r}])"
    for given, expected in (({}, str(MAX_IMAGE_PIXELS)), ({OPENCV_VARIABLE: "5000"}, "5000")):
        environment = {name: value for name, value in os.environ.items() if name != OPENCV_VARIABLE}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, **given},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout.strip() == expected, done.stderr
