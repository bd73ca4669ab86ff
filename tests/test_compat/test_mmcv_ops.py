import importlib
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.ops.deform_conv import DeformConv2dPack, deform_conv2d
from mmcv.ops.modulated_deform_conv import ModulatedDeformConv2dPack, modulated_deform_conv2d
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
from mmcv.ops.nms import NMSop
from mmcv.ops.roi_pool import RoIPoolFunction
from torch.nn import functional

from ddetr_mm.compat import mmcv_ops, torch_ops
from ddetr_mm.compat.mmcv_ops import INSTALL_COMMAND
from ddetr_mm.errors import StackError

REPO = Path(__file__).resolve().parents[2]
only_without_ops = pytest.mark.skipif(mmcv_ops.has_compiled_ops(), reason="mmcv has its compiled ops here")


def run_python(code):
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )


def test_hook_is_last_and_there_once():
    mmcv_ops.install_stand_in()
    hooks = [finder for finder in sys.meta_path if isinstance(finder, mmcv_ops.StandInFinder)]
    assert len(hooks) == 1


def test_hook_answers_for_nothing_else():
    finder = mmcv_ops.StandInFinder()
    assert finder.find_spec("mmcv") is None
    assert finder.find_spec("mmcv._ext2") is None
    assert finder.find_spec("mmcv._ext").loader is finder


def fake_mmcv(folder, *files):
    package = folder / "mmcv"
    package.mkdir(parents=True)
    for name in ("__init__.py", *files):
        (package / name).write_text("", encoding="utf-8")


def test_compiled_ops_are_seen_by_their_file(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "mmcv", raising=False)
    importlib.invalidate_caches()
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    fake_mmcv(tmp_path / "lite", "_extra.so")
    fake_mmcv(tmp_path / "full", f"_ext{suffix}")
    monkeypatch.syspath_prepend(tmp_path / "lite")
    assert not mmcv_ops.has_compiled_ops()
    monkeypatch.syspath_prepend(tmp_path / "full")
    assert mmcv_ops.has_compiled_ops()


def test_package_whose_import_broke_off_is_recognised():
    module = types.ModuleType("x")
    whole = dict.fromkeys(["mmcv", "mmcv.utils", "mmcv.utils.env", "mmdet", "torch.nn"], module)
    assert mmcv_ops._half_imported(whole) is None
    assert (
        mmcv_ops._half_imported({**whole, "mmdet.models.backbones.csp_darknet": module})
        == "mmdet.models.backbones"
    )


@only_without_ops
def test_ops_delegate_or_say_what_to_do():
    import torch
    from mmcv import _ext
    from mmcv.ops import nms, soft_nms

    assert _ext.__spec__.origin == "ddetr_mm stand-in"
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 11.0, 11.0], [20.0, 20.0, 30.0, 30.0]])
    scores = torch.tensor([0.5, 0.9, 0.7])
    assert nms(boxes, scores, 0.5)[1].tolist() == [1, 2]
    assert nms(boxes, scores, 0.5, score_threshold=0.6, max_num=1)[1].tolist() == [1]
    with pytest.raises(StackError, match="softnms.*ddetr-mm install-ops"):
        soft_nms(boxes, scores)


@only_without_ops
def test_environment_report_is_honest():
    from mmcv.ops import get_compiler_version, get_compiling_cuda_version

    assert "no compiled ops" in get_compiler_version()
    assert get_compiling_cuda_version() == "not available"


@only_without_ops
def test_import_after_a_failed_mmdet_is_explained():
    answer = run_python("try:\n    import mmdet.models\nexcept ImportError:\n    pass\nimport ddetr_mm")
    assert answer.returncode == 1
    assert "imported before ddetr_mm" in answer.stderr
    assert "restart Python" in answer.stderr


@pytest.mark.full_ops
def test_compiled_ops_are_left_alone():
    code = "import ddetr_mm, mmcv._ext as ext, mmcv.ops; print(ext.__file__, mmcv.ops.get_compiler_version())"
    answer = run_python(code)
    assert "_ext." in answer.stdout
    assert "no compiled ops" not in answer.stdout


# --- references: the formulas, written out ---


