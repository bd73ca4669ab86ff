"""The spec section ``dataset``: the effect of each field on samples and batches."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import GOLDEN
from mmcv.transforms import Compose
from mmdet.registry import DATASETS, METRICS, MODELS
from mmengine.runner import Runner
from PIL import Image
from tiny_scene import SIZE_WH, Scene

from ddetr_mm.engine.runner import QuietRunner
from ddetr_mm.errors import DataError

WHOLE_PICTURE = (
    "dataset.augmentation.train_random_crop_min=400",
    "dataset.augmentation.train_random_crop_max=400",
)


def dataset_of(config: Any, split: str = "train") -> Any:
    """The dataset of one of a config's dataloaders."""
    return DATASETS.build(config[f"{split}_dataloader"].dataset)


def image_sizes(config: Any, split: str = "train", draws: int = 30) -> set[tuple[int, int]]:
    """Heights and widths that come out of the pipeline over many draws."""
    dataset = dataset_of(config, split)
    np.random.seed(0)
    return {tuple(dataset[0]["inputs"].shape[-2:]) for _ in range(draws)}


def test_sources_decide_which_images_are_read(tiny_config, scene: Scene):
    for split, count in (("train", 4), ("val", 2)):
        dataset = dataset_of(tiny_config(), split)
        assert len(dataset) == count
        assert dataset.get_data_info(0)["img_path"].startswith(str(scene.folder / "images"))
    evaluated = dataset_of(tiny_config(subtask="evaluate"), "test")
    assert len(evaluated) == 2
    both = tiny_config(
        f"dataset.val_data_sources.1.image_dir={scene.folder}/images",
        f"dataset.val_data_sources.1.json_file={scene.folder}/train.json",
    )
    assert len(dataset_of(both, "val")) == 6


def test_strict_annotations_reach_dataset_and_metric(tiny_config, scene: Scene, tmp_path):
    document = json.loads((scene.folder / "train.json").read_text())
    document["annotations"][0]["image_id"] = 12345
    path = tmp_path / "dangling.json"
    path.write_text(json.dumps(document))
    fields = [f"dataset.{split}_data_sources.0.json_file={path}" for split in ("train", "val")]
    lenient, strict = (
        tiny_config(*fields, f"ddetr_mm.strict_annotations={value}") for value in ("false", "true")
    )
    for split in ("train", "val"):
        assert len(dataset_of(lenient, split)) == 4
        with pytest.raises(DataError, match=r"annotations\[0\].image_id.*12345"):
            dataset_of(strict, split)
    assert METRICS.build(lenient.val_evaluator).strict_annotations is False
    assert METRICS.build(strict.val_evaluator).strict_annotations is True


def renamed(scene: Scene, path, *names):
    """The training annotations with other names of the categories, in the order of their ids."""
    document = json.loads((scene.folder / "train.json").read_text())
    for entry, name in zip(document["categories"], names, strict=False):
        entry["name"] = name
    path.write_text(json.dumps(document))
    return document["categories"]


def test_classes_are_numbered_by_name_over_all_splits(tiny_config, scene: Scene, tmp_path):
    cats = renamed(scene, tmp_path / "train.json", *(name for name in "zyxwvu"))
    renamed(scene, tmp_path / "val.json", *(name for name in "abcdef"))
    names = [entry["name"] for entry in cats]
    number = len(names)
    fields = [
        f"dataset.{split}_data_sources.0.json_file={tmp_path}/{split}.json" for split in ("train", "val")
    ]
    fields.append(f"dataset.test_data_sources.json_file={tmp_path}/train.json")
    by_name = tiny_config(*fields, "ddetr_mm.category_ids=by_name", "dataset.num_classes=20")
    expected = sorted([*names, *"abcdef"[:number]])
    for split in ("train", "val"):
        found = dataset_of(by_name, split).metainfo
        assert list(found["classes"][1 : len(expected) + 1]) == expected
        assert found["category_ids"][1 : len(expected) + 1] == tuple(range(1, len(expected) + 1))
    assert METRICS.build(by_name.val_evaluator).numbered_names == expected
    assert by_name.default_hooks.checkpoint.extra_meta.numbered_by_name is True
    own = tiny_config(*fields)
    assert "numbered_names" not in own.train_dataloader.dataset
    assert "numbered_by_name" not in own.default_hooks.checkpoint.extra_meta


