"""The detector: golden outputs, padding, options for speed."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detr_builders import detector_config, golden, instances, padded_batch, sample
from golden_files import golden_state_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.registry import MODELS
from torch import Tensor

import ddetr_mm.register  # noqa: F401
from ddetr_mm.models import TAODeformableDETR
from ddetr_mm.models.deformable_attention import DeformableAttention
from ddetr_mm.models.detector import feature_sizes_hw, level_padding
from ddetr_mm.weights.formats import OFFICIAL, TAO, to_canonical

# --- Outputs ---

R50 = {
    "type": "ResNet",
    "depth": 50,
    "out_indices": (1, 2, 3),
    "frozen_stages": 1,
    "norm_cfg": {"type": "BN", "requires_grad": False},
    "norm_eval": True,
    "zero_init_residual": False,
}


def build(seed: int = 0, **kwargs) -> TAODeformableDETR:
    torch.manual_seed(seed)
    model = MODELS.build(detector_config(**kwargs))
    model.init_weights()
    return model


def shake(model: torch.nn.Module, seed: int = 0) -> None:
    """Random values where initial weights are zero, so that every path matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * noise)


def total(losses: dict[str, Tensor]) -> Tensor:
    return sum(losses.values())


@pytest.mark.parametrize("shared", [True, False])
def test_frozen_modules(shared: bool) -> None:
    model = build(with_box_refine=not shared, frozen_modules=["encoder", "bbox_head.cls_branches.1"])
    frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    expected = [*model.encoder.parameters(), *model.bbox_head.cls_branches[1].parameters()]
    assert frozen == set(map(id, expected))
    assert shared == (model.bbox_head.cls_branches[0] is model.bbox_head.cls_branches[1])
    with pytest.raises(ValueError, match="'enocder'; did you mean encoder"):
        build(frozen_modules=["enocder"])


# Reference outputs


@pytest.mark.parametrize(
    ("name", "table", "num_classes", "refine", "zeroed"),
    [("resnet50_4lvl", TAO, 8, True, False), ("official_4lvl", OFFICIAL, 9, False, True)],
)
def test_meets_tao_outputs(name, table, num_classes, refine, zeroed) -> None:
    expected = np.load(golden(f"{name}.npz"))
    weights, _trace = to_canonical(golden_state_dict(name), table)
    model = MODELS.build(
        detector_config(
            num_levels=4,
            width=256,
            num_heads=8,
            num_points=4,
            num_encoder_layers=2,
            num_decoder_layers=2,
            feedforward=128,
            num_groups=32,
            num_queries=20,
            num_classes=num_classes,
            dropout=0.3,
            backbone=R50,
            in_channels=[512, 1024, 2048],
            with_box_refine=refine,
            zero_padded_values=zeroed,
        )
    ).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert [key for key in missing if not key.endswith("num_batches_tracked")] == []

    images = torch.from_numpy(expected["images"])
    samples = [sample(tuple(size), tuple(images.shape[-2:])) for size in expected["valid_hw"]]
    with torch.no_grad():
        logits, boxes = model(images, samples, mode="tensor")
    np.testing.assert_allclose(logits, expected["pred_logits"], atol=1e-4)
    np.testing.assert_allclose(boxes, expected["pred_boxes"], atol=1e-4)


# mmdet as the yardstick