def greedy_nms(boxes, scores, threshold, offset):
    """Indices kept, best first."""
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        if all(iou(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(int(i))
    return kept


def iou(a, b, offset):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    area = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    union = area[0] + area[1] - width * height
    return width * height / union if union else 0.0


def bilinear(image, y, x):
    """Value of a (H, W) image at a point; 0 more than a pixel outside, the edge's value before that."""
    height, width = image.shape
    if y < -1 or y > height or x < -1 or x > width:
        return image.new_zeros(())
    y, x = max(y, 0.0), max(x, 0.0)
    top, left = min(int(y), height - 1), min(int(x), width - 1)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    y, x = (float(top) if top == height - 1 else y), (float(left) if left == width - 1 else x)
    down, along = y - top, x - left
    upper = image[top, left] * (1 - along) + image[top, right] * along
    lower = image[bottom, left] * (1 - along) + image[bottom, right] * along
    return upper * (1 - down) + lower * down


def roi_align(images, rois, bins, scale, sampling_ratio, aligned):
    """Mean of samples per bin; differentiable."""
    shift = 0.5 if aligned else 0.0
    pooled = []
    for roi in rois.tolist():
        image = images[int(roi[0])]
        x1, y1, x2, y2 = (value * scale - shift for value in roi[1:])
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        bin_height, bin_width = height / bins[0], width / bins[1]
        rows = sampling_ratio or math.ceil(bin_height)
        columns = sampling_ratio or math.ceil(bin_width)
        for channel in image:
            for i in range(bins[0]):
                for j in range(bins[1]):
                    samples = [
                        bilinear(
                            channel,
                            y1 + (i + (row + 0.5) / rows) * bin_height,
                            x1 + (j + (column + 0.5) / columns) * bin_width,
                        )
                        for row in range(rows)
                        for column in range(columns)
                    ]
                    pooled.append(sum(samples) / len(samples))
    return torch.stack(pooled).reshape(len(rois), images.shape[1], *bins)


def zero_padded_sample(image, y, x):
    """Bilinear value of a (C, H, W) image at pixel coordinates; outside is 0."""
    _, height, width = image.shape
    total = image.new_zeros(image.shape[0])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                total = total + image[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def deformable_attention(value, shapes, locations, weights):
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    output = value.new_zeros(batch, queries, heads, channels)
    start = 0
    for level, (height, width) in enumerate(shapes):
        maps = value[:, start : start + height * width].reshape(batch, height, width, heads, channels)
        start += height * width
        for b, q, h, p in np.ndindex(batch, queries, heads, points):
            x, y = locations[b, q, h, level, p].tolist()
            image = maps[b, :, :, h].permute(2, 0, 1)
            sample = zero_padded_sample(image, y * height - 0.5, x * width - 0.5)
            output[b, q, h] += sample * weights[b, q, h, level, p]
    return output.flatten(2)


def focal_loss(logits, target, weight, gamma, alpha):
    """By cross entropy: -log p for the target's class, -log(1-p) for the others."""
    one_hot = functional.one_hot(target, logits.size(1) + 1)[:, :-1].to(logits)
    entropy = functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    probability = logits.sigmoid()
    miss = one_hot * (1 - probability) + (1 - one_hot) * probability
    loss = (one_hot * alpha + (1 - one_hot) * (1 - alpha)) * miss**gamma * entropy
    if weight.numel():
        loss = loss * torch.cat([weight, weight.new_ones(1)])[target][:, None]
    return loss


# --- inputs ---


def random_boxes(count, seed, size=40.0):
    random = np.random.default_rng(seed)
    corner = random.uniform(0, size, (count, 2))
    return np.concatenate([corner, corner + random.uniform(0.5, size / 2, (count, 2))], axis=1).astype("f4")


def attention_inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 4), (3, 2)]
    keys = sum(height * width for height, width in shapes)
    value = torch.randn(2, keys, 2, 3, generator=generator, dtype=torch.float64)
    locations = torch.rand(2, 4, 2, 2, 3, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    weights = torch.rand(2, 4, 2, 2, 3, generator=generator, dtype=torch.float64).flatten(3).softmax(-1)
    return value, shapes, locations, weights.reshape(2, 4, 2, 2, 3)


def level_tensors(shapes):
    starts = np.cumsum([0] + [height * width for height, width in shapes])[:-1]
    return torch.tensor(shapes), torch.as_tensor(starts)


FOCAL_WEIGHTS = [torch.empty(0), torch.tensor([0.5, 2.0, 1.0, 3.0])]


def focal_inputs():
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)) * 3
    return logits, torch.tensor([0, 1, 2, 3, 4, 4, 0, 3, 2])  # 4 is background


