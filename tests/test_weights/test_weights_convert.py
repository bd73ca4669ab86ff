"""Conversions between files: bit-exact both ways, every key reported, nothing half-written."""

import dataclasses
import functools
import itertools
import json
import re

import pytest
import torch
from safetensors import safe_open
from weights_builders import (
    detector,
    golden_file,
    golden_state_dict,
    small_canonical,
    write_golden,
    write_mmdet,
)

from ddetr_mm.errors import WeightsError
from ddetr_mm.translate.model import without_unread_stages
from ddetr_mm.weights import (
    FORMATS,
    Checkpoint,
    CheckpointMeta,
    convert_checkpoint,
    infer_architecture,
    inspect_checkpoint,
    load_for_model,
    read_checkpoint,
)
from ddetr_mm.weights.checkpoint import named_backbone
from ddetr_mm.weights.formats import OFFICIAL, TAO, KeyTrace, from_canonical
from ddetr_mm.weights.gcvit import VARIANTS, relative_position_index, stage_shapes
from ddetr_mm.weights.report import UNREAD

NAMES = ("background", "cat", "dog", "cow", "hen", "ox", "fox", "owl")


def file_tensors(path):
    """Every tensor of a written file under the file's own keys."""
    content = torch.load(path, weights_only=True)
    return content.get("state_dict") or content["model"]


def assert_accounts_for_everything(report, source_keys, target_keys):
    """Every key of the file stands in one group, every key of the target comes from somewhere."""
    groups = [list(report.mapped), report.unexpected, list(report.aliases), list(report.dropped)]
    assert sorted(itertools.chain(*groups)) == sorted(source_keys)
    targets = list(itertools.chain(*report.mapped.values())) + list(report.filled)
    assert sorted(set(targets)) == sorted(target_keys)


@pytest.mark.parametrize(
    ("name", "route"),
    [
        ("resnet50_4lvl", ("mmdet", "hf", "official", "tao")),
        ("official_4lvl", ("tao", "mmdet", "hf", "official")),
        ("gc_vit_xxtiny_4lvl", ("official", "mmdet", "tao")),
    ],
)
def test_golden_through_every_format_and_back(name, route, tmp_path):
    """Bit for bit, key for key; and the origin is remembered on the way."""
    path = write_golden(name, tmp_path)
    first = inspect_checkpoint(path)
    for step in route:
        destination = tmp_path / (step if step == "hf" else f"{step}.pth")
        report = convert_checkpoint(path, destination, step)
        assert report.complete, report.summary()
        path = destination
        info = inspect_checkpoint(path)
        assert info.format == step and info.meta.source_format == first.format
        assert info.meta.zero_padded_values == first.meta.zero_padded_values
    expected, written = dict(golden_state_dict(name)), file_tensors(path)
    if name.startswith("gc_vit"):  # golden files list no integer buffers
        blocks = {key.rpartition(".")[0] for key in expected if key.endswith(".relative_position_bias_table")}
        windows = {block: 14 if ".levels.2." in block else 7 for block in blocks}
        expected |= {
            f"{block}.relative_position_index": relative_position_index(window)
            for block, window in windows.items()
        }
    assert sorted(written) == sorted(expected)
    assert all(torch.equal(written[key], expected[key]) for key in expected)


@pytest.mark.parametrize("to", ["mmdet", "tao", "official"])
def test_every_key_is_in_the_report(to, tmp_path):
    tensors, _ = from_canonical(small_canonical(), TAO, with_box_refine=True, two_stage=False)
    torch.save({"state_dict": tensors}, tmp_path / "x.pth")
    report = convert_checkpoint(tmp_path / "x.pth", tmp_path / "out.pth", to)
    assert_accounts_for_everything(report, tensors, file_tensors(tmp_path / "out.pth"))
    assert report.complete
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["complete"] and plain["source_format"] == "tao" and plain["target_format"] == to
    assert report.summary().count("\n") < 8