def test_categories_of_one_name_are_refused_or_merged(tiny_config, scene: Scene, tmp_path):
    cats = renamed(scene, tmp_path / "same.json", "same", "same")
    fields = [f"dataset.{split}_data_sources.0.json_file={tmp_path}/same.json" for split in ("train", "val")]
    with pytest.raises(DataError, match="have one name, 'same'.*merge_categories"):
        dataset_of(tiny_config(*fields), "train")
    merged = tiny_config(*fields, "ddetr_mm.merge_categories=true")
    names = dataset_of(merged, "val").table.category_names
    assert names[min(entry["id"] for entry in cats[:2])] == "same" and len(names) == len(cats) - 1
    assert METRICS.build(merged.val_evaluator).merge_categories is True


def test_another_image_folder_or_annotation_file_is_used(tiny_config, scene: Scene, tmp_path):
    for field in ("train_data_sources.0", "val_data_sources.0"):
        split = field.partition("_")[0]
        moved = dataset_of(tiny_config(f"dataset.{field}.image_dir={tmp_path}"), split)
        with pytest.raises(DataError, match=str(tmp_path)):
            moved[0]
        other = dataset_of(tiny_config(f"dataset.{field}.json_file={scene.folder}/train.json"), split)
        assert len(other) == 4
    config = tiny_config(
        f"dataset.test_data_sources.json_file={scene.folder}/train.json",
        f"dataset.test_data_sources.image_dir={tmp_path}",
        subtask="evaluate",
    )
    assert len(dataset_of(config, "test")) == 4
    with pytest.raises(DataError, match=str(tmp_path)):
        dataset_of(config, "test")[0]


def test_inference_reads_every_image_of_its_folders(tiny_config, scene: Scene, tmp_path):
    assert len(dataset_of(tiny_config(subtask="inference"), "test")) == 6
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "extra.png").write_bytes((scene.folder / "images" / "0.png").read_bytes())
    config = tiny_config(
        f"dataset.infer_data_sources.image_dir=[{scene.folder}/images, {tmp_path}/more]", subtask="inference"
    )
    assert len(dataset_of(config, "test")) == 7


def test_classmap_names_the_classes_of_label_files(tiny_config, tmp_path):
    (tmp_path / "names.txt").write_text("alpha\nbeta\n")
    config = tiny_config(
        f"dataset.infer_data_sources.classmap={tmp_path}/names.txt",
        f"inference.results_dir={tmp_path}/out",
        "inference.conf_threshold=0.5",
        subtask="inference",
    )
    detections = dict(
        bboxes=torch.tensor([[1.0, 2, 30, 40], [5, 5, 20, 20]]),
        scores=torch.tensor([0.9, 0.3]),
        labels=torch.tensor([2, 1]),
    )
    image = dataset_of(config, "test").get_data_info(0)["img_path"]
    writer = METRICS.build(config.test_evaluator)
    writer.process(None, [dict(img_path=image, pred_instances=detections)])
    (label_file,) = (tmp_path / "out" / "labels").glob("*.txt")
    lines = label_file.read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith("beta ")


def written(config: Any) -> Any:
    """Run the writer of a config on one picture; returns its annotated pixels."""
    image = dataset_of(config, "test").get_data_info(0)["img_path"]
    detections = dict(
        bboxes=torch.tensor([[10.0, 10, 60, 60]]), scores=torch.tensor([0.9]), labels=torch.tensor([1])
    )
    writer = METRICS.build(config.test_evaluator)
    writer.process(None, [dict(img_path=image, pred_instances=detections)])
    (picture,) = Path(config.work_dir).rglob("images_annotated/*.png")
    return np.asarray(Image.open(picture).convert("RGB")).astype(int)


