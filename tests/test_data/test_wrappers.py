"""The dataset inside mmdet's wrappers and samplers, and under mmdet's COCO metric."""

import numpy as np
import pytest
import torch
from dataset_builders import NAMES, PIPELINE, build, config, make_root, two_sources
from mmdet.datasets.samplers import AspectRatioBatchSampler, ClassAwareSampler
from mmdet.registry import DATASETS, METRICS
from mmengine.dataset import DefaultSampler
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData


@pytest.fixture
def root(tmp_path):
    init_default_scope("mmdet")
    return make_root(tmp_path)


def test_concat(root):
    part = config(root, pipeline=PIPELINE)
    joined = DATASETS.build({"type": "ConcatDataset", "datasets": [part, part]})
    assert len(joined) == 6
    assert joined[4]["data_samples"].img_id == 3
    assert joined.metainfo["classes"] == NAMES


def test_repeat(root):
    repeated = DATASETS.build(
        {"type": "RepeatDataset", "times": 3, "dataset": config(root, pipeline=PIPELINE)}
    )
    assert len(repeated) == 9
    assert repeated[7]["data_samples"].img_id == 3


def test_class_balanced(root):
    part = config(root, pipeline=PIPELINE, filter_cfg={"filter_empty_gt": True})
    balanced = DATASETS.build({"type": "ClassBalancedDataset", "oversample_thr": 0.9, "dataset": part})
    assert len(balanced) >= 2
    assert balanced[0]["data_samples"].img_id == 7


def test_multi_image_mix(root):
    mosaic = [{"type": "Mosaic", "img_scale": (64, 48)}, PIPELINE[2], {"type": "PackDetInputs"}]
    part = config(root, pipeline=PIPELINE[:2])
    mixed = DATASETS.build({"type": "MultiImageMixDataset", "dataset": part, "pipeline": mosaic})
    np.random.seed(0)
    sample = mixed[0]
    assert sample["inputs"].shape == (3, 24, 32)
    assert len(sample["data_samples"].gt_instances) >= 2


def test_samplers(root):
    dataset = two_sources(root, pipeline=PIPELINE)
    assert sorted(DefaultSampler(dataset, shuffle=True, seed=0)) == [0, 1, 2, 3, 4]
    assert set(ClassAwareSampler(dataset, seed=0)) <= {0, 2, 4}
    batches = list(AspectRatioBatchSampler(DefaultSampler(dataset, shuffle=False), batch_size=2))
    assert sorted(index for batch in batches for index in batch) == [0, 1, 2, 3, 4]
    assert [1] in batches  # the only portrait image


@pytest.mark.parametrize("with_file", [True, False])
def test_coco_metric(root, with_file):
    """Perfect predictions score 1 by mmdet's own metric, with and without the annotation file."""
    dataset = build(root, pipeline=PIPELINE, test_mode=True)
    ann_file = str(root / "a.json") if with_file else None
    metric = METRICS.build({"type": "CocoMetric", "ann_file": ann_file, "metric": "bbox"})
    metric.dataset_meta = dataset.metainfo
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        boxes = [item for item in info["instances"] if not item["ignore_flag"]]
        predicted = InstanceData(
            bboxes=torch.tensor([item["bbox"] for item in boxes], dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor([item["bbox_label"] for item in boxes], dtype=torch.int64),
            scores=torch.ones(len(boxes)),
        )
        size_hw = (info["height"], info["width"])
        sample = {"img_id": info["img_id"], "ori_shape": size_hw, "instances": info["instances"]}
        metric.process({}, [{**sample, "pred_instances": predicted}])
    assert metric.evaluate(size=len(dataset))["coco/bbox_mAP"] == 1.0
