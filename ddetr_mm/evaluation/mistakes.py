"""Match predictions with ground truth, count errors, and find the worst images."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ddetr_mm.evaluation.coco_eval import DetectionColumns, GroundTruthColumns

# --- Which detections hit which objects at an overlap of one half: for pictures of mistakes, not for AP ---
# Legend: I images, N ground-truth boxes, D detections. Overlap is intersection over union; with a crowd region
# it is the share of the detection that lies inside, as COCO has it.

OVERLAP = 0.5
LEAST_SCORE = 0.05
"""Detections below are left out: they are many, and no threshold in use lets them through."""


@dataclass(frozen=True)
class Matching:
    """What became of every detection and every object.

    Attributes:
        truth: the ground truth.
        detections: those that were matched, with scores of :data:`LEAST_SCORE` or more.
        object_of: (D,) the row in ``truth`` of the object of its own class that a detection hit, first come
            by score; -1 for none.
        on_crowd: (D,) whether a detection that hit no object lies on a crowd region of its class.
        threshold: the score from which on detections count, where the F1 score over all classes is best;
            0.5 where nothing is hit.
        precision, recall, f1: at that threshold, over all classes, 0..1.
    """

    truth: GroundTruthColumns
    detections: DetectionColumns
    object_of: npt.NDArray[np.int64]
    on_crowd: npt.NDArray[np.bool_]
    threshold: float
    precision: float
    recall: float
    f1: float

    @property
    def counts(self) -> npt.NDArray[np.bool_]:
        """(D,) whether a detection counts: its score reaches the threshold and it lies on no crowd."""
        return (self.detections.scores >= self.threshold) & ~self.on_crowd

    @property
    def hits(self) -> npt.NDArray[np.bool_]:
        """(D,) detections that count and hit an object of their class."""
        return self.counts & (self.object_of >= 0)

    @property
    def missed(self) -> npt.NDArray[np.bool_]:
        """(N,) objects, crowds aside, that no detection that counts has hit."""
        missed = ~self.truth.iscrowd
        missed[self.object_of[self.hits]] = False
        return missed


def match(truth: GroundTruthColumns, detections: DetectionColumns) -> Matching:
    """Match by COCO's rule at one overlap: best score first, each to the free object it overlaps most."""
    rows = detections.finite_rows()
    rows[rows] = detections.scores[rows] >= LEAST_SCORE
    chosen = detections.rows(rows)
    object_of = np.full(len(chosen), -1, dtype=np.int64)
    on_crowd = np.zeros(len(chosen), dtype=bool)
    for objects, found in _by_image(truth, chosen):
        overlaps = overlap_matrix(chosen.boxes_xywh[found], truth.boxes_xywh[objects], truth.iscrowd[objects])
        same = chosen.category_ids[found][:, None] == truth.category_ids[objects][None]
        overlaps = np.where(same & (overlaps >= OVERLAP), overlaps, 0.0)
        crowd = truth.iscrowd[objects]
        free = ~crowd
        for place in np.argsort(-chosen.scores[found], kind="stable"):
            candidates = overlaps[place] * free
            best = int(candidates.argmax())
            if candidates[best] > 0:
                object_of[found[place]] = objects[best]
                free[best] = False
            elif (overlaps[place] * crowd).any():
                on_crowd[found[place]] = True
    return Matching(truth, chosen, object_of, on_crowd, *_best_threshold(truth, chosen, object_of, on_crowd))