def test_foreign_keys_are_reported_and_missing_ones_refused(tmp_path):
    tensors, _ = from_canonical(small_canonical(), OFFICIAL, with_box_refine=True, two_stage=False)
    tensors["mask_head.weight"] = torch.zeros(2)
    torch.save({"model": tensors}, tmp_path / "x.pth")
    report = convert_checkpoint(tmp_path / "x.pth", tmp_path / "whole.pth", "mmdet")
    assert report.unexpected == ["mask_head.weight"] and not report.complete
    assert "mask_head.weight" in report.summary()
    del tensors["transformer.encoder.layers.0.norm1.bias"]
    torch.save({"model": tensors}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"nothing was written: 1 .*encoder\.layers\.0\.norms\.0\.bias"):
        convert_checkpoint(tmp_path / "x.pth", tmp_path / "y.pth", "mmdet")
    assert not (tmp_path / "y.pth").exists()


@pytest.mark.parametrize(
    ("lost", "shown"),
    [
        ("backbone.layer3.1.bn2.running_var", r"backbone\.layer3\.1\.bn2\.running_var"),
        ("backbone.layer2.0.downsample.0.weight", r"backbone\.layer2\.0\.downsample\.0\.weight"),
        ("backbone.layer4.", "a stage of 64 channels"),
        ("backbone.", r"backbone\.\*"),
        ("bbox_head.", r"bbox_head\.cls_branches\.0\.weight"),
        ("query_embedding.", r"query_embedding\.weight"),
    ],
)
@pytest.mark.parametrize("to", ["mmdet", "official"])
def test_a_part_of_a_network_is_not_written(to, lost, shown, tmp_path):
    tensors = {key: value for key, value in _thin_state_dict().items() if not key.startswith(lost)}
    source = write_mmdet(tmp_path / "x.pth", tensors)
    with pytest.raises(WeightsError, match=f"nothing was written.*{shown}"):
        convert_checkpoint(source, tmp_path / "y.pth", to)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


@functools.cache
def _thin_state_dict():
    return detector(seed=1).state_dict()


def test_neck_without_bias_gains_zeros_and_loses_them_again(tmp_path):
    canonical = small_canonical(neck_bias=False, counters=False)
    zoo = write_mmdet(tmp_path / "zoo.pth", canonical, dataset_meta={"classes": ("a", "b", "c", "d")})
    report = convert_checkpoint(zoo, tmp_path / "official.pth", "official")
    written = file_tensors(tmp_path / "official.pth")
    assert not written["input_proj.0.0.bias"].any() and "input_proj.2.0.bias" in report.filled
    assert_accounts_for_everything(report, canonical, written)
    report = convert_checkpoint(tmp_path / "official.pth", tmp_path / "back.pth", "mmdet")
    back = file_tensors(tmp_path / "back.pth")
    assert set(back) == set(canonical) and "input_proj.0.0.bias" in report.dropped
    assert all(torch.equal(back[key], canonical[key]) for key in canonical)
    assert torch.load(tmp_path / "back.pth", weights_only=True)["meta"]["dataset_meta"]["classes"] == (
        "a",
        "b",
        "c",
        "d",
    )


def test_two_stage_travels_where_it_can(tmp_path):
    canonical = small_canonical(two_stage=True, counters=False)
    source = write_mmdet(tmp_path / "x.pth", canonical)
    convert_checkpoint(source, tmp_path / "official.pth", "official")
    written = file_tensors(tmp_path / "official.pth")
    assert "transformer.decoder.class_embed.2.bias" in written and "transformer.pos_trans.weight" in written
    assert read_checkpoint(tmp_path / "official.pth").architecture.two_stage
    convert_checkpoint(tmp_path / "official.pth", tmp_path / "back.pth", "mmdet")
    back = file_tensors(tmp_path / "back.pth")
    assert all(torch.equal(back[key], canonical[key]) for key in canonical) and set(back) == set(canonical)
    with pytest.raises(WeightsError, match="two-stage"):
        convert_checkpoint(source, tmp_path / "tao.pth", "tao")
    assert not (tmp_path / "tao.pth").exists()


