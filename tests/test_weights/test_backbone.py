"""Backbones alone: torchvision, timm, detectors' backbones, and wrong files."""

import pytest
import timm
import torch
import torchvision
from weights_builders import detector, resnet, write_golden, write_mmdet

from ddetr_mm.errors import WeightsError
from ddetr_mm.weights import convert_checkpoint, load_backbone


def mmdet_resnet(depth=50):
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    import ddetr_mm.models  # noqa: F401

    register_all_modules()
    torch.manual_seed(0)
    return MODELS.build(resnet(depth, (0, 1, 2, 3)))


def save(path, content):
    torch.save(content, path)
    return path


def without_init(make, *arguments, **options):
    """A module with its memory unset: initialising tens of millions of weights takes seconds."""
    with torch.device("meta"):
        model = make(*arguments, **options)
    return model.to_empty(device="cpu")


def randomised(model, seed=0):
    """Random values in every buffer and parameter, variances positive."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(noise.abs() + 0.5 if key.endswith("running_var") else noise * 0.05)
    model.eval()
    return model


@pytest.mark.parametrize("origin", ["torchvision", "timm"])
def test_resnet_50_gives_its_origins_features(origin, tmp_path):
    images = torch.randn(1, 3, 64, 96)
    if origin == "torchvision":
        model = randomised(without_init(torchvision.models.resnet50))
        x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
        expected = model.layer4(model.layer3(model.layer2(model.layer1(x))))
    else:
        model = randomised(without_init(timm.create_model, "resnet50", pretrained=False))
        expected = model.forward_features(images)
    backbone = mmdet_resnet()
    backbone.eval()
    report = load_backbone(backbone, save(tmp_path / "r50.pth", model.state_dict()))
    assert report.complete and set(report.dropped) == {"fc.weight", "fc.bias"}
    with torch.no_grad():
        features = backbone(images)[-1]
    assert torch.allclose(features, expected, atol=1e-4, rtol=1e-4)


def test_backbone_of_a_whole_detector(tmp_path):
    path = write_golden("resnet50_4lvl", tmp_path)
    backbone = mmdet_resnet()
    report = load_backbone(backbone, path)
    content = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(backbone.conv1.weight, content["model.model.backbone.0.body.conv1.weight"])
    assert report.complete and report.source_format == "tao"
    assert set(report.mapped) | set(report.dropped) == set(content)
    assert report.mapped["model.model.backbone.0.body.conv1.weight"] == ["conv1.weight"]


@pytest.mark.parametrize("to", ["mmdet", "tao", "official", "hf"])
def test_backbone_of_a_detector_of_each_format(to, tmp_path):
    model = detector(backbone="resnet_18", seed=1)
    write_mmdet(tmp_path / "source.pth", model.state_dict())
    path = tmp_path / (to if to == "hf" else f"{to}.pth")
    convert_checkpoint(tmp_path / "source.pth", path, to)
    backbone = mmdet_resnet(18)
    report = load_backbone(backbone, path)
    assert report.missing == [] and report.source_format == to
    expected = model.backbone.state_dict()
    for key, value in backbone.state_dict().items():
        assert key.endswith("num_batches_tracked") or torch.equal(value, expected[key]), key


@pytest.mark.parametrize(
    "wrap", [lambda s: {"state_dict": s}, lambda s: {f"backbone.{k}": v for k, v in s.items()}]
)
def test_wrapped_backbone_state_dicts(wrap, tmp_path):
    source = randomised(mmdet_resnet(18))
    backbone = mmdet_resnet(18)
    assert load_backbone(backbone, save(tmp_path / "x.pth", wrap(source.state_dict()))).complete
    assert torch.equal(backbone.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


def test_other_depths_are_refused_with_both_names(tmp_path):
    path = save(tmp_path / "r34.pth", mmdet_resnet(34).state_dict())
    with pytest.raises(WeightsError, match="resnet_34 in the file, resnet_18 in the model"):
        load_backbone(mmdet_resnet(18), path)
    with pytest.raises(WeightsError, match="another backbone"):
        load_backbone(torch.nn.Conv2d(3, 3, 1), path)


def test_timm_gcvit_and_the_papers_layout(tmp_path):
    from ddetr_mm.models import GCViT

    model = timm.create_model("gcvit_xxtiny", pretrained=False).eval()
    backbone = GCViT(variant="xxtiny", out_indices=(3,)).eval()
    report = load_backbone(backbone, save(tmp_path / "timm.pth", model.state_dict()))
    assert report.missing == [] and report.reshaped == {}
    assert {key.split(".")[0] for key in report.dropped} == {"head"}
    weight = model.state_dict()["stages.0.blocks.0.attn.qkv.weight"]
    assert torch.equal(backbone.state_dict()["levels.0.blocks.0.attn.qkv.weight"], weight)

    other = GCViT(variant="xxtiny", out_indices=(3,))
    own = load_backbone(other, save(tmp_path / "own.pth", {"model": backbone.state_dict()}))
    assert own.complete
    assert torch.equal(other.state_dict()["norm3.weight"], backbone.state_dict()["norm3.weight"])


def test_gcvit_from_a_reference_checkpoint(tmp_path):
    from ddetr_mm.models import GCViT

    backbone = GCViT(variant="xxtiny", out_indices=(1, 2, 3))
    path = write_golden("gc_vit_xxtiny_4lvl", tmp_path)
    report = load_backbone(backbone, path)
    content = torch.load(path, weights_only=True)["state_dict"]
    assert report.complete, report.summary()
    key = "levels.2.blocks.1.attn.relative_position_bias_table"
    assert torch.equal(backbone.state_dict()[key], content[f"model.model.backbone.0.body.{key}"])


def test_wrong_backbones_for_a_gcvit(tmp_path):
    from ddetr_mm.models import GCViT

    backbone = GCViT(variant="xxtiny")
    resnet18 = save(tmp_path / "r18.pth", mmdet_resnet(18).state_dict())
    with pytest.raises(WeightsError, match="resnet_18 in the file, gc_vit_xxtiny in the model"):
        load_backbone(backbone, resnet18)
    strange = save(tmp_path / "x.pth", {"a.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="another backbone"):
        load_backbone(backbone, strange)
    other = save(tmp_path / "tiny.pth", GCViT(variant="xtiny").state_dict())
    with pytest.raises(WeightsError, match="gc_vit_xtiny in the file, gc_vit_xxtiny in the model"):
        load_backbone(backbone, other)


def test_broken_weights_are_refused(tmp_path):
    state_dict = mmdet_resnet(18).state_dict()
    state_dict["conv1.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"NaN.*conv1\.weight"):
        load_backbone(mmdet_resnet(18), save(tmp_path / "x.pth", state_dict))


def test_any_other_mmdet_backbone_by_name(tmp_path):
    swin = dict(
        type="SwinTransformer",
        embed_dims=24,
        depths=(2, 2, 2, 2),
        num_heads=(2, 2, 2, 2),
        out_indices=(1, 2, 3),
    )
    model = detector(backbone=swin, in_channels=(48, 96, 192), seed=1)
    path = save(tmp_path / "x.pth", {"state_dict": model.state_dict()})
    other = detector(backbone=swin, in_channels=(48, 96, 192), seed=2)
    report = load_backbone(other.backbone, path)
    assert report.missing == []
    assert all(
        torch.equal(value, model.backbone.state_dict()[key])
        for key, value in other.backbone.state_dict().items()
    )