def _by_image(
    truth: GroundTruthColumns, detections: DetectionColumns
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Rows of objects and rows of detections of every image that has both."""
    object_order = np.argsort(truth.box_image_ids, kind="stable")
    found_order = np.argsort(detections.image_ids, kind="stable")
    object_ids, found_ids = truth.box_image_ids[object_order], detections.image_ids[found_order]
    for image in np.intersect1d(object_ids, found_ids):
        objects = object_order[slice(*np.searchsorted(object_ids, [image, image + 1]))]
        found = found_order[slice(*np.searchsorted(found_ids, [image, image + 1]))]
        yield objects, found


def overlap_matrix(
    found_xywh: npt.NDArray[np.float64], objects_xywh: npt.NDArray[np.float64], crowd: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """(d, n) overlaps of detections (d, 4) with objects (n, 4), those with ``crowd`` (n,) by COCO's rule."""
    found_end, object_end = found_xywh[:, :2] + found_xywh[:, 2:], objects_xywh[:, :2] + objects_xywh[:, 2:]
    sides = np.minimum(found_end[:, None], object_end[None]) - np.maximum(
        found_xywh[:, None, :2], objects_xywh[None, :, :2]
    )
    common = np.clip(sides, 0, None).prod(axis=2)
    areas = found_xywh[:, 2:].prod(axis=1)[:, None]
    union = np.where(crowd[None], areas, areas + objects_xywh[:, 2:].prod(axis=1)[None] - common)
    return common / np.maximum(union, 1e-12)


def _best_threshold(
    truth: GroundTruthColumns,
    detections: DetectionColumns,
    object_of: npt.NDArray[np.int64],
    on_crowd: npt.NDArray[np.bool_],
) -> tuple[float, float, float, float]:
    """The threshold with the best F1 score, and precision, recall and F1 there."""
    num_objects = int((~truth.iscrowd).sum())
    counted = np.flatnonzero(~on_crowd)
    order = counted[np.argsort(-detections.scores[counted], kind="stable")]
    if not len(order) or not num_objects:
        return 0.5, 0.0, 0.0, 0.0
    hits = np.cumsum(object_of[order] >= 0)
    if not hits[-1]:
        return 0.5, 0.0, 0.0, 0.0
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + num_objects)
    # Detections of one score come through together.
    scores = detections.scores[order]
    last_of_score = np.append(scores[1:] < scores[:-1], True)
    best = int(np.where(last_of_score, f1, -1).argmax())
    return (
        float(scores[best]),
        float(hits[best] / (best + 1)),
        float(hits[best] / num_objects),
        float(f1[best]),
    )


@dataclass(frozen=True)
class Confusions:
    """Who was taken for whom at the matching's threshold.

    Attributes:
        category_ids: (K,) classes, ascending.
        counts: (K + 1, K + 1) rows are what is there, columns what was found; the last row is "nothing
            there", the last column "not found".
        confused_with: (D,) for detections that count and hit no object of their class: the row of a missed
            object of another class that they overlap; -1 for the others.
    """

    category_ids: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    confused_with: npt.NDArray[np.int64]


def confusions(matching: Matching, category_ids: npt.NDArray[np.int64]) -> Confusions:
    """Match what is left over after :func:`match` between classes, and count."""
    truth, found = matching.truth, matching.detections
    confused_with = np.full(len(found), -1, dtype=np.int64)
    wrong = np.flatnonzero(matching.counts & ~matching.hits)
    missed = np.flatnonzero(matching.missed)
    left_truth = GroundTruthColumns(
        image_ids=truth.image_ids,
        box_image_ids=truth.box_image_ids[missed],
        boxes_xywh=truth.boxes_xywh[missed],
        category_ids=truth.category_ids[missed],
        iscrowd=truth.iscrowd[missed],
        areas=truth.areas[missed],
        category_names=truth.category_names,
    )
    left_found = found.rows(wrong)
    for objects, rows in _by_image(left_truth, left_found):
        overlaps = overlap_matrix(
            left_found.boxes_xywh[rows], left_truth.boxes_xywh[objects], left_truth.iscrowd[objects]
        )
        free = np.ones(len(objects), dtype=bool)
        for place in np.argsort(-left_found.scores[rows], kind="stable"):
            candidates = np.where(overlaps[place] >= OVERLAP, overlaps[place], 0) * free
            best = int(candidates.argmax())
            if candidates[best] > 0:
                confused_with[wrong[rows[place]]] = missed[objects[best]]
                free[best] = False
    return Confusions(category_ids, _counted(matching, category_ids, confused_with), confused_with)


