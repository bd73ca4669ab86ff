"""The spec section ``train``: the effect of each field on steps and on runs of the tiny detector."""

from __future__ import annotations

import io
import json
import os
import re
import types
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.registry import HOOKS, MODELS
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import Runner
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_scene import GIVEN, TINY, Scene
from torch import nn

from ddetr_mm.engine.curves import RunScalars
from ddetr_mm.errors import DataError, WeightsError

# --- TF32 ---


@pytest.mark.parametrize(
    ("given", "capability", "before", "expected"),
    [
        ((), (8, 0), (False, True), (True, True)),
        ((), (9, 0), (False, True), (True, True)),
        ((), (7, 5), (False, True), (False, True)),  # no TF32 there: as it was
        ((), None, (False, True), (False, True)),
        (("ddetr_mm.tf32=false",), (8, 6), (True, True), (False, False)),
        (("train.precision=bf16",), (8, 0), (False, True), (True, True)),  # of what stays in float32
    ],
)
def test_tf32_of_precision_fp32_from_ampere_on(tiny_config, monkeypatch, given, capability, before, expected):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    found = matmul.allow_tf32, cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    (settings,) = [hook for hook in tiny_config(*given).custom_hooks if hook.type == "TF32Hook"]
    hook = HOOKS.build(settings)
    matmul.allow_tf32, cudnn.allow_tf32 = before
    try:
        hook.before_run(types.SimpleNamespace(logger=MMLogger.get_current_instance()))
        assert (matmul.allow_tf32, cudnn.allow_tf32) == expected
        hook.after_run(None)
        assert (matmul.allow_tf32, cudnn.allow_tf32) == before
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = found


@pytest.mark.parametrize("subtask", ["evaluate", "inference"])
def test_tf32_is_set_for_predictions_too(tiny_config, subtask):
    for given, expected in (((), True), (("ddetr_mm.tf32=false",), False)):
        hooks = tiny_config(*given, subtask=subtask).custom_hooks
        assert [hook.tf32 for hook in hooks if hook.type == "TF32Hook"] == [expected]


# --- optimizer, schedule and precision of a step ---

WATCHED = "encoder.layers.0.ffn.layers.0.0.weight"


def wrapper_of(config: Any, model: nn.Module) -> Any:
    """The optimizer wrapper that a Runner would build."""
    return build_optim_wrapper(model, config.optim_wrapper)


def group_rates(model: nn.Module, wrapper: Any) -> dict[str, float]:
    """Learning rate of every trained parameter."""
    rates = {id(p): group["lr"] for group in wrapper.optimizer.param_groups for p in group["params"]}
    return {name: rates[id(p)] for name, p in model.named_parameters() if id(p) in rates}


