"""``ddetr-mm coco merge|split|to-kitti``: what people do with annotation files around a training."""

from __future__ import annotations

from argparse import Namespace

from ddetr_mm.datasets.coco_tools import coco_to_kitti, merge_coco, split_coco
from ddetr_mm.errors import DataError, Problem


def run(arguments: Namespace) -> None:
    """Run the chosen action and print what it did."""
    {"merge": merge, "split": split, "to-kitti": to_kitti}[arguments.action](arguments)


def merge(arguments: Namespace) -> None:
    """Several COCO files into one."""
    report = merge_coco(arguments.inputs, arguments.output)
    print(
        f"{report.num_files} files, {report.num_images} images, {report.num_annotations} annotations "
        f"in {arguments.output}"
    )
    for name in report.changed_categories:
        print(f"category {name} has id {report.category_ids[name]} now")


def split(arguments: Namespace) -> None:
    """One COCO file into parts with like shares of every class."""
    fractions = dict(read_part(text) for text in arguments.parts)
    for name, part in split_coco(arguments.input, arguments.output, fractions, seed=arguments.seed).items():
        boxes = ", ".join(f"{category} {count}" for category, count in part.boxes_per_category.items())
        print(f"{name}: {part.num_images} images ({boxes}) in {part.path}")


def read_part(text: str) -> tuple[str, float]:
    """``train=0.8`` as a name and a share.

    Raises:
        DataError: for anything else.
    """
    name, _, share = text.partition("=")
    try:
        return name, float(share)
    except ValueError:
        raise DataError(
            Problem("is no part", where="--parts", value=text, allowed="NAME=FRACTION, e.g. train=0.8")
        ) from None


def to_kitti(arguments: Namespace) -> None:
    """COCO files back into KITTI label files."""
    report = coco_to_kitti(arguments.inputs, arguments.output)
    print(f"{report.num_files} label files with {report.num_lines} objects in {arguments.output}")
    if report.num_crowds:
        print(f"{report.num_crowds} crowd regions were written as DontCare")
    for category, name in report.renamed_classes.items():
        print(f"category {category!r} was written as {name}, for KITTI separates columns by spaces")
