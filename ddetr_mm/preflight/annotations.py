"""All that can be proved from annotation files and image files alone: no network, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ddetr_mm.errors import DataError
from ddetr_mm.preflight.boxes import check_boxes
from ddetr_mm.preflight.classes import check_between_splits, check_split_classes
from ddetr_mm.preflight.colors import check_colors
from ddetr_mm.preflight.content import check_content
from ddetr_mm.preflight.findings import FAULT, Finding, Section, note
from ddetr_mm.preflight.fit import check_fit
from ddetr_mm.preflight.images import check_ages, check_images
from ddetr_mm.preflight.overlap import check_overlap
from ddetr_mm.preflight.split import Split
from ddetr_mm.preflight.thumbnails import thumbnails
from ddetr_mm.spec.schema.dataset import AugmentationConfig

THUMBNAILS, THUMBNAILS_FULL = 64, 500
"""Images of a split whose colours and content are looked at."""

QUICK_SAMPLE = 40
"""Images of a split whose files the quick part looks at."""


def read_splits(
    named_sources: Mapping[str, Sequence[Mapping[str, str]]], storage: str = "process"
) -> tuple[list[Split], list[Section]]:
    """Read the annotations of all splits.

    Args:
        named_sources: split name → its ``{image_dir, json_file}``.
        storage: see :func:`~ddetr_mm.data.sources.read_coco_sources`.

    Returns:
        The splits that could be read, and a section for each that could not.
    """
    splits, failures = [], []
    for name, sources in named_sources.items():
        try:
            splits.append(Split.read(name, sources, storage))
        except DataError as error:
            found = [Finding("annotations-unreadable", problem, FAULT) for problem in error.problems]
            failures.append(Section(f"annotations of {name}", findings=found))
    return splits, failures


def quick_sections(
    splits: Sequence[Split], num_classes: int, eval_class_ids: Sequence[int] | None
) -> Iterator[Section]:
    """What costs well under a second: ids, boxes, a few files. ``train`` does it by itself.

    Args:
        splits: the data.
        num_classes: class columns of the network.
        eval_class_ids: categories that evaluation is restricted to.
    """
    for split in splits:
        yield check_split_classes(split, num_classes, eval_class_ids)
        yield check_boxes(split)
        yield check_images(split, sample=QUICK_SAMPLE)
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
    """Everything about annotations and files.

    Args:
        splits: the data.
        num_classes: class columns of the network.
        eval_class_ids: categories that evaluation is restricted to.
        augmentation: the spec's sizes, mean and standard deviation.
        full: look at every image, not at a sample.
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
    # What the pictures show means nothing where boxes or files are known to be wrong.
    small = {split.name: thumbnails(split, THUMBNAILS_FULL if full else THUMBNAILS) for split in sound}
    yield check_colors(small, augmentation.input_mean, augmentation.input_std)
    for split in sound:
        yield check_content(split, small[split.name])


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
    ages = check_ages(split, split.spread_rows(QUICK_SAMPLE).tolist())
    if ages.findings:
        yield ages
