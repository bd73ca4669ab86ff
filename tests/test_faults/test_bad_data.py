"""Wrong annotations and images, by the commands that read them."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_input_project import assert_told, edit_json, run_here
from PIL import Image

TRAIN = "coco/train/train-shard-00000-of-00001.json"
IMAGE = "data/train/images/00000.png"
SPEC = ("-e", "spec.yaml")


def first(part: str, **changes: Any) -> Any:
    """Change the first entry of a list in a COCO file."""
    return lambda content: content[part][0].update(changes)


ANNOTATIONS = {
    "category": (first("annotations", category_id=9), ("annotations[0].category_id", "9")),
    "image": (first("annotations", image_id=99), ("annotations[0].image_id", "99")),
    "box-of-three": (first("annotations", bbox=[1, 2, 3]), ("annotations[0].bbox",)),
    "box-of-text": (first("annotations", bbox=["a", 2, 3, 4]), ("annotations[0].bbox",)),
    "negative-size": (first("images", width=-4), ("images[0]",)),
    "no-file-name": (lambda content: content["images"][0].pop("file_name"), ("images[0]", "file_name")),
    "name-above": (first("images", file_name="../../x.png"), ("images[0].file_name", "../../x.png")),
    "absolute-name": (first("images", file_name="/etc/passwd"), ("/etc/passwd: cannot be decoded",)),
    "same-id-twice": (first("images", id=1), ("images",)),
    "no-images": (lambda content: content.pop("images"), ("images",)),
    "no-image-at-all": (
        lambda content: content.update(images=[], annotations=[]),
        ("dataset.train_data_sources",),
    ),
    "id-too-large": (first("images", id=10**30), ("images[0]",)),
}


@pytest.mark.parametrize("kind", ANNOTATIONS)
def test_annotations(own_project: Path, kind: str):
    change, parts = ANNOTATIONS[kind]
    edit_json(own_project / TRAIN, change)
    # Left out and counted by default; the option makes an error of it.
    strict = ["ddetr_mm.strict_annotations=true"] if kind in ("category", "image") else []
    assert_told(run_here(own_project, "check", *SPEC, *strict), *parts)


BYTES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "binary": lambda content: b"\x89PNG\r\n\x1a\n" + content,
    "a-list": lambda content: b"[1, 2]",
    "deep": lambda content: b"[" * 100_000,
    "not-a-number": lambda content: content.replace(b'"bbox":[', b'"bbox":[NaN,', 1),
}


@pytest.mark.parametrize("kind", BYTES)
def test_annotation_file(own_project: Path, kind: str):
    path = own_project / TRAIN
    path.write_bytes(BYTES[kind](path.read_bytes()))
    assert_told(run_here(own_project, "check", *SPEC), TRAIN)


SOURCES = {
    "missing-file": ("dataset.train_data_sources.0.json_file=x.json", "x.json"),
    "pattern-without-match": ("dataset.train_data_sources.0.json_file=x*.json", "x*.json"),
    "folder-without-file": ("dataset.train_data_sources.0.json_file=data", "data"),
    "missing-image-folder": ("dataset.train_data_sources.0.image_dir=x", "image_dir"),
    "no-source": ("dataset.train_data_sources=[]", "dataset.train_data_sources"),
    "too-few-classes": ("dataset.num_classes=3", "dataset.num_classes"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_source(project: Path, tmp_path: Path, kind: str):
    override, part = SOURCES[kind]
    results = f"results_dir={tmp_path / 'results'}"
    assert_told(run_here(project, "check", *SPEC, override, results, "model.num_select=8"), part)


def png(width: int, height: int) -> bytes:
    """A valid black PNG of one bit a pixel; large ones are small files."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    packer = zlib.compressobj(9)
    row = b"\0" * (width // 8 + 1 + (width % 8 > 0))
    pixels = b"".join([packer.compress(row) for _ in range(height)] + [packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_that_claims(width: int, height: int) -> bytes:
    """A small JPEG whose header says another size."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    content = bytearray(file.getvalue())
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(content)


IMAGES = {
    "empty": (lambda: b"", "cannot be decoded"),
    "text": (lambda: b"no image\n", "cannot be decoded"),
    "cut-png": (lambda: png(40, 40)[:30], "cannot be decoded"),
    "png-bomb": (lambda: png(30_000, 30_000), "30000 x 30000 pixels, more than the 178,956,970"),
    "jpeg-bomb": (lambda: jpeg_that_claims(65_000, 65_000), "65000 x 65000 pixels"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_image_in_inference(own_project: Path, kind: str):
    content, part = IMAGES[kind]
    (own_project / "data/val/images/00000.png").write_bytes(content())
    ended = run_here(
        own_project, "inference", *SPEC, "inference.checkpoint=random.onnx", "ddetr_mm.strict_images=true"
    )
    assert_told(ended, "data/val/images/00000.png", part)


@pytest.mark.parametrize("graph", ["random.onnx", "random.pth"])
def test_inference_skips_what_is_no_image_and_counts_it(own_project: Path, graph: str):
    """What macOS leaves in folders, a folder and a pipe with the name of an image, and unreadable images."""
    folder = own_project / "data/val/images"
    sound = sorted(path.stem for path in folder.iterdir())
    for kind, (content, _) in IMAGES.items():
        (folder / f"bad-{kind}.{(kind[:3] == 'jpe' and 'jpg') or 'png'}").write_bytes(content())
    (folder / "._00000.png").write_bytes(b"\0\5\x16\7")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    run = ("inference", *SPEC, f"inference.checkpoint={graph}")
    ended = run_here(own_project, *run)
    assert ended.status == 0, ended.message
    skipped = {"._00000.png", ".DS_Store", "folder.png", "pipe.png", "bad-jpeg-bomb.jpg"}
    skipped |= {f"bad-{kind}.png" for kind in IMAGES if kind != "jpeg-bomb"}
    results = own_project / "results/inference"
    assert sorted(path.stem for path in (results / "labels").iterdir()) == sound
    assert sorted(path.stem for path in (results / "images_annotated").iterdir()) == sound
    listed = json.loads((results / "skipped.json").read_text())
    assert {Path(entry["file"]).name for entry in listed} == skipped and all(e["reason"] for e in listed)
    lines = [json.loads(line) for line in (results / "status.json").read_text().splitlines()]
    assert [line["skipped"] for line in lines if "skipped" in line] == [len(skipped)]
    assert lines[-1]["status"] == "SUCCESS"
    assert f"{len(skipped)} files were skipped" in ended.message and "pipe.png" in ended.message
    strict = run_here(own_project, *run, "ddetr_mm.strict_images=true")
    assert strict.status == 2 and "folder.png" in strict.message and "DS_Store" not in strict.message


def test_inference_without_any_readable_image(own_project: Path):
    folder = own_project / "none"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no image")
    where = "dataset.infer_data_sources.image_dir"
    ended = run_here(own_project, "inference", *SPEC, "inference.checkpoint=random.onnx", f"{where}=none")
    assert ended.status == 2 and "none of 1 images can be read" in ended.message and where in ended.message


def test_images_of_one_name_get_results_of_their_own(own_project: Path):
    for number, name in enumerate(("cam1/a.png", "cam1/a.bmp", "cam1/b.png", "cam2/a.png")):
        (own_project / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((40, 50, 3), 40 * number, np.uint8)).save(own_project / name)
    where = "dataset.infer_data_sources.image_dir=[cam1,cam2]"
    ended = run_here(own_project, "inference", *SPEC, "inference.checkpoint=random.onnx", where)
    assert ended.status == 0, ended.message
    results = own_project / "results/inference"
    assert {path.name for path in (results / "labels").iterdir()} == {
        *("cam1_a.txt", "cam2_a.txt", "a.txt", "b.txt")
    }
    shown = {path.name: Image.open(path).getpixel((45, 35)) for path in results.glob("images_annotated/*")}
    assert shown == {
        "cam1_a.png": (0, 0, 0),
        "a.bmp": (40, 40, 40),
        "b.png": (80, 80, 80),
        "cam2_a.png": (120, 120, 120),
    }


@pytest.mark.parametrize(("kind", "workers"), [("missing", 2), ("png-bomb", 0)])
def test_image_in_training(own_project: Path, kind: str, workers: int):
    path = own_project / IMAGE
    path.unlink()
    if kind != "missing":
        path.write_bytes(IMAGES[kind][0]())
    ended = run_here(own_project, "train", *SPEC, f"dataset.workers={workers}")
    assert_told(ended, IMAGE)
    lines = (own_project / "results/train/status.json").read_text().splitlines()
    assert '"FAILURE"' in lines[-1] and IMAGE in lines[-1]


def test_image_of_absurd_size_in_evaluation_and_export(own_project: Path):
    (own_project / "data/val/images/00001.png").write_bytes(png(30_000, 30_000))
    ended = run_here(own_project, "evaluate", *SPEC, "evaluate.checkpoint=random.onnx")
    assert_told(ended, "data/val/images/00001.png", "30000 x 30000")
    ended = run_here(own_project, "export", *SPEC, "export.checkpoint=random.pth", "export.onnx_file=x.onnx")
    assert_told(ended, "data/val/images/00001.png", "30000 x 30000", "178,956,970")


def test_image_of_absurd_size_in_a_conversion_is_left_out_and_listed(own_project: Path):
    (own_project / "data/val/images/00001.png").write_bytes(png(30_000, 30_000))
    ended = run_here(own_project, "convert", "-e", "convert.yaml", "results_dir=new_coco")
    assert ended.status == 0 and "left out" in ended.message
    assert "30000 x 30000" in (own_project / "new_coco/warnings.json").read_text()
    ended = run_here(
        own_project, "convert", "-e", "convert.yaml", "results_dir=strict_coco", "ddetr_mm.strict=true"
    )
    assert_told(ended, "00001.png")


INFERENCE = {
    "missing-folder": ("dataset.infer_data_sources.image_dir=x", "x: image folder does not exist"),
    "folder-without-images": ("dataset.infer_data_sources.image_dir=coco", "no image was found"),
    "missing-class-names": (
        "dataset.infer_data_sources.classmap=x.txt",
        "dataset.infer_data_sources.classmap",
    ),
    "class-names-not-text": ("dataset.infer_data_sources.classmap=random.pth", "random.pth"),
    "no-colour": ("inference.color_map={star: purpleish}", "inference.color_map.star"),
}


@pytest.mark.parametrize("kind", INFERENCE)
def test_inference(project: Path, tmp_path: Path, kind: str):
    override, part = INFERENCE[kind]
    results = f"results_dir={tmp_path / 'results'}"
    ended = run_here(project, "inference", *SPEC, "inference.checkpoint=random.onnx", override, results)
    assert_told(ended, part)


CONVERSION = {
    "missing-list": ("input_source=x.txt", "x.txt"),
    "missing-mapping": ("mapping_path=x.json", "x.json"),
    "mapping-not-json": ("mapping_path=spec.yaml", "spec.yaml"),
    "missing-data-root": ("data_root=nowhere", "sequences.txt"),
    "no-shard": ("num_shards=0", "num_shards"),
    "list-of-nothing": ("input_source=empty.txt", "empty.txt"),
    "folder-names-that-lead-out": ("image_dir_name=../..", "image_dir_name"),
}


@pytest.mark.parametrize("kind", CONVERSION)
def test_conversion(own_project: Path, kind: str):
    override, part = CONVERSION[kind]
    (own_project / "empty.txt").write_text("\n")
    assert_told(run_here(own_project, "convert", "-e", "convert.yaml", override), part)
