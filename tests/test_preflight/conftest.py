"""A small data set with objects on its pictures, to plant faults into."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

WIDTH, HEIGHT = 120, 80
SPEC = """
results_dir: {folder}/results
dataset:
  train_data_sources: [{{image_dir: {folder}/train, json_file: {folder}/train.json}}]
  val_data_sources: [{{image_dir: {folder}/val, json_file: {folder}/val.json}}]
  num_classes: 3
  batch_size: 4
  workers: 0
  augmentation:
    scales: [64]
    random_resize_max_size: 96
    train_random_resize: [64]
    train_random_crop_min: 48
    train_random_crop_max: 64
    test_random_resize: 64
model:
  {{num_feature_levels: 2, return_interm_indices: [2, 3], hidden_dim: 32, nheads: 4, dim_feedforward: 32,
    enc_layers: 1, dec_layers: 2, num_queries: 12, num_select: 12}}
train: {{num_epochs: 2, activation_checkpoint: False}}
ddetr_mm:
  backbone:
    {{type: ResNet, depth: 18, base_channels: 8, num_stages: 4, out_indices: [2, 3], frozen_stages: 1,
      norm_cfg: {{type: BN, requires_grad: True}}, norm_eval: False, style: pytorch}}
"""


@dataclass
class DataSet:
    """Pictures and COCO files of two splits in a folder, and a spec for them."""

    folder: Path

    @property
    def spec(self) -> str:
        """The spec's path."""
        return str(self.folder / "spec.yaml")

    def read(self, split: str) -> dict[str, Any]:
        """A split's annotation file."""
        return json.loads((self.folder / f"{split}.json").read_text())

    def write(self, split: str, document: dict[str, Any]) -> None:
        """Replace a split's annotation file."""
        (self.folder / f"{split}.json").write_text(json.dumps(document))

    def change_boxes(self, split: str, change: Any) -> None:
        """Apply ``change(bbox) -> bbox`` to every box of a split."""
        document = self.read(split)
        for item in document["annotations"]:
            item["bbox"] = change(item["bbox"])
        self.write(split, document)

    def pictures(self, split: str) -> list[Path]:
        """A split's image files."""
        return sorted((self.folder / split).iterdir())


def draw_split(folder: Path, split: str, count: int, seed: int) -> None:
    """Reddish noise with bright boxes: class 1 lies, class 2 stands."""
    rng = np.random.default_rng(seed)
    (folder / split).mkdir()
    document: dict[str, Any] = dict(
        images=[], annotations=[], categories=[dict(id=1, name="car"), dict(id=2, name="person")]
    )
    for number in range(count):
        pixels = rng.normal([120, 90, 70], 8, (HEIGHT, WIDTH, 3))
        document["images"].append(dict(id=number, file_name=f"{number:03}.png", width=WIDTH, height=HEIGHT))
        for category in (1, 2, 1 + number % 2):
            width, height = rng.uniform(14, 40, 2)
            if (category == 1) != (width > height):
                width, height = height, width
            x, y = rng.uniform(0, WIDTH - width), rng.uniform(0, HEIGHT - height)
            pixels[int(y) : int(y + height), int(x) : int(x + width)] = rng.uniform(160, 240, 3)
            box = [round(float(value), 2) for value in (x, y, width, height)]
            document["annotations"].append(
                dict(
                    id=len(document["annotations"]) + 1,
                    image_id=number,
                    category_id=category,
                    bbox=box,
                    area=width * height,
                    iscrowd=0,
                )
            )
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / f"{number:03}.png")
    (folder / f"{split}.json").write_text(json.dumps(document))


@pytest.fixture(scope="session")
def drawn_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training and 30 validation pictures without a fault, drawn once."""
    folder = tmp_path_factory.mktemp("drawn_data")
    draw_split(folder, "train", 40, seed=0)
    draw_split(folder, "val", 30, seed=1)
    return folder


@pytest.fixture
def data_set(tmp_path: Path, drawn_data: Path) -> DataSet:
    """A copy of the drawn data, and a spec for it."""
    shutil.copytree(drawn_data, tmp_path, dirs_exist_ok=True)
    (tmp_path / "spec.yaml").write_text(SPEC.format(folder=tmp_path))
    return DataSet(tmp_path)
