"""Notes: fields without effect, GPUs, settings that are probably not meant."""

from __future__ import annotations

import pytest

from ddetr_mm.spec.fields import all_paths
from ddetr_mm.spec.notes import ALWAYS_REPORTED, CONDITIONS, NO_EFFECT

VALUES = {
    "model_name": "x",
    "model.dld_model_dir_path": "/x",
    "model.clip_max_norm": "0.5",
    "train.optim.monitor_name": "train_loss",
}


@pytest.mark.parametrize("path", NO_EFFECT)
def test_field_without_effect_is_reported_when_set(load, path: str):
    loaded = load("", [f"{path}={VALUES.get(path, '777')}"])
    assert loaded.notes == [f"{path} (override) has no effect because {NO_EFFECT[path]}"]


def test_only_changed_fields_are_reported(load):
    assert load("model: {clip_max_norm: 0.1}\nevaluate: {batch_size: -1}").notes == []


ONNXRUNTIME = "backend: onnxruntime, mode: static_ptq"


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        (
            "quantize: {algorithm: entropy}",
            [
                "quantize.algorithm (line 1) has no effect because torchao takes the ranges of weights from"
                " the weights"
            ],
        ),
        (
            "dataset: {quant_calibration_data_sources: {image_dir: a, json_file: b}}",
            [
                "dataset.quant_calibration_data_sources (line 1) has no effect because torchao quantizes"
                " weights alone, without images"
            ],
        ),
        ("ddetr_mm: {quantize_images: 3}\nquantize: {" + ONNXRUNTIME + "}", []),
        (
            "quantize: {layers: [{module_name: a, weights: {dtype: int8, observer_or_fake_quant: x}}]}",
            [
                "quantize.layers[0].weights.observer_or_fake_quant has no effect because quantize.algorithm"
                " chooses how ranges are found"
            ],
        ),
        (
            "quantize: {layers: [{module_name: a, weights: {observer_or_fake_quant_kwargs: {a: 1}}}]}",
            [
                "quantize.layers[0].weights.observer_or_fake_quant_kwargs has no effect because"
                " quantize.algorithm chooses how ranges are found"
            ],
        ),
        (
            "quantize: {layers: [{module_name: a, activations: {dtype: int8}}]}",
            ["quantize.layers[0].activations has no effect because torchao quantizes weights alone"],
        ),
        ("quantize: {" + ONNXRUNTIME + ", layers: [{module_name: a, weights: {dtype: int8}}]}", []),
    ],
)
def test_settings_of_quantize_that_change_nothing(load, text: str, notes: list[str]):
    assert load(text).notes == notes


@pytest.mark.parametrize("path", sorted(ALWAYS_REPORTED))
def test_fields_that_tao_rejects_today_are_reported_at_any_value(load, path: str):
    assert load("", [f"{path}=960"]).notes
    name = path.rpartition(".")[2]
    default = {"input_channel": 3, "input_width": 960, "input_height": 544, "opset_version": 12}[name]
    assert load("", [f"{path}={default}"]).notes[0].startswith(path)


def test_tables_name_fields_that_exist():
    from ddetr_mm.spec import ConvertSpec, ExperimentSpec

    assert set(NO_EFFECT) <= set(all_paths(ExperimentSpec))
    for one in CONDITIONS:
        assert one.path in all_paths(one.root), one.path
    assert ConvertSpec in {one.root for one in CONDITIONS}
    assert all(not reason.endswith(".") for reason in NO_EFFECT.values())


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (
            "model: {backbone: gc_vit_tiny}\nddetr_mm: {backbone: {type: ResNet}}",
            "model.backbone (line 1) has no effect because ddetr_mm.backbone is set",
        ),
        ("model: {backbone: gc_vit_tiny, dilation: true}", "only resnet_50 can be dilated"),
        (
            "model: {pretrained_backbone_path: a.pth}\ntrain: {pretrained_model_path: b.pth}",
            "model.pretrained_backbone_path (line 1) has no effect because train.pretrained_model_path",
        ),
        ("train: {optim: {momentum: 0.5}}", "AdamW has no momentum"),
        ("train: {optim: {lr_scheduler: StepLR, lr_steps: [3]}}", "lr_scheduler is StepLR"),
        ("train: {optim: {lr_step_size: 3}}", "lr_scheduler is MultiStep"),
        ("train: {optim: {lr_backbone: 3e-5}}\nmodel: {train_backbone: false}", "train_backbone is false"),
        ("train: {checkpointer: {save_top_k: 2}}", "train.checkpointer.enable_topk is false"),
        (
            "train: {checkpointer: {enable_topk: true}}\nddetr_mm: {keep_best: false}",
            "train.checkpointer.enable_topk is true",
        ),
        ("ddetr_mm: {early_stopping: {min_delta: 0.5}}", "early_stopping.patience is null"),
        ("ddetr_mm: {ema_momentum: 0.5}", "ddetr_mm.ema is false"),
        ("dataset: {train_sampler: uniform_sampler}", "dataset_type is not default"),
        ("dataset: {augmentation: {fixed_random_crop: 64, train_random_crop_max: 700}}", "fixed_random_crop"),
        (
            "wandb: {enable: false, project: x}",
            "wandb.project (line 1) has no effect because wandb.enable is false",
        ),
        (
            "train: {is_dry_run: true, num_epochs: 3}",
            "train.num_epochs (line 1) has no effect because train.is_dry_run",
        ),
        ("evaluate: {checkpoint: a, trt_engine: b}", "evaluate.trt_engine is set"),
        ("inference: {checkpoint: a, trt_engine: b}", "inference.trt_engine is set"),
        ("gen_trt_engine: {tensorrt: {calibration: {cal_batches: 3}}}", "data_type is not INT8"),
        ("image_dir_name: a\nval_split: 10", "partition_mode is null"),
        ("evaluate: {conf_threshold: 50}", "scores lie between 0 and 1"),
        ("dataset: {augmentation: {random_resize_max_size: 700}}", "limits the long side"),
        ("dataset: {num_classes: 1}", "column 0 is the background"),
        ("train: {optim: {lr_steps: [5, 12]}}", "[12] are never reached: train.num_epochs is 10"),
    ],
)
def test_conditional_notes(load, text: str, note: str):
    notes = load(text).notes
    assert any(note in one for one in notes), notes
    assert len(notes) == 1, notes


