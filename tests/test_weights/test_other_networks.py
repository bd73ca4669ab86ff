"""Networks that installed packages can build, from their configs and without weights: named, or read."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import mmdet
import pytest
import timm
import torch
import torchvision
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import nn
from weights_builders import detector

from ddetr_mm.errors import WeightsError
from ddetr_mm.weights import convert_checkpoint, load, load_backbone
from ddetr_mm.weights.read import find_weights
from ddetr_mm.weights.safe_read import RawFile

CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs"
UNUSABLE = "it has no backbone that a spec can name"


def raw_file(model: nn.Module, prefix: str = "") -> RawFile:
    """What a file of a network's state dict would hold; its values are zeros."""
    tensors = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    zeros = {key: torch.zeros(tuple(value.shape), dtype=value.dtype) for key, value in tensors.items()}
    return RawFile(Path("x.pth"), "torch", {"state_dict": zeros})


def refusal(raw: RawFile) -> tuple[str, str]:
    """What a file that holds no Deformable DETR is said to be, and the hint."""
    with pytest.raises(WeightsError) as caught:
        find_weights(raw)
    (problem,) = caught.value.problems
    said = ("not a Deformable DETR", "not a detector", "holds no Deformable DETR")
    assert any(words in problem.what for words in said)
    return problem.what.removeprefix("holds ").partition(", not a")[0], problem.hint


@pytest.fixture
def backbone_of(monkeypatch):
    """Load the backbone of a file that is in memory into mmdet's; returns the report."""

    def run(raw: RawFile, kind: str):
        monkeypatch.setattr(load, "read_raw", lambda path: raw)
        model = MODELS.build(dict(type="ResNet", depth=int(kind.removeprefix("resnet_"))))
        return load_backbone(model, "x.pth")

    return run


def check(raw: RawFile, network: str, backbone: str | None, backbone_of) -> None:
    """A file is refused by its network's name, and its backbone is offered and fits, where it is known."""
    name, hint = refusal(raw)
    assert name == network
    if backbone is None:
        assert hint.startswith(UNUSABLE)
        return
    assert hint.startswith(f"its backbone ({backbone}) can be used: name the file as model.pretrained_backb")
    depth = backbone.removeprefix("resnet_")
    assert hint.endswith("resnet_50" if depth == "50" else f"depth: {depth}, out_indices: [1, 2, 3]}}")
    report = backbone_of(raw, backbone)
    assert report.missing == [] and report.reshaped == {} and ["conv1.weight"] in report.mapped.values()


# --- transformers ---

TRANSFORMERS = {
    "conditional_detr": ("Conditional DETR", "resnet_50"),
    "d_fine": ("D-FINE or DEIM", None),
    "dab-detr": ("DAB-DETR", "resnet_50"),
    "deimv2": ("D-FINE or DEIM", None),
    "detr": ("DETR (without deformable attention)", "resnet_50"),
    "lw_detr": ("RF-DETR or LW-DETR", None),
    "rf_detr": ("RF-DETR or LW-DETR", None),
    "rt_detr": ("RT-DETR", None),
    "rt_detr_v2": ("RT-DETR", None),
    "table-transformer": ("DETR (without deformable attention)", "resnet_50"),
    "yolos": ("YOLOS", None),
    "grounding-dino": ("Grounding DINO", None),
    "mm-grounding-dino": ("Grounding DINO", None),
    "omdet-turbo": ("OmDet-Turbo", None),
    "mask2former": ("Mask2Former or another mask transformer", None),
}


def transformers_models() -> dict[str, str]:
    """Kinds of detectors in transformers → the class of each."""
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    tables = (
        auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
        auto.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES,
        auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
    )
    return {kind: name for table in reversed(tables) for kind, name in table.items()}


def from_transformers(kind: str) -> nn.Module:
    """A detector of transformers with its usual config, without weights or memory for them."""
    import transformers

    config = transformers.AutoConfig.for_model(kind)
    if hasattr(config, "use_pretrained_backbone"):
        config.use_pretrained_backbone = False
    with torch.device("meta"):
        return getattr(transformers, transformers_models()[kind])(config)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_detectors_of_transformers_are_named(kind, backbone_of):
    if kind not in transformers_models():
        pytest.skip(f"this version of transformers has no {kind}")
    check(raw_file(from_transformers(kind)), *TRANSFORMERS[kind], backbone_of)


