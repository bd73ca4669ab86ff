"""Reading checkpoints: formats and metadata, URLs, config texts."""

import argparse
import functools
import http.server
import json
import threading

import pytest
import torch
from safetensors.torch import save_file
from weights_builders import small_canonical, write_golden, write_mmdet

from ddetr_mm.errors import WeightsError
from ddetr_mm.models import GCViT
from ddetr_mm.tasks.mmdet_tools import mmdet_checkpoint
from ddetr_mm.weights import inspect_checkpoint, read_checkpoint
from ddetr_mm.weights.formats import HF, MMDET_2, OFFICIAL, TAO, from_canonical
from ddetr_mm.weights.read import local_file, model_settings
from ddetr_mm.weights.safe_read import read_raw

# --- Formats and metadata ---


def foreign(table, **options):
    refine = options.get("with_box_refine", True)
    return from_canonical(
        small_canonical(**options), table, with_box_refine=refine, two_stage=options.get("two_stage", False)
    )[0]


def write(path, content):
    torch.save(content, path)
    return path


def write_hf(folder, tensors, **config):
    folder.mkdir()
    save_file({key: value.clone() for key, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "deformable_detr", **config}))
    return folder


def test_tao_golden(tmp_path):
    info = inspect_checkpoint(write_golden("resnet50_4lvl", tmp_path))
    assert (info.format, info.meta.zero_padded_values, info.meta.label_mode) == ("tao", False, "category_id")
    assert (info.meta.background_column, info.meta.num_classes, info.meta.class_names) == (0, 8, None)
    assert info.architecture.backbone == "resnet_50" and info.meta.epoch == 11


def test_official_golden(tmp_path):
    info = inspect_checkpoint(write_golden("official_4lvl", tmp_path))
    assert (info.format, info.meta.zero_padded_values, info.meta.label_mode) == (
        "official",
        True,
        "category_id",
    )
    assert (info.meta.num_heads, info.meta.num_queries, info.meta.epoch) == (8, 20, 49)


def test_official_91_columns_are_cocos(tmp_path):
    info = inspect_checkpoint(write(tmp_path / "x.pth", {"model": foreign(OFFICIAL, num_classes=91)}))
    assert info.meta.class_names[:3] == ("background", "person", "bicycle")
    assert info.meta.class_names[90] == "toothbrush" and info.meta.class_names[12] == "unknown"
    assert info.meta.category_ids[1] == 1 and info.meta.category_ids[12] is None
    assert any("COCO" in note for note in info.notes)


def test_hugging_face_labels(tmp_path):
    named = {"id2label": {"0": "cat", "1": "dog", "2": "cow", "3": "hen"}}
    info = inspect_checkpoint(write_hf(tmp_path / "a", foreign(HF), with_box_refine=True, **named))
    assert (info.format, info.meta.label_mode, info.meta.background_column) == ("hf", "contiguous", None)
    assert info.meta.class_names == ("cat", "dog", "cow", "hen") and info.meta.zero_padded_values
    gaps = {"id2label": {"0": "N/A", "1": "dog", "2": "N/A", "3": "hen"}}
    info = inspect_checkpoint(write_hf(tmp_path / "b", foreign(HF), with_box_refine=True, **gaps))
    assert (info.meta.label_mode, info.meta.background_column) == ("category_id", 0)
    assert info.meta.category_ids == (None, 1, None, 3)
    invented = {"id2label": {str(i): f"LABEL_{i}" for i in range(4)}}
    info = inspect_checkpoint(write_hf(tmp_path / "c", foreign(HF), with_box_refine=True, **invented))
    assert info.meta.class_names is None
    assert info.meta.num_heads == 8


