"""``ddetr-mm weights`` as a user types it: the file, a summary, and the account of every key."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from weights_builders import detector, resnet, small_canonical

from ddetr_mm import __version__
from ddetr_mm.cli import main
from ddetr_mm.deploy.onnx_export import ExportOptions, export_onnx
from ddetr_mm.spec import load_spec
from ddetr_mm.tasks.runner import config_source
from ddetr_mm.translate.model import without_unread_stages
from ddetr_mm.weights import convert_checkpoint, fill_model, read_checkpoint, to_category_ids
from ddetr_mm.weights.formats import TAO, from_canonical


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A whole small network in TAO's names, and a key that is not the network's."""
    named, _trace = from_canonical(small_canonical(), TAO, with_box_refine=True, two_stage=False)
    state_dict = {**named, "model.criterion.empty_weight": torch.ones(3)}
    path = tmp_path / "tao.pth"
    torch.save({"state_dict": state_dict, "pytorch-lightning_version": "2.0.0"}, path)
    return path


def test_every_key_is_accounted_for_beside_the_file(source, tmp_path, capsys):
    target = tmp_path / "mmdet.pth"
    assert main(["weights", str(source), str(target), "--to", "mmdet"]) == 0
    report = json.loads((tmp_path / "mmdet.report.json").read_text())
    assert report["mapped"]["model.model.query_embed.weight"] == ["query_embedding.weight"]
    assert report["unexpected"] == ["model.criterion.empty_weight"]
    assert report["missing"] == []
    keys = torch.load(source, weights_only=True)["state_dict"].keys()
    assert {*report["mapped"], *report["unexpected"], *report["aliases"], *report["dropped"]} == set(keys)
    printed = capsys.readouterr().out
    assert f"{len(report['mapped'])} keys loaded" in printed and "model.criterion.empty_weight" in printed
    assert "mmdet.report.json" in printed
    written = torch.load(target, weights_only=True)["state_dict"]
    assert {key for targets in report["mapped"].values() for key in targets} == set(written)


def test_a_refused_conversion_leaves_nothing(source, tmp_path, capsys):
    source.write_text("no weights")
    assert main(["weights", str(source), str(tmp_path / "x.pth"), "--to", "hf"]) == 2
    assert "is a text file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tao.pth"]


# --- Without DST: a description ---


def described(path, capsys, *options: str) -> tuple[str, dict]:
    """What the command prints of a file: the comments, and the sections of a spec."""
    assert main(["weights", str(path), *options]) == 0
    printed = capsys.readouterr().out
    comments = [line.removeprefix("#").strip() for line in printed.splitlines() if line.startswith("#")]
    return " ".join(comments), yaml.safe_load(printed) or {}


def network_of(path, printed: dict, folder: Path):
    """The network of a spec with what was printed, with the file's weights: every one must fit."""
    init_default_scope("mmdet")
    spec = folder / "spec.yaml"
    spec.write_text(yaml.safe_dump({**printed, "results_dir": str(folder / "results")}))
    loaded = load_spec(spec, (), "evaluate", require_mandatory=False)
    config = Config.fromstring(config_source(loaded, "evaluate"), ".py")
    model = MODELS.build(config.model)
    columns = model.bbox_head.num_classes
    assert fill_model(model, to_category_ids(read_checkpoint(path), columns), strict=True).missing == []
    return model


CLASSES = ("background", "cat", "dog", "unknown", "ox")
OPTIONS = dict(kind="TAODeformableDETR", zero_padded_values=False)


def on(backbone, levels, **options):
    """A detector with the levels of a list of indices."""
    stages = tuple(level for level in levels if level < 4)
    if backbone == "gcvit":
        config = dict(type="GCViT", variant="tiny", out_indices=stages)
        channels = [64 * 2**stage for stage in stages]
    else:
        config = without_unread_stages(resnet(int(backbone), stages))
        channels = [(256 if int(backbone) >= 50 else 64) * 2**stage for stage in stages]
    return detector(backbone=config, in_channels=channels, num_levels=len(levels), **{**OPTIONS, **options})


