"""Inference results as files: KITTI labels and annotated images, written as the images come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.registry import METRICS
from mmengine.dist import all_gather_object
from mmengine.evaluator import BaseMetric

from ddetr_mm.errors import DataError, Problem
from ddetr_mm.runtime.results import (
    claim_targets,
    draw_detections,
    load_upright_rgb,
    palette,
    parse_color_map,
    result_files,
    save_image,
    write_kitti_labels,
)


@METRICS.register_module()
class DetectionWriter(BaseMetric):
    """Writes ``labels/<image>.txt`` and ``images_annotated/<image>`` for every image that passes by.

    It is a metric, so that the Runner's test loop drives it, on any number of ranks: each writes the files
    of its own images.

    Args:
        output_dir: the results folder.
        conf_threshold: detections with a lower score are left out.
        color_map: class name → colour; classes that are not in it are written and not drawn. Without a
            map every class is drawn in a colour of its own.
        outline_width: width of the drawn boxes in pixels.
        per_sequence: put results under the name of the folder two levels above each image
            (``<sequence>/images/x.jpg`` → ``<sequence>/labels/x.txt``).
        class_names_file: text file of class names, line 1 naming category 1; by default the names come
            from the checkpoint.

    Raises:
        DataError: when the names file or an image cannot be read, or two images would write the same file.
            A rank knows its own images only:
            :func:`~ddetr_mm.runtime.results.refuse_shared_targets` checks those of all.
        SpecError: for a colour that is none.
    """

    default_prefix = "inference"

    def __init__(
        self,
        output_dir: str,
        conf_threshold: float = 0.5,
        color_map: Mapping[str, str] | None = None,
        outline_width: int = 3,
        per_sequence: bool = False,
        class_names_file: str | None = None,
        collect_device: str = "cpu",
    ) -> None:
        super().__init__(collect_device=collect_device)
        self.output_dir = Path(output_dir)
        self.conf_threshold = conf_threshold
        self.colors = None if color_map is None else parse_color_map(color_map)
        self.outline_width = outline_width
        self.per_sequence = per_sequence
        self.named_classes = read_class_names(class_names_file) if class_names_file else None
        self._written: dict[str, str] = {}

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Write the files of a batch of images."""
        names = self._class_names()
        for sample in data_samples:
            found = sample["pred_instances"]
            scores = found["scores"].detach().cpu().numpy()
            keep = scores >= self.conf_threshold
            boxes_xyxy = found["bboxes"].detach().float().cpu().numpy()[keep]
            labels = found["labels"].detach().cpu().numpy()[keep]
            classes = [name_of(names, int(label)) for label in labels]
            self._write(Path(sample["img_path"]), boxes_xyxy, classes, scores[keep])
            self.results.append((str(sample["img_path"]), int(keep.sum())))

    def evaluate(self, size: int) -> dict[str, float]:
        """Count the images and objects of all ranks; an image that two ranks were given counts once.

        Args:
            size: number of images of the dataset; not used.
        """
        parts = all_gather_object(self.results)
        self.results = []
        metrics = self.compute_metrics([entry for part in parts for entry in part])
        return {f"{self.prefix}/{key}": value for key, value in metrics.items()}

    def compute_metrics(self, results: list[tuple[str, int]]) -> dict[str, float]:
        """How many images were seen and how many objects written."""
        by_image = dict(results)
        return {"images": float(len(by_image)), "objects": float(sum(by_image.values()))}

    def _class_names(self) -> Sequence[str]:
        """Names by label: of the file given, else of the model."""
        if self.named_classes is not None:
            return self.named_classes
        return (self.dataset_meta or {}).get("classes") or ()

    def _write(self, image: Path, boxes_xyxy: np.ndarray, classes: list[str], scores: np.ndarray) -> None:
        labels_file, picture_file = targets = result_files(self.output_dir, image, self.per_sequence)
        claim_targets(self._written, targets, image)
        write_kitti_labels(labels_file, names=classes, boxes_xyxy=boxes_xyxy, scores=scores)
        colors = palette([*self._class_names(), *classes]) if self.colors is None else self.colors
        picture = load_upright_rgb(image)
        drawn = draw_detections(
            picture,
            names=classes,
            boxes_xyxy=boxes_xyxy,
            scores=scores,
            colors=colors,
            outline_width=self.outline_width,
        )
        save_image(picture_file, drawn)


def read_class_names(path: str | Path) -> list[str]:
    """Class names by label from a text file of one name a line; label 0 is the background.

    Raises:
        DataError: when the file cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            Problem(
                f"the class names cannot be read: {error}",
                file=path,
                where="dataset.infer_data_sources.classmap",
                allowed="a text file of one class name a line; line 1 names category 1",
            )
        ) from error
    return ["background", *(line.strip() for line in lines if line.strip())]


def name_of(names: Sequence[str], label: int) -> str:
    """The name of a label, or its number where the names do not reach."""
    return names[label] if label < len(names) else f"class_{label}"
