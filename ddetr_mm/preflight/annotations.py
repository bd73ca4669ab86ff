"""Checks of annotations: boxes, classes and sizes of every split, and between splits.

:func:`quick_sections` is what ``train`` does by itself, :func:`thorough_sections` what ``check`` does before
it builds a network. Every finding is counted, and shows the first case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from ddetr_mm.classes import BY_NAME_HINT, find_names
from ddetr_mm.preflight.images import check_ages, check_doubles, check_images, check_overlap
from ddetr_mm.preflight.inputs import Split
from ddetr_mm.preflight.pictures import check_colors
from ddetr_mm.preflight.report import FAULT, Finding, Section, fault, note
from ddetr_mm.spec.schema import AugmentationConfig

QUICK_SAMPLE = 40
"""Image files of a split of which the quick part reads the header."""

QUICK_DECODED = 8
"""Image files of a split that the quick part decodes."""


def quick_sections(
    splits: Sequence[Split], num_classes: int, eval_class_ids: Sequence[int] | None
) -> Iterator[Section]:
    """Ids, boxes and a few files: well under a second.

    Args:
        splits: the data.
        num_classes: class columns of the network.
        eval_class_ids: categories that evaluation is restricted to.
    """
    for split in splits:
        yield check_split_classes(split, num_classes, eval_class_ids)
        yield check_boxes(split)
        yield check_images(split, sample=QUICK_SAMPLE, decoded=QUICK_DECODED)
    if len(splits) > 1:
        yield check_between_splits(splits)


def thorough_sections(
    splits: Sequence[Split],
    num_classes: int,
    eval_class_ids: Sequence[int] | None,
    augmentation: AugmentationConfig,
    *,
    full: bool = False,
) -> Iterator[Section]:
    """Everything that needs only annotation files and image files.

    Args:
        splits: the data.
        num_classes: class columns of the network.
        eval_class_ids: categories that evaluation is restricted to.
        augmentation: the spec's sizes, mean and standard deviation.
        full: read every image, not a sample.
    """
    sound = []
    for split in splits:
        sections = list(_sections_of(split, num_classes, eval_class_ids, augmentation, full))
        yield from sections
        if not any(finding.weight == FAULT for section in sections for finding in section.findings):
            sound.append(split)
    if len(splits) > 1:
        yield check_between_splits(splits)
        yield check_overlap(splits, full=full)
    yield check_colors(sound, augmentation.input_mean, augmentation.input_std, full=full)


def _sections_of(
    split: Split,
    num_classes: int,
    eval_class_ids: Sequence[int] | None,
    augmentation: AugmentationConfig,
    full: bool,
) -> Iterator[Section]:
    classes = check_split_classes(split, num_classes, eval_class_ids)
    classes.findings += [note("annotations", text, where=split.where) for text in split.table.notes]
    yield classes
    boxes = check_boxes(split)
    yield boxes
    if not any(finding.weight == FAULT for finding in boxes.findings):
        yield check_fit(split, augmentation)
    yield check_images(split, full=full)
    yield check_doubles(split, full=full)
    ages = check_ages(split, split.spread_rows(QUICK_SAMPLE).tolist())
    if ages.findings:
        yield ages


# --- Boxes ---
# COCO's boxes are (x, y, width, height) in pixels. Corners that are read so reach far beyond their images.

LEAST_BOXES = 5
"""Boxes that it takes to prove a wrong format."""

BEYOND_PX = 1.0
"""Boxes may reach so far beyond their image: labelling tools round."""

TINY_PX = 1.0


def check_boxes(split: Split) -> Section:
    """Everything about the boxes of one split."""
    section = Section(f"boxes of {split.name}")
    boxes = split.table.boxes_xywh
    if len(boxes) == 0:
        return section
    sides = np.sqrt(np.maximum(boxes[:, 2] * boxes[:, 3], 0))
    small, middle, large = np.percentile(sides, [5, 50, 95])
    section.lines.append(
        f"{len(boxes):,} boxes; side (root of area) of 5 % / half / 95 % below "
        f"{small:.0f} / {middle:.0f} / {large:.0f} px"
    )
    section.data["side_percentiles_px"] = [round(float(value), 2) for value in (small, middle, large)]
    ignored = int(split.table.ignored.sum())
    if ignored:
        text = f"{ignored:,} of {len(boxes):,} boxes have ignore: 1: they are neither trained nor scored"
        section.findings.append(note("boxes-ignored", text, where=split.where))
    format_faults = list(_wrong_format(split))
    section.findings += format_faults or _out_of_place(split)
    section.findings += _doubled(split)
    return section


def _wrong_format(split: Split) -> Iterator[Finding]:
    counted = np.flatnonzero(~split.table.ignored)
    boxes_xywh, sizes_wh = split.table.boxes_xywh[counted], split.box_sizes_wh[counted]
    if are_fractions(boxes_xywh, sizes_wh):
        yield fault(
            "boxes-normalised",
            f"all {len(boxes_xywh)} boxes are fractions of the image (0 to 1), the first in "
            f"{split.box_example(int(counted[0]))}",
            where=split.where,
            allowed="pixels: bbox = [x, y, width, height]",
            hint="multiply x and width by the image's width, y and height by its height",
        )
    elif are_corners(boxes_xywh, sizes_wh):
        beyond = counted[reach_beyond(boxes_xywh, sizes_wh)]
        yield fault(
            "boxes-are-corners",
            f"the boxes are corners (x1, y1, x2, y2): read as x, y, width, height {len(beyond)} of "
            f"{len(boxes_xywh)} reach beyond their image, the first in "
            f"{split.box_example(int(beyond[0]))}",
            where=split.where,
            allowed="bbox = [x, y, width, height]",
            hint="subtract: width = x2 - x1, height = y2 - y1",
        )


def are_fractions(boxes_xywh: npt.NDArray[np.float64], sizes_wh: npt.NDArray[np.float64]) -> bool:
    """Whether boxes (M, 4) lie within 0 to 1 where their images have many pixels."""
    if len(boxes_xywh) < LEAST_BOXES or (sizes_wh <= 16).any():
        return False
    return bool((np.abs(boxes_xywh) <= 1.01).all() and (boxes_xywh[:, 2:] > 0).any())


def are_corners(boxes_xywh: npt.NDArray[np.float64], sizes_wh: npt.NDArray[np.float64]) -> bool:
    """Whether boxes (M, 4) are corners.

    Read as corners, nearly every box must be ordered and inside its image; read as x, y, width, height, a
    tenth or more must reach beyond it. Correct boxes in the lower right half of their images are not ordered.
    """
    if len(boxes_xywh) < LEAST_BOXES:
        return False
    ordered = (boxes_xywh[:, 2:] > boxes_xywh[:, :2]).all(axis=1)
    inside = (boxes_xywh[:, 2:] <= sizes_wh + BEYOND_PX).all(axis=1)
    beyond = reach_beyond(boxes_xywh, sizes_wh)
    return bool((ordered & inside).mean() >= 0.98 and beyond.mean() >= 0.1)


def reach_beyond(
    boxes_xywh: npt.NDArray[np.float64], sizes_wh: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    """(M,) which boxes reach more than :data:`BEYOND_PX` beyond their images."""
    ends = boxes_xywh[:, :2] + boxes_xywh[:, 2:]
    return np.asarray(((boxes_xywh[:, :2] < -BEYOND_PX) | (ends > sizes_wh + BEYOND_PX)).any(axis=1))


def _out_of_place(split: Split) -> Iterator[Finding]:
    table = split.table
    counted = table.visible & ~table.ignored
    beyond = np.flatnonzero(reach_beyond(table.boxes_xywh, split.box_sizes_wh) & counted)
    if len(beyond):
        yield note(
            "boxes-beyond-image",
            f"{_of(beyond, split)} reach beyond their image and are clipped, the first in "
            f"{split.box_example(int(beyond[0]))}",
            where=split.where,
        )
    lost = np.flatnonzero(~table.visible & ~table.ignored)
    if len(lost):
        build = fault if len(lost) > table.num_boxes / 2 else note
        yield build(
            "boxes-outside-image",
            f"{_of(lost, split)} have no area inside their image and are not used, the first in "
            f"{split.box_example(int(lost[0]))}",
            where=split.where,
        )
    tiny = np.flatnonzero((table.boxes_xywh[:, 2:].min(axis=1) < TINY_PX) & counted)
    if len(tiny):
        yield note(
            "boxes-tiny",
            f"{_of(tiny, split)} are less than {TINY_PX:g} px wide or high, the first in "
            f"{split.box_example(int(tiny[0]))}",
            where=split.where,
        )


def _doubled(split: Split) -> Iterator[Finding]:
    table = split.table
    places = np.column_stack([split.box_rows, table.boxes_xywh])
    labelled = np.column_stack([places, table.category_ids])
    doubles = num_repeated(labelled)
    if doubles:
        yield note(
            "boxes-doubled",
            f"{doubles} boxes are in one image twice with one class",
            where=split.where,
            hint="a detection can match one of them only",
        )
    two_classes = num_repeated(places) - doubles
    if two_classes > 0:
        yield note(
            "boxes-of-two-classes",
            f"{two_classes} boxes are in one place with another class",
            where=split.where,
        )


def num_repeated(rows: npt.NDArray[np.float64]) -> int:
    """How many rows of a table (M, n) equal an earlier one.

    Sorting whole rows takes seconds for the boxes of COCO, so they are sorted by a 64-bit hash, and only rows
    with equal hashes are compared.
    """
    bits = np.ascontiguousarray(rows + 0.0).view(np.uint64)  # -0.0 becomes 0.0
    keys = np.zeros(len(rows), dtype=np.uint64)
    for column in bits.T:
        keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    order = np.argsort(keys)
    same = np.diff(keys[order]) == 0
    shared = np.zeros(len(rows), dtype=bool)
    shared[order[1:][same]] = shared[order[:-1][same]] = True
    candidates = rows[shared]
    return len(candidates) - len(np.unique(candidates, axis=0)) if len(candidates) else 0


def _of(boxes: npt.NDArray[np.int64], split: Split) -> str:
    return f"{len(boxes):,} of {split.table.num_boxes:,} boxes"


# --- Classes ---


def check_split_classes(
    split: Split, num_classes: int, eval_class_ids: Sequence[int] | None = None
) -> Section:
    """Ids of one split against the class columns.

    Args:
        split: the data.
        num_classes: class columns of the network; category ids must lie below, and above 0.
        eval_class_ids: categories that evaluation is restricted to.
    """
    section = Section(f"classes of {split.name}")
    counts = boxes_by_id(split)
    names = split.table.category_names
    section.data["boxes_by_class"] = {names[number]: counts.get(number, 0) for number in sorted(names)}
    section.findings += _ids_against_columns(split, counts, num_classes)
    if split.table.num_images == 0:
        section.findings.append(fault("no-images", "lists no image", where=split.where))
    elif not counts:
        section.findings.append(fault("no-boxes", "holds no box at all", where=split.where))
    section.findings += _without_targets(split, counts)
    section.findings += _repeated_names(split)
    if eval_class_ids and split.name != "train" and not set(eval_class_ids) & set(names):
        section.findings.append(
            fault(
                "eval-classes-absent",
                f"no category of {split.name} is among them",
                where="dataset.eval_class_ids",
                value=list(eval_class_ids),
                allowed=[f"{number} ({name})" for number, name in sorted(names.items())],
            )
        )
    empty = [name for number, name in sorted(names.items()) if number and not counts.get(number)]
    if empty and counts:
        section.findings.append(
            note("classes-without-boxes", "classes without a box: " + _listed(empty), where=split.where)
        )
    return section


def boxes_by_id(split: Split) -> dict[int, int]:
    """Category id → number of boxes, crowds included."""
    ids, counts = np.unique(split.table.category_ids, return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


def _without_targets(split: Split, counts: Mapping[int, int]) -> Iterator[Finding]:
    """Classes, or the whole split, whose boxes are all crowds or ignored: neither trained nor scored."""
    table = split.table
    for kind, flags, word, hint in (
        ("boxes-all-crowds", table.crowd, "iscrowd: 1", "set iscrowd to 0 where a box holds one object"),
        ("boxes-all-ignored", table.ignored, "ignore: 1", "set ignore to 0"),
    ):
        ids, flagged = np.unique(table.category_ids[flags], return_counts=True)
        whole = [
            number
            for number, count in zip(ids.tolist(), flagged.tolist(), strict=True)
            if counts[number] == count
        ]
        if not whole:
            continue
        names = table.category_names
        if len(whole) == len(counts):
            text = f"all {table.num_boxes:,} boxes have {word}, which is neither trained nor scored"
        else:
            each = _listed([f"{names[number]} ({counts[number]:,})" for number in whole])
            text = (
                f"all boxes of {len(whole)} classes have {word}, which is neither trained nor scored: {each}"
            )
        yield fault(kind, text, where=split.where, hint=hint)


def _repeated_names(split: Split) -> Iterator[Finding]:
    """One file under several image ids: its objects are trained as background of the other entries."""
    table = split.table
    names = map(table.file_name, range(table.num_images))
    counts = Counter(zip(table.source_indices.tolist(), names, strict=True))
    repeated = [(name, count) for (_, name), count in counts.items() if count > 1]
    if repeated:
        entries = sum(count for _, count in repeated)
        yield note(
            "file-names-repeated",
            f"{len(repeated):,} files are listed under {entries:,} image ids, the first: {repeated[0][0]} "
            f"under {repeated[0][1]}",
            where=split.where,
            hint="list a file once with all of its boxes: each entry takes the others' as background",
        )


def _ids_against_columns(split: Split, counts: dict[int, int], num_classes: int) -> Iterator[Finding]:
    names = split.table.category_names
    if counts.get(0):
        yield fault(
            "ids-from-zero",
            f"the categories are numbered from 0: {counts[0]} boxes have category id 0 "
            f"({names.get(0, '?')}), which is the background",
            where=split.where,
            hint=f"number the categories from 1, with dataset.num_classes={max(names, default=0) + 2}, or "
            + BY_NAME_HINT,
        )
    largest = max(names, default=0)
    if largest >= num_classes:
        yield fault(
            "ids-beyond-columns",
            f"category ids of {split.name} do not fit",
            where="dataset.num_classes",
            value=num_classes,
            allowed=f"the largest category id plus one: {largest + 1} or more",
            hint=f"raise dataset.num_classes, or {BY_NAME_HINT}" if largest < 100_000 else BY_NAME_HINT,
        )
    elif names and num_classes > largest + 1:
        yield note(
            "columns-unused",
            f"{num_classes - largest - 1} class columns belong to no category: the largest id is {largest}",
            where="dataset.num_classes",
            value=num_classes,
        )


def check_between_splits(splits: Sequence[Split]) -> Section:
    """Whether ids mean the same class in all splits, and whether validated classes are trained."""
    section = Section("classes between splits")
    for first, second in combinations(splits, 2):
        section.findings += _names_differ(first, second)
    if len(splits) > 1 and splits[0].name == "train":
        trained = boxes_by_id(splits[0])
        for split in splits[1:]:
            names = split.table.category_names
            missing = [names[number] for number in boxes_by_id(split) if number and not trained.get(number)]
            if missing:
                section.findings.append(
                    note(
                        "classes-never-trained",
                        "classes without a training box: " + _listed(missing),
                        where=split.where,
                    )
                )
    return section


def _names_differ(first: Split, second: Split) -> Iterator[Finding]:
    one, other = first.table.category_names, second.table.category_names
    pairs = [
        f"{number}: {one[number]!r} in {first.name}, {other[number]!r} in {second.name}"
        for number in one
        if number in other and find_names([one[number]], [other[number]]) == [None]
    ]
    numbers = list(other)
    places = find_names(list(one.values()), list(other.values()))
    moved = [
        f"{name!r}: {number} in {first.name}, {numbers[place]} in {second.name}"
        for (number, name), place in zip(one.items(), places, strict=True)
        if place is not None and numbers[place] != number
    ]
    if not pairs and not moved:
        return
    same_names = bool(moved) and len(moved) >= len(pairs)
    yield fault(
        "ids-swapped",
        ("the same classes have other ids" if same_names else "one id names two classes")
        + ": "
        + _listed(pairs or moved),
        where=f"{first.where} and {second.where}",
        hint=f"give one name one id in all files, or {BY_NAME_HINT}",
    )


def _listed(texts: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(texts[:most])
    return shown if len(texts) <= most else f"{shown} and {len(texts) - most} more"


# --- Sizes, against the resizing, cropping and padding that the spec asks for ---

SMALL_IN_NETWORK_PX = 8
"""An object of this side or less covers one cell of the finest common feature level (stride 8)."""


def check_fit(split: Split, augmentation: AugmentationConfig) -> Section:
    """Sizes of one split's images and boxes in the network."""
    section = Section(f"sizes of {split.name}")
    if split.table.num_images == 0:
        return section
    sizes_hw = split.table.sizes_hw
    short_side = augmentation.test_random_resize
    if split.name == "train":
        short_side = max(augmentation.scales)
    factors = resize_factors(sizes_hw, short_side, augmentation.random_resize_max_size)
    heights, widths = sizes_hw[:, 0], sizes_hw[:, 1]
    section.lines.append(
        f"images {widths.min()}x{heights.min()} to {widths.max()}x{heights.max()} (width x height), "
        f"aspect ratio {(widths / heights).min():.2f} to {(widths / heights).max():.2f}; "
        f"enlarged {np.median(factors):.2f} times at a short side of {short_side}"
    )
    section.data |= dict(median_enlargement=round(float(np.median(factors)), 3))
    section.findings += _enlarged(split, factors, short_side)
    section.findings += _capped(split, sizes_hw, short_side, augmentation.random_resize_max_size)
    section.findings += _small_objects(split, factors)
    if split.name == "train":
        section.findings += _crop(split, augmentation)
    return section


