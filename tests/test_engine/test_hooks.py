"""A training that goes on without the images it cannot read says how many those were."""

from __future__ import annotations

import json
import logging
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger

import ddetr_mm.register  # noqa: F401
from ddetr_mm.engine.hooks import (
    LearningRateHook,
    PretrainedWeightsHook,
    ReplacedImagesHook,
    ValidationLossHook,
)
from ddetr_mm.errors import DataError, WeightsError

# --- Every change of the learning rates is told, in one line and only then ---


class Lines(logging.Handler):
    """Keeps the messages that a logger is given."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def told(runner) -> list[str]:
    lines = Lines()
    runner.logger.addHandler(lines)
    runner.train()
    return [text for text in lines.texts if text.startswith("Learning rates")]


def test_changes_are_reported_once(make_runner, tmp_path):
    runner = make_runner(
        [LearningRateHook()],
        tmp_path,
        epochs=3,
        batches=2,
        param_scheduler=[{"type": "MultiStepLR", "milestones": [2], "gamma": 0.1}],
        log_level="INFO",
    )
    assert told(runner) == ["Learning rates: 0.05 = 0.05", "Learning rates after epoch 2: 0.05 = 0.005"]


def test_schedules_that_count_steps_are_reported_by_step(make_runner, tmp_path):
    runner = make_runner(
        [LearningRateHook()],
        tmp_path,
        epochs=1,
        batches=3,
        param_scheduler=[{"type": "MultiStepLR", "milestones": [2], "gamma": 0.5, "by_epoch": False}],
        log_level="INFO",
    )
    assert told(runner) == ["Learning rates: 0.05 = 0.05", "Learning rates after step 2: 0.05 = 0.025"]


# --- Losses of validation ---


def validated(*batches: tuple[int, dict[str, float]], first_ids: list[int]) -> ValidationLossHook:
    """The hook after these batches of so many images, with these losses."""
    hook = ValidationLossHook()
    head = types.SimpleNamespace(validates=False, validation_losses=None)
    runner = types.SimpleNamespace(model=types.SimpleNamespace(bbox_head=head))
    hook.before_val_epoch(runner)
    assert head.validates
    for number, (images, losses) in enumerate(batches):
        head.validation_losses = {name: torch.tensor(value) for name, value in losses.items()}
        outputs = [types.SimpleNamespace(img_id=first_ids[number] + image) for image in range(images)]
        hook.after_val_iter(runner, number, None, outputs)
        assert head.validation_losses is None
    return hook


def test_losses_of_validation_are_weighted_by_images_and_taken_once(monkeypatch):
    first = (3, {"loss_cls": 1.0, "loss_bbox": 2.0, "d0.loss_cls": 4.0})
    last = (1, {"loss_cls": 5.0, "loss_bbox": 0.0, "d0.loss_cls": 0.0})
    mine = validated(first, first_ids=[10])
    # The other rank has a batch of its own, and one of mine again.
    other = validated(last, first, first_ids=[20, 10])
    monkeypatch.setattr("mmengine.dist.all_gather_object", lambda own: [own, other._batches])
    added: list[tuple[dict, int]] = []
    board = types.SimpleNamespace(add_scalars=lambda values, step: added.append((values, step)))
    head = types.SimpleNamespace(validates=True)
    runner = types.SimpleNamespace(
        model=types.SimpleNamespace(bbox_head=head),
        visualizer=types.SimpleNamespace(get_backend={"TensorboardVisBackend": board}.get),
        message_hub=types.SimpleNamespace(log_scalars={}),
        epoch=3,
    )
    metrics = {"coco/bbox_mAP": 0.25, "coco/bbox_mAP_50": 0.5}
    mine.after_val_epoch(runner, metrics)
    assert metrics == {
        "coco/bbox_mAP": 0.25,
        "coco/bbox_mAP_50": 0.5,
        "val_loss": 2.0 + 1.5 + 3.0,
        "val_loss_cls": 2.0,
        "val_loss_bbox": 1.5,
    }
    assert added == [({"val_mAP": 0.25, "val_mAP50": 0.5}, 3)] and not head.validates


def test_a_head_without_losses_of_validation_is_left_alone(make_runner, tmp_path):
    runner = make_runner([ValidationLossHook()], tmp_path, epochs=1, validate=True)
    runner.train()
    assert runner.message_hub.get_scalar("val/coco/bbox_mAP").current() == 0.1
    assert not any("val_loss" in name for name in runner.message_hub.log_scalars)


# --- Starting weights: loaded by name before the first step, left alone when a run goes on ---


class Messages(list):
    """Stands for a logger: keeps what it is told."""

    def info(self, text: str) -> None:
        self.append(text)


def detector(num_classes: int = 4) -> torch.nn.Module:
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope

    from ddetr_mm.spec import ExperimentSpec
    from ddetr_mm.translate.model import detector as detector_config

    spec = ExperimentSpec()
    spec.model.enc_layers = spec.model.dec_layers = 1
    spec.model.hidden_dim = spec.model.dim_feedforward = 32
    spec.model.num_queries = spec.model.num_select = 6
    spec.dataset.num_classes = num_classes
    spec.ddetr_mm.backbone = dict(type="ResNet", depth=18, base_channels=8, out_indices=(1, 2, 3))
    init_default_scope("mmdet")
    return MODELS.build(detector_config(spec, zero_padded_values=False, channels=[16, 32, 64]))


def runner_for(model: torch.nn.Module, iteration: int = 0) -> types.SimpleNamespace:
    dataset = types.SimpleNamespace(metainfo=dict(classes=("background", "a", "b", "c")))
    loader = types.SimpleNamespace(dataset=dataset)
    return types.SimpleNamespace(model=model, iter=iteration, logger=Messages(), train_dataloader=loader)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    model = detector()
    path = tmp_path / "model.pth"
    torch.save(dict(state_dict=model.state_dict(), meta={}), path)
    return path


def test_the_whole_model_is_loaded(checkpoint: Path):
    torch.manual_seed(4)
    model = detector()
    runner = runner_for(model)
    PretrainedWeightsHook(model_path=str(checkpoint)).before_train(runner)
    saved = torch.load(checkpoint)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert any("keys loaded" in line for line in runner.logger)


def test_only_the_backbone_is_loaded(checkpoint: Path):
    torch.manual_seed(4)
    model = detector()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    PretrainedWeightsHook(backbone_path=str(checkpoint)).before_train(runner_for(model))
    saved = torch.load(checkpoint)["state_dict"]
    weights = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    assert all(torch.equal(weights[name], saved[name]) for name in weights if name.startswith("backbone."))
    assert all(torch.equal(weights[name], before[name]) for name in weights if name.startswith("encoder."))


def test_the_backbones_file_is_not_read_beside_that_of_the_whole_model(checkpoint: Path, tmp_path: Path):
    model = detector()
    runner = runner_for(model)
    paths = {"backbone_path": str(tmp_path / "nowhere.pth"), "model_path": str(checkpoint)}
    PretrainedWeightsHook(**paths).before_train(runner)
    saved = torch.load(checkpoint)["state_dict"]
    assert torch.equal(model.backbone.conv1.weight, saved["backbone.conv1.weight"])
    assert "nowhere.pth" not in "".join(runner.logger)


@pytest.mark.parametrize(
    ("options", "taken"),
    [({}, "ema"), ({"use_ema": False}, "state_dict"), ({"entry": "state_dict"}, "state_dict")],
)
def test_the_set_of_weights_that_was_asked_for_is_loaded_and_named(checkpoint: Path, options, taken):
    saved = torch.load(checkpoint)
    averaged = {
        key: value + 1 if value.is_floating_point() else value for key, value in saved["state_dict"].items()
    }
    torch.save({**saved, "ema": averaged}, checkpoint)
    for path in ("model_path", "backbone_path"):
        model = detector()
        runner = runner_for(model)
        PretrainedWeightsHook(**{path: str(checkpoint)}, **options).before_train(runner)
        expected = averaged if taken == "ema" else saved["state_dict"]
        assert torch.equal(model.backbone.conv1.weight, expected["backbone.conv1.weight"])
        assert f"2 sets of weights: '{taken}" in runner.logger[0]


def test_a_resumed_run_keeps_its_weights(checkpoint: Path):
    torch.manual_seed(4)
    model = detector()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runner = runner_for(model, iteration=10)
    PretrainedWeightsHook(model_path=str(checkpoint)).before_train(runner)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "not loaded" in runner.logger[0]


def test_a_missing_file_is_reported(tmp_path: Path):
    with pytest.raises(WeightsError, match="nowhere.pth"):
        PretrainedWeightsHook(model_path=str(tmp_path / "nowhere.pth")).before_train(runner_for(detector()))


# --- A training that goes on without the images it cannot read says how many those were ---


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


def test_the_number_is_reported_after_every_epoch(make_runner, loader, caplog):
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


def test_nothing_is_reported_when_all_images_are_there(make_runner, loader, caplog):
    loader["dataset"].update(missing_images="replace", indices=[0, 1])
    loader["num_workers"] = 0
    runner = make_runner([ReplacedImagesHook()], epochs=1, train_dataloader=loader)
    runner.train()
    assert runner.train_dataloader.dataset.num_replaced == 0
    assert "took its place" not in caplog.text


@pytest.mark.parametrize(("steps", "batches", "resumed"), [(2, 4, False), (9, 3, False), (2, 3, True)])
def test_the_first_steps_of_a_start_are_profiled(make_runner, tmp_path, steps, batches, resumed):
    if resumed:
        make_runner([{"type": "TAOCheckpointHook"}], epochs=1, batches=batches).train()
    lines: list[str] = []
    runner = make_runner(
        [{"type": "StepProfilerHook", "steps": steps}], epochs=2, batches=batches, resume=resumed
    )
    runner.logger.info = lines.append
    runner.train()
    trace = json.loads((tmp_path / "train" / "profile.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == min(steps, batches)
    assert any("aten::linear" in line for line in lines)
