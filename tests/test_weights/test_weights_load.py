"""Loading into models and backbones, and what a run can resume from."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from mmdet.registry import MODELS
from mmengine.optim import MultiStepLR, build_optim_wrapper
from torch import nn
from weights_builders import detector, padded_batch, predict, resnet, write_golden, write_mmdet

from ddetr_mm.classes import named_columns
from ddetr_mm.errors import WeightsError
from ddetr_mm.translate.model import without_unread_stages
from ddetr_mm.weights import convert_checkpoint, load_backbone, load_for_model
from ddetr_mm.weights.class_columns import plan_columns, same_classes
from ddetr_mm.weights.load import leave_out_unread, require_resumable, require_same_network
from ddetr_mm.weights.report import UNREAD

# --- Detectors ---

CLASSES = ("background", "cat", "dog", "traffic light", "unknown")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model with five columns and its checkpoint, class names inside."""
    model = detector(seed=1)
    path = tmp_path_factory.mktemp("source") / "source.pth"
    write_mmdet(path, model.state_dict(), dataset_meta={"classes": CLASSES})
    return model, path


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_every_format_fills_the_same_model(tmp_path):
    model = detector(backbone="resnet_18", seed=1)
    path = write_mmdet(tmp_path / "source.pth", model.state_dict())
    for to in ("mmdet", "tao", "official", "hf"):
        destination = tmp_path / (to if to == "hf" else f"{to}.pth")
        convert_checkpoint(path, destination, to)
        other = detector(backbone="resnet_18", seed=None)
        report = load_for_model(other, destination, strict=True)
        assert report.complete and report.source_format == to
        loaded = other.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_classes_are_carried_over_by_name(source):
    model, path = source
    names = ("background", "dog", "horse", "Traffic_Light")
    other = detector(num_classes=4, seed=2)
    before = snapshot(other)
    report = load_for_model(other, path, class_names=names)
    for layer in range(2):
        for leaf in ("weight", "bias"):
            key = f"bbox_head.cls_branches.{layer}.{leaf}"
            there, here = model.state_dict()[key], other.state_dict()[key]
            assert torch.equal(here[0], there[0]) and torch.equal(here[1], there[2])
            assert torch.equal(here[3], there[3]) and torch.equal(here[2], before[key][2])
            assert "dog" in report.carried_over[key] and "horse" in report.carried_over[key]
    assert report.missing == [] and report.reshaped == {} and len(report.carried_over) == 4
    assert "2 classes by name" in report.summary()
    key = "encoder.layers.0.norms.0.weight"
    assert torch.equal(other.state_dict()[key], model.state_dict()[key])


def test_another_order_of_as_many_classes_is_carried_over_too(source):
    model, path = source
    names = ("background", "traffic light", "unknown", "cat", "dog")
    other = detector(seed=2)
    load_for_model(other, path, class_names=names)
    key = "bbox_head.cls_branches.1.weight"
    there, here = model.state_dict()[key], other.state_dict()[key]
    assert torch.equal(here[[0, 1, 3, 4]], there[[0, 3, 1, 2]])


def test_the_same_classes_are_taken_as_they_are(source):
    _, path = source
    report = load_for_model(detector(seed=2), path, class_names=CLASSES)
    assert report.carried_over == {} and report.complete


def test_unknown_names_leave_a_head_of_another_size_alone(source, tmp_path):
    model, path = source
    other = detector(num_classes=7, seed=2)
    before = snapshot(other)
    report = load_for_model(other, path)
    key = "bbox_head.cls_branches.0.weight"
    assert report.reshaped[key] == ((5, 64), (7, 64))
    assert torch.equal(other.state_dict()[key], before[key])
    assert any("the model's classes are not known" in note for note in report.notes)
    nameless = write_mmdet(tmp_path / "nameless.pth", model.state_dict())
    report = load_for_model(other, nameless, class_names=tuple("abcdefg"))
    assert any("the file's classes are not known" in note for note in report.notes)


def test_strict_refuses_what_is_left_over(source):
    with pytest.raises(WeightsError, match="does not fit the model exactly"):
        load_for_model(detector(num_classes=7), source[1], strict=True)