def step_with(wrapper: Any, model: nn.Module, gradient: float) -> None:
    """One optimizer step with the same gradient for every number."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    wrapper.optimizer.step()


@pytest.fixture
def parts(tiny_config, tiny_model):
    """Network and optimizer wrapper of a spec."""

    def build(*overrides: str) -> tuple[nn.Module, Any]:
        model = tiny_model(*overrides)
        return model, wrapper_of(tiny_config(*overrides), model)

    return build


def test_sgd_follows_its_formula(parts):
    model, wrapper = parts(
        "train.optim.optimizer=SGD",
        "train.optim.lr=0.1",
        "train.optim.momentum=0.8",
        "train.optim.weight_decay=0.01",
    )
    watched = model.get_parameter(WATCHED)
    expected = watched.detach().clone()
    velocity = torch.zeros_like(expected)
    for _ in range(2):
        step_with(wrapper, model, 0.5)
        velocity = 0.8 * velocity + 0.5 + 0.01 * expected
        expected -= 0.1 * velocity
    torch.testing.assert_close(watched.detach(), expected)


def test_adamw_follows_its_formula(parts):
    model, wrapper = parts("train.optim.lr=0.01", "train.optim.weight_decay=0.1", "train.optim.momentum=0.1")
    watched = model.get_parameter(WATCHED)
    before = watched.detach().clone()
    step_with(wrapper, model, 0.5)
    # The first step of Adam has the length of the rate, whatever the gradient; the decay is apart from it.
    torch.testing.assert_close(watched.detach(), before * (1 - 0.01 * 0.1) - 0.01, rtol=1e-4, atol=1e-6)


def test_rates_of_backbone_and_projections(parts):
    model, wrapper = parts(
        "train.optim.lr=2e-3", "train.optim.lr_backbone=3e-4", "train.optim.lr_linear_proj_mult=0.5"
    )
    rates = group_rates(model, wrapper)
    assert rates["backbone.layer3.0.conv1.weight"] == pytest.approx(3e-4)
    assert rates["encoder.layers.0.self_attn.sampling_offsets.weight"] == pytest.approx(1e-3)
    assert rates["reference_points_fc.weight"] == pytest.approx(1e-3)
    assert rates[WATCHED] == pytest.approx(2e-3)


def test_groups_are_chosen_by_taos_names(parts):
    model, wrapper = parts(
        "train.optim.lr=1e-3",
        "train.optim.lr_backbone=1e-4",
        "train.optim.lr_linear_proj_mult=0.1",
        "model.backbone_names=[input_proj]",
        "model.linear_proj_names=[class_embed]",
    )
    rates = group_rates(model, wrapper)
    assert rates["neck.convs.0.conv.weight"] == pytest.approx(1e-4)
    assert rates["bbox_head.cls_branches.0.weight"] == pytest.approx(1e-4)
    assert rates["backbone.layer3.0.conv1.weight"] == pytest.approx(1e-3)
    assert rates["reference_points_fc.weight"] == pytest.approx(1e-3)


@pytest.mark.parametrize("limit", [0.1, 2.0, 0.0])
def test_gradients_are_clipped_and_not_at_zero(parts, limit: float):
    model, wrapper = parts(f"train.clip_grad_norm={limit}", "train.optim.optimizer=SGD")
    norms = []

    def watch(*_: Any) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))

    wrapper.optimizer.register_step_pre_hook(watch)
    wrapper.update_params(sum((100 * parameter).sum() for parameter in model.parameters()))
    (norm,) = norms
    if limit:
        assert norm == pytest.approx(limit, rel=1e-3)
    else:
        assert norm > 1e4


@pytest.mark.parametrize(
    ("precision", "dtype", "scaled"),
    [("fp32", torch.float32, False), ("fp16", torch.float16, True), ("bf16", torch.bfloat16, False)],
)
def test_precision_of_a_training_step(parts, training_batch, precision: str, dtype, scaled: bool):
    model, wrapper = parts(f"train.precision={precision}")
    seen = []
    model.encoder.layers[0].ffn.layers[0][0].register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype)
    )
    before = model.get_parameter(WATCHED).detach().clone()
    found = model.train().train_step(training_batch(), wrapper)
    assert seen == [dtype]
    assert torch.isfinite(found["loss"])
    assert model.get_parameter(WATCHED).dtype == torch.float32
    assert not torch.equal(model.get_parameter(WATCHED), before)
    scaler = getattr(wrapper, "loss_scaler", None)
    assert (scaler is not None and scaler.is_enabled()) is scaled


def test_a_step_that_the_loss_scaler_leaves_out_never_reaches_the_optimizer(parts):
    model, wrapper = parts("train.precision=fp16")
    steps = []
    wrapper.optimizer.register_step_pre_hook(lambda *_: steps.append(1))
    wrapper.update_params(model.get_parameter(WATCHED).sum() * float("inf"))
    assert not steps  # what watches for broken gradients would take it for a fault
    wrapper.update_params(model.get_parameter(WATCHED).sum())
    assert steps


def rates_by_epoch(tiny_config: Any, epochs: int, *overrides: str) -> list[float]:
    """The learning rate during each epoch."""
    config = tiny_config("train.optim.lr=1.0", f"train.num_epochs={epochs}", *overrides)
    layer = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=config.optim_wrapper.optimizer.lr)
    (settings,) = config.param_scheduler
    scheduler = PARAM_SCHEDULERS.build(dict(settings), default_args=dict(optimizer=optimizer))
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_multistep_decays_at_its_steps(tiny_config):
    rates = rates_by_epoch(
        tiny_config, 6, "train.optim.lr_steps=[2,5]", "train.optim.lr_decay=0.5", "train.optim.lr_step_size=1"
    )
    assert rates == pytest.approx([1, 1, 0.5, 0.5, 0.5, 0.25])


def test_steplr_decays_at_every_step(tiny_config):
    rates = rates_by_epoch(
        tiny_config,
        6,
        "train.optim.lr_scheduler=StepLR",
        "train.optim.lr_step_size=2",
        "train.optim.lr_decay=0.1",
        "train.optim.lr_steps=[1]",
    )
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("benchmark", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
def test_cudnn_switches(tiny_config, monkeypatch, benchmark: bool, deterministic: bool):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not benchmark)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", not deterministic)
    config = tiny_config(f"train.cudnn.benchmark={benchmark}", f"train.cudnn.deterministic={deterministic}")
    (settings,) = [hook for hook in config.custom_hooks if hook.type == "CudnnHook"]
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    hook = HOOKS.build(settings)
    hook.before_run(types.SimpleNamespace(deterministic=False))
    try:
        assert torch.backends.cudnn.benchmark is benchmark
        assert torch.backends.cudnn.deterministic is deterministic
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert torch.is_deterministic_algorithms_warn_only_enabled()  # as TAO: an operation without one warns
        assert torch.backends.cuda.math_sdp_enabled()
        fused = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
        assert fused == (not deterministic,) * 2
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is deterministic
    finally:
        hook.after_run(None)
    assert torch.backends.cudnn.benchmark is not benchmark
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cuda.flash_sdp_enabled()
    hook.before_run(types.SimpleNamespace(deterministic=True))
    try:
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        hook.after_run(None)


def test_learning_rates_are_reported_only_with_verbose(tiny_config):
    def hooks(*overrides: str) -> set[str]:
        return {hook.type for hook in tiny_config(*overrides).custom_hooks}

    assert hooks("train.verbose=True") - hooks() == {"LearningRateHook"}


# --- runs of the tiny detector in this process ---

QUICK = ("dataset.batch_size=1", "ddetr_mm.log_interval=1", "wandb.enable=False")


@pytest.fixture
def train(scene: Scene, tmp_path: Path) -> Callable[..., Path]:
    """Train as the command does, into a folder of this test; returns the folder."""
    from ddetr_mm.tasks.train import run

    spec = tmp_path / "spec.yaml"
    folder = tmp_path / "train"

    def go(*overrides: str) -> Path:
        spec.write_text(scene.spec_text)
        given = [*GIVEN["train"], *TINY, *QUICK, f"train.results_dir={folder}", *overrides]
        run(Namespace(experiment_spec=str(spec), overrides=given, debug=False))
        return folder

    return go


@pytest.mark.parametrize(
    ("choice", "rate"), [("from_checkpoint", 0.0002), ("from_spec", 0.0004)], ids=lambda value: str(value)
)
def test_the_settings_of_a_resumed_optimizer(train, choice: str, rate: float):
    more = ("train.optim.lr=0.0004", f"ddetr_mm.resume_optimizer={choice}", "train.num_epochs=2")
    train("train.num_epochs=1", "train.optim.lr=0.0002")
    folder = train(*more)
    saved = torch.load(folder / "model_epoch_001.pth", weights_only=True)
    rates = [group["lr"] for group in saved["optimizer"]["param_groups"]]
    assert max(rates) == rate and saved["meta"]["training_images"]["number"] > 0
    logs = "".join(path.read_text() for path in folder.rglob("*.log"))
    assert "Resuming with another train.optim.lr: 0.0002 in the checkpoint, 0.0004 in the spec" in logs


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model_epoch_*.pth"))


def scalars(folder: Path) -> RunScalars:
    found = RunScalars(folder)
    found.update()
    return found


def test_epochs_and_intervals(train):
    folder = train(
        "train.num_epochs=3",
        "train.checkpoint_interval=2",
        "train.validation_interval=2",
        "ddetr_mm.log_interval=2",
    )
    # Every second epoch, and always the last one.
    assert checkpoints(folder) == ["model_epoch_001.pth", "model_epoch_002.pth"]
    assert [point["step"] for point in scalars(folder).val] == [2, 3]
    meta = torch.load(folder / "model_epoch_002.pth", weights_only=True)["meta"]
    assert meta["epoch"] == 3 and meta["iter"] == 12
    (log,) = folder.rglob("*.log")
    assert log.read_text().count("Epoch(train)") == 6  # of 12 steps


def test_checkpoints_by_step_and_resuming_from_a_named_one(train, tmp_path: Path):
    folder = train("train.checkpoint_interval_unit=step", "train.checkpoint_interval=2")
    assert checkpoints(folder) == ["model_epoch_000_step_00002.pth", "model_epoch_000_step_00004.pth"]
    named = folder / "model_epoch_000_step_00004.pth"
    resumed = tmp_path / "again"
    train(
        f"train.results_dir={resumed}",
        f"train.resume_training_checkpoint_path={named}",
        "train.num_epochs=2",
    )
    lines = [json.loads(line) for line in (resumed / "status.json").read_text().splitlines()]
    assert any(line["message"] == f"Resuming training from checkpoint: {named}" for line in lines)
    assert checkpoints(resumed) == ["model_epoch_001.pth"]
    assert torch.load(resumed / "model_epoch_001.pth", weights_only=True)["meta"]["iter"] == 8


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ([], {}),
        (["ddetr_mm.keep_best=false"], None),
        (["train.is_dry_run=true"], None),
        (
            ["train.checkpointer={enable_topk: true, save_top_k: 3, monitor: val_loss, mode: max}"],
            {
                "monitor": "val_loss",
                "mode": "max",
                "save_top_k": 3,
                "filename": "model_best_{epoch:03d}",
                "dirpath": None,
                "auto_insert_metric_name": False,
            },
        ),
    ],
)
def test_the_best_checkpoint_is_chosen_by(tiny_config, overrides: list[str], options: dict | None):
    hooks = [hook for hook in tiny_config(*overrides).custom_hooks if hook["type"] == "BestCheckpointHook"]
    assert hooks == ([] if options is None else [{"type": "BestCheckpointHook", **options}])


def test_early_stopping_is_asked_for(tiny_config):
    def options(*overrides: str) -> list[dict[str, Any]]:
        hooks = tiny_config(*overrides).custom_hooks
        return [hook for hook in hooks if hook["type"] == "ResumableEarlyStoppingHook"]

    assert options() == []
    expected = dict(
        type="ResumableEarlyStoppingHook", patience=2, monitor="val_loss", mode="max", min_delta=1.5
    )
    section = "{patience: 2, monitor: val_loss, mode: max, min_delta: 1.5}"
    assert options(f"ddetr_mm.early_stopping={section}") == [expected]


def test_a_time_limit_ends_a_run_in_good_order(train, tiny_config):
    assert "max_hours" not in tiny_config().train_cfg
    assert tiny_config("ddetr_mm.max_hours=2.5").train_cfg["max_hours"] == 2.5
    folder = train("train.num_epochs=2", "ddetr_mm.max_hours=1e-9")
    assert checkpoints(folder) == ["model_epoch_000_step_00001.pth"]
    messages = [json.loads(line)["message"] for line in (folder / "status.json").read_text().splitlines()]
    assert messages[-2].startswith("Stopped before ddetr_mm.max_hours=1e-09 are over: 0 of 2 epochs trained")
    assert messages[-1] == "Train finished successfully."
    train("train.num_epochs=2")
    assert {"model_epoch_000.pth", "model_epoch_001.pth"} < set(checkpoints(folder))


def test_a_run_stops_after_an_epoch_with_the_schedule_of_all(train, tiny_config):
    assert "stop_after_epoch" not in tiny_config().train_cfg
    cut, whole = tiny_config("ddetr_mm.stop_after_epoch=1"), tiny_config()
    assert cut.train_cfg == {**whole.train_cfg, "stop_after_epoch": 1}
    assert cut.param_scheduler == whole.param_scheduler
    folder = train("train.num_epochs=2", "ddetr_mm.stop_after_epoch=1")
    assert checkpoints(folder) == ["model_epoch_000.pth"]
    messages = [json.loads(line)["message"] for line in (folder / "status.json").read_text().splitlines()]
    assert messages[-2].startswith("Stopped by ddetr_mm.stop_after_epoch=1: 1 of 2 epochs trained")
    assert messages[-1] == "Train finished successfully."
    train("train.num_epochs=2")
    assert checkpoints(folder) == ["model_epoch_000.pth", "model_epoch_001.pth"]


def test_best_checkpoints_and_averaged_weights(train, tmp_path: Path):
    from ddetr_mm.weights.entries import Selection
    from ddetr_mm.weights.load import load_for_model

    section = (
        "{enable_topk: true, monitor: train_loss, mode: min, save_top_k: 2, replace_periodic: true, "
        f"filename: 'good_{{step}}', dirpath: {tmp_path / 'best'}, auto_insert_metric_name: true}}"
    )
    folder = train(
        "train.num_epochs=3",
        f"train.checkpointer={section}",
        "ddetr_mm.ema=true",
        "ddetr_mm.ema_momentum=0.5",
        "train.optim.lr=0.001",
    )
    assert checkpoints(folder) == ["model_epoch_002.pth"]
    kept = list((tmp_path / "best").glob("good_*.pth"))
    assert len(kept) == 2 and all(re.fullmatch(r"good_step=(4|8|12)\.pth", path.name) for path in kept)
    values = {path: torch.load(path, weights_only=True)["meta"]["ddetr_mm"]["best"]["value"] for path in kept}
    lines = [json.loads(line) for line in (folder / "status.json").read_text().splitlines()]
    losses = [line["kpi"]["train_loss"] for line in lines if line["message"].startswith("Train metrics")]
    assert sorted(values.values()) == pytest.approx(sorted(losses)[:2])
    best = (tmp_path / "best" / "dd_model_best.pth").resolve()
    assert values[best] == min(values.values())

    file = torch.load(best, weights_only=True)
    model = MODELS.build(Config.fromfile(folder / "config.py").model)
    for use_ema, part, prefix in (("auto", "state_dict", ""), (False, "ema_state_dict", "module.")):
        load_for_model(model, best, selection=Selection(None, use_ema))
        torch.testing.assert_close(model.state_dict()[WATCHED], file[part][prefix + WATCHED], rtol=0, atol=0)
    assert not torch.equal(file["state_dict"][WATCHED], file["ema_state_dict"]["module." + WATCHED])


def losses_by_hand(folder: Path, checkpoint: Path) -> dict[str, float]:
    """The head's losses on the validation data, with boxes resized by the pipeline, as training has them."""
    config = Config.fromfile(str(folder / "config.py"))
    model = MODELS.build(config.model)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    loader = config.val_dataloader
    load, resize, annotations, pack = loader.dataset.pipeline
    loader.dataset.pipeline = [load, annotations, resize, pack]
    loader.sampler = dict(type="DefaultSampler", shuffle=False)
    means: dict[str, float] = {}
    batches = list(Runner.build_dataloader(loader))
    images = sum(len(batch["inputs"]) for batch in batches)
    with torch.no_grad():
        for batch in batches:
            data = model.eval().data_preprocessor(batch, training=False)
            samples = data["data_samples"]
            outputs = model(data["inputs"], samples, mode="tensor")
            truth = [sample.gt_instances for sample in samples]
            metas = [sample.metainfo for sample in samples]
            for name, value in model.bbox_head.loss_by_feat(*outputs, None, None, truth, metas).items():
                means[name] = means.get(name, 0.0) + value.item() * len(data["inputs"]) / images
    return means


