"""The spec section ``model``: the effect of each field on the network."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn

from ddetr_mm.errors import SpecError
from ddetr_mm.models import GCViT
from ddetr_mm.translate.model import without_unread_stages

IMAGES = torch.zeros(1, 3, 64, 96)


def built_backbone(config) -> nn.Module:
    """The backbone of a config; mmdet's ``ResNet.train`` returns nothing, so it is not called in a chain."""
    backbone = MODELS.build(config.model.backbone)
    backbone.train(True)
    return backbone


@torch.no_grad()
def outputs(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and boxes of every decoder layer on an empty image."""
    return model.eval()(IMAGES, None, mode="tensor")


@pytest.mark.parametrize(
    ("override", "axis", "size"),
    [
        ("model.dec_layers=3", 0, 3),
        ("model.num_queries=20", 2, 20),
        ("dataset.num_classes=9", 3, 9),
    ],
)
def test_output_shape(tiny_model, override: str, axis: int, size: int):
    logits, _ = outputs(tiny_model(override))
    usual, _ = outputs(tiny_model())
    assert logits.shape[axis] == size != usual.shape[axis]


@pytest.mark.parametrize(
    ("override", "parameter", "shape"),
    [
        ("model.hidden_dim=64", "level_embed", (2, 64)),
        ("model.dim_feedforward=48", "encoder.layers.0.ffn.layers.0.0.weight", (48, 32)),
        ("model.enc_layers=2", "encoder.layers.1.ffn.layers.0.0.weight", (32, 32)),
        # heads x levels x points rows, and two coordinates for each offset
        ("model.nheads=2", "encoder.layers.0.self_attn.attention_weights.weight", (2 * 2 * 4, 32)),
        ("model.enc_n_points=3", "encoder.layers.0.self_attn.sampling_offsets.weight", (4 * 2 * 3 * 2, 32)),
        ("model.dec_n_points=2", "decoder.layers.0.cross_attn.sampling_offsets.weight", (4 * 2 * 2 * 2, 32)),
    ],
)
def test_parameter_shape(tiny_model, override: str, parameter: str, shape: tuple[int, ...]):
    model = tiny_model(override)
    assert tuple(model.state_dict()[parameter].shape) == shape
    usual = tiny_model().state_dict()
    assert parameter not in usual or tuple(usual[parameter].shape) != shape
    assert torch.isfinite(outputs(model)[1]).all()


def test_num_select_is_the_number_of_detections(tiny_model, training_batch):
    for kept in (5, 12):
        model = tiny_model(f"model.num_select={kept}").eval()
        data = model.data_preprocessor(training_batch())
        with torch.no_grad():
            results = model(**data, mode="predict")
        assert [len(one.pred_instances) for one in results] == [kept, kept]


def test_the_backbone_is_the_one_asked_for(tiny_config):
    drop = "ddetr_mm.backbone=null"
    for name, kind, channels in (
        ("resnet_50", "ResNet", [1024, 2048]),
        ("gc_vit_xxtiny", "GCViT", [256, 512]),
    ):
        config = tiny_config(drop, f"model.backbone={name}")
        backbone = built_backbone(config)
        with torch.no_grad():
            features = backbone(IMAGES)
        assert type(backbone).__name__ == kind
        assert [feature.shape[1] for feature in features] == channels == config.model.neck.in_channels


@pytest.mark.parametrize("stages", [[0, 2], [1]])
@pytest.mark.parametrize(
    "backbone",
    [
        ("model.backbone=resnet_50",),
        ("model.backbone=resnet_50", "model.dilation=True"),
        ("ddetr_mm.backbone={type: ResNet, depth: 18, num_stages: 4, out_indices: STAGES}",),
        ("ddetr_mm.backbone={type: mmdet.ResNet, depth: 34, frozen_stages: 4, out_indices: STAGES}",),
        ("ddetr_mm.backbone={type: ResNeXt, depth: 50, groups: 32, base_width: 4, out_indices: STAGES}",),
        ("ddetr_mm.backbone={type: GCViT, variant: xxtiny, out_indices: STAGES}",),
        ("model.backbone=gc_vit_large_384",),
    ],
)
def test_only_the_stages_that_are_read_are_built(tiny_config, backbone, stages):
    levels = [*stages, 4]
    names = [text.replace("STAGES", str(stages)) for text in backbone]
    own = "ddetr_mm.backbone" in backbone[0]
    keys = [
        *names,
        *([] if own else ["ddetr_mm.backbone=null"]),
        f"model.return_interm_indices={levels}",
        f"model.num_feature_levels={len(levels)}",
    ]
    config = tiny_config(*keys).model.backbone
    with torch.device("meta"):
        ours = MODELS.build(copy.deepcopy(config))
    built = {key for key, _ in ours.named_parameters()}
    last = stages[-1] + 1
    if config.type == "GCViT":
        with torch.device("meta"):
            whole = GCViT(config.variant, out_indices=stages + [3] * (3 not in stages), drop_path_rate=0.0)
        unread = (*(f"levels.{stage}." for stage in range(last, 4)), f"levels.{last - 1}.downsample.")
        unread += () if 3 in stages else ("norm3.",)
    else:
        options = {key: value for key, value in config.items() if "st" not in key and "dil" not in key}
        options["type"] = config.type.replace("TorchvisionDilated", "")
        with torch.device("meta"):
            whole = MODELS.build(dict(options, out_indices=(3,)))
        unread = tuple(f"layer{stage + 1}." for stage in range(last, 4))
    assert built == {key for key, _ in whole.named_parameters() if not key.startswith(unread)}


@pytest.mark.parametrize("stages", [[0, 2], [1], [3]])
@pytest.mark.parametrize("kind", ["ResNet", "TorchvisionDilatedResNet"])
def test_a_backbone_without_unread_stages_has_equal_features(kind, stages):
    config = dict(type=kind, depth=50, base_channels=8, out_indices=stages)
    short = MODELS.build(without_unread_stages(config))
    whole = MODELS.build(dict(config, out_indices=[0, 1, 2, 3]))
    short.load_state_dict({key: whole.state_dict()[key] for key in short.state_dict()}, strict=True)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole(images)
        found = short(images)
    assert [torch.equal(one, expected[stage]) for one, stage in zip(found, stages, strict=True)] == [
        True
    ] * len(stages)


def test_dilation_keeps_the_last_stage_at_stride_16(tiny_config):
    for dilation, stride in ((False, 32), (True, 16)):
        config = tiny_config("ddetr_mm.backbone=null", f"model.dilation={dilation}")
        with torch.no_grad():
            last = built_backbone(config)(IMAGES)[-1]
        assert last.shape[-2:] == (64 // stride, 96 // stride)


@pytest.mark.parametrize("name", ["resnet_50", "gc_vit_xxtiny"])
def test_train_backbone_freezes_all_of_it(tiny_config, name: str):
    def trained(flag: bool) -> set[str]:
        config = tiny_config(
            "ddetr_mm.backbone=null", f"model.backbone={name}", f"model.train_backbone={flag}"
        )
        return {key for key, value in built_backbone(config).named_parameters() if value.requires_grad}

    assert not trained(False)
    # TAO never trains the stem and the first stage of a ResNet.
    never = ("conv1", "bn1", "layer1") if name == "resnet_50" else ("no such",)
    assert trained(True)
    assert not [key for key in trained(True) if key.startswith(never)]


def test_with_box_refine_lets_a_layer_start_from_the_one_before(tiny_model):
    for refine in (True, False):
        model = tiny_model(f"model.with_box_refine={refine}")
        before = outputs(model)[1]
        with torch.no_grad():
            # Without refinement all layers share one branch; only its first use may matter then.
            model.bbox_head.reg_branches[0][-1].bias += 1.0
        after = outputs(model)[1]
        shared = model.bbox_head.reg_branches[0] is model.bbox_head.reg_branches[1]
        assert shared is not refine
        if refine:
            assert not torch.allclose(before[-1], after[-1])  # through the reference points alone


def losses(model: nn.Module, batch: dict) -> dict[str, float]:
    """The losses of a training batch."""
    data = model.train().data_preprocessor(batch, True)
    return {name: float(value) for name, value in model(**data, mode="loss").items()}


ONE_QUERY = ("model.num_queries=1", "model.num_select=1")  # there is only one way to match it


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("model.cls_loss_coef=6", "loss_cls"),
        ("model.bbox_loss_coef=15", "loss_bbox"),
        ("model.giou_loss_coef=6", "loss_iou"),
    ],
)
def test_a_loss_is_multiplied_by_its_coefficient(tiny_model, training_batch, override: str, name: str):
    usual = losses(tiny_model(*ONE_QUERY), training_batch())
    changed = losses(tiny_model(*ONE_QUERY, override), training_batch())
    for key, value in changed.items():
        factor = 3 if key.endswith(name) else 1
        assert value == pytest.approx(factor * usual[key], rel=1e-5), key


def test_coefficients_decide_the_matching_too(tiny_model):
    weights = {}
    for override in ("model.cls_loss_coef=2", "model.cls_loss_coef=50"):
        cost = tiny_model(override).bbox_head.matching_cost
        weights[override] = cost
    assert weights["model.cls_loss_coef=2"] != weights["model.cls_loss_coef=50"]


def test_focal_alpha_weighs_positives(tiny_model, training_batch):
    usual = losses(tiny_model(*ONE_QUERY), training_batch())
    changed = losses(tiny_model(*ONE_QUERY, "model.focal_alpha=0.9"), training_batch())
    # At the start every class is unlikely, so positives are nearly all of the loss.
    assert changed["loss_cls"] > 2 * usual["loss_cls"]
    assert changed["loss_bbox"] == pytest.approx(usual["loss_bbox"], rel=1e-5)


@pytest.mark.parametrize("kind, zero", [("labels", ("loss_bbox", "loss_iou")), ("boxes", ("loss_cls",))])
def test_a_loss_type_left_out_counts_nothing(tiny_model, training_batch, kind: str, zero: tuple[str, ...]):
    found = losses(tiny_model(f"model.loss_types=[{kind}]"), training_batch())
    assert {key for key, value in found.items() if value == 0} == {key for key in found if key.endswith(zero)}


def test_without_aux_loss_only_the_last_layer_learns(tiny_model, training_batch):
    assert set(losses(tiny_model("model.aux_loss=False"), training_batch())) == {
        "loss_cls",
        "loss_bbox",
        "loss_iou",
    }
    assert "d0.loss_cls" in losses(tiny_model(), training_batch())


def test_dropout_ratio_drops_in_training(tiny_model, training_batch):
    for ratio, equal in ((0.0, True), (0.5, False)):
        model = tiny_model(f"model.dropout_ratio={ratio}")
        for module in model.backbone.modules():
            module.train(False)
        found = []
        for _ in range(2):
            data = model.data_preprocessor(training_batch(), True)
            model.encoder.train(), model.decoder.train()
            found.append(float(model(**data, mode="loss")["loss_cls"]))
        assert (found[0] == found[1]) is equal
        assert {module.p for module in model.encoder.modules() if isinstance(module, nn.Dropout)} == {ratio}


@pytest.mark.parametrize("backbone", ["resnet_50", "gc_vit_xxtiny"])
def test_activation_checkpoint_recomputes_with_equal_gradients(tiny_model, training_batch, backbone: str):
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = tiny_model(
            "ddetr_mm.backbone=null",
            f"model.backbone={backbone}",
            f"train.activation_checkpoint={checkpointing}",
        )
        model.train()
        counts: Counter[str] = Counter()
        watched = {
            "backbone": model.backbone.layer4[0].conv2
            if backbone == "resnet_50"
            else model.backbone.levels[3].blocks[0].mlp,
            "encoder": model.encoder.layers[0].ffn,
            "decoder": model.decoder.layers[1].ffn,
        }
        for name, module in watched.items():
            module.register_forward_hook(lambda *_, name=name, seen=counts: seen.update([name]))
        torch.manual_seed(2)  # GCViT's drop path draws
        data = model.data_preprocessor(training_batch(), True)
        sum(model(**data, mode="loss").values()).backward()
        calls.append(dict(counts))
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert calls == [dict(backbone=1, encoder=1, decoder=1), dict(backbone=2, encoder=2, decoder=2)]
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-6)


def test_frozen_parts_keep_their_weights_in_a_step(tiny_model, training_batch, monkeypatch):
    with pytest.raises(SpecError, match="no_such_part"):
        tiny_model("train.freeze=[backbone, transformer.encoder, input_proj, no_such_part]")
    logged: list[str] = []
    monkeypatch.setattr("ddetr_mm.models.detector.print_log", lambda text, *_: logged.append(text))
    model = tiny_model("train.freeze=[backbone, transformer.encoder, input_proj]")
    assert [line.partition(":")[0] for line in logged] == [
        f"Freezed module [{name}]" for name in ("backbone", "encoder", "neck")
    ]
    before = {key: value.clone() for key, value in model.named_parameters()}
    data = model.train().data_preprocessor(training_batch(), True)
    sum(model(**data, mode="loss").values()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    changed = {
        key.split(".")[0] for key, value in model.named_parameters() if not torch.equal(value, before[key])
    }
    # At the start attention does not look at positions, so the level embeddings get no gradient yet.
    assert changed - {"level_embed"} == {"decoder", "query_embedding", "reference_points_fc", "bbox_head"}


@pytest.mark.parametrize("precise", [False, True])
def test_precise_msda_demands_deterministic_attention(tiny_model, monkeypatch, precise: bool):
    from ddetr_mm.models import deformable_attention

    demanded = []

    def sample(*arguments):
        demanded.append(arguments[-1])
        return original(*arguments)

    original = deformable_attention.sample_values
    monkeypatch.setattr(deformable_attention, "sample_values", sample)
    model = tiny_model(f"model.precise_msda={precise}")
    outputs(model)
    assert demanded == [precise] * (len(model.encoder.layers) + len(model.decoder.layers))


def test_normalisation_of_the_input(tiny_config, training_batch):
    plain = ("dataset.augmentation.input_mean=[0]", "dataset.augmentation.input_std=[1]")
    other = ("dataset.augmentation.input_mean=[0.5, 0.25, 0.0]", "dataset.augmentation.input_std=[0.5]")
    raw, changed = (
        MODELS.build(tiny_config(*overrides).model.data_preprocessor)(training_batch())["inputs"]
        for overrides in (plain, other)
    )
    mean = torch.tensor([0.5, 0.25, 0.0])[None, :, None, None]
    torch.testing.assert_close(changed, (raw - mean) / 0.5, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "in_training", "elsewhere"),
    [
        ((), (64, 96), (64, 96)),
        (("scales=[64, 80]",), (80, 96), (64, 96)),
        (("test_random_resize=72",), (64, 96), (72, 96)),
        (("test_random_resize=110",), (64, 96), (96, 110)),
        (("random_resize_max_size=112",), (64, 112), (64, 112)),
        (("fixed_padding=False",), (40, 50), (40, 50)),
        (("fixed_padding=False", "pad_size_divisor=32"), (40, 50), (64, 64)),
        (("scales=[64, 80]", "pad_size_divisor=32"), (80, 96), (64, 64)),
        (("fixed_random_crop=128",), (128, 128), (64, 96)),
        (("fixed_random_crop=128", "fixed_padding=False"), (128, 128), (40, 50)),
        (("fixed_random_crop=128", "pad_size_divisor=32"), (128, 128), (64, 64)),
    ],
)
def test_padding_of_a_batch(tiny_config, training_batch, overrides, in_training, elsewhere):
    """Padding by mode, landscape and portrait, with 0 after normalisation."""
    overrides = [f"dataset.augmentation.{one}" for one in overrides]
    expected = [("train", True, in_training)]
    expected += [(subtask, False, elsewhere) for subtask in ("train", "evaluate", "inference")]
    for subtask, training, size_hw in expected:
        preprocessor = MODELS.build(tiny_config(*overrides, subtask=subtask).model.data_preprocessor)
        for portrait in (False, True):
            batch = training_batch()
            batch["inputs"] = [image[:, :40, :50] for image in batch["inputs"]]
            if portrait:
                batch["inputs"] = [image.transpose(1, 2) for image in batch["inputs"]]
            shape = tuple(batch["inputs"][0].shape[-2:])
            for sample in batch["data_samples"]:
                sample.set_metainfo(dict(img_shape=shape))
            found = preprocessor(batch, training)
            inputs = found["inputs"]
            assert tuple(inputs.shape[-2:]) == (size_hw[::-1] if portrait else size_hw), subtask
            assert found["data_samples"][0].img_shape == shape
            assert found["data_samples"][0].batch_input_shape == tuple(inputs.shape[-2:])
            assert not inputs[:, :, shape[0] :].any() and not inputs[..., shape[1] :].any()


def test_the_exported_graph_is_not_padded(tiny_config):
    padding = ("dataset.augmentation.fixed_padding=True", "dataset.augmentation.pad_size_divisor=32")
    preprocessor = tiny_config(*padding, subtask="export").model.data_preprocessor
    assert preprocessor.pad_short_long is None and preprocessor.pad_size_divisor == 1
