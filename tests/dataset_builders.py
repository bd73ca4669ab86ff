"""Datasets on disk, and their configs, for the tests that need mmdet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_builders import box, coco, image, three_images, write_images, write_json
from mmdet.registry import DATASETS
from mmengine.registry import init_default_scope

import ddetr_mm
import ddetr_mm.datasets.coco
import ddetr_mm.datasets.transforms  # noqa: F401  (these three register)

NAMES = ("person", "face", "bag")
PIPELINE = [
    {"type": "LoadImageFromFile"},
    {"type": "LoadAnnotations", "with_bbox": True},
    {"type": "TAORandomResize", "scales": [24], "max_size": 64},
    {"type": "PackDetInputs"},
]


def make_root(folder: Path) -> Path:
    """A folder with ``a.json`` (three images), ``b.json`` (ids that collide with a's) and their images."""
    documents = {"a": three_images(), "b": coco([image(7), image(9)], [box(1, 9, [1, 1, 8, 8], 2)])}
    for name, document in documents.items():
        write_json(folder / f"{name}.json", document)
        write_images(folder / name, document)
    return folder


def config(root: Path, **options: Any) -> dict[str, Any]:
    defaults = {"type": "SerializedCocoDataset", "ann_file": "a.json", "data_prefix": {"img": "a/"}}
    return {"data_root": str(root), **defaults, **options}


def build(root: Path, **options: Any) -> Any:
    """A dataset of the first file, as a run builds it."""
    init_default_scope("mmdet")
    return DATASETS.build(config(root, **options))


def two_sources(root: Path, **options: Any) -> Any:
    """A dataset of both files."""
    sources = [{"image_dir": name, "json_file": f"{name}.json"} for name in ("a", "b")]
    return build(root, ann_file="", sources=sources, **options)
