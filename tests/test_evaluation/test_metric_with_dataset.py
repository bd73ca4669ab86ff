"""Dataset and metric read the same sources: ground truth, fed through both, must score perfectly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS
from mmengine.registry import init_default_scope
from PIL import Image

import ddetr_mm.data.dataset  # noqa: F401 - registers it
from ddetr_mm.evaluation.metric import FastCocoMetric


@pytest.fixture
def sources(tmp_path):
    """Two sources whose image ids collide and whose category ids have gaps; one image is empty."""
    rng = np.random.default_rng(0)
    found = []
    for name, category_ids in (("a", (2, 5)), ("b", (5, 9))):
        images, annotations = [], []
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (80, 60), (10, 20, 30)).save(tmp_path / name / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 80, "height": 60})
            for _ in range(0 if number == 2 else 3):
                box = [*rng.integers(0, 30, 2).tolist(), *rng.integers(5, 30, 2).tolist()]
                category = int(rng.choice(category_ids))
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": number,
                        "category_id": category,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": number, "name": f"class {number}"} for number in (2, 5, 9)]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        found.append({"image_dir": str(tmp_path / name), "json_file": str(path)})
    return found


@pytest.mark.parametrize("label_mode", ["category_id", "contiguous"])
def test_ground_truth_scores_one(sources, label_mode):
    init_default_scope("mmdet")
    dataset = DATASETS.build(
        {
            "type": "SerializedCocoDataset",
            "sources": sources,
            "label_mode": label_mode,
            "pipeline": [{"type": "LoadImageFromFile"}, {"type": "PackDetInputs", "meta_keys": ("img_id",)}],
            "test_mode": True,
            "storage": "process",
        }
    )
    metric = FastCocoMetric(sources=sources)
    metric.dataset_meta = dataset.metainfo
    for index in range(len(dataset)):
        sample = dataset[index]["data_samples"]
        instances = dataset.get_data_info(index)["instances"]
        found = {
            "bboxes": torch.tensor([item["bbox"] for item in instances]).float().reshape(-1, 4),
            "labels": torch.tensor([item["bbox_label"] for item in instances]).long(),
            "scores": torch.linspace(0.9, 0.5, len(instances)),
        }
        metric.process({}, [{"img_id": sample.img_id, "pred_instances": found}])
    metrics = metric.evaluate(len(dataset))
    assert metrics["coco/bbox_mAP"] == pytest.approx(1.0)
    assert metric.result.num_images == 8
    assert {entry.category_id for entry in metric.result.per_class} == {2, 5, 9}
    assert all(part["AP"] == pytest.approx(1.0) for part in metric.source_results.values())
