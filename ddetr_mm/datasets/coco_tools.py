"""Whole COCO annotation files: merging, splitting, and back to KITTI labels.

Fields that these tools do not know (segmentations, licences, attributes …) are carried along.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ddetr_mm.convert.kitti import kitti_line
from ddetr_mm.convert.result_folder import ResultFolder
from ddetr_mm.datasets.coco_json import JsonColumns, parse_coco_json
from ddetr_mm.datasets.sources import CocoSource
from ddetr_mm.errors import DataError, Problem
from ddetr_mm.files import written_whole

# --- Dividing images so that every part gets like shares of every class ---
# Iterative stratification for images with several labels: the class with the fewest boxes left to divide
# goes first, each of its images to the part that misses most of that class.
# After: Sechidis, Tsoumakas, Vlahavas, "On the Stratification of Multi-Label Data", 2011.


def balanced_parts(
    image_index: NDArray[np.int64],
    class_index: NDArray[np.int64],
    num_images: int,
    fractions: Sequence[float],
    seed: int = 0,
) -> NDArray[np.int64]:
    """Divide images into parts by the boxes they hold.

    Args:
        image_index: ``(m,)`` image of each box, from 0.
        class_index: ``(m,)`` class of each box, from 0.
        num_images: images in all, those without boxes included.
        fractions: share of each part; they sum to 1.
        seed: decides between images that are equal in all that counts.

    Returns:
        ``(num_images,)``: the part of each image.
    """
    parts = np.full(num_images, -1, dtype=np.int64)
    # One row for each class that an image has: image, class, number of boxes.
    num_classes = int(class_index.max()) + 1 if len(class_index) else 0
    pairs, boxes = np.unique(image_index * max(num_classes, 1) + class_index, return_counts=True)
    images, classes = np.divmod(pairs, max(num_classes, 1))
    first_row = np.searchsorted(images, np.arange(num_images + 1))
    left = np.bincount(classes, weights=boxes, minlength=num_classes)
    share = np.asarray(fractions, dtype=np.float64)
    missing_boxes = share[:, None] * left[None, :]
    missing_images = share * num_images
    order = np.random.default_rng(seed).permutation(num_images)
    rank = np.empty(num_images, dtype=np.int64)
    rank[order] = np.arange(num_images)
    for _ in range(num_classes):
        rarest = int(np.argmin(np.where(left > 0, left, np.inf)))
        if not left[rarest] > 0:
            break
        rows = np.flatnonzero((classes == rarest) & (parts[images] < 0))
        # Images with many boxes of the class first: the later ones even out what they upset.
        for row in rows[np.lexsort((rank[images[rows]], -boxes[rows]))]:
            image = images[row]
            part = _neediest(missing_boxes[:, rarest], missing_images)
            parts[image] = part
            own = slice(first_row[image], first_row[image + 1])
            missing_boxes[part, classes[own]] -= boxes[own]
            left[classes[own]] -= boxes[own]
            missing_images[part] -= 1
    for image in order[parts[order] < 0]:
        part = int(np.argmax(missing_images))
        parts[image] = part
        missing_images[part] -= 1
    return parts


def _neediest(missing_boxes: NDArray[np.float64], missing_images: NDArray[np.float64]) -> int:
    """The part that misses most boxes; of equal ones that which misses most images."""
    candidates = np.flatnonzero(missing_boxes == missing_boxes.max())
    return int(candidates[np.argmax(missing_images[candidates])])


# --- Whole COCO annotation files: merging, splitting, and back to KITTI labels ---

Record = dict[str, Any]


def _annotation_files(inputs: Iterable[str | Path]) -> list[Path]:
    """Every file that the inputs (files, patterns, folders of shards) stand for, each once."""
    return list(dict.fromkeys(path for item in inputs for path in CocoSource("", str(item)).files()))


def _read(path: Path) -> tuple[Record, JsonColumns]:
    """A COCO file as it stands, and as checked columns.

    Raises:
        DataError: it cannot be read, is no COCO file, or refers to images or categories it does not have.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(Problem(f"cannot be read: {error.strerror}", path)) from error
    columns = parse_coco_json(content, path)
    document: Record = msgspec.json.decode(content.removeprefix(b"\xef\xbb\xbf"))
    for what, ids in (("image", columns.image_ids), ("annotation", columns.annotation_ids[columns.has_id])):
        values, counts = np.unique(ids, return_counts=True)
        if (counts > 1).any():
            raise DataError(Problem(f"{what} id is used twice", path, value=int(values[counts > 1][0])))
    known_categories = np.fromiter(columns.categories, np.int64)
    _check_known(path, "image_id", columns.annotation_image_ids, columns.image_ids)
    _check_known(path, "category_id", columns.category_ids, known_categories)
    document.setdefault("annotations", [])
    return document, columns