def test_hugging_face_cannot_hold_every_backbone(tmp_path):
    source = write_golden("gc_vit_xxtiny_4lvl", tmp_path)
    with pytest.raises(WeightsError, match="gc_vit_xxtiny"):
        convert_checkpoint(source, tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()


@dataclasses.dataclass
class ModelPart:
    nheads: int = 4
    num_queries: int = 300


@dataclasses.dataclass
class SpecLike:
    encryption_key: str = "secret"
    model: ModelPart = dataclasses.field(default_factory=ModelPart)
    wandb: dict = dataclasses.field(default_factory=lambda: {"api_key": "secret", "project": "p"})


@pytest.mark.parametrize("to", FORMATS)
def test_safetensors_carry_class_names_and_the_spec_without_secrets(to, tmp_path):
    source = tmp_path / "tao.pth"
    backbone = "resnet_18" if to == "hf" else "thin"
    tensors = detector(backbone=backbone, num_classes=8, num_queries=20, seed=None).state_dict()
    convert_checkpoint(write_mmdet(tmp_path / "x.pth", tensors), source, "tao")
    path = tmp_path / "out.safetensors"
    report = convert_checkpoint(source, path, to, spec=SpecLike(), class_names=NAMES)
    assert "secret" not in path.read_bytes()[:200_000].decode("latin-1")
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["ddetr_mm"])
    assert metadata["class_names"] == list(NAMES) and metadata["spec"]["model"]["nheads"] == 4
    info = inspect_checkpoint(path)
    assert (info.format, info.meta.class_names, info.meta.zero_padded_values) == (to, NAMES, True)
    assert (info.architecture.num_heads, info.architecture.enc_points) == (4, 8)
    assert any("num_queries = 300" in note and "20" in note for note in report.notes)
    expected, found = read_checkpoint(source).state_dict, read_checkpoint(path).state_dict
    if to != "mmdet":  # frozen batch norm there counts no steps
        expected = {key: value for key, value in expected.items() if not key.endswith("num_batches_tracked")}
    assert set(found) == set(expected) and all(torch.equal(found[key], expected[key]) for key in expected)


def test_class_names_give_category_ids_where_columns_are_ids(tmp_path):
    tensors, _ = from_canonical(small_canonical(), TAO, with_box_refine=True, two_stage=False)
    torch.save({"state_dict": tensors}, tmp_path / "x.pth")
    convert_checkpoint(
        tmp_path / "x.pth", tmp_path / "y.pth", "mmdet", class_names=("background", "a", "unknown", "c")
    )
    assert inspect_checkpoint(tmp_path / "y.pth").meta.category_ids == (None, 1, None, 3)


def test_class_names_must_be_one_a_column(tmp_path):
    source = write_mmdet(tmp_path / "w.pth", small_canonical())
    with pytest.raises(WeightsError, match="4 class columns, but 2"):
        convert_checkpoint(source, tmp_path / "x.pth", "mmdet", class_names=("a", "b"))


def test_wrong_target_and_destination(tmp_path):
    source = write_mmdet(tmp_path / "x.pth", small_canonical())
    with pytest.raises(WeightsError, match="mmdet, tao, official, hf"):
        convert_checkpoint(source, tmp_path / "y.pth", "onnx")
    with pytest.raises(WeightsError, match="is a folder"):
        convert_checkpoint(source, tmp_path, "mmdet")
    blocker = tmp_path / "blocker"
    blocker.write_text("")
    with pytest.raises(WeightsError, match="cannot be written"):
        convert_checkpoint(source, blocker / "y.pth", "mmdet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocker", "x.pth"]