ROIS = torch.tensor(
    [[0, 1.0, 2.0, 9.0, 7.5], [1, -3.0, -2.0, 6.0, 5.0], [0, 4.2, 3.3, 4.4, 3.5], [1, 10.0, 8.0, 17.0, 15.0]]
)
ROI_CASES = [(scale, ratio, aligned) for scale in (1.0, 0.5) for ratio in (0, 2) for aligned in (True, False)]


def roi_images():
    return torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(2))


def roi_options(scale, sampling_ratio, aligned, pool_mode=1):
    return {
        "aligned_height": 2,
        "aligned_width": 3,
        "spatial_scale": scale,
        "sampling_ratio": sampling_ratio,
        "pool_mode": pool_mode,
        "aligned": aligned,
    }


# --- equality with the formulas ---


@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 20),
    st.sampled_from([0.1, 0.3, 0.5, 0.9]),
    st.sampled_from([0, 1]),
)
def test_nms_is_greedy_suppression(seed, count, threshold, offset):
    boxes = random_boxes(count, seed)
    scores = np.random.default_rng(seed).permutation(count).astype("f4")
    kept = torch_ops.nms(
        torch.from_numpy(boxes), torch.from_numpy(scores), iou_threshold=threshold, offset=offset
    )
    assert kept.tolist() == greedy_nms(boxes.astype("f8"), scores, threshold, offset)


def test_nms_offset_counts_the_last_pixel():
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [5.0, 0.0, 14.0, 9.0]])  # IoU 36/126, with offset 50/150
    scores = torch.tensor([0.9, 0.8])
    assert torch_ops.nms(boxes, scores, iou_threshold=0.3, offset=0).tolist() == [0, 1]
    assert torch_ops.nms(boxes, scores, iou_threshold=0.3, offset=1).tolist() == [0]


def test_nms_of_no_boxes():
    assert torch_ops.nms(torch.zeros(0, 4), torch.zeros(0), iou_threshold=0.5, offset=0).tolist() == []


@pytest.mark.parametrize(("scale", "sampling_ratio", "aligned"), ROI_CASES)
def test_roi_align_is_the_mean_of_samples(scale, sampling_ratio, aligned):
    images = roi_images().requires_grad_()
    expected = roi_align(images, ROIS, (2, 3), scale, sampling_ratio, aligned)
    output = torch.zeros_like(expected)
    options = roi_options(scale, sampling_ratio, aligned)
    none = torch.zeros(0)
    torch_ops.roi_align_forward(images.detach(), ROIS, output, none, none, **options)
    torch.testing.assert_close(output, expected.detach(), atol=1e-5, rtol=1e-5)

    grad_output = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (expected_gradient,) = torch.autograd.grad(expected, images, grad_output)
    gradient = torch.zeros_like(images)
    with torch.no_grad():
        torch_ops.roi_align_backward(grad_output, ROIS, none, none, gradient, **options)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)


def test_roi_align_by_maximum_is_refused():
    images, none = roi_images(), torch.zeros(0)
    with pytest.raises(StackError, match="max pooling.*install-ops"):
        torch_ops.roi_align_forward(images, ROIS, none, none, none, **roi_options(1.0, 0, True, pool_mode=0))
    with pytest.raises(StackError, match="max pooling.*install-ops"):
        torch_ops.roi_align_backward(images, ROIS, none, none, none, **roi_options(1.0, 0, True, pool_mode=0))


# Regions with fractions, outside the image, of one pixel, and one whose end is before its beginning.
POOL_ROIS = torch.tensor(
    [
        [0, 1.0, 2.0, 9.0, 7.5],
        [1, -3.0, -2.0, 6.0, 5.0],
        [0, 4.2, 3.3, 4.4, 3.5],
        [1, 10.0, 8.0, 17.0, 15.0],
        [0, 7.0, 7.0, 3.0, 3.0],
    ]
)