def _check_known(path: Path, key: str, ids: NDArray[Any], known: NDArray[Any]) -> None:
    missing = np.flatnonzero(~np.isin(ids, known))
    if len(missing):
        where = f"annotations[{missing[0]}].{key}"
        raise DataError(Problem("refers to what is not in the file", path, where, int(ids[missing[0]])))


def _write(path: Path, document: Record) -> None:
    with written_whole(path) as temporary:
        temporary.write_bytes(msgspec.json.encode(document))


@dataclass
class MergeReport:
    """What :func:`merge_coco` did.

    Attributes:
        num_files: files read.
        num_images: images written.
        num_annotations: annotations written.
        category_ids: category → id in the output.
        changed_categories: categories that got another id than they had in some file.
        num_repeated_images: images left out because their ``file_name`` was there already.
        num_repeated_annotations: annotations left out with them, as the earlier image has the same.
        kept_ids: whether images and annotations have the ids they had.
    """

    num_files: int
    num_images: int = 0
    num_annotations: int = 0
    category_ids: dict[str, int] = field(default_factory=dict)
    changed_categories: list[str] = field(default_factory=list)
    num_repeated_images: int = 0
    num_repeated_annotations: int = 0
    kept_ids: bool = True


def merge_coco(inputs: Iterable[str | Path], output: str | Path) -> MergeReport:
    """Merge COCO files into one.

    Categories are the same when their names are; one keeps the id of the first file that has it, unless
    another category has that id already. Images are the same when their ``file_name`` is: their annotations
    are united. Ids of images and annotations stay when no two files share one, and are counted from 0
    otherwise. Everything else (``info`` …) comes from the first file.

    Args:
        inputs: files, patterns or folders of shards, in this order.
        output: the file to write.

    Raises:
        DataError: a file is missing or wrong, or gives an image another size than an earlier one.
    """
    files = _annotation_files(inputs)
    merging = _Merging(MergeReport(len(files)))
    for path in files:
        merging.add(path, *_read(path))
    _write(Path(output), merging.finish())
    return merging.report


