"""``ddetr-mm convert``: KITTI folders to sharded COCO JSON."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from ddetr_mm.convert.convert import ConvertOptions, convert_kitti
from ddetr_mm.engine.progress import Progress
from ddetr_mm.spec import ConvertSpec, load_spec
from ddetr_mm.tasks.session import open_session


def run(arguments: Namespace) -> None:
    """Convert; leaves the shards, ``stats.txt`` and ``warnings.json``."""
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, "convert")
    with open_session(loaded, "convert") as session, Progress("converting", unit="images") as progress:
        report = convert_kitti(
            convert_options(loaded.spec), progress=progress.update, status=session.status.write
        )
    for line in report.warning_lines():
        print(f"warning: {line}", file=sys.stderr)
    if report.problem_counts:
        print(f"warning: each one is listed in {report.warnings_path}", file=sys.stderr)
    print(
        f"{report.num_images} images, {report.num_annotations} boxes, {len(report.shard_paths)} shards in "
        f"{report.results_dir} ({report.images_per_second:,.0f} images/s)"
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
        pad_shards=spec.ddetr_mm.pad_shards,
        num_workers=spec.ddetr_mm.num_workers,
    )