def test_what_is_written_and_drawn(tiny_config, scene: Scene, tmp_path):
    (tmp_path / "names.txt").write_text("alpha\n")
    plain = np.asarray(Image.open(scene.folder / "images" / "0.png").convert("RGB")).astype(int)
    changed = {}
    for name, overrides in {
        "red": ("inference.color_map={alpha: red}",),
        "blue": ("inference.color_map={alpha: blue}",),
        "other": ("inference.color_map={beta: red}",),
        "by size": (),
        "thin": ("inference.outline_width=1",),
        "thick": ("inference.outline_width=6",),
        "internal": ("inference.is_internal=True",),
    }.items():
        config = tiny_config(
            f"inference.results_dir={tmp_path}/{name}",
            f"dataset.infer_data_sources.classmap={tmp_path}/names.txt",
            *overrides,
            subtask="inference",
        )
        changed[name] = written(config) - plain
    assert changed["red"][..., 0].max() > 100 and changed["blue"][..., 2].max() > 90
    assert not changed["other"].any()
    pixels = {name: int(one.any(axis=-1).sum()) for name, one in changed.items()}
    assert pixels["thick"] > 1.3 * pixels["thin"] > 0  # the name drawn above the box counts in both
    assert pixels["by size"] == pixels["thin"]  # a small picture has thin lines where the spec says nothing
    assert (tmp_path / "internal" / scene.folder.name / "labels" / "0.txt").is_file()
    assert (tmp_path / "thin" / "labels" / "0.txt").is_file()


@pytest.mark.parametrize(
    ("subtask", "overrides", "sizes"),
    [
        ("train", ("dataset.batch_size=3",), [3]),
        ("train", ("dataset.batch_size=3", "ddetr_mm.keep_last_batch=true"), [3, 1]),
        ("train", ("dataset.batch_size=5",), [4]),
        ("evaluate", ("dataset.batch_size=3",), [2]),
        ("evaluate", ("evaluate.batch_size=1",), [1, 1]),
        ("evaluate", ("evaluate.batch_size=-1", "dataset.batch_size=2"), [2]),
        ("inference", ("inference.batch_size=4",), [4, 2]),
        ("inference", ("inference.batch_size=-1", "dataset.batch_size=6"), [6]),
    ],
)
def test_images_in_a_batch(tiny_config, subtask: str, overrides: tuple[str, ...], sizes: list[int]):
    config = tiny_config(*overrides, subtask=subtask)
    name = "train_dataloader" if subtask == "train" else "test_dataloader"
    loader = Runner.build_dataloader(config[name], seed=1)
    assert [len(batch["inputs"]) for batch in loader] == sizes


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_are_processes(tiny_config, workers: int):
    config = tiny_config(f"dataset.workers={workers}", "dataset.batch_size=1")
    before = set(multiprocessing.active_children())
    batches = iter(Runner.build_dataloader(config.train_dataloader, seed=1))
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == workers
    del batches


def test_the_limit_of_a_batch(tiny_config):
    for text, workers, expected in (("300", 1, 300), ("7", 1, 7), ("0", 1, 0), ("7", 0, 0)):
        config = tiny_config(f"ddetr_mm.data_timeout_s={text}", f"dataset.workers={workers}")
        assert QuietRunner.build_dataloader(config.train_dataloader, seed=1).timeout == expected


def test_pin_memory_is_handed_to_the_loader(tiny_config):
    for flag in (True, False):
        loader = Runner.build_dataloader(tiny_config(f"dataset.pin_memory={flag}").train_dataloader, seed=1)
        assert loader.pin_memory is flag
        if torch.cuda.is_available():
            assert next(iter(loader))["inputs"][0].is_pinned() is flag


def test_dataset_type_decides_what_a_process_holds(tiny_config):
    sizes = {}
    for kind in ("serialized", "default"):
        dataset = dataset_of(tiny_config(f"dataset.dataset_type={kind}"))
        dataset.full_init()
        sizes[kind] = len(pickle.dumps(dataset.table))
    # The shared copy travels to another process as the name of a file, the other one with its columns.
    assert sizes["serialized"] < sizes["default"]