class _Merging:
    def __init__(self, report: MergeReport) -> None:
        self.report = report
        self._document: Record = {}
        self._categories: list[Record] = []
        self._images: list[Record] = []
        self._annotations: list[Record] = []
        self._image_of_name: dict[str, int] = {}  # row in _images
        self._contents: dict[int, Counter[tuple[Any, ...]]] = {}  # of images that were repeated
        self._annotations_of_image: dict[int, list[int]] = {}
        self._seen_images: set[int] = set()
        self._seen_annotations: set[int] = set()

    def add(self, path: Path, document: Record, columns: JsonColumns) -> None:
        """Take in one file."""
        self._document = self._document or document
        new_category = self._take_categories(document["categories"])
        rows: dict[int, int] = {}
        repeated: set[int] = set()
        for image in document["images"]:
            row = self._image_of_name.get(image["file_name"])
            if row is None:
                row = self._image_of_name[image["file_name"]] = len(self._images)
                self._images.append(image)
                self._note_id(image["id"], self._seen_images)
            else:
                self._check_same_size(path, image, self._images[row])
                self.report.num_repeated_images += 1
                repeated.add(image["id"])
            rows[image["id"]] = row
        before = {row: self._content(row) for row in {rows[number] for number in repeated}}
        for annotation in document["annotations"]:
            row = rows[annotation["image_id"]]
            category_id = new_category[annotation["category_id"]]
            if annotation["image_id"] in repeated and before[row][_key(annotation, category_id)] > 0:
                before[row][_key(annotation, category_id)] -= 1
                self.report.num_repeated_annotations += 1
                continue
            self._note_id(annotation.get("id"), self._seen_annotations)
            self._annotations_of_image.setdefault(row, []).append(len(self._annotations))
            self._annotations.append({**annotation, "image_id": row, "category_id": category_id})

    def finish(self) -> Record:
        """The merged document."""
        if not self.report.kept_ids:
            for number, image in enumerate(self._images):
                image["id"] = number
            for number, annotation in enumerate(self._annotations):
                annotation["id"] = number
        for annotation in self._annotations:
            annotation["image_id"] = self._images[annotation["image_id"]]["id"]
        self.report.num_images = len(self._images)
        self.report.num_annotations = len(self._annotations)
        return {
            **self._document,
            "categories": sorted(self._categories, key=lambda category: category["id"]),
            "images": self._images,
            "annotations": self._annotations,
        }

    def _take_categories(self, categories: Sequence[Record]) -> dict[int, int]:
        """Id in the file → id in the output."""
        ids = self.report.category_ids
        new_ids = {}
        for category in categories:
            name, number = category["name"], category["id"]
            if name not in ids:
                ids[name] = number if number not in ids.values() else max(ids.values()) + 1
                self._categories.append({**category, "id": ids[name]})
            if ids[name] != number and name not in self.report.changed_categories:
                self.report.changed_categories.append(name)
            new_ids[number] = ids[name]
        return new_ids

    def _note_id(self, number: int | None, seen: set[int]) -> None:
        if number is None or number in seen:
            self.report.kept_ids = False
        else:
            seen.add(number)

    def _content(self, row: int) -> Counter[tuple[Any, ...]]:
        own = (self._annotations[index] for index in self._annotations_of_image.get(row, ()))
        return Counter(_key(annotation, annotation["category_id"]) for annotation in own)

    def _check_same_size(self, path: Path, image: Record, earlier: Record) -> None:
        if (image["width"], image["height"]) != (earlier["width"], earlier["height"]):
            raise DataError(
                Problem(
                    f"image {image['file_name']!r} has another size in an earlier file",
                    path,
                    value=f"{image['width']}x{image['height']}",
                    allowed=f"{earlier['width']}x{earlier['height']}",
                )
            )


def _key(annotation: Record, category_id: int) -> tuple[Any, ...]:
    """What makes two annotations of an image the same."""
    return category_id, tuple(annotation["bbox"]), bool(annotation.get("iscrowd", 0))


@dataclass
class PartReport:
    """One part of :func:`split_coco`.

    Attributes:
        path: the file.
        num_images: images in it.
        boxes_per_category: category → number of boxes.
    """

    path: Path
    num_images: int
    boxes_per_category: dict[str, int]


def split_coco(
    file: str | Path, output_dir: str | Path, fractions: Mapping[str, float], *, seed: int = 0
) -> dict[str, PartReport]:
    """Split a COCO file into parts that have like shares of every class.

    Args:
        file: a COCO file.
        output_dir: gets ``<part>.json`` for each part; existing files of these names are replaced.
        fractions: part → share, together 1 (or 100).
        seed: decides between images that are equal in all that counts.

    Returns:
        Part → report.

    Raises:
        DataError: the file or the shares are wrong.
    """
    names, shares = _check_fractions(fractions)
    path = Path(file)
    document, columns = _read(path)
    order = np.argsort(columns.image_ids, kind="stable")
    image_index = order[np.searchsorted(columns.image_ids, columns.annotation_image_ids, sorter=order)]
    category_ids = np.fromiter(columns.categories, np.int64)
    category_order = np.argsort(category_ids)
    class_index = np.searchsorted(category_ids, columns.category_ids, sorter=category_order)
    parts = balanced_parts(image_index, class_index, len(columns.image_ids), shares, seed)
    reports = {}
    for number, name in enumerate(names):
        own = parts[image_index] == number
        part = {
            **document,
            "images": [
                image for image, chosen in zip(document["images"], parts, strict=True) if chosen == number
            ],
            "annotations": [row for row, chosen in zip(document["annotations"], own, strict=True) if chosen],
        }
        target = Path(output_dir) / f"{name}.json"
        _write(target, part)
        counts = Counter(columns.category_ids[own].tolist())
        boxes = {category: counts[number] for number, category in columns.categories.items()}
        reports[name] = PartReport(target, len(part["images"]), boxes)
    return reports