@pytest.mark.slow  # imports every detector of transformers
def test_every_other_detector_of_transformers_is_refused_and_its_own_deformable_detr_read():
    refused = {}
    for kind in sorted(set(transformers_models()) - set(TRANSFORMERS)):
        try:
            model = from_transformers(kind)
        except TypeError:  # its usual config has no backbone
            continue
        raw = raw_file(model)
        if kind == "deformable_detr":
            assert find_weights(raw).table.name == "hf"
        else:
            refused[kind] = refusal(raw)
    assert len(refused) > 5


# --- mmdet ---

MMDET = {
    "conditional_detr/conditional-detr_r50_8xb2-50e_coco.py": ("Conditional DETR", "resnet_50"),
    "dab_detr/dab-detr_r50_8xb2-50e_coco.py": ("DAB-DETR", "resnet_50"),
    "ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py": ("DDQ DETR", "resnet_50"),
    "detr/detr_r101_8xb2-500e_coco.py": ("DETR (without deformable attention)", "resnet_101"),
    "dino/dino-4scale_r50_8xb2-12e_coco.py": ("DINO", "resnet_50"),
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py": ("Faster R-CNN or another two-stage R-CNN", "resnet_50"),
    "sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py": ("Sparse R-CNN", "resnet_50"),
    "retinanet/retinanet_r18_fpn_1x_coco.py": ("RetinaNet", "resnet_18"),
    "maskformer/maskformer_r50_ms-16xb1-75e_coco.py": (
        "Mask2Former or another mask transformer",
        "resnet_50",
    ),
    "fcos/fcos_r101-caffe_fpn_gn-head-1x_coco.py": ("a one-stage detector", "resnet_101"),
    "yolo/yolov3_d53_8xb8-320-273e_coco.py": ("YOLO", None),
    "yolox/yolox_s_8xb8-300e_coco.py": ("YOLO", None),
    "rtmdet/rtmdet_tiny_8xb32-300e_coco.py": ("a one-stage detector", None),
}


@functools.cache
def registered() -> None:
    from mmdet.utils import register_all_modules

    register_all_modules()


def from_mmdet(path: str) -> nn.Module:
    """A detector of an mmdet config, without weights or memory for them."""
    registered()
    config = Config.fromfile(CONFIGS / path).model
    _without_files(config)
    with torch.device("meta"):
        return MODELS.build(config)