def roi_pool_by_formula(images, rois, bins, scale):
    """Largest value of every bin; differentiable, 0 for empty bins."""
    height, width = images.shape[-2:]
    pooled = []
    for roi in rois.tolist():
        x1, y1, x2, y2 = roi[1] * scale, roi[2] * scale, (roi[3] + 1) * scale, (roi[4] + 1) * scale
        step_x, step_y = (x2 - x1) / bins[1], (y2 - y1) / bins[0]
        for channel in images[int(roi[0])]:
            for i in range(bins[0]):
                for j in range(bins[1]):
                    top, left = (max(math.floor(v), 0) for v in (y1 + i * step_y, x1 + j * step_x))
                    bottom = min(math.ceil(y1 + (i + 1) * step_y), height)
                    right = min(math.ceil(x1 + (j + 1) * step_x), width)
                    is_empty = x2 <= x1 or y2 <= y1 or bottom <= top or right <= left
                    pooled.append(images.new_zeros(()) if is_empty else channel[top:bottom, left:right].max())
    return torch.stack(pooled).reshape(len(rois), images.shape[1], *bins)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_roi_pool_through_mmcvs_function_is_the_maximum_of_bins(scale):
    images = roi_images().requires_grad_()
    expected = roi_pool_by_formula(images, POOL_ROIS, (2, 3), scale)
    grad_output = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (expected_gradient,) = torch.autograd.grad(expected, images, grad_output)
    output = RoIPoolFunction.apply(images, POOL_ROIS, (2, 3), scale)
    (gradient,) = torch.autograd.grad(output, images, grad_output)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert (expected[-1] == 0).all()  # no region


def test_roi_pool_equals_torchvisions_where_nothing_is_rounded():
    rois = POOL_ROIS[[0, 1, 3]].round()
    images = roi_images()
    expected = torchvision.ops.roi_pool(images, rois, (2, 3), 1.0)
    torch.testing.assert_close(RoIPoolFunction.apply(images, rois, (2, 3), 1.0), expected)


def test_roi_pool_takes_the_first_of_equal_values():
    images = torch.ones(1, 1, 4, 4, requires_grad=True)
    RoIPoolFunction.apply(images, torch.tensor([[0, 0.0, 0.0, 3.0, 3.0]]), (1, 1), 1.0).sum().backward()
    assert images.grad.flatten().tolist() == [1.0] + [0.0] * 15


def test_roi_pool_of_no_region():
    images = roi_images().requires_grad_()
    output = RoIPoolFunction.apply(images, torch.zeros(0, 5), (2, 3), 1.0)
    output.sum().backward()
    assert output.shape == (0, 3, 2, 3) and (images.grad == 0).all()


CONVOLUTIONS = [
    dict(),
    dict(stride=2, padding=1),
    dict(padding=(2, 1), dilation=(2, 1), stride=(1, 2)),
    dict(groups=2, deform_groups=3, padding=1),
]


