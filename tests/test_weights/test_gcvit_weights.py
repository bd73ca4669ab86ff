"""GCViT weights of other layouts: names, prefixes, position tables, query pyramids, files."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.registry import MODELS
from mmengine.logging import MMLogger
from safetensors.torch import save_file
from torch import Tensor

from ddetr_mm.errors import WeightsError
from ddetr_mm.models import GCViT
from ddetr_mm.weights import load_backbone
from ddetr_mm.weights.gcvit import (
    VARIANTS,
    GCViTVariant,
    as_tao_has_it,
    relative_position_index,
    resize_position_table,
    stage_shapes,
    timm_to_paper,
)
from ddetr_mm.weights.report import UNREAD


@pytest.fixture(autouse=True)
def thin_variant(monkeypatch) -> None:
    """One block of each kind a stage, layer scale included, and few channels."""
    thin = GCViTVariant((2, 2, 2, 2), (1, 2, 4, 8), (7, 7, 14, 7), 32, 2.0, 0.5)
    monkeypatch.setitem(VARIANTS, "thin", thin)


def thin(**kwargs) -> GCViT:
    return GCViT("thin", **kwargs)


def random_weights(model: GCViT, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=generator) for key, value in model.state_dict().items()}


@pytest.fixture
def load(tmp_path):
    """Load a checkpoint from a file into a GCViT; returns the report."""

    def load_file(model, checkpoint, prefix=None):
        torch.save(checkpoint, tmp_path / "gcvit.pth")
        return load_backbone(model, tmp_path / "gcvit.pth", prefix)

    return load_file


def as_classifier(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layout of a published classifier: no norm for each stage, but a final one, and a head."""
    result = {key: value for key, value in weights.items() if not key.startswith("norm")}
    width = weights["norm3.weight"].shape[0]
    result["norm.weight"], result["norm.bias"] = torch.randn(width), torch.randn(width)
    result["head.weight"], result["head.bias"] = torch.randn(1000, width), torch.randn(1000)
    for key in [key for key in weights if key.endswith("relative_position_bias_table")]:
        window = (round(weights[key].shape[0] ** 0.5) + 1) // 2
        result[key.replace("bias_table", "index")] = relative_position_index(window)
    return result


@pytest.mark.parametrize(
    ("prefix", "containers"),
    [
        ("", ()),
        ("", ("state_dict",)),
        ("", ("model",)),
        ("module.", ("state_dict",)),
        ("model.", ("state_dict",)),
        ("backbone.", ("state_dict",)),
        ("model.model.backbone.0.body.", ("state_dict",)),
    ],
)
def test_a_classifier_is_loaded_below_any_prefix(load, prefix, containers) -> None:
    model = thin()
    source = as_classifier(random_weights(model))
    checkpoint: dict = {prefix + key: value for key, value in source.items()}
    if "body" in prefix:
        checkpoint["model.model.query_embed.weight"] = torch.zeros(3, 4)
    for container in containers:
        checkpoint = {container: checkpoint, "epoch": 3, "args": None}
    report = load(model, checkpoint)
    why = {key: reason for key, reason in report.dropped.items() if not key.endswith("position_index")}
    expected = {f"{prefix}head.{leaf}": "the classifier's head" for leaf in ("weight", "bias")}
    if "body" in prefix:
        expected["model.model.query_embed.weight"] = "not part of the backbone"
    assert why == expected and len(report.dropped) == len(expected) + 8
    assert (report.unexpected, report.reshaped, report.carried_over) == ([], {}, {})
    missing = [f"norm{stage}.{leaf}" for stage in range(3) for leaf in ("weight", "bias")]
    assert sorted(report.missing) == sorted(missing)
    assert report.mapped[f"{prefix}norm.weight"] == ["norm3.weight"]
    loaded = model.state_dict()
    assert len(report.mapped) == len(loaded) - 6
    for file_key, (key,) in report.mapped.items():
        assert torch.equal(loaded[key], source[file_key[len(prefix) :]])


def test_our_own_weights_come_back_as_they_were(load) -> None:
    model, weights = thin(), random_weights(thin())
    assert load(model, weights).complete
    loaded = model.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_without_the_last_stage_a_classifier_s_norm_is_not_used(load) -> None:
    whole = random_weights(thin())
    report = load(thin(out_indices=(0, 1, 2)), as_classifier(whole))
    unread = {key for key, why in report.dropped.items() if why == UNREAD}
    behind = {key for key in whole if key.startswith(("levels.3.", "levels.2.downsample."))}
    assert unread == {"norm.weight", "norm.bias"} | behind and not report.unexpected


