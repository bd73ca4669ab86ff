"""Every rule between fields: a spec that keeps it and one that breaks it."""

from __future__ import annotations

import pytest

from ddetr_mm.spec.fields import all_paths
from ddetr_mm.spec.rules import RULES, unfit_type_names

CASES = [
    # rule, subtask, kept, broken, words of the message
    (
        "levels_match_indices",
        None,
        "model: {num_feature_levels: 2, return_interm_indices: [1, 2]}",
        "model: {num_feature_levels: 3, return_interm_indices: [1, 2]}",
        "model.return_interm_indices, line 1: has 2 entries, but model.num_feature_levels is 3",
    ),
    (
        "levels_match_indices",
        "evaluate",
        "model: {num_feature_levels: 5, return_interm_indices: [0, 1, 2, 3, 4]}",
        "model: {num_feature_levels: 3}",
        "model.return_interm_indices (default), line 1: has 4 entries",
    ),
    (
        "indices_ascend",
        None,
        "model: {num_feature_levels: 2, return_interm_indices: [0, 3]}",
        "model: {num_feature_levels: 2, return_interm_indices: [3, 0]}",
        "must ascend",
    ),
    (
        "indices_ascend",
        None,
        "model: {num_feature_levels: 2, return_interm_indices: [3, 4]}",
        "model: {num_feature_levels: 2, return_interm_indices: [3, 3]}",
        "must ascend",
    ),
    (
        "indices_ascend",
        None,
        "model: {num_feature_levels: 2, return_interm_indices: [3, 4]}",
        "model: {num_feature_levels: 1, return_interm_indices: [4]}",
        "level 4 without a stage",
    ),
    ("heads_divide_width", None, "model: {nheads: 4}", "model: {nheads: 7}", "does not divide"),
    (
        "width_fits_groups",
        None,
        "model: {hidden_dim: 64}",
        "model: {hidden_dim: 100, nheads: 4}",
        "96 or 128",
    ),
    (
        "selection_exists",
        None,
        "model: {num_select: 30, num_queries: 10}\ndataset: {num_classes: 3}",
        "model: {num_select: 31, num_queries: 10}\ndataset: {num_classes: 3}",
        "num_queries x dataset.num_classes = 30",
    ),
    ("some_loss", None, "model: {loss_types: [boxes]}", "model: {loss_types: [boxes, boxes]}", "once"),
    (
        "backbone_has_type",
        None,
        "ddetr_mm: {backbone: {type: ResNet, depth: 18}}",
        "ddetr_mm: {backbone: {depth: 18}}",
        "has no type",
    ),
    (
        "backbone_has_type",
        None,
        "ddetr_mm: {backbone: {type: mmpretrain.ConvNeXt}}",
        "ddetr_mm: {backbone: {type: os.system, command: 'touch here'}}",
        "is no registered class",
    ),
    (
        "crop_range_ascends",
        None,
        "dataset: {augmentation: {train_random_crop_min: 600}}",
        "dataset: {augmentation: {train_random_crop_min: 601}}",
        "more than train_random_crop_max, which is 600",
    ),
    (
        "jitter_size_fits",
        None,
        "dataset: {augmentation: {fixed_random_crop: 1024}}",
        "dataset: {augmentation: {fixed_random_crop: 1000}}",
        "use 992 or 1024",
    ),
    (
        "channels_of_statistics",
        None,
        "dataset: {augmentation: {input_mean: [0.5], input_std: [1]}}",
        "dataset: {augmentation: {input_mean: [0.5, 0.5]}}",
        "1 or 3 numbers",
    ),
    (
        "evaluated_classes_exist",
        None,
        "dataset: {num_classes: 91, eval_class_ids: [1, 90]}",
        "dataset: {num_classes: 91, eval_class_ids: [1, 91]}",
        "1 to 90",
    ),
    (
        "evaluated_classes_exist",
        None,
        "dataset: {eval_class_ids: [2, 1]}",
        "dataset: {eval_class_ids: [1, 1]}",
        "twice",
    ),
    (
        "some_checkpoint",
        None,
        "train: {num_epochs: 3, checkpoint_interval: 3}",
        "train: {num_epochs: 3, checkpoint_interval: 4}",
        "no checkpoint would be written",
    ),
    (
        "some_checkpoint",
        None,
        "train: {num_epochs: 3, checkpoint_interval: 400, checkpoint_interval_unit: step}",
        "train: {num_epochs: 3, checkpoint_interval: 400}",
        "train.checkpoint_interval, line 1",
    ),
    (
        "some_validation",
        None,
        "train: {num_epochs: 3, validation_interval: 3}",
        "train: {num_epochs: 3, validation_interval: 4}",
        "no validation would be run",
    ),
    (
        "decay_steps_ascend",
        None,
        "train: {optim: {lr_steps: [3, 5]}}",
        "train: {optim: {lr_steps: [5, 3, 3]}}",
        "write [3, 5]",
    ),
    *(
        ("monitored_metric_exists", None, kept, broken, words)
        for kept, broken, words in (
            (
                "train: {checkpointer: {enable_topk: true, monitor: val_loss_cls}}",
                "train: {checkpointer: {enable_topk: true, monitor: mAP50}}",
                "train.checkpointer.monitor, line 1: is no metric of this run",
            ),
            (
                "ddetr_mm: {early_stopping: {monitor: mAP50}}",
                "ddetr_mm: {early_stopping: {patience: 2, monitor: mAP50}}",
                "allowed: val_mAP, val_mAP50, val_loss, val_loss_cls, val_loss_bbox, val_loss_iou",
            ),
            (
                "ddetr_mm: {early_stopping: {patience: 2, monitor: val_loss}}",
                "ddetr_mm: {validation_loss: false, early_stopping: {patience: 2, monitor: val_loss}}",
                "ddetr_mm.validation_loss=true",
            ),
        )
    ),
    *(
        (
            "best_files_have_names",
            None,
            f"train: {{checkpointer: {{enable_topk: {given}, save_top_k: 2, filename: '{kept}'}}}}",
            f"train: {{checkpointer: {{enable_topk: true, save_top_k: 2, filename: '{broken}'}}}}",
            words,
        )
        for given, kept, broken, words in (
            (
                "true",
                "a_{epoch:03d}_{val_mAP50:.3f}",
                "a_{epoch.__class__}",
                "unknown field {epoch.__class__}",
            ),
            ("true", "{step}", "{acc}", "unknown field {acc}"),
            ("true", "best of {epoch}", "../{epoch}", "is no plain file name"),
            ("false", "best", "best", "gives the 2 best checkpoints one name"),
            (
                "true",
                "model_{epoch}",
                "model_epoch_{epoch:03d}",
                "a name of the checkpoints of every interval",
            ),
        )
    ),
    (
        "averaged_weights_are_whole",
        None,
        "ddetr_mm: {ema: true}",
        "ddetr_mm: {ema: true}\ntrain: {distributed_strategy: fsdp}",
        "ddetr_mm.ema, line 1: averages whole weights",
    ),
    ("gpus_named_once", None, "train: {gpu_ids: [3, 1]}", "train: {gpu_ids: [1, 1]}", "train.gpu_ids"),
    (
        "gpus_named_once",
        "evaluate",
        "evaluate: {gpu_ids: [3]}",
        "evaluate: {gpu_ids: [3, 3]}",
        "evaluate.gpu_ids",
    ),
    *(
        (
            "deterministic_attention_exists",
            None,
            f"model: {{precise_msda: true}}\nddetr_mm: {{attention: {right}}}",
            f"model: {{precise_msda: true}}\nddetr_mm: {{attention: {wrong}}}",
            "ddetr_mm.attention, line 2: is not deterministic on a GPU",
        )
        for right, wrong in (("auto", "mmcv"), ("triton", "torch"))
    ),
    (
        "both_sides_of_evaluation",
        None,
        "evaluate: {input_width: 64, input_height: 32}",
        "evaluate: {input_height: 64}",
        "evaluate.input_width (default), line 1: is not given",
    ),
    (
        "both_sides_given",
        None,
        "inference: {input_width: 64, input_height: 32}",
        "inference: {input_width: 64}",
        "inference.input_height (default), line 1: is not given",
    ),
    ("three_channels", None, "export: {input_channel: 3}", "export: {input_channel: 1}", "allowed: 3"),
    ("onnx_only", None, "export: {format: onnx}", "export: {format: xdl}", "allowed: onnx"),
    ("batch_not_empty", None, "export: {batch_size: null}", "export: {batch_size: 0}", "-1, or at least 1"),
    ("batch_not_empty", None, "export: {batch_size: -1}", "evaluate: {batch_size: 0}", "evaluate.batch_size"),
    (
        "batches_ascend",
        None,
        "gen_trt_engine: {tensorrt: {min_batch_size: 1, opt_batch_size: 4, max_batch_size: 4}}",
        "gen_trt_engine: {tensorrt: {min_batch_size: 1, opt_batch_size: 4, max_batch_size: 2}}",
        "min <= opt <= max",
    ),
    (
        "partitions_fit_mode",
        "convert",
        "num_partitions: 3\npartition_mode: sequence",
        "num_partitions: 3",
        "needs a partition_mode",
    ),
    (
        "partitions_fit_mode",
        "convert",
        "num_partitions: 2\npartition_mode: random",
        "num_partitions: 3\npartition_mode: random",
        "does not fit partition_mode: random",
    ),
    (
        "quantize_backend_has_mode",
        "quantize",
        "quantize: {backend: onnxruntime, mode: static_ptq, algorithm: percentile}",
        "quantize: {backend: onnxruntime, mode: weight_only_ptq}",
        "is not a mode of onnxruntime (got 'weight_only_ptq'); allowed: static_ptq",
    ),
    (
        "quantize_backend_has_mode",
        "quantize",
        "quantize: {backend: modelopt.pytorch, mode: static_ptq, algorithm: entropy}",
        "quantize: {backend: modelopt.pytorch, mode: static_ptq, algorithm: awq_lite}",
        "is not an algorithm of modelopt.pytorch (got 'awq_lite'); allowed: max, minmax, entropy",
    ),
    (
        "quantize_backend_has_mode",
        "quantize",
        "quantize: {backend: modelopt.onnx, mode: null, algorithm: rtn_dq,"
        " backend_kwargs: {quantize_mode: int4}}",
        "quantize: {backend: modelopt.onnx, mode: null, algorithm: rtn_dq}",
        "needs backend_kwargs {quantize_mode: int4}",
    ),
    (
        "quantize_backend_has_mode",
        "quantize",
        "quantize: {backend: onnxruntime, mode: null, backend_kwargs: {per_channel: false}}",
        "quantize: {backend: torchao, backend_kwargs: {per_channel: false}}",
        "is not an argument of torchao (got False); allowed: none",
    ),
    (
        "quantize_arguments_have_values",
        "quantize",
        "quantize: {backend: onnxruntime, mode: null, backend_kwargs: {percentile: 99.9}}",
        "quantize: {backend: onnxruntime, mode: null, backend_kwargs: {percentile: 0.999}}",
        "a number above 50, up to 100",
    ),
    (
        "quantized_layers_have_formats",
        "quantize",
        "quantize: {layers: [{module_name: a, weights: {dtype: fp8_e5m2}}]}",
        "quantize: {layers: [{module_name: a, weights: {dtype: int4}}]}",
        "is not a format of torchao (got 'int4'); allowed: int8, fp8_e4m3fn, fp8_e5m2, native",
    ),
    (
        "quantized_layers_have_formats",
        "quantize",
        "quantize: {layers: [{module_name: a, weights: {dtype: int8, quant_axis: 0}}]}",
        "quantize: {layers: [{module_name: a, weights: {dtype: int8, quant_axis: 1}}]}",
        "quant_axis",
    ),
    (
        "quantized_layers_have_formats",
        "quantize",
        "quantize: {layers: [{module_name: a}]}",
        "quantize: {layers: [{weights: {dtype: int8}}]}",
        "module_name (default), line 1: is not given",
    ),
    (
        "quantized_layers_have_formats",
        "quantize",
        "quantize: {backend: onnxruntime, mode: null, layers: [{module_name: a, weights: {dtype: int8}}]}",
        "quantize: {backend: onnxruntime, mode: null, layers: [{module_name: a, weights: {dtype: int8}, "
        "activations: {dtype: native}}]}",
        "is another format than that of the weights",
    ),
    (
        "quantized_layers_have_formats",
        "quantize",
        "quantize: {backend: modelopt.onnx, mode: null, algorithm: max, layers: "
        "[{module_name: a, weights: {dtype: int8}}]}",
        "quantize: {backend: modelopt.onnx, mode: null, algorithm: max, layers: "
        "[{module_name: a, weights: {dtype: int8}}, {module_name: b, weights: {dtype: fp8_e4m3fn}}]}",
        "is not the only format, and modelopt.onnx writes one",
    ),
    (
        "quantized_layers_have_formats",
        "quantize",
        "quantize: {backend: modelopt.pytorch, mode: null, algorithm: max, layers: "
        "[{module_name: a, activations: {dtype: fp8_e4m3fn}}]}",
        "quantize: {backend: modelopt.pytorch, mode: null, algorithm: entropy, layers: "
        "[{module_name: a, activations: {dtype: fp8_e4m3fn}}]}",
        "has no entropy calibration",
    ),
    (
        "quantize_takes_the_file",
        "quantize",
        "quantize: {model_path: a.pth}",
        "quantize: {model_path: a.onnx}",
        "cannot be quantized by torchao",
    ),
    (
        "quantize_takes_the_file",
        "quantize",
        "quantize: {backend: modelopt.onnx, mode: null, algorithm: max, model_path: a.onnx}",
        "quantize: {backend: modelopt.onnx, mode: null, algorithm: max, model_path: a.pth}",
        "export the checkpoint first",
    ),
]


