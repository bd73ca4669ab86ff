"""Every planted fault is caught by ``ddetr-mm check`` and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from ddetr_mm.cli import main
from ddetr_mm.preflight import resources
from ddetr_mm.preflight.inputs import check_frozen, check_named_file, check_named_files
from ddetr_mm.spec import load_spec
from ddetr_mm.tasks.check import early_check
from ddetr_mm.weights.encryption import encrypt_file


@pytest.fixture
def check(data_set, capsys):
    """Run the cheap part of a check; gives exit status, findings that stand against the run, message."""

    def run(*arguments: str) -> tuple[int, dict[str, str], str]:
        capsys.readouterr()
        status = main(["check", "--quick", "-e", data_set.spec, *arguments])
        report = json.loads((data_set.folder / "results" / "train" / "check.json").read_text())
        assert report["passed"] == (status == 0)
        against = {one["kind"]: one["text"] for one in report["findings"] if one["weight"] != "note"}
        return status, against, capsys.readouterr().err

    return run


def test_sound_data_pass(check):
    assert check()[:2] == (0, {})


def test_corners_in_place_of_width_and_height(data_set, check):
    data_set.change_boxes("train", lambda box: [box[0], box[1], box[0] + box[2], box[1] + box[3]])
    status, against, message = check()
    assert status == 2 and list(against) == ["boxes-are-corners"]
    assert "corners (x1, y1, x2, y2)" in message and "train_data_sources" in message


def test_annotations_that_are_left_out(data_set, check):
    document = data_set.read("train")
    document["annotations"][0]["image_id"] = 987
    document["annotations"][1]["category_id"] = 55
    data_set.write("train", document)
    assert check()[:2] == (0, {})
    status, against, message = check("ddetr_mm.strict_annotations=true")
    assert status == 2 and list(against) == ["annotations-unreadable"]
    assert "annotations[0].image_id" in message and "annotations[1].category_id" in message


def test_normalised_boxes(data_set, check):
    data_set.change_boxes("val", lambda box: [box[0] / 120, box[1] / 80, box[2] / 120, box[3] / 80])
    status, against, message = check()
    assert status == 2 and list(against) == ["boxes-normalised"]
    assert "fractions of the image" in message and "val_data_sources" in message


def test_swapped_category_ids_by_name(data_set, check):
    document = data_set.read("val")
    document["categories"] = [dict(id=1, name="person"), dict(id=2, name="car")]
    data_set.write("val", document)
    status, against, message = check()
    assert status == 2 and "ids-swapped" in against
    assert "the same classes have other ids" in message and "1: 'car' in train, 'person' in val" in message


def test_categories_from_zero(data_set, check):
    for split in ("train", "val"):
        document = data_set.read(split)
        for item in document["annotations"]:
            item["category_id"] -= 1
        document["categories"] = [dict(id=0, name="car"), dict(id=1, name="person")]
        data_set.write(split, document)
    status, against, message = check()
    assert status == 2 and list(against) == ["ids-from-zero"]
    assert "numbered from 0" in message and "(car)" in message and "dataset.num_classes=3" in message


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_the_report_is_printed_on_streams_of_other_encodings(data_set, encoding):
    for split in ("train", "val"):
        document = data_set.read(split)
        document["categories"] = [dict(id=1, name="véhicule"), dict(id=2, name="人")]
        data_set.write(split, document)
    done = subprocess.run(
        [sys.executable, "-m", "ddetr_mm", "check", "--quick", "-e", data_set.spec],
        env=os.environ | {"PYTHONIOENCODING": f"{encoding}:strict", "PYTHONUTF8": "0"},
        capture_output=True,
    )
    text = done.stdout.decode(encoding)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert "+ boxes of train" in text and "class \\u4eba" in text and "annotations" in text
    assert ("véhicule" in text) == (encoding != "ascii") and ("v\\xe9hicule" in text) == (encoding == "ascii")


def encrypted(path, key: str) -> None:
    with path.with_suffix(".plain").open("wb+") as file:
        file.write(b"weights" * 100)
        encrypt_file(file, path, key)


KEYS = (
    "train.pretrained_model_path",
    "train.resume_training_checkpoint_path",
    "model.pretrained_backbone_path",
)


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("key", KEYS)
def test_files_that_training_names_are_looked_at_before_anything_is_built(
    data_set, command, key, capsys, monkeypatch
):
    """Also with ``ddetr_mm.quick_check: false``; the message has the spec key and the path as written."""

    def refuse(*_args, **_options):
        raise AssertionError("the network was built")

    monkeypatch.setattr("ddetr_mm.tasks.runner.build_runner", refuse)
    folder = data_set.folder
    (folder / "empty.pth").touch()
    encrypted(folder / "secret.pth", "right")
    quick = ["--quick"] if command == "check" else ["ddetr_mm.quick_check=false"]
    for path, extra, parts in (
        ("nowhere.pth", [], ["does not exist"]),
        ("https://example.org/a//b.pth", [], ["is a URL", "download it"]),
        (f"{folder}/empty.pth", [], ["is empty"]),
        (f"{folder}/secret.pth", [], ["is encrypted", "encryption_key=…"]),
        (f"{folder}/secret.pth", ["encryption_key=wrong"], ["cannot be decrypted with this key"]),
    ):
        assert main([command, "-e", data_set.spec, *quick, f"{key}={path}", *extra]) == 2
        message = capsys.readouterr().err
        assert all(part in message for part in [path, key, *parts]), message
        assert "Traceback" not in message


def test_the_backbones_file_is_not_looked_at_beside_that_of_the_whole_model(data_set):
    files = [
        f"{key}=nowhere.pth" for key in ("train.pretrained_model_path", "model.pretrained_backbone_path")
    ]
    spec = load_spec(data_set.spec, files, "train").spec
    (finding,) = check_named_files(spec, "train")
    assert finding.problem.where == "train.pretrained_model_path"


def test_the_right_key_opens_a_named_file(data_set):
    encrypted(data_set.folder / "secret.pth", "right")
    assert list(check_named_file("train.x", str(data_set.folder / "secret.pth"), "right")) == []


def test_a_full_disk_stops_training_before_anything_is_built(data_set, capsys, monkeypatch):
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: SimpleNamespace(free=10 << 20))
    assert main(["train", "-e", data_set.spec]) == 2
    message = capsys.readouterr().err
    assert "results_dir" in message and "10.0 MiB are free" in message


def frozen_at_random(data_set, *overrides: str) -> str:
    spec = load_spec(data_set.spec, list(overrides), "train").spec
    return " ".join(str(finding.problem) for finding in check_frozen(spec))


def test_frozen_parts_without_weights_are_named(data_set, check, capsys):
    """The spec of the documentation's example: a ResNet-50 without a file."""
    own = "ddetr_mm.backbone=null"
    assert "the stem, the first stage and all batch norms" in frozen_at_random(data_set, own)
    assert "torchvision" in frozen_at_random(data_set, own)
    assert "the first 1 stages" in frozen_at_random(data_set)
    whole = frozen_at_random(data_set, own, "model.train_backbone=false", "train.freeze=[neck]")
    assert "neck (train.freeze), the backbone (model.train_backbone: false)" in whole
    assert "model.pretrained_backbone_path" in whole
    assert frozen_at_random(data_set, "ddetr_mm.backbone.frozen_stages=-1") == ""
    assert frozen_at_random(data_set, own, "model.backbone=gc_vit_xxtiny") == ""
    for key in KEYS:
        assert frozen_at_random(data_set, f"{key}=x.pth") == ""
    assert check()[0] == 0
    report = json.loads((data_set.folder / "results" / "train" / "check.json").read_text())
    assert [one["weight"] for one in report["findings"] if one["kind"] == "frozen-at-random"] == ["note"]
    early_check(load_spec(data_set.spec, [], "train"), resumes=False)
    assert "warning: frozen-at-random" in capsys.readouterr().err
    early_check(load_spec(data_set.spec, [], "train"), resumes=True)
    assert capsys.readouterr().err == ""


