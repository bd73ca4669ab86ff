"""What shows in no shape: read of a network, carried by files, compared before anything is predicted."""

from __future__ import annotations

import pytest
import torch
from weights_builders import detector, resnet, write_mmdet

from ddetr_mm.errors import WeightsError
from ddetr_mm.weights import load_for_model, read_checkpoint
from ddetr_mm.weights.scheme import FIELDS, network_scheme, refinement_shown

DATA = dict(type="DetDataPreprocessor", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
USUAL = {
    "num_heads": 8,
    "enc_points": 4,
    "dec_points": 4,
    "dilation": False,
    "input_mean": [0.485, 0.456, 0.406],
    "input_std": [0.229, 0.224, 0.225],
    "zero_padded_values": False,
    "with_box_refine": True,
    "aux_loss": True,
}


def network(seed=1, **options):
    """A small detector of ours that normalises images as ImageNet's."""
    settings = dict(kind="TAODeformableDETR", zero_padded_values=False, data_preprocessor=DATA)
    settings["bbox_head_options"] = dict(type="TAODeformableDETRHead")
    return detector(seed=seed, **{**settings, **options})


def with_attention(heads: int, points: int, seed=1):
    """The same tensors as 8 heads x 4 points, arranged otherwise."""
    model = network(seed)
    for layer in model.encoder.layers:
        layer.self_attn.num_heads, layer.self_attn.num_points = heads, points
    for layer in model.decoder.layers:
        layer.cross_attn.num_heads, layer.cross_attn.num_points = heads, points
    return model


def test_the_settings_of_a_network():
    assert network_scheme(network()) == USUAL and USUAL.keys() == FIELDS.keys()
    assert network_scheme(with_attention(4, 8)) == USUAL | dict(num_heads=4, enc_points=8, dec_points=8)
    thin = dict(resnet(50, base_channels=8), type="TorchvisionDilatedResNet")
    thin.pop("num_stages")
    dilated = network(backbone=thin, in_channels=(64, 128, 256))
    assert network_scheme(dilated) == USUAL | dict(dilation=True)
    plain = network(zero_padded_values=True, with_box_refine=False)
    assert network_scheme(plain) == USUAL | dict(zero_padded_values=True, with_box_refine=False)


CONTRADICTIONS = [
    ("num_heads", 4, "4 attention heads", "8 attention heads", "4"),
    ("enc_points", 8, "8 sampling points in the encoder", "4 sampling points in the encoder", "8"),
    ("dec_points", 2, "2 sampling points in the decoder", "4 sampling points in the decoder", "2"),
    ("dilation", True, "a dilated last stage of the backbone", "no dilated last stage", "True"),
    ("input_mean", [0.5, 0.5, 0.5], "mean [0.5, 0.5, 0.5]", "mean [0.485, 0.456, 0.406]", "[0.5, 0.5, 0.5]"),
    (
        "input_std",
        [1.0, 1.0, 1.0],
        "standard deviation [1.0, 1.0, 1.0]",
        "standard deviation [0.229, 0.224, 0.225]",
        "[1.0, 1.0, 1.0]",
    ),
    (
        "zero_padded_values",
        True,
        "attention values at padded positions zeroed",
        "attention values at padded positions as they are",
        "True",
    ),
    ("with_box_refine", False, "no box refinement", "box refinement", "False"),
]


@pytest.mark.parametrize(("name", "value", "there", "here", "allowed"), CONTRADICTIONS)
def test_a_contradiction_is_refused_by_its_field(name, value, there, here, allowed, tmp_path):
    path = write_mmdet(tmp_path / "x.pth", network(1).state_dict(), ddetr_mm=USUAL | {name: value})
    with pytest.raises(WeightsError) as caught:
        load_for_model(network(2), path, strict=True)
    (problem,) = caught.value.problems
    assert problem.what.startswith(f"the checkpoint was trained with {there}, the spec has {here}")
    assert (problem.where, problem.allowed) == (FIELDS[name], allowed) and str(problem.file) == str(path)
    notes = load_for_model(network(2), path).notes
    assert f"the weights were trained with {there}, the model has {here}" in " ".join(notes)


def test_what_only_training_reads_is_not_refused(tmp_path):
    path = write_mmdet(tmp_path / "x.pth", network(1).state_dict(), ddetr_mm=USUAL | {"aux_loss": False})
    notes = load_for_model(network(2), path, strict=True).notes
    assert "with no auxiliary losses, the model has auxiliary losses (model.aux_loss)" in " ".join(notes)


def test_a_file_that_says_all_assumes_nothing(tmp_path):
    path = write_mmdet(tmp_path / "x.pth", network(1).state_dict(), ddetr_mm=USUAL)
    assert load_for_model(network(2), path, strict=True).notes == []
    assert read_checkpoint(path).stated == frozenset(FIELDS)


def test_what_a_file_does_not_say_is_one_line(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(network(1).state_dict(), path)
    (line,) = [note for note in load_for_model(network(2), path).notes if note.startswith("assumed")]
    for field in ("nheads", "dilation", "input_mean", "input_std"):
        assert field in line
    assert "refine" not in line  # the branches show it


@pytest.mark.parametrize("here", [True, False])
def test_weights_show_their_refinement(here, tmp_path):
    """Boxes would be off by a third of the picture: a file that says nothing is refused as well."""
    path = tmp_path / "x.pth"
    torch.save(network(1, with_box_refine=not here).state_dict(), path)
    assert read_checkpoint(path).meta.with_box_refine is not here
    with pytest.raises(WeightsError) as caught:
        load_for_model(network(2, with_box_refine=here), path, strict=True)
    assert [problem.where for problem in caught.value.problems] == ["model.with_box_refine"]
    assert caught.value.problems[0].allowed == str(not here)


def test_branches_that_were_never_trained_show_nothing():
    state_dict = network(1).state_dict()
    assert refinement_shown(state_dict) is True
    equal = {key: state_dict[key.replace("branches.1.", "branches.0.")] for key in state_dict}
    assert refinement_shown(equal) is False
    zeros = {key: torch.zeros_like(value) if ".4." in key else value for key, value in equal.items()}
    assert refinement_shown(zeros) is None
    assert refinement_shown(network(1, layers=1).state_dict()) is None


@pytest.mark.parametrize("zeroed", [True, False])
def test_the_padding_of_a_bare_state_dict_is_said(zeroed, tmp_path):
    """mmdet zeroes it; a bare file only implies that: said, not refused, where the network differs."""
    path = tmp_path / "x.pth"
    torch.save(network(1).state_dict(), path)
    report = load_for_model(network(2, zero_padded_values=zeroed), path, strict=True)
    said = [
        note for note in report.notes if "trained with attention values at padded positions zeroed" in note
    ]
    assert len(said) == (0 if zeroed else 1)


def test_the_same_tensors_in_other_heads_predict_something_else(tmp_path):
    """Why heads and points are compared: every shape fits."""
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    one, other = with_attention(8, 4), with_attention(4, 8)
    assert {k: v.shape for k, v in one.state_dict().items()} == {
        k: v.shape for k, v in other.state_dict().items()
    }
    with torch.no_grad():
        logits, differing = (model(images, None, mode="tensor")[0] for model in (one, other))
    assert (logits - differing).abs().max() > 0.01
    path = write_mmdet(tmp_path / "x.pth", one.state_dict(), ddetr_mm=network_scheme(one))
    with pytest.raises(WeightsError, match=r"model\.nheads.*allowed: 8"):
        load_for_model(other, path, strict=True)