@pytest.mark.parametrize("two_stage", [False, True])
@pytest.mark.parametrize("refine", [False, True])
def test_equals_mmdet_when_padding_is_zeroed(refine: bool, two_stage: bool) -> None:
    """Same outputs, losses and gradients as mmdet's own detector, padding included."""
    config = detector_config(
        with_box_refine=refine,
        as_two_stage=two_stage,
        num_levels=3,
        width=256 if two_stage else 32,  # mmdet's proposals know no other width
        zero_padded_values=True,
    )
    torch.manual_seed(0)
    ours = MODELS.build(config)
    stock_config = copy.deepcopy(config)
    stock_config.update(type="DeformableDETR", data_preprocessor=None)
    stock_config.pop("zero_padded_values")
    stock_config["bbox_head"]["type"] = "DeformableDETRHead"
    stock = MODELS.build(stock_config)
    ours.init_weights()
    shake(ours)
    stock.load_state_dict(ours.state_dict())

    images, samples = padded_batch()
    losses = [model.train().loss(images, copy.deepcopy(samples)) for model in (ours, stock)]
    assert losses[0].keys() == losses[1].keys()
    for key, value in losses[0].items():
        torch.testing.assert_close(value, losses[1][key].squeeze(), rtol=1e-5, atol=1e-5)
    for loss in losses:
        total(loss).backward()
    for (name, mine), theirs in zip(ours.named_parameters(), stock.parameters(), strict=True):
        if mine.grad is None:
            assert theirs.grad is None or not theirs.grad.any(), name
        else:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)

    outputs = [model.eval()(images, samples, mode="tensor") for model in (ours, stock)]
    for mine, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_initial_weights_are_taos() -> None:
    model = build(with_box_refine=True, num_levels=2)
    prior = -math.log((1 - 0.01) / 0.01)
    for branch in model.bbox_head.cls_branches:
        torch.testing.assert_close(branch.bias.data, torch.full((4,), prior))
    for layer, branch in enumerate(model.bbox_head.reg_branches):
        assert not branch[-1].weight.any()
        assert branch[-1].bias.tolist() == ([0, 0, -2, -2] if layer == 0 else [0, 0, 0, 0])
    attention = model.encoder.layers[0].self_attn
    assert not attention.sampling_offsets.weight.any()
    assert not attention.attention_weights.weight.any()
    rays = attention.sampling_offsets.bias.reshape(4, 2, 2, 2)  # heads, levels, points, xy
    torch.testing.assert_close(rays[0, 0], torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    torch.testing.assert_close(rays[1, 0], torch.tensor([[0.0, 1.0], [0.0, 2.0]]), atol=1e-6, rtol=0)
    bound = math.sqrt(6 / (32 + 32))  # Xavier
    for weight in (attention.value_proj.weight, model.decoder.layers[0].self_attn.attn.out_proj.weight):
        assert 0.8 * bound < weight.abs().max() <= bound
    assert not model.neck.convs[0].conv.bias.any()
    assert not model.reference_points_fc.bias.any()
    assert 0.7 < model.level_embed.std() < 1.3
    assert 0.9 < model.query_embedding.weight.std() < 1.1


# Shapes and settings


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("num_levels", [1, 2, 3, 4, 5])
def test_levels_and_refinement(num_levels: int, refine: bool) -> None:
    model = build(num_levels=num_levels, with_box_refine=refine)
    shake(model)
    images, samples = padded_batch()
    logits, boxes = model.eval()(images, samples, mode="tensor")
    assert logits.shape == (2, 3, 12, 4)
    assert boxes.shape == (2, 3, 12, 4)
    assert ((boxes > 0) & (boxes < 1)).all()
    total(model.train().loss(images, samples)).backward()
    branches = model.bbox_head.reg_branches
    assert (branches[0] is branches[1]) == (not refine)
    assert model.level_embed.grad.abs().sum(1).min() > 0, "every level takes part"


@pytest.mark.parametrize(("width", "heads", "points"), [(32, 1, 1), (64, 8, 3), (96, 4, 4)])
def test_widths_heads_and_points(width: int, heads: int, points: int) -> None:
    model = build(width=width, num_heads=heads, num_points=points).eval()
    images, samples = padded_batch()
    logits, _boxes = model(images, samples, mode="tensor")
    assert model.encoder.layers[0].self_attn.sampling_offsets.out_features == heads * 2 * points * 2
    assert logits.isfinite().all()


def test_no_samples_means_no_padding() -> None:
    model = build().eval()
    shake(model)
    images, _samples = padded_batch()
    whole = [sample((64, 96), (64, 96)) for _ in images]
    for mine, theirs in zip(
        model(images, None, mode="tensor"), model(images, whole, mode="tensor"), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    logits, _boxes = model.train()(images, None, mode="tensor")  # mmdet's fails in training mode
    assert logits.shape == (2, 3, 12, 4)


def test_the_config_is_left_alone() -> None:
    config = detector_config()
    before = copy.deepcopy(config)
    MODELS.build(config)
    assert config == before


@pytest.mark.parametrize("refine", [False, True])
def test_nothing_is_read_back_from_the_device(refine: bool) -> None:
    """Tensors without data: reading one on the host raises."""
    model = MODELS.build(detector_config(with_box_refine=refine, zero_padded_values=True)).eval().to("meta")
    images, samples = padded_batch()
    logits, _boxes = model(images.to("meta"), samples, mode="tensor")
    assert logits.is_meta
    results = model(images.to("meta"), samples, mode="predict")
    assert results[0].pred_instances.bboxes.shape == (48, 4)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="num_feats must be half of the 32 channels, not 8"):
        MODELS.build(detector_config(positional_encoding={"num_feats": 8}))
    model = build(num_levels=2)
    model.num_feature_levels = 3
    with pytest.raises(ValueError, match="gives 2 levels, num_feature_levels is 3"):
        model(torch.zeros(1, 3, 64, 64), None, mode="tensor")


# Padding


@pytest.mark.parametrize("zeroed", [True, False])
def test_zeroed_padding_makes_predictions_independent_of_the_batch(zeroed: bool) -> None:
    """Positions that are multiples of all strides: only the padding itself can make a difference."""
    model = build(zero_padded_values=zeroed, num_levels=2, num_encoder_layers=2).eval()
    shake(model)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    # Past the neck, so that the backbone's reach over the border does not blur the comparison.
    features = [level.detach() for level in model.extract_feat(image)]
    padded = [torch.nn.functional.pad(level, (0, level.shape[-1]), value=3.0) for level in features]

    def outputs(levels: list[Tensor], batch_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
        inputs = model.forward_transformer(levels, [sample((64, 64), batch_hw)])
        return model.bbox_head(inputs["hidden_states"], inputs["references"])

    alone, batched = outputs(features, (64, 64)), outputs(padded, (64, 128))
    difference = max((a - b).abs().max().item() for a, b in zip(alone, batched, strict=True))
    if zeroed:
        assert difference < 1e-4
    else:
        assert difference > 1e-2


# Training


def test_loss_falls_on_one_image() -> None:
    model = build(num_levels=2, num_queries=8).train()
    images, samples = padded_batch()
    images, samples = images[:1], samples[:1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for _step in range(25):
        loss = total(model.loss(images, samples))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert np.mean(history[-5:]) < 0.6 * np.mean(history[:3])


def test_a_batch_without_objects_trains() -> None:
    model = build(with_box_refine=True).train()
    images, samples = padded_batch()
    for data_sample in samples:
        data_sample.gt_instances = instances([], [])
    losses = model.loss(images, samples)
    assert losses["loss_bbox"] == losses["loss_iou"] == 0
    assert losses["loss_cls"] > 0
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("refine", [False, True])
def test_activation_checkpointing_keeps_the_gradients(refine: bool) -> None:
    images, samples = padded_batch()
    gradients = []
    for checkpointed in (False, True):
        model = build(
            dropout=0.2, with_box_refine=refine, num_encoder_layers=2, activation_checkpoint=checkpointed
        ).train()
        calls = []
        model.encoder.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(5)
        total(model.loss(images, samples)).backward()
        assert len(calls) == (2 if checkpointed else 1), "computed again in the backward pass"
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_float32(dtype: torch.dtype) -> None:
    model = build(num_levels=3, num_encoder_layers=2).eval()
    shake(model)
    images, samples = padded_batch()
    logits, boxes = model(images, samples, mode="tensor")
    with torch.autocast("cpu", dtype):
        logits_half, boxes_half = model(images, samples, mode="tensor")
        losses = model.train().loss(images, samples)
    assert logits_half.dtype == boxes_half.dtype == torch.float32
    assert (logits_half - logits).abs().max() < 0.1
    assert (boxes_half - boxes).abs().max() < 0.02
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    total(losses).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# Prediction


def test_predictions_lie_in_the_original_image() -> None:
    model = build(test_cfg={"max_per_img": 5}).eval()
    shake(model)
    images, _samples = padded_batch()
    samples = [sample((64, 96), (64, 96), scale=0.5), sample((48, 96), (64, 96), scale=0.25)]
    results = model(images[:2], samples, mode="predict")
    _logits, boxes = model(images[:2], samples, mode="tensor")
    for index, (result, size_wh) in enumerate(zip(results, [(192, 128), (384, 192)], strict=True)):
        found = result.pred_instances
        assert found.bboxes.shape == (5, 4)
        assert found.labels.shape == found.scores.shape == (5,)
        assert (found.scores.diff() <= 0).all()
        centers = (found.bboxes[:, :2] + found.bboxes[:, 2:]) / 2 / torch.tensor(size_wh)
        nearest = (boxes[-1, index, None, :, :2] - centers[:, None]).abs().sum(-1).min(1).values
        assert nearest.max() < 1e-5, "relative to the unpadded image, scaled to the original"


def test_runs_through_the_preprocessor() -> None:
    model = build(test_cfg={"max_per_img": 3}).eval()
    images = [torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8) for _ in range(2)]
    results = model.test_step({"inputs": images, "data_samples": [sample((64, 96), (64, 96))] * 2})
    assert [len(result.pred_instances) for result in results] == [3, 3]


# --- Padding ---

SIDES = st.integers(1, 70)


@settings(deadline=None, max_examples=60)
@given(
    input_hw=st.tuples(SIDES, SIDES),
    shares=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=3),
    strides=st.lists(st.sampled_from([1, 4, 7, 8, 32]), min_size=1, max_size=3),
)
def test_equals_the_interpolated_mask(input_hw, shares, strides) -> None:
    """TAO's method: draw the mask at full size, then take the nearest pixel of each cell."""
    valid = [(max(1, round(a * input_hw[0])), max(1, round(b * input_hw[1]))) for a, b in shares]
    levels = [(-(-input_hw[0] // stride), -(-input_hw[1] // stride)) for stride in strides]
    masks, ratios = level_padding(valid, input_hw, levels, "cpu")
    drawn = torch.ones(len(valid), *input_hw)
    for image, (height, width) in enumerate(valid):
        drawn[image, :height, :width] = 0
    for level, size in enumerate(levels):
        expected = F.interpolate(drawn[None], size=size)[0].bool()
        if masks[level] is None:
            assert not expected.any()
            torch.testing.assert_close(ratios[:, level], torch.ones(1, 2))
            continue
        assert torch.equal(masks[level], expected)
        share_y = (~expected[:, :, 0]).float().mean(1)
        share_x = (~expected[:, 0]).float().mean(1)
        torch.testing.assert_close(ratios[:, level], torch.stack([share_x, share_y], -1))


def test_no_mask_without_padding() -> None:
    masks, ratios = level_padding([(8, 12), (8, 12)], (8, 12), [(4, 6), (2, 3)], "cpu")
    assert masks == [None, None]
    assert ratios.tolist() == [[[1, 1], [1, 1]]]


def test_feature_sizes() -> None:
    assert feature_sizes_hw([torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 2, 3)]) == ((4, 5), (2, 3))


# --- Options for speed ---


def build_for_speed(**options):
    torch.manual_seed(0)
    model = MODELS.build(detector_config(**options))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def step(model) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses and gradients of one batch."""
    images, samples = padded_batch()
    losses = model.train().loss(images, copy.deepcopy(samples))
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def test_only_the_parts_asked_for_are_compiled_and_names_stay() -> None:
    plain = build_for_speed()
    for compiled, parts in (
        ("none", set()),
        ("backbone", {"backbone"}),
        ("all", {"backbone", "neck", "encoder", "decoder"}),
    ):
        model = build_for_speed(compiled=compiled)
        assert model.state_dict().keys() == plain.state_dict().keys()
        found = {name for name, module in model.named_modules() if module._compiled_call_impl is not None}
        assert found == parts
    with pytest.raises(ValueError, match="compiled must be one of"):
        build_for_speed(compiled="head")


SHALLOW = {
    "backbone": {
        "type": "ResNet",
        "depth": 18,
        "base_channels": 8,
        "num_stages": 1,
        "strides": (1,),
        "dilations": (1,),
        "out_indices": (0,),
        "norm_cfg": {"type": "BN", "requires_grad": True},
        "norm_eval": False,
    },
    "in_channels": (8,),
}
"""One stage of a ResNet, and the second level from the neck: of every kind of layer one is compiled."""


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a C++ compiler runs some fifty times
@pytest.mark.parametrize(
    ("backend", "options"), [("aot_eager", {}), ("inductor", SHALLOW)], ids=["aot_eager", "inductor"]
)
def test_a_compiled_detector_has_the_same_losses_and_gradients(backend: str, options: dict) -> None:
    torch._dynamo.reset()
    expected_losses, expected = step(build_for_speed(**options))
    losses, gradients = step(build_for_speed(compiled="all", compile_options={"backend": backend}, **options))
    for name, loss in expected_losses.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_predictions_in_half_precision_are_close_and_float32(dtype: str) -> None:
    images, samples = padded_batch()
    plain, half = build_for_speed().eval(), build_for_speed(predict_dtype=dtype).eval()
    seen = []
    half.encoder.layers[0].ffn.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.no_grad():
        expected = plain.predict(images, copy.deepcopy(samples))
        found = half.predict(images, copy.deepcopy(samples))
    assert set(seen) <= {getattr(torch, dtype), torch.float32} and seen
    for one, other in zip(found, expected, strict=True):
        assert one.pred_instances.scores.dtype == one.pred_instances.bboxes.dtype == torch.float32
        torch.testing.assert_close(
            one.pred_instances.scores, other.pred_instances.scores, rtol=0.05, atol=0.02
        )
    with pytest.raises(ValueError, match="predict_dtype must be"):
        build_for_speed(predict_dtype="int8")


def test_the_attention_reaches_every_module() -> None:
    model = build_for_speed(attention="torch")
    found = {module.implementation for module in model.modules() if isinstance(module, DeformableAttention)}
    assert found == {"torch"}
    images, samples = padded_batch()
    ours, reference = build_for_speed().eval(), model.eval()
    with torch.no_grad():
        for one, other in zip(
            ours._forward(images, samples), reference._forward(images, samples), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="attention must be one of"):
        build_for_speed(attention="flash")