def test_timm_s_names_each_lead_to_one_of_ours() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model("gcvit_small", pretrained=False).state_dict()
        ours = GCViT("small", out_indices=(3,)).state_dict()
    named = [
        timm_to_paper(key).replace("norm.", "norm3.")
        if key.startswith("stages.3.norm")
        else timm_to_paper(key)
        for key in theirs
        if not key.startswith("head.")
    ]
    assert len(set(named)) == len(named)
    assert set(named) == set(ours)


def test_tables_of_another_window_are_resized_and_reported(load) -> None:
    model = thin(windows=(12, 12, 24, 12))
    source = random_weights(thin())
    report = load(model, source)
    tables = [key for key in source if key.endswith("relative_position_bias_table")]
    assert sorted(report.carried_over) == sorted(tables)
    how = report.carried_over["levels.2.blocks.1.attn.relative_position_bias_table"]
    assert how == "position table resized from [729, 4] to [2209, 4]" and how in report.summary()
    assert report.complete
    key = tables[0]
    assert torch.equal(model.state_dict()[key], resize_position_table(source[key], 23**2))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 3), st.floats(-3, 3))
def test_resizing_keeps_constants_heads_and_symmetry(old, new, heads, value) -> None:
    rows, new_rows = (2 * old - 1) ** 2, (2 * new - 1) ** 2
    constant = resize_position_table(torch.full((rows, heads), value), new_rows)
    assert torch.allclose(constant, torch.full((new_rows, heads), value), atol=1e-5)
    table = torch.randn(rows, heads, generator=torch.Generator().manual_seed(old))
    resized = resize_position_table(table, new_rows)
    for head in range(heads):
        alone = resize_position_table(table[:, head : head + 1], new_rows)
        assert torch.allclose(resized[:, head : head + 1], alone, atol=1e-6)
    # Row r and row rows-1-r are opposite offsets, before and after.
    assert torch.allclose(resize_position_table(table.flip(0), new_rows), resized.flip(0), atol=1e-5)
    if old == new:
        assert torch.allclose(resized, table, atol=1e-6)


def test_query_pyramids_of_another_resolution_share_their_first_blocks(load) -> None:
    small, large = thin(), thin(resolution=448)
    missing = load(large, random_weights(small)).missing
    longer = ["levels.0.q_global_gen.to_q_global.3", "levels.1.q_global_gen.to_q_global.2"]
    assert {key.split(".conv.")[0] for key in missing} == set(longer)
    assert sorted(load(small, random_weights(large)).unexpected) == sorted(missing)


def test_a_weight_of_another_shape_is_skipped_and_reported(load) -> None:
    model = thin()
    before = model.state_dict()["patch_embed.proj.weight"].clone()
    source = {**random_weights(model), "patch_embed.proj.weight": torch.zeros(32, 4, 3, 3)}
    report = load(model, source)
    assert report.reshaped == {"patch_embed.proj.weight": ((32, 4, 3, 3), (32, 3, 3, 3))}
    assert torch.equal(model.state_dict()["patch_embed.proj.weight"], before)
    assert "reshaped (not used)" in report.summary() and "[32, 4, 3, 3] in the file" in report.summary()


QKV = "levels.0.blocks.0.attn.qkv.weight"


@pytest.mark.parametrize(
    ("checkpoint", "prefix", "words"),
    [
        ({"layer1.0.conv1.weight": torch.zeros(1)}, None, "another backbone"),
        ({QKV: torch.zeros(1)}, "backbone", "no keys below 'backbone.'"),
        ({f"{name}.{QKV}": torch.zeros(1) for name in "ab"}, None, "another backbone"),
        ({QKV: torch.zeros(1, 1)}, None, "another backbone"),
        ([1, 2], None, "not named weights"),
    ],
)
def test_what_is_no_gcvit_is_refused(load, checkpoint, prefix, words) -> None:
    with pytest.raises(WeightsError, match=words):
        load(thin(), checkpoint, prefix)


