"""Filling models: by name, with head surgery, and clear refusals."""

import pytest
import torch
from weights_builders import detector, write_mmdet

from ddetr_mm.errors import WeightsError
from ddetr_mm.weights import convert_checkpoint, load_for_model
from ddetr_mm.weights.surgery import plan_columns, same_classes

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
    with pytest.raises(WeightsError, match="is a two-stage model .* no words for"):
        load_for_model(detector(width=256, layers=1, seed=None), path)
    with pytest.raises(WeightsError, match="is no two-stage model"):
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


def test_shared_branches_and_schemes_are_told(source, tmp_path):
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


def test_padding_of_the_origin_is_told(source, tmp_path):
    _, path = source
    ours = detector(kind="TAODeformableDETR", zero_padded_values=False)
    report = load_for_model(ours, path)
    assert any("padded positions zeroed" in note for note in report.notes)
    ours = detector(kind="TAODeformableDETR", zero_padded_values=True)
    assert not load_for_model(ours, path).notes


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
    plan = plan_columns(("n/a", "a", "b b"), ("background", "B_b", "c"))
    assert plan.pairs == ((0, 0), (1 + 1, 1)) and plan.carried == ("B_b",)
    assert plan.fresh == ("c",) and plan.unused == ("a",)
    assert plan_columns(("a", "b"), ("b", "a")).pairs == ((1, 0), (0, 1))
    assert same_classes(("N/A", "a"), ("background", "A"))
    assert not same_classes(("a", "b"), ("b", "a"))