@pytest.mark.parametrize(
    ("options", "field", "here", "there"),
    [
        (dict(num_classes=7), "dataset.num_classes", 7, 5),
        (dict(num_queries=9), "model.num_queries", 9, 12),
        (dict(num_levels=3), "model.num_feature_levels", 3, 4),
        (dict(width=32), "model.hidden_dim", 32, 64),
        (dict(layers=3), "model.enc_layers", 3, 2),
        (dict(layers=1), "model.dec_layers", 1, 2),
        (dict(feedforward=128), "model.dim_feedforward", 128, 64),
    ],
)
def test_strict_names_the_field_with_both_values(source, options, field, here, there):
    with pytest.raises(WeightsError) as caught:
        load_for_model(detector(**options), source[1], strict=True)
    found = {problem.where: (problem.value, problem.allowed) for problem in caught.value.problems}
    assert found[field] == (here, str(there))
    assert f"{field}: the checkpoint has another value (got {here}); allowed: {there}" in str(caught.value)


def test_strict_refuses_a_part_of_a_network_and_lets_foreign_keys_pass(source, tmp_path):
    _, path = source
    with pytest.raises(WeightsError, match=r"unexpected \(not used\)"):
        load_for_model(detector(layers=1), path, strict=True)
    convert_checkpoint(path, tmp_path / "tao.pth", "tao")
    content = torch.load(tmp_path / "tao.pth", weights_only=True)
    content["state_dict"]["model.criterion.empty_weight"] = torch.ones(3)
    torch.save(content, tmp_path / "tao.pth")
    report = load_for_model(detector(seed=2), tmp_path / "tao.pth", strict=True)
    assert report.unexpected == ["model.criterion.empty_weight"]


def test_class_names_must_be_one_a_column(source):
    with pytest.raises(WeightsError, match="2 class names were given for a class head of 5"):
        load_for_model(detector(), source[1], class_names=("a", "b"))


def test_other_numbers_of_layers_and_queries_are_reported(source):
    other = detector(layers=3, num_queries=7)
    report = load_for_model(other, source[1])
    assert report.reshaped == {"query_embedding.weight": ((12, 128), (7, 128))}
    assert all(".2." in key for key in report.missing) and report.missing
    fewer = load_for_model(detector(layers=1), source[1])
    assert fewer.missing == [] and any(key.startswith("decoder.layers.1.") for key in fewer.unexpected)


def other_of(backbone):
    return detector(backbone=backbone, seed=None)


def test_another_backbone_is_refused_with_both_names(source, tmp_path):
    path = write_mmdet(tmp_path / "r18.pth", detector(backbone="resnet_18", seed=None).state_dict())
    for name in ("resnet_50", "gc_vit_xxtiny"):
        other = detector(backbone=name, seed=None)
        with pytest.raises(WeightsError, match=f"resnet_18 in the file, {name} in the model"):
            load_for_model(other, path)
    with pytest.raises(WeightsError, match=r"an unknown backbone .* in the file, resnet_50 in"):
        load_for_model(other_of("resnet_50"), source[1])


def test_two_stage_weights_are_for_two_stage_models(source, tmp_path):
    two_stage = detector(as_two_stage=True, width=256, layers=1, seed=3)
    path = write_mmdet(tmp_path / "two.pth", two_stage.state_dict())
    same = detector(as_two_stage=True, width=256, layers=1, seed=None)
    assert load_for_model(same, path, strict=True).complete
    with pytest.raises(WeightsError, match="is a two-stage model .* a spec cannot describe"):
        load_for_model(detector(width=256, layers=1, seed=None), path)
    with pytest.raises(WeightsError, match="is not a two-stage model"):
        load_for_model(detector(as_two_stage=True, seed=None), source[1])


def test_another_width_is_refused(source):
    with pytest.raises(WeightsError, match="nothing that fits"):
        load_for_model(detector(width=32, feedforward=32), source[1])