@pytest.mark.parametrize(
    ("names", "taken", "reason"),
    [
        ("ab", "a", "the first that is no copy of another"),
        (("teacher", "student"), "student", "the first that is no copy of another"),
        (("plain", "ema"), "ema", "averaged weights come first"),
    ],
)
def test_of_two_one_is_chosen_by_a_rule_that_is_said(load, names, taken, reason) -> None:
    weights = random_weights(thin())
    both = {f"{name}.{key}": value + (name == taken) for name in names for key, value in weights.items()}
    model = thin()
    report = load(model, both)
    assert torch.equal(model.state_dict()["norm3.bias"], weights["norm3.bias"] + 1)
    (note,) = report.notes
    assert f"2 sets of weights: '{taken}'" in note and f"is read ({reason}), not '" in note


def test_prefix_chooses_between_two(load) -> None:
    weights = random_weights(thin())
    both = {
        f"{name}.{key}": value + shift
        for name, shift in (("ema", 1), ("plain", 0))
        for key, value in weights.items()
    }
    model = thin()
    report = load(model, both, "plain")
    assert report.dropped == {f"ema.{key}": "not part of the backbone" for key in weights}
    assert torch.equal(model.state_dict()["norm3.bias"], weights["norm3.bias"])


@pytest.mark.parametrize("kind", ["lightning", "safetensors"])
def test_init_cfg_reads_a_file_and_logs_the_report(kind, tmp_path, caplog) -> None:
    source = as_classifier(random_weights(thin()))
    if kind == "safetensors":
        path = tmp_path / "gcvit.safetensors"
        save_file(source, path)
    else:
        path = tmp_path / "gcvit.pth"
        torch.save({"state_dict": source, "epoch": 1, "pytorch-lightning_version": "2.0"}, path)
    model = MODELS.build(
        {"type": "GCViT", "variant": "thin", "init_cfg": {"type": "Pretrained", "checkpoint": str(path)}}
    )
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO):
            model.init_weights()
    finally:
        logger.removeHandler(caplog.handler)
    assert torch.equal(model.state_dict()["norm3.weight"], source["norm.weight"])
    assert "missing (initial values stay), 6" in caplog.text and "10 keys not needed" in caplog.text


class _Harmful:
    def __reduce__(self):
        return (print, ("code from a file ran",))


def test_init_cfg_runs_no_code_from_a_file(tmp_path, capsys) -> None:
    path = tmp_path / "gcvit.pth"
    torch.save({"state_dict": random_weights(thin()), "extra": _Harmful()}, path)
    model = thin(init_cfg={"type": "Pretrained", "checkpoint": str(path)})
    with pytest.raises(WeightsError):
        model.init_weights()
    assert "code from a file ran" not in capsys.readouterr().out


def test_random_weights_are_kept_by_init_weights() -> None:
    model = thin()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    tables = torch.cat([value.flatten() for key, value in before.items() if key.endswith("bias_table")])
    assert tables.std().item() == pytest.approx(0.02, rel=0.05)


# --- Keys and shapes of a stage ---


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "thin"])
def test_shapes_of_the_stages_are_those_of_the_network(variant) -> None:
    with torch.device("meta"):
        model = GCViT(variant, drop_path_rate=0.0)
    network = {key: tuple(value.shape) for key, value in model.state_dict().items() if "levels." in key}
    shapes = [stage_shapes(VARIANTS[variant], stage) for stage in range(4)]
    listed = {key: shape for each in shapes for key, shape in each.items()}
    indices = {key: shape for key, shape in listed.items() if key.endswith("relative_position_index")}
    assert {key: shape for key, shape in listed.items() if key not in indices} == network
    assert len(indices) == sum(VARIANTS[variant].depths)


def test_parts_that_tao_has_besides_have_initial_values() -> None:
    arch = VARIANTS["thin"]
    own = thin(out_indices=(0, 1)).state_dict()
    added = as_tao_has_it(own.keys(), arch)
    assert added.keys() | own.keys() >= thin().state_dict().keys() - {"norm2.weight", "norm2.bias"} - {
        "norm3.weight",
        "norm3.bias",
    }
    assert torch.equal(added["levels.3.blocks.0.gamma1"], torch.full((256,), 0.5))
    assert torch.equal(added["levels.2.blocks.1.norm2.weight"], torch.ones(128))
    assert not added["levels.2.blocks.1.mlp.fc1.bias"].any()
    assert 0.01 < added["levels.3.blocks.0.attn.qkv.weight"].std() < 0.03
    again = as_tao_has_it(own.keys(), arch)
    assert all(torch.equal(value, added[key]) for key, value in again.items())
