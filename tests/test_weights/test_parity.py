"""Equal predictions: golden files, stock mmdet, ours, and Hugging Face's own implementation."""

import json
import os
import stat

import numpy as np
import pytest
import torch
from PIL import Image
from weights_builders import (
    detector,
    golden_file,
    padded_batch,
    pixel_mask,
    predict,
    resnet,
    write_golden,
    write_mmdet,
)

from ddetr_mm.tasks.detector import Detector
from ddetr_mm.weights import convert_checkpoint, inspect_checkpoint, load_for_model
from ddetr_mm.weights.formats import TAO, from_canonical

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing may be fetched: files on disk are all there is."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def golden_outputs(name):
    with np.load(golden_file(f"{name}.npz")) as content:
        images = torch.from_numpy(content["images"])
        sizes_hw = [tuple(int(side) for side in size) for size in content["valid_hw"]]
        return (
            images,
            sizes_hw,
            torch.from_numpy(content["pred_logits"]),
            torch.from_numpy(content["pred_boxes"]),
        )


def worst(predictions, expected):
    """Largest absolute difference of logits or boxes."""
    return max(
        (found - wanted).abs().max().item() for found, wanted in zip(predictions, expected, strict=True)
    )


def golden_detector(path, **options):
    """A detector of the file's architecture."""
    found = inspect_checkpoint(path).architecture
    return detector(
        num_classes=found.num_classes,
        width=found.hidden_dim,
        layers=found.enc_layers,
        feedforward=found.enc_feedforward,
        num_queries=found.num_queries,
        num_levels=found.num_feature_levels,
        with_box_refine=found.with_box_refine,
        seed=None,
        **options,
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("official_4lvl", dict(kind="DeformableDETR", backbone="resnet_50")),
        ("resnet50_4lvl", dict(kind="TAODeformableDETR", backbone="resnet_50")),
        (
            "gc_vit_xxtiny_4lvl",
            dict(kind="TAODeformableDETR", backbone="gc_vit_xxtiny"),
        ),
    ],
    ids=["official-stock", "tao-resnet50", "tao-gcvit"],
)
def test_golden_through_a_converted_file(name, options, tmp_path):
    converted = tmp_path / "mmdet.pth"
    convert_checkpoint(write_golden(name, tmp_path), converted, "mmdet")
    model = golden_detector(converted, **options)
    assert load_for_model(model, converted, strict=True).complete
    images, sizes_hw, logits, boxes = golden_outputs(name)
    assert worst(predict(model, images, sizes_hw), (logits, boxes)) < TOLERANCE


def hugging_face(folder):
    transformers = pytest.importorskip("transformers")
    model, info = transformers.DeformableDetrForObjectDetection.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def hf_predict(model, images, sizes_hw):
    with torch.no_grad():
        output = model(images, pixel_mask=pixel_mask(images, sizes_hw))
    return output.logits, output.pred_boxes


def test_hugging_face_meets_the_official_golden(tmp_path):
    convert_checkpoint(write_golden("official_4lvl", tmp_path), tmp_path / "hf", "hf")
    images, sizes_hw, logits, boxes = golden_outputs("official_4lvl")
    found = hf_predict(hugging_face(tmp_path / "hf"), images, sizes_hw)
    assert worst(found, (logits[-1], boxes[-1])) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        dict(with_box_refine=False),
        dict(with_box_refine=True),
        dict(with_box_refine=True, as_two_stage=True, width=256),
    ],
    ids=["plain", "refine", "two-stage"],
)
def test_four_formats_predict_the_same(options, tmp_path):
    """mmdet → official → hf → (tao →) mmdet; HF's own model and stock mmdet at the two ends."""
    model = detector(backbone="resnet_18", seed=7, **options)
    images, sizes_hw = padded_batch()
    expected = predict(model, images, sizes_hw)
    cfg = f"model = dict(num_queries=12, with_box_refine={options['with_box_refine']})"
    path = write_mmdet(tmp_path / "mmdet.pth", model.state_dict(), cfg=cfg)
    convert_checkpoint(path, tmp_path / "official.pth", "official")
    convert_checkpoint(tmp_path / "official.pth", tmp_path / "hf", "hf")
    theirs = hugging_face(tmp_path / "hf")
    found = hf_predict(theirs, images, sizes_hw)
    assert worst(found, [value[-1] for value in expected]) < TOLERANCE

    # What transformers writes itself (repeated keys left out, its own config) reads back the same.
    theirs.save_pretrained(tmp_path / "saved")
    last = tmp_path / "saved"
    if not options.get("as_two_stage"):
        convert_checkpoint(last, tmp_path / "tao.pth", "tao")
        last = tmp_path / "tao.pth"
    other = detector(backbone="resnet_18", seed=None, **options)
    assert load_for_model(other, last).complete
    assert worst(predict(other, images, sizes_hw), expected) == 0.0