@pytest.mark.parametrize(("name", "subtask", "kept", "broken", "words"), CASES)
def test_rule(load, name: str, subtask: str | None, kept: str, broken: str, words: str):
    from ddetr_mm.errors import SpecError

    load(kept, (), subtask, require_mandatory=False)
    with pytest.raises(SpecError) as caught:
        load(broken, (), subtask, require_mandatory=False)
    assert len(caught.value.problems) == 1, str(caught.value)
    assert words in str(caught.value)


def test_every_rule_has_a_case():
    assert {one.name for one in RULES} == {case[0] for case in CASES}


@pytest.mark.parametrize("one", RULES, ids=lambda one: one.name)
def test_rules_read_fields_that_exist(one):
    assert set(one.reads) <= set(all_paths(one.root))
    assert one.doc.endswith(".")
    assert "\n" not in one.doc


@pytest.mark.parametrize("subtask", ["evaluate", "inference", "export", "gen_trt_engine"])
def test_training_intervals_matter_to_training_only(load, problems, subtask: str):
    text = "train: {num_epochs: 1, validation_interval: 5, checkpoint_interval: 5}"
    load(text, (), subtask, require_mandatory=False)
    found = problems(text, (), "train")
    assert any("validation_interval" in one for one in found)
    assert any("checkpoint_interval" in one for one in found)