def _counted(
    matching: Matching, category_ids: npt.NDArray[np.int64], confused_with: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    truth, found = matching.truth, matching.detections
    size = len(category_ids)
    counts = np.zeros((size + 1, size + 1), dtype=np.int64)
    object_places = np.searchsorted(category_ids, truth.category_ids)
    found_places = np.searchsorted(category_ids, found.category_ids)
    np.add.at(counts, (found_places[matching.hits],) * 2, 1)
    confused = np.flatnonzero(confused_with >= 0)
    np.add.at(counts, (object_places[confused_with[confused]], found_places[confused]), 1)
    nothing = matching.counts & ~matching.hits & (confused_with < 0)
    np.add.at(counts[size], found_places[nothing], 1)
    missed = matching.missed
    missed[confused_with[confused]] = False
    np.add.at(counts[:, size], object_places[missed], 1)
    return counts


# --- The images with the most mistakes, drawn with what is there and what was found ---

MOST_IMAGES = 50
LONG_SIDE_PX = 640

RIGHT, MISSED, WRONG_CLASS, NOTHING_THERE = "#2ca02c", "#e377c2", "#ff7f0e", "#d62728"
"""Colours: found; not found; found as another class; found where nothing is."""


@dataclass(frozen=True)
class WorstImage:
    """One image and its mistakes at the matching's threshold.

    Attributes:
        image_id: the dataset's id.
        path: the image file, or None where it is not known.
        num_missed: objects that were not found.
        num_wrong_class: objects that were found as another class.
        num_nothing_there: detections where nothing is.
        num_right: objects that were found.
    """

    image_id: int
    path: str | None
    num_missed: int
    num_wrong_class: int
    num_nothing_there: int
    num_right: int

    @property
    def num_mistakes(self) -> int:
        """All mistakes."""
        return self.num_missed + self.num_wrong_class + self.num_nothing_there


def worst_images(
    matching: Matching, mistaken: Confusions, paths: Mapping[int, str], most: int = MOST_IMAGES
) -> list[WorstImage]:
    """The images with the most mistakes, the worst first; images without a mistake are left out.

    Args:
        matching: from :func:`ddetr_mm.evaluation.mistakes.match`.
        mistaken: from :func:`ddetr_mm.evaluation.mistakes.confusions`.
        paths: image id → file.
        most: how many at most.
    """
    truth, found = matching.truth, matching.detections
    ids = truth.image_ids
    wrong_class = mistaken.confused_with >= 0
    missed = matching.missed
    missed[mistaken.confused_with[wrong_class]] = False
    nothing = matching.counts & ~matching.hits & ~wrong_class

    def per_image(image_ids: np.ndarray) -> np.ndarray:
        known, counts = np.unique(image_ids, return_counts=True)
        total = np.zeros(len(ids), dtype=np.int64)
        total[np.searchsorted(sorted_ids, known)] = counts
        return total

    sorted_ids = np.sort(ids)
    figures = np.stack(
        [
            per_image(truth.box_image_ids[missed]),
            per_image(found.image_ids[wrong_class]),
            per_image(found.image_ids[nothing]),
            per_image(found.image_ids[matching.hits]),
        ]
    )
    mistakes = figures[:3].sum(axis=0)
    share_right = figures[3] / np.maximum(mistakes + figures[3], 1)
    order = np.lexsort((sorted_ids, share_right, -mistakes))[:most]
    return [
        WorstImage(int(sorted_ids[row]), paths.get(int(sorted_ids[row])), *figures[:, row].tolist())
        for row in order
        if mistakes[row]
    ]


def draw_worst_image(worst: WorstImage, matching: Matching, mistaken: Confusions) -> bytes | None:
    """A JPEG of an image with its objects and detections; None where its file cannot be read."""
    if worst.path is None:
        return None
    try:
        with Image.open(worst.path) as image:
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # evaluation is over: a picture less is no reason to fail
    scale = min(LONG_SIDE_PX / max(picture.size), 4.0)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    truth, found = matching.truth, matching.detections
    names = truth.category_names
    of_image = found.image_ids == worst.image_id
    missed = matching.missed & (truth.box_image_ids == worst.image_id)
    confused = mistaken.confused_with >= 0
    missed[mistaken.confused_with[confused]] = False
    for row in np.flatnonzero(matching.hits & of_image):
        _box(draw, found.boxes_xywh[row] * scale, RIGHT, "", width=1)
    for row in np.flatnonzero(missed):
        _box(draw, truth.boxes_xywh[row] * scale, MISSED, f"missed {names[int(truth.category_ids[row])]}")
    for row in np.flatnonzero(matching.counts & ~matching.hits & of_image):
        name = f"{names.get(int(found.category_ids[row]), '?')} {found.scores[row]:.2f}"
        if confused[row]:
            real = names[int(truth.category_ids[mistaken.confused_with[row]])]
            _box(draw, found.boxes_xywh[row] * scale, WRONG_CLASS, f"{name}, is {real}")
        else:
            _box(draw, found.boxes_xywh[row] * scale, NOTHING_THERE, name)
    content = io.BytesIO()
    picture.save(content, format="JPEG", quality=82)
    return content.getvalue()


def _box(draw: ImageDraw.ImageDraw, box_xywh: np.ndarray, color: str, label: str, width: int = 2) -> None:
    x1, y1 = box_xywh[:2].tolist()
    x2, y2 = (box_xywh[:2] + np.maximum(box_xywh[2:], 1)).tolist()
    draw.rectangle((x1, y1, x2, y2), outline=color, width=width)
    if not label:
        return
    label = label if len(label) <= 40 else label[:39] + "…"
    font = ImageFont.load_default(12)
    place = (max(x1, 0), max(y1 - 15, 0))
    area = draw.textbbox(place, label, font=font)
    draw.rectangle((area[0] - 1, area[1] - 1, area[2] + 1, area[3] + 1), fill=color)
    draw.text(place, label, fill="white", font=font)