def test_padding_makes_the_difference_between_tao_and_the_others(tmp_path):
    path = write_golden("resnet50_4lvl", tmp_path)
    convert_checkpoint(path, tmp_path / "hf", "hf")
    images, sizes_hw, logits, _boxes = golden_outputs("resnet50_4lvl")
    theirs = hf_predict(hugging_face(tmp_path / "hf"), images, sizes_hw)[0]
    # The first image has no padding, the second has: zeroed values are seen there only.
    assert (theirs[0] - logits[-1, 0]).abs().max() < TOLERANCE
    assert (theirs[1] - logits[-1, 1]).abs().max() > 0.01
    zeroed = golden_detector(path, kind="TAODeformableDETR", backbone="resnet_50", zero_padded_values=True)
    load_for_model(zeroed, path)
    assert (predict(zeroed, images, sizes_hw)[0][-1] - theirs).abs().max() < TOLERANCE


def test_hugging_face_with_its_own_resnet_and_fewer_levels(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(
            layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2],
            out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_layers=2, decoder_layers=2, d_model=64, encoder_ffn_dim=64, decoder_ffn_dim=64,
        num_queries=12, num_labels=5, with_box_refine=False,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.DeformableDetrForObjectDetection(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    model = detector(backbone="resnet_18", with_box_refine=False, seed=None)
    report = load_for_model(model, tmp_path / "hf")
    assert report.complete, report.summary()
    images, sizes_hw = padded_batch()
    expected = hf_predict(theirs, images, sizes_hw)
    found = [value[-1] for value in predict(model, images, sizes_hw)]
    assert worst(found, expected) < TOLERANCE


def test_dilated_backbone(tmp_path):
    """The last stage at stride 16, as in the original authors' DC5 model; no shape shows it."""
    backbone = dict(resnet(50, (3,)), type="TorchvisionDilatedResNet")
    options = dict(num_levels=1, layers=1, with_box_refine=False, backbone=backbone, in_channels=(2048,))
    model = detector(seed=7, **options)
    images, sizes_hw = padded_batch()
    logits, boxes = predict(model, images, sizes_hw)
    cfg = "model = dict(backbone=dict(type='TorchvisionDilatedResNet'))"
    path = write_mmdet(tmp_path / "mmdet.pth", model.state_dict(), cfg=cfg)
    convert_checkpoint(path, tmp_path / "official.pth", "official")
    convert_checkpoint(tmp_path / "official.pth", tmp_path / "hf", "hf")
    found = hf_predict(hugging_face(tmp_path / "hf"), images, sizes_hw)
    assert worst(found, (logits[-1], boxes[-1])) < TOLERANCE
    assert inspect_checkpoint(tmp_path / "hf").meta.dilation is True

    plain = detector(seed=None, **(options | dict(backbone=resnet(50, (3,)))))
    report = load_for_model(plain, tmp_path / "hf")
    assert any("with a dilated last stage" in note for note in report.notes)
    assert worst(predict(plain, images, sizes_hw), (logits, boxes)) > 0.01


NAMES = ("background", "cat", "dog", "cow", "hen", "ox", "fox", "owl")
SPEC = {
    "results_dir": "/mine/secret/results",
    "model": {"num_select": 20, "pretrained_backbone_path": "/mine/backbone.pth"},
    "dataset": {
        "train_data_sources": [{"image_dir": "/mine/images", "json_file": "/mine/a.json"}],
        "augmentation": {
            "test_random_resize": 64,
            "random_resize_max_size": 96,
            "fixed_padding": False,
            "input_mean": [0.5, 0.4, 0.3],
            "input_std": [0.2, 0.25, 0.3],
        },
    },
}


def test_a_folder_is_all_that_transformers_pipeline_needs(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = detector(backbone="resnet_18", seed=7, with_box_refine=True, num_classes=8)
    with torch.no_grad():
        for branch in model.bbox_head.cls_branches:
            branch.bias[0] = -100.0  # the background, which a trained network does not predict either
    named, _trace = from_canonical(model.state_dict(), TAO, with_box_refine=True, two_stage=False)
    path = tmp_path / "tao.pth"
    torch.save({"state_dict": named, "pytorch-lightning_version": "2.0.0"}, path)
    for to, name in (("mmdet", "ours.pth"), ("hf", "hf")):
        convert_checkpoint(path, tmp_path / name, to, spec=SPEC, class_names=NAMES)
    # Of a size that both leave as it is: they differ by one level of some resized pixels.
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 85, 3), np.uint8))
    ours = Detector(tmp_path / "ours.pth", device="cpu", conf=0.0)(picture)

    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        output = theirs(**processor(picture, return_tensors="pt"))
    (found,) = processor.post_process_object_detection(output, 0.0, [(64, 85)], top_k=20)
    assert len(ours) == 20
    assert found["scores"].numpy() == pytest.approx(ours.scores, abs=1e-4)
    np.testing.assert_array_equal(found["labels"], ours.labels)
    np.testing.assert_allclose(found["boxes"].numpy(), ours.boxes_xyxy, atol=85e-4)

    piped = transformers.pipeline("object-detection", model=str(tmp_path / "hf"))(picture, threshold=0.0)
    assert [each["label"] for each in piped[:20]] == [NAMES[label] for label in ours.labels]
    assert [each["score"] for each in piped[:20]] == pytest.approx(list(ours.scores), abs=1e-4)
    # Sides as a spec's: 90 x 120 becomes 64 x 85.
    larger = processor(Image.new("RGB", (120, 90)), return_tensors="pt")
    assert larger["pixel_values"].shape == (1, 3, 64, 85)