def test_necks_with_and_without_bias(tmp_path):
    bare = detector(backbone="resnet_18", neck_bias=False, seed=1)
    path = write_mmdet(tmp_path / "zoo.pth", bare.state_dict())
    biased = detector(backbone="resnet_18", seed=None)
    report = load_for_model(biased, path)
    assert report.complete and not biased.state_dict()["neck.convs.0.conv.bias"].any()
    assert "neck.extra_convs.0.conv.bias" in report.filled
    convert_checkpoint(path, tmp_path / "hf", "hf")
    report = load_for_model(detector(backbone="resnet_18", neck_bias=False, seed=None), tmp_path / "hf")
    assert report.complete and len(report.dropped) == 4


def test_shared_branches_and_schemes_are_reported(source, tmp_path):
    shared = detector(with_box_refine=False, seed=4)
    path = write_mmdet(tmp_path / "shared.pth", shared.state_dict(), dataset_meta={"classes": CLASSES})
    other = detector(with_box_refine=False, num_classes=3, seed=5)
    before = snapshot(other)
    report = load_for_model(other, path, class_names=("background", "dog", "horse"))
    weight = other.state_dict()["bbox_head.cls_branches.0.weight"]
    assert torch.equal(weight[1], shared.state_dict()["bbox_head.cls_branches.0.weight"][2])
    assert torch.equal(weight[2], before["bbox_head.cls_branches.0.weight"][2])
    assert not any("refinement" in note for note in report.notes)
    report = load_for_model(other, source[1], class_names=("background", "dog", "horse"))
    assert any("refinement" in note for note in report.notes)


def test_padding_of_the_origin_is_reported(source, tmp_path):
    _, path = source
    ours = detector(kind="TAODeformableDETR", zero_padded_values=False)
    report = load_for_model(ours, path)
    assert any("padded positions zeroed" in note for note in report.notes)
    ours = detector(kind="TAODeformableDETR", zero_padded_values=True)
    (note,) = load_for_model(ours, path).notes
    assert note.startswith("assumed, since the file does not say it: 8 attention heads (model.nheads)")
    assert "attention values at padded positions zeroed (ddetr_mm.zero_padded_values)" in note


def test_wrapped_models_are_filled(source):
    model, path = source
    other = detector(seed=2)
    load_for_model(torch.nn.DataParallel(other), path)
    assert torch.equal(other.level_embed, model.level_embed)


def test_gcvit_detector_loads_from_a_reference_checkpoint_of_other_outputs(tmp_path):
    model = detector(backbone="gc_vit_xxtiny", seed=1)
    path = write_mmdet(tmp_path / "x.pth", model.state_dict())
    convert_checkpoint(path, tmp_path / "tao.pth", "tao")
    other = detector(backbone="gc_vit_xxtiny", seed=2)
    report = load_for_model(other, tmp_path / "tao.pth")
    assert report.complete, report.summary()
    assert all(key.startswith("model.model.") for key in report.mapped)
    loaded = other.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_column_plans():
    plan = plan_columns(named_columns(("n/a", "a", "b b")), named_columns(("background", "B_b", "c")))
    assert plan.pairs == ((0, 0), (1 + 1, 1)) and plan.carried == ("B_b",)
    assert plan.fresh == ("c",) and plan.unused == ("a",)
    assert plan_columns(("a", "b"), ("b", "a")).pairs == ((1, 0), (0, 1))
    assert same_classes(named_columns(("N/A", "a")), named_columns(("background", "A")))
    assert not same_classes(("a", "b"), ("b", "a"))


