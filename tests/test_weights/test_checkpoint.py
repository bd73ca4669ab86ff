"""The architecture inferred from names and shapes."""

from typing import get_args

import pytest
import torch
import torchvision
from weights_builders import golden_state_dict, small_canonical

from ddetr_mm.spec.schema import Backbone
from ddetr_mm.weights import infer_architecture
from ddetr_mm.weights.checkpoint import backbone_kind, describe_backbone, expected_keys
from ddetr_mm.weights.formats import TABLES, to_canonical
from ddetr_mm.weights.gcvit import VARIANTS


def golden_canonical(name, table):
    return to_canonical(golden_state_dict(name), TABLES[table])[0]


@pytest.mark.parametrize(
    ("name", "table", "backbone", "channels", "classes", "refine"),
    [
        ("resnet50_4lvl", "tao", "resnet_50", (512, 1024, 2048), 8, True),
        ("gc_vit_xxtiny_4lvl", "tao", "gc_vit_xxtiny", (128, 256, 512), 8, True),
        ("official_4lvl", "official", "resnet_50", (512, 1024, 2048), 9, False),
    ],
)
def test_golden_models(name, table, backbone, channels, classes, refine):
    found = infer_architecture(golden_canonical(name, table))
    assert found.backbone == backbone
    assert found.neck_in_channels == channels
    assert found.return_interm_indices == (1, 2, 3, 4)
    assert (found.num_extra_levels, found.num_feature_levels) == (1, 4)
    assert (found.enc_layers, found.dec_layers) == (2, 2)
    assert (found.enc_feedforward, found.dec_feedforward, found.hidden_dim) == (128, 128, 256)
    assert (found.num_heads, found.enc_points, found.dec_points) == (8, 4, 4)
    assert (found.num_queries, found.num_classes) == (20, classes)
    assert (found.with_box_refine, found.two_stage, found.neck_bias) == (refine, False, True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "resnet_18"),
        ("resnet34", "resnet_34"),
        ("resnet50", "resnet_50"),
        ("resnet101", "resnet_101"),
        ("resnet152", "resnet_152"),
        ("wide_resnet50_2", "unknown"),
        ("resnext50_32x4d", "unknown"),
    ],
)
def test_resnets_are_reported_apart(name, expected):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    shapes = {f"backbone.{key}": tuple(value.shape) for key, value in model.state_dict().items()}
    assert backbone_kind(shapes)[0] == expected


@pytest.mark.parametrize("variant", ["xxtiny", "xtiny", "tiny", "small", "base", "large", "large_384"])
def test_gcvits_are_reported_apart(variant):
    from ddetr_mm.models import GCViT

    with torch.device("meta"):
        options = dict(resolution=384) if variant == "large_384" else {}
        model = GCViT(variant=variant, drop_path_rate=0.0, **options)
    shapes = {f"backbone.{key}": tuple(value.shape) for key, value in model.state_dict().items()}
    assert backbone_kind(shapes)[0] == f"gc_vit_{variant}"


def test_two_stage_refinement_and_points():
    found = infer_architecture(small_canonical(two_stage=True, dec_layers=3))
    assert found.two_stage and found.with_box_refine and found.num_queries is None
    assert (found.num_heads, found.enc_points) == (8, 2)
    assert infer_architecture(small_canonical(), num_heads=4).enc_points == 4
    odd = infer_architecture(small_canonical(), num_heads=7)
    assert odd.enc_points is None and "7 heads" in odd.notes[0]


def test_equal_branches_mean_no_refinement():
    assert infer_architecture(small_canonical(with_box_refine=True)).with_box_refine
    assert not infer_architecture(small_canonical(with_box_refine=False)).with_box_refine


def test_expected_keys_are_those_of_mmdet():
    from weights_builders import detector

    for options in (dict(), dict(as_two_stage=True), dict(neck_bias=False, with_box_refine=False)):
        state_dict = detector(**options).state_dict()
        wanted = {key for key in state_dict if not key.startswith("backbone.")}
        assert set(expected_keys(infer_architecture(state_dict))) == wanted


def test_unknown_backbone_is_described_by_its_keys():
    assert "backbone.stages.0.x" in describe_backbone({"backbone.stages.0.x": (1,), "backbone.y": (2,)})
    assert describe_backbone({}) == "no backbone"


def test_the_table_of_gcvits_has_the_names_of_a_spec():
    assert ["resnet_50", *(f"gc_vit_{name}" for name in VARIANTS)] == list(get_args(Backbone))