def _check_fractions(fractions: Mapping[str, float]) -> tuple[list[str], list[float]]:
    faults = [
        Problem("is no part name", value=name, allowed="letters, digits, '-', '_' and '.'")
        for name in fractions
        if not re.fullmatch(r"\w[\w.-]*", name)
    ]
    faults += [
        Problem("is no share", where=name, value=share, allowed="a number above 0")
        for name, share in fractions.items()
        if not 0 < share < float("inf")
    ]
    total = sum(fractions.values())
    if not faults and not any(abs(total - whole) <= 1e-3 * whole for whole in (1, 100)):
        faults.append(Problem("the shares do not sum to 1", value=dict(fractions), allowed="1 or 100 in all"))
    DataError.collect(faults)
    return list(fractions), [share / total for share in fractions.values()]


@dataclass
class KittiReport:
    """What :func:`coco_to_kitti` did.

    Attributes:
        num_files: label files written, one per image.
        num_lines: objects written.
        num_crowds: annotations with ``iscrowd`` among them, written as ``DontCare``.
        renamed_classes: category → class where the category has spaces, which KITTI cannot hold.
    """

    num_files: int = 0
    num_lines: int = 0
    num_crowds: int = 0
    renamed_classes: dict[str, str] = field(default_factory=dict)


def coco_to_kitti(
    inputs: Iterable[str | Path],
    output_dir: str | Path,
    *,
    image_dir_name: str = "images",
    label_dir_name: str = "labels",
) -> KittiReport:
    """Write COCO annotations as KITTI label files, one per image (an empty one for an image without boxes).

    The label of ``<folder>/<image_dir_name>/<name>.jpg`` becomes ``<folder>/<label_dir_name>/<name>.txt``,
    where ``convert`` looks for it; the label of an image in any other folder takes its place in that folder.
    The files appear all together; those of a former call are replaced.

    Args:
        inputs: COCO files, patterns or folders of shards.
        output_dir: folder to write to.
        image_dir_name: folder name to replace.
        label_dir_name: what to replace it with.

    Raises:
        DataError: a file is wrong; an image's name leads out of the folder; two images would share a label;
            the output folder cannot be written to, or holds files in the way.
    """
    report = KittiReport()
    labels: dict[str, list[str]] = {}
    image_of_label: dict[str, str] = {}
    for path in _annotation_files(inputs):
        _, columns = _read(path)
        names = _class_names(path, columns.categories, report)
        label_of_image = {}
        for image_id, file_name in zip(columns.image_ids.tolist(), columns.file_names, strict=True):
            label = _label_path(path, file_name, image_dir_name, label_dir_name)
            if image_of_label.setdefault(label, file_name) != file_name or label in labels:
                raise DataError(
                    Problem(
                        f"image {file_name!r} has the same label file as {image_of_label[label]!r}",
                        path,
                        value=label,
                        hint="merge the files first (ddetr-mm coco merge), or rename one of the images",
                    )
                )
            labels[label] = []
            label_of_image[image_id] = label
        rows = zip(
            columns.annotation_image_ids.tolist(),
            columns.category_ids.tolist(),
            columns.boxes_xywh.tolist(),
            columns.crowd.tolist(),
            strict=True,
        )
        for image_id, category_id, (left, top, width, height), crowd in rows:
            name = "DontCare" if crowd else names[category_id]
            labels[label_of_image[image_id]].append(kitti_line(name, (left, top, left + width, top + height)))
            report.num_crowds += crowd
            report.num_lines += 1
    report.num_files = len(labels)
    with ResultFolder(Path(output_dir)) as folder:
        for label, lines in labels.items():
            folder.staged(label).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        folder.commit(list(labels))
    return report


def _class_names(path: Path, categories: Mapping[int, str], report: KittiReport) -> dict[int, str]:
    names = {number: "_".join(name.split()) for number, name in categories.items()}
    if len(set(names.values())) < len(names) or "" in names.values():
        raise DataError(
            Problem(
                "two categories have the same name but for spaces, or one has none",
                path,
                value=list(names.values()),
            )
        )
    report.renamed_classes.update(
        {categories[number]: name for number, name in names.items() if categories[number] != name}
    )
    return names


def _label_path(path: Path, file_name: str, image_dir_name: str, label_dir_name: str) -> str:
    image = PurePosixPath(file_name)
    if image.is_absolute() or ".." in image.parts or not image.stem:
        raise DataError(Problem("file_name leads out of its folder", path, value=file_name))
    folder = image.parent
    if folder.name == image_dir_name:
        folder = folder.parent / label_dir_name
    return str(folder / f"{image.stem}.txt")