def test_losses_of_validation(train):
    folder = train(
        "train.num_epochs=2", "train.validation_interval=1", "dataset.augmentation.fixed_padding=True"
    )
    lines = [json.loads(line) for line in (folder / "status.json").read_text().splitlines()]
    kpis = [line["kpi"] for line in lines if line["message"] == "Eval metrics generated."]
    assert len(kpis) == 2
    for number, kpi in enumerate(kpis):
        expected = losses_by_hand(folder, folder / f"model_epoch_00{number}.pth")
        assert kpi["val_loss"] == pytest.approx(sum(expected.values()), rel=1e-5)
        for name in ("loss_cls", "loss_bbox", "loss_iou"):
            assert kpi[f"val_{name}"] == pytest.approx(expected[name], rel=1e-5)
    point = scalars(folder).val[-1]
    assert {name: point[name] for name in kpis[-1] if "loss" in name} == {
        name: value for name, value in kpis[-1].items() if "loss" in name
    }
    assert kpis[-1]["val_mAP"] == str(point["coco/bbox_mAP"])
    events = EventAccumulator(str(next(folder.glob("*/vis_data"))))
    events.Reload()
    for name, value in kpis[-1].items():
        assert events.Scalars(name)[-1].value == pytest.approx(float(value))


def test_pictures_of_validation(train, scene: Scene):
    folder = train("ddetr_mm.validation_pictures=2", "train.num_epochs=2")
    events = EventAccumulator(str(next(folder.glob("*/vis_data"))), size_guidance={"images": 0})
    events.Reload()
    first, second = events.Tags()["images"]
    assert re.fullmatch(r"validation/1 \w+\.png", first) and re.fullmatch(r"validation/2 \w+\.png", second)
    for tag in (first, second):
        assert [event.step for event in events.Images(tag)] == [1, 2]  # of every epoch's validation
        with Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)) as picture:
            shown = np.asarray(picture.convert("RGB")).astype(int)
        with Image.open(next(scene.folder.rglob(tag.split()[-1]))) as image:
            plain = np.asarray(image.convert("RGB")).astype(int)
        height, width = plain.shape[:2]
        assert shown.shape == (height + 18, 2 * width + 6, 3)
        # The ground truth is drawn on the left half.
        assert (np.abs(shown[18:, :width] - plain).max(axis=2) > 60).sum() > 20


