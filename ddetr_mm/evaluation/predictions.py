"""Detections as a COCO result file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ddetr_mm.data.coco_table import CocoTable
from ddetr_mm.evaluation.columns import DetectionColumns
from ddetr_mm.files import written_whole


def write_predictions_json(path: str | Path, detections: DetectionColumns, table: CocoTable | None) -> Path:
    """Write detections in COCO's result format: a list of image_id, category_id, bbox (xywh), score.

    Image ids are those of the annotation files. Where several sources were read, ids may occur in more
    than one of them, so each entry also says ``source`` (position in the list of sources, from 0) and
    ``file_name``; readers of the format pass over both. Detections with non-finite numbers are left out,
    for JSON has none.

    Args:
        path: the file, written whole or not at all.
        detections: with the table's unique image ids.
        table: the sources read; None when the ids already are the original ones.
    """
    detections = detections.rows(detections.finite_rows())
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        for number, record in enumerate(_records(detections, table)):
            file.write(",\n" if number else "\n")
            file.write(json.dumps(record, ensure_ascii=False))
        file.write("\n]\n")
    return Path(path)


def _records(detections: DetectionColumns, table: CocoTable | None) -> Iterator[dict[str, Any]]:
    columns = zip(
        detections.image_ids.tolist(),
        detections.category_ids.tolist(),
        detections.boxes_xywh.tolist(),
        detections.scores.tolist(),
        strict=True,
    )
    if table is None:
        for image, category, box, score in columns:
            yield {"image_id": image, "category_id": category, "bbox": box, "score": score}
        return
    rows = dict(zip(table.image_ids.tolist(), range(table.num_images), strict=True))
    original = table.original_image_ids.tolist()
    several = bool(np.any(table.source_indices != table.source_indices[0])) if table.num_images else False
    for image, category, box, score in columns:
        row = rows[image]
        record = {"image_id": original[row], "category_id": category, "bbox": box, "score": score}
        if several:
            record |= {"source": int(table.source_indices[row]), "file_name": table.file_name(row)}
        yield record