def test_category_ids_beyond_num_classes_are_refused(tiny_config):
    with pytest.raises(DataError, match="num_classes"):
        dataset_of(tiny_config("dataset.num_classes=2")).full_init()
    names = dataset_of(tiny_config("dataset.num_classes=7")).metainfo["classes"]
    assert len(names) == 7


def test_flip_probability(tiny_config):
    def first_box(probability: float) -> list[float]:
        config = tiny_config(f"dataset.augmentation.horizontal_flip_prob={probability}")
        config.train_pipeline = config.train_dataloader.dataset.pipeline
        steps = [step for step in config.train_pipeline if step.type != "RandomChoice"]
        config.train_dataloader.dataset.pipeline = steps
        return dataset_of(config)[0]["data_samples"].gt_instances.bboxes.tensor[0].tolist()

    x1, y1, x2, y2 = first_box(0.0)
    assert first_box(1.0) == pytest.approx([SIZE_WH[0] - x2, y1, SIZE_WH[0] - x1, y2])


def test_scales_and_longest_side(tiny_config):
    # The crop is larger than the picture: every branch ends in the resize to one of `scales`.
    for scales, longest, expected in (
        ("[64]", 96, {(64, 96)}),
        ("[48, 64]", 200, {(48, 72), (64, 96)}),
        ("[64]", 60, {(40, 60)}),
    ):
        config = tiny_config(
            *WHOLE_PICTURE,
            f"dataset.augmentation.scales={scales}",
            f"dataset.augmentation.random_resize_max_size={longest}",
        )
        assert image_sizes(config) == expected


def crop_sizes(config: Any) -> list[tuple[int, int]]:
    """Sizes of the windows that the second branch cuts, before the last resize."""
    choice = next(step for step in config.train_pipeline if step.type == "RandomChoice")
    resize, crop, _ = choice.transforms[1]
    head = [step for step in config.train_pipeline if "Load" in step.type]
    config.train_dataloader.dataset.pipeline = [*head, resize, crop, config.train_pipeline[-1]]
    dataset = dataset_of(config)
    np.random.seed(0)
    return [tuple(dataset[0]["inputs"].shape[-2:]) for _ in range(40)]


def test_size_before_the_crop(tiny_config):
    config = tiny_config(*WHOLE_PICTURE, "dataset.augmentation.train_random_resize=[40, 60]")
    assert set(crop_sizes(config)) == {(40, 60), (60, 90)}


def test_smallest_and_largest_crop(tiny_config):
    config = tiny_config(
        "dataset.augmentation.train_random_resize=[64]",
        "dataset.augmentation.train_random_crop_min=20",
        "dataset.augmentation.train_random_crop_max=40",
    )
    sides = [side for size in crop_sizes(config) for side in size]
    assert min(sides) >= 20 and max(sides) <= 40 and len(set(sides)) > 8
    config = tiny_config(
        "dataset.augmentation.train_random_crop_min=30", "dataset.augmentation.train_random_crop_max=30"
    )
    assert set(crop_sizes(config)) == {(30, 30)}


@pytest.mark.parametrize("fixed", [True, False])
def test_fixed_random_crop_gives_squares(tiny_config, fixed: bool):
    """The square and nothing else, whatever ``fixed_padding`` says; what is padded is 0."""
    config = tiny_config(
        "dataset.augmentation.fixed_random_crop=64", f"dataset.augmentation.fixed_padding={fixed}"
    )
    preprocessor = MODELS.build(config.model.data_preprocessor)
    dataset = dataset_of(config)
    np.random.seed(0)
    padded = 0
    for _ in range(30):
        drawn = dataset[0]
        height, width = drawn["data_samples"].img_shape
        assert tuple(drawn["inputs"].shape[-2:]) == (height, width) and max(height, width) <= 64
        batch = dict(inputs=[drawn["inputs"]], data_samples=[drawn["data_samples"]])
        inputs = preprocessor(batch, training=True)["inputs"][0]
        assert tuple(inputs.shape) == (3, 64, 64)
        assert not inputs[:, height:].any() and not inputs[:, :, width:].any()
        mean, std = preprocessor.mean, preprocessor.std
        pixels = (drawn["inputs"][[2, 1, 0]].float() - mean) / std
        torch.testing.assert_close(inputs[:, :height, :width], pixels)
        padded += (height, width) != (64, 64)
    assert padded