# --- Backbones ---


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
    unknown = save(tmp_path / "x.pth", {"a.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="another backbone"):
        load_backbone(backbone, unknown)
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


# --- ResNets of other layouts, below any prefix ---


def detectron2_name(key):
    """Detectron2's name of one of torchvision's keys."""
    if key.startswith(("conv1", "bn1")):
        return key.replace("conv1", "stem.conv1").replace("bn1", "stem.conv1.norm")
    block, part = key[7:].split(".", 1)
    part = part.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    for number in "123":
        part = part.replace(f"bn{number}", f"conv{number}.norm")
    return f"res{int(key[5]) + 1}.{block}.{part}"


def sequential_name(key):
    """The name of one of torchvision's keys in an nn.Sequential of its children."""
    first, _, rest = key.partition(".")
    number = {"conv1": 0, "bn1": 1}.get(first)
    return f"{int(first[5]) + 3 if number is None else number}.{rest}"


LAYOUTS = {"torchvision": str, "detectron2": detectron2_name, "sequential": sequential_name}
WRAPPINGS = [
    "",
    "module.",
    "backbone.",
    "backbone.body.",
    "module.encoder_q.",
    "model.backbone.conv_encoder.model.",
    "_orig_mod.net.",
    "student.backbone.",
    "state.encoder.module.",
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", WRAPPINGS)
def test_a_resnet_is_found_below_any_prefix(layout, prefix, tmp_path):
    weights = {key: value for key, value in _resnet_18().items() if not key.startswith("fc.")}
    named = {prefix + LAYOUTS[layout](key): value for key, value in weights.items()}
    content = {"epoch": 3, "model": {**named, "queue": torch.ones(4), f"{prefix}fc.weight": torch.ones(4)}}
    path = save(tmp_path / "x.pth", content)
    for stages in ((0, 1, 2, 3), (1,)):
        config = dict(type="ResNet", depth=18, out_indices=stages)
        backbone = MODELS.build(without_unread_stages(config))
        report = load_backbone(backbone, path)
        assert (report.missing, report.reshaped) == ([], {}) and {*report.unexpected} <= {"queue"}
        assert all(torch.equal(value, weights[key]) for key, value in backbone.state_dict().items())
        unread = {key for key, why in report.dropped.items() if why == UNREAD}
        behind = [key for key in weights if stages == (1,) and key.startswith(("layer3.", "layer4."))]
        assert unread == {prefix + LAYOUTS[layout](key) for key in behind}


@functools.cache
def _resnet_18():
    return randomised(without_init(torchvision.models.resnet18)).state_dict()


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.backbone.conv_encoder.", "module."])
def test_transformers_resnet_gives_its_features(head, prefix, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic"
    )
    kind = transformers.ResNetForImageClassification if head else transformers.ResNetModel
    model = randomised(kind(config))
    path = save(tmp_path / "x.pth", {prefix + key: value for key, value in model.state_dict().items()})
    backbone = mmdet_resnet(18)
    backbone.eval()
    report = load_backbone(backbone, path)
    assert report.missing == [] and report.source_format == "a backbone with Hugging Face's names"
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = (model.resnet if head else model)(images).last_hidden_state
        assert torch.allclose(backbone(images)[-1], expected, atol=1e-4, rtol=1e-4)


# --- Resuming ---

WHERE = "train.resume_training_checkpoint_path"
WHOLE = dict(state_dict={"a": torch.zeros(1)}, optimizer={"state": {}}, meta={"epoch": 1, "iter": 5})


def test_a_whole_checkpoint_passes(tmp_path):
    torch.save(WHOLE, tmp_path / "whole.pth")
    require_resumable(tmp_path / "whole.pth", where="here")


@pytest.mark.parametrize(
    ("content", "missing"),
    [
        ({key: value for key, value in WHOLE.items() if key != "optimizer"}, "optimizer is missing"),
        ({**WHOLE, "meta": {"epoch": 1}}, "meta.iter is missing"),
        ({"a": torch.zeros(1)}, "state_dict, optimizer, meta is missing"),
        ([1], "state_dict"),
    ],
)
def test_weights_alone_are_refused(tmp_path, content, missing):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=missing) as caught:
        require_resumable(tmp_path / "weights.pth", where="here")
    assert "train.pretrained_model_path" in str(caught.value)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """The network of the run that is resumed."""
    return detector(kind="TAODeformableDETR", seed=None)


def training_file(path: Path, network: nn.Module) -> Path:
    """A checkpoint with what resuming checks."""
    torch.save({**WHOLE, "state_dict": network.state_dict()}, path)
    return path


def refusal(path: Path, model: nn.Module) -> str:
    with pytest.raises(WeightsError) as caught:
        require_same_network(path, model, where=WHERE)
    text = str(caught.value)
    assert path.name in text and WHERE in text
    return text


def test_a_checkpoint_of_the_same_network_passes(model: nn.Module, tmp_path: Path):
    path = training_file(tmp_path / "a.pth", model)
    require_same_network(path, model, where=WHERE)
    wrapped = nn.Module()
    wrapped.module = model
    require_same_network(path, wrapped, where=WHERE)


def test_another_number_of_classes(model: nn.Module, tmp_path: Path):
    other = detector(kind="TAODeformableDETR", seed=None, num_classes=7)
    text = refusal(training_file(tmp_path / "a.pth", other), model)
    assert "7 columns" in text and "5" in text and "dataset.num_classes" in text
    assert "train.pretrained_model_path" in text


def test_another_backbone(model: nn.Module, tmp_path: Path):
    other = detector(kind="TAODeformableDETR", seed=None, backbone="resnet_18")
    text = refusal(training_file(tmp_path / "a.pth", other), model)
    assert "another backbone" in text and "resnet_18" in text and "model.backbone" in text


def test_another_structure(model: nn.Module, tmp_path: Path):
    other = detector(kind="TAODeformableDETR", seed=None, layers=3, num_queries=9)
    text = refusal(training_file(tmp_path / "a.pth", other), model)
    assert "keys not in the model" in text and "the section model" in text
    assert "query_embedding.weight [9, 128] in the file, [12, 128] in the model" in text


def test_a_checkpoint_of_tao(tmp_path: Path):
    with pytest.raises(WeightsError, match="PyTorch Lightning") as caught:
        require_resumable(write_golden("resnet50_4lvl", tmp_path), where=WHERE)
    assert "train.pretrained_model_path" in str(caught.value) and WHERE in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"a text file", b"\x89PNG\r\n\x1a\n" + 100 * b"x"])
