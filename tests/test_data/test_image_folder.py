"""Folders of images as a dataset."""

import pytest
from dataset_builders import PIPELINE, make_root
from mmdet.registry import DATASETS
from mmengine.registry import init_default_scope


@pytest.fixture
def root(tmp_path):
    init_default_scope("mmdet")
    return make_root(tmp_path)


def build(**options):
    return DATASETS.build({"type": "ImageFolderDataset", **options})


def test_several_folders(root):
    pipeline = [PIPELINE[0], *PIPELINE[2:]]
    dataset = build(data_root=str(root), folders=["b", "a"], recursive=True, pipeline=pipeline)
    infos = [dataset.get_data_info(index) for index in range(5)]
    assert [info["img_id"] for info in infos] == [0, 1, 2, 3, 4]
    assert [info["source_id"] for info in infos] == [0, 0, 1, 1, 1]
    sample = dataset[4]["data_samples"]
    assert sample.img_path == f"{root}/a/sub/3.jpg"
    assert sample.ori_shape == (60, 40)


def test_one_folder_and_annotations_in_the_pipeline(root):
    dataset = build(folders=str(root / "b"), pipeline=PIPELINE)
    assert len(dataset) == 2
    assert dataset[0]["data_samples"].gt_instances.bboxes.tensor.shape == (0, 4)
