"""Small KITTI datasets on disk."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from ddetr_mm.convert.convert import ConvertOptions

MAPPING = {"Car": "car", "Truck": "car", "person": "person"}
CATEGORY_IDS = {"person": 1, "car": 2}


def label_line(
    name: str = "Car", box_xyxy: tuple[Any, ...] = (1, 2, 11, 22), score: str | None = None
) -> str:
    """One line of 15 columns, or 16 with a score."""
    line = f"{name} 0.00 0 0.00 {' '.join(str(value) for value in box_xyxy)} 0 0 0 0 0 0 0"
    return line if score is None else f"{line} {score}"


def image_bytes(kind: str = "JPEG", size_wh: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    """An image file; ``options`` go to Pillow's ``save``."""
    buffer = io.BytesIO()
    Image.effect_noise(size_wh, 60).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


class KittiFolder:
    """A data root with sequences that have ``images`` and ``labels``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.sequences: list[str] = []

    def add(
        self,
        sequence: str,
        name: str,
        label: str | bytes | None = "",
        image: bytes | None = None,
        extension: str = ".jpg",
    ) -> None:
        """Add an image (a default one when None) with a label (none when None)."""
        for folder in ("images", "labels"):
            (self.root / sequence / folder).mkdir(parents=True, exist_ok=True)
        if sequence not in self.sequences:
            self.sequences.append(sequence)
        (self.root / sequence / "images" / f"{name}{extension}").write_bytes(
            _IMAGE if image is None else image
        )
        if label is not None:
            content = label.encode() if isinstance(label, str) else label
            (self.root / sequence / "labels" / f"{name}.txt").write_bytes(content)

    def options(self, **changes: Any) -> ConvertOptions:
        """Options that convert every sequence into ``<root>/../out``."""
        source = self.root / "sequences.txt"
        source.write_text("".join(f"{sequence}\n" for sequence in self.sequences))
        values: dict[str, Any] = {
            "input_source": source,
            "results_dir": self.root.parent / "out",
            "data_root": self.root,
            "image_dir_name": "images",
            "label_dir_name": "labels",
            "num_shards": 1,
            "mapping": MAPPING,
            "num_workers": 0,
        }
        return ConvertOptions(**{**values, **changes})


_IMAGE = image_bytes()


def read_shards(paths: list[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Images and annotations of shards, in their order."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for path in paths:
        content = json.loads(path.read_text())
        images += content["images"]
        annotations += content["annotations"]
    return images, annotations


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def warnings_of(report):
    """What a conversion's ``warnings.json`` holds."""
    return json.loads(report.warnings_path.read_text())
