"""``ddetr_mm.Detector``: a checkpoint, ONNX file or engine that takes pictures and gives :class:`Result`.

Network, classes, size and normalisation come from the file (:mod:`ddetr_mm.weights.describe`), put into a
spec, so that pictures take the same way as in ``ddetr-mm inference`` with that spec.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from mmcv.transforms import Compose
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from PIL import Image, ImageOps

from ddetr_mm.classes import Columns, named_columns, read_class_map
from ddetr_mm.compat.versions import require
from ddetr_mm.datasets.images import read_image
from ddetr_mm.engine.detections import draw_detections, name_of, palette
from ddetr_mm.errors import DataError, Problem, WeightsError, printable
from ddetr_mm.models.backbones import fuse_norms
from ddetr_mm.spec.load import LoadedSpec, load_spec_text
from ddetr_mm.tasks.runner import (
    ExportedInput,
    exported_input,
    is_exported,
    look_up_channels,
    register_scope,
)
from ddetr_mm.translate import spec_config_text, to_config
from ddetr_mm.weights import Selection, fill_model, read_checkpoint, to_category_ids
from ddetr_mm.weights.checkpoint import Checkpoint, channel_values
from ddetr_mm.weights.describe import coco_columns, describe, names_classes, with_class_names
from ddetr_mm.weights.encryption import encryption_key, use_encryption_key

Picture = str | PathLike[str] | np.ndarray | Image.Image
"""A file, an RGB array (H, W, 3) uint8, or a Pillow image."""

COCO_NAMES = "coco"
NUMBERS = "numbers"
PRECISIONS = ("fp32", "fp16", "bf16")
_WHERE = "class_names"


@dataclass
class Result:
    """The detections of one picture, best first.

    Attributes:
        boxes_xyxy: (n, 4) float32, pixels of the picture.
        scores: (n,) float32, 0 to 1.
        labels: (n,) int64, category ids.
        names: the class of each detection.
        image_rgb: the picture, (H, W, 3) uint8.
        path: its file, where it came from one.
    """

    boxes_xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    image_rgb: np.ndarray = field(repr=False)
    path: Path | None = None
    colors: Mapping[str, tuple[int, int, int]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the picture, pixels."""
        height, width = self.image_rgb.shape[:2]
        return height, width

    def plot(self, *, outline_width: int | None = None, show_labels: bool = True) -> Image.Image:
        """Return a copy of the picture with boxes, classes and scores drawn on it.

        Args:
            outline_width: pixels; None: by the picture's size.
            show_labels: draw classes and scores too.
        """
        colors = {**palette(self.names), **self.colors}
        return draw_detections(
            self.image_rgb,
            self.boxes_xyxy,
            self.names,
            self.scores,
            colors,
            outline_width,
            show_labels=show_labels,
        )

    def to_supervision(self) -> Any:
        """Return ``supervision.Detections`` with the classes in ``data["class_name"]``.

        Raises:
            StackError: supervision is not installed.
        """
        return require("supervision").Detections(
            xyxy=self.boxes_xyxy.astype(np.float32),
            confidence=self.scores.astype(np.float32),
            class_id=self.labels.astype(int),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def to_coco(self, image_id: int | str = 0) -> list[dict[str, Any]]:
        """Return the detections as COCO results, ``bbox`` as x, y, width, height, with ``category_name``.

        Args:
            image_id: of the picture.
        """
        columns = (self.boxes_xyxy.tolist(), self.scores.tolist(), self.labels.tolist(), self.names)
        return [
            dict(
                image_id=image_id,
                category_id=label,
                category_name=name,
                bbox=[x1, y1, x2 - x1, y2 - y1],
                score=score,
            )
            for (x1, y1, x2, y2), score, label, name in zip(*columns, strict=True)
        ]


class Detector:
    """A network with its weights, ready for pictures.

    Example::

        from ddetr_mm import Detector

        detector = Detector("model.pth")
        result = detector("image.jpg")
        result.plot().save("annotated.jpg")

    Args:
        path: a checkpoint of any format that :func:`ddetr_mm.weights.read_checkpoint` reads, an ONNX file, or
            a TensorRT engine.
        device: ``"auto"`` (CUDA where there is a GPU), ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        conf: detections with a lower score are left out, 0 to 1.
        classes: names of the classes to keep; None: all.
        class_names: for a file that names no classes: their names in the order of the category ids from 1, a
            file of them (see :func:`ddetr_mm.classes.read_class_map`), ``"coco"``, or ``"numbers"`` for
            ``class_1``, ``class_2`` ….
        batch_size: pictures that go through the network at once.
        precision: ``"fp32"``, ``"fp16"`` (on a GPU) or ``"bf16"``.
        size: shorter and longest side that pictures are resized to, pixels; None: as the file says, else
            800 and 1333.
        warmup: batches of a grey picture to run first, so that the first picture takes no longer than others.
        entry, use_ema: which set of weights of the file, as ``ddetr_mm.checkpoint_entry`` and
            ``ddetr_mm.use_ema`` of a spec.
        encryption_key: opens an encrypted checkpoint.

    Attributes:
        names: class name by category id.
        notes: what the file does not say and what is taken instead, one line each.
        highest_score: of the kept classes in all pictures so far, whatever ``conf`` is; 0 before the first.

    Raises:
        WeightsError: the file cannot be read, holds no Deformable DETR, names no classes and
            ``class_names`` is not given, or the device is missing.
        DataError: ``classes`` or ``class_names`` contradict the file.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        device: str = "auto",
        conf: float = 0.5,
        classes: Sequence[str] | None = None,
        class_names: Sequence[str] | str | PathLike[str] | None = None,
        batch_size: int = 1,
        precision: str = "fp32",
        size: tuple[int, int] | None = None,
        warmup: int = 0,
        entry: str | None = None,
        use_ema: bool | str = "auto",
        encryption_key: str | None = None,
    ) -> None:
        check_arguments(conf=conf, batch_size=batch_size, precision=precision, size=size)
        self.path = Path(path)
        self.conf = conf
        self.batch_size = batch_size
        self.device = chosen_device(device)
        self.notes: list[str] = []
        self.highest_score = 0.0
        if not self.path.exists():
            raise WeightsError(Problem("does not exist", file=self.path, hint="give a checkpoint"))
        own = {} if precision == "fp32" else {"predict_precision": precision}
        if is_exported(self.path):
            config, names = self._exported(class_names)
            self.model = MODELS.build(config.model).eval()
        else:
            with _key(encryption_key):
                checkpoint = read_checkpoint(self.path, selection=Selection(entry, use_ema))
                checkpoint = _named(checkpoint, class_names)
                config, names = self._from_checkpoint(checkpoint, own, size)
        self.names = {label: name for label, name in enumerate(named_columns(names)) if name is not None}
        self._columns = tuple(names)
        self._kept = None if classes is None else self._ids_of(classes)
        self._colors = palette(list(self.names.values()))
        self.model.to(self.device)
        self._steps = Compose(config.test_pipeline[1:])
        for _ in range(warmup):
            self._predict([np.full((64, 64, 3), 114, np.uint8)] * batch_size)

    def __call__(self, source: Any, conf: float | None = None) -> Any:
        """Detect.

        Args:
            source: a picture (file, RGB array, Pillow image), a list or tuple of them, or a generator.
            conf: replaces the detector's threshold.

        Returns:
            A :class:`Result`; a list of them for a list; an iterator for a generator.

        Raises:
            DataError: a picture cannot be read.
        """
        if isinstance(source, (list, tuple)):
            return list(self.stream(source, conf))
        if isinstance(source, (types.GeneratorType, Iterator)):
            return self.stream(source, conf)
        return next(self.stream([source], conf))

    def stream(self, pictures: Iterable[Picture], conf: float | None = None) -> Iterator[Result]:
        """Detect in pictures one batch after another, reading no further ahead than a batch.

        Args:
            pictures: files, RGB arrays or Pillow images.
            conf: replaces the detector's threshold.
        """
        remaining = iter(pictures)
        while batch := list(islice(remaining, self.batch_size)):
            arrays = [as_rgb(picture) for picture in batch]
            found = self._predict(arrays)
            for picture, image_rgb, instances in zip(batch, arrays, found, strict=True):
                path = Path(picture) if isinstance(picture, (str, PathLike)) else None
                yield self._result(image_rgb, path, instances, self.conf if conf is None else conf)

    def _predict(self, images_rgb: Sequence[np.ndarray]) -> list[Any]:
        samples = [self._steps(_pipeline_input(image_rgb)) for image_rgb in images_rgb]
        with torch.inference_mode():
            return [sample.pred_instances for sample in self.model.test_step(pseudo_collate(samples))]

    def _result(self, image_rgb: np.ndarray, path: Path | None, instances: Any, conf: float) -> Result:
        scores = instances.scores.float().cpu().numpy()
        labels = instances.labels.cpu().numpy()
        kept = np.ones(len(labels), bool) if self._kept is None else np.isin(labels, self._kept)
        self.highest_score = max(self.highest_score, float(scores[kept].max(initial=0.0)))
        keep = kept & (scores >= conf)
        rows = np.flatnonzero(keep)
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        return Result(
            boxes_xyxy=instances.bboxes.float().cpu().numpy()[rows],
            scores=scores[rows],
            labels=labels[rows],
            names=tuple(name_of(self._columns, int(label)) for label in labels[rows]),
            image_rgb=image_rgb,
            path=path,
            colors=self._colors,
        )

    def _ids_of(self, classes: Sequence[str]) -> list[int]:
        """The category ids of class names.

        Raises:
            DataError: a class is not the model's.
        """
        if isinstance(classes, str):
            classes = [classes]
        by_name = {name.casefold(): label for label, name in self.names.items()}
        problems = []
        for name in classes:
            if name.casefold() not in by_name:
                near = get_close_matches(name.casefold(), by_name, n=1)
                problems.append(
                    Problem(
                        "is no class of the model",
                        where="classes",
                        value=name,
                        allowed=", ".join(self.names.values()) if len(self.names) <= 20 else None,
                        hint=f"did you mean {self.names[by_name[near[0]]]}?" if near else None,
                    )
                )
        DataError.collect(problems)
        return [by_name[name.casefold()] for name in classes]

    def _from_checkpoint(
        self, checkpoint: Checkpoint, own: Mapping[str, Any], size: tuple[int, int] | None
    ) -> tuple[Config, Columns]:
        found = describe(checkpoint)
        spec, assumed = found.spec, dict(found.assumed)
        if "backbone" in spec["ddetr_mm"]:
            require_known_backbone(spec["ddetr_mm"]["backbone"], checkpoint.path)
        spec["ddetr_mm"] |= own
        if size is not None:
            chosen = dict(zip(("test_random_resize", "random_resize_max_size"), size, strict=True))
            spec["dataset"]["augmentation"] |= chosen
            assumed = {key: value for key, value in assumed.items() if key.split(".")[-1] not in chosen}
        if assumed:
            shown = ", ".join(f"{key}={value}" for key, value in sorted(assumed.items()))
            self.notes.append(f"the file does not say, and these are taken: {shown}")
        columns = spec["dataset"]["num_classes"]
        names = found.class_names or tuple(f"class_{number}" for number in range(columns))
        config = _config(_loaded(spec, self.path), names, zeroed=checkpoint.meta.zero_padded_values)
        if found.two_stage:
            config.model.as_two_stage = True
        self.model = MODELS.build(config.model)
        report = fill_model(self.model, to_category_ids(checkpoint, columns), strict=True)
        self.notes += [note for note in report.notes if note not in self.notes]
        fuse_norms(self.model)
        self.model.requires_finite = True
        self.model.eval()
        return config, names

    def _exported(self, class_names: Any) -> tuple[Config, Columns]:
        """The config of an exported graph, with the names of its class columns."""
        exported = exported_input(str(self.path), where="predict")
        if exported is None or exported.signature is None:
            raise WeightsError(Problem("is no exported graph", file=self.path))
        meta = exported.signature
        columns = meta.num_classes
        names: Columns | None = exported.class_names
        if not any(name is not None for name in named_columns(names or ())):
            names = _listed_names(class_names, columns, self.path)
        columns = columns or len(names or ())
        names = tuple(names or ())
        names = tuple(name or "unknown" for name in (*names, *("unknown",) * (columns - len(names))))
        augmentation = {}
        for name in ("input_mean", "input_std"):
            values = channel_values(meta.meta.get(name))
            if values is not None:
                augmentation[name] = list(values)
        if not augmentation:
            self.notes.append("the file does not say its normalisation: ImageNet's is taken")
        queries = meta.num_queries or 300
        select = meta.meta.get("num_select")
        select = select if isinstance(select, int) and not isinstance(select, bool) and select > 0 else 100
        spec = {
            "model": {"num_queries": queries, "num_select": min(select, queries * columns)},
            "dataset": {"num_classes": columns, "augmentation": augmentation},
        }
        return _config(_loaded(spec, self.path), names, exported=exported), names


def as_rgb(picture: Picture) -> np.ndarray:
    """Return a picture as an RGB array (H, W, 3) uint8, upright.

    Raises:
        DataError: a file cannot be read, or an array has another shape or type.
    """
    if isinstance(picture, Image.Image):
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or 0 in picture.shape:
            raise DataError(
                Problem(
                    "is no picture",
                    value=f"an array {picture.shape} of {picture.dtype}",
                    allowed="(H, W, 3) RGB or (H, W) grey, uint8",
                )
            )
        grey = picture if picture.ndim == 2 else picture[:, :, 0]
        if picture.ndim == 2 or picture.shape[2] == 1:
            return np.repeat(grey[:, :, None], 3, axis=2)
        if picture.shape[2] not in (3, 4):
            raise DataError(Problem("is no picture", value=f"{picture.shape[2]} channels", allowed="1, 3, 4"))
        return np.ascontiguousarray(picture[:, :, :3])
    if not isinstance(picture, (str, PathLike)):
        allowed = "a path, an RGB array or a Pillow image"
        raise DataError(Problem("is no picture", value=type(picture).__name__, allowed=allowed))
    return read_image(picture)


def chosen_device(name: str) -> torch.device:
    """Return a device by its name; ``"auto"`` is CUDA where there is a GPU.

    Raises:
        WeightsError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = f"cuda:{name}" if name.isdecimal() else name
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    count = torch.cuda.device_count()
    if (
        device is None
        or device.type not in ("cpu", "cuda")
        or (device.type == "cuda" and (device.index or 0) >= count)
    ):
        allowed = ", ".join(["auto", "cpu", *(f"cuda:{index}" for index in range(count))])
        raise WeightsError(Problem("is no device here", where="device", value=name, allowed=allowed))
    return device


def require_known_backbone(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a backbone of a checkpoint's config that is none of mmdet's or ours.

    Raises:
        WeightsError: it is another class of the registry, or none.
    """
    known = MODELS.get(config["type"])
    module = getattr(known, "__module__", "")
    if not module.startswith(("mmdet.models.backbones", "ddetr_mm.models")):
        what = "was trained with a backbone that is none of mmdet's"
        raise WeightsError(Problem(what, file=path, value=config["type"]))


def check_arguments(
    *,
    conf: float,
    batch_size: int,
    precision: str,
    size: tuple[int, int] | None,
    name: Callable[[str], str] = str,
) -> None:
    """Check the numbers that a :class:`Detector` gets.

    Args:
        conf: 0 to 1.
        batch_size: 1 or more.
        precision: one of :data:`PRECISIONS`.
        size: shorter and longest side, pixels.
        name: from the name of an argument to what messages call it.

    Raises:
        DataError: one is out of range; all are in the message.
    """
    problems = []
    if not 0 <= conf <= 1:
        hint = f"{conf / 100:g} is {conf:g} %" if 1 < conf <= 100 else None
        problems.append(
            Problem("is out of range", where=name("conf"), value=conf, allowed="0 to 1", hint=hint)
        )
    if batch_size < 1:
        where = name("batch_size")
        problems.append(Problem("is out of range", where=where, value=batch_size, allowed="1 or more"))
    if precision not in PRECISIONS:
        problems.append(Problem("is unknown", where=name("precision"), value=precision, allowed=PRECISIONS))
    if size is not None and (len(size) != 2 or not 1 <= size[0] <= size[1]):
        allowed = "the shorter and the longest side, pixels"
        problems.append(Problem("is no size", where=name("size"), value=size, allowed=allowed))
    DataError.collect(problems)


def _named(checkpoint: Checkpoint, given: Any) -> Checkpoint:
    """Return the checkpoint with class names, its own or those given.

    Raises:
        WeightsError: it has none, and none are given.
        DataError: it has others.
    """
    if given is None or (names_classes(checkpoint.meta) and given == NUMBERS):
        if names_classes(checkpoint.meta):
            return checkpoint
        raise _nameless(checkpoint.path, checkpoint.meta.num_classes)
    if names_classes(checkpoint.meta):
        listed = [name for name in _listed(given, checkpoint.meta.num_classes) if name is not None]
        known = [name for name in named_columns(checkpoint.meta.class_names or ()) if name is not None]
        if [name.casefold() for name in listed] != [name.casefold() for name in known]:
            what = "names other classes than the file, which has its own"
            raise DataError(
                Problem(what, where=_WHERE, value=listed, allowed=", ".join(known), hint="leave it out")
            )
        return checkpoint
    return with_class_names(checkpoint, _listed(given, checkpoint.meta.num_classes))


def _listed_names(given: Any, columns: int | None, path: Path) -> Columns:
    if given is None:
        raise _nameless(path, columns)
    listed = _listed(given, columns)
    if columns is not None and len(listed) > columns:
        what = f"has {columns} class columns, background included; {len(listed) - 1} classes are named"
        raise WeightsError(Problem(what, file=path))
    return tuple("background" if not column else name for column, name in enumerate(listed))


def _listed(given: Any, columns: int | None) -> Columns:
    """Return given class names by category id, None for the background and gaps."""
    if given == COCO_NAMES:
        return coco_columns(columns or 0)
    if given == NUMBERS:
        return tuple(f"class_{number}" if number else None for number in range(columns or 0))
    if isinstance(given, (str, PathLike)):
        return read_class_map(given, where=_WHERE)
    return (None, *given)


def _nameless(path: Path, columns: int | None) -> WeightsError:
    counted = f" for {columns} class columns" if columns else ""
    return WeightsError(
        Problem(
            f"names no classes{counted}",
            file=path,
            where=_WHERE,
            hint="give their names (--class-names FILE, a line a class in the order of the ids), `coco`, or "
            "`numbers`",
        )
    )


def _loaded(spec: Mapping[str, Any], path: Path) -> LoadedSpec:
    return load_spec_text(yaml.safe_dump(dict(spec)), path, (), "inference", require_mandatory=False)


def _config(
    loaded: LoadedSpec, names: Columns, *, zeroed: bool = False, exported: ExportedInput | None = None
) -> Config:
    draft = to_config(
        loaded,
        "inference",
        zero_padded_values=zeroed,
        class_names=[name or "unknown" for name in names],
        look_up_channels=look_up_channels,
        exported=exported.translated if exported else None,
    )
    config = Config.fromstring(spec_config_text(loaded, draft, "inference"), ".py")
    register_scope(config)
    return config


def _pipeline_input(image_rgb: np.ndarray) -> dict[str, Any]:
    """What the pipeline's loading step leaves."""
    size_hw = image_rgb.shape[:2]
    image_bgr = np.ascontiguousarray(image_rgb[:, :, ::-1])
    return dict(img=image_bgr, img_shape=size_hw, ori_shape=size_hw, img_path="", img_id=0, instances=[])


@contextmanager
def _key(key: str | None) -> Iterator[None]:
    """Use a decryption key within the block."""
    before = encryption_key()
    if key is not None:
        use_encryption_key(key)
    try:
        yield
    finally:
        use_encryption_key(before)


def print_notes(detector: Detector) -> None:
    """Print a detector's notes on standard error."""
    for note in detector.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