def test_files_of_other_kinds(tmp_path: Path, content: bytes):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"x\.pth"):
        require_resumable(path, where=WHERE)


# --- Stages of the backbone that are not read ---


def on_levels(levels, backbone, seed, *, whole=True):
    """A detector on some levels of a thin ResNet-18 or a GCViT, built with or without its other stages."""
    stages = tuple(level for level in levels if level < 4)
    if backbone == "gcvit":
        config, width = dict(type="GCViT", variant="xxtiny", out_indices=stages), 64
    else:
        config, width = dict(type="ResNet", depth=18, base_channels=8, out_indices=stages), 8
        config = config if whole else without_unread_stages(config)
    channels = [width * 2**stage for stage in stages]
    options = dict(kind="TAODeformableDETR", zero_padded_values=True, num_levels=len(levels), layers=1)
    return detector(backbone=config, in_channels=channels, seed=seed, **options)


@pytest.mark.parametrize("levels", [(0, 1), (2, 4), (0, 2)])
@pytest.mark.parametrize("file_is_whole", [True, False])
def test_stages_that_are_not_read_may_be_in_a_file_or_not(levels, file_is_whole, tmp_path):
    source = on_levels(levels, "resnet", 1, whole=file_is_whole)
    path = write_mmdet(tmp_path / "x.pth", source.state_dict())
    ours = on_levels(levels, "resnet", 2, whole=not file_is_whole)
    report = load_for_model(ours, path, strict=True)
    assert report.complete
    unread = tuple(f"backbone.layer{stage + 2}" for stage in range(max(set(levels) - {4}), 3))
    found = {key for key, why in (report.dropped | report.filled).items() if UNREAD in why}
    assert found == {key for key in on_levels(levels, "resnet", 1).state_dict() if key.startswith(unread)}
    assert f"{len(found)} keys {'not needed' if file_is_whole else 'filled in'}" in report.summary()
    images, sizes_hw = padded_batch()
    expected, got = predict(source, images, sizes_hw), predict(ours, images, sizes_hw)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_a_pretrained_resnet_gives_a_shorter_one_its_stages(tmp_path):
    with torch.device("meta"):
        longer = torchvision.models.resnet101()
    weights = torchvision.models.resnet50().state_dict()
    short = MODELS.build(without_unread_stages(dict(type="ResNet", depth=50, out_indices=(0, 2))))
    report = load_backbone(short, save(tmp_path / "r50.pth", weights))
    assert report.complete and not report.filled
    assert torch.equal(short.layer3[5].conv3.weight, weights["layer3.5.conv3.weight"])
    unread = {key for key, why in report.dropped.items() if why == UNREAD}
    assert unread == {key for key in weights if key.startswith("layer4.")}
    # The first six blocks of a ResNet-101's third stage fit, and are another network's.
    deep = {key: torch.zeros(value.shape) for key, value in longer.state_dict().items()}
    with pytest.raises(WeightsError, match="resnet_101 in the file, resnet_50 in the model"):
        load_backbone(short, save(tmp_path / "r101.pth", deep))