def test_a_file_can_be_converted_in_place(tmp_path):
    path = write_mmdet(tmp_path / "x.pth", small_canonical())
    convert_checkpoint(path, path, "tao")
    assert inspect_checkpoint(path).format == "tao"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pth"]


def test_written_files_load_in_torch_without_any_allowed_class(tmp_path):
    source = write_mmdet(tmp_path / "x.pth", small_canonical())
    for to in ("mmdet", "tao", "official"):
        convert_checkpoint(source, tmp_path / f"{to}.pth", to, spec=SpecLike())
        assert torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / f"{to}.pth") == []


def test_difference_of_padding_is_reported(tmp_path):
    tensors, _ = from_canonical(small_canonical(), TAO, with_box_refine=True, two_stage=False)
    source = tmp_path / "tao.pth"
    torch.save({"state_dict": tensors}, source)
    report = convert_checkpoint(source, tmp_path / "x.pth", "official")
    assert any("padding" in note for note in report.notes)
    report = convert_checkpoint(source, tmp_path / "x.pth", "mmdet")
    assert not any("padding" in note for note in report.notes)


# --- Keys of the target's own network ---

WINDOWS = {0: 7, 1: 7, 2: 14, 3: 7}


def taos_keys(name, levels):
    """The keys of TAO's file for these feature levels, from those of its file for levels 1 to 4."""
    usual = list(json.loads(golden_file(f"{name}.json").read_text())["state_dict"])
    stages = [level for level in levels if level < 4]
    keys = []
    for key in usual:
        part = key.removeprefix("model.model.")
        if part.startswith("input_proj."):
            continue
        if re.match(r"backbone\.0\.body\.layer[1-4]\.", part) and int(part[21]) - 1 > max(stages):
            continue  # torchvision's IntermediateLayerGetter ends with the last layer that is returned
        if re.match(r"backbone\.0\.body\.norm\d\.", part):
            continue
        keys.append(key)
        if key.endswith("relative_position_bias_table"):
            keys.append(key.replace("bias_table", "index"))
    projections = [key for key in usual if ".input_proj.0." in key]
    keys += [key.replace("proj.0.", f"proj.{level}.") for level in range(len(levels)) for key in projections]
    if name.startswith("gc_vit"):
        norms = [f"model.model.backbone.0.body.norm{stage}" for stage in stages]
        keys += [f"{norm}.{leaf}" for norm in norms for leaf in ("weight", "bias")]
    return sorted(keys)


def written_by_us(path, name, levels, whole):
    """A checkpoint of ours: a network of these levels, of a backbone with or without its unread stages."""
    stages = tuple(level for level in levels if level < 4)
    if name.startswith("gc_vit"):
        backbone = dict(type="GCViT", variant="xxtiny", out_indices=stages)
        channels = [64 * 2**stage for stage in stages]
    else:
        backbone = dict(type="ResNet", depth=50, base_channels=8, out_indices=stages)
        backbone = backbone if whole else without_unread_stages(backbone)
        channels = [32 * 2**stage for stage in stages]
    model = detector(
        backbone=backbone,
        in_channels=channels,
        num_levels=len(levels),
        kind="TAODeformableDETR",
        zero_padded_values=False,
    )
    return model, write_mmdet(path, model.state_dict())


