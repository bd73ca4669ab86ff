"""What a subtask reads: annotated splits, other files that its spec names, folders of a conversion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ddetr_mm.datasets.coco_table import CocoTable
from ddetr_mm.datasets.sources import CocoSource, list_images, read_coco_sources
from ddetr_mm.errors import DataError, InputError, Problem
from ddetr_mm.preflight.report import FAULT, Finding, Section, fault, note
from ddetr_mm.spec import ConvertSpec, ExperimentSpec


@dataclass(frozen=True)
class Split:
    """One split of annotated data. N images, M boxes.

    Attributes:
        name: ``train``, ``val`` or ``test``.
        sources: image folders and annotation files.
        table: the annotations of all sources.
    """

    name: str
    sources: tuple[CocoSource, ...]
    table: CocoTable

    @classmethod
    def read(
        cls,
        name: str,
        sources: Sequence[Mapping[str, str]],
        storage: str = "process",
        **options: Any,
    ) -> Split:
        """Read a split's annotation files.

        Args:
            name: ``train``, ``val`` or ``test``.
            sources: ``{image_dir, json_file}`` each.
            storage: see :func:`~ddetr_mm.datasets.sources.read_coco_sources`.
            options: the same.

        Raises:
            DataError: a file is missing, unreadable or not COCO.
        """
        table = read_coco_sources(sources, storage=storage, **options)
        return cls(name, tuple(CocoSource.of(source) for source in sources), table)

    @property
    def where(self) -> str:
        """The spec key of the split, for messages."""
        return f"dataset.{self.name}_data_sources"

    @cached_property
    def box_rows(self) -> npt.NDArray[np.int64]:
        """(M,) the image row of every box."""
        return self.table.box_image_rows

    @cached_property
    def box_sizes_wh(self) -> npt.NDArray[np.float64]:
        """(M, 2) the recorded width and height of every box's image."""
        return self.table.sizes_hw[self.box_rows][:, ::-1].astype(np.float64)

    def location(self, row: int) -> str:
        """The path or URL of an image row."""
        source = self.sources[int(self.table.source_indices[row])]
        return source.image_path(self.table.file_name(row))

    def is_url(self, row: int) -> bool:
        """Whether an image is at a URL that mmengine's file backends read."""
        return "://" in self.location(row)

    def path(self, row: int) -> Path:
        """The image file of an image row."""
        return Path(self.location(row))

    def spread_rows(self, most: int | None) -> npt.NDArray[np.int64]:
        """At most ``most`` image rows, evenly spread over the split; all of them for None."""
        count = self.table.num_images
        if most is None or count <= most:
            return np.arange(count)
        return np.unique(np.linspace(0, count - 1, most).astype(np.int64))

    def box_example(self, box: int) -> str:
        """A box for messages: its image, and its numbers as in the file."""
        numbers = [round(float(value), 3) for value in self.table.boxes_xywh[box]]
        return f"{self.table.file_name(int(self.box_rows[box]))}: {numbers}"

    def counts(self) -> dict[str, object]:
        """The split's figures as plain data."""
        table = self.table
        by_class = {name: 0 for _, name in sorted(table.category_names.items())}
        for number, count in zip(*np.unique(table.category_ids, return_counts=True), strict=True):
            by_class[table.category_names[int(number)]] += int(count)
        return dict(
            num_images=table.num_images,
            num_images_without_objects=int((table.box_starts[1:] == table.box_starts[:-1]).sum()),
            num_boxes=table.num_boxes,
            num_crowds=int(table.crowd.sum()),
            num_ignored=int(table.ignored.sum()),
            num_invisible=int((~table.visible).sum()),
            boxes_by_class=by_class,
            notes=list(table.notes),
        )


def split_sources(spec: ExperimentSpec, subtask: str) -> dict[str, list[dict[str, str]]]:
    """Split name → the ``{image_dir, json_file}`` that a subtask reads."""
    dataset = spec.dataset
    by_split = {}
    if subtask == "train":
        by_split = dict(train=dataset.train_data_sources, val=dataset.val_data_sources)
    elif subtask == "evaluate" and dataset.test_data_sources:
        by_split = dict(test=[dataset.test_data_sources])
    elif subtask == "evaluate":
        by_split = dict(val=dataset.val_data_sources)
    return {
        name: [dict(image_dir=source.image_dir, json_file=source.json_file) for source in sources]
        for name, sources in by_split.items()
    }


def read_splits(
    sources_by_split: Mapping[str, Sequence[Mapping[str, str]]],
    storage: str = "process",
    **options: Any,
) -> tuple[list[Split], list[Section]]:
    """Read the annotations of all splits.

    Args:
        sources_by_split: see :func:`split_sources`.
        storage: see :func:`~ddetr_mm.datasets.sources.read_coco_sources`.
        options: the same.

    Returns:
        The splits that could be read, and a section for each that could not.
    """
    splits, failures = [], []
    for name, sources in sources_by_split.items():
        try:
            splits.append(Split.read(name, sources, storage, **options))
        except DataError as error:
            found = [Finding("annotations-unreadable", problem, FAULT) for problem in error.problems]
            failures.append(Section(f"annotations of {name}", findings=found))
    return splits, failures


