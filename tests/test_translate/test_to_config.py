"""The config of a spec: the sections, what each field becomes, and that mmengine builds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.registry import OPTIMIZERS

import ddetr_mm.register  # noqa: F401 - registers what the configs name
from ddetr_mm.errors import SpecError
from ddetr_mm.spec import load_spec
from ddetr_mm.translate import spec_config_text, to_config

SOURCES = """
results_dir: results
dataset:
  train_data_sources: [{image_dir: /train, json_file: /train.json}]
  val_data_sources: [{image_dir: /val, json_file: /val.json}, {image_dir: /val2, json_file: /shards}]
  test_data_sources: {image_dir: /test, json_file: /test.json}
  infer_data_sources: {image_dir: [/a, /b], classmap: /names.txt}
"""


@pytest.fixture
def translate(tmp_path: Path):
    """Translate the sources above with overrides; returns the config as a dict."""

    def run(*overrides: str, subtask: str = "train", **keywords) -> dict:
        path = tmp_path / "spec.yaml"
        path.write_text(SOURCES)
        given = {
            "train": (),
            "evaluate": ("evaluate.checkpoint=x.pth",),
            "inference": ("inference.checkpoint=x.pth",),
            "export": ("export.checkpoint=x.pth", "export.onnx_file=x.onnx"),
        }[subtask]
        loaded = load_spec(path, [*given, *overrides], subtask)
        return to_config(loaded, subtask, **keywords).to_dict()

    return run


def test_learning_rate_groups_follow_the_spec(translate):
    wrapper = translate(
        "train.optim.lr=2e-4", "train.optim.lr_backbone=5e-5", "train.optim.lr_linear_proj_mult=0.2"
    )["optim_wrapper"]
    keys = wrapper["paramwise_cfg"]["custom_keys"]
    assert keys["backbone"]["lr_mult"] == pytest.approx(0.25)
    assert keys["sampling_offsets"]["lr_mult"] == keys["reference_points"]["lr_mult"] == 0.2
    assert wrapper["optimizer"] == dict(type="AdamW", lr=2e-4, weight_decay=1e-4, fused=True)
    assert wrapper["clip_grad"] == dict(max_norm=0.1, norm_type=2)


def test_the_three_groups_reach_the_optimizer(translate):
    from mmdet.registry import MODELS
    from mmengine.optim import build_optim_wrapper

    config = translate("model.enc_layers=1", "model.dec_layers=1", "train.optim.lr_backbone=3e-5")
    model = MODELS.build(config["model"])
    groups = build_optim_wrapper(model, config["optim_wrapper"]).optimizer.param_groups
    by_id = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    rates = {name: by_id.get(id(parameter)) for name, parameter in model.named_parameters()}
    assert rates["backbone.layer2.0.conv1.weight"] == pytest.approx(3e-5)
    assert rates["backbone.layer1.0.conv1.weight"] is None
    assert rates["encoder.layers.0.self_attn.sampling_offsets.weight"] == pytest.approx(2e-5)
    assert rates["reference_points_fc.weight"] == pytest.approx(2e-5)
    assert rates["bbox_head.cls_branches.0.weight"] == pytest.approx(2e-4)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_the_fused_optimizer_steps_as_the_plain_one(translate, name):
    config = translate(f"train.optim.optimizer={name}")["optim_wrapper"]["optimizer"]
    results = []
    for fused in (True, False):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(40, 50, generator=generator).requires_grad_()
        optimizer = OPTIMIZERS.build({**config, "fused": fused, "params": [weight], "lr": 0.1})
        for _ in range(3):
            weight.grad = torch.randn(40, 50, generator=generator)
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_sgd_and_no_clipping(translate):
    wrapper = translate("train.optim.optimizer=SGD", "train.optim.momentum=0.8", "train.clip_grad_norm=0")[
        "optim_wrapper"
    ]
    assert wrapper["optimizer"]["type"] == "SGD" and wrapper["optimizer"]["momentum"] == 0.8
    assert "clip_grad" not in wrapper


def test_schedulers(translate):
    assert translate("train.optim.lr_steps=[3,5]", "train.num_epochs=6")["param_scheduler"] == [
        dict(type="MultiStepLR", by_epoch=True, milestones=[3, 5], gamma=0.1)
    ]
    step = translate("train.optim.lr_scheduler=StepLR", "train.optim.lr_step_size=4")["param_scheduler"]
    assert step == [dict(type="StepLR", by_epoch=True, step_size=4, gamma=0.1)]


LEVELS = {
    1: "model.return_interm_indices=[1]",
    2: "model.return_interm_indices=[1,2]",
    3: "model.return_interm_indices=[1,2,3]",
    4: "model.return_interm_indices=[1,2,3,4]",
    5: "model.return_interm_indices=[0,1,2,3,4]",
}


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("refine", [True, False])
def test_every_number_of_levels_builds_and_runs(translate, levels, refine):
    import torch
    from mmdet.registry import MODELS

    config = translate(
        LEVELS[levels],
        f"model.num_feature_levels={levels}",
        f"model.with_box_refine={refine}",
        "model.enc_layers=1",
        "model.dec_layers=2",
        "model.hidden_dim=64",
        "model.num_queries=10",
        "model.num_select=10",
        "ddetr_mm.backbone={type: ResNet, depth: 18, base_channels: 8, out_indices: "
        f"{[i for i in range(5) if f'{i}' in LEVELS[levels].split('=')[1] and i < 4]}}}",
        look_up_channels=lambda backbone: [8 * 2**stage for stage in backbone["out_indices"]],
    )
    model = MODELS.build(config["model"]).eval()
    with torch.no_grad():
        logits, boxes = model(torch.zeros(1, 3, 64, 96), None, mode="tensor")
    assert logits.shape == (2, 1, 10, 91) and boxes.shape == (2, 1, 10, 4)


@pytest.mark.parametrize("stages", [[2], [0], [1, 2], [0, 1, 2], [0, 3]], ids=str)
def test_the_extra_level_comes_from_the_last_listed_stage(translate, stages):
    import torch
    from mmdet.registry import MODELS

    config = translate(
        f"model.num_feature_levels={len(stages) + 1}",
        f"model.return_interm_indices={[*stages, 4]}",
        "model.enc_layers=1",
        "model.dec_layers=1",
    )
    assert tuple(config["model"]["backbone"]["out_indices"]) == tuple(stages)
    neck = MODELS.build(config["model"]["neck"]).eval()
    maps = [torch.randn(1, 256 * 2**stage, 32 // 2**stage, 32 // 2**stage) for stage in stages]
    with torch.no_grad():
        levels = neck(maps)
        extra = neck.extra_convs[0](maps[-1])
    assert len(levels) == len(stages) + 1
    assert torch.equal(levels[-1], extra) and extra.shape[-1] == 16 // 2 ** stages[-1]


def test_frozen_and_dilated_backbone(translate):
    assert translate()["model"]["backbone"]["frozen_stages"] == 1
    assert translate("model.train_backbone=False")["model"]["backbone"]["frozen_stages"] == 4
    assert translate("model.dilation=True")["model"]["backbone"]["type"] == "TorchvisionDilatedResNet"


def test_freeze_takes_taos_names(translate):
    from mmdet.registry import MODELS

    config = translate(
        "train.freeze=[transformer.encoder, input_proj]", "model.enc_layers=1", "model.dec_layers=1"
    )
    assert config["model"]["frozen_modules"] == ["encoder", "neck"]
    trains = {
        name.split(".")[0]
        for name, parameter in MODELS.build(config["model"]).named_parameters()
        if parameter.requires_grad
    }
    assert trains == {
        "backbone",
        "decoder",
        "query_embedding",
        "level_embed",
        "reference_points_fc",
        "bbox_head",
    }


def test_a_backbone_of_the_specs_own_can_be_frozen(translate):
    from mmdet.registry import MODELS

    config = translate(
        "ddetr_mm.backbone={type: ResNet, depth: 18, base_channels: 8, out_indices: [1, 2, 3]}",
        "model.train_backbone=False",
        "model.enc_layers=1",
        "model.dec_layers=1",
        look_up_channels=lambda _: [16, 32, 64],
    )
    model = MODELS.build(config["model"])
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    assert all(parameter.requires_grad for parameter in model.decoder.parameters())


def test_gcvit_channels(translate):
    model = translate("model.backbone=gc_vit_small", "model.train_backbone=False")["model"]
    assert model["backbone"]["type"] == "GCViT" and model["backbone"]["variant"] == "small"
    assert model["backbone"]["frozen_stages"] == 4
    assert translate("model.backbone=gc_vit_small")["model"]["backbone"]["frozen_stages"] == -1
    assert model["neck"]["in_channels"] == [192, 384, 768]


def test_losses_and_matcher(translate):
    model = translate(
        "model.cls_loss_coef=3", "model.focal_alpha=0.4", "model.aux_loss=False", "model.num_select=77"
    )["model"]
    head, costs = model["bbox_head"], model["train_cfg"]["assigner"]["match_costs"]
    assert head["loss_cls"]["loss_weight"] == 3 and head["loss_cls"]["alpha"] == 0.4
    assert costs[0]["weight"] == 3 and costs[0]["alpha"] == 0.25
    assert head["aux_loss"] is False and model["test_cfg"]["max_per_img"] == 77


def test_normalisation_and_padding(translate):
    preprocessor = translate(
        "dataset.augmentation.input_mean=[0.5]", "dataset.augmentation.input_std=[0.25]"
    )["model"]["data_preprocessor"]
    assert preprocessor["mean"] == [127.5] * 3 and preprocessor["std"] == [63.75] * 3
    assert preprocessor["pad_short_long"] == (800, 1333)
    assert "train_padding" not in preprocessor  # max(scales) is test_random_resize
    free = translate("dataset.augmentation.fixed_padding=False")["model"]["data_preprocessor"]
    assert free["pad_short_long"] is None
    other = translate("dataset.augmentation.test_random_resize=600")["model"]["data_preprocessor"]
    assert other["pad_short_long"] == (600, 1333)
    assert other["train_padding"] == dict(pad_short_long=(800, 1333), pad_size_divisor=1)


def test_train_pipeline_has_both_branches(translate):
    pipeline = translate("dataset.augmentation.train_random_crop_min=300")["train_pipeline"]
    plain, cropped = next(step for step in pipeline if step["type"] == "RandomChoice")["transforms"]
    assert [step["type"] for step in plain] == ["TAORandomResize"]
    assert [step["type"] for step in cropped] == ["TAORandomResize", "TAORandomSizeCrop", "TAORandomResize"]
    assert cropped[1]["min_size"] == 300 and cropped[0]["max_size"] is None and plain[0]["max_size"] == 1333


def test_training_images_are_loaded_and_packed_the_quick_way(translate):
    config = translate()
    assert config["train_pipeline"][0] == dict(type="TAOLoadImageFromFile")
    assert config["train_pipeline"][-1] == dict(type="TAOPackDetInputs")
    # mmdet's own inferencer looks for the first name; in mmdet's registry it is our loader.
    assert [config["test_pipeline"][index]["type"] for index in (0, -1)] == [
        "LoadImageFromFile",
        "TAOPackDetInputs",
    ]


@pytest.mark.parametrize(
    ("overrides", "largest"),
    [
        ((), 800),
        (("dataset.augmentation.train_random_resize=[900]",), 900),
        (("dataset.augmentation.fixed_random_crop=512",), 1024),
    ],
)
def test_fast_reading_decodes_no_larger_than_needed(translate, overrides, largest):
    config = translate("ddetr_mm.resize=fast", *overrides)
    assert config["train_pipeline"][0] == dict(type="TAOLoadImageFromFile", min_short_side=largest)
    assert "pillow" not in str(config["train_pipeline"])
    assert config["test_pipeline"][0] == dict(type="LoadImageFromFile")


def test_unreadable_images_are_replaced_in_training_alone(translate):
    def hooks(config):
        return [hook["type"] for hook in config["custom_hooks"]]

    config = translate()
    assert config["train_dataloader"]["dataset"]["missing_images"] == "error"
    assert "ReplacedImagesHook" not in hooks(config)
    config = translate("ddetr_mm.missing_images=replace")
    assert config["train_dataloader"]["dataset"]["missing_images"] == "replace"
    assert config["val_dataloader"]["dataset"]["missing_images"] == "error"
    assert "ReplacedImagesHook" in hooks(config)


@pytest.mark.parametrize(("dataset_type", "storage"), [("serialized", "shared"), ("default", "process")])
def test_dataset_type_decides_where_annotations_lie(translate, dataset_type, storage):
    config = translate(f"dataset.dataset_type={dataset_type}")
    assert config["train_dataloader"]["dataset"]["storage"] == storage
    assert config["val_dataloader"]["dataset"]["storage"] == storage


def test_large_scale_jitter_replaces_the_branches(translate):
    types = [
        step["type"] for step in translate("dataset.augmentation.fixed_random_crop=512")["train_pipeline"]
    ]
    assert "LargeScaleJitter" in types and "RandomChoice" not in types


def test_sources_reach_datasets_and_metrics(translate):
    config = translate()
    assert config["train_dataloader"]["dataset"]["sources"] == [
        dict(image_dir="/train", json_file="/train.json")
    ]
    assert len(config["val_dataloader"]["dataset"]["sources"]) == 2
    assert config["val_evaluator"]["sources"] == config["val_dataloader"]["dataset"]["sources"]
    evaluated = translate("evaluate.conf_threshold=0.2", "dataset.eval_class_ids=[1]", subtask="evaluate")
    assert evaluated["test_evaluator"]["sources"] == [dict(image_dir="/test", json_file="/test.json")]
    assert evaluated["test_evaluator"]["conf_threshold"] == 0.2
    assert evaluated["test_evaluator"]["eval_class_ids"] == [1]


def test_validation_counts_every_prediction(translate):
    """``evaluate.conf_threshold`` belongs to the subtask evaluate, as in TAO."""
    trained = translate("evaluate.conf_threshold=0.2")
    assert trained["val_evaluator"]["conf_threshold"] == trained["test_evaluator"]["conf_threshold"] == 0


def test_inference_stretches_when_both_sides_are_given(translate):
    kept = translate(subtask="inference")
    assert kept["test_pipeline"][1] == dict(
        type="Resize", scale=(1333, 800), keep_ratio=True, backend="pillow", size_rule="tao"
    )
    assert kept["test_dataloader"]["dataset"]["folders"] == ["/a", "/b"]
    stretched = translate("inference.input_width=320", "inference.input_height=192", subtask="inference")
    assert stretched["test_pipeline"][1] == dict(
        type="Resize", scale=(320, 192), keep_ratio=False, backend="pillow"
    )


def test_zeroed_padding_follows_spec_before_checkpoint(translate):
    assert translate()["model"]["zero_padded_values"] is False
    assert translate(zero_padded_values=True)["model"]["zero_padded_values"] is True
    assert (
        translate("ddetr_mm.zero_padded_values=False", zero_padded_values=True)["model"]["zero_padded_values"]
        is False
    )


def test_a_subtask_without_config_is_refused(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(SOURCES)
    with pytest.raises(SpecError, match="gen_trt_engine"):
        to_config(load_spec(path), "gen_trt_engine")


def test_text_and_dict_say_the_same(tmp_path):
    from mmengine.config import Config

    path = tmp_path / "spec.yaml"
    path.write_text(SOURCES)
    loaded = load_spec(path, ["model.num_queries=250"], "train")
    draft = to_config(loaded, "train")
    text = spec_config_text(loaded, draft, "train")
    assert "#   model.num_queries = 250 (override)" in text
    assert (
        "#   dataset.train_data_sources = [{'image_dir': '/train', 'json_file': '/train.json'}] (line 4"
        in text
    )
    written = tmp_path / "config.py"
    written.write_text(text)
    assert Config.fromfile(str(written)).to_dict() == draft.to_dict()


def test_shard_samplers_act_with_the_default_dataset_type_only(translate):
    wanted = dict(type="ShardDistributedSampler", uneven="drop", shuffle=True)
    plain = "dataset.dataset_type=default"
    cover = "ddetr_mm.cover_all_images=true"
    for name, extra in (("non_uniform_sampler", {}), ("uniform_sampler", {"replacement": True})):
        named = f"dataset.train_sampler={name}"
        assert translate(named, plain)["train_dataloader"]["sampler"] == wanted | extra
        covering = translate(named, plain, cover)["train_dataloader"]["sampler"]
        assert covering == wanted | {"uneven": "repeat"}
        for config in (translate(named), translate(), translate(plain, cover)):
            assert config["train_dataloader"]["sampler"]["type"] == "ElasticDistributedSampler"


@pytest.mark.parametrize("kept", [False, True])
def test_the_last_batch_is_dropped_or_kept(translate, kept: bool):
    config = translate(f"ddetr_mm.keep_last_batch={kept}")["train_dataloader"]
    assert config["batch_sampler"] == dict(type="ElasticBatchSampler", drop_last=not kept)
    assert config["drop_last"] is False  # the batch sampler does it


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp32", {"type": "OptimWrapper"}),
        ("fp16", {"type": "MixedPrecisionOptimWrapper", "dtype": "float16"}),
        ("bf16", {"type": "MixedPrecisionOptimWrapper", "dtype": "bfloat16"}),
    ],
)
def test_precision_of_training(translate, precision, expected):
    wrapper = translate(f"train.precision={precision}")["optim_wrapper"]
    assert {key: wrapper[key] for key in ("type", "dtype") if key in wrapper} == expected


def test_options_of_speed_stand_in_the_config_when_set(translate):
    speed = ("attention", "compiled", "compile_options", "predict_dtype")
    assert not set(speed) & set(translate()["model"])
    given = (
        "ddetr_mm.attention=triton",
        "ddetr_mm.compile=all",
        "ddetr_mm.compile_mode=reduce-overhead",
        "ddetr_mm.predict_precision=bf16",
    )
    for subtask in ("train", "evaluate", "inference"):
        model = translate(*given, subtask=subtask)["model"]
        expected = ["triton", "all", {"mode": "reduce-overhead"}, "bfloat16"]
        assert [model[name] for name in speed] == expected
    # What is exported is traced as it is.
    assert not set(speed) & set(translate(*given, subtask="export")["model"])


def test_the_matcher_stands_in_the_config_of_training(translate):
    given = "ddetr_mm.matcher=torch-linear-assignment"
    assert translate(given)["model"]["bbox_head"]["matcher"] == "torch-linear-assignment"
    assert "matcher" not in translate()["model"]["bbox_head"]
    # Evaluation matches nothing, and need not have the package.
    assert "matcher" not in translate(given, subtask="evaluate")["model"]["bbox_head"]


def test_profiling_is_a_hook_of_training(translate):
    def hooks(*overrides, **keywords):
        return [hook["type"] for hook in translate(*overrides, **keywords)["custom_hooks"]]

    assert "StepProfilerHook" not in hooks()
    assert "StepProfilerHook" in hooks("ddetr_mm.profile=true")
    assert "StepProfilerHook" not in hooks("ddetr_mm.profile=true", subtask="evaluate")
