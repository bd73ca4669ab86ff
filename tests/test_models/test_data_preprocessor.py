"""Normalisation and fixed padding, against TAO's outputs and mmdet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detr_builders import golden, instances, sample
from mmdet.registry import MODELS
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks

from ddetr_mm.models import FixedPadDetDataPreprocessor

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def build(**kwargs) -> FixedPadDetDataPreprocessor:
    return MODELS.build({"type": "FixedPadDetDataPreprocessor", "mean": MEAN, "std": STD, **kwargs})


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def test_meets_tao() -> None:
    """Normalised pixels, padding per image and the padding of the whole batch."""
    expected = np.load(golden("transforms.npz"))
    plain = [expected[f"{image}/plain"] for image in range(2)]
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (MEAN, STD))
    images = [torch.from_numpy((values * std + mean).round().astype(np.uint8)) for values in plain]
    preprocessor = build(pad_short_long=(96, 160))
    for image, values in zip(range(2), plain, strict=True):
        found = preprocessor({"inputs": [images[image]]})["inputs"][0]
        np.testing.assert_allclose(found, expected[f"{image}/fixed_padding"], atol=1e-4)
        height, width = values.shape[1:]
        assert not found[:, height:].any()
        assert not found[:, :, width:].any()

    samples = [sample(values.shape[1:], (1, 1)) for values in plain]
    found = preprocessor({"inputs": images, "data_samples": samples}, training=True)
    collated = expected["collated"]
    np.testing.assert_allclose(found["inputs"], collated[:, :3], atol=1e-4)
    for image, data_sample in enumerate(found["data_samples"]):
        assert data_sample.batch_input_shape == (160, 160)
        assert data_sample.pad_shape == [(96, 160), (160, 96)][image]
        # TAO's mask: everything beyond the unpadded image, fixed padding included.
        height, width = data_sample.img_shape
        padding = np.ones(data_sample.batch_input_shape)
        padding[:height, :width] = 0
        np.testing.assert_array_equal(padding, collated[image, 3])


@pytest.mark.parametrize(
    ("size_hw", "divisor", "padded"),
    [
        ((60, 100), 1, (80, 128)),
        ((100, 60), 1, (128, 80)),
        ((70, 70), 1, (80, 128)),
        ((60, 100), 32, (96, 128)),
        ((90, 140), 1, (90, 140)),  # beyond the target: not cropped
        ((60, 140), 32, (96, 160)),
    ],
)
def test_padded_sizes(size_hw, divisor, padded) -> None:
    preprocessor = build(pad_short_long=(80, 128), pad_size_divisor=divisor)
    samples = [sample(size_hw, (1, 1))]
    found = preprocessor({"inputs": [torch.zeros(3, *size_hw)], "data_samples": samples})
    assert tuple(found["inputs"].shape[2:]) == found["data_samples"][0].pad_shape == padded


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("divisor", [1, 32])
def test_equals_mmdet_without_a_target(training: bool, divisor: int) -> None:
    settings = {"mean": MEAN, "std": STD, "bgr_to_rgb": True, "pad_size_divisor": divisor, "pad_value": 3}
    ours = build(**{name: settings[name] for name in ("bgr_to_rgb", "pad_size_divisor", "pad_value")})
    theirs = MODELS.build({"type": "DetDataPreprocessor", **settings})
    for images in ([picture(30, 50), picture(44, 20, seed=1)], torch.stack([picture(30, 50)] * 2)):
        results = [
            module(
                {"inputs": images, "data_samples": [sample(image.shape[1:], (1, 1)) for image in images]},
                training=training,
            )
            for module in (ours, theirs)
        ]
        torch.testing.assert_close(results[0]["inputs"], results[1]["inputs"], rtol=0, atol=1e-6)
        for mine, other in zip(results[0]["data_samples"], results[1]["data_samples"], strict=True):
            assert mine.batch_input_shape == other.batch_input_shape
            assert mine.pad_shape == other.pad_shape


def test_boxes_stay_and_masks_are_padded() -> None:
    truth = instances([1], [[3, 4, 20, 21]])
    truth.masks = BitmapMasks(np.ones((1, 30, 50), dtype=np.uint8), 30, 50)
    boxes = truth.bboxes.clone()
    truth.bboxes = HorizontalBoxes(truth.bboxes)
    preprocessor = build(pad_short_long=(40, 64), pad_mask=True)
    result = preprocessor(
        {"inputs": [picture(30, 50)], "data_samples": [sample((30, 50), (1, 1), truth)]}, training=True
    )
    found = result["data_samples"][0].gt_instances
    assert type(found.bboxes) is torch.Tensor
    assert torch.equal(found.bboxes, boxes)
    assert (found.masks.height, found.masks.width) == (40, 64)
    assert result["inputs"].shape == (1, 3, 40, 64)


def test_batch_augments_run_in_training_only() -> None:
    @MODELS.register_module(force=True)
    class Darken(torch.nn.Module):
        def forward(self, inputs, samples):
            return inputs - 100, samples

    preprocessor = build(pad_short_long=(40, 64), batch_augments=[{"type": "Darken"}])
    data = {"inputs": [picture(30, 50)]}
    dark, plain = (preprocessor(data, training=training)["inputs"] for training in (True, False))
    torch.testing.assert_close(dark, plain - 100)
    assert preprocessor(data)["data_samples"] is None


@pytest.mark.parametrize("target", [(128, 80), (0, 80)])
def test_wrong_targets_are_refused(target) -> None:
    with pytest.raises(ValueError, match="must be \\(short, long\\)"):
        build(pad_short_long=target)


def test_training_may_be_padded_otherwise() -> None:
    preprocessor = build(pad_size_divisor=32, train_padding={"pad_short_long": (40, 64)})
    data = {"inputs": [picture(30, 50)]}
    for training, size_hw in ((True, (40, 64)), (False, (32, 64))):
        inputs = preprocessor(data, training=training)["inputs"][0]
        assert tuple(inputs.shape) == (3, *size_hw)
        assert not inputs[:, 30:].any() and not inputs[..., 50:].any()


@pytest.mark.parametrize(
    ("padding", "reason"), [({"pad_short_long": (9, 3)}, "must be"), ({"size": 3}, "not size")]
)
def test_wrong_padding_of_training_is_refused(padding, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        build(train_padding=padding)