def test_size_of_validation_images(tiny_config):
    for short, expected in ((64, (64, 96)), (40, (40, 60))):
        config = tiny_config(f"dataset.augmentation.test_random_resize={short}")
        assert image_sizes(config, "val", draws=1) == {expected}
        evaluated = tiny_config(f"dataset.augmentation.test_random_resize={short}", subtask="evaluate")
        assert image_sizes(evaluated, "test", draws=1) == {expected}


@pytest.mark.parametrize("subtask", ["train", "evaluate", "inference"])
def test_pixels_outside_training_are_taos(tiny_config, tmp_path: Path, subtask: str):
    """Resized and padded as TAO validates, whatever the scales of training and its random crop are."""
    settings = (
        "test_random_resize=96",
        "random_resize_max_size=160",
        "scales=[64, 128]",
        "fixed_random_crop=64",
    )
    config = tiny_config(
        *(f"dataset.augmentation.{one}" for one in settings),
        "dataset.augmentation.fixed_padding=True",
        "dataset.augmentation.input_mean=[0.485, 0.456, 0.406]",
        "dataset.augmentation.input_std=[0.229, 0.224, 0.225]",
        subtask=subtask,
    )
    preprocessor = MODELS.build(config.model.data_preprocessor)
    pipeline = Compose([step for step in config.test_pipeline if step.type != "LoadAnnotations"])
    golden = np.load(GOLDEN / "transforms.npz")
    for index in range(2):
        path = tmp_path / f"{index}.png"
        Image.fromarray(golden[f"{index}/image_rgb_u8"]).save(path)
        drawn = pipeline(dict(img_path=str(path), img_id=index))
        batch = dict(inputs=[drawn["inputs"]], data_samples=[drawn["data_samples"]])
        inputs = preprocessor(batch)["inputs"][0]
        expected = golden[f"{index}/fixed_padding"]
        assert tuple(inputs.shape) == expected.shape
        # One grey level of Pillow's rounding.
        np.testing.assert_allclose(inputs, expected, atol=1.01 / 255 / 0.224)


@pytest.mark.parametrize("subtask", ["evaluate", "inference"])
@pytest.mark.parametrize("padding", ["fixed_padding=True", "pad_size_divisor=32"])
def test_a_size_of_evaluation_and_inference_is_kept_unpadded(tiny_config, subtask: str, padding: str):
    size = (f"{subtask}.input_width=150", f"{subtask}.input_height=44")
    config = tiny_config(*size, f"dataset.augmentation.{padding}", subtask=subtask)
    assert image_sizes(config, "test", draws=1) == {(44, 150)}
    drawn = dataset_of(config, "test")[0]
    batch = dict(inputs=[drawn["inputs"]], data_samples=[drawn["data_samples"]])
    preprocessor = MODELS.build(config.model.data_preprocessor)
    assert tuple(preprocessor(batch)["inputs"].shape) == (1, 3, 44, 150)
    # The pixels are Pillow's bilinear ones, as in training.
    with Image.open(drawn["data_samples"].img_path) as picture:
        expected = np.array(picture.convert("RGB").resize((150, 44), Image.Resampling.BILINEAR))
    difference = drawn["inputs"][[2, 1, 0]].permute(1, 2, 0).int() - torch.tensor(expected).int()
    assert difference.abs().max() <= 1
    # The sides of one subtask are not those of the other, nor of validation during training.
    for other in {"evaluate", "inference", "train"} - {subtask}:
        split = "val" if other == "train" else "test"
        assert image_sizes(tiny_config(*size, subtask=other), split, draws=1) != {(44, 150)}


def test_fast_resize_gives_other_pixels_of_the_same_size(tiny_config):
    config = {kind: tiny_config(f"ddetr_mm.resize={kind}") for kind in ("pillow", "fast")}
    images = {kind: dataset_of(one, "val")[0]["inputs"] for kind, one in config.items()}
    assert images["pillow"].shape == images["fast"].shape
    assert not torch.equal(images["pillow"], images["fast"])
