"""GCViT against golden outputs, timm and the paper; in mmdet's tools; as a graph."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from detr_builders import detector_config, golden, sample
from golden_files import golden_state_dict
from mmdet.registry import MODELS
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ddetr_mm.errors import SpecError
from ddetr_mm.models import GCViT, feature_channels
from ddetr_mm.models.gcvit import (
    Block,
    attend,
    merge_windows,
    partition_windows,
    query_pyramid,
    relative_position_index,
)
from ddetr_mm.weights import load_backbone
from ddetr_mm.weights.formats import TAO, to_canonical
from ddetr_mm.weights.gcvit import VARIANTS, GCViTVariant
from ddetr_mm.weights.safe_read import read_raw

# --- Outputs ---


def shake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded random weights of a size that keeps features near 1, biases and tables included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            leaf = name.rsplit(".", 1)[-1]
            if leaf.startswith("gamma"):
                parameter.copy_(0.5 + 0.1 * noise)
            elif leaf == "relative_position_bias_table":
                parameter.copy_(0.5 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_((leaf == "weight") + 0.1 * noise)
    return module


@pytest.fixture(autouse=True)
def thin_variant(monkeypatch) -> None:
    """A variant for tests whose matter is not its size: two blocks a stage, half as wide as xxtiny."""
    thin = GCViTVariant((2, 2, 2, 2), (1, 2, 4, 8), (7, 7, 14, 7), 32, 2.0, None)
    monkeypatch.setitem(VARIANTS, "thin", thin)


def small(**kwargs) -> GCViT:
    """The thin variant with random weights, in evaluation mode."""
    return shake(GCViT(**{"variant": "thin", **kwargs})).eval()


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


# Reference outputs


def test_a_detector_on_it_meets_tao_outputs() -> None:
    expected = np.load(golden("gc_vit_xxtiny_4lvl.npz"))
    weights, _trace = to_canonical(golden_state_dict("gc_vit_xxtiny_4lvl"), TAO)
    model = MODELS.build(
        detector_config(
            num_levels=4,
            width=256,
            num_heads=8,
            num_points=4,
            num_encoder_layers=2,
            num_decoder_layers=2,
            feedforward=128,
            num_groups=32,
            num_queries=20,
            num_classes=8,
            backbone={"type": "GCViT", "variant": "xxtiny", "out_indices": (1, 2, 3)},
            in_channels=[128, 256, 512],
        )
    ).eval()
    model.load_state_dict(weights, strict=True)
    images = torch.from_numpy(expected["images"])
    samples = [sample(size_hw, images.shape[-2:]) for size_hw in expected["valid_hw"]]
    with torch.no_grad():
        logits, boxes = model(images, samples, mode="tensor")
    assert distance(logits, torch.from_numpy(expected["pred_logits"])) < 1e-4
    assert distance(boxes, torch.from_numpy(expected["pred_boxes"])) < 1e-4


def test_keys_and_shapes_are_tao_backbone_s() -> None:
    prefix = "model.model.backbone.0.body."
    reference = {
        key.removeprefix(prefix): tuple(tensor.shape)
        for key, tensor in golden_state_dict("gc_vit_xxtiny_4lvl").items()
        if key.startswith(prefix)
    }
    ours = GCViT("xxtiny", out_indices=(1, 2, 3)).state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in ours.items()} == reference


# A plain transcription, window by window and block by block


def naive_block(block: Block, x_bhwc: Tensor, q_global_bhnd: Tensor) -> Tensor:
    attention, window = block.attn, block.attn.window
    batch, height, width, channels = x_bhwc.shape
    heads, head_dim = attention.num_heads, channels // attention.num_heads
    tokens = block.norm1(x_bhwc)
    tokens = F.pad(tokens, (0, 0, 0, -width % window, 0, -height % window))
    result = torch.zeros_like(tokens)
    index = relative_position_index(window)
    bias = attention.relative_position_bias_table[index].permute(2, 0, 1)
    for top in range(0, tokens.shape[1], window):
        for left in range(0, tokens.shape[2], window):
            cut = tokens[:, top : top + window, left : left + window].reshape(batch, -1, channels)
            split = attention.qkv(cut).reshape(batch, window**2, -1, heads, head_dim).permute(2, 0, 3, 1, 4)
            q = q_global_bhnd if attention.use_global_query else split[0]
            logits = q @ split[-2].transpose(-1, -2) / head_dim**0.5 + bias
            out = (logits.softmax(-1) @ split[-1]).transpose(1, 2).reshape(batch, window**2, channels)
            result[:, top : top + window, left : left + window] = attention.proj(out).reshape(
                batch, window, window, channels
            )
    result = result[:, :height, :width]
    gammas = [1.0 if gamma is None else gamma for gamma in (block.gamma1, block.gamma2)]
    x_bhwc = x_bhwc + gammas[0] * result
    return x_bhwc + gammas[1] * block.mlp(block.norm2(x_bhwc))


@pytest.mark.parametrize(
    ("size_hw", "options"),
    [
        ((56, 84), {}),
        ((61, 45), {}),  # odd, padded in every stage
        ((9, 130), {}),  # three rows of tokens, fewer than a window
        ((1, 1), {}),
        ((50, 70), {"windows": (3, 4, 5, 2), "resolution": 96}),
    ],
)
def test_equals_attention_window_by_window(size_hw, options) -> None:
    model = small(**options)
    x = image(2, 3, *size_hw)
    with torch.no_grad():
        features = model(x)
        tokens = model.patch_embed(x)
        for stage, level in enumerate(model.levels):
            query = level.q_global_gen(tokens)
            for block in level.blocks:
                tokens = naive_block(block, tokens, query)
            expected = getattr(model, f"norm{stage}")(tokens).permute(0, 3, 1, 2)
            assert distance(features[stage], expected) < 2e-5
            stride = 4 * 2**stage
            assert features[stage].shape[2:] == tuple(-(-side // stride) for side in size_hw)
            tokens = level.downsample(tokens) if level.downsample is not None else tokens


def test_layer_scale_equals_the_plain_form() -> None:
    block = shake(Block(32, 1, 4, 2.0, False, 0.0, 1e-5))
    x = image(2, 8, 12, 32)
    windows, padding = partition_windows(x, 4)
    assert padding is None
    with torch.no_grad():
        ours = merge_windows(block(windows, None, None), 4, 8, 12)
        assert distance(ours, naive_block(block, x, x)) < 1e-5


def test_merging_undoes_partition_and_padding_is_marked() -> None:
    x = image(2, 5, 9, 3)
    windows, padding = partition_windows(x, 4)
    assert windows.shape == (2, 6, 16, 3)
    assert padding.shape == (6, 16, 1)
    assert torch.equal(merge_windows(windows, 4, 5, 9), x)
    assert int((~padding).sum()) == 5 * 9
    assert torch.equal(merge_windows((~padding)[None], 4, 5, 9).float(), torch.ones(1, 5, 9, 1))
    assert windows.masked_select(padding).abs().sum() == 0


def test_plain_attention_equals_torch_s() -> None:
    q, k, v = image(3, 4, 2, 16, 8)
    bias = image(2, 16, 16, seed=1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
    assert distance(attend(q, k, v, bias), expected) < 1e-5


def test_query_pyramids_are_tao_s_for_every_variant() -> None:
    for name, arch in VARIANTS.items():
        pyramids = [query_pyramid(56 // 2**stage, window, stage) for stage, window in enumerate(arch.windows)]
        pools_in_stage_2 = name == "large_384"
        assert pyramids == [(3, True), (2, True), (1, pools_in_stage_2), (1, False)]


# timm


@pytest.mark.parametrize(
    "variant",
    ["xxtiny", "small", *(pytest.param(name, marks=pytest.mark.slow) for name in ("xtiny", "tiny", "base"))],
)
def test_agrees_with_timm(variant, tmp_path) -> None:
    check_against_timm(tmp_path, variant, 224, {}, {})


@pytest.mark.parametrize(
    ("size", "theirs", "ours"),
    [
        (128, {"img_size": 128}, {"windows": (4, 4, 8, 4), "resolution": 128}),
        # Windows of the variant at twice the resolution: one pooling more in stages 0, 1 and 3.
        (192, {"img_size": 192, "window_size": (3, 3, 6, 3)}, {"windows": (3, 3, 6, 3), "resolution": 192}),
    ],
)
def test_agrees_with_timm_at_other_windows_and_resolutions(size, theirs, ours, tmp_path) -> None:
    check_against_timm(tmp_path, "xxtiny", size, theirs, ours)


def check_against_timm(folder: Path, variant: str, size: int, theirs: dict, ours: dict) -> None:
    timm = pytest.importorskip("timm")
    peer = shake(timm.create_model(f"gcvit_{variant}", pretrained=False, num_classes=0, **theirs)).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if name.endswith("gamma"):
                parameter.add_(0.5)
    model = GCViT(variant, **ours).eval()
    torch.save(peer.state_dict(), folder / "timm.pth")
    report = load_backbone(model, folder / "timm.pth")
    assert (report.unexpected, report.reshaped, report.carried_over) == ([], {}, {})
    new = [f"norm{stage}.{leaf}" for stage in range(3) for leaf in ("bias", "weight")]
    assert sorted(report.missing) == new
    x = image(2, 3, size, size)
    with torch.no_grad():
        features = model(x)
        tokens = peer.stem(x)
        for stage, level in enumerate(peer.stages):
            tokens = level(tokens)
            expected = tokens  # timm norms the last stage alone; our first three norms are new
            if stage < 3:
                expected = F.layer_norm(tokens.permute(0, 2, 3, 1), tokens.shape[1:2]).permute(0, 3, 1, 2)
            assert distance(features[stage], expected) < 1e-4


# As a component


@pytest.mark.parametrize("out_indices", [(0,), (3,), (1, 3), (0, 1), (1, 2, 3)])
def test_any_subset_of_stages(out_indices) -> None:
    whole = small()
    part = GCViT("thin", out_indices=out_indices).eval()
    weights = whole.state_dict()
    part.load_state_dict({key: weights[key] for key in part.state_dict()}, strict=True)
    x = image(1, 3, 40, 52)
    with torch.no_grad():
        expected = whole(x)
        got = part(x)
    assert len(got) == len(out_indices)
    assert all(torch.equal(feature, expected[stage]) for feature, stage in zip(got, out_indices, strict=True))
    assert feature_channels({"type": "GCViT", "variant": "thin", "out_indices": out_indices}) == list(
        part.out_channels
    )


def test_what_no_returned_stage_needs_is_not_built() -> None:
    model = small(out_indices=(0, 1)).train()
    sum(feature.mean() for feature in model(image(1, 3, 32, 32))).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len(model.levels) == 2 and model.levels[1].downsample is None
    frozen = small(out_indices=(0, 1), frozen_stages=4)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    # Drop path is that of the whole network, as in TAO.
    rates = [block.drop_path_rate for level in model.levels for block in level.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.2, 8)[:4].tolist())


@pytest.mark.parametrize(
    ("frozen_stages", "frozen"),
    [
        (-1, set()),
        (0, {"patch_embed"}),
        (1, {"patch_embed", "levels.0", "norm0"}),
        (3, {"patch_embed", *(f"levels.{i}" for i in range(3)), *(f"norm{i}" for i in range(3))}),
        (4, {"patch_embed", *(f"levels.{i}" for i in range(4)), *(f"norm{i}" for i in range(4))}),
    ],
)
def test_frozen_stages(frozen_stages, frozen) -> None:
    model = GCViT("thin", frozen_stages=frozen_stages, drop_path_rate=0.5).train()
    for part in ["patch_embed", *(f"levels.{i}" for i in range(4)), *(f"norm{i}" for i in range(4))]:
        module = model.get_submodule(part)
        assert {parameter.requires_grad for parameter in module.parameters()} == {part not in frozen}
        assert module.training == (part not in frozen)


def test_a_frozen_backbone_is_deterministic_and_keeps_no_graph() -> None:
    model = small(frozen_stages=4, drop_path_rate=0.9).train()
    x = image(2, 3, 32, 48)
    assert all(torch.equal(a, b) for a, b in zip(model(x), model(x), strict=True))
    assert not any(feature.requires_grad for feature in model(x))


def test_activation_checkpointing_gives_equal_gradients() -> None:
    gradients = []
    for with_cp in (False, True):
        model = small(with_cp=with_cp, drop_path_rate=0.5).train()
        torch.manual_seed(3)  # the same branches are dropped, also when they are recomputed
        sum(feature.square().mean() for feature in model(image(2, 3, 45, 60))).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-7), name


def test_drop_path_grows_over_all_blocks_and_acts_in_training_alone() -> None:
    model = small(drop_path_rate=0.55, out_indices=(3,))
    rates = [block.drop_path_rate for level in model.levels for block in level.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.55, 8).tolist())
    x = image(1, 3, 32, 32)
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


def test_drop_path_keeps_the_expectation() -> None:
    block = shake(Block(32, 1, 4, 2.0, False, 0.4, 1e-5)).train()
    x = image(1, 1, 16, 32)
    branch = block.attn(block.norm1(x))
    torch.manual_seed(0)
    with torch.no_grad():
        many = block._add(x.expand(4000, -1, -1, -1), branch.expand(4000, -1, -1, -1), block.gamma1)
        kept = (many[:, 0, 0, 0] != x[0, 0, 0, 0]).float().mean()
        assert kept == pytest.approx(0.6, abs=0.03)
        assert torch.allclose(many.mean(0, keepdim=True), x + block.gamma1 * branch, atol=0.05)


def test_memory_formats_agree_and_features_are_channels_last() -> None:
    model = small()
    x = image(2, 3, 64, 96)
    with torch.no_grad():
        plain, last = model(x), model(x.contiguous(memory_format=torch.channels_last))
    for a, b in zip(plain, last, strict=True):
        assert torch.equal(a, b)
        assert a.is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_autocast_stays_near_and_trains() -> None:
    model = small(drop_path_rate=0.3)
    x = image(2, 3, 40, 64)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(x)
    assert all((a - b).abs().mean() < 0.05 for a, b in zip(exact, rough, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sum(feature.float().square().mean() for feature in model.train()(x))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_cpu() -> None:
    model = small(variant="small")
    x = image(2, 3, 100, 140)
    with torch.no_grad():
        expected = model(x)
        got = model.cuda()(x.cuda())
    assert all(distance(b.cpu(), a) < 1e-3 for a, b in zip(expected, got, strict=True))


def test_strict_loading_passes_over_the_index_of_other_implementations() -> None:
    model = GCViT("thin", out_indices=(3,))
    weights = dict(model.state_dict())
    for name, module in model.named_modules():
        if hasattr(module, "relative_position_index"):
            weights[f"{name}.relative_position_index"] = relative_position_index(module.window)
    assert len(weights) == len(model.state_dict()) + 8
    model.load_state_dict(weights, strict=True)
    with pytest.raises(RuntimeError, match=r"levels\.0\.blocks\.0\.attn\.other"):
        model.load_state_dict({**weights, "levels.0.blocks.0.attn.other": torch.zeros(1)}, strict=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "huge"}, "xxtiny"),
        ({"out_indices": ()}, "out_indices"),
        ({"out_indices": (2, 1)}, "increasing"),
        ({"out_indices": (1, 4)}, "out_indices"),
        ({"frozen_stages": 5}, "-1 to 4"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"windows": (7, 7, 14)}, "four sizes"),
        ({"resolution": 8}, "resolution"),
    ],
)
def test_wrong_arguments_are_reported(options, message) -> None:
    with pytest.raises(SpecError, match=message):
        GCViT(**options)
    with pytest.raises(SpecError, match=message):
        MODELS.build({"type": "GCViT", **options})


def test_every_variant_has_its_published_size() -> None:
    millions = {
        "xxtiny": 12.0,
        "xtiny": 20.0,
        "tiny": 28.2,
        "small": 51.1,
        "base": 90.3,
        "large": 201,
        "large_384": 202,
    }
    for variant, expected in millions.items():
        with torch.device("meta"):
            model = GCViT(variant, out_indices=(3,))
        classifier = model.out_channels[-1] * 1000 + 1000
        count = sum(parameter.numel() for parameter in model.parameters()) + classifier
        assert count / 1e6 == pytest.approx(expected, rel=0.01), variant


# --- mmdet's Faster R-CNN on GCViT ---
# DINO on GCViT: tests/test_projects/test_gcvit_dino.py.

PROJECT = Path(__file__).resolve().parents[2]
FASTER_RCNN = PROJECT / "configs" / "gcvit" / "faster-rcnn_gcvit-xxtiny_fpn_1x_coco.py"
CLASSES = ("square", "disc")
NUM_IMAGES, STEPS, HEIGHT, WIDTH = 6, 3, 64, 96

# What makes a run short: small pictures, few steps, no worker processes.
SHORT_RUN = """
_base_ = {base!r}

