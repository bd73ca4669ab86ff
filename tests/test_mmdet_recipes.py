"""Every recipe of the installed mmdet with our dataset for ``CocoDataset`` and our metric for ``CocoMetric``.

Recipes share most of their datasets and metrics, so equal ones are built once.
"""

from __future__ import annotations

import copy
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmdet
import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS, METRICS
from mmengine.config import Config
from mmengine.registry import init_default_scope

import ddetr_mm.register  # noqa: F401

RECIPES = Path(mmdet.__file__).parent / ".mim" / "configs"
OURS = {"CocoDataset": "SerializedCocoDataset", "CocoMetric": "FastCocoMetric"}
PARTS = ("train_dataloader", "val_dataloader", "test_dataloader", "val_evaluator", "test_evaluator")
POLYGON = [[40.0, 30, 240, 30, 240, 180, 40, 180]]


def found_in(value: Any) -> Iterator[dict[str, Any]]:
    """Every config dict with a type, at any depth."""
    if isinstance(value, dict):
        if "type" in value:
            yield value
        for part in value.values():
            yield from found_in(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from found_in(part)


def type_name(config: dict[str, Any]) -> str:
    kind = config["type"]
    return (kind if isinstance(kind, str) else kind.__name__).removeprefix("mmdet.")


QUICK = {
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py",
    "yolox/yolox_s_8xb8-300e_coco.py",
    "htc/htc_r50_fpn_1x_coco.py",
    "rpn/rpn_r50_fpn_1x_coco.py",
    "v3det/faster_rcnn_r50_fpn_8x4_sample1e-3_mstrain_v3det_2x.py",
}


class Walk:
    """The datasets and metrics of all recipes, or of some.

    Attributes:
        datasets, metrics: one config of each kind, by its text, with the recipes that have it.
        unreadable: recipes that mmdet cannot read here.
    """

    def __init__(self, wanted: set[str] | None = None) -> None:
        self.datasets: dict[str, tuple[dict[str, Any], set[str]]] = {}
        self.metrics: dict[str, tuple[dict[str, Any], set[str]]] = {}
        self.unreadable: set[str] = set()
        self.recipes: set[str] = set()
        for path in sorted(RECIPES.rglob("*.py")):
            name = str(path.relative_to(RECIPES))
            if "_base_" not in name and (wanted is None or name in wanted):
                self.recipes.add(name)
                self._read(path, name)

    def _read(self, path: Path, name: str) -> None:
        try:
            config = Config.fromfile(path)
        except (ImportError, FileNotFoundError):  # mmpretrain, and files that the wheel lacks
            self.unreadable.add(name)
            return
        for part in PARTS:
            for item in found_in(config.get(part)):
                kept = self.metrics if "evaluator" in part else self.datasets
                if type_name(item) in OURS:
                    plain = copy.deepcopy(item)
                    plain = plain.to_dict() if hasattr(plain, "to_dict") else dict(plain)
                    kept.setdefault(repr(plain), (plain, set()))[1].add(name)


@pytest.fixture(scope="module")
def walk() -> Walk:
    init_default_scope("mmdet")
    return Walk()


@pytest.fixture(scope="module")
def short_walk() -> Walk:
    init_default_scope("mmdet")
    return Walk(QUICK)


@pytest.fixture
def scene(tmp_path):
    """``scene(classes)``: a small COCO file with these classes, two images and a box of each class."""

    def make(classes: tuple[str, ...]) -> Path:
        path = tmp_path / "tiny.json"
        images = [{"id": n, "file_name": f"{n}.jpg", "width": 640, "height": 480} for n in (1, 2)]
        boxes = [
            {
                "id": number,
                "image_id": 1 + number % 2,
                "category_id": number,
                "bbox": [40 + number % 50, 30, 200, 150],
                "area": 30000,
                "iscrowd": 0,
                "segmentation": POLYGON,
            }
            for number in range(1, len(classes) + 1)
        ]
        names = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
        path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": names}))
        return path

    return make


def built(registry: Any, config: dict[str, Any]) -> tuple[Any, str]:
    """What a config builds, or None; and ``built``, or the error in a line."""
    try:
        return registry.build(copy.deepcopy(config)), "built"
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


NEITHER = "mmdet's own class fails, too"
NO_PROPOSALS = "reads no proposals (proposal_file)"
NO_MASKS = "masks ('segm') are scored by CocoMetric"


def outcome_of(ours: Any, theirs: Any, error: str, *refusals: str) -> str:
    """``built``, the refusal that an error is, or that mmdet fails, too; else the error itself."""
    for refusal in refusals:
        if refusal in error and error.startswith("ValueError"):
            return refusal
    return NEITHER if ours is None and theirs is None else error


def counts(outcomes: dict[str, set[str]]) -> dict[str, int]:
    return {outcome: len(recipes) for outcome, recipes in sorted(outcomes.items())}


def check_datasets(walk: Walk, scene: Any) -> dict[str, set[str]]:
    """Build the datasets; where mmdet's own builds, too, the samples are equal."""
    outcomes: dict[str, set[str]] = defaultdict(set)
    for config, recipes in walk.datasets.values():
        classes = tuple((config.get("metainfo") or {}).get("classes") or CocoDataset.METAINFO["classes"])
        path = scene(classes)
        local = {**config, "ann_file": str(path), "data_root": "", "data_prefix": {"img": str(path.parent)}}
        theirs, _ = built(DATASETS, local)
        ours, error = built(DATASETS, {**local, "type": "SerializedCocoDataset"})
        outcomes[outcome_of(ours, theirs, error, NO_PROPOSALS)] |= recipes
        if ours is not None and theirs is not None:
            check_same_samples(ours, theirs)
    return outcomes


def check_same_samples(ours: Any, theirs: Any) -> None:
    assert len(ours) == len(theirs)
    assert ours.metainfo["classes"] == theirs.metainfo["classes"]
    expected, found = theirs.get_data_info(0), ours.get_data_info(0)
    assert found["img_path"] == expected["img_path"]
    keys = ("bbox", "bbox_label", "ignore_flag", *(["mask"] if ours.with_masks else []))
    instances = [{key: one[key] for key in keys} for one in expected["instances"]]
    assert found["instances"] == instances


def test_datasets_of_some_recipes(short_walk, scene):
    outcomes = check_datasets(short_walk, scene)
    assert set(outcomes) == {"built", NO_PROPOSALS}
    with_coco_dataset = {name for name in QUICK if not name.startswith(("fast_rcnn", "v3det"))}
    assert outcomes["built"] == with_coco_dataset
    assert outcomes[NO_PROPOSALS] == {"fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py"}


def test_metrics_of_some_recipes(short_walk, scene, capsys):
    outcomes, compared = check_metrics(short_walk, scene)
    assert outcomes[NO_MASKS] == {name for name in QUICK if name.startswith(("mask_rcnn", "htc"))}
    assert outcomes["built"] == QUICK - outcomes[NO_MASKS]
    assert compared == {"equal": 4}
    capsys.readouterr()  # pycocotools prints


@pytest.mark.slow
def test_datasets_of_every_recipe(walk, scene):
    outcomes = check_datasets(walk, scene)
    assert set(outcomes) <= {"built", NO_PROPOSALS, NEITHER}, set(outcomes)
    if mmdet.__version__ == "3.3.0":
        # What fails in mmdet, too, needs packages that may or may not be installed.
        assert len(outcomes["built"] | outcomes[NEITHER]) == EXPECTED_DATASETS["built"]
        assert len(outcomes[NO_PROPOSALS]) == EXPECTED_DATASETS[NO_PROPOSALS]
        assert len(outcomes[NEITHER]) <= EXPECTED_DATASETS[NEITHER]


EXPECTED_DATASETS = {"built": 682, NO_PROPOSALS: 9, NEITHER: 7}
EXPECTED_METRICS = {"built": 463, NO_MASKS: 232, NEITHER: 1}


def check_metrics(walk: Walk, scene: Any) -> tuple[dict[str, set[str]], Counter[str]]:
    """Build the metrics; where mmdet's own runs, results are equal. Outcomes, and how many were compared."""
    outcomes: dict[str, set[str]] = defaultdict(set)
    classes = CocoDataset.METAINFO["classes"]
    path = scene(classes)
    compared: Counter[str] = Counter()
    for config, recipes in walk.metrics.values():
        local = {**config, **({"ann_file": str(path)} if "ann_file" in config else {})}
        if local.get("format_only"):
            local["outfile_prefix"] = str(path.parent / "out")
        theirs, _ = built(METRICS, local)
        ours, error = built(METRICS, {**local, "type": "FastCocoMetric"})
        outcomes[outcome_of(ours, theirs, error, NO_MASKS)] |= recipes
        if ours is not None and not local.get("format_only"):
            expected, found = (scored(metric, path, classes) for metric in (theirs, ours))
            assert found, config
            compared["equal" if expected else "mmdet fails"] += 1
            for key in set(expected) & set(found):
                assert found[key] == pytest.approx(expected[key], abs=0.00051), (config, key)
            assert not expected or "proposal" in str(config["metric"]) or "coco/bbox_mAP" in expected
    return outcomes, compared


@pytest.mark.slow
def test_metrics_of_every_recipe(walk, scene, capsys):
    outcomes, compared = check_metrics(walk, scene)
    capsys.readouterr()  # pycocotools prints
    assert set(outcomes) <= set(EXPECTED_METRICS), set(outcomes)
    assert compared["equal"] >= 40
    if mmdet.__version__ == "3.3.0":
        assert counts(outcomes) == dict(sorted(EXPECTED_METRICS.items()))
        assert len(walk.recipes) == 823


def scored(metric: Any, path: Path, classes: tuple[str, ...]) -> dict[str, float]:
    """A metric's figures for detections near the boxes of a file; empty where it fails."""
    metric.dataset_meta = {"classes": classes}
    random = np.random.default_rng(0)
    for image in (1, 2):
        mine = [one for one in json.loads(path.read_text())["annotations"] if one["image_id"] == image]
        boxes = np.array([one["bbox"] for one in mine], dtype=np.float32)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([one["category_id"] - 1 for one in mine])
        predicted = {
            "bboxes": torch.from_numpy(boxes + random.normal(0, 12, boxes.shape)).float(),
            "scores": torch.from_numpy(random.random(len(mine))).float(),
            "labels": torch.from_numpy(labels),
        }
        instances = [
            {"bbox": box, "bbox_label": int(label), "ignore_flag": 0}
            for box, label in zip(boxes.tolist(), labels, strict=True)
        ]
        sample = {
            "img_id": image,
            "ori_shape": (480, 640),
            "pred_instances": predicted,
            "instances": instances,
        }
        metric.process({}, [sample])
    try:
        return metric.evaluate(2)
    except (IndexError, ValueError):  # mmdet's: other than three limits, recall of proposals with numpy 2
        return {}
