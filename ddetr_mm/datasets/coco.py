"""Datasets for mmdet: :class:`SerializedCocoDataset` with its labels, and :class:`ImageFolderDataset`."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from mmdet.datasets.base_det_dataset import BaseDetDataset
from mmdet.datasets.coco import CocoDataset
from mmdet.registry import DATASETS
from mmengine.logging import print_log

from ddetr_mm.classes import BACKGROUND, BY_NAME_HINT, UNKNOWN, find_names, some_of
from ddetr_mm.datasets.coco_table import CocoTable
from ddetr_mm.datasets.images import image_errors_named
from ddetr_mm.datasets.samplers import SampleIndex, sample_randomness
from ddetr_mm.datasets.sources import (
    STORAGES,
    CocoSource,
    join_location,
    list_images,
    mmdet_names,
    read_coco_sources,
)
from ddetr_mm.errors import DataError, Problem

# --- Labels of categories ---

LABEL_MODES = ("contiguous", "category_id")


@dataclass(frozen=True)
class LabelMap:
    """Labels of a dataset.

    Attributes:
        classes: class name of every label.
        category_ids: COCO category id of every label; None for labels that no category has (background
            and gaps).
        notes: for the user.
    """

    classes: tuple[str, ...]
    category_ids: tuple[int | None, ...]
    notes: tuple[str, ...] = ()

    def lookup(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Sorted category ids and the label of each, for :func:`labels_of`."""
        pairs = sorted(
            (category, label) for label, category in enumerate(self.category_ids) if category is not None
        )
        table = np.array(pairs, np.int64).reshape(-1, 2)
        return table[:, 0].copy(), table[:, 1].copy()


def labels_of(
    category_ids: npt.NDArray[np.int64], lookup: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
) -> npt.NDArray[np.int64]:
    """(M,) the label of every category id; -1 where it has none.

    Args:
        category_ids: (M,) any ids.
        lookup: from :meth:`LabelMap.lookup`.
    """
    known, labels = lookup
    if not len(known):
        return np.full(len(category_ids), -1, np.int64)
    places = np.minimum(np.searchsorted(known, category_ids), len(known) - 1)
    return np.where(known[places] == category_ids, labels[places], -1)


def build_label_map(
    table: CocoTable, label_mode: str, classes: Sequence[str] | None = None, num_classes: int | None = None
) -> LabelMap:
    """The labels of a dataset.

    Args:
        table: the annotations.
        label_mode: ``'contiguous'``: numbered from 0, in the order of ``classes``, else of the files;
            ``'category_id'``: the label is the category id, label 0 is background.
        classes: names to use: with ``'contiguous'`` label ``i`` is the category with name ``i``, wherever it
            is in the files, and other categories take no part; with ``'category_id'`` they replace the files'
            names.
        num_classes: number of labels that the model has. With ``'category_id'`` it defaults to the
            largest category id plus one.

    Raises:
        DataError: the files have none of the classes, names repeat, or annotated categories do not fit in
            ``num_classes``.
        ValueError: no such label mode.
    """
    if label_mode == "category_id":
        return _by_category_id(table, classes, num_classes)
    if label_mode == "contiguous":
        return _contiguous(table.category_names, classes, num_classes)
    raise ValueError(f"label_mode must be one of {', '.join(LABEL_MODES)}, not {label_mode!r}")


def _contiguous(names: Mapping[int, str], classes: Sequence[str] | None, num_classes: int | None) -> LabelMap:
    ids: list[int | None] = list(names)
    labels = tuple(names.values()) if classes is None else tuple(classes)
    repeated = sorted({name for name in labels if labels.count(name) > 1})
    if repeated:
        raise DataError(Problem("several classes have one name", value=repeated, hint="rename them"))
    notes = []
    if classes is not None:
        places = find_names(labels, tuple(names.values()))
        ids = [None if place is None else ids[place] for place in places]
        missing = [name for name, number in zip(labels, ids, strict=True) if number is None]
        if missing and len(missing) == len(labels) and names:
            what = "the annotation files have none of the classes"
            raise DataError(Problem(what, value=missing, allowed=sorted(set(names.values()))))
        if missing:
            notes.append(f"{len(missing)} classes are in no annotation file: {some_of(missing)}")
        found = [number for number in ids if number is not None]
        if found != [number for number in names if number in found]:
            # mmdet gives the first category of the file label 0, whatever the order of `classes`
            notes.append("labels follow the order of classes, which is not that of the annotation file")
    if num_classes is not None and len(labels) > num_classes:
        raise DataError(
            Problem(
                f"{len(labels)} classes, but num_classes is {num_classes}",
                hint=f"set num_classes to {len(labels)}",
            )
        )
    return LabelMap(labels, tuple(ids), tuple(notes))