_classes = {classes!r}
_dataset = dict(data_root={root!r}, ann_file="boxes.json", data_prefix=dict(img=""),
                metainfo=dict(classes=_classes))
_load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True),
         dict(type="Resize", scale=({width}, {height}), keep_ratio=True)]
_meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
_test_set = dict(pipeline=_load + [dict(type="PackDetInputs", meta_keys=_meta)], **_dataset)
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(filter_cfg=dict(min_size=1), **_dataset,
                 pipeline=_load + [dict(type="RandomFlip", prob=0.5), dict(type="PackDetInputs")]))
val_cfg = val_dataloader = val_evaluator = None
test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=_test_set)
test_evaluator = dict(ann_file={annotations!r})
train_cfg = dict(max_epochs=1)
default_hooks = dict(logger=dict(interval=1))
randomness = dict(seed=0)
model = {model}
"""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """A folder with a few pictures of squares and discs and their boxes in COCO format."""
    root = tmp_path_factory.mktemp("shapes")
    random = np.random.default_rng(0)
    images, annotations = [], []
    for image_id in range(NUM_IMAGES):
        picture = Image.fromarray(random.integers(90, 140, (HEIGHT, WIDTH, 3), dtype=np.uint8))
        draw = ImageDraw.Draw(picture)
        for label in range(len(CLASSES)):
            side = int(random.integers(16, 28))
            x, y = int(random.integers(0, 20)) + 48 * label, int(random.integers(0, HEIGHT - 28))
            box_xyxy = [x, y, x + side, y + side]
            (draw.ellipse if label else draw.rectangle)(box_xyxy, fill=(250, 40 + 180 * label, 30))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "iscrowd": 0,
                    "bbox": [x, y, side, side],
                    "area": side * side,
                }
            )
        picture.save(root / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": HEIGHT, "width": WIDTH})
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    (root / "boxes.json").write_text(text)
    return root


# mmdet's tools import mmdet first, which beside mmcv-lite needs ddetr_mm before it. One process for both
# tools: importing everything takes longer than the training.
LAUNCHER = """
import json, runpy, sys
import ddetr_mm
for sys.argv in json.loads(sys.argv[1]):
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_tools(*calls: list[object]) -> None:
    """Run mmdet's own tools, as its wheel carries them, one after the other in a process of their own."""
    tools = Path(importlib.util.find_spec("mmdet").origin).parent / ".mim" / "tools"
    if not tools.is_dir():
        pytest.skip("this mmdet was not installed as a wheel: it carries no tools")
    arguments = [[str(tools / f"{tool}.py"), *map(str, rest)] for tool, *rest in calls]
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def records(work_dir: Path) -> list[dict]:
    """What mmengine logged as numbers, step by step."""
    files = sorted(work_dir.glob("*/vis_data/scalars.json"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


SMALL_FASTER_RCNN = """dict(
    roi_head=dict(bbox_head=dict(num_classes=2, fc_out_channels=64)),
    train_cfg=dict(rpn_proposal=dict(max_per_img=50)),
    test_cfg=dict(rpn=dict(max_per_img=50), rcnn=dict(score_thr=0.0)))"""


@pytest.mark.slow  # projects/gcvit_dino trains in the default run
def test_trains_and_runs_the_test_tool(shapes, tmp_path) -> None:
    config = tmp_path / "short.py"
    config.write_text(
        SHORT_RUN.format(
            base=str(FASTER_RCNN),
            classes=CLASSES,
            root=str(shapes),
            width=WIDTH,
            height=HEIGHT,
            annotations=str(shapes / "boxes.json"),
            model=SMALL_FASTER_RCNN,
        )
    )
    checkpoint, found = tmp_path / "train" / "epoch_1.pth", tmp_path / "found.pkl"
    run_tools(
        ["train", config, "--work-dir", tmp_path / "train"],
        ["test", config, checkpoint, "--work-dir", tmp_path / "test", "--out", found],
    )
    logged = records(tmp_path / "train")
    losses = [record["loss"] for record in logged if "loss" in record]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)

    weights = read_raw(checkpoint).payload["state_dict"]
    backbone = {key: value for key, value in weights.items() if key.startswith("backbone.")}
    assert "backbone.levels.3.blocks.1.attn.relative_position_bias_table" in backbone
    # Biases start at zero: training moved the backbone's in every stage.
    assert all(backbone[f"backbone.levels.{i}.blocks.1.attn.qkv.bias"].abs().max() > 0 for i in range(4))

    with found.open("rb") as file:
        detections = pickle.load(file)
    assert len(detections) == NUM_IMAGES
    assert all(detection["pred_instances"]["bboxes"].shape[1] == 4 for detection in detections)
    metrics = json.loads(next((tmp_path / "test").glob("*/*.json")).read_text())
    assert -1 <= metrics["coco/bbox_mAP"] <= 1


# --- torch.compile and ONNX ---


@pytest.fixture(autouse=True)
def thin_graph_variant(monkeypatch) -> None:
    """Local and global attention and layer scale, at a size that traces fast; nothing traced before."""
    thin = GCViTVariant((2, 2, 2, 2), (1, 2, 4, 8), (7, 7, 14, 7), 32, 2.0, 0.5)
    monkeypatch.setitem(VARIANTS, "thin", thin)
    torch.compiler.reset()


def thin(**kwargs) -> GCViT:
    """The thin variant with tables that matter, in evaluation mode."""
    torch.manual_seed(0)
    model = GCViT("thin", **kwargs).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def images(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_compiles_to_one_graph() -> None:
    model = thin()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = images(1, 61, 90)  # padded in every stage, every global query resized
    with torch.no_grad():
        for got, expected in zip(compiled(x), model(x), strict=True):
            assert torch.allclose(got, expected, atol=1e-5)


def test_compiles_forward_and_backward_with_checkpointing() -> None:
    model = thin(out_indices=(1,), with_cp=True, drop_path_rate=0.0).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images(1, 32, 48)
    gradients = []
    for forward in (model, compiled):
        model.zero_grad()
        forward(x)[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for plain, traced in zip(*gradients, strict=True):
        assert torch.allclose(plain, traced, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_sizes_that_change_compile_to_one_dynamic_graph() -> None:
    model = thin(drop_path_rate=0.1)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size_hw in ((64, 96), (100, 76)):
            x = images(2, *size_hw)
            for got, expected in zip(compiled(x), model(x), strict=True):
                assert torch.allclose(got, expected, atol=1e-5)
    model.train()
    features = torch.compile(model, backend="eager", fullgraph=True)(images(1, 61, 90))  # drop path too
    assert all(feature.isfinite().all() for feature in features)


@pytest.mark.parametrize("size_hw", [(224, 224), (75, 130)])
def test_exports_to_standard_onnx_with_any_batch(size_hw) -> None:
    model = thin()
    buffer = io.BytesIO()
    names = [f"stage{index}" for index in range(4)]
    torch.onnx.export(
        model,
        (images(1, *size_hw),),
        buffer,
        dynamo=False,
        opset_version=17,
        input_names=["images"],
        output_names=names,
        dynamic_axes={name: {0: "batch"} for name in ["images", *names]},
    )
    graph = onnx.load_from_string(buffer.getvalue())
    onnx.checker.check_model(graph)
    assert {node.domain for node in graph.graph.node} == {""}
    assert {opset.domain for opset in graph.opset_import} == {""}
    # At 224 x 224 every global query comes out as one window: nothing to resize.
    resizes = sum(node.op_type == "Resize" for node in graph.graph.node)
    assert resizes == (0 if size_hw == (224, 224) else 4)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = images(batch, *size_hw)
        with torch.no_grad():
            expected = model(x)
        for got, feature in zip(session.run(None, {"images": x.numpy()}), expected, strict=True):
            assert torch.allclose(torch.from_numpy(got), feature, atol=1e-4)
