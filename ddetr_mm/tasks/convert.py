"""``ddetr-mm convert``: KITTI folders to sharded COCO JSON."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from ddetr_mm.convert.convert import ConvertOptions, convert_kitti
from ddetr_mm.convert.problems import most_frequent
from ddetr_mm.engine.progress import Progress
from ddetr_mm.errors import printable
from ddetr_mm.spec import ConvertSpec, load_spec
from ddetr_mm.tasks.session import open_session

_SHOWN_CLASSES = 30
_SHOWN_LINES = 40


def run(arguments: Namespace) -> None:
    """Convert; leaves the shards, ``stats.txt``, ``warnings.json`` and ``dataset.yaml``."""
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, "convert")
    with open_session(loaded, "convert") as session, Progress("converting", unit="images") as progress:
        report = convert_kitti(
            convert_options(loaded.spec), progress=progress.update, status=session.status.write
        )
    for line in report.warning_lines():
        print(f"warning: {printable(line)}", file=sys.stderr)
    if report.problem_counts:
        print(f"warning: each one is listed in {report.warnings_path}", file=sys.stderr)
    if report.unknown_classes:
        by_number = most_frequent(report.unknown_classes)
        shown = ", ".join(f"{name} {count:,}" for name, count in by_number[:_SHOWN_CLASSES])
        more = ", ..." if len(by_number) > _SHOWN_CLASSES else ""
        text = f"lines of classes that the mapping lacks: {shown}{more}"
        print(f"warning: {printable(text)}", file=sys.stderr)
    print(
        f"{report.num_images} images, {report.num_annotations} boxes, {len(report.shard_paths)} shards in "
        f"{report.results_dir} ({report.images_per_second:,.0f} images/s)"
    )
    boxes = report.boxes_per_category
    counts = ", ".join(
        f"{number} {name} {boxes.get(name, 0):,}" for name, number in report.category_ids.items()
    )
    print(f"boxes by class (id, name, count): {printable(counts)}")
    lines = report.dataset_section.splitlines()
    shown = lines[:_SHOWN_LINES] + (["  ..."] if len(lines) > _SHOWN_LINES else [])
    print(
        f"next: put this section, which is {report.dataset_path}, into the spec for train:",
        *map(printable, shown),
        sep="\n",
    )


def convert_options(spec: ConvertSpec) -> ConvertOptions:
    """The spec in the words of the converter."""
    return ConvertOptions(
        input_source=Path(spec.input_source),
        results_dir=Path(spec.results_dir),
        data_root=Path(spec.data_root) if spec.data_root else None,
        image_dir_name=spec.image_dir_name,
        label_dir_name=spec.label_dir_name,
        num_shards=spec.num_shards,
        num_partitions=spec.num_partitions,
        partition_mode=spec.partition_mode,
        val_split=spec.val_split,
        image_extension=spec.image_extension,
        mapping_path=Path(spec.mapping_path) if spec.mapping_path else None,
        strict=spec.ddetr_mm.strict,
        allow_empty=spec.ddetr_mm.allow_empty,
        pad_shards=spec.ddetr_mm.pad_shards,
        num_workers=spec.ddetr_mm.num_workers,
    )