MOST_COLUMNS = 100_000
"""Labels that are made where only the largest category id says how many there are."""


def _by_category_id(table: CocoTable, classes: Sequence[str] | None, num_classes: int | None) -> LabelMap:
    names = table.category_names
    size = num_classes if num_classes is not None else max(names, default=0) + 1
    annotated = set(np.unique(table.category_ids).tolist())
    too_large = sorted(category for category in annotated if category >= size)
    if num_classes is None and size > MOST_COLUMNS:
        too_large, size = sorted(category for category in names if category >= MOST_COLUMNS), MOST_COLUMNS
    if too_large:
        hint = BY_NAME_HINT
        if max(too_large) < MOST_COLUMNS:
            hint = f"set num_classes to the largest category id plus one ({max(too_large) + 1}), or {hint}"
        what = f"annotated category ids do not fit in num_classes {size}"
        raise DataError(Problem(what, value=_named(too_large, names), allowed=f"1 to {size - 1}", hint=hint))
    if 0 in annotated:
        what = f"category id 0 ({names.get(0)!r}) is annotated, but label 0 is the background"
        hint = f"number the categories from 1, or {BY_NAME_HINT}"
        raise DataError(Problem(what, allowed=f"1 to {size - 1}", hint=hint))
    unused = [category for category in names if category == 0 or category >= size]
    notes = (f"categories without annotations are left out: {_named(unused, names)}",) if unused else ()
    if classes is not None:
        if len(classes) != size:
            raise DataError(
                Problem(
                    f"{len(classes)} class names for {size} labels", hint="give one name a label, 0 included"
                )
            )
        shown = tuple(classes)
    else:
        fallback = {0: BACKGROUND}
        shown = tuple(names[i] if i in names and i else fallback.get(i, UNKNOWN) for i in range(size))
    ids = tuple(label if label and label in names else None for label in range(size))
    return LabelMap(shown, ids, notes)


def _named(categories: Sequence[int], names: Mapping[int, str]) -> str:
    return ", ".join(f"{category} ({names.get(category)})" for category in categories)


# --- COCO ---