def _without_files(config) -> None:
    if isinstance(config, dict):
        for name in ("init_cfg", "pretrained", "teacher_ckpt"):
            config.pop(name, None)
        for value in config.values():
            _without_files(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            _without_files(value)


@pytest.mark.parametrize("path", MMDET)
def test_detectors_of_mmdet_are_named(path, backbone_of):
    check(raw_file(from_mmdet(path)), *MMDET[path], backbone_of)


DEFORMABLE = sorted(path.name for path in (CONFIGS / "deformable_detr").glob("*.py"))


@pytest.mark.parametrize("name", DEFORMABLE)
@pytest.mark.parametrize("prefix", ["", "module.", "detector.net."])
def test_its_deformable_detrs_are_read_below_any_prefix(name, prefix):
    model = from_mmdet(f"deformable_detr/{name}")
    found = find_weights(raw_file(model, prefix))
    assert found.table.name == "mmdet" and set(found.state_dict) == set(model.state_dict())


@pytest.mark.slow
def test_a_config_of_every_folder_of_mmdet_is_refused():
    """Whatever can be built here; the rest needs packages, files or several processes."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    refused = []
    for folder in sorted(CONFIGS.iterdir()):
        paths = sorted(folder.glob("*.py"))
        if not paths or folder.name.startswith("_") or folder.name in ("deformable_detr", "lad"):
            continue
        try:
            model = from_mmdet(f"{folder.name}/{paths[0].name}")
        except Exception:  # of many kinds: this config cannot be built without more
            continue
        refusal(raw_file(model))
        refused.append(folder.name)
    assert len(refused) >= 70


# --- torchvision and timm ---

TORCHVISION = {
    "fasterrcnn_resnet50_fpn": ("Faster R-CNN or another two-stage R-CNN", "resnet_50"),
    "maskrcnn_resnet50_fpn_v2": ("Faster R-CNN or another two-stage R-CNN", "resnet_50"),
    "keypointrcnn_resnet50_fpn": ("Faster R-CNN or another two-stage R-CNN", "resnet_50"),
    "retinanet_resnet50_fpn": ("RetinaNet", "resnet_50"),
    "fcos_resnet50_fpn": ("a one-stage detector", "resnet_50"),
    "ssd300_vgg16": ("a one-stage detector", None),
    "ssdlite320_mobilenet_v3_large": ("a one-stage detector", None),
    "deeplabv3_resnet50": ("another network", "resnet_50"),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_detectors_of_torchvision_are_named(name, backbone_of):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    check(raw_file(model), *TORCHVISION[name], backbone_of)


@pytest.mark.parametrize(
    ("origin", "name", "backbone"),
    [
        *(("v", f"resnet{depth}", f"resnet_{depth}") for depth in (18, 34, 50, 101, 152)),
        *(("t", f"resnet{depth}", f"resnet_{depth}") for depth in (18, 34, 50, 101, 152)),
        *(("t", f"gcvit_{size}", f"gc_vit_{size}") for size in ("xxtiny", "xtiny", "tiny", "small", "base")),
        *(("v", name, None) for name in ("wide_resnet50_2", "resnext50_32x4d", "vgg16", "vit_b_16")),
        *(("t", name, None) for name in ("resnet50d", "seresnet50", "convnext_tiny", "regnetx_004")),
    ],
)
def test_classifiers_are_backbones_where_a_spec_can_name_them(origin, name, backbone):
    with torch.device("meta"):
        make = torchvision.models.get_model if origin == "v" else timm.create_model
        model = make(name)
    with pytest.raises(WeightsError) as caught:
        find_weights(raw_file(model))
    (problem,) = caught.value.problems
    if backbone is None:
        assert problem.hint.startswith(UNUSABLE)
        return
    assert problem.what.startswith(f"holds a backbone ({backbone}), not a detector")
    field = f"model.backbone: {backbone}"
    if backbone.startswith("resnet_") and backbone != "resnet_50":
        field = f"ddetr_mm.backbone: {{type: ResNet, depth: {name[6:]}, "
    assert problem.hint.startswith("name the file as model.pretrained_backbone_path, with " + field)


# --- Nothing of another network is written ---


@pytest.mark.parametrize("to", ["mmdet", "tao", "official", "hf"])
def test_no_other_network_is_written(to, tmp_path):
    model = detector(seed=None)
    names = {**model.state_dict(), "denoising_class_embed.weight": torch.zeros(4, 8)}
    torch.save({"state_dict": names}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"RT-DETR, not a Deformable DETR"):
        convert_checkpoint(tmp_path / "x.pth", tmp_path / "y.pth", to)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


# --- Blocks with further modules are another backbone ---


@pytest.mark.parametrize("name", ["seresnet50", "ecaresnetlight"])
def test_a_resnet_with_attention_is_another_backbone(name, monkeypatch):
    with torch.device("meta"):
        model = timm.create_model(name)
    raw = raw_file(model)
    monkeypatch.setattr(load, "read_raw", lambda path: raw)
    plain = MODELS.build(dict(type="ResNet", depth=50))
    with pytest.raises(WeightsError, match=r"resnet_50 with further modules \(|an unknown backbone"):
        load_backbone(plain, "x.pth")


@pytest.mark.parametrize("path", ["dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py"])
def test_a_resnet_with_deformable_convolutions_is_another_backbone(path, monkeypatch):
    raw = raw_file(from_mmdet(path))
    assert refusal(raw)[1].startswith(UNUSABLE)
    monkeypatch.setattr(load, "read_raw", lambda path: raw)
    plain = MODELS.build(dict(type="ResNet", depth=50))
    with pytest.raises(WeightsError, match=r"resnet_50 with further modules \(.*conv_offset"):
        load_backbone(plain, "x.pth")