def resize_factors(sizes_hw: npt.NDArray[np.int32], short_side: int, longest: int) -> npt.NDArray[np.float64]:
    """(N,) enlargement of each image when its short side becomes ``short_side``, the long one capped."""
    short, long = sizes_hw.min(axis=1), sizes_hw.max(axis=1)
    return np.minimum(short_side / short, longest / long)


def largest_padded_hw(sizes_hw: npt.NDArray[np.int32], augmentation: AugmentationConfig) -> tuple[int, int]:
    """Height and width of the largest batch in training: every image at the largest scale."""
    if augmentation.fixed_random_crop:
        return augmentation.fixed_random_crop, augmentation.fixed_random_crop
    factors = resize_factors(sizes_hw, max(augmentation.scales), augmentation.random_resize_max_size)
    resized = np.ceil(sizes_hw * factors[:, None]).astype(int)
    height, width = resized.max(axis=0).tolist()
    if augmentation.fixed_padding:
        short, long = max(augmentation.scales), augmentation.random_resize_max_size
        standing = bool((sizes_hw[:, 0] > sizes_hw[:, 1]).any())
        lying = bool((sizes_hw[:, 0] <= sizes_hw[:, 1]).any())
        height, width = max(height, long if standing else short), max(width, long if lying else short)
    return height, width


