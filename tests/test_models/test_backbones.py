"""Channels of backbone configs, dilated ResNet and fused batch norms."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detr_builders import detector_config, padded_batch
from mmdet.registry import MODELS
from torch import nn
from torchvision.models import resnet50

import ddetr_mm.register  # noqa: F401
from ddetr_mm.errors import SpecError
from ddetr_mm.models import feature_channels
from ddetr_mm.models.backbones import FoldedConv2d, TorchvisionDilatedResNet, fuse_norms


@pytest.mark.parametrize(
    ("config", "channels"),
    [
        ({"type": "ResNet", "depth": 18, "base_channels": 16}, [16, 32, 64, 128]),
        ({"type": "ResNet", "depth": 50, "out_indices": (1, 3)}, [512, 2048]),
        (
            {"type": "SwinTransformer", "embed_dims": 24, "depths": (1, 1, 1, 1), "out_indices": (1, 2, 3)},
            [48, 96, 192],
        ),
        ({"type": "TorchvisionDilatedResNet", "depth": 50, "out_indices": (2, 3)}, [1024, 2048]),
    ],
)
def test_channels(config, channels) -> None:
    assert feature_channels(config) == channels


def test_convnext_of_mmpretrain() -> None:
    pytest.importorskip("mmpretrain.models")
    config = {
        "type": "mmpretrain.ConvNeXt",
        "arch": "atto",
        "out_indices": (1, 2, 3),
        "gap_before_final_norm": False,
    }
    assert feature_channels(config) == [80, 160, 320]


def test_config_pretrained_weights_and_random_state_are_left_alone() -> None:
    config = {
        "type": "ResNet",
        "depth": 18,
        "init_cfg": {"type": "Pretrained", "checkpoint": "no/such/file.pth"},
    }
    before = copy.deepcopy(config)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert feature_channels(config) == [64, 128, 256, 512]
    assert torch.equal(torch.rand(4), expected)
    assert config == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "ResNett", "depth": 18}, "is not registered.*ResNett"),
        ({"type": "ResNet", "depth": 19}, "invalid depth 19"),
        ({"type": "ResNet", "depth": 18, "colour": "red"}, "unexpected keyword argument 'colour'"),
        ({"type": "mmnosuch.Backbone"}, "is not registered"),
        ({"type": "os.system", "command": "true"}, "is not registered"),
        ({"type": "ResNet", "depth": 18, "norm_cfg": {"type": "builtins.print"}}, "is not registered"),
        ({"depth": 18}, "needs a type"),
        ("ResNet", "needs a type"),
        ({"type": "L1Loss"}, "cannot be built and run"),
    ],
)
def test_wrong_configs_are_explained(config, message) -> None:
    with pytest.raises(SpecError, match=message) as error:
        feature_channels(config)
    assert error.value.problems[0].hint


def test_other_outputs_than_feature_maps_are_refused() -> None:
    from mmdet.registry import MODELS

    @MODELS.register_module(force=True)
    class OneVector(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            return [image.mean((2, 3))]

    with pytest.raises(SpecError, match="does not return a list of feature maps"):
        feature_channels({"type": "OneVector"})


# --- Fused batch norms ---

sys.path.append(str(Path(__file__).resolve().parent))


def with_moved_norms(model: nn.Module) -> nn.Module:
    """Statistics and weights that a training might have left."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.copy_(0.2 * torch.rand(tensor.shape, generator=generator) + 0.5)
    model.eval()  # mmdet's ResNet returns nothing here
    return model