def test_timms_gcvit_gives_a_shorter_one_its_stages(tmp_path):
    model = timm.create_model("gcvit_xxtiny", pretrained=False)
    gcvit = MODELS.build(dict(type="GCViT", variant="xxtiny", out_indices=(0, 1)))
    report = load_backbone(gcvit, save(tmp_path / "timm.pth", model.state_dict()))
    assert report.unexpected == [] and [key for key in report.missing if "norm" not in key] == []
    assert {key.split(".")[1] for key, why in report.dropped.items() if why == UNREAD} == {"2", "3"}


@pytest.mark.parametrize("backbone", ["resnet", "gcvit"])
def test_a_run_resumes_without_stages_that_are_not_read(backbone, tmp_path):
    """What a run saved whose network had them: weights, state and rate of each parameter stay together."""
    older = on_levels((0, 1), backbone, 1)
    if backbone == "gcvit":
        reads_all = MODELS.build(dict(type="GCViT", variant="xxtiny", out_indices=(0, 1, 2, 3)))
        for stage in (2, 3):
            older.backbone.levels.append(reads_all.levels[stage])
        older.backbone.levels[1].downsample = reads_all.levels[1].downsample
    config = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3))
    config["paramwise_cfg"] = dict(custom_keys={"backbone": dict(lr_mult=0.1), "layer": dict(lr_mult=0.5)})
    wrapper = build_optim_wrapper(older, dict(config))
    for index, (name, parameter) in enumerate(older.named_parameters()):
        if not name.startswith(("backbone.layer4", "backbone.levels.3")):
            parameter.grad = torch.full_like(parameter, 1.0 + index)
    wrapper.optimizer.step()
    scheduler = MultiStepLR(wrapper, milestones=[1])
    content = {
        "state_dict": older.state_dict(),
        "optimizer": wrapper.state_dict(),
        "meta": {"epoch": 1, "iter": 5},
        "param_schedulers": [scheduler.state_dict()],
    }
    torch.save(content, tmp_path / "older.pth")
    model = on_levels((0, 1), backbone, 2, whole=False)
    require_same_network(tmp_path / "older.pth", model, where=WHERE)
    left_out = leave_out_unread(content, model)
    assert left_out == len(older.state_dict()) - len(model.state_dict()) > 0
    model.load_state_dict(content["state_dict"], strict=True)
    resumed = build_optim_wrapper(model, dict(config))
    resumed.load_state_dict(content["optimizer"])
    MultiStepLR(resumed, milestones=[1]).load_state_dict(content["param_schedulers"][0])
    there = dict(zip([*dict(older.named_parameters()), "base"], wrapper.param_groups, strict=True))
    here = dict(zip([*dict(model.named_parameters()), "base"], resumed.param_groups, strict=True))
    assert here.keys() < there.keys()
    for name, group in here.items():
        (theirs,), (ours,) = there[name]["params"], group["params"]
        assert group["lr"] == there[name]["lr"]
        expected, found = wrapper.optimizer.state.get(theirs, {}), resumed.optimizer.state.get(ours, {})
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert sum(len(state) > 0 for state in resumed.optimizer.state.values()) > 20
    assert content["param_schedulers"][0]["base_values"] == [there[name]["initial_lr"] for name in here]


def test_a_state_without_a_group_for_each_parameter_is_refused(tmp_path):
    older = on_levels((0, 1), "resnet", 1)
    optimizer = torch.optim.AdamW(older.parameters())
    content = {"state_dict": older.state_dict(), "optimizer": optimizer.state_dict(), "meta": {}}
    with pytest.raises(WeightsError, match="no longer built.*pretrained_model_path"):
        leave_out_unread(content, on_levels((0, 1), "resnet", 2, whole=False))
    whole = on_levels((0, 1), "resnet", 3)
    assert leave_out_unread(content, whole) == 0 and "backbone.layer4.0.conv1.weight" in content["state_dict"]
