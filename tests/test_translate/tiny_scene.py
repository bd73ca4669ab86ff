"""A few drawn pictures with annotations, and the spec of a tiny detector on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from ddetr_mm.spec import LoadedSpec, load_spec

TINY_DETECTOR = Path(__file__).resolve().parents[2] / "projects" / "shapes" / "tiny.txt"
SIZE_WH = (120, 80)
BOX_XYWH = (20, 10, 40, 30)
CLASSES = ("square", "bar", "dot", "line")

TINY_BACKBONE = dict(
    type="ResNet",
    depth=18,
    base_channels=8,
    out_indices=[2, 3],
    norm_cfg=dict(type="BN", requires_grad=True),
    norm_eval=False,
)
TINY = (
    *TINY_DETECTOR.read_text(encoding="utf-8").split(),
    "dataset.num_classes=5",
    "dataset.batch_size=2",
    "dataset.workers=0",
    "model.num_feature_levels=2",
    "model.return_interm_indices=[2,3]",
    "model.dropout_ratio=0.0",
    "train.activation_checkpoint=False",
    "train.num_epochs=1",
)
GIVEN = {
    "train": (),
    "evaluate": ("evaluate.checkpoint=x.pth",),
    "inference": ("inference.checkpoint=x.pth",),
    "export": ("export.checkpoint=x.pth", "export.onnx_file=x.onnx"),
}


@dataclass(frozen=True)
class Scene:
    """Pictures on disk: 4 for training, 2 for validation, each with one box of class 1 or 2."""

    folder: Path

    @property
    def spec_text(self) -> str:
        """A spec that names the pictures, the tiny backbone and this folder for results."""
        source = "{{image_dir: {0}/images, json_file: {0}/{1}.json}}"
        return (
            f"results_dir: {self.folder}/results\n"
            "dataset:\n"
            f"  train_data_sources: [{source.format(self.folder, 'train')}]\n"
            f"  val_data_sources: [{source.format(self.folder, 'val')}]\n"
            f"  test_data_sources: {source.format(self.folder, 'val')}\n"
            f"  infer_data_sources: {{image_dir: {self.folder}/images}}\n"
            f"ddetr_mm:\n  backbone: {json.dumps(TINY_BACKBONE)}\n"
        )

    def load(self, spec_path: Path, *overrides: str, subtask: str = "train") -> LoadedSpec:
        """Load the spec, written to ``spec_path``, with the tiny model's settings and further ones."""
        spec_path.write_text(self.spec_text)
        return load_spec(spec_path, [*GIVEN[subtask], *TINY, *overrides], subtask)


def draw_scene(folder: Path) -> Scene:
    """Draw the pictures and write their annotations."""
    (folder / "images").mkdir()
    for name, numbers in (("train", range(4)), ("val", range(4, 6))):
        images, boxes = [], []
        for number in numbers:
            picture = Image.new("RGB", SIZE_WH, (30 * number, 90, 160))
            x, y, width, height = BOX_XYWH
            ImageDraw.Draw(picture).rectangle((x, y, x + width, y + height), fill=(220, 40 * number, 10))
            picture.save(folder / "images" / f"{number}.png")
            images.append(dict(id=number, file_name=f"{number}.png", width=SIZE_WH[0], height=SIZE_WH[1]))
            boxes.append(
                dict(
                    id=number,
                    image_id=number,
                    category_id=1 + number % 2,
                    bbox=list(BOX_XYWH),
                    area=width * height,
                    iscrowd=0,
                )
            )
        categories = [dict(id=index, name=label) for index, label in enumerate(CLASSES, start=1)]
        (folder / f"{name}.json").write_text(
            json.dumps(dict(images=images, annotations=boxes, categories=categories))
        )
    return Scene(folder)
