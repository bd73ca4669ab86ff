"""A training that goes on without the images it cannot read says how many those were."""

from __future__ import annotations

import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.logging import MMLogger

import ddetr_mm.register  # noqa: F401 - before mmdet
from ddetr_mm.errors import DataError
from ddetr_mm.runtime.replaced_images_hook import ReplacedImagesHook


def points(results: dict) -> dict:
    """What the tiny model eats, out of a picture."""
    x = results["img"].reshape(-1)[:4].astype(np.float32)
    return {"x": x, "y": x.sum()}


@pytest.fixture
def loader(tmp_path: Path) -> dict:
    """Four images, of which one is not there; two worker processes."""
    import json

    images = [dict(id=index, file_name=f"{index}.png", width=8, height=8) for index in range(4)]
    for index in range(3):
        assert cv2.imwrite(str(tmp_path / f"{index}.png"), np.full((8, 8, 3), index, np.uint8))
    document = dict(images=images, annotations=[], categories=[dict(id=1, name="a")])
    (tmp_path / "a.json").write_text(json.dumps(document))
    return dict(
        dataset=dict(
            type="SerializedCocoDataset",
            ann_file="a.json",
            data_root=str(tmp_path),
            pipeline=[dict(type="LoadImageFromFile"), points],
        ),
        sampler=dict(type="DefaultSampler", shuffle=False),
        batch_size=2,
        num_workers=2,
        collate_fn=dict(type="default_collate"),
    )


def test_the_number_is_told_after_every_epoch(make_runner, loader, caplog):
    loader["dataset"]["missing_images"] = "replace"
    runner = make_runner([ReplacedImagesHook()], epochs=2, train_dataloader=loader)
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING):
            runner.train()
    finally:
        logger.removeHandler(caplog.handler)
    told = [record.getMessage() for record in caplog.records if "took its place" in record.getMessage()]
    replaced = runner.train_dataloader.dataset.num_replaced
    assert replaced >= 2  # once an epoch at least
    assert len(told) == 2 and told[-1].startswith(f"{replaced} times so far")


def test_without_the_option_the_training_stops_and_names_the_file(make_runner, loader):
    loader["num_workers"] = 0
    with pytest.raises(DataError, match=r"3\.png: image file does not exist"):
        make_runner([], train_dataloader=loader).train()


def test_nothing_is_told_when_all_images_are_there(make_runner, loader, caplog):
    loader["dataset"].update(missing_images="replace", indices=[0, 1])
    loader["num_workers"] = 0
    runner = make_runner([ReplacedImagesHook()], epochs=1, train_dataloader=loader)
    runner.train()
    assert runner.train_dataloader.dataset.num_replaced == 0
    assert "took its place" not in caplog.text