def _enlarged(split: Split, factors: np.ndarray, short_side: int) -> Iterator[Finding]:
    share = float((factors > 2).mean())
    if share > 0.5:
        yield note(
            "images-enlarged",
            f"{share:.0%} of the images are enlarged more than twice: time and memory without new detail",
            where="dataset.augmentation.scales"
            if split.name == "train"
            else "dataset.augmentation.test_random_resize",
            value=short_side,
            hint=f"half of the short sides are below {np.median(split.table.sizes_hw.min(axis=1)):.0f}",
        )


def _capped(split: Split, sizes_hw: np.ndarray, short_side: int, longest: int) -> Iterator[Finding]:
    short, long = sizes_hw.min(axis=1), sizes_hw.max(axis=1)
    share = float((long * short_side / short > longest * 1.01).mean())
    if share > 0.5:
        yield note(
            "images-capped",
            f"{share:.0%} of the images of {split.name} stay smaller than short side {short_side}: "
            "their long side is capped",
            where="dataset.augmentation.random_resize_max_size",
            value=longest,
        )


def _small_objects(split: Split, factors: np.ndarray) -> Iterator[Finding]:
    if split.table.num_boxes == 0:
        return
    sides = split.table.boxes_xywh[:, 2:].min(axis=1) * factors[split.box_rows]
    share = float((sides < SMALL_IN_NETWORK_PX).mean())
    if share > 0.2:
        yield note(
            "objects-small",
            f"{share:.0%} of the boxes are less than {SMALL_IN_NETWORK_PX} px wide or high as the network "
            "sees them",
            where=split.where,
            hint="larger scales, or feature level 0 in model.return_interm_indices, help",
        )


def _crop(split: Split, augmentation: AugmentationConfig) -> Iterator[Finding]:
    if augmentation.fixed_random_crop or split.table.num_boxes == 0:
        return
    factors = resize_factors(split.table.sizes_hw, max(augmentation.train_random_resize), 10**9)
    sides = split.table.boxes_xywh[:, 2:].max(axis=1) * factors[split.box_rows]
    share = float((sides > augmentation.train_random_crop_max).mean())
    if share > 0.2:
        yield note(
            "objects-cropped",
            f"{share:.0%} of the boxes are larger than the largest random crop, and always cut by it",
            where="dataset.augmentation.train_random_crop_max",
            value=augmentation.train_random_crop_max,
        )