@DATASETS.register_module()
class SerializedCocoDataset(BaseDetDataset):
    """Images of one or several COCO sources; annotations are columns, not Python objects.

    Replaces mmdet's ``CocoDataset``: same arguments, same samples.

    Args:
        ann_file: an annotation file, pattern or folder of shards, relative to ``data_root``. For a single
            source, as in mmdet; exclusive with ``sources``.
        sources: several ``dict(image_dir=..., json_file=...)``, both relative to ``data_root``.
        label_mode: ``'contiguous'``, labels from 0 in the order of ``metainfo['classes']``, else of the
            file's categories, or ``'category_id'``, the label is the category id and label 0 the background.
        num_classes: number of labels that the model has, for the check; with ``'category_id'`` also the
            number of class names.
        storage: ``'shared'``, parsed once a machine, into a mapped file that all ranks and workers read;
            ``'process'``, one copy a process, nothing is written.
        missing_images: ``'error'``, or ``'replace'`` in training: an image that cannot be read is
            reported, counted in :attr:`num_replaced` and another one taken.
        with_masks: keep segmentations; instances get ``mask`` (empty where there is none, which
            ``LoadAnnotations`` then ignores). None: where a step of the pipeline has ``with_mask=True``.
        strict_annotations: annotations that have to be left out (of an image or a category that is not in
            the files, or without a box) are an error; otherwise they are counted in the log.
        numbered_names: with ``'category_id'``, the ids are positions in this list of class names, counted
            from 1, instead of those of the files.
        merge_categories: take categories of one name for one class; otherwise they are refused.
        metainfo, data_root, data_prefix, filter_cfg, indices, pipeline, test_mode, lazy_init, max_refetch,
            seg_map_suffix, return_classes, caption_prompt, serialize_data: as in mmdet. Classes that
            ``metainfo`` does not name are read from the annotation files, and only where these have none
            are they COCO's 80. ``filter_cfg`` knows ``filter_empty_gt`` and ``min_size``; without it
            images without objects are kept.
        backend_args: for the images; annotation files are read from this machine.

    Differences to ``CocoDataset``: labels follow the given classes, also where the file has another order;
    boxes thinner than one pixel are kept (as in TAO) while boxes without area inside the image are dropped;
    bad files raise :class:`~ddetr_mm.errors.DataError` that names the place.

    ``metainfo`` has ``classes`` and ``category_ids`` (label to category id, None for the background and
    gaps).

    Each data info: ``img_path``, ``img_id`` (unique over all sources), ``source_id``, ``original_img_id``,
    ``height``, ``width`` (as recorded; the decoded image decides), ``seg_map_path`` (below
    ``data_prefix['seg']``, else None), ``sample_idx``
    and ``instances``, each with ``bbox`` (x1, y1, x2, y2 in pixels, unclipped), ``bbox_label`` and
    ``ignore_flag`` (1 for crowds).
    """

    _fully_initialized: bool
    METAINFO: ClassVar[dict[str, Any]] = CocoDataset.METAINFO

    def __init__(
        self,
        ann_file: str = "",
        *args: Any,
        sources: Sequence[Mapping[str, Any]] | None = None,
        label_mode: str = "contiguous",
        num_classes: int | None = None,
        storage: str = "shared",
        missing_images: str = "error",
        with_masks: bool | None = None,
        strict_annotations: bool = False,
        numbered_names: Sequence[str | None] | None = None,
        merge_categories: bool = False,
        **kwargs: Any,
    ) -> None:
        if bool(ann_file) == bool(sources):
            raise ValueError("give ann_file or sources, and not both")
        if storage not in STORAGES:
            raise ValueError(f"storage must be one of {', '.join(STORAGES)}, not {storage!r}")
        if missing_images not in ("error", "replace"):
            raise ValueError(f"missing_images must be 'error' or 'replace', not {missing_images!r}")
        check_mmdet_arguments(kwargs, with_sources=bool(sources))
        if with_masks is None:
            with_masks = wants_masks(args[6] if len(args) > 6 else kwargs.get("pipeline", ()))
        given_metainfo = args[0] if args else kwargs.get("metainfo")
        self._classes_given = "classes" in (given_metainfo or {}) or self.METAINFO is not CocoDataset.METAINFO
        self._given_sources = sources
        self.strict_annotations = strict_annotations
        self.numbered_names = None if numbered_names is None else list(numbered_names)
        self.merge_categories = merge_categories
        self.label_mode = label_mode
        self.num_classes = num_classes
        self.storage = storage
        self.missing_images = missing_images
        self.with_masks = with_masks
        self.table: CocoTable
        self._rows: npt.NDArray[np.int32] | None = None
        # in shared memory, so that workers count into one number
        self.num_replaced_shared = (
            torch.zeros((), dtype=torch.int64).share_memory_() if missing_images == "replace" else None
        )
        kwargs.setdefault("data_prefix", {"img": ""})
        super().__init__(ann_file, *args, **kwargs)

    def full_init(self) -> None:
        """Read the annotations (once), name the classes, filter, take the subset."""
        if self._fully_initialized:
            return
        self.sources = self._resolve_sources()
        with mmdet_names(self._given_sources is None):
            self.table = read_coco_sources(
                self.sources,
                annotations_required=not self.test_mode,
                with_masks=self.with_masks,
                storage=self.storage,
                strict=self.strict_annotations,
                numbered_names=self.numbered_names,
                merge_categories=self.merge_categories,
            )
        label_map = build_label_map(
            self.table,
            self.label_mode,
            self._metainfo.get("classes") if self._classes_given else None,
            self.num_classes,
        )
        self._set_labels(label_map)
        self._rows = self._filtered_rows()
        if self._indices is not None:
            self._rows = self._subset_rows(self._indices)
        # mmengine's __len__ and get_data_info would look here; both are overridden
        self.serialize_data = False
        self._fully_initialized = True

    def __len__(self) -> int:
        """Number of images after filtering."""
        if not self._fully_initialized:
            self.full_init()
        return self.table.num_images if self._rows is None else len(self._rows)

    def image_digest(self) -> str:
        """Digest of the images' ids and file names as the annotations have them, in the order of samples."""
        length = len(self)
        digest = hashlib.sha256()
        for idx in range(length):
            row = self._row(idx)
            digest.update(f"{self.table.original_id(row)}\0".encode("utf-8", "surrogatepass"))
            digest.update(self.table.file_name(row).encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()[:32]

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """The annotations of sample ``idx``, built anew from the columns; see the class.

        Raises:
            IndexError: there is no such sample.
        """
        length = len(self)
        if not -length <= idx < length:
            raise IndexError(f"sample {idx} of {length}")
        idx = int(idx + length if idx < 0 else idx)
        info = self._data_info(self._row(idx))
        info["sample_idx"] = idx
        return info

    def get_cat_ids(self, idx: int) -> list[int]:
        """Labels of the objects of sample ``idx``, for class-balancing samplers and wrappers."""
        boxes = self.table.boxes_of(self._row(idx))
        return self._usable_labels(boxes)[1].tolist()

    def get_subset_(self, indices: int | Sequence[int]) -> None:
        """Reduce this dataset to a subset, as mmengine's ``BaseDataset`` defines it.

        Args:
            indices: the first (or, negative, the last) so many samples, or the samples themselves.
        """
        self.full_init()
        self._rows = self._subset_rows(indices)

    def get_subset(self, indices: int | Sequence[int]) -> SerializedCocoDataset:
        """A new dataset with a subset of the samples; the columns are shared, not copied."""
        self.full_init()
        subset = copy.copy(self)
        subset._metainfo = self.metainfo
        subset._rows = self._subset_rows(indices)
        return subset

    def __getitem__(self, idx: int) -> Any:
        """Sample ``idx`` after the pipeline, as mmengine's ``BaseDataset`` gives it.

        Args:
            idx: a :class:`~ddetr_mm.datasets.samplers.SampleIndex` makes all randomness of the pipeline
                depend on the run's seed, the epoch and this index alone, in whichever process; with a plain
                integer it comes from the process's generators.
        """
        with sample_randomness(idx):
            sample = super().__getitem__(idx)
        return as_filler(sample) if isinstance(idx, SampleIndex) and idx.is_filler else sample

    def load_data_list(self) -> list[dict[str, Any]]:
        """Every sample's data info as a list, at the price of the memory that this class saves."""
        return [self.get_data_info(index) for index in range(len(self))]

    def prepare_data(self, idx: int) -> Any:
        """Run the pipeline on sample ``idx``.

        Returns:
            What the pipeline gives, or None where the image cannot be read and is to be replaced.

        Raises:
            DataError: the image file is missing or cannot be decoded.
        """
        info = self.get_data_info(idx)
        try:
            with image_errors_named(info["img_path"], self.backend_args):
                return self.pipeline(info)
        except DataError as error:
            if self.num_replaced_shared is None or self.test_mode:
                raise
            self.num_replaced_shared += 1
            print_log(f"{error}; another image takes its place", logger="current", level=logging.WARNING)
            return None

    @property
    def metainfo(self) -> dict[str, Any]:
        """What ``metainfo`` was given and the classes, as in mmengine.

        Tuples are not copied: the classes are one entry a label, which can be millions.
        """
        return {
            key: value if isinstance(value, tuple) else copy.deepcopy(value)
            for key, value in self._metainfo.items()
        }

    @property
    def shard_indices(self) -> npt.NDArray[np.int32]:
        """(number of samples,) which annotation file each sample comes from, for rank-wise sampling."""
        return self.table.shard_indices if self._rows is None else self.table.shard_indices[self._rows]

    @property
    def num_replaced(self) -> int:
        """How many unreadable images were replaced so far, in all workers of this process."""
        return 0 if self.num_replaced_shared is None else int(self.num_replaced_shared)

    def _resolve_sources(self) -> list[CocoSource]:
        """The sources with their paths below ``data_root``."""
        if self._given_sources is None:
            folder = self.data_prefix.get("img", self.data_prefix.get("img_path", ""))
            return [CocoSource(image_dir=folder, json_file=self.ann_file)]
        root = self.data_root or ""
        return [CocoSource.of(source).below(root) for source in self._given_sources]

    def _set_labels(self, label_map: LabelMap) -> None:
        defaults = CocoDataset.METAINFO
        if not self.table.category_names and not self._classes_given and self.label_mode == "contiguous":
            label_map = LabelMap(defaults["classes"], (None,) * len(defaults["classes"]))  # as mmdet's
        if label_map.classes != defaults["classes"] and self._metainfo.get("palette") == defaults["palette"]:
            del self._metainfo["palette"]  # of other classes, and too short for more than these
        self._metainfo["classes"] = label_map.classes
        self._metainfo["category_ids"] = label_map.category_ids
        self._lookup = label_map.lookup()
        # names that tools for mmdet's CocoDataset use
        self.cat_ids = [category for category in label_map.category_ids if category is not None]
        self.cat2label = dict(zip(*(part.tolist() for part in self._lookup), strict=True))
        for note in (*self.table.notes, *label_map.notes, *self._notes_on_masks()):
            print_log(note, logger="current", level=logging.WARNING)

    def _notes_on_masks(self) -> list[str]:
        if not self.with_masks or not self.table.num_boxes:
            return []
        without = int((np.diff(self.table.mask_starts) == 0).sum())
        if not without:
            return []
        return [f"annotations without a segmentation, ignored where masks are loaded: {without}"]

    def _filtered_rows(self) -> npt.NDArray[np.int32] | None:
        """The image rows that ``filter_cfg`` leaves; None for all."""
        settings = {} if self.test_mode or self.filter_cfg is None else self.filter_cfg
        keep = np.ones(self.table.num_images, bool)
        if settings.get("filter_empty_gt", False):
            labels = labels_of(self.table.category_ids, self._lookup)
            usable = self.table.visible & (labels >= 0)  # crowds and ignored boxes count, as in mmdet
            before = np.concatenate([[0], np.cumsum(usable)])
            keep &= before[self.table.box_starts[1:]] > before[self.table.box_starts[:-1]]
        if settings.get("min_size", 0) > 0:
            keep &= self.table.sizes_hw.min(axis=1) >= settings["min_size"]
        if not keep.any():
            what = "no image is left" if len(keep) else "there is no image"
            raise DataError(Problem(what, self.sources[0].json_file, hint="check the file and filter_cfg"))
        return None if keep.all() else np.flatnonzero(keep).astype(np.int32)

    def _subset_rows(self, indices: int | Sequence[int]) -> npt.NDArray[np.int32]:
        rows = np.arange(self.table.num_images, dtype=np.int32) if self._rows is None else self._rows
        if isinstance(indices, int):
            return rows[:indices] if indices >= 0 else rows[indices:]
        return rows[np.asarray(indices, dtype=np.int64)]

    def _row(self, idx: int) -> int:
        return idx if self._rows is None else int(self._rows[idx])

    def _usable_labels(self, boxes: slice) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Which boxes of a slice are training targets, and the labels of those."""
        labels = labels_of(self.table.category_ids[boxes], self._lookup)
        usable = self.table.visible[boxes] & ~self.table.ignored[boxes] & (labels >= 0)
        return usable, labels[usable]

    def _data_info(self, row: int) -> dict[str, Any]:
        table = self.table
        source = int(table.source_indices[row])
        height, width = table.sizes_hw[row].tolist()
        name = table.file_name(row)
        seg_folder = self.data_prefix.get("seg")
        seg_name = name.rsplit(".", 1)[0] + self.seg_map_suffix
        info: dict[str, Any] = {
            "img_path": self.sources[source].image_path(name),
            "img_id": int(table.image_ids[row]),
            "source_id": source,
            "original_img_id": table.original_id(row),
            "seg_map_path": join_location(seg_folder, seg_name) if seg_folder else None,
            "height": height,
            "width": width,
            "instances": self._instances(table.boxes_of(row)),
        }
        if self.return_classes:
            info.update(
                text=self._metainfo["classes"], caption_prompt=self.caption_prompt, custom_entities=True
            )
        return info

    def _instances(self, boxes: slice) -> list[dict[str, Any]]:
        usable, labels = self._usable_labels(boxes)
        corners = self.table.boxes_xywh[boxes][usable]
        corners[:, 2:] += corners[:, :2]
        crowds = self.table.crowd[boxes][usable].astype(np.int64)
        instances = [
            {"bbox": box, "bbox_label": label, "ignore_flag": crowd}
            for box, label, crowd in zip(corners.tolist(), labels.tolist(), crowds.tolist(), strict=True)
        ]
        if self.with_masks:
            for instance, box in zip(instances, boxes.start + np.flatnonzero(usable), strict=True):
                instance["mask"] = self.table.segmentation(int(box)) or []
        return instances


def check_mmdet_arguments(arguments: Mapping[str, Any], *, with_sources: bool) -> None:
    """Refuse arguments of mmdet's ``CocoDataset`` that would have no effect here.

    Args:
        arguments: what the dataset hands on to mmdet.
        with_sources: whether the images' folders are in ``sources``.

    Raises:
        ValueError: one is given.
    """
    if arguments.get("proposal_file") is not None:
        raise ValueError(
            "SerializedCocoDataset reads no proposals (proposal_file); use CocoDataset for this dataset"
        )
    if arguments.get("file_client_args") is not None:
        raise ValueError("file_client_args is gone from mmdet; use backend_args")
    if with_sources and (arguments.get("data_prefix") or {}).get("seg"):
        raise ValueError(
            "data_prefix['seg'] belongs to ann_file: sources have no folder of segmentation maps"
        )


def wants_masks(pipeline: Any) -> bool:
    """Whether a step of a pipeline, at any depth, is to load instance masks (``with_mask=True``)."""
    if isinstance(pipeline, Mapping):
        return bool(pipeline.get("with_mask")) or any(wants_masks(value) for value in pipeline.values())
    if isinstance(pipeline, (list, tuple)):
        return any(wants_masks(step) for step in pipeline)
    return bool(getattr(pipeline, "with_mask", False)) or wants_masks(getattr(pipeline, "transforms", ()))


def as_filler(sample: Any) -> Any:
    """A packed sample that must not count: without objects, and marked ``is_filler`` in its metainfo."""
    packed = sample["data_samples"]
    packed.gt_instances = packed.gt_instances[:0]
    packed.ignored_instances = packed.ignored_instances[:0]
    packed.set_metainfo({"is_filler": True})
    return sample


# --- Folders of images ---


@DATASETS.register_module()
class ImageFolderDataset(BaseDetDataset):
    """All images of some folders, in the folders' order, sorted by name within each.

    Takes any test pipeline; one with ``LoadAnnotations`` gets empty annotations.

    Args:
        folders: a folder, or several, relative to ``data_root``; single image files count too.
        recursive: search subfolders too.
        unreadable: what happens to an image that cannot be read. ``'error'``: the run stops; ``'skip'``: a
            blank sample takes its place in the batch, with the reason as ``unreadable`` in its metainfo.
        metainfo, data_root, indices, pipeline, lazy_init: as in mmengine's ``BaseDataset``.

    Each data info: ``img_path``, ``img_id`` (the position in the whole list), ``source_id`` (position of
    the folder), ``instances`` (empty), ``sample_idx``.

    Raises:
        DataError: a folder does not exist, or there is no image.
    """

    def __init__(
        self,
        folders: str | os.PathLike[str] | Sequence[str],
        *,
        recursive: bool = False,
        unreadable: str = "error",
        **kwargs: Any,
    ) -> None:
        if unreadable not in ("error", "skip"):
            raise ValueError(f"unreadable must be 'error' or 'skip', not {unreadable!r}")
        self.unreadable = unreadable
        self.folders = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
        self.recursive = recursive
        kwargs.setdefault("data_prefix", {})
        kwargs.setdefault("test_mode", True)
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """The samples; called once by mmengine."""
        root = self.data_root or ""
        folders = [Path(join_location(root, os.fspath(folder))) for folder in self.folders]
        samples = []
        for image_id, path in enumerate(list_images(folders, recursive=self.recursive)):
            source = next(index for index, folder in enumerate(folders) if path.is_relative_to(folder))
            samples.append({"img_path": str(path), "img_id": image_id, "source_id": source, "instances": []})
        return samples

    def prepare_data(self, idx: int) -> Any:
        """Run the pipeline on sample ``idx``.

        Raises:
            DataError: the image file cannot be read, and is not to be skipped.
        """
        info = self.get_data_info(idx)
        try:
            with image_errors_named(info["img_path"], self.backend_args):
                return self.pipeline(info)
        except DataError as error:
            if self.unreadable == "error":
                raise
            return blank_sample(self.pipeline.transforms, self.get_data_info(idx), str(error))


def blank_sample(transforms: Sequence[Any], info: Mapping[str, Any], reason: str) -> Any:
    """What a pipeline makes of a blank image, to fill the place of one that cannot be read.

    It is as small as the pipeline allows, so that it does not pad the other images of its batch.

    Args:
        transforms: the pipeline's: one that loads the image, any others, one that packs.
        info: the data info of the image.
        reason: becomes ``unreadable`` in the sample's metainfo.
    """

    def packed(size_hw: tuple[int, int], steps: Sequence[Any]) -> Any:
        results = dict(info, img=np.zeros((*size_hw, 3), np.uint8), scale_factor=(1.0, 1.0))
        results["img_shape"] = results["ori_shape"] = size_hw
        for step in steps:
            results = step(results)
        return results

    lying, standing = (packed(size_hw, transforms[1:]) for size_hw in ((32, 64), (64, 32)))
    stretched = lying["inputs"].shape == standing["inputs"].shape
    sample = lying if stretched else packed((32, 32), transforms[-1:])
    sample["data_samples"].set_metainfo({"unreadable": reason})
    return sample