def check_named_files(spec: ExperimentSpec, subtask: str) -> list[Finding]:
    """Checkpoints, ONNX files and image folders that the spec names and that cannot be used."""
    findings: list[Finding] = []
    if subtask == "inference":
        try:
            list_images(spec.dataset.infer_data_sources.image_dir)
        except DataError as error:
            findings += [Finding("file-missing", problem) for problem in error.problems]
    for key, path in named_files(spec, subtask).items():
        findings += check_named_file(key, path, spec.encryption_key)
    return findings


def named_files(spec: ExperimentSpec, subtask: str) -> dict[str, str]:
    """Spec key → the file or folder of weights that it names, where it names one."""
    keys = {
        "train": ("pretrained_model_path", "resume_training_checkpoint_path"),
        "gen_trt_engine": ("onnx_file",),
        "quantize": ("model_path",),
    }.get(subtask, ("checkpoint",))
    paths = {f"{subtask}.{key}": getattr(getattr(spec, subtask), key) for key in keys}
    if subtask == "train" and not spec.train.pretrained_model_path:
        paths["model.pretrained_backbone_path"] = spec.model.pretrained_backbone_path
    return {key: path for key, path in paths.items() if path}


def check_named_file(key: str, path: str, encryption_key: str | None) -> Iterator[Finding]:
    """Whether a file of weights is there and can be opened with the key.

    Args:
        key: the spec key that names it.
        path: a file or folder; shown as written, also where it is a URL.
        encryption_key: the spec's.
    """
    if "://" in path:
        yield fault("file-is-url", "is a URL", file=path, where=key, hint="download it, and name the file")
        return
    place = Path(path).expanduser()
    if not place.exists():
        yield fault("file-missing", "does not exist", file=path, where=key, hint="correct the path")
    elif place.is_file() and place.stat().st_size == 0:
        yield fault("file-empty", "is empty (0 bytes)", file=path, where=key, hint="write or copy it again")
    elif place.is_file():
        from ddetr_mm.weights.encryption import require_key

        try:
            require_key(place, encryption_key)
        except InputError as error:
            for problem in error.problems:
                where = key if problem.where is None else f"{key}, {problem.where}"
                yield Finding("file-key", replace(problem, file=path, where=where))


def check_frozen(spec: ExperimentSpec) -> list[Finding]:
    """Parts that are frozen although no weights are loaded: they stay at random values for the whole run."""
    if spec.model.pretrained_backbone_path or spec.train.pretrained_model_path:
        return []
    if spec.train.resume_training_checkpoint_path:
        return []
    frozen = [f"{name} (train.freeze)" for name in spec.train.freeze or ()]
    frozen += _frozen_in_backbone(spec)
    if not frozen:
        return []
    return [
        note(
            "frozen-at-random",
            f"no pretrained weights are given, so these parts stay at random values: {', '.join(frozen)}",
            where="model.pretrained_backbone_path",
            hint="name weights there (torchvision's of a ResNet-50: `python -c \"import torchvision; "
            "torchvision.models.resnet50(weights='DEFAULT')\"` prints where), or a detector in "
            "train.pretrained_model_path",
        )
    ]


def _frozen_in_backbone(spec: ExperimentSpec) -> list[str]:
    own = spec.ddetr_mm.backbone
    if own is not None and (own.get("init_cfg") or {}).get("type") == "Pretrained":
        return []
    if not spec.model.train_backbone:
        return ["the backbone (model.train_backbone: false)"]
    if own is None:
        # As in the translated config: TAO never trains these parts of a ResNet.
        resnet = spec.model.backbone.startswith("resnet")
        return ["the stem, the first stage and all batch norms of the ResNet"] if resnet else []
    stages = own.get("frozen_stages", -1)
    return (
        [f"the stem and the first {stages} stages (ddetr_mm.backbone.frozen_stages)"] if stages >= 0 else []
    )


def check_conversion(spec: ConvertSpec) -> list[Problem]:
    """The list of sequence folders, and the folders in it, that do not exist."""
    listing = Path(spec.input_source)
    if not listing.is_file():
        hint = "list one sequence folder a line"
        return [Problem("does not exist", file=listing, where="input_source", hint=hint)]
    root = Path(spec.data_root or "")
    lines = enumerate(listing.read_text(encoding="utf-8").splitlines(), start=1)
    return [
        Problem(
            "sequence folder does not exist",
            file=listing,
            where=f"line {number}",
            value=str(root / line.strip()),
        )
        for number, line in lines
        if line.strip() and not (root / line.strip()).is_dir()
    ]
