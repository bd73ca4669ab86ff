"""GCViT's arithmetic: against reference outputs, timm, and a plain transcription of the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detr_builders import detector_config, golden, sample
from golden_files import golden_state_dict
from mmdet.registry import MODELS
from torch import Tensor, nn

from ddetr_mm.errors import SpecError
from ddetr_mm.models import GCViT, feature_channels
from ddetr_mm.models.gcvit import VARIANTS, GCViTVariant
from ddetr_mm.models.gcvit_blocks import (
    Block,
    attend,
    merge_windows,
    partition_windows,
    query_pyramid,
    relative_position_index,
)
from ddetr_mm.weights.key_engine import to_canonical
from ddetr_mm.weights.key_maps import TAO


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


def test_a_detector_on_it_meets_the_reference_outputs() -> None:
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


def test_keys_and_shapes_are_the_reference_backbone_s() -> None:
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


def test_query_pyramids_are_the_reference_s_for_every_variant() -> None:
    for name, arch in VARIANTS.items():
        pyramids = [query_pyramid(56 // 2**stage, window, stage) for stage, window in enumerate(arch.windows)]
        pools_in_stage_2 = name == "large_384"
        assert pyramids == [(3, True), (2, True), (1, pools_in_stage_2), (1, False)]


# timm


@pytest.mark.parametrize(
    "variant",
    ["xxtiny", "small", *(pytest.param(name, marks=pytest.mark.slow) for name in ("xtiny", "tiny", "base"))],
)
def test_agrees_with_timm(variant) -> None:
    check_against_timm(variant, 224, {}, {})


@pytest.mark.parametrize(
    ("size", "theirs", "ours"),
    [
        (128, {"img_size": 128}, {"windows": (4, 4, 8, 4), "resolution": 128}),
        # Windows of the variant at twice the resolution: one pooling more in stages 0, 1 and 3.
        (192, {"img_size": 192, "window_size": (3, 3, 6, 3)}, {"windows": (3, 3, 6, 3), "resolution": 192}),
    ],
)
def test_agrees_with_timm_at_other_windows_and_resolutions(size, theirs, ours) -> None:
    check_against_timm("xxtiny", size, theirs, ours)


def check_against_timm(variant: str, size: int, theirs: dict, ours: dict) -> None:
    timm = pytest.importorskip("timm")
    peer = shake(timm.create_model(f"gcvit_{variant}", pretrained=False, num_classes=0, **theirs)).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if name.endswith("gamma"):
                parameter.add_(0.5)
    model = GCViT(variant, **ours).eval()
    report = model.load_backbone_state_dict(peer.state_dict())
    assert report.layout == "timm"
    assert (report.unexpected, report.skipped, report.reshaped) == ([], {}, {})
    assert report.missing == [f"norm{stage}.{leaf}" for stage in range(3) for leaf in ("weight", "bias")]
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


def test_what_no_returned_stage_needs_is_not_trained() -> None:
    model = small(out_indices=(0, 1)).train()
    sum(feature.mean() for feature in model(image(1, 3, 32, 32))).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[1] for name in without} == {"1", "2", "3"}
    assert all(name.startswith("levels.1.downsample") for name in without if name.startswith("levels.1"))


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
    ("options", "told"),
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
def test_wrong_arguments_are_told(options, told) -> None:
    with pytest.raises(SpecError, match=told):
        GCViT(**options)
    with pytest.raises(SpecError, match=told):
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
