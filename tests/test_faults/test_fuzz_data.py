"""Any annotations and any image bytes: a message with the place or a sound result, in bounded memory."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from fuzzing import damaged, few, memory_grows_less_than
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddetr_mm.datasets.image_size import UnreadableImage, read_image_size
from ddetr_mm.datasets.images import image_errors_named, read_image
from ddetr_mm.datasets.sources import read_coco_sources
from ddetr_mm.datasets.transforms import TAOLoadImageFromFile
from ddetr_mm.errors import DataError

# --- annotations ---

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([10**12, 2**63, -(2**63), 10**30, 1e308, 0.5, "", "1", "../x.png", "/x.png", "a\0b", {}]),
    st.text(max_size=4),
    st.lists(st.integers(-2, 200) | st.floats(allow_nan=False) | st.text(max_size=2), max_size=5),
)


def entry(usual: dict[str, st.SearchStrategy]) -> st.SearchStrategy[dict]:
    """A COCO object most of whose values are usual and some odd or missing."""
    fields = {key: st.one_of(value, value, value, odd) for key, value in usual.items()}
    whole = st.fixed_dictionaries({}, optional=fields)
    return st.one_of(st.fixed_dictionaries(usual), whole)


sides = st.integers(1, 200)
images = entry(
    {
        "id": st.integers(0, 3),
        "file_name": st.sampled_from(["a.png", "b/c.png"]),
        "width": sides,
        "height": sides,
    }
)
annotations = entry(
    {
        "id": st.integers(0, 9),
        "image_id": st.integers(0, 3),
        "category_id": st.integers(1, 3),
        "bbox": st.lists(st.floats(-5, 100, width=32), min_size=4, max_size=4),
        "area": st.floats(0, 1e4),
        "iscrowd": st.integers(0, 1),
    }
)
categories = entry({"id": st.integers(1, 3), "name": st.sampled_from(["car", "person", "car"])})


def part(items: st.SearchStrategy) -> st.SearchStrategy:
    """A list of a COCO file, or something odd in its place."""
    return st.one_of(st.lists(items, max_size=4), st.lists(items, max_size=4), odd)


documents = st.fixed_dictionaries(
    {}, optional={"images": part(images), "annotations": part(annotations), "categories": part(categories)}
)


@given(st.one_of(documents, documents, odd))
def test_coco_json(tmp_path_factory: pytest.TempPathFactory, document: object):
    folder = tmp_path_factory.getbasetemp() / "coco_json"
    folder.mkdir(exist_ok=True)
    path = folder / "fuzz.json"
    path.write_text(json.dumps(document))
    try:
        table = read_coco_sources([{"image_dir": "images", "json_file": str(path)}])
    except DataError as error:
        assert all(problem.file is not None for problem in error.problems)
    else:
        assert np.isfinite(table.boxes_xywh).all()
        names = [table.file_name(row) for row in range(table.num_images)]
        assert not [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    assert sorted(item.name for item in folder.iterdir()) == ["fuzz.json"]


# --- images ---


def encoded(kind: str, **options: object) -> bytes:
    """A small image of some kind."""
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


SAMPLES = {
    "png": encoded("PNG"),
    "jpeg": encoded("JPEG", quality=80),
    "progressive": encoded("JPEG", progressive=True),
    "bmp": encoded("BMP"),
    "webp": encoded("WEBP"),
    "tiff": encoded("TIFF", compression="tiff_deflate"),
}


@pytest.mark.parametrize("kind", SAMPLES)
@settings(max_examples=few(40))
@given(data=st.data())
def test_damaged_image(tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject):
    content = data.draw(damaged(SAMPLES[kind][:400]).map(lambda start: start + SAMPLES[kind][400:]))
    path = tmp_path_factory.getbasetemp() / f"fuzz.{kind}"
    path.write_bytes(content)
    # An image of as many pixels as are let through takes 0.5 GiB; where both decoders try it and turn it,
    # there are six copies.
    with memory_grows_less_than(2**32):
        for decode in (False, True):
            try:
                size = read_image_size(str(path), decode=decode)
                assert size.width > 0 and size.height > 0
            except UnreadableImage:
                pass
        try:
            with image_errors_named(str(path)):
                loaded = TAOLoadImageFromFile().transform({"img_path": str(path)})
            assert loaded["img"].ndim == 3
        except DataError as error:
            assert str(path) in str(error)
        try:
            read_image(path)
        except DataError as error:
            assert str(path) in str(error)