INDEX_LISTS = [[1, 2], [0], [3], [2, 4], [1, 2, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("levels", INDEX_LISTS, ids=str)
@pytest.mark.parametrize("whole", [False, True])
def test_a_written_file_has_taos_keys(levels, whole, tmp_path):
    model, source = written_by_us(tmp_path / "x.pth", "resnet50_4lvl", levels, whole)
    report = convert_checkpoint(source, tmp_path / "tao.pth", "tao")
    written = file_tensors(tmp_path / "tao.pth")
    expected = taos_keys("resnet50_4lvl", levels)
    assert sorted(written) == expected
    assert report.complete and report.dropped["backbone.bn1.num_batches_tracked"]
    unread = max(level for level in levels if level < 4) < 3 and whole
    assert (UNREAD in report.dropped.values()) is unread
    convert_checkpoint(source, tmp_path / "official.pth", "official")
    official = file_tensors(tmp_path / "official.pth")
    assert sorted(official) == [key.removeprefix("model.model.") for key in expected]
    # Back again: what is read has its values.
    assert load_for_model(model, tmp_path / "tao.pth", strict=True).missing == []


@pytest.mark.parametrize("levels", [[1, 2], [0, 4], [1, 2, 3, 4]], ids=str)
def test_a_written_gcvit_has_taos_keys(levels, tmp_path):
    model, source = written_by_us(tmp_path / "x.pth", "gc_vit_xxtiny_4lvl", levels, False)
    report = convert_checkpoint(source, tmp_path / "tao.pth", "tao")
    written = file_tensors(tmp_path / "tao.pth")
    assert sorted(written) == taos_keys("gc_vit_xxtiny_4lvl", levels) and report.complete
    for stage, window in WINDOWS.items():
        index = written[f"model.model.backbone.0.body.levels.{stage}.blocks.1.attn.relative_position_index"]
        assert torch.equal(index, relative_position_index(window))
    shapes = json.loads(golden_file("gc_vit_xxtiny_4lvl.json").read_text())["state_dict"]
    backbone = {key: list(value.shape) for key, value in written.items() if ".levels." in key}
    assert {key: shapes[key] for key in backbone if key in shapes} == {
        key: shape for key, shape in backbone.items() if not key.endswith("_index")
    }
    added = [key for key, why in report.filled.items() if "not read" in why]
    assert all(written[key].isfinite().all() for key in added)
    last = max(level for level in levels if level < 4)
    assert {int(key.split(".")[6]) for key in added} == ({*range(last, 4)} if last < 3 else set())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    read = load_for_model(model, tmp_path / "tao.pth", strict=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (UNREAD in read.dropped.values()) is (last < 3)


@pytest.mark.parametrize("variant", ["xtiny", "tiny", "large_384"])
def test_a_gcvit_without_its_last_stages_is_of_the_spec_s_size(variant, tmp_path):
    """Two stages of xtiny are those of tiny; the rest, which TAO wants, is the spec's."""
    shapes = {
        key: shape
        for stage in range(2)
        for key, shape in stage_shapes(VARIANTS[variant], stage).items()
        if not key.endswith("_index") and "levels.1.downsample" not in key
    }
    meta = CheckpointMeta("mmdet", False, "contiguous", spec={"model": {"backbone": f"gc_vit_{variant}"}})
    state_dict = {f"backbone.{key}": torch.empty(shape, device="meta") for key, shape in shapes.items()}
    checkpoint = Checkpoint(state_dict, "mmdet", meta, infer_architecture({}), tmp_path, KeyTrace())
    assert named_backbone(checkpoint) == f"gc_vit_{variant}"
    nameless = dataclasses.replace(checkpoint, meta=dataclasses.replace(meta, spec=None))
    assert named_backbone(nameless) == f"gc_vit_{'xtiny' if variant == 'tiny' else variant}"


@pytest.mark.parametrize("levels", [[1, 2], [0, 2, 4], [1, 2, 3, 4]], ids=str)
def test_a_written_folder_has_transformers_keys(levels, tmp_path):
    transformers = pytest.importorskip("transformers")
    stages = tuple(level for level in levels if level < 4)
    whole = dict(type="ResNet", depth=18, out_indices=stages)
    channels = [64 * 2**stage for stage in stages]
    model = detector(backbone=whole, in_channels=channels, num_levels=len(levels))
    convert_checkpoint(write_mmdet(tmp_path / "x.pth", model.state_dict()), tmp_path / "hf", "hf")
    _model, found = transformers.DeformableDetrForObjectDetection.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
