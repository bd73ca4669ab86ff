"""Drawings of detections, KITTI label files, the metric that writes both, and pictures of validation."""

from __future__ import annotations

import colorsys
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.registry import HOOKS, METRICS
from mmengine.dist import all_gather_object
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from PIL import Image, ImageColor, ImageDraw

from ddetr_mm.classes import Columns, named_columns, read_class_map, require_same_names
from ddetr_mm.convert.kitti import kitti_line
from ddetr_mm.datasets.images import read_image
from ddetr_mm.datasets.sources import SkippedFile, list_images
from ddetr_mm.engine.distributed import is_first_rank
from ddetr_mm.errors import DataError, Problem, SpecError
from ddetr_mm.files import write_text_whole, written_whole
from ddetr_mm.fonts import Font, label_font

# --- Label files ---
LABELS_FOLDER = "labels"
IMAGES_FOLDER = "images_annotated"

Color = tuple[int, int, int]


def write_kitti_labels(
    path: str | os.PathLike[str],
    names: Sequence[str],
    boxes_xyxy: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Write the detections of one image, in the 16 columns of :func:`ddetr_mm.convert.kitti.kitti_line`.

    Args:
        path: the file.
        names: (n,) class name of each detection.
        boxes_xyxy: (n, 4) pixels of the original image.
        scores: (n,).
    """
    lines = [kitti_line(name, box, score) for name, box, score in zip(names, boxes_xyxy, scores, strict=True)]
    write_text_whole(Path(path), "".join(f"{line}\n" for line in lines))


def parse_color_map(color_map: Mapping[str, str]) -> dict[str, Color]:
    """Colours by class name, from names such as ``green``, ``#00ff00`` or ``rgb(0,255,0)``.

    Raises:
        SpecError: colours that are not known, all at once.
    """
    colors: dict[str, Color] = {}
    problems = []
    for name, text in color_map.items():
        try:
            colors[name] = ImageColor.getrgb(str(text))[:3]
        except ValueError:
            allowed = "an HTML colour name, #rrggbb or rgb(r,g,b)"
            problems.append(
                Problem("is not a colour", where=f"inference.color_map.{name}", value=text, allowed=allowed)
            )
    SpecError.collect(problems)
    return colors


def palette(names: Sequence[str]) -> dict[str, Color]:
    """A colour for every class: hues far apart, the same for the same list of names."""
    golden_ratio = 0.618033988749895
    colors = {}
    for number, name in enumerate(dict.fromkeys(names)):
        hue = number * golden_ratio % 1
        value = (1.0, 0.75)[number // 12 % 2]
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
        colors[name] = (round(red * 255), round(green * 255), round(blue * 255))
    return colors


def line_width_px(size_wh: tuple[int, int]) -> int:
    """Width of the boxes on a picture: 2 pixels on one of 640 x 480, 9 on one of 3840 x 2160."""
    return max(1, round(min(size_wh) / 240))


def letter_size_px(size_wh: tuple[int, int]) -> int:
    """Height of the letters on a picture: 12 pixels on one of 640 x 480, 54 on one of 3840 x 2160."""
    return max(10, round(min(size_wh) / 40))


def draw_detections(
    image: Image.Image | np.ndarray,
    boxes_xyxy: np.ndarray,
    names: Sequence[str],
    scores: np.ndarray | None,
    colors: Mapping[str, Color],
    outline_width: int | None = None,
    show_labels: bool = True,
) -> Image.Image:
    """Draw boxes with class and score on a copy of an image; better ones over worse ones.

    Labels lie over all boxes, never over one another nor outside the picture, see :func:`place_labels`; one
    for which there is no room is left out, and one longer than half the picture is cut short. Names are drawn
    in a font that has their letters, see :func:`ddetr_mm.fonts.label_font`.

    Args:
        image: RGB, (h, w, 3) uint8 when an array.
        boxes_xyxy: (n, 4) pixels of this image.
        names: (n,) class name of each detection.
        scores: (n,); None for ground truth, whose labels have no number.
        colors: colour by class name; classes without one are not drawn.
        outline_width: pixels; None: by the picture's size, see :func:`line_width_px`.
        show_labels: draw classes and scores too.
    """
    drawn = (Image.fromarray(image) if isinstance(image, np.ndarray) else image).convert("RGB").copy()
    canvas = ImageDraw.Draw(drawn)
    size, width = letter_size_px(drawn.size), outline_width or line_width_px(drawn.size)
    # A label as wide as the picture would leave no room for others.
    most_px = max(drawn.width / 2, min(100, drawn.width - 1 - 2 * _MARGIN))
    labels: list[_Label] = []
    for row in range(len(names)) if scores is None else np.argsort(np.asarray(scores), kind="stable"):
        name, box = names[row], np.asarray(boxes_xyxy[row], dtype=float)
        if name not in colors or not np.isfinite(box).all():
            continue
        x1, y1, x2, y2 = box
        corners = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        canvas.rectangle(corners, outline=colors[name], width=width)
        font, shown = label_font(name, size)
        number = "" if scores is None else f" {scores[row]:.2f}"
        shown = _fitting(shown, number, font, most_px)
        labels.append(_Label(f"{shown}{number}", corners, colors[name], font))
    if show_labels:
        labels.reverse()  # the best ones choose first
        extents = [canvas.textbbox((0, 0), label.text, font=label.font) for label in labels]
        sizes_wh = [
            (right - left + 2 * _MARGIN, bottom - top + 2 * _MARGIN) for left, top, right, bottom in extents
        ]
        places = place_labels(drawn.size, [label.corners for label in labels], sizes_wh)
        for label, extent, place in zip(labels, extents, places, strict=True):
            if place is not None:
                _draw_label(canvas, label, extent, place)
    return drawn


_MARGIN = 2
"""Pixels of a label around its text."""


def _fitting(name: str, number: str, font: Font, most_px: float) -> str:
    """A name that fits into a width together with its number: cut short where it must be."""
    kept, shown = len(name), name
    while kept > 1 and font.getlength(f"{shown}{number}") > most_px:
        kept -= 1 + kept // 8
        shown = name[:kept] + "…"
    return shown


Rectangle = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels."""


@dataclass(frozen=True)
class _Label:
    text: str
    corners: Rectangle
    color: Color
    font: Font


_LABEL_ROWS = 3
"""How many heights of a label it may be away from its box."""


def place_labels(
    size_wh: tuple[int, int], boxes_xyxy: Sequence[Rectangle], sizes_wh: Sequence[tuple[float, float]]
) -> list[Rectangle | None]:
    """Find a place for the label of every box: above it, inside its top, below it, or a little further away.

    Args:
        size_wh: of the picture, pixels.
        boxes_xyxy: the boxes, those that choose first in front.
        sizes_wh: width and height of each label.

    Returns:
        A rectangle inside the picture for each label, none over another; None where there is no room.
    """
    placed: list[Rectangle | None] = []
    for (x1, y1, x2, y2), (width, height) in zip(boxes_xyxy, sizes_wh, strict=True):
        rows = [y1 - height, y1, y2, y2 - height]
        rows += [y1 - height * step for step in range(2, _LABEL_ROWS + 2)]
        rows += [y2 + height * step for step in range(1, _LABEL_ROWS + 1)]
        limit_x, limit_y = size_wh[0] - 1 - width, size_wh[1] - 1 - height
        place: Rectangle | None = None
        for row in rows if min(limit_x, limit_y) >= 0 else ():
            for column in (x1, x2 - width):
                x, y = min(max(column, 0), limit_x), min(max(row, 0), limit_y)
                candidate = (x, y, x + width, y + height)
                if not any(other is not None and _overlap(candidate, other) for other in placed):
                    place = candidate
                    break
            if place is not None:
                break
        placed.append(place)
    return placed


def _overlap(first: Rectangle, second: Rectangle) -> bool:
    """Return whether two rectangles share a pixel; their last pixels are drawn too."""
    return first[0] <= second[2] and second[0] <= first[2] and first[1] <= second[3] and second[1] <= first[3]


def save_image(path: str | os.PathLike[str], image: Image.Image) -> Path:
    """Save a picture under its name only when complete; the format follows the suffix.

    Raises:
        DataError: an ending that names no image format.
    """
    path = Path(path)
    if path.suffix.lower() not in Image.registered_extensions():
        raise DataError(Problem("has an ending that names no image format", file=path))
    options: dict[str, Any] = {"quality": 92} if path.suffix.lower() in (".jpg", ".jpeg") else {}
    with written_whole(path) as temporary:
        image.save(temporary, **options)
    return path


def _draw_label(
    canvas: ImageDraw.ImageDraw, label: _Label, extent: tuple[float, float, float, float], place: Rectangle
) -> None:
    """Draw a label's text on its colour, black or white by the colour's brightness."""
    color = label.color
    canvas.rectangle(place, fill=color)
    dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    corner = (place[0] + _MARGIN - extent[0], place[1] + _MARGIN - extent[1])
    canvas.text(corner, label.text, fill=(0, 0, 0) if dark else (255, 255, 255), font=label.font)


# --- Names of result files ---


@dataclass(frozen=True)
class ResultNames:
    """File names of an image's results: of its label file and of its annotated picture."""

    label: str
    picture: str

    @classmethod
    def of(cls, image: Path) -> ResultNames:
        """The names of an image whose name no other image shares."""
        return cls(f"{image.stem}.txt", image.name)


def result_names(images: Sequence[Path], per_sequence: bool = False) -> dict[Path, ResultNames]:
    """Names for the results of images that would otherwise write the same files.

    Images of one name in several folders get the names of as many folders in front as it takes to tell them
    apart (``cam1_a.png``, ``cam2_a.png``). Images that then differ in their ending only keep it in the name
    of the label file (``a.bmp.txt``, ``a.png.txt``). What still collides is numbered in the order given. All
    other images keep their names.

    Args:
        images: all images of a run.
        per_sequence: as for :func:`result_files`.

    Returns:
        The names of the images whose names differ from :meth:`ResultNames.of`.
    """
    by_folder: dict[Path, list[Path]] = {}
    for image in images:
        by_folder.setdefault(result_folder(Path(), image, per_sequence), []).append(image)
    found: dict[Path, ResultNames] = {}
    for group in by_folder.values():
        pictures = _picture_names(group)
        stems = Counter(Path(name).stem for name in pictures)
        labels = [
            f"{name}.txt" if stems[Path(name).stem] > 1 else f"{Path(name).stem}.txt" for name in pictures
        ]
        pairs = zip(group, _numbered(labels), _numbered(pictures), strict=True)
        names = {image: ResultNames(label, picture) for image, label, picture in pairs}
        found |= {image: given for image, given in names.items() if given != ResultNames.of(image)}
    return found


def _picture_names(images: Sequence[Path]) -> list[str]:
    """File names, with names of folders in front where images share one."""
    same_name: dict[str, list[Path]] = {}
    for image in images:
        same_name.setdefault(image.name, []).append(image)
    names: dict[Path, str] = {}
    for group in same_name.values():
        deepest = max(len(image.parts) for image in group)
        for depth in range(1, deepest + 1):
            parts = {image: "_".join(image.parts[-depth:]).replace("/", "") for image in group}
            if len(set(parts.values())) == len(group):
                break
        names |= parts
    return [names[image] for image in images]


def _numbered(names: Sequence[str]) -> list[str]:
    """The names, with ``_2``, ``_3`` … before the ending of those that an earlier one has."""
    taken = set(names)
    seen: set[str] = set()
    result = []
    for name in names:
        number, given = 2, name
        while given in seen or (given != name and given in taken):
            given = f"{Path(name).stem}_{number}{Path(name).suffix}"
            number += 1
        seen.add(given)
        result.append(given)
    return result


def result_folder(output_dir: Path, image: Path, per_sequence: bool) -> Path:
    """The folder of an image's results; ``per_sequence`` names it after the folder two levels above."""
    return output_dir / image.resolve().parent.parent.name if per_sequence else output_dir


def result_files(
    output_dir: Path, image: Path, per_sequence: bool, names: ResultNames | None = None
) -> tuple[Path, Path]:
    """Label file and picture file of an image.

    Args:
        output_dir: the results folder.
        image: the image.
        per_sequence: put both under the name of the folder two levels above the image.
        names: see :func:`result_names`.
    """
    folder = result_folder(output_dir, image, per_sequence)
    names = names or ResultNames.of(image)
    return folder / LABELS_FOLDER / names.label, folder / IMAGES_FOLDER / names.picture


def claim_targets(written: dict[str, str], targets: Iterable[Path], image: Path) -> None:
    """Record that ``image`` writes ``targets``, and refuse targets of another image.

    Args:
        written: the image of every target so far. Text takes a third of the memory of paths, which
            counts with millions of images.
        targets: to write now.
        image: whose targets they are.

    Raises:
        DataError: another image writes one of them.
    """
    source = str(image)
    for target in targets:
        other = written.setdefault(str(target), source)
        if other != source:
            raise DataError(
                Problem(
                    f"{other} and {image} would both write {target}",
                    where="dataset.infer_data_sources.image_dir",
                    hint="run such folders one by one, or set inference.is_internal=true",
                )
            )


# --- The metric ---

CLASSMAP_KEY = "dataset.infer_data_sources.classmap"


@METRICS.register_module()
class DetectionWriter(BaseMetric):
    """Writes ``labels/<image>.txt`` and ``images_annotated/<image>`` for every image.

    It is a metric, so that the Runner's test loop drives it, on any number of ranks: each writes the files
    of its own images.

    Args:
        output_dir: the results folder.
        folders: the image folders of the run, from which images of one name get results of different names,
            see :func:`result_names`. Without them, such images are refused.
        conf_threshold: detections with a lower score are left out.
        color_map: class name → colour; classes outside it are written and not drawn. Without a map
            every class has its own colour.
        outline_width: width of the drawn boxes in pixels; None: by the picture's size.
        per_sequence: put results under the name of the folder two levels above each image
            (``<sequence>/images/x.jpg`` → ``<sequence>/labels/x.txt``).
        class_names_file: class names, see :func:`ddetr_mm.classes.read_class_map`; by default they come from
            the checkpoint. Detections of ids that it does not name are left out and counted.

    Images that the dataset could not read are not written; :attr:`skipped` has them after the run.

    Raises:
        DataError: when the names file or an image cannot be read, the file contradicts the model's class
            names, or two images would write the same file.
        SpecError: an unknown colour.
    """

    default_prefix = "inference"

    def __init__(
        self,
        output_dir: str,
        folders: Sequence[str] | None = None,
        conf_threshold: float = 0.5,
        color_map: Mapping[str, str] | None = None,
        outline_width: int | None = None,
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
        self.class_names_file = class_names_file
        self.named_classes: tuple[str | None, ...] | None = None
        if class_names_file:
            self.named_classes = read_class_map(class_names_file, where=CLASSMAP_KEY)
        self._compared = False
        self.skipped: list[SkippedFile] = []
        self._names = result_names(list_images(folders), per_sequence) if folders else {}
        self._written: dict[str, str] = {}

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Write the files of a batch of images."""
        names = self._class_names()
        for sample in data_samples:
            if sample.get("unreadable"):
                self.results.append((str(sample["img_path"]), 0, sample["unreadable"], 0))
                continue
            found = sample["pred_instances"]
            scores = found["scores"].detach().cpu().numpy()
            keep = scores >= self.conf_threshold
            boxes_xyxy = found["bboxes"].detach().float().cpu().numpy()[keep]
            labels = found["labels"].detach().cpu().numpy()[keep]
            rows = [row for row, label in enumerate(labels) if self._is_named(int(label))]
            classes = [name_of(names, int(labels[row])) for row in rows]
            self._write(Path(sample["img_path"]), boxes_xyxy[rows], classes, scores[keep][rows])
            self.results.append((str(sample["img_path"]), len(rows), None, len(labels) - len(rows)))

    def evaluate(self, size: int) -> dict[str, float]:
        """Count the images and objects of all ranks; an image that two ranks were given counts once.

        Args:
            size: number of images of the dataset; not used.
        """
        parts = all_gather_object(self.results)
        self.results = []
        metrics = self.compute_metrics([entry for part in parts for entry in part])
        return {f"{self.prefix}/{key}": value for key, value in metrics.items()}

    def compute_metrics(self, results: list[tuple[str, int, str | None, int]]) -> dict[str, float]:
        """Number of images and objects written, of images skipped, and of objects that the file names not."""
        by_image = {image: (count, unnamed) for image, count, reason, unnamed in results if reason is None}
        unreadable = {image: reason for image, _, reason, _ in results if reason is not None}
        self.skipped = [SkippedFile(Path(image), reason) for image, reason in sorted(unreadable.items())]
        metrics = {
            "images": float(len(by_image)),
            "objects": float(sum(count for count, _ in by_image.values())),
            "skipped": float(len(unreadable)),
        }
        if self.named_classes is not None:
            metrics["unnamed"] = float(sum(unnamed for _, unnamed in by_image.values()))
        return metrics

    def _class_names(self) -> Columns:
        """Names by label: of the file given, else of the model."""
        meta = self.dataset_meta or {}
        model = meta.get("classes") or ()
        if self.named_classes is None:
            return model
        if model and not self._compared:
            known = named_columns(model, meta.get("category_ids"))
            require_same_names(self.named_classes, known, path=str(self.class_names_file), where=CLASSMAP_KEY)
            self._compared = True
        return self.named_classes

    def _is_named(self, label: int) -> bool:
        """Whether a label is written: all are, unless a file names the classes."""
        names = self.named_classes
        return names is None or (label < len(names) and names[label] is not None)

    def _write(self, image: Path, boxes_xyxy: np.ndarray, classes: list[str], scores: np.ndarray) -> None:
        names = self._names.get(image)
        labels_file, picture_file = targets = result_files(self.output_dir, image, self.per_sequence, names)
        claim_targets(self._written, targets, image)
        write_kitti_labels(labels_file, names=classes, boxes_xyxy=boxes_xyxy, scores=scores)
        known = [name for name in self._class_names() if name is not None]
        colors = palette([*known, *classes]) if self.colors is None else self.colors
        picture = read_image(image)
        drawn = draw_detections(
            picture,
            names=classes,
            boxes_xyxy=boxes_xyxy,
            scores=scores,
            colors=colors,
            outline_width=self.outline_width,
        )
        save_image(picture_file, drawn)


def name_of(names: Columns, label: int) -> str:
    """The name of a label, or ``class_<label>`` beyond the names."""
    name = names[label] if label < len(names) else None
    return f"class_{label}" if name is None else name


# --- Pictures of validation ---

PICTURE_SIDE_PX = 640
PICTURE_BACKENDS = ("TensorboardVisBackend", "WandbBackend")
PICTURE_TAG = "validation"


@HOOKS.register_module()
class ValidationPicturesHook(Hook):
    """Gives TensorBoard and Weights & Biases a few pictures of every validation: ground truth, predictions.

    They are the same images each time, spread evenly over those of the first rank, under names that do not
    change: ``validation/1 <file>``. The step is the epoch, as for the metrics.

    Args:
        pictures: how many.
        conf_threshold: predictions with lower scores are not drawn.
    """

    def __init__(self, pictures: int = 4, conf_threshold: float = 0.3) -> None:
        self.pictures = pictures
        self.conf_threshold = conf_threshold
        self._wanted: dict[int, dict[int, int]] = {}

    def before_val_epoch(self, runner: Any) -> None:
        """Choose the images by batch and place in it."""
        loader = runner.val_dataloader
        batch_size = loader.batch_size or 1
        self._wanted = {}
        if not is_first_rank():
            return
        count = len(loader.sampler)
        chosen = sorted({place * count // self.pictures for place in range(self.pictures)} if count else ())
        for number, place in enumerate(chosen, start=1):
            batch, row = divmod(place, batch_size)
            self._wanted.setdefault(batch, {})[row] = number

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        """Draw the chosen images of a batch."""
        for row, number in self._wanted.get(batch_idx, {}).items():
            if outputs is None or row >= len(outputs):
                continue
            meta = runner.val_dataloader.dataset.metainfo
            names = named_columns(meta.get("classes") or (), meta.get("category_ids"))
            picture = validation_picture(outputs[row], names, self.conf_threshold)
            tag = f"{PICTURE_TAG}/{number} {Path(outputs[row].img_path).name}"
            for backend in picture_backends(runner.visualizer):
                backend.add_image(tag, picture, step=runner.epoch)


def picture_backends(visualizer: Any) -> list[Any]:
    """The backends of a visualizer that get pictures; not W&B where it copies those of TensorBoard."""
    backends = [visualizer.get_backend(name) for name in PICTURE_BACKENDS]
    return [one for one in backends if one is not None and not getattr(one, "sync_tensorboard", False)]


def validation_picture(sample: Any, names: Columns, conf_threshold: float) -> np.ndarray:
    """An image twice: with its ground truth on the left, with its predictions on the right.

    Args:
        sample: of mmdet, with ``img_path``, ``pred_instances`` and, where the data have it, ``gt_instances``,
            in pixels of the image.
        names: class name by label.
        conf_threshold: predictions with lower scores are left out.

    Returns:
        (H, W, 3) uint8 RGB; each half at most :data:`PICTURE_SIDE_PX` wide and high.
    """
    picture = Image.fromarray(read_image(sample.img_path))
    width = picture.width
    picture.thumbnail((PICTURE_SIDE_PX, PICTURE_SIDE_PX), Image.Resampling.BILINEAR)
    scale = picture.width / width
    found, truth = sample.pred_instances, getattr(sample, "gt_instances", None)
    keep = found.scores >= conf_threshold
    sides = [
        (f"predicted, score from {conf_threshold:g}", found[keep], found.scores[keep].float().cpu().numpy())
    ]
    sides.insert(0, ("ground truth", truth, None))
    colors = palette([name for name in names if name is not None])
    halves = []
    for title, instances, scores in sides:
        boxes_xyxy, labels = np.zeros((0, 4)), []
        if instances is not None and len(instances):
            boxes = getattr(instances.bboxes, "tensor", instances.bboxes)
            boxes_xyxy = boxes.detach().float().cpu().numpy() * scale
            labels = [name_of(names, int(label)) for label in instances.labels]
        drawn = draw_detections(picture, boxes_xyxy, labels, scores, {**palette(labels), **colors})
        halves.append(_titled(drawn, title))
    gap = np.full((halves[0].shape[0], 6, 3), 255, dtype=np.uint8)
    return np.concatenate([halves[0], gap, halves[1]], axis=1)


def _titled(picture: Image.Image, title: str) -> np.ndarray:
    """A picture below a line of text."""
    height = 18
    whole = Image.new("RGB", (picture.width, picture.height + height), "white")
    whole.paste(picture, (0, height))
    font, shown = label_font(title, 12)
    ImageDraw.Draw(whole).text((3, 2), shown, fill="black", font=font)
    return np.asarray(whole)