def test_no_pictures_of_validation_by_default(train):
    events = EventAccumulator(str(next(train().glob("*/vis_data"))), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == []


def test_losses_of_validation_can_be_left_out(train):
    folder = train("ddetr_mm.validation_loss=False")
    lines = [json.loads(line) for line in (folder / "status.json").read_text().splitlines()]
    (kpi,) = [line["kpi"] for line in lines if line["message"] == "Eval metrics generated."]
    assert list(kpi) == ["val_mAP", "val_mAP50"]


def test_a_dry_run_takes_one_step_and_leaves_no_checkpoint(train):
    folder = train()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pth")}
    curves, page = scalars(folder), (folder / "curves.html").read_bytes()
    first = (folder / "status.json").read_text().splitlines()
    train("train.is_dry_run=True", "train.num_epochs=9", "train.validation_interval=5")
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pth")} == before
    assert (scalars(folder).train, scalars(folder).val) == (curves.train, curves.val)
    assert (folder / "curves.html").read_bytes() == page
    lines = [json.loads(line) for line in (folder / "status.json").read_text().splitlines()[len(first) :]]
    (progress,) = [line for line in lines if "max_step" in line]
    assert progress["max_step"] == 1 and progress["step"] == 1
    assert any("val_mAP50" in line.get("kpi", {}) for line in lines) and lines[-1]["status"] == "SUCCESS"


def test_another_spec_does_not_continue_in_the_folder_of_a_finished_run(train, tmp_path: Path):
    folder = train()
    with pytest.raises(WeightsError, match=r"(?s)5 columns.*dataset\.num_classes"):
        train("dataset.num_classes=6", "train.num_epochs=2")
    assert checkpoints(folder) == ["model_epoch_000.pth"]
    with pytest.raises(WeightsError, match=r"(?s)another backbone.*model\.backbone"):
        train("ddetr_mm.backbone.base_channels=16", "train.num_epochs=2")
    nothing = tmp_path / "nothing.pth"
    with pytest.raises(WeightsError, match=r"train\.resume_training_checkpoint_path"):
        train(f"train.resume_training_checkpoint_path={nothing}")


def test_starting_weights_of_other_classes_are_carried_over_by_name(train, capsys, tmp_path: Path):
    folder = train("train.optim.lr=1e-9", "train.optim.lr_backbone=0", "train.optim.weight_decay=0")
    first = torch.load(folder / "model_epoch_000.pth", weights_only=True)["state_dict"]
    second_folder = tmp_path / "second"
    train(
        f"train.results_dir={second_folder}",
        f"train.pretrained_model_path={folder}/model_epoch_000.pth",
        "dataset.num_classes=7",
        "train.optim.lr=1e-9",
        "train.optim.lr_backbone=0",
        "train.seed=99",
    )
    second = torch.load(second_folder / "model_epoch_000.pth", weights_only=True)["state_dict"]
    key = "bbox_head.cls_branches.0.weight"
    assert second[key].shape[0] == 7
    torch.testing.assert_close(second[key][:5], first[key], atol=1e-5, rtol=1e-4)
    other = "decoder.layers.0.ffn.layers.0.0.weight"
    torch.testing.assert_close(second[other], first[other], atol=1e-5, rtol=1e-4)
    log = "".join(path.read_text() for path in second_folder.rglob("*.log"))
    assert "classes by name (square, bar, dot, line)" in log


def test_starting_weights_of_the_backbone(train, tmp_path: Path):
    folder = train("train.optim.lr_backbone=0", "train.optim.weight_decay=0")
    first = torch.load(folder / "model_epoch_000.pth", weights_only=True)["state_dict"]
    train(
        f"train.results_dir={tmp_path}/second",
        f"model.pretrained_backbone_path={folder}/model_epoch_000.pth",
        "train.optim.lr_backbone=0",
        "train.optim.weight_decay=0",
        "train.seed=99",
    )
    second = torch.load(tmp_path / "second" / "model_epoch_000.pth", weights_only=True)["state_dict"]
    key = "backbone.layer3.0.conv1.weight"
    assert torch.equal(second[key], first[key])
    assert not torch.allclose(second["query_embedding.weight"], first["query_embedding.weight"], atol=0.05)


def test_wandb_is_asked_for_by_its_section(tiny_config):
    def backends(*overrides: str, subtask: str = "train") -> list[Any]:
        return tiny_config(*overrides, subtask=subtask).visualizer.vis_backends

    assert backends()[0].type == "WandbBackend"
    for silent in (
        backends("wandb.enable=False"),
        backends("train.is_dry_run=True"),
        backends(subtask="evaluate"),
    ):
        assert "WandbBackend" not in [one.type for one in silent]
    fields = dict(
        project="cells",
        entity="lab",
        group="nightly",
        tags=["a", "b"],
        name="first",
        run_id="abc",
        reinit=True,
        sync_tensorboard=True,
        save_code=True,
    )
    settings = backends(*(f"wandb.{name}={json.dumps(value)}" for name, value in fields.items()))[0]
    # mmengine takes "name" for the key under which the visualizer keeps the backend.
    assert dict(settings) == dict(type="WandbBackend", announce=True, run_name=fields.pop("name"), **fields)
    assert backends()[0].announce is False  # TAO's default is on: most users never asked for it


def test_quick_check_looks_over_the_annotations_first(scene: Scene, tmp_path: Path):
    from ddetr_mm.tasks.check import quick_check

    wrong = "dataset.num_classes=2"  # the pictures have boxes of class 2
    with pytest.raises(DataError, match="num_classes"):
        quick_check(scene.load(tmp_path / "spec.yaml", wrong, "ddetr_mm.quick_check=True"))
    quick_check(scene.load(tmp_path / "spec.yaml", wrong, "ddetr_mm.quick_check=False"))


def initial_weights(tiny_config: Callable[..., Any], folder: Path, *overrides: str) -> torch.Tensor:
    """Weights of the network that a Runner has built, before any step."""
    from ddetr_mm.engine.runner import QuietRunner

    config = tiny_config("wandb.enable=False", *overrides)
    config.work_dir = str(folder)
    return QuietRunner.from_cfg(config).model.get_parameter("query_embedding.weight").detach().clone()


def test_seeds(tiny_config, tmp_path: Path):
    weights = [
        initial_weights(tiny_config, tmp_path / str(number), f"train.seed={seed}")
        for number, seed in enumerate((7, 7, 8, -1, -1))
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[3], weights[4])


def test_deterministic_algorithms(tiny_config, tmp_path: Path):
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        initial_weights(tiny_config, tmp_path, "ddetr_mm.deterministic=True")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("subtask", ["train", "evaluate", "inference", "export", "gen_trt_engine"])
def test_results_go_to_the_subtasks_own_folder(scene: Scene, tmp_path: Path, subtask: str):
    from ddetr_mm.tasks.session import open_session

    common, own = f"results_dir={tmp_path}/all", f"{subtask}.results_dir={tmp_path}/own"
    given = ("gen_trt_engine.onnx_file=x.onnx",) if subtask == "gen_trt_engine" else GIVEN[subtask]
    spec = tmp_path / "spec.yaml"
    spec.write_text(scene.spec_text)
    from ddetr_mm.spec import load_spec

    for overrides, folder in (((common,), tmp_path / "all" / subtask), ((common, own), tmp_path / "own")):
        with open_session(load_spec(spec, [*given, *TINY, *overrides], subtask), subtask) as session:
            assert session.folder == folder
        assert (folder / "experiment.yaml").is_file() and (folder / "status.json").is_file()