def convolution_inputs(stride=1, padding=0, dilation=1, groups=1, deform_groups=1):
    """Input, offset, mask, weight and bias of a 3 x 2 kernel on images of 7 x 6, with samples outside too."""
    generator = torch.Generator().manual_seed(4)
    sizes = []
    for axis, (size, kernel) in enumerate(((7, 3), (6, 2))):
        step, pad, gap = (
            each if isinstance(each, int) else each[axis] for each in (stride, padding, dilation)
        )
        sizes.append((size + 2 * pad - gap * (kernel - 1) - 1) // step + 1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    samples = deform_groups * 6
    return [
        draw(2, 6, 7, 6),
        draw(2, samples * 2, *sizes) * 2,
        draw(2, samples, *sizes).sigmoid(),
        draw(4, 6 // groups, 3, 2),
        draw(4),
    ]


def deform_conv_by_formula(inputs, stride=1, padding=0, dilation=1, groups=1, deform_groups=1):
    """Sum over kernel and channels of bilinear samples; ``inputs`` as above, mask and bias may be None."""
    images, offset, mask, weight, bias = inputs
    (s_h, s_w), (p_h, p_w), (d_h, d_w) = (
        (each, each) if isinstance(each, int) else each for each in (stride, padding, dilation)
    )
    batch, channels = images.shape[:2]
    outputs, in_group, kernel_h, kernel_w = weight.shape
    out_h, out_w = offset.shape[-2:]
    result = images.new_zeros(batch, outputs, out_h, out_w)
    for b, o, i, j in np.ndindex(batch, outputs, out_h, out_w):
        first = o // (outputs // groups) * in_group
        for c in range(first, first + in_group):
            part = c // (channels // deform_groups)
            for k in range(kernel_h * kernel_w):
                at = part * kernel_h * kernel_w + k
                dy, dx = offset[b, 2 * at : 2 * at + 2, i, j].tolist()
                y = i * s_h - p_h + (k // kernel_w) * d_h + dy
                x = j * s_w - p_w + (k % kernel_w) * d_w + dx
                sample = zero_padded_sample(images[b, c][None], y, x)[0]
                factor = 1 if mask is None else mask[b, at, i, j]
                result[b, o, i, j] += sample * factor * weight[o, c - first, k // kernel_w, k % kernel_w]
    return result if bias is None else result + bias[:, None, None]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_deformable_convolution_is_the_sum_of_samples(options):
    images, offset, mask, weight, bias = inputs = convolution_inputs(**options)
    plain = deform_conv2d(images, offset, weight, *by_position(options))
    torch.testing.assert_close(plain, deform_conv_by_formula([images, offset, None, weight, None], **options))
    modulated = modulated_deform_conv2d(*inputs, *by_position(options))
    torch.testing.assert_close(modulated, deform_conv_by_formula(inputs, **options))
    without = modulated_deform_conv2d(images, offset, mask, weight, None, *by_position(options))
    torch.testing.assert_close(without + bias[:, None, None], modulated)


def by_position(options):
    """The options by position, as mmcv's functions take them."""
    defaults = dict(stride=1, padding=0, dilation=1, groups=1, deform_groups=1)
    return tuple((defaults | options).values())


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_deformable_convolution_has_right_gradients(options):
    images, offset, mask, weight, bias = (tensor.requires_grad_() for tensor in convolution_inputs(**options))

    def plain(images, offset, weight):
        return deform_conv2d(images, offset, weight, *by_position(options))

    def modulated(*inputs):
        return modulated_deform_conv2d(*inputs, *by_position(options))

    fast = dict(fast_mode=True, atol=1e-5)
    assert torch.autograd.gradcheck(plain, (images, offset, weight), **fast)
    assert torch.autograd.gradcheck(modulated, (images, offset, mask, weight, bias), **fast)
    assert torch.autograd.gradcheck(
        lambda *inputs: modulated(*inputs, None), (images, offset, mask, weight), **fast
    )


def test_deformable_layers_of_mmcv_run_and_learn():
    for layer in (DeformConv2dPack(4, 6, 3, padding=1), ModulatedDeformConv2dPack(4, 6, 3, padding=1)):
        layer(torch.randn(2, 4, 8, 8)).square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
    # An image smaller than the kernel, which mmcv pads.
    assert DeformConv2dPack(4, 6, 3, padding=1)(torch.randn(1, 4, 2, 2)).shape == (1, 6, 2, 2)


def test_deformable_attention_is_the_weighted_sum_of_samples():
    value, shapes, locations, weights = attention_inputs()
    expected = deformable_attention(value, shapes, locations, weights)
    output = torch_ops.ms_deform_attn_forward(
        value, *level_tensors(shapes), locations, weights, im2col_step=64
    )
    torch.testing.assert_close(output, expected)


def test_deformable_attention_through_mmcvs_function_has_right_gradients():
    value, shapes, locations, weights = attention_inputs()
    inputs = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
    spatial, starts = level_tensors(shapes)

    def through_mmcv(value, locations, weights):
        return MultiScaleDeformableAttnFunction.apply(value, spatial, starts, locations, weights, 64)

    assert torch.autograd.gradcheck(through_mmcv, inputs, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight", FOCAL_WEIGHTS, ids=["equal", "by_class"])
@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (1.5, 0.6), (0.0, 0.5)])
def test_focal_loss_is_its_formula(weight, gamma, alpha):
    logits, target = focal_inputs()
    logits.requires_grad_()
    expected = focal_loss(logits, target, weight, gamma, alpha)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    output, gradient = torch.zeros_like(expected), torch.zeros_like(expected)
    with torch.no_grad():
        torch_ops.sigmoid_focal_loss_forward(logits, target, weight, output, gamma=gamma, alpha=alpha)
        torch_ops.sigmoid_focal_loss_backward(logits, target, weight, gradient, gamma=gamma, alpha=alpha)
    torch.testing.assert_close(output, expected.detach(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-4)


def test_focal_loss_of_extreme_logits_is_finite():
    logits, target = torch.tensor([[200.0, -200.0]]), torch.tensor([1])
    output, gradient = torch.zeros(1, 2), torch.zeros(1, 2)
    torch_ops.sigmoid_focal_loss_forward(logits, target, torch.empty(0), output, gamma=2.0, alpha=0.25)
    torch_ops.sigmoid_focal_loss_backward(logits, target, torch.empty(0), gradient, gamma=2.0, alpha=0.25)
    assert output.isfinite().all() and gradient.isfinite().all()
    assert (output > 10).all()


def test_missing_op_can_be_looked_up_and_says_what_to_do():
    op = torch_ops._missing_op("carafe_forward")
    with pytest.raises(StackError, match=f"carafe_forward.*{INSTALL_COMMAND}"):
        op(1, two=2)


def test_module_attributes_are_not_ops():
    with pytest.raises(AttributeError):
        torch_ops._missing_op("__file__")


# --- equality with the compiled ops ---


@pytest.mark.full_ops
class TestAgainstCompiledOps:
    @pytest.mark.parametrize("offset", [0, 1])
    def test_nms(self, offset):
        boxes = torch.from_numpy(random_boxes(200, 5))
        scores = torch.rand(200, generator=torch.Generator().manual_seed(5))
        real = NMSop.apply(boxes, scores, 0.4, offset, 0, -1)
        assert torch_ops.nms(boxes, scores, iou_threshold=0.4, offset=offset).tolist() == real.tolist()

    @pytest.mark.parametrize(("scale", "sampling_ratio", "aligned"), ROI_CASES)
    def test_roi_align(self, scale, sampling_ratio, aligned):
        from mmcv.ops import roi_align as real_roi_align

        images = roi_images().requires_grad_()
        real = real_roi_align(images, ROIS, (2, 3), scale, sampling_ratio, "avg", aligned)
        grad_output = torch.randn(real.shape, generator=torch.Generator().manual_seed(3))
        (real_gradient,) = torch.autograd.grad(real, images, grad_output)
        output, gradient, none = torch.zeros_like(real), torch.zeros_like(images), torch.zeros(0)
        options = roi_options(scale, sampling_ratio, aligned)
        torch_ops.roi_align_forward(images.detach(), ROIS, output, none, none, **options)
        torch_ops.roi_align_backward(grad_output, ROIS, none, none, gradient, **options)
        torch.testing.assert_close(output, real.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradient, real_gradient, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
    def test_deformable_convolution(self, options):
        """mmcv's own, which its function calls here, against the same formula."""
        inputs = convolution_inputs(**options)
        images, offset, weight = inputs[0], inputs[1], inputs[3]
        real = modulated_deform_conv2d(*inputs, *by_position(options))
        torch.testing.assert_close(real, deform_conv_by_formula(inputs, **options))
        real = deform_conv2d(images, offset, weight, *by_position(options))
        expected = deform_conv_by_formula([images, offset, None, weight, None], **options)
        torch.testing.assert_close(real, expected)

    def test_every_stand_in_has_its_counterpart(self):
        import mmcv._ext

        assert mmcv._ext.__file__.endswith((".so", ".pyd"))
        for op in torch_ops.OPS:
            assert callable(getattr(mmcv._ext, op.__name__))
            assert getattr(mmcv._ext, op.__name__) is not op

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="mmcv compiles these ops for a GPU only")
    def test_gpu_ops(self):
        from mmcv.ops import sigmoid_focal_loss

        value, shapes, locations, weights = (
            tensor.float().cuda() if torch.is_tensor(tensor) else tensor for tensor in attention_inputs()
        )
        spatial, starts = (tensor.cuda() for tensor in level_tensors(shapes))
        real = MultiScaleDeformableAttnFunction.apply(value, spatial, starts, locations, weights, 64)
        ours = torch_ops.ms_deform_attn_forward(value, spatial, starts, locations, weights, im2col_step=64)
        torch.testing.assert_close(ours, real, atol=1e-5, rtol=1e-5)

        logits, target = (tensor.cuda() for tensor in focal_inputs())
        real = sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
        output = torch.zeros_like(real)
        none = torch.empty(0, device="cuda")
        torch_ops.sigmoid_focal_loss_forward(logits, target, none, output, gamma=2.0, alpha=0.25)
        torch.testing.assert_close(output, real, atol=1e-5, rtol=1e-5)
