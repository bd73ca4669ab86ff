"""Normalisation and fixed padding, against TAO's outputs and mmdet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detr_builders import golden, instances, sample
from mmdet.registry import MODELS
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddetr_mm.models import FixedPadDetDataPreprocessor
from ddetr_mm.models.data_preprocessor import copy_together

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


# --- Copies to a device ---


class Copies(TorchDispatchMode):
    """Writes down every copy from the host to a fake GPU, and every indexing by a list."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[bool, int]] = []  # whether the host does not wait; bytes
        self.indexed = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        if name == "aten::_to_copy":
            source, target, waits_not = args[0], result, bool(kwargs.get("non_blocking"))
        elif name == "aten::copy_":
            source, target, waits_not = args[1], args[0], len(args) > 2 and bool(args[2])
        else:
            self.indexed += name == "aten::index"
            return result
        if source.device.type == "cpu" and target.device.type == "cuda":
            self.copies.append((waits_not, source.numel() * source.element_size()))
        return result


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [1, 8])
def test_a_batch_is_two_copies_which_the_host_does_not_wait_for(batch: int, training: bool) -> None:
    """On a GPU that is not there: tensors without content, whose operators are real."""
    preprocessor = build(pad_short_long=(80, 128), bgr_to_rgb=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        preprocessor = preprocessor.to("cuda")
        images = [torch.zeros(3, 80, 100 + number, dtype=torch.uint8) for number in range(batch)]
        samples = []
        for number in range(batch):
            made = sample((80, 100 + number), (1, 1))
            boxes = HorizontalBoxes(torch.zeros(number, 4))
            made.gt_instances = InstanceData(bboxes=boxes, labels=torch.zeros(number, dtype=torch.long))
            made.ignored_instances = InstanceData(bboxes=torch.zeros(1, 4))
            samples.append(made)
        with Copies() as seen:
            found = preprocessor({"inputs": images, "data_samples": samples}, training)
        shapes = [tuple(found["inputs"].shape), found["inputs"].device.type]
        first = found["data_samples"][0]
        dtype = first.gt_instances.labels.dtype
        where = {one.gt_instances.labels.device.type for one in found["data_samples"]}
        where |= {one.ignored_instances.bboxes.device.type for one in found["data_samples"]}
    pixels = sum(3 * 80 * (100 + number) for number in range(batch))
    assert [waits_not for waits_not, _ in seen.copies] == [True, True]
    assert pixels <= seen.copies[0][1] < pixels + 16 * batch
    assert seen.indexed == 0
    assert shapes == [(batch, 3, 80, 128), "cuda"] and where == {"cuda"}
    assert dtype == torch.int64


def test_copies_keep_values_dtypes_and_shapes() -> None:
    tensors = [
        torch.arange(5, dtype=torch.uint8),
        torch.rand(3, 4),
        torch.tensor(7),
        torch.zeros(0, 4),
        torch.tensor([True, False, True]),
        torch.arange(12, dtype=torch.float64).view(3, 4).t(),
        torch.rand(2, 3).bfloat16()[:, ::2],
    ]
    copies = copy_together(tensors, torch.device("cpu"))
    for copy, tensor in zip(copies, tensors, strict=True):
        assert copy.dtype == tensor.dtype and torch.equal(copy, tensor)
        assert (copy.is_contiguous() and copy.data_ptr() != tensor.data_ptr()) or not copy.numel()
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
    assert copy_together([], torch.device("cpu")) == []


def batch_of_three() -> dict:
    """Images of three sizes; samples with boxes, masks, scores and names."""
    images = [picture(30, 50), picture(44, 20, seed=1), picture(30, 50, seed=2).flip(2)]
    samples = []
    for number, image in enumerate(images):
        truth = instances([1] * number, [[3, 4, 20, 21]] * number)
        truth.bboxes = HorizontalBoxes(truth.bboxes)
        height, width = image.shape[1:]
        truth.masks = BitmapMasks(np.ones((number, height, width), dtype=np.uint8), height, width)
        samples.append(sample((height, width), (1, 1), truth))
        samples[-1].set_metainfo({"img_path": f"{number}.jpg"})
        samples[-1].set_field(torch.tensor([0.5 * number]), "score")
    return {"inputs": images, "data_samples": samples, "name": "a batch"}


@pytest.mark.parametrize("bgr_to_rgb", [True, False])
def test_two_copies_give_what_the_usual_ones_do(bgr_to_rgb: bool, monkeypatch) -> None:
    """The way of a GPU, run on the CPU, bit for bit; the batch itself does not change."""
    preprocessor = build(pad_short_long=(40, 64), bgr_to_rgb=bgr_to_rgb, boxtype2tensor=False)
    data, plain = batch_of_three(), preprocessor(batch_of_three(), training=True)
    monkeypatch.setattr(type(preprocessor), "device", property(lambda self: torch.device("meta")))
    monkeypatch.setattr(
        "ddetr_mm.models.data_preprocessor.copy_together",
        lambda tensors, device: copy_together(tensors, torch.device("cpu")),
    )
    found = preprocessor(data, training=True)
    assert torch.equal(found["inputs"], plain["inputs"])
    for mine, other, own in zip(
        found["data_samples"], plain["data_samples"], data["data_samples"], strict=True
    ):
        assert mine.metainfo == other.metainfo and mine.keys() == other.keys() == own.keys()
        assert type(mine.gt_instances.bboxes) is HorizontalBoxes
        assert torch.equal(mine.gt_instances.bboxes.tensor, other.gt_instances.bboxes.tensor)
        assert torch.equal(mine.gt_instances.labels, other.gt_instances.labels)
        assert mine.gt_instances.masks.masks.shape == other.gt_instances.masks.masks.shape
        assert torch.equal(mine.score, other.score)
        assert mine is not own and "pad_shape" not in own.metainfo
    copied = preprocessor.copy_to_device(data)
    assert copied["name"] == "a batch" and list(copied) == list(data)


def test_a_copy_made_before_is_used_once_and_for_its_batch_only() -> None:
    preprocessor = build()
    data, other = {"inputs": [picture(8, 8)]}, {"inputs": [picture(8, 8, seed=1)]}
    plain = preprocessor(data)["inputs"]
    ahead = {"inputs": [255 - picture(8, 8)], "data_samples": None}
    preprocessor.take_copied(data, ahead)
    assert torch.equal(preprocessor(data)["inputs"], preprocessor(ahead)["inputs"])
    assert torch.equal(preprocessor(data)["inputs"], plain)
    preprocessor.take_copied(data, ahead)
    assert torch.equal(preprocessor(other)["inputs"], build()(other)["inputs"])
    assert torch.equal(preprocessor(data)["inputs"], plain)