@pytest.mark.parametrize(
    "backbone",
    [
        dict(type="ResNet", depth=18, base_channels=8, num_stages=4, norm_eval=False),
        dict(type="ResNet", depth=50, base_channels=4, num_stages=4, deep_stem=True, avg_down=True),
        dict(type="TorchvisionDilatedResNet", depth=50, base_channels=4, num_stages=4),
    ],
    ids=["18", "50 with a deep stem", "dilated"],
)
def test_features_stay(backbone):
    config = dict(backbone, out_indices=(1, 2, 3), norm_cfg=dict(type="BN"), style="pytorch")
    model = with_moved_norms(MODELS.build(config))
    fused = copy.deepcopy(model)
    assert fuse_norms(fused) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) > 0
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(fused(images), model(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert fuse_norms(fused) == 0


def test_a_detector_predicts_the_same_and_others_are_left_alone():
    torch.manual_seed(0)
    model = with_moved_norms(MODELS.build(detector_config()))
    fused = copy.deepcopy(model)
    fuse_norms(fused)
    images, samples = padded_batch()
    data = {"inputs": list((images * 50).to(torch.uint8)), "data_samples": samples}
    with torch.no_grad():
        for one, other in zip(model.test_step(data), fused.test_step(data), strict=True):
            torch.testing.assert_close(one.pred_instances.scores, other.pred_instances.scores)
            torch.testing.assert_close(one.pred_instances.bboxes, other.pred_instances.bboxes)
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert fuse_norms(plain) == 0


def test_the_order_of_values_in_memory_changes_no_feature():
    torch.manual_seed(0)
    model = with_moved_norms(MODELS.build(detector_config()))
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        levels = model.extract_feat(images)
        expected = model.neck(model.backbone(images))
    for ours, theirs in zip(levels, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert levels[0].is_contiguous(memory_format=torch.channels_last)
    assert model.extract_feat(images)[0].is_contiguous()  # in training, see there


@pytest.mark.parametrize(("side", "channels_last"), [(256, True), (192, False)])
def test_training_in_bfloat16_on_a_cpu_has_channels_last_but_for_small_images(side: int, channels_last: bool):
    model = frozen_norms_model().float()
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        levels = model.extract_feat(images)
        assert levels[0].is_contiguous(memory_format=torch.channels_last) is channels_last
        model.channels_last = False
        others = model.extract_feat(images)
    for one, other in zip(levels, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    sum(level.float().square().mean() for level in levels).backward()
    gradients = [parameter.grad for parameter in model.backbone.parameters() if parameter.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)


def test_training_in_channels_last_as_on_a_gpu_changes_no_loss_gradient_or_layout_of_weights():
    batch = padded_batch()
    found = {}
    for channels_last in (False, True):
        model = frozen_norms_model()
        model.channels_last = channels_last
        with torch.backends.mkldnn.flags(enabled=False):  # see extract_feat
            levels = model.extract_feat(batch[0].double())
            losses, gradients = losses_and_gradients(model, batch)
            model.loss(batch[0].double(), batch[1])["loss_cls"].backward()
        assert levels[0].is_contiguous(memory_format=torch.channels_last) is channels_last
        found[channels_last] = (levels, losses, gradients)
        assert all(value.is_contiguous() for value in model.state_dict().values())
        # What an optimizer keeps has the layout of the parameters.
        assert all(one.grad.is_contiguous() for one in model.parameters() if one.grad is not None)
    for one, other in zip(*(parts[0] for parts in found.values()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    for place in (1, 2):
        torch.testing.assert_close(found[True][place], found[False][place], rtol=1e-6, atol=1e-9)


# --- Folding of frozen norms in training ---

FROZEN_NORMS = {"norm_cfg": {"type": "BN", "requires_grad": False}, "norm_eval": True}


def frozen_norms_model(frozen_stages: int = 1, depth: int = 18, **options) -> nn.Module:
    """A detector in training with float64 weights, moved norms that are frozen, and frozen first stages."""
    torch.manual_seed(0)
    backbone = {
        "type": "ResNet",
        "depth": depth,
        "base_channels": 8,
        "out_indices": [2, 3],
        "frozen_stages": frozen_stages,
        "style": "pytorch",
        **FROZEN_NORMS,
    }
    expansion = 4 if depth >= 50 else 1
    options.setdefault("in_channels", [32 * expansion, 64 * expansion])
    model = with_moved_norms(MODELS.build(detector_config(num_levels=3, backbone=backbone, **options)))
    return model.double().train()


def losses_and_gradients(model, batch):
    """Losses of a batch, and the gradients of everything that trains."""
    images, samples = batch
    losses = model.loss(images.double(), samples)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    total = sum(value for name, value in losses.items() if "loss" in name)
    gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    pairs = zip(trained, gradients, strict=True)
    return losses, {name: gradient for name, gradient in pairs if gradient is not None}


def unfolded(model: nn.Module) -> nn.Module:
    """The model, which will not fold."""
    model._has_folded_norms = True
    return model


@pytest.mark.parametrize("frozen_stages", [-1, 1, 4])
@pytest.mark.parametrize("depth", [18, 50])
def test_folded_norms_in_training_change_no_loss_and_no_gradient(depth, frozen_stages) -> None:
    batch = padded_batch()
    plain, folded = (frozen_norms_model(frozen_stages, depth) for _ in range(2))
    keys = list(folded.state_dict())
    expected = losses_and_gradients(unfolded(plain), batch)
    found = losses_and_gradients(folded, batch)
    convolutions = [one for one in folded.backbone.modules() if isinstance(one, FoldedConv2d)]
    assert len(convolutions) == {18: 20, 50: 53}[depth]
    assert any(one.folds_once for one in convolutions) is (frozen_stages > 0)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert found[1].keys() == expected[1].keys()
    assert any(name.startswith("backbone.") for name in found[1]) is (frozen_stages < 4)
    for name, gradient in expected[1].items():
        largest = gradient.abs().max()
        assert (found[1][name] - gradient).abs().max() <= 1e-6 * largest, name
    # Names and values of weights are those of the network that does not fold.
    assert list(folded.state_dict()) == keys
    for name, value in plain.state_dict().items():
        assert torch.equal(folded.state_dict()[name], value), name


def test_norms_that_train_are_not_folded_and_those_that_begin_to_are_applied_again() -> None:
    batch = padded_batch()
    trains = MODELS.build(detector_config())  # its norms compute statistics
    trains.loss(*batch)
    assert not any(isinstance(one, FoldedConv2d) for one in trains.modules())
    model, plain = frozen_norms_model(), unfolded(frozen_norms_model())
    losses_and_gradients(model, batch)
    for one in (model, plain):
        for norm in one.backbone.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.requires_grad_(True)
    found, expected = losses_and_gradients(model, batch), losses_and_gradients(plain, batch)
    assert found[1].keys() == expected[1].keys() and "backbone.bn1.weight" in found[1]
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-12)


def test_what_is_folded_once_follows_weights_that_are_loaded_later() -> None:
    batch = padded_batch()
    model = frozen_norms_model(frozen_stages=4)
    before = losses_and_gradients(model, batch)[0]["loss_cls"]
    with torch.no_grad():
        again = model.loss(batch[0].double(), batch[1])["loss_cls"]
    torch.testing.assert_close(again, before.detach())
    other = frozen_norms_model(frozen_stages=4)
    with torch.no_grad():
        for value in other.state_dict().values():
            if value.is_floating_point():
                value.mul_(1.1)
    model.load_state_dict(other.state_dict())
    expected = losses_and_gradients(unfolded(other), batch)[0]["loss_cls"]
    found = losses_and_gradients(model, batch)[0]["loss_cls"]
    assert not torch.isclose(expected, before, rtol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_folded_network_is_copied_fused_and_traced_as_any_other() -> None:
    images, samples = padded_batch()
    model, plain = frozen_norms_model(), frozen_norms_model().eval()
    model.loss(images.double(), samples)
    average = copy.deepcopy(model)  # as averaged weights are made
    with torch.no_grad():
        for value in average.parameters():
            value.mul_(1.2)
        moved = unfolded(frozen_norms_model())
        moved.load_state_dict(average.state_dict())
        torch.testing.assert_close(
            average.extract_feat(images.double())[0], moved.extract_feat(images.double())[0]
        )
        expected = plain.extract_feat(images.double())[0]
        model.eval()
        torch.testing.assert_close(model.extract_feat(images.double())[0], expected)
        graph = str(torch.jit.trace(model.backbone, images.double()).inlined_graph)
        assert graph.count("aten::batch_norm") == 20
        assert fuse_norms(model) == 20
        torch.testing.assert_close(model.extract_feat(images.double())[0], expected)


def test_a_folded_backbone_is_compiled_as_one_graph() -> None:
    batch = padded_batch()
    model = frozen_norms_model()
    model.backbone.compile(backend="aot_eager", fullgraph=True)
    found = losses_and_gradients(model, batch)
    assert any(isinstance(one, FoldedConv2d) for one in model.modules())
    expected = losses_and_gradients(unfolded(frozen_norms_model()), batch)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-9)


SHARDED = """
import sys
import ddetr_mm.register
import torch
from ddetr_mm.engine.fsdp import shard, whole_tensors
from ddetr_mm.models.backbones import FoldedConv2d
from test_backbones import frozen_norms_model, padded_batch, unfolded

torch.distributed.init_process_group("gloo")
images, samples = padded_batch()
found = []
for prepare in (lambda model: model, unfolded):
    model = prepare(frozen_norms_model())
    shard(model, "cpu")
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        losses = model(images.double(), samples, mode="loss")
        sum(value for name, value in losses.items() if "loss" in name).backward()
        optimizer.step()
    num_folded = sum(isinstance(one, FoldedConv2d) for one in model.modules())
    found.append((num_folded, whole_tensors(model.state_dict())))
torch.distributed.destroy_process_group()
(num_folded, weights), (none, expected) = found
assert (num_folded, none) == (20, 0)
assert list(weights) == list(expected)
for name, value in expected.items():
    torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-12)
print("equal")
"""


@pytest.mark.slow
def test_a_folded_network_trains_sharded(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here.parents[1], here.parent, here)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["equal", "equal"]


def test_folding_after_inference_mode_trains() -> None:
    images, samples = padded_batch()
    model = frozen_norms_model()
    model.loss(images.double(), samples)
    for convolution in model.backbone.modules():
        if isinstance(convolution, FoldedConv2d):
            convolution.known.clear()
    with torch.inference_mode():
        model.extract_feat(images.double())
    assert losses_and_gradients(model, (images, samples))[1]["backbone.layer2.0.conv1.weight"].any()


@pytest.mark.parametrize(
    ("dilated", "strides", "dilations"),
    [
        ([False, False, True], (1, 2, 2, 1), (1, 1, 1, 2)),
        ([False, True, True], (1, 2, 1, 1), (1, 1, 2, 4)),
        ([False, False, False], (1, 2, 2, 2), (1, 1, 1, 1)),
    ],
)
def test_equals_torchvision(dilated, strides, dilations) -> None:
    torch.manual_seed(0)
    theirs = resnet50(weights=None, replace_stride_with_dilation=dilated).eval()
    ours = MODELS.build(
        {"type": "TorchvisionDilatedResNet", "depth": 50, "strides": strides, "dilations": dilations}
    )
    ours.eval()  # mmdet's ResNet does not return itself
    weights = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    ours.load_state_dict(weights)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        found = ours(image)
        for stage, feature in zip(
            (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), found, strict=True
        ):
            features = stage(features)
            torch.testing.assert_close(feature, features, rtol=1e-4, atol=1e-5)


def test_the_last_stage_is_dilated_by_default() -> None:
    model = TorchvisionDilatedResNet(depth=50)
    convolutions = [(block.conv2.stride, block.conv2.dilation, block.conv2.padding) for block in model.layer4]
    assert convolutions == [((1, 1), (1, 1), (1, 1)), *[((1, 1), (2, 2), (2, 2))] * 2]


def test_small_depths_are_refused() -> None:
    with pytest.raises(ValueError, match="only depths from 50 up can be dilated, not 18"):
        TorchvisionDilatedResNet(depth=18)