def origins(folder: Path) -> dict[str, tuple[Path, str]]:
    """The file of each origin, and the words by which it is described."""
    model = on("18", (1, 2, 4))
    state_dict = model.state_dict()
    meta = dict(dataset_meta=dict(classes=CLASSES), mmengine_version="0.10.7", epoch=12)
    torch.save({"state_dict": state_dict, "meta": meta}, folder / "mmengine.pth")
    names = dict(spec={"model": {"nheads": 8}}, class_names=CLASSES)
    for to, name in (("tao", "tao.pth"), ("official", "official.pth"), ("hf", "hf"), ("mmdet", "ours.pth")):
        convert_checkpoint(folder / "mmengine.pth", folder / name, to, **names)
    tensors = torch.load(folder / "official.pth", weights_only=True)["model"]
    torch.save({"model": tensors}, folder / "theirs.pth")
    np.savez(folder / "arrays.npz", **{key: value.numpy() for key, value in tensors.items()})
    (folder / "arrays.pkl").write_bytes(pickle.dumps({"model": {k: v.numpy() for k, v in tensors.items()}}))
    lightning = {f"model.model.{key}": value for key, value in tensors.items()}
    content = {"state_dict": lightning, "epoch": 7, "pytorch-lightning_version": "2.3"}
    torch.save(content, folder / "lightning.pth")
    convert_checkpoint(folder / "mmengine.pth", folder / "x.safetensors", "official", **names)
    torch.save({"model": tensors, "model_ema": {**tensors}}, folder / "averaged.pth")
    half = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
    torch.save({"model": half}, folder / "half.pth")
    version = f"written by ddetr-mm {__version__}"
    return {
        "mmengine.pth": "a PyTorch file, with mmdet's names, written by mmengine 0.10.7, epoch 12",
        "ours.pth": f"a PyTorch file, with mmdet's names, {version}, epoch 12",
        "tao.pth": "a PyTorch file, with TAO's names, written by PyTorch Lightning 2.0.0, "
        f"{version}, converted from mmdet's names, epoch 12",
        "lightning.pth": "a PyTorch file, with TAO's names, written by PyTorch Lightning 2.3, epoch 7",
        "official.pth": f"a PyTorch file, with the original authors' names, {version}, converted from",
        "theirs.pth": "a PyTorch file, with the original authors' names network:",
        "hf": f"a Hugging Face folder, with Hugging Face's names, {version}, converted from mmdet's names",
        "arrays.npz": "a NumPy archive, with the original authors' names",
        "arrays.pkl": "a pickle of arrays, with the original authors' names",
        "x.safetensors": f"a safetensors file, with the original authors' names, {version}",
        "averaged.pth": "note: the file holds 2 sets of weights: 'model_ema' (averaged) is read",
        "half.pth": "million values in float16",
    }