def test_wrong_folder(data_set, check):
    (data_set.folder / "empty").mkdir()
    source = f"[{{image_dir: {data_set.folder / 'empty'}, json_file: {data_set.folder / 'train.json'}}}]"
    status, against, message = check(f"dataset.train_data_sources={source}")
    assert status == 2 and "images-in-wrong-folder" in against
    assert f"there are such images below {data_set.folder / 'train'}" in message


def test_transposed_sizes(data_set, check):
    document = data_set.read("train")
    for item in document["images"]:
        item["width"], item["height"] = item["height"], item["width"]
    data_set.write("train", document)
    status, against, message = check()
    assert status == 2 and "sizes-transposed" in against
    assert (
        "width and height exchanged" in message
        and "is 120x80 (width x height), recorded as 80x120" in message
    )


def test_stale_json_files_renamed(data_set, check):
    for path in data_set.pictures("train")[::3]:
        path.rename(path.with_name(f"new-{path.name}"))
    status, against, message = check()
    assert status == 2 and "annotations-stale" in against
    assert "14 of 40 checked images do not exist" in message and "new-000.png" in message


def test_stale_json_pictures_replaced(data_set, check):
    for path in data_set.pictures("train")[::2]:
        Image.open(path).resize((150, 100)).save(path)
    status, against, message = check()
    assert status == 2 and list(against) == ["annotations-stale"]
    assert "changed after they were annotated" in message


def test_missing_pictures_that_may_be_replaced_are_noted(data_set, check):
    data_set.pictures("train")[0].unlink()
    assert list(check()[1]) == ["images-missing"]
    assert check("ddetr_mm.missing_images=replace")[:2] == (0, {})


def test_pictures_newer_than_annotations_are_noted(data_set, check):
    os.utime(data_set.folder / "train.json", (1, 1))
    check()
    report = json.loads((data_set.folder / "results" / "train" / "check.json").read_text())
    assert "annotations-older" in {one["kind"] for one in report["findings"]}


@pytest.mark.parametrize(
    "override, words",
    [
        ("input_mean=[123.675,116.28,103.53]", "write [0.485, 0.456, 0.406]"),
        ("input_std=[58.395,57.12,57.375]", "write [0.229, 0.224, 0.225]"),
        ("input_std=[0.0009,0.0009,0.0009]", "255 times too small"),
        ("input_mean=[9,9,9]", "on the scale 0 to 255"),
    ],
)
def test_mean_and_deviation_on_the_wrong_scale(check, override, words):
    status, against, message = check(f"dataset.augmentation.{override}")
    assert status == 2 and set(against) == {"normalisation-scale"}
    assert words in message and "scale 0 to 1" in message