def test_hugging_face_branches_left_out_as_repeated_are_restored(tmp_path):
    tensors = foreign(HF, with_box_refine=False, dec_layers=3)
    kept = {key: v for key, v in tensors.items() if not key.startswith(("class_embed.1", "class_embed.2"))}
    kept = {key: v for key, v in kept.items() if not key.startswith(("bbox_embed.1", "bbox_embed.2"))}
    assert len(kept) < len(tensors)
    checkpoint = read_checkpoint(write_hf(tmp_path / "a", kept, with_box_refine=False))
    expected = small_canonical(with_box_refine=False, dec_layers=3, counters=False)
    assert set(checkpoint.state_dict) == set(expected)
    assert all(torch.equal(checkpoint.state_dict[key], value) for key, value in expected.items())


def test_hugging_face_folders_of_several_files(tmp_path):
    tensors = {key: value.clone() for key, value in foreign(HF).items()}
    expected = read_checkpoint(write_hf(tmp_path / "whole", tensors, with_box_refine=True)).state_dict
    keys = list(tensors)
    parts = {"a": keys[: len(keys) // 2], "b": keys[len(keys) // 2 :]}
    for suffix, kind in (("safetensors", "model"), ("bin", "pytorch_model")):
        folder = tmp_path / suffix
        folder.mkdir()
        (folder / "config.json").write_text(
            json.dumps({"model_type": "deformable_detr", "with_box_refine": True})
        )
        for name, part in parts.items():
            chosen = {key: tensors[key] for key in part}
            path = folder / f"{kind}-{name}.{suffix}"
            save_file(chosen, path) if suffix == "safetensors" else torch.save(chosen, path)
        weight_map = {key: f"{kind}-{name}.{suffix}" for name, part in parts.items() for key in part}
        (folder / f"{kind}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        found = read_checkpoint(folder).state_dict
        assert set(found) == set(expected)
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_weights_file_named_instead_of_its_folder(tmp_path):
    labels = {"id2label": {"0": "cat", "1": "dog", "2": "cow", "3": "hen"}}
    folder = write_hf(tmp_path / "a", foreign(HF), with_box_refine=True, **labels)
    info = inspect_checkpoint(folder / "model.safetensors")
    assert info.meta.class_names == ("cat", "dog", "cow", "hen") and info.meta.num_heads == 8


def test_bare_hugging_face_model_without_heads(tmp_path):
    tensors = {
        key.removeprefix("model."): value
        for key, value in foreign(HF, with_box_refine=False).items()
        if key.startswith("model.")
    }
    checkpoint = read_checkpoint(write_hf(tmp_path / "a", tensors, with_box_refine=False))
    assert checkpoint.architecture.num_classes is None and "level_embed" in checkpoint.state_dict


def test_mmdet_zoo_file(tmp_path):
    path = write_mmdet(
        tmp_path / "zoo.pth",
        small_canonical(neck_bias=False),
        dataset_meta={"classes": ("a", "b", "c", "d")},
        cfg="model = dict(type='DeformableDETR', with_box_refine=True, num_queries=300,"
        " encoder=dict(layer_cfg=dict(self_attn_cfg=dict(num_heads=4))))",
        epoch=50,
    )
    info = inspect_checkpoint(path)
    assert (info.format, info.meta.zero_padded_values, info.meta.label_mode) == ("mmdet", True, "contiguous")
    assert info.meta.class_names == ("a", "b", "c", "d") and info.meta.background_column is None
    assert (info.architecture.num_heads, info.architecture.enc_points) == (4, 4)
    assert not info.meta.neck_bias and info.meta.epoch == 50


def test_our_training_file_by_its_config_and_dataset(tmp_path):
    path = write_mmdet(
        tmp_path / "ours.pth",
        small_canonical(),
        dataset_meta={"classes": ("background", "a", "unknown", "c"), "category_ids": [None, 1, None, 3]},
        cfg="model = dict(type='TAODeformableDETR', zero_padded_values=False)",
    )
    info = inspect_checkpoint(path)
    assert (info.meta.zero_padded_values, info.meta.label_mode, info.meta.background_column) == (
        False,
        "category_id",
        0,
    )
    assert info.meta.category_ids == (None, 1, None, 3)


def test_contiguous_category_ids_are_kept(tmp_path):
    meta = {"classes": ("a", "b", "c", "d"), "category_ids": [3, 5, 8, 9]}
    info = inspect_checkpoint(write_mmdet(tmp_path / "x.pth", small_canonical(), dataset_meta=meta))
    assert (info.meta.label_mode, info.meta.category_ids) == ("contiguous", (3, 5, 8, 9))


def test_own_metadata_wins_over_what_the_format_means(tmp_path):
    own = {"zero_padded_values": True, "label_mode": "contiguous", "source_format": "hf", "epoch": 3}
    path = write(tmp_path / "x.pth", {"state_dict": foreign(TAO), "ddetr_mm": own})
    info = inspect_checkpoint(path)
    assert (info.format, info.meta.source_format) == ("tao", "hf")
    assert (info.meta.zero_padded_values, info.meta.label_mode, info.meta.background_column) == (
        True,
        "contiguous",
        None,
    )


def test_metadata_of_wrong_types_is_not_believed(tmp_path):
    own = {
        "zero_padded_values": "no",
        "class_names": 7,
        "num_heads": "x",
        "label_mode": 1,
        "category_ids": "a",
    }
    path = write(tmp_path / "x.pth", {"state_dict": foreign(TAO), "ddetr_mm": own})
    info = inspect_checkpoint(path)
    assert (info.meta.zero_padded_values, info.meta.class_names, info.architecture.num_heads) == (
        False,
        None,
        8,
    )


def test_class_names_of_another_number_are_reported_and_left_out(tmp_path):
    path = write_mmdet(tmp_path / "x.pth", small_canonical(), dataset_meta={"classes": ("a", "b")})
    info = inspect_checkpoint(path)
    assert info.meta.class_names is None and "2 class names for 4 columns" in info.notes[0]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_are_taken_off(prefix, tmp_path):
    wrapped = {prefix + key: value for key, value in foreign(TAO).items()}
    wrapped[prefix + "extra.weight"] = torch.ones(1)
    checkpoint = read_checkpoint(write(tmp_path / "x.pth", {"state_dict": wrapped}))
    assert set(checkpoint.state_dict) == set(small_canonical(counters=False))
    assert checkpoint.trace.unexpected == [prefix + "extra.weight"]
    assert all(key.startswith(prefix) for key in checkpoint.trace.mapped)


def test_tao_with_one_prefix_only(tmp_path):
    short = {key.removeprefix("model."): value for key, value in foreign(TAO).items()}
    checkpoint = read_checkpoint(write(tmp_path / "x.pth", {"state_dict": short}))
    assert checkpoint.format == "tao" and set(checkpoint.state_dict) == set(small_canonical(counters=False))
    assert set(checkpoint.trace.mapped) | set(checkpoint.trace.aliases) == set(short)


def test_mmdet_2_file(tmp_path):
    path = write_mmdet(tmp_path / "old.pth", foreign(MMDET_2), CLASSES=("a", "b", "c", "d"))
    checkpoint = read_checkpoint(path)
    assert checkpoint.format == "mmdet" and set(checkpoint.state_dict) == set(small_canonical())
    assert checkpoint.meta.class_names == ("a", "b", "c", "d")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused_by_name(value, tmp_path):
    state_dict = small_canonical()
    state_dict["encoder.layers.0.norms.1.weight"][2] = value
    path = write_mmdet(tmp_path / "x.pth", state_dict)
    with pytest.raises(WeightsError, match=r"encoder\.layers\.0\.norms\.1\.weight"):
        read_checkpoint(path)
    assert inspect_checkpoint(path).format == "mmdet"


def test_changing_what_was_read_leaves_the_file_alone(tmp_path):
    path = write_mmdet(tmp_path / "x.pth", small_canonical())
    before = path.read_bytes()
    read_checkpoint(path).state_dict["level_embed"].zero_()
    assert path.read_bytes() == before


def test_args_that_are_no_namespace_do_no_harm(tmp_path):
    content = {"model": foreign(OFFICIAL), "args": argparse.Namespace(nheads="many")}
    assert inspect_checkpoint(write(tmp_path / "x.pth", content)).architecture.num_heads == 8
    content["args"] = ["--nheads", "8"]
    assert inspect_checkpoint(write(tmp_path / "x.pth", content)).architecture.num_heads == 8


def test_dilation_is_read_from_every_format_that_has_it(tmp_path):
    def dilation(name, **content):
        path = tmp_path / name
        torch.save(content, path)
        return inspect_checkpoint(path).meta.dilation

    official, _ = from_canonical(small_canonical(), OFFICIAL, with_box_refine=True, two_stage=False)
    for value in (True, False):
        assert dilation("official.pth", model=official, args=argparse.Namespace(dilation=value)) is value
    assert dilation("official.pth", model=official, args=argparse.Namespace(dilation="yes")) is None
    meta = {"cfg": "model = dict(backbone=dict(type='TorchvisionDilatedResNet'))"}
    assert dilation("mmdet.pth", state_dict=small_canonical(), meta=meta) is True
    meta = {"cfg": "model = dict(backbone=dict(type='ResNet'))"}
    assert dilation("mmdet.pth", state_dict=small_canonical(), meta=meta) is False
    assert dilation("bare.pth", state_dict=small_canonical()) is None


# --- URLs ---


class Harmful:
    def __reduce__(self):
        return print, ("code from a file ran",)


@pytest.fixture
def url(tmp_path, monkeypatch):
    """A folder served over HTTP, and an empty cache."""
    served = tmp_path / "served"
    served.mkdir()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", served
        server.shutdown()
        thread.join()


def test_a_file_is_downloaded_once(url):
    address, served = url
    torch.save({"a": torch.ones(2)}, served / "a b.pth")
    path = local_file(f"{address}/a%20b.pth?download=1")
    assert path.name.endswith("-a b.pth")
    assert torch.equal(read_raw(path).payload["a"], torch.ones(2))
    (served / "a b.pth").unlink()
    assert local_file(f"{address}/a%20b.pth?download=1") == path
    with pytest.raises(WeightsError, match="cannot be downloaded: .*404"):
        local_file(f"{address}/other.pth")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_paths_stay_and_other_schemes_are_refused(tmp_path):
    assert local_file(tmp_path / "x.pth") == tmp_path / "x.pth"
    with pytest.raises(WeightsError, match=r"s3://.*an http\(s\) URL"):
        local_file("s3://bucket/x.pth")


def test_code_behind_a_url_does_not_run(url, capsys, tmp_path):
    address, served = url
    torch.save({"state_dict": {}, "extra": Harmful()}, served / "x.pth")
    backbone = GCViT(init_cfg={"type": "Pretrained", "checkpoint": f"{address}/x.pth"})
    with pytest.raises(WeightsError, match="print"):
        backbone.init_weights()
    with pytest.raises(WeightsError, match="print"):
        mmdet_checkpoint(f"{address}/x.pth", tmp_path)
    assert "code from a file ran" not in capsys.readouterr().out


# --- Config texts ---


def test_literals_and_dict_calls_are_read():
    text = """
lr = 0.1
model = dict(
    type='TAODeformableDETR', with_box_refine=True, num_queries=300, offset=-0.5,
    neck=dict(in_channels=[512, 1024], norm_cfg={'type': 'GN'}), sizes=(1, 2))
"""
    settings = model_settings(text)
    assert settings["type"] == "TAODeformableDETR" and settings["with_box_refine"] is True
    assert settings["neck"] == {"in_channels": [512, 1024], "norm_cfg": {"type": "GN"}}
    assert settings["offset"] == -0.5 and settings["sizes"] == [1, 2]


@pytest.mark.parametrize(
    "text", ["", "model = (", "x = 1", "model = 3", None, 7, "model = dict(" * 5000, "model: dict = {}"]
)
def test_anything_else_gives_nothing(text):
    assert model_settings(text) == {}


def test_nothing_is_executed(tmp_path):
    target = tmp_path / "made"
    text = f"import os\nos.system('touch {target}')\nmodel = dict(a=open({str(target)!r}, 'w'), b=1)\n"
    assert model_settings(text) == {"a": None, "b": 1}
    assert not target.exists()
