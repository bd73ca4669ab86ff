"""Damaged files of every kind that we read: the kept ones each time, new ones for as long as is asked.

``corpus/<kind>/`` holds small files: sound ones to start from, attacks of the past, and what the search of
:func:`test_new_damage` (``make test-slow``) found: it writes the smallest file that failed to ``found-*``
there, to be committed with the repair.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzzing import damaged, memory_grows_less_than
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddetr_mm.convert.kitti import ClassLookup, parse_labels
from ddetr_mm.datasets.image_size import UnreadableImage, read_image_size
from ddetr_mm.datasets.images import image_errors_named
from ddetr_mm.datasets.sources import read_coco_sources
from ddetr_mm.datasets.transforms import TAOLoadImageFromFile
from ddetr_mm.deploy.onnx_file import ort_session, read_signature
from ddetr_mm.errors import DataError, InputError, WeightsError
from ddetr_mm.spec import load_spec
from ddetr_mm.weights import inspect_checkpoint
from ddetr_mm.weights.read import read_checkpoint

CORPUS = Path(__file__).parent / "corpus"
MOST_SECONDS = 20.0
"""For a file of some kilobytes on a busy machine; what hung had no end."""


def read_spec(path: Path) -> None:
    load_spec(path, [], "train")


def read_kitti(path: Path) -> None:
    parse_labels([path.read_bytes()], ClassLookup({"car": 1, "person": 2}))


def read_weights(path: Path) -> None:
    read_checkpoint(path)
    inspect_checkpoint(path)


def read_graph(path: Path) -> None:
    read_signature(path)
    ort_session(path, ["CPUExecutionProvider"])


def read_picture(path: Path) -> None:
    size = read_image_size(str(path), decode=True)
    assert size.width > 0 and size.height > 0
    with image_errors_named(str(path)):
        TAOLoadImageFromFile().transform({"img_path": str(path)})


def read_coco(path: Path) -> None:
    read_coco_sources([{"image_dir": "images", "json_file": str(path)}])


READERS: dict[str, tuple[Callable[[Path], None], tuple[type[Exception], ...]]] = {
    "spec": (read_spec, (InputError,)),
    "coco": (read_coco, (DataError,)),
    "kitti": (read_kitti, ()),
    "checkpoint": (read_weights, (WeightsError,)),
    "safetensors": (read_weights, (WeightsError,)),
    "onnx": (read_graph, (WeightsError,)),
    "image": (read_picture, (UnreadableImage, DataError)),
}
"""Kind → how it is read, and the errors that a bad file may end in."""

FILES = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


def read_within_limits(kind: str, path: Path) -> None:
    """Read a file: soundly or with an error of ours that names it, in bounded time and memory."""
    read, allowed = READERS[kind]
    start = time.monotonic()
    with memory_grows_less_than(2**31):
        try:
            read(path)
        except allowed as error:
            assert path.name in str(error) or isinstance(error, UnreadableImage)  # its caller names it
    assert time.monotonic() - start < MOST_SECONDS


def test_every_kind_has_files():
    assert {path.parent.name for path in FILES} == set(READERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_kept_files(path: Path):
    read_within_limits(path.parent.name, path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", READERS)
def test_new_damage(kind: str, tmp_path: Path):
    seeds = [path for path in FILES if path.parent.name == kind]

    @settings(
        max_examples=1000,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(data=st.data())
    def search(data: st.DataObject) -> None:
        seed = data.draw(st.sampled_from(seeds))
        content = data.draw(damaged(seed.read_bytes()))
        path = tmp_path / f"damaged{seed.suffix}"
        path.unlink(missing_ok=True)  # the file before may still be mapped
        path.write_bytes(content)
        try:
            read_within_limits(kind, path)
        except BaseException:
            for earlier in (CORPUS / kind).glob("found-new*"):
                earlier.unlink()
            (CORPUS / kind / f"found-new{seed.suffix}").write_bytes(content)
            raise

    try:
        search()
    finally:
        for found in (CORPUS / kind).glob("found-new*"):
            digest = hashlib.sha256(found.read_bytes()).hexdigest()[:12]
            found.rename(found.with_name(f"found-{digest}{found.suffix}"))