ORIGINS = [
    *("mmengine.pth", "ours.pth", "tao.pth", "lightning.pth", "official.pth", "theirs.pth", "hf"),
    *("arrays.npz", "arrays.pkl", "x.safetensors", "averaged.pth", "half.pth"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The files of :func:`origins`; nobody may change them."""
    folder = tmp_path_factory.mktemp("origins")
    return folder, origins(folder)


@pytest.mark.parametrize("name", ORIGINS)
def test_a_file_of_each_origin_is_described(name, files, tmp_path, capsys):
    folder, words = files
    said, printed = described(folder / name, capsys)
    assert words[name] in said
    assert "network: Deformable DETR on resnet_18, box refinement, 3 levels" in said
    assert "used as: evaluate.checkpoint, inference.checkpoint, export.checkpoint, ddetr-mm predict;" in said
    assert "not to resume a run" in said and "resume_training_checkpoint_path" not in said
    named = name in ("mmengine.pth", "ours.pth", "tao.pth", "official.pth", "hf", "x.safetensors")
    assert ("1 cat, 2 dog, 4 ox" in said) is named and ("the file names none" in said) is not named
    assert printed["model"]["return_interm_indices"] == [1, 2, 4]
    # Names without ids count positions: in a spec, whose column 0 is the background, one column more.
    assert printed["dataset"]["num_classes"] == (6 if named else 5)
    assert printed["ddetr_mm"]["backbone"]["depth"] == 18
    network_of(folder / name, printed, tmp_path)


def test_the_list_of_origins_is_whole(files):
    assert sorted(files[1]) == sorted(ORIGINS)


@pytest.mark.parametrize(
    ("backbone", "levels", "kind"),
    [("50", (1, 2), "resnet_50"), ("101", (3, 4), "resnet_101"), ("gcvit", (0, 1, 4), "gc_vit_tiny")],
)
def test_what_is_printed_builds_the_network(backbone, levels, kind, tmp_path, capsys):
    """TAO's backbones and others, without the stages that are not read."""
    path = tmp_path / "x.pth"
    own = {"spec": {"model": {"backbone": kind}}, "zero_padded_values": True}
    state_dict = on(backbone, levels, with_box_refine=backbone != "101").state_dict()
    torch.save({"state_dict": state_dict, "meta": {"ddetr_mm": own}}, path)
    said, printed = described(path, capsys)
    assert f"on {kind}, " in said and printed["ddetr_mm"]["zero_padded_values"] is True
    assert printed["model"].get("backbone") == (None if backbone == "101" else kind)
    model = network_of(path, printed, tmp_path)
    assert model.with_box_refine is (backbone != "101") and model.zero_padded_values


def test_a_run_s_checkpoint_can_be_resumed(tmp_path, capsys):
    path = tmp_path / "x.pth"
    content = {"state_dict": on("18", (1,)).state_dict(), "optimizer": {}, "meta": {"epoch": 3, "iter": 9}}
    torch.save(content, path)
    said, _printed = described(path, capsys)
    assert "epoch 3" in said and "train.resume_training_checkpoint_path" in said


def test_sets_of_weights_are_chosen(tmp_path, capsys):
    path = tmp_path / "x.pth"
    torch.save({"a": on("18", (1,)).state_dict(), "b": on("18", (1, 2)).state_dict()}, path)
    assert described(path, capsys, "--entry", "b")[1]["model"]["return_interm_indices"] == [1, 2]
    assert described(path, capsys, "--entry", "a")[1]["model"]["return_interm_indices"] == [1]


def test_networks_that_no_spec_can_say(tmp_path, capsys):
    path = tmp_path / "x.pth"
    torch.save({"state_dict": detector(as_two_stage=True, seed=1, backbone="resnet_18").state_dict()}, path)
    said, printed = described(path, capsys)
    assert "no spec can say its network: it is a two-stage network" in said and printed == {}
    assert "used as: model.pretrained_backbone_path" in said and "predict" not in said
    torch.save({"state_dict": detector(seed=1).state_dict()}, path)  # on a thin ResNet
    said, printed = described(path, capsys)
    assert "on another backbone" in said and "no spec can say its network" in said and printed == {}


def test_backbones_and_other_networks(tmp_path, capsys):
    path = tmp_path / "x.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    said, printed = described(path, capsys)
    assert "holds a backbone (resnet_18), not a detector" in said and printed == {}
    assert "used as: name the file as model.pretrained_backbone_path, with ddetr_mm.backbone: {type" in said
    names = {**on("18", (1,)).state_dict(), "label_enc.weight": torch.zeros(2)}
    torch.save(names, path)
    assert "holds DINO, not a Deformable DETR" in described(path, capsys)[0]
    torch.save({"a": torch.zeros(1)}, path)
    assert main(["weights", str(path)]) == 2
    assert "holds no Deformable DETR of any known format" in capsys.readouterr().err


def test_a_graph_is_described(tmp_path, capsys):
    path = tmp_path / "x.onnx"
    model = on("18", (1,))
    export_onnx(model, path, ExportOptions((64, 96), meta={"class_names": ["a", "b"]}), log=lambda _: None)
    said, printed = described(path, capsys)
    assert "an exported ONNX graph" in said and "input: 96 x 64 pixels" in said and "any batch" in said
    assert "5 columns: a, b" in said and "gen_trt_engine.onnx_file" in said and printed == {}


@pytest.mark.parametrize("words", [("y.pth",), ("--to", "tao")])
def test_half_a_conversion_is_refused(words, source, capsys):
    assert main(["weights", str(source), *words]) == 2
    assert "give both to convert, or neither to describe the file" in capsys.readouterr().err
