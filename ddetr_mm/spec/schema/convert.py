"""The spec of ``convert``: one flat mapping, not an experiment."""

from __future__ import annotations

from dataclasses import dataclass

from ddetr_mm.spec.schema.fields import OURS, section, spec_field
from ddetr_mm.spec.schema.own import OwnConvertSection


@dataclass
class ConvertSpec:
    """KITTI folders to sharded COCO annotation files."""

    input_source: str | None = spec_field(
        None, doc="Text file that lists one sequence folder per line, relative to data_root if given."
    )
    data_root: str | None = spec_field(
        None, doc="Folder the listed sequences are relative to; null: the lines stand as they are."
    )
    results_dir: str | None = spec_field(
        None, placeholder=True, doc="Folder the annotation files are written to."
    )
    image_dir_name: str | None = spec_field(None, doc="Folder of the images inside a sequence folder.")
    label_dir_name: str | None = spec_field(
        None, doc="Folder of the KITTI label files inside a sequence folder."
    )
    val_split: int = spec_field(
        0,
        ge=0,
        le=100,
        doc="Percent of the images that go to validation (fold 0); acts with partition_mode: random.",
    )
    num_shards: int = spec_field(32, ge=1, doc="Number of annotation files per sequence and partition.")
    num_partitions: int = spec_field(1, ge=1, doc="Number of folds the data is divided into.")
    partition_mode: str | None = spec_field(
        None,
        options=("random", "sequence"),
        doc="""How folds are made. null: none; random: 2 folds of images, drawn at random; sequence: whole
        sequences are dealt out to the folds.""",
    )
    image_extension: str | None = spec_field(
        None,
        pattern=r"\.\w+",
        pattern_words="a dot and letters, as in .jpg",
        doc="The only file extension that counts as an image; null: every common one.",
    )
    mapping_path: str | None = spec_field(
        None, doc="JSON file with an object of label name to category name; null: the default mapping."
    )
    ddetr_mm: OwnConvertSection = section(OwnConvertSection, origin=OURS)