def test_a_folder_to_share_has_no_path_of_the_user(tmp_path):
    path = write_mmdet(tmp_path / "x.pth", detector(backbone="resnet_18", seed=7).state_dict())
    convert_checkpoint(path, tmp_path / "hf", "hf", spec=SPEC)
    texts = {name.name: name.read_text() for name in (tmp_path / "hf").glob("*.json")}
    assert set(texts) == {"config.json", "preprocessor_config.json"}
    assert not any("/mine" in text or str(tmp_path) in text for text in texts.values())
    # What a spec says of pictures is kept.
    meta = inspect_checkpoint(tmp_path / "hf").meta
    assert meta.test_settings["test_random_resize"] == 64 and meta.test_settings["fixed_padding"] is False
    assert meta.input_mean == (0.5, 0.4, 0.3)
    preprocessor = json.loads(texts["preprocessor_config.json"])
    assert preprocessor["size"] == {"shortest_edge": 64, "longest_edge": 96}
    assert preprocessor["image_std"] == [0.2, 0.25, 0.3]


def test_files_of_a_conversion_have_the_usual_mode(tmp_path):
    path = write_mmdet(tmp_path / "x.pth", detector(backbone="resnet_18", seed=7).state_dict())
    before = os.umask(0o022)
    try:
        for to, name in (("hf", "hf"), ("tao", "tao.safetensors"), ("official", "official.pth")):
            convert_checkpoint(path, tmp_path / name, to)
    finally:
        os.umask(before)
    written = [tmp_path / "tao.safetensors", tmp_path / "official.pth", *(tmp_path / "hf").iterdir()]
    assert [stat.S_IMODE(each.stat().st_mode) for each in written] == [0o644] * 5