def test_a_wrong_value_is_reported_once_and_not_again_by_a_rule(problems):
    found = problems("model: {num_feature_levels: 9, return_interm_indices: [7, 8]}")
    assert len(found) == 3  # 9, 7 and 8 are each out of range; no word of their number
    assert all("out of range" in one for one in found)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"type": "ResNet", "depth": 18, "norm_cfg": {"type": "BN"}},
        {"type": "mmpretrain.ConvNeXt", "_scope_": "mmpretrain"},
        {"type": "ResNet", "plugins": [{"cfg": {"type": "ContextBlock"}}]},
    ],
)
def test_names_of_registered_classes_pass(config):
    assert list(unfit_type_names(config)) == []


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"type": "os.system"}, ".type"),
        ({"type": "builtins.eval"}, ".type"),
        ({"type": "mmdet.registry.MODELS.build"}, ".type"),
        ({"type": ["ResNet"]}, ".type"),
        ({"type": ""}, ".type"),
        ({"type": "ResNet", "norm_cfg": {"type": "os.system"}}, ".norm_cfg.type"),
        ({"type": "ResNet", "plugins": [{"cfg": {"type": "a.b"}}]}, ".plugins[0].cfg.type"),
        ({"type": "ResNet", "_scope_": "os"}, "._scope_"),
    ],
)
def test_paths_to_any_object_are_found(config, place):
    assert [found for found, _ in unfit_type_names(config)] == [place]