@pytest.mark.parametrize("name", ["evaluate", "inference"])
@pytest.mark.parametrize("file", ["checkpoint: a.onnx", "checkpoint: a.plan", "trt_engine: b.engine"])
def test_sizes_have_no_effect_on_an_exported_graph(load, name: str, file: str):
    notes = load(f"{name}: {{{file}, input_width: 64, input_height: 96}}").notes
    assert notes == [
        f"{name}.input_{side} (line 1) has no effect because the file is an exported graph, which has one"
        " size"
        for side in ("width", "height")
    ]


@pytest.mark.parametrize(
    "text",
    [
        "train: {optim: {optimizer: SGD, momentum: 0.5}}",
        "train: {optim: {lr_scheduler: StepLR, lr_step_size: 3}}",
        "dataset: {train_sampler: uniform_sampler, dataset_type: default}",
        "image_dir_name: a\nval_split: 10\npartition_mode: random\nnum_partitions: 2",
        "model: {dilation: true}",
        "model: {pretrained_backbone_path: a.pth}",
        "evaluate: {checkpoint: a.pth, input_width: 64, input_height: 64}",
        "train: {optim: {lr_steps: [5, 8]}}",
    ],
)
def test_no_note_where_the_field_acts(load, text: str):
    assert load(text).notes == []


@pytest.mark.parametrize(
    ("text", "overrides", "count", "ids", "notes"),
    [
        ("", [], 1, [0], 0),
        ("train: {num_gpus: 2}", [], 2, [0, 1], 0),
        ("train: {gpu_ids: [2, 3]}", [], 2, [2, 3], 0),
        ("train: {num_gpus: 1, gpu_ids: [0, 1]}", [], 2, [0, 1], 1),
        ("train: {num_gpus: 3, gpu_ids: [5, 6]}", [], 3, [0, 1, 2], 1),
        ("train: {num_gpus: 2, gpu_ids: [5, 6]}", [], 2, [5, 6], 0),
        ("train: {num_gpus: 4, gpu_ids: [0, 1, 2, 3]}", ["train.num_gpus=1"], 1, [0], 1),
        ("train: {num_gpus: 4, gpu_ids: [0, 1, 2, 3]}", ["train.gpu_ids=[2]"], 1, [2], 1),
        ("train: {num_gpus: 4}", ["train.gpu_ids=[2,3]"], 2, [2, 3], 1),
        ("train: {num_gpus: 4}", ["train.gpu_ids[0]=2"], 1, [2], 1),
        ("train: {gpu_ids: [1, 2]}", ["train={num_gpus: 1}"], 1, [0], 1),
        ("", ["train.num_gpus=2", "train.gpu_ids=[3]"], 2, [0, 1], 1),
        ("evaluate: {num_gpus: 4}", ["train.num_gpus=2"], 2, [0, 1], 0),
    ],
)
def test_gpus(load, text: str, overrides: list[str], count: int, ids: list[int], notes: int):
    loaded = load(text, overrides)
    assert loaded.spec.train.num_gpus == count
    assert loaded.spec.train.gpu_ids == ids
    assert len(loaded.notes) == notes, loaded.notes


def test_gpu_notes_say_what_holds(load):
    (note,) = load("inference: {num_gpus: 1, gpu_ids: [4, 5]}").notes
    assert note.endswith("the larger number is used: num_gpus 2, gpu_ids [4, 5]")
    (note,) = load("train: {num_gpus: 4}", ["train.gpu_ids=[1]"]).notes
    assert note == "train.num_gpus (line 1) has no effect because the command line names the GPUs"
